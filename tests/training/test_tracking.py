"""metrics.jsonl, the loss meter, the step timer; trackers by what their own readers find."""

import importlib.util
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from ddpm.accelerator import make_accelerator
from ddpm.config.train import TrackingConfig
from ddpm.errors import UserError
from ddpm.run_record import read_record
from ddpm.training import tracking
from ddpm.training.tracking import LossMeter, StepTimer, Tracker


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tracker(accelerator, folder, step: int = 0) -> Tracker:
    return Tracker(accelerator, TrackingConfig(), folder, settings={}, step=step)


# metrics.jsonl


def test_log_writes_one_json_object_per_line(accelerator, tmp_path):
    opened = tracker(accelerator, tmp_path)
    opened.log(10, {"loss": 0.5, "lr": 1e-4})
    opened.log(20, {"loss": 0.25, "lr": 5e-5})
    assert lines(tmp_path) == [
        {"step": 10, "loss": 0.5, "lr": 1e-4},
        {"step": 20, "loss": 0.25, "lr": 5e-5},
    ]


def test_resume_removes_the_lines_it_writes_again(accelerator, tmp_path):
    before = tracker(accelerator, tmp_path)
    for step in (10, 20, 30, 40):
        before.log(step, {"loss": float(step)})
    after = tracker(accelerator, tmp_path, step=20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    after.log(30, {"loss": 0.0})
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


@pytest.mark.parametrize("half", ['{"st', '{"step": 20, "loss": 0.', '{"step": 20, "loss": 0.3'])
def test_half_written_last_line_is_dropped(accelerator, tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n' + half)
    opened = tracker(accelerator, tmp_path, step=20)
    assert lines(tmp_path) == [{"step": 10, "loss": 1.0}]
    opened.log(30, {"loss": 0.5})
    assert [line["step"] for line in lines(tmp_path)] == [10, 30]


def test_new_run_begins_with_an_empty_file(accelerator, tmp_path):
    tracker(accelerator, tmp_path).log(10, {"loss": 1.0})
    tracker(accelerator, tmp_path, step=0)
    assert lines(tmp_path) == []


def test_only_the_main_process_writes(tmp_path):
    config = TrackingConfig(logger="trackio", project_name="other")
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    opened = Tracker(SimpleNamespace(is_main_process=False), config, tmp_path, {}, step=10)
    opened.log(30, {"loss": 1.0})
    opened.finish()
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    assert read_record(tmp_path).trackio_run is None


def test_without_a_tracker_there_is_no_url_and_nothing_to_close(accelerator, tmp_path):
    opened = tracker(accelerator, tmp_path)
    opened.log_grid(1, Image.new("L", (2, 2)))
    assert opened.addresses == {}
    opened.finish()
    assert list(tmp_path.iterdir()) == []


# The loss meter


def test_mean_is_over_the_steps_since_the_last_one(accelerator):
    meter = LossMeter(accelerator)
    for step, losses in enumerate([(1.0, 2.0), (6.0,)], start=1):
        for loss in losses:
            meter.add(torch.tensor(loss))
        meter.end_step(step, torch.tensor(1.0))
    assert meter.mean_loss() == 3.0
    meter.add(torch.tensor(5.0))
    meter.end_step(3, torch.tensor(1.0))
    assert meter.mean_loss() == 5.0


def test_skipped_step_is_discarded(accelerator):
    """fp16 overflows now and then: its scaler skips that step, and the loss of it may be inf."""
    meter = LossMeter(accelerator)
    meter.add(torch.tensor(math.inf))
    meter.discard_step()
    meter.add(torch.tensor(2.0))
    meter.end_step(1, torch.tensor(1.0))
    assert meter.first_bad_step() == 0
    assert meter.mean_loss() == 2.0


def test_mean_keeps_no_graph(accelerator):
    meter = LossMeter(accelerator)
    meter.add(torch.ones((), requires_grad=True) * 2)
    meter.end_step(1, torch.tensor(1.0))
    assert not meter._sum.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_first_step_that_was_not_finite_is_remembered(accelerator, bad, where):
    meter = LossMeter(accelerator)
    for step in range(1, 7):
        wrong = step in (3, 5)
        meter.add(torch.tensor(bad if wrong and where == "loss" else 1.0))
        meter.add(torch.tensor(1.0))
        meter.end_step(step, torch.tensor(bad if wrong and where == "gradient" else 1.0))
        assert meter.first_bad_step() == (0 if step < 3 else 3)


def test_first_bad_step_survives_a_report(accelerator):
    meter = LossMeter(accelerator)
    meter.add(torch.tensor(math.nan))
    meter.end_step(7, torch.tensor(1.0))
    assert math.isnan(meter.mean_loss())
    meter.add(torch.tensor(1.0))
    meter.end_step(8, torch.tensor(1.0))
    assert meter.mean_loss() == 1.0
    assert meter.first_bad_step() == 7


# The step timer


def test_timer_counts_steps_without_the_time_between_them(monkeypatch):
    now = iter([0.0, 2.0, 100.0, 104.0, 200.0, 201.0])
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: next(now))
    timer = StepTimer(seconds=50.0)  # of an earlier part of the run
    for _ in range(2):
        timer.start()
        timer.stop(torch.device("cpu"), wait=True)
    assert timer.seconds == 56.0
    assert timer.rate(steps=2) == pytest.approx(2 / 6)
    timer.start()
    timer.stop(torch.device("cpu"), wait=False)
    assert timer.rate(steps=3) == pytest.approx(1.0)


# The launch


def test_missing_trackers_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or None)
    with pytest.raises(UserError, match="pip install tensorboard trackio, or leave"):
        make_accelerator(None, ("wandb", "tensorboard", "trackio"))


def test_training_on_a_cpu_keeps_freed_memory(monkeypatch):
    calls = []
    monkeypatch.setattr("ddpm.accelerator.keep_freed_memory", lambda: calls.append(True))
    assert make_accelerator("no").device.type == "cpu"
    assert calls == [True]


def test_a_plain_launch_has_one_process():
    assert make_accelerator("no").num_processes == 1


def records(path: Path) -> Iterator[Any]:
    """Yield the contents of an offline W&B run's file, by W&B's own message types.

    Messages lie in LevelDB's log format: blocks of 32 KiB, in each pieces with a header of seven
    bytes (checksum, length, and whether it is complete, first, middle or last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record, message = Record.FromString(message), b""
            yield getattr(record, record.WhichOneof("record_type"))


def read_wandb(path: Path) -> tuple[dict, list[dict], set[str]]:
    """Return config, history and file names of an offline run."""
    config, history, files = {}, [], set()
    for message in records(path):
        kind = type(message).__name__
        if kind == "ConfigRecord":
            config |= {item.key: json.loads(item.value_json) for item in message.update}
        elif kind == "HistoryRecord":
            history.append(
                {".".join(item.nested_key): json.loads(item.value_json) for item in message.item}
            )
        elif kind == "FilesRecord":
            files |= {item.path for item in message.files}
    return config, history, files


def read_trackio(project: str, folder: Path) -> tuple[list[dict], dict]:
    """Return the entries and the settings of the run in a folder, by trackio's own reader."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = read_record(folder).trackio_run
    (run,) = (run for run in trackio.Api().runs(project) if run.name == name)
    return SQLiteStorage.get_logs(project, name), run.config


def test_trackio_run_is_continued(accelerator, tmp_path):
    """Also after a run in another folder of the same name: trackio finds a run by its name."""
    from trackio.utils import MEDIA_DIR

    config = TrackingConfig(logger="trackio", project_name=f"continued-{tmp_path.name}")
    folder, other = tmp_path / "a" / "run", tmp_path / "run"
    for output_dir, step in ((folder, 0), (other, 7), (folder, 1)):
        output_dir.mkdir(parents=True, exist_ok=True)
        opened = Tracker(accelerator, config, output_dir, {"resolution": (8, 6)}, step)
        opened.log(step + 1, {"loss": 0.5, "memory_mib": 12})
        opened.log_grid(step + 1, Image.new("L", (8, 6), 99))
        assert opened.addresses == {}
        opened.finish()
    for output_dir, steps in ((folder, [1, 2]), (other, [8])):
        entries, settings = read_trackio(config.project_name, output_dir)
        assert settings["resolution"] == [8, 6]
        scalars = [entry for entry in entries if "loss" in entry]
        assert [entry["step"] for entry in scalars] == steps
        assert (scalars[0]["loss"], scalars[0]["memory_mib"]) == (0.5, 12)
        grids = [entry["samples"] for entry in entries if "samples" in entry]
        assert [grid["_type"] for grid in grids] == ["trackio.image"] * len(steps)
        for grid in grids:
            assert Image.open(MEDIA_DIR / grid["file_path"]).getpixel((7, 5))[:3] == (99, 99, 99)


def test_a_tracker_that_cannot_start_is_one_error(accelerator, tmp_path):
    config = TrackingConfig(logger="trackio", project_name="registry-of-mine")
    with pytest.raises(UserError, match="--logger trackio cannot start .*reserved for trackio"):
        Tracker(accelerator, config, tmp_path, {}, 0)


def test_address_of_a_trackio_space(accelerator, tmp_path):
    opened = tracker(accelerator, tmp_path)
    run = SimpleNamespace(url="you/metrics")
    opened._trackers = [SimpleNamespace(name="trackio", tracker=run)]
    assert opened.addresses == {"trackio": "https://huggingface.co/spaces/you/metrics"}
    run.url = "https://metrics.example.org"
    assert opened.addresses == {"trackio": run.url}


@pytest.mark.slow
def test_offline_wandb_run_is_kept_in_logs_and_continued(monkeypatch, tmp_path, capsys):
    """Without an API key the run is offline, with a note; a resume continues the same run.

    W&B's own file holds the settings, scalars at their steps, and the grid. The other trackers,
    which log at the same time, have the same scalars.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    loggers = ("wandb", "tensorboard", "trackio")
    config = TrackingConfig(logger=loggers, project_name=f"all-{tmp_path.name}")
    ids, values = [], {"loss": 0.5, "images_per_s": 99.0, "memory_mib": 12}
    for step in (0, 1):
        accelerator = make_accelerator("no", config.loggers)
        opened = Tracker(accelerator, config, tmp_path, {"seed": 7, "snr_gamma": None}, step)
        ids.append(read_record(tmp_path).wandb_run_id)
        opened.log(step + 1, values)
        opened.log_grid(step + 1, Image.new("L", (8, 8)))
        opened.finish()
    assert ids[0] == ids[1] != ""
    output = capsys.readouterr().out
    assert output.count("W&B has no API key here: the run is kept offline") == 2  # once per start
    parts = sorted((tmp_path / "logs" / "wandb").glob(f"offline-run-*-{ids[0]}/*.wandb"))
    assert len(parts) == 2
    for step, path in enumerate(parts, start=1):
        settings, history, files = read_wandb(path)
        assert settings["seed"] == 7 and settings["snr_gamma"] is None
        (line,) = [line for line in history if "loss" in line]
        assert line["_step"] == step and values.items() <= line.items()
        (grid,) = [name for name in files if name.startswith("media/images/samples")]
        assert Image.open(path.parent / "files" / grid).size == (8, 8)
    events = EventAccumulator(str(tmp_path / "logs" / tmp_path.name)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.5)]
    assert len(events.Images("samples")) == 2
    entries, settings = read_trackio(config.project_name, tmp_path)
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2]
    assert sum("samples" in entry for entry in entries) == 2 and settings["snr_gamma"] is None
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.slow
def test_tensorboard_gets_scalars_settings_and_grids(tmp_path):
    """A resume hides what the earlier part of the run wrote after its checkpoint."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrackingConfig(logger="tensorboard", logging_dir="tb")
    for step, last in ((0, 3), (1, 2)):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = make_accelerator("no", config.loggers)
        opened = Tracker(accelerator, config, tmp_path, {"seed": 7, "snr_gamma": None}, step)
        for done in range(step + 1, last + 1):
            opened.log(done, {"loss": 10.0 * step + done})
            opened.log_grid(done, Image.new("RGB", (8, 6)))
        opened.finish()
    folder = tmp_path / "tb" / tmp_path.name
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 12.0)]
    assert {(e.width, e.height) for e in events.Images("samples")} == {(8, 6)}
    (settings,) = list(folder.glob("*/hparams.yml"))[:1]
    assert "seed: 7" in settings.read_text()


def test_fsdp_without_a_gpu_is_refused(monkeypatch):
    """accelerate would silently give every CPU process the complete model."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match="uses FSDP, which needs GPUs, and this machine has none"):
        make_accelerator("no")


@pytest.mark.parametrize(
    ("variable", "value", "choice"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism config"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
    ],
)
def test_what_training_cannot_do_is_refused(monkeypatch, variable, value, choice):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"uses {choice}, which this command does not support"):
        make_accelerator(None)


def test_processes_that_the_launcher_left_to_mpirun_are_missed(monkeypatch, capsys):
    """As with `accelerate config`'s MULTI_CPU and two processes, of which it starts one."""
    for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    make_accelerator("no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    make_accelerator("no")
    assert not capsys.readouterr().out
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    make_accelerator("no")
    assert "accelerate launch started one process" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun sets both
    make_accelerator("no")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("source", ["flag", "launcher"])
def test_fp16_without_a_gpu_is_refused(monkeypatch, source):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16" if source == "launcher" else "no")
    with pytest.raises(UserError, match="fp16 needs a GPU.* use --mixed_precision bf16"):
        make_accelerator("fp16" if source == "flag" else None)


def test_peak_memory_counts_this_process():
    before = tracking.peak_memory_mib(torch.device("cpu"))
    block = torch.ones(200 * 2**20, dtype=torch.uint8)
    after = tracking.peak_memory_mib(torch.device("cpu"))
    assert 20 < before < after + 1 and after >= 200
    del block
