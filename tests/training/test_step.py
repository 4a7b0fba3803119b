"""One optimizer step: its draws, its precision, and what makes it slow, counted without a clock."""

import copy
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm import file_io
from ddpm.accelerator import make_accelerator
from ddpm.config.parser import parse_train
from ddpm.config.train import OptimizationConfig
from ddpm.data import decode, pixel_cache
from ddpm.device import compile_failure_reason
from ddpm.errors import UserError
from ddpm.training import step, tracking
from ddpm.training.schedule import Schedule
from ddpm.training.tracking import LossMeter
from tests import tiny
from tests.test_architecture import python
from tests.tiny import FLAGS
from tests.training.bits import Killed, assert_same_bits, final_state, kill, read_lines

QUIET = ("--save_images_epochs=0", "--save_model_epochs=0", "--checkpointing_steps=99")
DYNAMO = ("--dropout=0", "--save_images_epochs=0", "--save_model_epochs=0")


@pytest.fixture
def build(pictures, tiny_unet, tmp_path):
    """build(*flags) -> the TrainState of a tiny run that has not started."""

    def build_state(*flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        command = [f"--train_data_dir={pictures}", f"--model_config_name_or_path={tiny_unet}"]
        config = parse_train([*command, f"--output_dir={tmp_path / 'run'}", *FLAGS, *flags])
        accelerator = make_accelerator(config.optimization.mixed_precision)
        return step.build_train_state(accelerator, config)

    yield build_state
    AcceleratorState._reset_state(reset_partial_state=True)


# What a step computes


def record_noise(monkeypatch, state):
    """Return a list that fills with (images, noise, timesteps, noisy images) of micro-batches."""
    calls, original = [], step.add_noise

    def add_noise(alphas_cumprod, *tensors):
        noisy = original(alphas_cumprod, *tensors)
        calls.append((*(tensor.clone() for tensor in tensors), noisy))
        return noisy

    monkeypatch.setattr(step, "add_noise", add_noise)
    return calls


def test_draws_belong_to_step_and_micro_batch(build, monkeypatch):
    """The first micro-batch of a step sees the same with and without accumulation."""
    calls = []
    for flags in ((), ("--gradient_accumulation_steps=2",)):
        state = build("--train_batch_size=2", *flags)
        seen = record_noise(monkeypatch, state)
        step.train_step(state, 0, 1e-3, LossMeter(state.accelerator))
        calls.append(seen[-1] if not flags else seen)
    one, two = calls
    assert len(two) == 2
    for tensor, same in zip(one, two[0], strict=True):
        assert torch.equal(tensor, same)
    assert not torch.equal(two[0][1], two[1][1])


def test_noise_and_targets_are_float32_under_bf16(build, monkeypatch):
    """In bf16 the first timesteps of a linear schedule would get no noise at all."""
    state = build("--mixed_precision=bf16")
    calls = record_noise(monkeypatch, state)
    step.train_step(state, 0, 1e-3, LossMeter(state.accelerator))
    ((images, noise, timesteps, noisy),) = calls
    assert {images.dtype, noise.dtype, noisy.dtype} == {torch.float32}
    assert timesteps.dtype == torch.int64


def test_timesteps_follow_the_settings(build, monkeypatch):
    """At a noise level of exp(9) all are the last one; the noise is the same."""
    flags = ("--timestep_sampling=logit_normal", "--logit_mean=9", "--logit_std=0.1")
    drawn = []
    for state in (build(), build(*flags)):
        with monkeypatch.context() as patch:
            seen = record_noise(patch, state)
            step.train_step(state, 0, 1e-3, LossMeter(state.accelerator))
            drawn += seen
    (_, noise, uniform, _), (_, same_noise, last, _) = drawn
    assert torch.equal(noise, same_noise)
    assert uniform.tolist() != [999] * 4 and last.tolist() == [999] * 4


def test_skipped_step_changes_neither_weights_nor_averages(build, monkeypatch):
    """The scaler's optimizer leaves the weights and says so; the averages must not move either."""
    state = build()
    meter = LossMeter(state.accelerator)
    step.train_step(state, 0, 1e-2, meter)
    meter.end_step(1, torch.tensor(1.0))
    weights = [parameter.detach().clone() for parameter in state.parameters]
    average = {name: value.clone() for name, value in state.ema.average.items()}
    moments = copy.deepcopy(state.optimizer.state_dict()["state"])
    with monkeypatch.context() as patch:
        patch.setattr(type(state.optimizer), "step", lambda self, closure=None: None)
        patch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
        assert step.train_step(state, 1, 1e-2, meter) is None
    assert meter._step_count == 0
    assert all(torch.equal(a, b) for a, b in zip(state.parameters, weights, strict=True))
    assert_same_bits(state.ema.average, average)
    for index, values in state.optimizer.state_dict()["state"].items():
        assert_same_bits(values, moments[index])
    assert all(parameter.grad is None for parameter in state.parameters)


def test_optimizer_is_fused():
    optimizer = step.build_optimizer(torch.nn.Linear(2, 2), OptimizationConfig())
    assert optimizer.defaults["fused"] is True


def test_gradient_checkpointing_changes_no_bit(train_tiny, trained_run, monkeypatch, tmp_path):
    """With dropout too, whose draws are made again."""
    straight = final_state(trained_run("plain"))
    calls, original = [], torch.utils.checkpoint.checkpoint

    def checkpoint(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", checkpoint)
    folder = train_tiny(tmp_path / "checkpointed", *QUIET, "--gradient_checkpointing")
    assert_same_bits(final_state(folder), straight)
    assert calls


# What makes a step slow


class DeviceReads(TorchDispatchMode):
    """Count operators that wait for a GPU: a value is read, or a size depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in self.NAMES:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def test_step_reads_nothing_from_the_device(build):
    """On a GPU each read would wait for all that is queued before it.

    The images are made square: the offsets of crops on the CPU are read there.
    """
    with DeviceReads() as reads:
        torch.ones(3).sum().item()
        bool(torch.ones(1) > 0)
    assert reads.counts["_local_scalar_dense"] == 2
    state = build("--resize_mode=stretch", "--post_hoc_ema")
    meter = LossMeter(state.accelerator)
    with DeviceReads() as reads:
        for number in range(2):
            meter.end_step(number + 1, step.train_step(state, number, 1e-3, meter))
    assert not reads.counts


def test_metrics_are_fetched_and_sent_only_when_due(train_tiny, monkeypatch, tmp_path):
    """Two numbers a report come from the device, and the tracker is called once for it."""
    calls = Counter()
    for owner, name in (
        (tracking.LossMeter, "mean_loss"),
        (tracking.LossMeter, "first_bad_step"),
        (tracking.Tracker, "log"),
    ):
        original = getattr(owner, name)

        def counted(self, *args, original=original, name=name, **kwargs):
            calls[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    folder = train_tiny(tmp_path / "run", *QUIET, "--logging_steps=3")
    assert calls == {"mean_loss": 2, "first_bad_step": 2, "log": 2}
    assert [line["step"] for line in read_lines(folder)] == [3, 6]


def test_each_image_is_decoded_once(build, train_tiny, monkeypatch, tmp_path):
    """Ten images, two epochs, and a second run on the same data: ten reads."""
    reads = []

    def decode_row(value, config, hub_id):
        reads.append(value["path"])
        return decode.decode_row(value, config, hub_id)

    monkeypatch.setattr(pixel_cache, "decode_row", decode_row)
    cache = f"--cache_dir={tmp_path / 'cache'}"
    train_tiny(tmp_path / "one", *QUIET, cache)
    assert len(reads) == len(set(reads)) == 10
    train_tiny(tmp_path / "two", *QUIET, cache, "--seed=1", "--max_train_steps=1")
    assert len(reads) == len(set(reads)) == 10


@pytest.mark.slow
def test_training_imports_nothing_that_it_does_not_use(tmp_path, pictures, tiny_unet):
    """A dry run, to its end, in a process of its own, where peft is installed."""
    installed = tmp_path / "installed"
    (installed / "peft").mkdir(parents=True)
    (installed / "peft" / "__init__.py").write_text("import transformers\n")
    (installed / "peft-1.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: peft\nVersion: 1.0\n"
    (installed / "peft-1.0.dist-info" / "METADATA").write_text(metadata)
    report = python(
        "import contextlib, io, json, runpy, sys\n"
        f"sys.path[:0] = ['.', {str(installed)!r}]\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    runpy.run_path('train.py', run_name='__main__')\n"
        "unused = ['transformers', 'peft', 'scipy', 'wandb', 'tensorboard', 'matplotlib',\n"
        "          'torch_fidelity']\n"
        "print(json.dumps([name for name in unused if name in sys.modules]))\n",
        f"--train_data_dir={pictures}",
        f"--model_config_name_or_path={tiny_unet}",
        "--resolution=8",
        "--dry_run",
        f"--output_dir={tmp_path / 'run'}",
    )
    assert json.loads(report) == []


# Whether to compile


@pytest.mark.slow
@pytest.mark.parametrize("has_classes", [False, True])
def test_compiled_run_has_the_same_losses_and_compiles_once(
    train_tiny, shared_folder, monkeypatch, tmp_path, has_classes
):
    """Previews, exports and the proof run eagerly: their shapes and modes would be compiled too."""
    from torch._dynamo.testing import CompileCounterWithBackend

    pictures = shared_folder("class-pictures", tiny.write_class_pictures)
    flags = ["--dropout=0"]
    if has_classes:
        flags += [f"--train_data_dir={pictures}", "--class_conditional"]
    assert not compile_failure_reason("cpu")
    plain = train_tiny(tmp_path / "plain", *flags, "--compile=off")
    counter, original = CompileCounterWithBackend("inductor"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: original(f, backend=counter, **kw))
    torch._dynamo.reset()
    compiled = train_tiny(tmp_path / "compiled", *flags, "--compile=on")
    assert counter.frame_count == 1
    losses = [[line["loss"] for line in read_lines(folder)] for folder in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert sorted(load_file(plain / weights)) == sorted(load_file(compiled / weights))


def test_dynamo_of_the_accelerate_config_compiles_in_place(build, monkeypatch):
    """accelerate itself would wrap the model, and each name would begin with _orig_mod."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    state = build("--post_hoc_ema")
    assert state.unet is state.bare_unet and state.unet._compiled_call_impl is not None
    names = UNet2DModel.from_config(state.unet.config).state_dict().keys()
    assert state.accelerator.get_state_dict(state.unet).keys() == names
    assert state.ema.state().keys() == names


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_dynamo_of_the_accelerate_config_changes_no_file(
    train_tiny, trained_run, monkeypatch, tmp_path, capsys, backend
):
    """Such a run is killed and resumes without dynamo, and a run without resumes with it."""
    straight = final_state(trained_run("straight", *DYNAMO))
    for backends in ((backend, "no"), ("no", backend)):
        folder = tmp_path / backends[0]
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backends[0])
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill(patch, file_io, "fsync_tree", 2)
            train_tiny(folder, *DYNAMO)
        assert (f"the dynamo backend {backend}." in capsys.readouterr().out) == (
            backends[0] == backend
        )
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backends[1])
        state = final_state(train_tiny(folder, *DYNAMO))
        assert f"Resuming from {folder / 'checkpoint-2'}" in capsys.readouterr().out
        assert state.keys() == straight.keys()
        for name in state:
            torch.testing.assert_close(state[name], straight[name], rtol=1e-2, atol=1e-3)


def assert_decides(flags, device_type, expected, why, distributed_type=DistributedType.NO):
    config = parse_train(["--train_data_dir=x", *flags])
    accelerator = SimpleNamespace(
        device=SimpleNamespace(type=device_type), distributed_type=distributed_type
    )
    schedule = Schedule.make(config, num_images=10, num_processes=1)
    decision, line = step.should_compile(accelerator, config.optimization, schedule)
    assert decision is expected and why in line


@pytest.mark.parametrize(
    ("flags", "device_type", "expected", "why"),
    [
        (["--max_train_steps=1000000"], "cpu", False, "it gains little on a CPU"),
        (["--max_train_steps=1000000"], "mps", False, "not tested on mps"),
        (["--max_train_steps=1999"], "cuda", False, "fewer than 2,000 steps"),
        (["--max_train_steps=2000"], "cuda", True, "a run this long"),
        (["--max_train_steps=10", "--compile=on"], "cpu", True, "--compile on"),
        (["--max_train_steps=1000000", "--compile=off"], "cuda", False, "--compile off"),
        (["--budget=59m"], "cuda", False, "59m is too short"),
        (["--budget=1h"], "cuda", True, "a run this long"),
    ],
)
def test_long_runs_on_gpus_are_compiled(monkeypatch, flags, device_type, expected, why):
    """The number of steps of a run with a budget is unknown when it starts."""
    monkeypatch.setattr(step, "compile_failure_reason", lambda device_type: "")
    assert_decides(flags, device_type, expected, why)


def test_long_run_where_torch_cannot_compile_is_not_compiled(monkeypatch):
    monkeypatch.setattr(step, "compile_failure_reason", lambda device_type: "no C++ compiler.")
    long_run = ["--max_train_steps=1000000"]
    assert_decides(long_run, "cuda", False, "Not compiled: no C++ compiler.")
    with pytest.raises(UserError, match=r"--compile on: no C\+\+ compiler\."):
        assert_decides([*long_run, "--compile=on"], "cpu", True, "")


def test_backend_of_the_accelerate_config_compiles_short_runs_too(monkeypatch):
    """Unless --compile off says otherwise, or torch cannot."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "max-autotune")
    given = {}
    monkeypatch.setattr(step, "compile_failure_reason", lambda _, **options: given.update(options))
    assert_decides([], "cpu", True, "the accelerate config chooses the dynamo backend aot_eager.")
    assert given == {"backend": "aot_eager", "mode": "max-autotune"}
    assert_decides(["--compile=off"], "cpu", False, "--compile off")
    assert_decides([], "cuda", False, "FSDP", DistributedType.FSDP)
    monkeypatch.setattr(step, "compile_failure_reason", lambda _, **options: "no such backend.")
    assert_decides([], "cpu", False, "Not compiled: no such backend.")


def test_sharded_weights_are_not_compiled():
    long_run = ["--max_train_steps=1000000"]
    assert_decides(long_run, "cuda", False, "FSDP", DistributedType.FSDP)
    with pytest.raises(UserError, match="--compile on is not tested with FSDP"):
        assert_decides([*long_run, "--compile=on"], "cuda", True, "", DistributedType.FSDP)


# Emulated bfloat16


@pytest.mark.parametrize(
    ("flags", "emulates"),
    [
        ({"avx512_bf16": True}, False),
        ({"amx_bf16": True}, False),
        ({"avx512_bf16": False, "avx512_f": True}, True),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_emulated_bf16_is_recognized(monkeypatch, flags, emulates):
    capabilities = {"architecture": "x86_64", **flags}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert step.emulates_bf16() is emulates


def test_emulated_bf16_is_noted(build, monkeypatch):
    monkeypatch.setattr(step, "emulates_bf16", lambda: True)
    lines = step.describe_run(build("--mixed_precision=bf16"))
    assert any("--mixed_precision no is faster here" in line for line in lines)
