"""Publishing while training goes on: it never delays training and never mixes two models."""

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm import hub as ddpm_hub
from ddpm.config.train import HubConfig
from ddpm.errors import UserError
from ddpm.file_io import file_sha256, write_json
from ddpm.publishing import background
from ddpm.publishing.background import Publisher, Upload, UploadThread
from ddpm.run_folder import CHECKPOINT_STATE, PROOF, PUBLISHED, RECORD, UNET_WEIGHTS
from ddpm.run_record import write_record
from ddpm.sampling import proof
from tests.conftest import ROOT
from tests.hub import Fault


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr(ddpm_hub.time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


@pytest.fixture
def unfinished(run_folder):
    """A run folder in the middle of training."""
    write_record(run_folder, training=None, finished=False)
    return run_folder


@pytest.fixture
def messages():
    return []


@pytest.fixture
def make_publisher(hub, alice, unfinished, messages, request):
    publishers = []

    def make(*, main=True, **flags):
        name = request.node.name.replace("[", "-").strip("]")[:60]
        config = HubConfig(hub_model_id=f"alice/{name}", **{"push_to_hub": True, **flags})
        publishers.append(Publisher(unfinished, config, main=main, report=messages.append))
        return publishers[-1]

    yield make
    hub.clear_faults()
    for publisher in publishers:
        publisher._pipelines.join(60)
        publisher._checkpoints.join(60)


def change_weights(folder):
    """Replace the weights by others and write the proof, as the next export does."""
    weights = load_file(folder / UNET_WEIGHTS)
    partial = folder / "unet" / "next"
    save_file({name: value + 1 for name, value in weights.items()}, partial)
    partial.replace(folder / UNET_WEIGHTS)
    proof.write_proof_from_folder(folder, "the run")


def write_checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    save_file({"w": torch.full((64, 64), float(step))}, checkpoint / "model.safetensors")
    torch.save({"state": {}}, checkpoint / "optimizer.bin")
    state = {"step": step, "micro_batches": 1, "pixels_sha256": "", "seconds": 1.5}
    write_json(checkpoint / CHECKPOINT_STATE, {**state, "num_parameters": 4096})
    return checkpoint


def test_the_snapshot_is_published_not_the_next_export(hub, make_publisher, unfinished, messages):
    publisher = make_publisher()
    sha256 = file_sha256(unfinished / UNET_WEIGHTS)
    hub.inject(Fault("delay", path="/repos/create", seconds=0.3))
    publisher.submit(500)
    change_weights(unfinished)
    publisher._pipelines.join(60)
    repository = hub.repo("model", publisher.repo_id)
    assert repository.file_at("main", UNET_WEIGHTS).sha256 == sha256
    assert json.loads(repository.read(PROOF))["files"][UNET_WEIGHTS] == sha256
    assert repository.commits()[0].title == "Step 500"
    assert "500 steps so far" in repository.read("README.md").decode()
    record = json.loads((unfinished / RECORD).read_text())
    assert "training" not in record, "the run's own record was written to"
    assert messages == [
        f"Step 500 is on the Hub: {hub.url}/{publisher.repo_id}/commit/{repository.resolve()}"
    ]
    assert not list((unfinished / background.SNAPSHOTS).iterdir())


def test_submitting_waits_for_nothing_and_the_thread_uses_no_torch(
    hub, make_publisher, messages, monkeypatch
):
    """Loading a model in a thread would replace functions of torch.nn under the training loop."""

    def fail(*args, **kwargs):
        raise AssertionError("torch was used in the thread")

    for name in ("load_with_diffusers", "draw_proof_images", "write_proof"):
        monkeypatch.setattr(proof, name, fail)
    publisher = make_publisher()
    hub.inject(Fault("delay", seconds=0.5))
    hub.clear_requests()
    publisher.submit(7)
    assert (
        publisher._pipelines._thread.daemon and hub.store.find("models", publisher.repo_id) is None
    )
    publisher._pipelines.join(60)
    assert "Step 7 is on the Hub" in messages[0]


def test_rights_are_checked_before_anything(hub, alice, run_folder):
    def publisher(repo_id, **flags):
        return Publisher(run_folder, HubConfig(push_to_hub=True, hub_model_id=repo_id, **flags))

    with pytest.raises(UserError, match="may not write to bob"):
        publisher("bob/x")
    hub.create_repo("model", "alice/seen-by-all")
    with pytest.raises(UserError, match="is public, which --private does not change"):
        publisher("alice/seen-by-all", hub_private_repo=True)
    hub.create_repo("model", "alice/open-training-state")
    with pytest.raises(UserError, match="a training state is never sent to a public"):
        publisher("alice/open", hub_checkpoints=True)
    publisher("alice/open")
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}


def test_a_run_that_publishes_nothing_needs_no_hub(hub, run_folder):
    publisher = Publisher(run_folder, HubConfig())
    publisher.submit(1)
    publisher.submit_checkpoint(run_folder)
    publisher.finish()
    publisher.stop()
    assert not hub.requests


def test_other_processes_send_nothing(hub, make_publisher, unfinished):
    publisher = make_publisher(hub_checkpoints=True, main=False)
    publisher.submit(1)
    publisher.submit_checkpoint(write_checkpoint(unfinished, 1))
    publisher.finish()
    assert not hub.count("POST")


def test_a_failure_is_reported_once_and_the_next_save_tries_again(hub, make_publisher, messages):
    publisher = make_publisher()

    def submit(step):
        publisher.submit(step)
        publisher._pipelines.join(60)

    hub.inject(Fault("status", status=503, times=None))
    for step in (1, 2, 3):
        submit(step)
    assert len(messages) == 1 and "Step 1 did not reach the Hub" in messages[0]
    assert "has a problem (503)" in messages[0] and "Training goes on" in messages[0]
    hub.clear_faults()
    submit(4)
    assert len(messages) == 2 and "Step 4 is on the Hub" in messages[1]
    hub.inject(Fault("drop", times=None))
    submit(5)
    assert len(messages) == 3 and "Step 5 did not reach the Hub" in messages[2]


def test_of_the_uploads_that_wait_the_newest_is_sent(hub, make_publisher, unfinished):
    publisher = make_publisher()
    hub.inject(Fault("delay", path="/repos/create", seconds=0.5))
    publisher.submit(1)
    deadline = time.monotonic() + 60
    while publisher._pipelines._waiting is not None and time.monotonic() < deadline:
        time.sleep(0.01)  # until the first is being sent
    publisher.submit(2)
    publisher.submit(3)
    publisher._pipelines.join(60)
    titles = [commit.title for commit in hub.repo("model", publisher.repo_id).commits()]
    assert titles == ["Step 3", "Step 1", "initial commit"]
    assert not list((unfinished / background.SNAPSHOTS).iterdir())


def test_checkpoints_go_to_a_private_repository(hub, make_publisher, unfinished):
    publisher = make_publisher(hub_checkpoints=True)
    for step in (1, 2):
        publisher.submit_checkpoint(write_checkpoint(unfinished, step))
        publisher._checkpoints.join(60)
    repository = hub.repo("model", f"{publisher.repo_id}-training-state")
    assert repository.is_private and len(repository.commits()) == 1
    assert json.loads(repository.read("state.json"))["step"] == 2
    assert "metrics.jsonl" in repository.files()
    assert hub.store.find("models", publisher.repo_id) is None


def test_a_checkpoint_may_be_deleted_while_it_is_sent(hub, make_publisher, unfinished):
    publisher = make_publisher(push_to_hub=False, hub_checkpoints=True)
    hub.inject(Fault("delay", path="/repos/create", seconds=0.3))
    checkpoint = write_checkpoint(unfinished, 1)
    sha256 = file_sha256(checkpoint / "model.safetensors")
    publisher.submit_checkpoint(checkpoint)
    shutil.rmtree(checkpoint)
    publisher._checkpoints.join(60)
    repository = hub.repo("model", publisher.checkpoint_repo_id)
    assert repository.file_at("main", "model.safetensors").sha256 == sha256


def test_the_end_is_published_and_verified(hub, make_publisher, unfinished, messages):
    publisher = make_publisher(hub_checkpoints=True)
    publisher.submit(3)
    publisher.submit_checkpoint(write_checkpoint(unfinished, 6))
    publisher._pipelines.join(60)
    change_weights(unfinished)
    write_record(unfinished, finished=True, training={"steps": 6})
    publisher.finish()
    facts = json.loads((unfinished / PUBLISHED).read_text())
    repository = hub.repo("model", publisher.repo_id)
    assert facts["commit"] == repository.resolve() and facts["proof"]["largest_difference"] == 0
    assert len(repository.commits()) == 3 and "6 steps.\n" in repository.read("README.md").decode()
    assert "Published and proved" in "\n".join(messages)
    assert hub.repo("model", publisher.checkpoint_repo_id).is_private
    assert not (unfinished / background.SNAPSHOTS).exists()


def test_a_later_step_is_never_replaced_while_training_goes_on(
    hub, make_publisher, unfinished, messages
):
    """An upload that another process left behind, or another run: the newer model stays."""
    publisher = make_publisher(hub_checkpoints=True)

    def send(step):
        publisher.submit(step)
        publisher.submit_checkpoint(write_checkpoint(unfinished, step))
        publisher._pipelines.join(60)
        publisher._checkpoints.join(60)

    send(20)
    model, state = (
        hub.repo("model", name) for name in (publisher.repo_id, publisher.checkpoint_repo_id)
    )
    commits = model.resolve(), state.resolve()
    change_weights(unfinished)
    messages.clear()
    send(10)
    assert (model.resolve(), state.resolve()) == commits
    assert sorted(message.partition(" did not reach")[0] for message in messages) == [
        "Step 10",
        "The state of checkpoint-10",
    ]
    assert all("holds step 20 already" in message for message in messages)
    send(21)
    assert json.loads(model.read(RECORD))["training"]["steps"] == 21
    assert json.loads(state.read(CHECKPOINT_STATE))["step"] == 21


@pytest.mark.parametrize("name", ["samples", "samples/step-999999.png", "metrics.jsonl"], ids=len)
def test_links_are_in_no_snapshot(hub, make_publisher, unfinished, messages, tmp_path, name):
    """A hard link to what a symbolic link names would pass as a file of the run."""
    publisher, outside = make_publisher(), tmp_path / "outside"
    if (unfinished / name).exists():
        (unfinished / name).rename(outside)
    else:
        outside.write_bytes((unfinished / "proof" / "seed-00000.png").read_bytes())
    (unfinished / name).symlink_to(outside)
    publisher.submit(1)
    publisher._pipelines.join(60)
    assert len(messages) == 1 and "is a link, so what it holds may change" in messages[0]
    assert hub.store.find("models", publisher.repo_id) is None


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/repos/create", "/preupload/", "/xorbs/"])
def test_an_upload_ends_with_its_killed_process(hub, alice, start, unfinished, tmp_path, path):
    """SIGKILL in the middle of a request: no process is left, and no commit comes later."""
    code = (
        "import sys, time; from pathlib import Path; from ddpm.config.train import HubConfig\n"
        "from ddpm.publishing.background import Publisher\n"
        "config = HubConfig(push_to_hub=True, hub_model_id=sys.argv[2])\n"
        "Publisher(Path(sys.argv[1]), config).submit(10); time.sleep(600)\n"
    )
    hub.inject(Fault("delay", path=path, seconds=2))
    repo_id = f"alice/killed-in{path.replace('/', '-')}0"
    process = start([sys.executable, "-c", code, unfinished, repo_id], start_new_session=True)
    end = time.monotonic() + 120
    while not hub.faults.waiting()[0]["seen"]:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait()
    left = [p.pid for p in psutil.process_iter() if os.getpgid(p.pid) == process.pid]
    assert not left
    time.sleep(3)
    repository = hub.store.find("models", repo_id)
    assert repository is None or len(repository.commits()) <= 1


def test_a_failure_at_the_end_names_the_command(hub, make_publisher, unfinished):
    publisher = make_publisher(hub_private_repo=True, hub_checkpoints=True)
    hub.inject(Fault("status", status=503, times=None))
    with pytest.raises(UserError, match=rf"The model is in {unfinished}.*push.py .* --private$"):
        publisher.finish()
    hub.clear_faults()
    publisher = make_publisher(push_to_hub=False, hub_checkpoints=True)
    hub.inject(Fault("status", status=503, times=None))
    publisher.submit_checkpoint(write_checkpoint(unfinished, 1))
    with pytest.raises(UserError, match=f"The last checkpoint did not .*It is in {unfinished}"):
        publisher.finish()


def test_a_full_disk_does_not_stop_training(make_publisher, messages, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    publisher = make_publisher()
    monkeypatch.setattr(background, "_link", fail)
    publisher.submit(1)
    assert messages == [
        "Step 1 is not sent to the Hub: no snapshot could be made (No space left on "
        "device). Training goes on."
    ]


def test_an_unexpected_error_is_logged_and_the_thread_goes_on(tmp_path, messages):
    def fail():
        raise KeyboardInterrupt("http://a:s3cr3t@b\n\x1b]0;t\x07")  # hf_xet raises this type

    thread = UploadThread(messages.append, tmp_path / "logs" / "publishing.log")
    for title, send in (("One", fail), ("Two", lambda: "an address")):
        thread.submit(Upload(title, tmp_path / title, send))
        thread.join(10)
    assert "One did not reach the Hub: KeyboardInterrupt" in messages[0]
    assert messages[1:] == ["Two is on the Hub: an address"] and thread.failure is None
    log = (tmp_path / "logs" / "publishing.log").read_text()
    assert "Traceback" in log and "http://***@b" in log
    assert "s3cr3t" not in log + messages[0] and "\x1b" not in log and messages[0].isprintable()


def test_a_stop_waits_a_moment_for_the_checkpoint_alone(
    hub, make_publisher, unfinished, messages, monkeypatch
):
    """The pipeline's push hangs before its commit: it is left alone, and its branch stays whole."""
    publisher = make_publisher(hub_checkpoints=True)
    hub.inject(Fault("delay", path=f"/api/models/{publisher.repo_id}/commit/", seconds=1))
    publisher.submit(7)
    while not hub.faults.waiting()[0]["seen"]:
        time.sleep(0.01)
    publisher.submit_checkpoint(write_checkpoint(unfinished, 7))
    publisher.stop()
    assert publisher._pipelines._thread is not None, "the stop waited for the pipeline"
    assert [message[:28] for message in messages] == ["The state of checkpoint-7 is"]
    assert set(hub.repo("model", publisher.repo_id).files()) == {".gitattributes"}
    assert not (unfinished / background.SNAPSHOTS).exists()
    # A checkpoint that hangs gets GRACE seconds.
    monkeypatch.setattr(background, "GRACE", 0.1)
    hub.inject(Fault("delay", path="/repos/create", seconds=1))
    publisher = make_publisher(hub_checkpoints=True)
    publisher.submit_checkpoint(write_checkpoint(unfinished, 8))
    publisher.stop()
    assert publisher._checkpoints._thread is not None and len(messages) == 1


HANGING_UPLOAD = """
import sys, time
from pathlib import Path
from ddpm.publishing.background import Upload, UploadThread
thread = UploadThread(print, Path("log"))
thread.submit(Upload("It", Path("snapshot"), lambda: time.sleep(600)))
thread.join(0.1)
sys.exit(143)
"""


@pytest.mark.slow
def test_a_hanging_upload_does_not_keep_the_process():
    result = subprocess.run(
        [sys.executable, "-c", HANGING_UPLOAD],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 143 and not result.stderr
