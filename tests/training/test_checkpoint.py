"""Checkpoints: complete or skipped; the only good one is never deleted."""

import errno
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from ddpm import file_io, run_folder, run_record
from ddpm.config.train import EMAConfig
from ddpm.diffusion.ema import EMA
from ddpm.errors import UserError
from ddpm.training import checkpoint


@pytest.fixture
def trained():
    """Accelerator, prepared model, optimizer after one step, and EMA."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMA(accelerator.unwrap_model(model), EMAConfig())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update(1)
    return accelerator, model, optimizer, ema


STATE = run_record.CheckpointState(
    step=2, micro_batches=1, pixels_sha256="f", seconds=1.0, num_parameters=8
)


def save(trained, folder, step, limit=None):
    accelerator, _, _, ema = trained
    checkpoint.save_checkpoint(accelerator, ema, replace(STATE, step=step), folder, limit)


def test_checkpoint_restores_model_optimizer_and_ema(trained, tmp_path):
    accelerator, model, optimizer, ema = trained
    save(trained, tmp_path, 2)
    weights = [p.detach().clone() for p in model.parameters()]
    average = {name: value.clone() for name, value in ema.average.items()}
    moments = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with torch.no_grad():
        for tensor in (*model.parameters(), *ema.average.values()):
            tensor.zero_()
    optimizer.state_dict()["state"][0]["exp_avg"].zero_()
    state = checkpoint.load_checkpoint(accelerator, ema, tmp_path / "checkpoint-2")
    assert state == STATE
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(ema.average[name], average[name]) for name in average)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], moments)


def test_checkpoint_holds_no_pickle_but_tensors(trained, tmp_path):
    """Random states are pickles and not needed; the optimizer loads with weights_only."""
    save(trained, tmp_path, 2)
    names = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert names == {"model.safetensors", "optimizer.bin", "ema.safetensors", "state.json"}
    torch.load(tmp_path / "checkpoint-2" / "optimizer.bin", weights_only=True)


def test_newest_are_kept_and_only_checkpoints_are_deleted(trained, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "foreign-file").touch()
    (tmp_path / "checkpoint-final").mkdir()
    for step in (2, 4, 6):
        save(trained, tmp_path, step, limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-final",
    ]


def test_incomplete_folder_is_skipped_and_named(trained, tmp_path, capsys):
    save(trained, tmp_path, 2)
    save(trained, tmp_path, 4)
    (tmp_path / "checkpoint-4" / run_folder.CHECKPOINT_STATE).unlink()
    assert checkpoint.find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-4 is not a complete checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{ half", "{}"])
def test_damaged_state_stops_the_run_instead_of_starting_again(trained, tmp_path, content):
    """A run that began again would end where the damaged checkpoint is, after all its work."""
    save(trained, tmp_path, 2)
    save(trained, tmp_path, 4)
    (tmp_path / "checkpoint-4" / run_folder.CHECKPOINT_STATE).write_text(content)
    with pytest.raises(UserError, match=r"checkpoint-4/state\.json .* Move it away to resume from"):
        checkpoint.find_checkpoint("latest", tmp_path)
    assert checkpoint.find_checkpoint("checkpoint-2", tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_is_in_the_place_of_a_checkpoint_is_moved_away(trained, tmp_path, make):
    make(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2-replaced-1").mkdir()
    save(trained, tmp_path, 2)
    assert checkpoint.find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-2"
    assert (tmp_path / "checkpoint-2-replaced-2").exists()


def test_incomplete_one_does_not_count_for_the_limit(trained, tmp_path):
    save(trained, tmp_path, 2)
    save(trained, tmp_path, 4)
    (tmp_path / "checkpoint-4" / run_folder.CHECKPOINT_STATE).write_text("{ half")
    save(trained, tmp_path, 6, limit=2)
    complete = [s for s, p in run_folder.checkpoints(tmp_path).items() if checkpoint.read_state(p)]
    assert complete == [2, 6]


def test_failed_write_leaves_the_last_good_one(trained, tmp_path, monkeypatch):
    save(trained, tmp_path, 2, limit=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"No space left.*checkpoint-2, untouched.*Free some space"):
        save(trained, tmp_path, 4, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert checkpoint.load_checkpoint(trained[0], trained[3], tmp_path / "checkpoint-2").step == 2


@pytest.mark.parametrize("filled", [0, 5, 20, 40, 48, 52])
def test_full_disk_leaves_the_last_good_one(trained, make_disk, filled):
    """However far the writing gets: a UserError, the earlier checkpoint intact, no leftovers."""
    small_disk = make_disk(64)
    save(trained, small_disk, 2)
    before = {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(max(0, free - 1024 * (52 - filled) // 4)))
    with pytest.raises(UserError, match=r"No space left.*checkpoint-2, untouched.*Free some space"):
        save(trained, small_disk, 4, limit=1)
    assert {path.name for path in small_disk.iterdir()} == {"checkpoint-2", "other"}
    assert {path: path.read_bytes() for path in before} == before
    (small_disk / "other").unlink()
    save(trained, small_disk, 4, limit=1)
    assert checkpoint.latest_checkpoint(small_disk).name == "checkpoint-4"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer.bin", b""),
        ("optimizer.bin", b"PK\x03\x04"),
        ("model.safetensors", b"cut short"),
        ("ema.safetensors", b""),
    ],
)
def test_damaged_file_is_a_user_error(trained, tmp_path, name, content):
    """torch's error for an empty file has no text."""
    save(trained, tmp_path, 2)
    (tmp_path / "checkpoint-2" / name).write_bytes(content)
    with pytest.raises(UserError, match="checkpoint-2 cannot be loaded"):
        checkpoint.load_checkpoint(trained[0], trained[3], tmp_path / "checkpoint-2")


def test_checkpoints_are_found_by_name_and_by_path(trained, tmp_path):
    assert checkpoint.find_checkpoint("latest", tmp_path) is None
    save(trained, tmp_path, 2)
    folder = tmp_path / "checkpoint-2"
    assert checkpoint.find_checkpoint("checkpoint-2", tmp_path) == folder
    assert checkpoint.find_checkpoint(str(folder), tmp_path / "elsewhere") == folder
    with pytest.raises(
        UserError, match=r"checkpoint-9 is no complete checkpoint.*has checkpoint-2"
    ):
        checkpoint.find_checkpoint("checkpoint-9", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batches": 4}, "1 micro-batches a step.*now there are 4"),
        ({"pixels_sha256": "other"}, "other pixels or labels"),
        ({"num_parameters": 9}, "another model"),
    ],
)
def test_checkpoint_of_another_run_is_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        checkpoint.require_same_run(STATE, replace(STATE, **change), tmp_path)
    checkpoint.require_same_run(STATE, replace(STATE, step=0, seconds=0.0), tmp_path)


def test_stream_of_an_earlier_version_goes_on_only_with_one_micro_batch(tmp_path):
    """Earlier versions read all micro-batches of a step from one sequence."""
    saved = replace(STATE, stream={"first": 0, "block": 0, "place": {}})
    checkpoint.require_same_run(saved, STATE, tmp_path)
    saved = replace(saved, micro_batches=4)
    with pytest.raises(UserError, match="in the middle of a stream that an earlier version read"):
        checkpoint.require_same_run(saved, replace(STATE, micro_batches=4), tmp_path)


@pytest.mark.parametrize("change", [{"step": -1}, {"step": "2"}, {"seconds": None}])
def test_state_of_a_wrong_type_is_no_checkpoint(change, tmp_path):
    file_io.write_json(tmp_path / "state.json", {**asdict(STATE), **change})
    assert checkpoint.read_state(tmp_path) is None


def test_state_of_an_older_version_is_read(tmp_path):
    """Before --budget, streams and fp16 counts were saved."""
    state = {k: v for k, v in asdict(STATE).items() if k not in ("spent", "stream", "skipped")}
    file_io.write_json(tmp_path / "state.json", state)
    assert checkpoint.read_state(tmp_path) == STATE
