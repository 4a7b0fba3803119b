"""Publishing while training goes on: never in its way, never a mix of two models."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm import hub as hub_module
from ddpm.errors import UserError
from ddpm.publishing import background, checkpoint_repo
from ddpm.publishing.background import Publisher
from ddpm.run_folder import PUBLISHED, RECORD, UNET_WEIGHTS, write_json, write_record
from ddpm.sampling import pipeline, proof
from tests.hub import Fault

WEIGHTS = UNET_WEIGHTS


class Thread(threading.Thread):
    """Stands in for the process of a job, so that most tests need no second import of torch.

    It cannot be killed, so a kill waits for its end: while diffusers loads a model, no other thread
    may make one (which is why the real thing is a process).
    """

    exitcode = 0

    def __init__(self, job, sender):
        super().__init__(daemon=True)
        self.job, self.sender = job, sender

    def run(self):
        try:
            outcome = (True, self.job.work(self.job.snapshot, *self.job.arguments))
        except UserError as error:
            outcome = (False, str(error))
        self.sender.send(outcome)
        self.sender.close()

    def kill(self):
        self.join()


@pytest.fixture
def threads(monkeypatch):
    """Jobs run in threads and nobody sleeps between tries."""
    from multiprocessing import Pipe

    started = []

    def start(job, log):
        receiver, sender = Pipe(duplex=False)
        started.append(Thread(job, sender))
        started[-1].start()
        return job, started[-1], receiver

    real = time.sleep
    monkeypatch.setattr(background, "_start", start)
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: real(min(seconds, 0.01)))
    return started


@pytest.fixture
def going_on(run_folder):
    """A run folder in the middle of training."""
    write_record(run_folder, training=None, finished=False)
    return run_folder


@pytest.fixture
def said():
    return []


@pytest.fixture
def publisher(hub, alice, going_on, said, request):
    made = []

    def make(**options):
        name = request.node.name.replace("[", "-").strip("]")[:60]
        made.append(Publisher(going_on, f"alice/{name}", say=said.append, **options))
        return made[-1]

    yield make
    for each in made:
        each._pipelines.kill()
        each._checkpoints.kill()


def other_weights(folder):
    """Export a model that differs, as the next save of the run does: by a rename."""
    weights = load_file(folder / WEIGHTS)
    partial = folder / "unet" / "next"
    save_file({name: value + 1 for name, value in weights.items()}, partial)
    partial.replace(folder / WEIGHTS)


def checkpoint_of(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    save_file({"w": torch.full((64, 64), float(step))}, checkpoint / "model.safetensors")
    torch.save({"state": {}}, checkpoint / "optimizer.bin")
    write_json(checkpoint / checkpoint_repo.STATE, {"step": step})
    return checkpoint


def test_what_is_published_is_what_was_there(hub, publisher, going_on, said, threads):
    """The next export, while the push is under way, does not get into it."""
    published = publisher()
    sha256 = pipeline.file_sha256(going_on / WEIGHTS)
    hub.inject(Fault("delay", path="/repos/create", seconds=0.3))
    published.submit(500)
    other_weights(going_on)
    published._pipelines.drain(60)
    repository = hub.repo("model", published.repo_id)
    assert repository.file_at("main", WEIGHTS).sha256 == sha256
    assert repository.commits()[0].title == "Step 500"
    assert "500 steps so far" in repository.read("README.md").decode()
    record = json.loads((going_on / RECORD).read_text())
    assert "training" not in record, "the run's own record was written to"
    assert said == [
        f"Step 500 is on the Hub: {hub.url}/{published.repo_id}/commit/{repository.resolve()}"
    ]
    assert not list((going_on / background.SNAPSHOTS).iterdir())


def test_rights_are_asked_for_before_anything(hub, alice, run_folder):
    with pytest.raises(UserError, match="may not write to bob"):
        Publisher(run_folder, "bob/x")
    hub.create_repo("model", "alice/seen-by-all")
    with pytest.raises(UserError, match="is public, which --private does not change"):
        Publisher(run_folder, "alice/seen-by-all", private=True)
    hub.create_repo("model", "alice/open-training-state")
    with pytest.raises(UserError, match="a training state is never sent to a public"):
        Publisher(run_folder, "alice/open", checkpoints=True)
    Publisher(run_folder, "alice/open")
    assert not [each for each in hub.requests if each.method not in ("GET", "HEAD")]


def test_a_hub_that_is_down_is_said_once_and_tried_again(hub, publisher, said, threads):
    published = publisher()
    hub.inject(Fault("status", status=503, times=None))
    for step in (1, 2, 3):
        published.submit(step)
        published._pipelines.drain(60)
    assert len(said) == 1 and "Step 1 did not reach the Hub" in said[0]
    assert "in trouble (503)" in said[0] and "Training goes on" in said[0]
    hub.clear_faults()
    published.submit(4)
    published._pipelines.drain(60)
    assert len(said) == 2 and "Step 4 is on the Hub" in said[1]
    hub.inject(Fault("drop", times=None))
    published.submit(5)
    published._pipelines.drain(60)
    assert len(said) == 3 and "Step 5 did not reach the Hub" in said[2]


def test_the_newest_waits_its_turn(hub, publisher, going_on, threads):
    """While one push runs, a later one waits, and of those that wait only the newest goes."""
    published = publisher()
    hub.inject(Fault("delay", path="/repos/create", seconds=0.5))
    for step in (1, 2, 3):
        published.submit(step)
        other_weights(going_on)
    assert len(threads) == 1
    published._pipelines.drain(60)
    titles = [commit.title for commit in hub.repo("model", published.repo_id).commits()]
    assert titles == ["Step 3", "Step 1", "initial commit"]


def test_checkpoints_go_to_a_private_repository_beside(hub, publisher, going_on, threads):
    published = publisher(checkpoints=True)
    for step in (1, 2):
        published.submit_checkpoint(checkpoint_of(going_on, step))
        published._checkpoints.drain(60)
    repository = hub.repo("model", f"{published.repo_id}-training-state")
    assert repository.is_private and len(repository.commits()) == 1
    assert json.loads(repository.read("state.json"))["step"] == 2
    assert "metrics.jsonl" in repository.files()
    assert hub.store.find("models", published.repo_id) is None


def test_pruning_a_checkpoint_does_not_disturb_its_push(hub, publisher, going_on, threads):
    import shutil

    published = publisher(pipelines=False, checkpoints=True)
    hub.inject(Fault("delay", path="/repos/create", seconds=0.3))
    checkpoint = checkpoint_of(going_on, 1)
    sha256 = pipeline.file_sha256(checkpoint / "model.safetensors")
    published.submit_checkpoint(checkpoint)
    shutil.rmtree(checkpoint)
    published._checkpoints.drain(60)
    repository = hub.repo("model", published.state_repo)
    assert repository.file_at("main", "model.safetensors").sha256 == sha256


def test_the_end_is_published_with_its_proof(hub, publisher, going_on, said, threads):
    published = publisher(checkpoints=True)
    published.submit(3)
    published.submit_checkpoint(checkpoint_of(going_on, 6))
    published._pipelines.drain(60)
    other_weights(going_on)
    proof.write_proof_from_folder(going_on, "the run")
    write_record(going_on, finished=True, training={"steps": 6})
    published.finish()
    facts = json.loads((going_on / PUBLISHED).read_text())
    repository = hub.repo("model", published.repo_id)
    assert facts["commit"] == repository.resolve() and facts["proof"]["largest_difference"] == 0
    assert len(repository.commits()) == 3 and "6 steps.\n" in repository.read("README.md").decode()
    assert "Published and proved" in "\n".join(said)
    assert hub.repo("model", published.state_repo).is_private
    assert not (going_on / background.SNAPSHOTS).exists()


def test_a_hub_that_is_down_at_the_end_is_told_with_the_command(hub, publisher, going_on, threads):
    published = publisher(private=True)
    hub.inject(Fault("status", status=503, times=None))
    with pytest.raises(UserError, match=rf"The model is in {going_on}.*push.py .* --private$"):
        published.finish()


def test_other_processes_ask_but_send_nothing(hub, publisher, going_on, threads):
    published = publisher(checkpoints=True, main=False)
    published.submit(1)
    published.submit_checkpoint(checkpoint_of(going_on, 1))
    published.finish()
    assert not threads and not [each for each in hub.requests if each.method == "POST"]


def test_a_full_disk_is_no_reason_to_stop(publisher, said, threads, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    published = publisher()
    monkeypatch.setattr(background, "_link", full)
    published.submit(1)
    assert said == [
        "Step 1 is not sent to the Hub: no snapshot could be made (No space left on "
        "device). Training goes on."
    ]


def test_a_process_of_its_own(hub, publisher, going_on, said):
    """The real thing: the call comes back while the push has yet to ask its first question."""
    published = publisher()
    hub.clear_requests()
    published.submit(7)
    assert not hub.requests and published._pipelines.poll()
    process = published._pipelines._running[1]
    command = Path(f"/proc/{process.pid}/cmdline")
    if command.exists():
        assert b"hf_" not in command.read_bytes()
    published._pipelines.drain(120)
    assert process.exitcode == 0 and "Step 7 is on the Hub" in said[0]
    assert len(hub.repo("model", published.repo_id).commits()) == 2


@pytest.mark.slow
def test_a_stop_ends_the_push_and_leaves_the_branch_whole(hub, publisher, going_on, said):
    published = publisher()
    hub.inject(Fault("delay", path="/commit/", seconds=60))
    published.submit(7)
    process = published._pipelines._running[1]
    end = time.monotonic() + 100
    while not hub.faults.waiting()[0]["seen"]:
        assert time.monotonic() < end and process.is_alive()
        time.sleep(0.05)
    published.stop()
    assert process.exitcode is not None and not said
    assert set(hub.repo("model", published.repo_id).files()) == {".gitattributes"}
    assert not (going_on / background.SNAPSHOTS).exists()
