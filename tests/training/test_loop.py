"""The loop: a run resumed from a kill anywhere is exact, on one clock, and overwrites nothing good.

`trained_run` copies a run that is trained once a session; `train_tiny` trains one here.
"""

import errno
import itertools
import json
import os
import shutil
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ddpm import file_io, run_folder, run_record
from ddpm.config.parser import parse_push
from ddpm.diffusion import power_ema
from ddpm.diffusion.ema import EMA
from ddpm.errors import Interrupted, UsageError, UserError
from ddpm.evaluation import export_ema
from ddpm.publishing import publish
from ddpm.run_record import TrainingRecord
from ddpm.sampling import generate, pipeline
from ddpm.training import checkpoint, loop, schedule, step
from tests.files import edit_json
from tests.hub import Fault
from tests.tiny import FLAGS, as_new_process, write_transparent_pictures
from tests.training.bits import Killed, assert_same_bits, final_state, kill, read_lines

SHORT = "--max_train_steps=4"
POST_HOC = ("--post_hoc_ema", "--checkpoints_total_limit=1")
QUIET = ("--save_images_epochs=0", "--save_model_epochs=0", "--checkpointing_steps=99")
BUDGET = (
    "--max_train_steps=None",
    "--budget=4.5s",
    "--lr_warmup_steps=0",
    "--save_images_epochs=99",
)


@pytest.fixture
def train(train_tiny, tmp_path):
    """train(name, *flags) -> tmp_path / name, trained or resumed there."""
    return lambda name, *flags: train_tiny(tmp_path / name, *flags)


# Stopped and resumed


@pytest.mark.parametrize(
    ("owner", "name", "at_call"),
    [
        pytest.param(step, "diffusion_loss", 4, id="in a step"),
        pytest.param(EMA, "update", 5, id="in the update", marks=pytest.mark.slow),
        pytest.param(generate, "generate_images", 1, id="in a preview", marks=pytest.mark.slow),
        pytest.param(
            generate, "generate_images", 2, id="in the last preview", marks=pytest.mark.slow
        ),
        pytest.param(checkpoint, "save_file", 2, id="in a checkpoint", marks=pytest.mark.slow),
        pytest.param(file_io, "fsync_tree", 2, id="before a checkpoint is renamed"),
        pytest.param(
            file_io, "fsync_dir", 3, id="after a checkpoint is renamed", marks=pytest.mark.slow
        ),
        pytest.param(pipeline, "fsync_tree", 1, id="in an export", marks=pytest.mark.slow),
        pytest.param(pipeline, "fsync_tree", 2, id="in the last export"),
        pytest.param(run_record, "write_record", 2, id="before the record", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(train, trained_run, monkeypatch, owner, name, at_call):
    """Six steps are the same bits as some steps, a kill, and the rest: wherever the kill comes."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, owner, name, at_call)
        train("killed")
    folder = train("killed")
    assert_same_bits(final_state(folder), final_state(trained_run("straight")))
    record = run_record.read_record(folder)
    assert record.finished and record.training.steps == 6


@pytest.mark.parametrize(
    ("owner", "name", "at_call"),
    [
        pytest.param(power_ema.PowerEMA, "update", 5, id="in an update", marks=pytest.mark.slow),
        pytest.param(file_io, "fsync_and_rename", 4, id="in a snapshot", marks=pytest.mark.slow),
        pytest.param(checkpoint, "save_file", 2, id="between a snapshot and its checkpoint"),
        pytest.param(checkpoint.shutil, "rmtree", 1, id="pruning", marks=pytest.mark.slow),
    ],
)
def test_post_hoc_ema_resumes_bit_exact(train, trained_run, monkeypatch, owner, name, at_call):
    """The run itself is the same as without post-hoc EMA."""
    straight = final_state(trained_run("straight", *POST_HOC))
    files = {key.split()[0] for key in straight if key.startswith(("tracks", "step"))}
    assert files == {"tracks.safetensors", "step-000004.safetensors", "step-000006.safetensors"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, owner, name, at_call)
        train("killed", *POST_HOC)
    assert_same_bits(final_state(train("killed", *POST_HOC)), straight)
    without = final_state(trained_run("without"))
    assert_same_bits(without, {key: straight[key] for key in without})


def test_resumed_run_keeps_its_unet(train, trained_run, tiny_unet, tmp_path, monkeypatch):
    """Also when the config that it was given, like a preset, has changed in the meantime."""
    config = shutil.copytree(tiny_unet, tmp_path / "config") / "config.json"
    flag = f"--model_config_name_or_path={config.parent}"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, EMA, "update", 4)
        train("killed", "--save_model_epochs=0", flag)
    edit_json(config, block_out_channels=[8, 8])
    assert pipeline.load_model(str(tmp_path / "killed" / "checkpoint-2"))
    resumed = final_state(train("killed", "--save_model_epochs=0", flag))
    assert_same_bits(resumed, final_state(trained_run("straight", "--save_model_epochs=0")))


def stop_after(patch, steps, number):
    """Send a signal to this process in the step after `steps` others."""
    original = EMA.update

    def update(self, step):
        if step == steps:
            os.kill(os.getpid(), number)
        return original(self, step)

    patch.setattr(EMA, "update", update)


def test_each_signal_saves_and_the_same_command_resumes(train, trained_run, monkeypatch):
    """One run, stopped three times."""
    stops = [(signal.SIGUSR1, 0), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
    for steps, (number, exit_code) in enumerate(stops, 2):
        with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
            stop_after(patch, steps, number)
            train("stopped")
        assert stopped.value.exit_code == exit_code
        assert f"Stopped by {number.name} after step {steps}" in str(stopped.value)
    folder = train("stopped")
    assert sorted(run_folder.checkpoints(folder)) == [2, 3, 4, 6]
    assert_same_bits(final_state(folder), final_state(trained_run("straight")))


def test_finished_run_is_left_as_it_is(train, trained_run, capsys):
    folder = trained_run("done")
    files = [path for path in folder.rglob("*") if path.name != ".run.lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    train("done")
    output = capsys.readouterr().out
    assert "is finished: 6 steps" in output and f"push.py {folder}" in output
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert {*files, folder / ".run.lock"} == {*folder.rglob("*")}


def test_finished_run_may_be_made_longer(train, trained_run, capsys):
    """With gradient checkpointing, and with a post-hoc EMA that starts where the run resumes."""
    trained_run("later", SHORT)
    folder = train("later", "--post_hoc_ema", "--gradient_checkpointing")
    output = capsys.readouterr().out
    assert "max_train_steps was 4, now 6" in output
    assert "post_hoc_ema was False, now True" in output
    assert "gradient_checkpointing was False, now True" in output
    assert "checkpoint-4 has no tracks.safetensors" in output and "step 4" in output
    assert checkpoint.latest_checkpoint(folder).name == "checkpoint-6"
    assert [*power_ema.list_snapshots(folder)] == [6]
    with safe_open(folder / "ema" / "step-000006.safetensors", "pt") as file:
        assert file.metadata() == {"began": "4", "step": "6"}


def test_run_resumes_after_another_ema_length_was_exported(train, trained_run, capsys):
    """Finished, it is left as it is; made longer, it ends with training's own EMA again."""
    folder = trained_run("changed", *POST_HOC, SHORT)
    average = power_ema.open_posthoc_ema(folder).build(0.10)
    export_ema.export_weights(folder, average, {"sigma_rel": 0.10, "step": 4})
    exported = load_file(folder / run_folder.UNET_WEIGHTS)
    train("changed", *POST_HOC, SHORT)
    assert "is finished: 4 steps" in capsys.readouterr().out
    assert_same_bits(load_file(folder / run_folder.UNET_WEIGHTS), exported)
    assert run_record.read_record(folder).exported_ema is not None
    train("changed", *POST_HOC)
    state = final_state(folder)
    for name in load_file(folder / "checkpoint-6" / "ema.safetensors"):
        assert torch.equal(state[f"out {name}"], state[f"ema {name}"])
    assert state.keys() == final_state(trained_run("straight", *POST_HOC)).keys()
    assert run_record.read_record(folder).exported_ema is None


def test_previews_exports_and_checkpoints_do_not_change_the_run(train, trained_run):
    assert_same_bits(final_state(train("quiet", *QUIET)), final_state(trained_run("straight")))


def test_local_work_needs_no_main_thread_no_flush_and_no_client(
    run_main, pictures, tiny_unet, new_client, monkeypatch, tmp_path
):
    """In a thread of a server, on a share of CIFS, behind a proxy that no client can use."""
    flush = os.fsync

    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080/")
    data = [f"--train_data_dir={pictures}", f"--model_config_name_or_path={tiny_unet}"]
    for command in (
        ("train.py", *data, f"--output_dir={tmp_path / 'run'}", *FLAGS, *QUIET, SHORT),
        ("sample.py", tmp_path / "run", "--num_images=1", f"--output_dir={tmp_path / 'images'}"),
        ("push.py", tmp_path / "run", "--dry_run"),
    ):
        with as_new_process(), ThreadPoolExecutor(1) as pool:
            assert pool.submit(run_main, *command).result() == 0, command
    assert run_main("sample.py", "alice/model") == 2


# Another run in the same folder


def test_other_settings_in_the_same_folder_are_refused_by_name(train, trained_run):
    trained_run("run")
    with pytest.raises(UsageError) as refused:
        train("run", "--learning_rate=0.5", "--seed=7")
    assert "learning_rate was 0.01, now 0.5" in str(refused.value)
    assert "seed was 0, now 7" in str(refused.value)
    assert "dropout" not in str(refused.value)


def test_overwriting_deletes_the_run_and_nothing_else(train, trained_run):
    folder = trained_run("again", *POST_HOC)
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-best").mkdir()
    train("again", "--overwrite_output_dir", "--max_train_steps=2", "--seed=1")
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "checkpoint-best").is_dir()
    assert [*run_folder.checkpoints(folder)] == [2]
    assert not (folder / run_folder.EMA_SNAPSHOTS).exists()


def test_overwriting_deletes_nothing_when_the_new_run_cannot_begin(train, trained_run):
    folder = trained_run("kept")
    with pytest.raises(UserError):
        train("kept", "--overwrite_output_dir", "--background=nocolour")
    assert (folder / run_folder.UNET_WEIGHTS).exists() and [*run_folder.checkpoints(folder)]


def test_folder_that_is_no_run_is_refused(train, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / run_folder.MODEL_INDEX).write_text("{}")
    with pytest.raises(UsageError, match="not a run that can be resumed"):
        train("foreign")


# What goes wrong


def test_loss_that_is_not_finite_stops_the_run_and_harms_nothing(train, trained_run, monkeypatch):
    folder = trained_run("nan", SHORT)
    weights = (folder / run_folder.UNET_WEIGHTS).read_bytes()
    original, calls = step.diffusion_loss, []

    def diffusion_loss(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(step, "diffusion_loss", diffusion_loss)
    with pytest.raises(UserError, match=r"not finite at step 6 .*checkpoint-4"):
        train("nan")
    assert (folder / run_folder.UNET_WEIGHTS).read_bytes() == weights
    assert checkpoint.latest_checkpoint(folder).name == "checkpoint-4"


@pytest.mark.slow
def test_full_disk_harms_nothing_and_the_same_command_resumes(
    train, trained_run, make_disk, tmp_path
):
    disk = make_disk(4096)
    (tmp_path / "full").symlink_to(disk)
    train("full", SHORT, "--checkpoints_total_limit=1")
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 200 * 1024))
    with pytest.raises(UserError, match=r"checkpoint-6 could not.*No space.*checkpoint-4, unt"):
        train("full", "--checkpoints_total_limit=1")
    for name in ("checkpoint-4/model.safetensors", run_folder.UNET_WEIGHTS, run_folder.MODEL_INDEX):
        assert (disk / name).read_bytes() == before[disk / name]
    assert not list(disk.rglob("*.partial"))
    filler.unlink()
    # The learning rate depends on the length, so the first steps are done again.
    train("full", "--overwrite_output_dir", "--checkpoints_total_limit=1")
    assert_same_bits(final_state(disk), final_state(trained_run("straight")))


def test_steps_that_fp16_skips_advance_nothing(train, trained_run, monkeypatch):
    """After an overflow weights, average, step and data are as if the step had not been tried."""
    skips, original = iter([False, True, True, False, True]), step.train_step

    def train_step(state, number, lr, meter):
        if next(skips, False):
            meter.add(torch.tensor(float("inf")))
            meter.discard_step()
            return None
        return original(state, number, lr, meter)

    monkeypatch.setattr(loop, "train_step", train_step)
    folder = train("skipped")
    assert next(skips, "all were used") == "all were used"
    assert_same_bits(final_state(folder), final_state(trained_run("straight")))
    assert run_record.read_checkpoint_state(folder / "checkpoint-6").skipped == 3


def test_run_in_which_fp16_only_overflows_is_given_up(train, monkeypatch):
    monkeypatch.setattr(loop, "train_step", lambda *_: None)
    with pytest.raises(UserError, match=r"fp16 overflowed 50 times.*bf16"):
        train("overflowing")


# Length, learning rate and log


def test_logged_learning_rate_is_the_schedule(trained_run):
    lines = read_lines(trained_run("run"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    cosine = [0.01 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item()) for k in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx([0.0, 0.005, *cosine])
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_learning_rate_does_not_depend_on_accumulation(train):
    """test_story launches more processes."""
    flags = ("--train_batch_size=1", "--lr_scheduler=cosine_with_restarts", "--lr_num_cycles=2")
    lines = read_lines(train("rates", "--gradient_accumulation_steps=3", *QUIET, *flags))
    assert [line["lr"] for line in lines] == pytest.approx([0.0, 0.005, 0.01, 0.005, 0.01, 0.005])


def test_budget_ends_the_run_with_a_learning_rate_near_zero(train, monkeypatch):
    """Time decides the number of steps; the run then counts as finished.

    The clock advances by 20 ms whenever it is read.
    """
    readings = itertools.count(0.0, 0.02)
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=lambda: next(readings)))
    folder = train("budget", *QUIET, *BUDGET)
    lines = read_lines(folder)
    assert lines[0]["lr"] == pytest.approx(1e-2)
    assert lines[-1]["lr"] < 1e-3 and len(lines) > 20
    last = lines[-1]["step"]
    assert checkpoint.latest_checkpoint(folder).name == f"checkpoint-{last}"
    assert (folder / "samples" / f"step-{last:06d}.png").exists()
    record = run_record.read_record(folder)
    assert record.finished and record.training.steps == last
    before = (folder / run_folder.UNET_WEIGHTS).stat().st_mtime_ns
    train("budget", *QUIET, *BUDGET)
    assert (folder / run_folder.UNET_WEIGHTS).stat().st_mtime_ns == before


def test_budget_without_time_for_one_step_is_refused(train, tmp_path):
    with pytest.raises(UserError, match=r"The budget of 0.01s was over before the first step: g"):
        train("short", "--max_train_steps=None", "--budget=0.01s")
    assert not list(tmp_path.rglob("model_index.json"))


def test_summary_leaves_out_a_loss_that_was_never_reported():
    facts = TrainingRecord(steps=3, seconds=2.0, images_per_s=6.0)
    assert "(6 images/s).\n" in loop._summary(Path("run"), facts)


def test_zero_terminal_snr_trains_and_exports(train):
    folder = train("zero", "--rescale_betas_zero_snr", "--no_use_ema", "--max_train_steps=2")
    config = json.loads((folder / run_folder.SCHEDULER_CONFIG).read_text())
    assert config["rescale_betas_zero_snr"] is True
    assert all(0 < line["loss"] < 10 for line in read_lines(folder))


def test_bf16_exports_float32(train):
    folder = train("bf16", "--mixed_precision=bf16", "--max_train_steps=1")
    weights = load_file(folder / run_folder.UNET_WEIGHTS)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


# The Hub


@pytest.mark.slow
def test_run_moves_to_an_empty_machine_through_the_hub(
    train, trained_run, hub, alice, monkeypatch, tmp_path
):
    """Stopped here, resumed there from the private training state: the same bits."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 3, signal.SIGTERM)
        train("here", "--hub_checkpoints")
    state = hub.repo("model", "alice/here-training-state")
    assert state.is_private and len(state.commits()) == 1
    address = "--resume_from_checkpoint=hub://alice/here-training-state"
    folder = train("there", address)
    assert_same_bits(final_state(folder), final_state(trained_run("straight")))
    assert [line["step"] for line in read_lines(folder)] == [1, 2, 3, 4, 5, 6]
    train("there", address)  # again: from the newest, here or on the Hub


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rectangles_are_trained_and_published(train, hub, alice, capsys, streaming):
    """8 high and 12 wide in every place that has a size; the proof is drawn after the push."""
    flags = ["--resolution=8,12", "--max_train_steps=2", *(["--streaming"] * streaming)]
    name = f"wide-{streaming}"
    folder = train(name, *flags, "--rows_per_epoch=10" if streaming else "--center_crop")
    assert "RGB images of 12x8" in capsys.readouterr().out
    assert json.loads((folder / run_folder.TRAIN_CONFIG).read_text())["resolution"] == [8, 12]
    for model in (folder, folder / "checkpoint-2"):
        assert tuple(pipeline.load_model(str(model)).unet.config.sample_size) == (8, 12)
    grid = Image.open(folder / run_folder.SAMPLES / "step-000002.png")
    assert grid.size == (2 * 6 * 12 + 3 * 2, 6 * 8 + 2 * 2)  # two images, each pixel six times
    assert Image.open(folder / "proof" / "seed-00000.png").size == (12, 8)
    publish.publish(folder, f"alice/{name}", parse_push([str(folder)]))
    card = hub.repo("model", f"alice/{name}").read("README.md").decode()
    assert "`resolution=8,12`" in card
    with pytest.raises(UsageError, match="resolution was 8,12, now 12,8"):
        train(name, "--resolution=12,8", *flags[1:])


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_transparency_is_trained_and_published(train, shared_folder, hub, alice, capsys, streaming):
    """A pipeline of RGBA, its proof and its grid; the images without transparency are counted."""
    pictures = shared_folder("transparent-pictures", write_transparent_pictures)
    flags = ["--channels=4", "--max_train_steps=2", f"--train_data_dir={pictures}"]
    name = f"clear-{streaming}"
    folder = train(name, *flags, *(["--streaming", "--rows_per_epoch=10"] * streaming))
    output = capsys.readouterr().out
    assert "RGBA images of 8x8" in output
    assert "9 have transparency: the fourth channel." in output
    assert "1 have no transparency: their fourth channel is opaque." in output
    assert pipeline.load_model(str(folder)).unet.config.out_channels == 4
    assert Image.open(folder / run_folder.SAMPLES / "step-000002.png").mode == "RGB"
    assert Image.open(folder / "proof" / "seed-00000.png").mode == "RGBA"
    publish.publish(folder, f"alice/{name}", parse_push([str(folder)]))
    assert "trained as RGBA" in hub.repo("model", f"alice/{name}").read("README.md").decode()


def test_background_contradicts_four_channels(train):
    with pytest.raises(UsageError, match="--background black would fill transparent pixels"):
        train("filled", "--channels=4", "--background=black")


@pytest.mark.slow
def test_run_publishes_during_training_and_at_the_end(train, hub, alice, capsys):
    """Steps do not wait for the Hub: a save during an upload waits its turn."""
    train("pushed", "--push_to_hub", "--save_model_epochs=1")
    titles = [commit.title for commit in hub.repo("model", "alice/pushed").commits()]
    assert titles[0] == "Publish DDPM pipeline" and len(titles) >= 2
    output = capsys.readouterr().out
    assert "Published and proved" in output and "Next: python sample.py alice/pushed --r" in output


@pytest.mark.slow
def test_run_does_not_stop_for_a_hub_that_is_down(
    train, trained_run, hub, alice, monkeypatch, tmp_path
):
    original = step.train_step

    def train_step(state, number, lr, meter):
        if number == 1:
            hub.inject(Fault("status", status=503, times=None))
        return original(state, number, lr, meter)

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr("ddpm.hub.RETRY_DELAYS", (0.01,))
    with pytest.raises(UserError, match=r"The model is in .*down, but: .*go on: python push.py"):
        train("down", "--push_to_hub")
    hub.clear_faults()
    assert_same_bits(final_state(tmp_path / "down"), final_state(trained_run("straight")))
