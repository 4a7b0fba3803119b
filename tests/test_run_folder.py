"""The run folder: atomic writes, the record, the lock, and which files belong to a run."""

import errno
import fcntl
import json
import os
import re
import stat
import subprocess
import sys

import pytest

from ddpm import file_io, run_folder, run_record
from ddpm.errors import UserError
from ddpm.run_folder import run_lock
from ddpm.run_record import Environment, ModelRecord, Record, TrainingRecord
from tests.conftest import ROOT


def test_write_creates_folders_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    file_io.write_bytes(path, b"content")
    assert path.read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    file_io.write_json(path, {"old": 1})

    def full_disk(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        file_io.write_json(path, {"new": 2})
    assert file_io.read_json(path) == {"old": 1}


def test_json_round_trip_is_readable_and_ends_with_a_newline(tmp_path):
    path = tmp_path / "file.json"
    value = {"name": "Zürich 数字", "number": 1e-4, "list": [1, None, True]}
    file_io.write_json(path, value)
    assert file_io.read_json(path) == value
    text = path.read_text(encoding="utf-8")
    assert "Zürich 数字" in text
    assert text.endswith("}\n")


def test_nan_is_refused_before_the_file_is_touched(tmp_path):
    path = tmp_path / "file.json"
    file_io.write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        file_io.write_json(path, {"loss": float("nan")})
    assert file_io.read_json(path) == {"loss": 1.0}


def test_missing_json_is_an_error_with_its_name(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json does not exist\.$"):
        file_io.read_json(tmp_path / "absent.json")


@pytest.mark.parametrize("content", [b"", b'{"cut": ', b"\xff\xfe\x00"])
def test_damaged_json_is_an_error_with_its_name(tmp_path, content):
    (tmp_path / "damaged.json").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.json cannot be read as JSON"):
        file_io.read_json(tmp_path / "damaged.json")


def test_fsync_tree_flushes_every_file_and_folder(tmp_path, monkeypatch):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(b"1")
    (tmp_path / "index").write_bytes(b"2")
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    file_io.fsync_tree(tmp_path)
    assert synced == {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))}


def refuse_fsync(monkeypatch, number: int, refuses=lambda handle: True) -> None:
    """Make os.fsync fail for the handles that `refuses` accepts."""
    original = os.fsync

    def fsync(handle: int) -> None:
        if refuses(handle):
            raise OSError(number, os.strerror(number))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def is_folder(handle: int) -> bool:
    return stat.S_ISDIR(os.fstat(handle).st_mode)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("refuses", [is_folder, lambda handle: True], ids=["folders", "all"])
def test_a_file_system_that_cannot_flush_is_written_to(tmp_path, monkeypatch, number, refuses):
    """As CIFS, VirtualBox and FUSE answer."""
    refuse_fsync(monkeypatch, number, refuses)
    file_io.write_json(tmp_path / "file.json", {"a": 1})
    file_io.fsync_tree(tmp_path)
    assert file_io.read_json(tmp_path / "file.json") == {"a": 1}


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_other_failures_of_a_flush_are_errors(tmp_path, monkeypatch, number):
    refuse_fsync(monkeypatch, number, is_folder)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        file_io.write_json(tmp_path / "file.json", {"a": 1})
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        file_io.fsync_tree(tmp_path)


def test_files_are_flushed_through_handles_that_may_write(tmp_path, monkeypatch):
    """Windows refuses other handles (EBADF)."""
    (tmp_path / "weights").write_bytes(b"1")

    def is_read_only(handle: int) -> bool:
        return not is_folder(handle) and not fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_RDWR

    refuse_fsync(monkeypatch, errno.EBADF, is_read_only)
    file_io.write_json(tmp_path / "file.json", {"a": 1})
    file_io.fsync_tree(tmp_path)


def test_record_merges_entries_and_keeps_unknown_ones(tmp_path):
    assert run_record.read_record(tmp_path) == Record()
    run_record.write_record(tmp_path, training={"steps": 3, "unknown": 1}, wandb=None)
    run_record.write_record(tmp_path, model=ModelRecord(parameters=7), finished=True)
    record = run_record.read_record(tmp_path)
    assert record.finished and record.training == TrainingRecord(steps=3)
    assert record.model.parameters == 7
    run_record.write_record(tmp_path, model=None)
    entries = file_io.read_json(tmp_path / run_folder.RECORD)
    assert entries == {"training": {"steps": 3, "unknown": 1}, "finished": True}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "record.json must be a JSON object"),
        ({"finished": "yes"}, "finished is 'yes'; it must be true or false"),
        ({"dataset": "digits"}, "dataset must be a JSON object"),
        ({"dataset": {}}, "dataset has no entry name"),
        (
            {"dataset": {"name": "a", "modes": {"L": "many"}}},
            "modes.L is 'many'; it must be a whole number",
        ),
        ({"training": {"steps": True}}, "training: steps is True; it must be a whole number"),
        ({"training": {"steps": 1, "seconds": "2"}}, "seconds is '2'; it must be a number"),
        ({"training": {"steps": 1, "final_loss": float("nan")}}, "final_loss is nan"),
    ],
)
def test_record_of_a_wrong_type_is_refused(tmp_path, entries, message):
    (tmp_path / run_folder.RECORD).write_text(json.dumps(entries))
    with pytest.raises(UserError, match=message):
        run_record.read_record(tmp_path)


def test_no_record_of_a_wrong_type_is_written(tmp_path):
    with pytest.raises(UserError, match="steps is '3'; it must be a whole number"):
        run_record.write_record(tmp_path, training={"steps": "3"})
    assert not (tmp_path / run_folder.RECORD).exists()


def test_environment_is_json_with_versions(tmp_path):
    environment = Environment.current("cpu", num_processes=2, mixed_precision="no")
    assert set(environment.versions) == {"ddpm", *run_record.PACKAGES}
    run_record.write_record(tmp_path, environment=environment)
    assert run_record.read_record(tmp_path).environment == environment


def test_environment_without_git_has_no_commit(monkeypatch):
    monkeypatch.setattr(run_folder.shutil, "which", lambda name: None)
    assert Environment.current("cpu", 1, "no").git_commit is None


def make_pipeline(folder):
    for name in run_folder.PIPELINE_FILES:
        file_io.write_bytes(folder / name, b"{}")


def test_complete_pipeline_is_accepted(tmp_path):
    make_pipeline(tmp_path)
    run_folder.require_pipeline(tmp_path)


def test_a_folder_without_files_of_a_unet_is_no_unet_with_classes(tmp_path):
    """A deleted run with classes may leave the folder, with a file of the desktop."""
    make_pipeline(tmp_path)
    file_io.write_bytes(tmp_path / run_folder.CONDITIONAL / ".DS_Store", b"")
    run_folder.require_pipeline(tmp_path)
    assert run_folder.model_files(tmp_path) == run_folder.PIPELINE_FILES
    file_io.write_bytes(tmp_path / run_folder.CONDITIONAL_WEIGHTS, b"")
    with pytest.raises(UserError, match="conditional/labels.json missing"):
        run_folder.require_pipeline(tmp_path)


@pytest.mark.parametrize("name", run_folder.PIPELINE_FILES)
def test_missing_file_of_a_pipeline_is_named(tmp_path, name):
    make_pipeline(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match="run it again with the same command") as error:
        run_folder.require_pipeline(tmp_path)
    assert f"({name} missing)" in str(error.value)


def test_missing_run_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="absent is not a folder. Give the --output_dir"):
        run_folder.require_pipeline(tmp_path / "absent")


def test_checkpoints_are_sorted_by_step_and_other_names_ignored(tmp_path):
    for name in (
        "checkpoint-1000",
        "checkpoint-90",
        "checkpoint-last",
        "checkpoint-5.partial",
        ".checkpoint-7.partial",
        "my-checkpoint-3",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert list(run_folder.checkpoints(tmp_path).items()) == [
        (90, tmp_path / "checkpoint-90"),
        (1000, tmp_path / "checkpoint-1000"),
    ]


def test_delete_run_deletes_the_files_of_a_run_and_nothing_else(tmp_path):
    make_pipeline(tmp_path)
    of_the_run = [
        "train_config.json",
        "record.json",
        "metrics.jsonl",
        "published.json",
        "samples/step-000500.png",
        "checkpoint-5/state.json",
        "logs/wandb/run",
        "ema/step-000500.safetensors",
        "ema/before/record.json",
    ]
    others = [
        "notes.txt",
        "ema/notes.txt",
        "unet/mine.txt",
        "samples/holiday.png",
        "checkpoint-best/weights",
    ]
    for name in (*of_the_run, *others):
        file_io.write_bytes(tmp_path / name, b"x")
    run_folder.delete_run(tmp_path)
    remaining = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert remaining == set(others)
    assert not (tmp_path / "scheduler").exists()


def test_delete_run_of_an_empty_folder_does_nothing(tmp_path):
    run_folder.delete_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my-run", "my-run"),
        ("out pics \u00fc", "out-pics"),
        ("a..b--c", "a-b-c"),
        ("\u00fc", "model"),
    ],
)
def test_repository_is_named_after_the_folder(tmp_path, folder, name):
    from huggingface_hub.utils import validate_repo_id

    assert run_folder.default_repo_name(tmp_path / folder) == name
    validate_repo_id(f"you/{name}")


def test_only_one_run_at_a_time_writes_into_a_folder(tmp_path):
    """The system releases the lock when its process is killed."""
    script = (
        "import sys, time; from pathlib import Path; from ddpm.run_folder import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="Another run is writing into"), run_lock(tmp_path):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    for _ in range(2):
        with run_lock(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EROFS])
def test_a_run_goes_on_where_there_are_no_locks(tmp_path, no_locks, number):
    no_locks(number)
    with run_lock(tmp_path):
        (tmp_path / "written").touch()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_no_disk_without_locks(tmp_path, no_locks, number):
    no_locks(number)
    with pytest.raises(OSError) as raised, run_lock(tmp_path):
        pass
    assert raised.value.errno == number


def test_losses_are_read_from_complete_finite_positive_entries(tmp_path):
    good = '{"step": 20, "loss": 0.5}\n{"step": 10, "loss": 1.0}\n'
    bad = '{"step": 30}\n{"step": 40, "loss": NaN}\n{"step": 50, "loss": 0.0}\n[1]\n{"step": 6'
    (tmp_path / run_folder.METRICS).write_text(good + bad)
    assert run_folder.read_losses(tmp_path) == [(10, 1.0), (20, 0.5)]
    assert run_folder.read_losses(tmp_path / "none") == []
