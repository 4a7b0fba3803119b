"""The loop: exact resume from a kill anywhere, one clock, nothing good overwritten."""

import copy
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file

from ddpm import device, run_folder
from ddpm.accelerator import make_accelerator
from ddpm.config.parser import parse_train
from ddpm.diffusion import objective, power_ema
from ddpm.diffusion.ema import EMA
from ddpm.errors import Interrupted, UsageError, UserError
from ddpm.evaluation import ema_lengths
from ddpm.publishing.background import Publisher
from ddpm.sampling import generate, pipeline
from ddpm.training import checkpoint, dry_run, loop, schedule
from ddpm.training import step as step_module
from ddpm.training.signals import ASKS_TO_STOP
from ddpm.training.step import train_step
from tests.hub import Fault

STEPS = 6


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product catches it, and nothing is tidied up."""


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Each run begins as a new process would: no Accelerator before it, usual signals."""
    monkeypatch.setattr(device, "use_all_cores", lambda processes: None)
    usual = {number: signal.getsignal(number) for number in ASKS_TO_STOP}
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


@pytest.fixture
def run(pictures, tiny_unet, tmp_path):
    """run(name, flags...) trains into a folder: 6 steps, everything switched on."""

    def train(name, *flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = parse_train(
            [
                f"--train_data_dir={pictures}",
                f"--model_config_name_or_path={tiny_unet}",
                f"--output_dir={tmp_path / name}",
                "--resolution=8",
                "--random_flip",
                "--train_batch_size=4",
                f"--max_train_steps={STEPS}",
                "--lr_warmup_steps=2",
                "--learning_rate=1e-2",
                "--dropout=0.1",
                "--checkpointing_steps=2",
                "--save_images_epochs=1",
                "--save_model_epochs=1",
                "--eval_batch_size=2",
                "--ddpm_num_inference_steps=2",
                "--logging_steps=1",
                "--snr_gamma=5",
                "--prediction_type=v_prediction",
                "--checkpoints_total_limit=None",
                *flags,
            ]
        )
        accelerator = make_accelerator(
            config.optimization.mixed_precision, config.tracking.logger, config.tracking.logging_dir
        )
        loop.train(accelerator, config, Publisher(Path(config.output_dir), config.hub))
        return tmp_path / name

    return train


def final_state(folder):
    """Everything that must survive, as tensors by name."""
    last = folder / f"checkpoint-{STEPS}"
    tensors = {f"raw {k}": v for k, v in load_file(last / "model.safetensors").items()}
    tensors |= {f"ema {k}": v for k, v in load_file(last / "ema.safetensors").items()}
    tensors |= {f"out {k}": v for k, v in load_file(folder / run_folder.UNET_WEIGHTS).items()}
    for path in (last / run_folder.POWER_EMA, *power_ema.list_snapshots(folder).values()):
        if path.exists():
            tensors |= {f"{path.name} {k}": v for k, v in load_file(path).items()}
    optimizer = torch.load(last / "optimizer.bin", weights_only=True)
    for index, moments in optimizer["state"].items():
        tensors |= {f"optimizer {index} {k}": v for k, v in moments.items()}
    return tensors


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def kill(monkeypatch, owner, name, at_call):
    """Die in the n-th call of a function, before it does anything."""
    real, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == at_call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, deadly)


@pytest.fixture(scope="module")
def straight_bits():
    return {}


@pytest.mark.parametrize(
    ("where", "owner", "name", "at_call"),
    [
        ("in a step", step_module, "diffusion_loss", 4),
        ("in the update", EMA, "update", 5),
        ("in a preview", generate, "generate_images", 1),
        ("in the last preview", generate, "generate_images", 2),
        ("writing the averages of a checkpoint", checkpoint, "save_file", 2),
        ("before a checkpoint is renamed", run_folder, "fsync_tree", 2),
        ("after a checkpoint is renamed", run_folder, "fsync_dir", 3),
        ("in an export", pipeline, "fsync_tree", 1),
        ("in the last export", pipeline, "fsync_tree", 2),
        ("before the record", run_folder, "write_record", 2),
    ],
)
def test_resume_is_bit_exact(run, monkeypatch, straight_bits, where, owner, name, at_call):
    """Six steps are the same bits as some steps, a kill, and the rest: wherever the kill comes."""
    if not straight_bits:
        straight_bits.update(final_state(run("straight")))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, owner, name, at_call)
        run("killed")
    assert_same_bits(final_state(run("killed")), straight_bits)
    record = json.loads((run("killed") / run_folder.RECORD).read_text())
    assert record["finished"] and record["training"]["steps"] == STEPS


TRACKED = ("--post_hoc_ema", "--checkpointing_steps=2", "--checkpoints_total_limit=1")


@pytest.mark.parametrize(
    ("owner", "name", "at_call"),
    [
        (power_ema.PowerEMA, "update", 5),
        (run_folder, "fsync_and_rename", 3),
        (checkpoint, "save_file", 2),
        (checkpoint.shutil, "rmtree", 1),
    ],
    ids=["in an update", "in a snapshot", "after a snapshot", "pruning"],
)
def test_tracks_and_their_snapshots_are_resumed_to_the_bit(run, monkeypatch, owner, name, at_call):
    """With a snapshot every other step; the averages of the run itself are as without tracks."""
    monkeypatch.setattr(power_ema, "SHORTEST", 2)
    straight = final_state(run("straight", *TRACKED))
    names = {name.split()[0] for name in straight if name.startswith(("tracks", "step"))}
    assert names == {"tracks.safetensors", *(f"step-{s:06d}.safetensors" for s in (2, 4, 6))}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, owner, name, at_call)
        run("killed", *TRACKED)
    assert_same_bits(final_state(run("killed", *TRACKED)), straight)
    without = final_state(run("without"))
    assert_same_bits(without, {name: straight[name] for name in without})


def test_tracks_begin_where_a_run_without_them_is_resumed(run, capsys):
    run("later", "--max_train_steps=4")
    folder = run("later", "--post_hoc_ema")
    said = capsys.readouterr().out
    assert "post_hoc_ema was False, now True" in said
    assert "checkpoint-4 has no tracks.safetensors" in said and "begin at step 4" in said
    assert [*power_ema.list_snapshots(folder)] == [6]
    with safe_open(folder / "ema" / "step-000006.safetensors", "pt") as file:
        assert file.metadata() == {"began": "4", "step": "6"}
    run("later", "--overwrite_output_dir", "--max_train_steps=2")
    assert not (folder / run_folder.EMA_SNAPSHOTS).exists()


def test_a_run_goes_on_after_another_length_was_exported(run, capsys):
    """Finished: left as it is. Made longer: training's state was never touched, so the end is that
    of a run that was left alone, and the record no longer names a length."""
    straight = final_state(run("straight", *TRACKED))
    folder = run("changed", *TRACKED, "--max_train_steps=4")
    average = ema_lengths.open_posthoc_ema(folder).build(0.10)
    ema_lengths.export_weights(folder, average, {"sigma_rel": 0.10, "step": 4})
    exported = load_file(folder / run_folder.UNET_WEIGHTS)
    run("changed", *TRACKED, "--max_train_steps=4")
    assert "is finished: 4 steps" in capsys.readouterr().out
    assert_same_bits(load_file(folder / run_folder.UNET_WEIGHTS), exported)
    # The course of the learning rate follows the length, so only the keys are the same as straight
    run("changed", *TRACKED)
    ended = final_state(folder)
    for name in load_file(folder / "checkpoint-6" / "ema.safetensors"):
        assert torch.equal(ended[f"out {name}"], ended[f"ema {name}"])
    assert ended.keys() == straight.keys()
    assert run_folder.read_record(folder).exported_ema is None


def test_looking_does_not_change_the_run(run):
    """Previews, exports and checkpoints on the way leave no trace in the weights."""
    seen = final_state(run("seen"))
    unseen = final_state(
        run("unseen", "--save_images_epochs=0", "--save_model_epochs=0", "--checkpointing_steps=99")
    )
    assert_same_bits(seen, unseen)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)],
    ids=["TERM", "INT", "USR1"],
)
def test_a_signal_saves_and_the_same_command_goes_on(run, monkeypatch, tmp_path, number, code):
    straight = final_state(run("straight"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        real = EMA.update

        def update(self, step):
            if step == 3:
                os.kill(os.getpid(), number)
            return real(self, step)

        patch.setattr(EMA, "update", update)
        run("stopped")
    assert stopped.value.exit_code == code
    assert checkpoint.latest_checkpoint(tmp_path / "stopped").name == "checkpoint-3"
    assert_same_bits(final_state(run("stopped")), straight)


def test_a_finished_run_says_so_and_does_nothing(run, capsys):
    folder = run("done")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    run("done")
    out = capsys.readouterr().out
    assert "is finished: 6 steps" in out and f"push.py {folder}" in out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_settings_in_the_same_folder_are_refused_by_name(run):
    run("mine")
    with pytest.raises(UsageError) as refused:
        run("mine", "--learning_rate=0.5", "--seed=7")
    assert "learning_rate was 0.01, now 0.5" in str(refused.value)
    assert "seed was 0, now 7" in str(refused.value)
    assert "dropout" not in str(refused.value)


def test_a_longer_run_may_go_on(run, capsys):
    run("long", "--max_train_steps=4")
    folder = run("long")
    assert "max_train_steps was 4, now 6" in capsys.readouterr().out
    assert checkpoint.latest_checkpoint(folder).name == "checkpoint-6"


def test_overwriting_deletes_the_run_and_nothing_else(run):
    folder = run("again")
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-best").mkdir()
    run("again", "--overwrite_output_dir", "--max_train_steps=2", "--seed=1")
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "checkpoint-best").is_dir()
    assert [*run_folder.checkpoints(folder)] == [2]


def test_overwriting_deletes_nothing_when_the_new_run_cannot_begin(run):
    folder = run("kept")
    with pytest.raises(UserError):
        run("kept", "--overwrite_output_dir", "--background=nocolour")
    assert (folder / run_folder.UNET_WEIGHTS).exists() and [*run_folder.checkpoints(folder)]


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / run_folder.MODEL_INDEX).write_text("{}")
    with pytest.raises(UsageError, match="not a run that can go on"):
        run("foreign")


def test_a_loss_that_is_not_finite_stops_the_run_and_harms_nothing(run, monkeypatch):
    good = run("nan", "--max_train_steps=4")
    weights = (good / run_folder.UNET_WEIGHTS).read_bytes()
    real, calls = objective.diffusion_loss, []

    def loss(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(objective, "diffusion_loss", loss)
    with pytest.raises(UserError, match=r"not finite at step 6 .*checkpoint-4"):
        run("nan")
    assert (good / run_folder.UNET_WEIGHTS).read_bytes() == weights
    assert checkpoint.latest_checkpoint(good).name == "checkpoint-4"


def test_accumulation_sees_the_same_images_and_noise(run):
    """Two micro-batches of 2 are not one of 4: their draws belong to (step, micro-batch)."""
    one, two = [], []
    for seen, flags in ((one, ()), (two, ("--gradient_accumulation_steps=2",))):
        with pytest.MonkeyPatch.context() as patch:
            real = objective.add_noise
            patch.setattr(
                objective,
                "add_noise",
                lambda a, images, noise, t, real=real, seen=seen: (
                    seen.append((images.clone(), noise.clone(), t.clone()))
                    or real(a, images, noise, t)
                ),
            )
            run(f"accumulated-{len(flags)}", "--train_batch_size=2", "--max_train_steps=2", *flags)
    assert len(one) == 2 and len(two) == 4
    for first, same in zip(one[0], two[0], strict=True):
        assert torch.equal(first, same)
    assert not torch.equal(two[0][1], two[1][1])


def test_noise_and_targets_are_float32_under_bf16(run, monkeypatch):
    """In bf16 the first timesteps of a linear schedule get no noise at all."""
    seen, real = [], objective.add_noise

    def add_noise(*args):
        seen.append((*args, real(*args)))
        return seen[-1][-1]

    monkeypatch.setattr(objective, "add_noise", add_noise)
    run("bf16", "--mixed_precision=bf16", "--max_train_steps=2")
    for tensors in seen:
        assert all(t.dtype in (torch.float32, torch.int64) for t in tensors)
    ema = load_file(
        run("bf16", "--max_train_steps=2", "--mixed_precision=bf16") / run_folder.UNET_WEIGHTS
    )
    assert all(t.dtype == torch.float32 for t in ema.values())


def test_logged_learning_rate_is_the_schedule(run):
    lines = [json.loads(line) for line in (run("lr") / run_folder.METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    expected = [
        0.0,
        0.005,
        *(0.01 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item()) for k in range(4)),
    ]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_a_full_disk_harms_nothing_and_the_same_command_goes_on(run, make_disk, tmp_path):
    straight = final_state(run("straight"))
    disk = make_disk(4096)
    (tmp_path / "full").symlink_to(disk)
    flags = ["--max_train_steps=4", "--checkpoints_total_limit=1"]
    run("full", *flags)
    good = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 200 * 1024))
    with pytest.raises(UserError, match=r"checkpoint-6 could not.*No space.*checkpoint-4, unt"):
        run("full", "--checkpoints_total_limit=1")
    for name in ("checkpoint-4/model.safetensors", run_folder.UNET_WEIGHTS, run_folder.MODEL_INDEX):
        assert (disk / name).read_bytes() == good[disk / name]
    assert not list(disk.rglob("*.partial"))
    filler.unlink()
    # The rate depends on the length, so the steps to 4 are done again with the longer one.
    run("full", "--overwrite_output_dir", "--checkpoints_total_limit=1")
    assert_same_bits(final_state(disk), straight)


def test_fp16_steps_that_are_skipped_advance_nothing(run, monkeypatch):
    """The scaler skips a step on overflow: weights, average, step and data are as if it was not."""
    straight = final_state(run("straight"))
    skips, real = iter([False, True, True, False, True]), train_step

    def take_step(parts, step, lr, meter):
        if next(skips, False):
            meter.add(torch.tensor(float("inf")))
            meter.forget()
            return None
        return real(parts, step, lr, meter)

    monkeypatch.setattr(loop, "take_step", take_step)
    assert_same_bits(final_state(run("skipped")), straight)
    assert next(skips, "all were used") == "all were used"


def test_a_skipped_step_leaves_weights_and_average(run, monkeypatch):
    """What take_step does with accelerate's word that the scaler skipped."""
    seen, real = [], train_step

    def take_step(parts, step, lr, meter):
        if step == 2 and not seen:
            before = [p.detach().clone() for p in parts.parameters]
            average = {name: value.clone() for name, value in parts.ema.average.items()}
            moments = copy.deepcopy(parts.optimizer.state_dict())
            step_of = type(parts.optimizer).step
            with monkeypatch.context() as patch:
                patch.setattr(type(parts.optimizer), "step", lambda self, closure=None: None)
                patch.setattr(
                    type(parts.accelerator), "optimizer_step_was_skipped", property(lambda s: True)
                )
                seen.append(real(parts, step, lr, meter))
            assert meter._step_count == 0
            assert type(parts.optimizer).step is step_of
            assert all(torch.equal(a, b) for a, b in zip(parts.parameters, before, strict=True))
            assert all(torch.equal(parts.ema.average[name], average[name]) for name in average)
            after = parts.optimizer.state_dict()
            for index, values in moments["state"].items():
                assert all(torch.equal(after["state"][index][k], v) for k, v in values.items())
            assert all(parameter.grad is None for parameter in parts.parameters)
        return real(parts, step, lr, meter)

    monkeypatch.setattr(loop, "take_step", take_step)
    run("skipping")
    assert seen == [None]


def test_fp16_that_only_overflows_is_given_up(run, monkeypatch):
    monkeypatch.setattr(loop, "take_step", lambda *_: None)
    with pytest.raises(UserError, match=r"fp16 overflowed 50 times.*bf16"):
        run("overflowing")


def test_a_budget_ends_the_run_with_a_rate_of_nearly_nothing(run, monkeypatch):
    """Time decides the number of steps; all that ends a run is there, and it counts as finished.

    On a clock that goes on by 10 ms whenever it is read.
    """
    readings = itertools.count(0.0, 0.01)
    clock = SimpleNamespace(monotonic=lambda: next(readings))
    monkeypatch.setattr(schedule, "time", clock)
    folder = run("budget", "--max_train_steps=None", "--budget=6s", "--lr_warmup_steps=0")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["lr"] == pytest.approx(1e-2)
    assert metrics[-1]["lr"] < 1e-3 and len(metrics) > 20
    last = metrics[-1]["step"]
    assert checkpoint.latest_checkpoint(folder).name == f"checkpoint-{last}"
    assert (folder / "samples" / f"step-{last:06d}.png").exists()
    record = json.loads((folder / run_folder.RECORD).read_text())
    assert record["finished"] and record["training"]["steps"] == last
    before = (folder / run_folder.UNET_WEIGHTS).stat().st_mtime_ns
    run("budget", "--max_train_steps=None", "--budget=6s", "--lr_warmup_steps=0")
    assert (folder / run_folder.UNET_WEIGHTS).stat().st_mtime_ns == before


def test_a_budget_without_time_for_one_step_is_refused(run, tmp_path):
    with pytest.raises(
        UserError, match=r"The budget of 0.01s was over before the first step: give"
    ):
        run("short", "--max_train_steps=None", "--budget=0.01s")
    assert not list(tmp_path.rglob("model_index.json"))


def test_a_run_stopped_for_good_before_its_first_report_has_no_loss_to_tell():
    facts = {"steps": 3, "seconds": 2.0, "images_per_s": 6.0, "final_loss": None}
    assert "(6 images/s).\n" in loop._closing(Path("run"), facts)


def test_zero_terminal_snr_trains_and_draws(run):
    folder = run("zero", "--rescale_betas_zero_snr", "--no_use_ema")
    config = json.loads((folder / run_folder.SCHEDULER_CONFIG).read_text())
    assert config["rescale_betas_zero_snr"] is True
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 10 for line in lines)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_rates_do_not_depend_on_accumulation(run, accumulation):
    """The same rate at the same step; test_story launches more processes."""
    folder = run(
        "rates",
        f"--gradient_accumulation_steps={accumulation}",
        "--train_batch_size=1",
        "--lr_scheduler=cosine_with_restarts",
        "--lr_num_cycles=2",
    )
    rates = [json.loads(line)["lr"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005, 0.01, 0.005])


def test_a_dry_run_tells_and_writes_nothing(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        loop, "train", lambda accelerator, config, _: dry_run.dry_run(accelerator, config)
    )
    folder = run("dry", "--dry_run")
    assert not folder.exists()
    said = capsys.readouterr().out
    settings = json.loads(said[: said.index("\n}") + 2])
    assert settings["max_train_steps"] == STEPS and settings["dropout"] == 0.1
    assert "M parameters on 10 RGB images of 8x8" in said
    assert "10 rows" in said
    for word in ("images/s", "MiB", "All 6 steps: about 0:00:0", "no run was begun"):
        assert word in said
    (tmp_path / "dry").mkdir()
    (tmp_path / "dry" / run_folder.MODEL_INDEX).write_text("{}")
    with pytest.raises(UsageError, match="not a run that can go on"):
        run("dry", "--dry_run")


@pytest.mark.slow
def test_a_run_moves_to_an_empty_machine_through_the_hub(run, hub, alice, monkeypatch, tmp_path):
    """Stopped here, gone on with there from the private training state: the same bits."""
    straight = final_state(run("straight"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        real = EMA.update

        def update(self, step):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, step)

        patch.setattr(EMA, "update", update)
        run("here", "--hub_checkpoints")
    state = hub.repo("model", "alice/here-training-state")
    assert state.is_private and len(state.commits()) == 1
    there = "--resume_from_checkpoint=hub://alice/here-training-state"
    assert_same_bits(final_state(run("there", there)), straight)
    lines = (tmp_path / "there" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # The same command again goes on from what is newest, here or on the Hub.
    run("there", there)


@pytest.mark.slow
def test_a_run_publishes_on_the_way_and_at_the_end(run, hub, alice, capsys):
    """Steps are not kept waiting: a save that finds a push under way waits its turn."""
    run("pushed", "--push_to_hub", "--save_model_epochs=1")
    model = hub.repo("model", "alice/pushed")
    titles = [commit.title for commit in model.commits()]
    assert titles[0] == "Publish DDPM pipeline" and len(titles) >= 2
    said = capsys.readouterr().out
    assert "Published and proved" in said and "Next: python sample.py alice/pushed --rev" in said


@pytest.mark.slow
def test_a_run_does_not_stop_for_a_hub_that_is_down(run, hub, alice, monkeypatch, tmp_path):
    straight = final_state(run("straight"))
    real = loop.take_step

    def take_step(parts, step, lr, meter):
        if step == 1:
            hub.inject(Fault("status", status=503, times=None))
        return real(parts, step, lr, meter)

    monkeypatch.setattr(loop, "take_step", take_step)
    monkeypatch.setattr("ddpm.hub.RETRY_DELAYS", (0.01,))
    with pytest.raises(UserError, match=r"The model is in .*down, but: .*go on: python push.py"):
        run("down", "--push_to_hub")
    hub.clear_faults()
    assert_same_bits(final_state(tmp_path / "down"), straight)
