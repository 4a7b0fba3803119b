"""The loop: exact resume from a kill anywhere, one clock, nothing good overwritten."""

import json
import os
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ddpm import checkpoint, diffusion, generation, pipeline, plan, runfolder, tracking, training
from ddpm.commandline import parse_train
from ddpm.config import OptimizationConfig, TrainConfig
from ddpm.errors import Interrupted, UsageError, UserError
from ddpm.tracking import make_accelerator

STEPS = 6


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product catches it, and nothing is tidied up."""


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Each run begins as a new process would: no Accelerator before it, usual signals."""
    monkeypatch.setattr(tracking, "use_all_cores", lambda processes: None)
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
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
                f"--train_data_dir={pictures}", f"--model_config_name_or_path={tiny_unet}",
                f"--output_dir={tmp_path / name}", "--resolution=8", "--random_flip",
                "--train_batch_size=4", f"--max_train_steps={STEPS}", "--lr_warmup_steps=2",
                "--learning_rate=1e-2", "--dropout=0.1", "--checkpointing_steps=2",
                "--save_images_epochs=1", "--save_model_epochs=1", "--eval_batch_size=2",
                "--ddpm_num_inference_steps=2", "--logging_steps=1", "--snr_gamma=5",
                "--prediction_type=v_prediction", "--checkpoints_total_limit=None", *flags,
            ]
        )  # fmt: skip
        training.train(
            make_accelerator(config.optimization.mixed_precision, config.tracking), config
        )
        return tmp_path / name

    return train


def final_state(folder):
    """Everything that must survive, as tensors by name."""
    last = folder / f"checkpoint-{STEPS}"
    tensors = {f"raw {k}": v for k, v in load_file(last / "model.safetensors").items()}
    tensors |= {f"ema {k}": v for k, v in load_file(last / "ema.safetensors").items()}
    tensors |= {f"out {k}": v for k, v in load_file(folder / runfolder.UNET_WEIGHTS).items()}
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
        ("in a step", diffusion, "loss", 4),
        ("in the update", training.EMA, "update", 5),
        ("in a preview", generation, "generate", 1),
        ("in the last preview", generation, "generate", 2),
        ("writing the averages of a checkpoint", checkpoint, "save_file", 2),
        ("before a checkpoint is renamed", checkpoint.runfolder, "sync_tree", 2),
        ("after a checkpoint is renamed", checkpoint.runfolder, "sync_folder", 3),
        ("in an export", pipeline, "sync_tree", 1),
        ("in the last export", pipeline, "sync_tree", 2),
        ("before the record", runfolder, "write_record", 2),
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
    record = json.loads((run("killed") / runfolder.RECORD).read_text())
    assert record["finished"] and record["training"]["steps"] == STEPS


def test_looking_does_not_change_the_run(run):
    """Previews, exports and checkpoints on the way leave no trace in the weights."""
    seen = final_state(run("seen"))
    unseen = final_state(
        run("unseen", "--save_images_epochs=0", "--save_model_epochs=0", "--checkpointing_steps=99")
    )
    assert_same_bits(seen, unseen)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
def test_a_signal_saves_and_the_same_command_goes_on(run, monkeypatch, tmp_path, number, code):
    straight = final_state(run("straight"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        real = training.EMA.update

        def update(self, step):
            if step == 3:
                os.kill(os.getpid(), number)
            return real(self, step)

        patch.setattr(training.EMA, "update", update)
        run("stopped")
    assert stopped.value.exit_code == code
    assert checkpoint.latest(tmp_path / "stopped").name == "checkpoint-3"
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
    assert "max_train_steps changed" in capsys.readouterr().out
    assert checkpoint.latest(folder).name == "checkpoint-6"


def test_overwriting_deletes_the_run_and_nothing_else(run):
    folder = run("again")
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint-best").mkdir()
    run("again", "--overwrite_output_dir", "--max_train_steps=2", "--seed=1")
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "checkpoint-best").is_dir()
    assert [*runfolder.checkpoints(folder)] == [2]


def test_overwriting_deletes_nothing_when_the_new_run_cannot_begin(run):
    folder = run("kept")
    with pytest.raises(UserError):
        run("kept", "--overwrite_output_dir", "--background=nocolour")
    assert (folder / runfolder.UNET_WEIGHTS).exists() and [*runfolder.checkpoints(folder)]


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / runfolder.MODEL_INDEX).write_text("{}")
    with pytest.raises(UsageError, match="not a run that can go on"):
        run("foreign")


def test_a_loss_that_is_not_finite_stops_the_run_and_harms_nothing(run, monkeypatch):
    good = run("nan", "--max_train_steps=4")
    weights = (good / runfolder.UNET_WEIGHTS).read_bytes()
    real, calls = diffusion.loss, []

    def loss(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(diffusion, "loss", loss)
    with pytest.raises(UserError, match=r"not finite at step 6 .*checkpoint-4"):
        run("nan")
    assert (good / runfolder.UNET_WEIGHTS).read_bytes() == weights
    assert checkpoint.latest(good).name == "checkpoint-4"


def test_accumulation_sees_the_same_images_and_noise(run):
    """Two micro-batches of 2 are not one of 4: their draws belong to (step, micro-batch)."""
    one, two = [], []
    for seen, flags in ((one, ()), (two, ("--gradient_accumulation_steps=2",))):
        with pytest.MonkeyPatch.context() as patch:
            real = diffusion.add_noise
            patch.setattr(
                diffusion,
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
    seen, real = [], diffusion.add_noise

    def add_noise(*args):
        seen.append((*args, real(*args)))
        return seen[-1][-1]

    monkeypatch.setattr(diffusion, "add_noise", add_noise)
    run("bf16", "--mixed_precision=bf16", "--max_train_steps=2")
    for tensors in seen:
        assert all(t.dtype in (torch.float32, torch.int64) for t in tensors)
    ema = load_file(run("bf16", "--max_train_steps=2", "--mixed_precision=bf16")
                    / runfolder.UNET_WEIGHTS)  # fmt: skip
    assert all(t.dtype == torch.float32 for t in ema.values())


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "constant_with_warmup"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_learning_rate_depends_on_the_optimizer_step_alone(name, accumulation):
    """Accumulation does not stretch it: it rises over the warm-up and ends on time."""
    config = OptimizationConfig(
        lr_scheduler=name, lr_warmup_steps=10, gradient_accumulation_steps=accumulation
    )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    rates = plan.learning_rates(optimizer, config, total_steps=100)
    assert [rates(step) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])
    end = {"constant_with_warmup": 1.0, "polynomial": 1e-7 / config.learning_rate}.get(name, 0.0)
    assert rates(100) == pytest.approx(end, abs=1e-9)


def test_logged_learning_rate_is_the_schedule(run):
    lines = [json.loads(line) for line in (run("lr") / runfolder.METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    expected = [0.0, 0.005, *(0.01 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / 4)).item())
                              for k in range(4))]  # fmt: skip
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_a_plan_counts_optimizer_steps():
    config = TrainConfig(optimization=OptimizationConfig(
        train_batch_size=2, gradient_accumulation_steps=3, num_epochs=5))  # fmt: skip
    made = plan.Plan.make(config, num_images=25, num_processes=2)
    assert (made.micro_batches, made.images_per_step) == (6, 12)
    assert (made.steps_per_epoch, made.total_steps, made.preview_every) == (3, 15, 30)
