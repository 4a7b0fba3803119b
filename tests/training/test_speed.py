"""What makes a run slow without an error, counted: reads of the device, compilations, decodings,
calls of trackers, imports. Nothing here looks at a clock."""

import json
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm.config.parser import parse_train
from ddpm.config.train import OptimizationConfig
from ddpm.data import decode, pixel_cache
from ddpm.device import compile_failure_reason
from ddpm.errors import UserError
from ddpm.training import dry_run, loop, tracking
from ddpm.training import step as step_module
from tests.test_architecture import python
from tests.training.test_loop import assert_same_bits, final_state, fresh_state, run

__all__ = ["fresh_state", "run"]  # fixtures
QUIET = ("--save_images_epochs=0", "--save_model_epochs=0", "--checkpointing_steps=99")


class Reads(TorchDispatchMode):
    """Counts operators that wait for a GPU: a value is read, or its size depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in self.NAMES:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_reads_are_counted():
    with Reads() as reads:
        torch.ones(3).sum().item()
        bool(torch.ones(1) > 0)
    assert reads.seen["_local_scalar_dense"] == 2


def test_a_step_reads_nothing_from_the_device(run, monkeypatch):
    """No value is asked for: on a GPU each one would wait for all that was queued before it.

    The pictures are made square: those that are cropped on the CPU have their corners read there.
    """
    seen, real = [], loop.take_step

    def take_step(parts, step, lr, meter):
        with Reads() as reads:
            grad_norm = real(parts, step, lr, meter)
            meter.step(step + 1, grad_norm)
        seen.append(reads.seen)
        return grad_norm

    monkeypatch.setattr(loop, "take_step", take_step)
    run("reads", *QUIET, "--resize_mode=stretch")
    assert seen == [Counter()] * 6


@pytest.mark.parametrize("every", [1, 3, 6])
def test_metrics_are_fetched_and_sent_only_when_due(run, monkeypatch, every):
    """Two numbers a report come from the device, and the tracker is called once for it."""
    calls = Counter()
    for owner, name in (
        (tracking.LossMeter, "mean_loss"),
        (tracking.LossMeter, "first_bad_step"),
        (Accelerator, "log"),
    ):
        real = getattr(owner, name)

        def counted(self, *args, real=real, name=name, **kwargs):
            calls[name] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    folder = run("told", *QUIET, f"--logging_steps={every}")
    reports = 6 // every
    assert calls == {"mean_loss": reports, "first_bad_step": reports, "log": reports}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == reports


def test_an_image_is_decoded_once_however_many_epochs(run, monkeypatch, tmp_path):
    """Ten images, three epochs, and a second run on the same data: ten readings."""
    reads = []

    def read(value, config):
        reads.append(value["path"])
        return decode.decode_row(value, config)

    monkeypatch.setattr(pixel_cache, "decode_row", read)
    cache = f"--cache_dir={tmp_path / 'cache'}"
    run("one", *QUIET, cache, "--max_train_steps=8")
    assert len(reads) == len(set(reads)) == 10
    run("two", *QUIET, cache, "--seed=1")
    assert len(reads) == len(set(reads)) == 10


def test_checkpointed_gradients_are_the_same(run, monkeypatch):
    """With dropout too: each block's draws are made again. Switching it on resumes the run."""
    calls, real = [], torch.utils.checkpoint.checkpoint

    def checkpoint(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    straight = final_state(run("plain", *QUIET))
    assert not calls
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", checkpoint)
    assert_same_bits(final_state(run("kept", *QUIET, "--gradient_checkpointing")), straight)
    assert calls


def test_gradient_checkpointing_may_change_on_the_way(run, capsys, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = step_module.EMA.update

        def update(self, step):
            if step == 5:
                raise KeyboardInterrupt
            return real(self, step)

        patch.setattr(step_module.EMA, "update", update)
        run("changed")
    run("changed", "--gradient_checkpointing")
    assert "gradient_checkpointing was False, now True" in capsys.readouterr().out


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses_and_compiles_once(run, monkeypatch):
    """Previews, exports and the proof run plainly: their shapes and modes would be compiled too."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def losses(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    assert not compile_failure_reason("cpu")
    plain = run("plain", "--dropout=0", "--compile=off")
    counter, real = CompileCounterWithBackend("inductor"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend=counter, **kw))
    torch._dynamo.reset()
    compiled = run("compiled", "--dropout=0", "--compile=on")
    assert counter.frame_count == 1
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    names = [
        sorted(load_file(f / "unet" / "diffusion_pytorch_model.safetensors"))
        for f in (plain, compiled)
    ]
    assert names[0] == names[1]


def compile_config(asked, steps):
    return parse_train(["--train_data_dir=x", f"--max_train_steps={steps}", f"--compile={asked}"])


def assert_decided(config, device, expected, said, unet=None):
    plan = step_module.Plan.make(config, 10, 1)
    unet = unet or torch.nn.Linear(1, 1)
    decided, why = step_module.should_compile(config.optimization, device, plan, unet)
    assert decided is expected and said in why


@pytest.mark.parametrize(
    ("asked", "device", "steps", "expected", "said"),
    [
        ("auto", "cpu", 10**6, False, "it gains little on a CPU"),
        ("auto", "mps", 10**6, False, "not tried on mps"),
        ("auto", "cuda", 1_999, False, "fewer than 2,000 steps"),
        ("auto", "cuda", 2_000, True, "a run this long"),
        ("on", "cpu", 10, True, "--compile on"),
        ("off", "cuda", 10**6, False, "--compile off"),
    ],
)
def test_what_is_compiled_and_why(monkeypatch, asked, device, steps, expected, said):
    monkeypatch.setattr(step_module, "cannot_compile", lambda device_type: "")
    assert_decided(compile_config(asked, steps), device, expected, said)


@pytest.mark.parametrize(("budget", "expected"), [("59m", False), ("1h", True)])
def test_a_run_by_the_clock_is_compiled_where_it_is_long(monkeypatch, budget, expected):
    """Its number of steps is not known when it starts."""
    monkeypatch.setattr(step_module, "cannot_compile", lambda device_type: "")
    config = parse_train(["--train_data_dir=x", f"--budget={budget}"])
    assert_decided(config, "cuda", expected, "a run this long" if expected else "59m is too short")


def test_where_torch_cannot_compile_a_long_run_goes_on_plainly(monkeypatch):
    monkeypatch.setattr(step_module, "cannot_compile", lambda device_type: "no C++ compiler.")
    assert_decided(compile_config("auto", 10**6), "cuda", False, "Not compiled: no C++ compiler.")
    with pytest.raises(UserError, match=r"--compile on: no C\+\+ compiler\."):
        assert_decided(compile_config("on", 10), "cpu", True, "")


def test_sharded_weights_are_not_compiled():
    sharded = torch.nn.Linear(1, 1)
    sharded.weight.full_tensor = lambda: sharded.weight
    assert_decided(compile_config("auto", 10**6), "cuda", False, "FSDP", sharded)
    with pytest.raises(UserError, match="--compile on is not tested with FSDP"):
        assert_decided(compile_config("on", 10), "cuda", True, "", sharded)


@pytest.mark.parametrize(
    ("flags", "emulates"),
    [
        ({"avx512_bf16": True}, False),
        ({"amx_bf16": True}, False),
        ({"avx512_bf16": False, "avx512_f": True}, True),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_a_processor_that_emulates_bf16_is_known(monkeypatch, flags, emulates):
    capabilities = {"architecture": "x86_64", **flags}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert step_module.emulates_bf16() is emulates


def test_emulated_bf16_is_said(run, monkeypatch, capsys):
    monkeypatch.setattr(step_module, "emulates_bf16", lambda: True)
    run("bf16", *QUIET, "--mixed_precision=bf16", "--max_train_steps=1")
    assert "--mixed_precision no is faster here" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_refused_before_it_is_tried(run, monkeypatch, capsys):
    monkeypatch.setattr(
        dry_run, "estimate_memory", lambda parts: dry_run.MemoryEstimate(100.0, 10.0)
    )
    monkeypatch.setattr(dry_run, "available_mib", lambda device: 130.0)
    monkeypatch.setattr(
        loop, "train", lambda accelerator, config, _: dry_run.dry_run(accelerator, config)
    )
    run("fits", "--dry_run", "--train_batch_size=3")
    said = capsys.readouterr().out
    assert "predicted: about 130 MiB, of which 10.0 MiB an image" in said
    assert "largest --train_batch_size for the 130 MiB there are: about 3." in said
    with pytest.raises(UserError, match=r"batch_size 4 needs about 140 MiB, and 130.*Give 3 at m"):
        run("fits", "--dry_run")


def test_training_imports_nothing_that_it_does_not_use(tmp_path, pictures, tiny_unet):
    """A dry run on pictures, to its end, in a process of its own."""
    report = python(
        "import contextlib, io, json, runpy, sys\n"
        "sys.path.insert(0, '.')\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    runpy.run_path('train.py', run_name='__main__')\n"
        "unused = ['transformers', 'scipy.stats', 'wandb', 'tensorboard',\n"
        "          'matplotlib', 'torch_fidelity']\n"
        "print(json.dumps([name for name in unused if name in sys.modules]))\n",
        f"--train_data_dir={pictures}",
        f"--model_config_name_or_path={tiny_unet}",
        "--resolution=8",
        "--dry_run",
        f"--output_dir={tmp_path / 'run'}",
    )
    assert json.loads(report) == []


def test_the_optimizer_is_fused():
    weights = torch.nn.Linear(2, 2)
    optimizer = step_module.build_optimizer(weights, OptimizationConfig())
    assert optimizer.defaults["fused"] is True
