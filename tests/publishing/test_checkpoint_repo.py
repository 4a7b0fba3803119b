"""A training state goes through a private repository and comes back bit for bit."""

import hashlib
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm import file_io, run_folder
from ddpm.errors import UsageError, UserError
from ddpm.hub import time
from ddpm.publishing import checkpoint_repo
from ddpm.run_folder import CHECKPOINT_STATE
from tests.hub import Fault

STATE = {"micro_batches": 1, "pixels_sha256": "", "seconds": 1.5, "num_parameters": 4096}
FILES = {"ema.safetensors", "metrics.jsonl", "model.safetensors", "optimizer.bin", "state.json"}


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def make_checkpoint(tmp_path):
    """make(step) -> checkpoint-STEP with other numbers for each step, and metrics.jsonl."""

    def make(step, folder=tmp_path / "run"):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        weights = {"w": torch.full((64, 64), float(step))}
        save_file(weights, checkpoint / "model.safetensors")
        save_file({"w": weights["w"] / 2}, checkpoint / "ema.safetensors")
        moments = {
            "state": {0: {"step": torch.tensor(float(step)), "exp_avg": weights["w"] / 3}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        }
        torch.save(moments, checkpoint / "optimizer.bin")
        file_io.write_json(checkpoint / CHECKPOINT_STATE, {**STATE, "step": step})
        (checkpoint / run_folder.METRICS).write_text(json.dumps({"step": step, "loss": 0.5}) + "\n")
        return checkpoint

    return make


@pytest.fixture
def repo_id(request):
    short = hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    return f"alice/{short}-training-state"


def content(folder, names=None):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and (names is None or path.name in names)
    }


def files_on_branch(hub, repo_id):
    return set(hub.repo("model", repo_id).files()) - {".gitattributes"}


def test_a_checkpoint_comes_back_bit_for_bit(hub, alice, make_checkpoint, repo_id, tmp_path):
    checkpoint = make_checkpoint(500)
    checkpoint_repo.upload_checkpoint(checkpoint, repo_id)
    assert files_on_branch(hub, repo_id) == FILES and hub.repo("model", repo_id).is_private
    elsewhere = tmp_path / "elsewhere" / "run"
    folder = checkpoint_repo.download_checkpoint(f"hub://{repo_id}", elsewhere)
    assert folder == elsewhere / "checkpoint-500"
    assert content(folder) == content(checkpoint, checkpoint_repo.CHECKPOINT_FILES)
    assert (elsewhere / run_folder.METRICS).read_text() == '{"step": 500, "loss": 0.5}\n'
    assert sorted(p.name for p in elsewhere.iterdir()) == ["checkpoint-500", "metrics.jsonl"]
    assert checkpoint_repo.download_checkpoint(f"hub://{repo_id}", elsewhere) == folder


def test_averages_for_other_ema_lengths_are_included(
    hub, alice, make_checkpoint, repo_id, tmp_path
):
    checkpoint = make_checkpoint(500)
    save_file({"0.05/w": torch.ones(3)}, checkpoint / run_folder.POWER_EMA)
    checkpoint_repo.upload_checkpoint(checkpoint, repo_id)
    assert files_on_branch(hub, repo_id) == {*FILES, run_folder.POWER_EMA}
    folder = checkpoint_repo.download_checkpoint(f"hub://{repo_id}", tmp_path / "elsewhere" / "run")
    assert (folder / run_folder.POWER_EMA).read_bytes() == (
        checkpoint / run_folder.POWER_EMA
    ).read_bytes()


def test_the_repository_does_not_grow(hub, alice, make_checkpoint, repo_id):
    """One commit and the large files of one checkpoint, however often it is sent."""
    for step in (1, 2, 3):
        checkpoint_repo.upload_checkpoint(make_checkpoint(step), repo_id)
        repository = hub.repo("model", repo_id)
        assert len(repository.commits()) == 1
        assert len(list((repository.folder / "lfs").iterdir())) == 3  # model, ema, optimizer
    assert json.loads(repository.read(CHECKPOINT_STATE))["step"] == 3


def test_the_same_again_sends_nothing(hub, alice, make_checkpoint, repo_id):
    checkpoint = make_checkpoint(1)
    first = checkpoint_repo.upload_checkpoint(checkpoint, repo_id)
    hub.clear_requests()
    assert checkpoint_repo.upload_checkpoint(checkpoint, repo_id) == first
    assert not hub.count("POST", "/commit/") and not hub.count("PUT")


def test_stale_files_of_an_earlier_checkpoint_are_deleted(hub, alice, make_checkpoint, repo_id):
    checkpoint_repo.upload_checkpoint(make_checkpoint(1), repo_id)
    later = make_checkpoint(2)
    (later / "ema.safetensors").unlink()
    checkpoint_repo.upload_checkpoint(later, repo_id)
    assert files_on_branch(hub, repo_id) == FILES - {"ema.safetensors"}


def test_a_public_repository_gets_nothing(hub, alice, make_checkpoint, repo_id):
    hub.create_repo("model", repo_id)
    for attempt in (
        checkpoint_repo.require_private,
        lambda r: checkpoint_repo.upload_checkpoint(make_checkpoint(1), r),
    ):
        with pytest.raises(UserError, match="is public, and a training state is never sent"):
            attempt(repo_id)
    assert not files_on_branch(hub, repo_id) and not hub.count("PUT")


def test_a_checkpoint_with_unknown_files_is_not_uploaded(hub, alice, make_checkpoint, repo_id):
    checkpoint = make_checkpoint(1)
    (checkpoint / "random_states_0.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match=r"random_states_0.pkl"):
        checkpoint_repo.upload_checkpoint(checkpoint, repo_id)
    assert hub.store.find("models", repo_id) is None


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", ["/commit/", "/super-squash/", "/lfs-files/batch", "^/upload/"])
def test_at_any_fault_a_complete_checkpoint_is_there(
    hub, alice, make_checkpoint, repo_id, path, when, tmp_path
):
    checkpoint_repo.upload_checkpoint(make_checkpoint(1), repo_id)
    hub.inject(Fault("drop", path=path, times=None, when=when))
    later = make_checkpoint(2)
    try:
        checkpoint_repo.upload_checkpoint(later, repo_id)
    except UserError as error:
        assert "could not be reached" in str(error)
    assert json.loads(hub.repo("model", repo_id).read(CHECKPOINT_STATE))["step"] in (1, 2)
    hub.clear_faults()
    checkpoint_repo.upload_checkpoint(later, repo_id)
    folder = checkpoint_repo.download_checkpoint(f"hub://{repo_id}", tmp_path / "new")
    assert content(folder) == content(later, checkpoint_repo.CHECKPOINT_FILES)


# Trust


def test_checkpoints_of_others_need_trust(hub, alice, make_checkpoint, repo_id, tmp_path):
    repository = hub.create_repo("model", f"bob/{repo_id.split('/')[1]}")
    repository.write(content(make_checkpoint(7)), "theirs")
    address = f"hub://{repository.id}"
    with pytest.raises(UserError, match="belongs to bob, not to alice.*--trust_checkpoint"):
        checkpoint_repo.download_checkpoint(address, tmp_path / "new")
    assert not hub.count("GET", "/resolve/") and not (tmp_path / "new").exists()
    assert (
        checkpoint_repo.download_checkpoint(address, tmp_path / "new", trust=True).name
        == "checkpoint-7"
    )


def test_without_an_account_every_repository_needs_trust(hub, repo_id, tmp_path):
    with pytest.raises(UserError, match="--trust_checkpoint .* or log in with"):
        checkpoint_repo.download_checkpoint(f"hub://{repo_id}", tmp_path / "new")


class Bomb:
    def __reduce__(self):
        return (print, ("the code of a checkpoint was run",))


@pytest.mark.parametrize("name", checkpoint_repo.TORCH_FILES)
def test_code_in_a_checkpoint_is_not_run(
    hub, alice, make_checkpoint, repo_id, tmp_path, capfd, name
):
    repository = hub.create_repo("model", repo_id, visibility="private")
    good = content(make_checkpoint(7))
    bombs = [pickle.dumps({"state": Bomb()})]
    torch.save({"state": Bomb()}, tmp_path / "bomb")
    bombs.append((tmp_path / "bomb").read_bytes())
    for bomb in bombs:
        repository.write({**good, name: bomb}, "bomb")
        with pytest.raises(UserError, match=f"{name} of {repo_id} holds more than tensors"):
            checkpoint_repo.download_checkpoint(f"hub://{repo_id}", tmp_path / "new", trust=True)
    assert "was run" not in capfd.readouterr().out
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("step", ["../../evil", -1, None, True, 1.5])
def test_a_step_that_is_no_number_is_refused(hub, alice, make_checkpoint, repo_id, tmp_path, step):
    files = {
        **content(make_checkpoint(7)),
        CHECKPOINT_STATE: json.dumps({**STATE, "step": step}).encode(),
    }
    hub.create_repo("model", repo_id, visibility="private").write(files, "trick")
    with pytest.raises(UserError, match="state.json.*step"):
        checkpoint_repo.download_checkpoint(f"hub://{repo_id}", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_repositories_without_a_checkpoint_are_refused(hub, alice, repo_id, tmp_path):
    hub.create_repo("model", repo_id).write({"unet/config.json": b"{}"}, "a model")
    with pytest.raises(UserError, match="holds no checkpoint|lacks every required file"):
        checkpoint_repo.download_checkpoint(f"hub://{repo_id}", tmp_path / "new")
    with pytest.raises(UserError, match=r"^The training state alice/absent does not exist on http"):
        checkpoint_repo.download_checkpoint("hub://alice/absent", tmp_path / "new")
    for wrong in ("hub://", "hub://alice", "hub://../x", "hub://a/b/c"):
        with pytest.raises(UsageError, match="hub://user/name"):
            checkpoint_repo.download_checkpoint(wrong, tmp_path / "new")


def test_a_damaged_download_is_refused(hub, alice, make_checkpoint, repo_id, tmp_path):
    checkpoint_repo.upload_checkpoint(make_checkpoint(1), repo_id)
    hub.inject(Fault("corrupt", method="GET", path="^/cdn/", times=None))
    with pytest.raises(UserError, match="differ from the Hub's hashes"):
        checkpoint_repo.download_checkpoint(f"hub://{repo_id}", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_another_checkpoint_of_that_step_is_not_overwritten(
    hub, alice, make_checkpoint, repo_id, tmp_path
):
    checkpoint_repo.upload_checkpoint(make_checkpoint(5), repo_id)
    other = make_checkpoint(5, tmp_path / "new")
    save_file({"w": torch.zeros(3)}, other / "model.safetensors")
    with pytest.raises(UserError, match="is there already and is another checkpoint"):
        checkpoint_repo.download_checkpoint(f"hub://{repo_id}", tmp_path / "new")
    assert load_file(other / "model.safetensors")["w"].shape == (3,)


@pytest.mark.slow
def test_resume_on_another_machine_is_bit_exact(hub, alice, script, tiny_unet, tmp_path):
    """Three steps here, the state over the Hub, three steps on an empty machine: the same bits."""
    flags = [
        "--checkpointing_steps=3",
        "--save_images_epochs=0",
        "--train_batch_size=16",
        "--lr_warmup_steps=2",
        f"--model_config_name_or_path={tiny_unet}",
        "--max_train_steps=6",
    ]
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    done = script("train.py", f"--output_dir={straight}", *flags)
    assert done.returncode == 0, done.stderr
    checkpoint_repo.upload_checkpoint(straight / "checkpoint-3", "alice/moving-training-state")
    start = checkpoint_repo.download_checkpoint(
        "hub://alice/moving-training-state", moved / "fetched"
    )
    done = script(
        "train.py", f"--output_dir={moved / 'run'}", *flags, f"--resume_from_checkpoint={start}"
    )
    assert done.returncode == 0 and f"Resuming from {start}" in done.stdout, done.stderr
    for name in ("model.safetensors", "ema.safetensors", "optimizer.bin"):
        one, other = (path / "checkpoint-6" / name for path in (straight, moved / "run"))
        assert one.read_bytes() == other.read_bytes()
