"""benchmarks/: they run, and their counts are those computed by hand."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from diffusers import UNet2DModel

from tests.conftest import ROOT


@pytest.fixture
def load(monkeypatch):
    """load(name) -> a module of benchmarks/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for path in (ROOT / "benchmarks").glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return importlib.import_module


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_every_script_is_imported_and_has_its_row(load, path):
    assert load(path.stem).__doc__
    assert f"| `{path.name}` |" in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_probed_functions_exist(load):
    """A function that was renamed would be left out of the timings without a word."""
    probe = load("probe")
    ours = [names for names in (*probe.PARTS, *probe.PERIODIC) if names[0].startswith("ddpm.")]
    assert len(ours) >= 5
    for module, owner, function, _ in ours:
        scope = importlib.import_module(module)
        assert callable(getattr(getattr(scope, owner) if owner else scope, function))


def test_flops_of_a_convolution_are_those_counted_by_hand(load):
    """2 x 4 x 4 outputs of 8 channels, each a sum of 3 x 3 x 3 products, in the forward pass, and
    as many for the gradient of the weights. The input of a first layer has no gradient."""
    count_flops = load("flops").count_flops
    forward = 2 * (2 * 4 * 4 * 8) * (3 * 3 * 3)
    layer = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert count_flops(layer, torch.zeros(2, 3, 4, 4)) == 2 * forward
    assert count_flops(layer, torch.zeros(2, 3, 4, 4, requires_grad=True)) == 3 * forward


def test_flops_of_the_cifar10_unet_are_those_of_its_layers(load):
    """12.44 GFLOP for the forward pass of an image, and almost three times that with backward."""
    training = load("training")
    toy = training.SIZES["toy"].unet_config()
    assert training.training_flops(toy, 2) == 2 * training.training_flops(toy, 1)
    flops = training.training_flops(training.SIZES["preset-32"].unet_config(), 1)
    assert 2.9 * 12.44e9 < flops < 3.05 * 12.44e9


def test_step_times_leave_out_periodic_work(load, tmp_path):
    program = load("program").Program("ours", [], tmp_path, images=4)
    notes = [
        {"time": 10.0, "periodic": {"preview": 9.0}, "parts": {"forward": 9.0}},  # the turn before
        {"time": 10.5, "periodic": {}, "parts": {"forward": 0.2, "backward": 0.25}},
        {"time": 12.0, "periodic": {"preview": 1.0}, "parts": {"forward": 0.2, "backward": 0.2}},
    ]
    assert program.step_times(notes) == pytest.approx([0.5, 0.5])
    assert program.periodic == {"preview": [1.0]}
    fractions = {"forward": 0.4, "backward": 0.45, "other": 0.15}
    assert program.fractions() == pytest.approx(fractions)


def test_sigterm_kills_what_a_benchmark_has_started(load):
    """A suspended program would otherwise stay in memory for good."""
    module, handler = load("program"), signal.getsignal(signal.SIGTERM)
    started, other = (module.Program(name, [], ROOT, images=1) for name in ("started", "other"))
    started.process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    started.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(SystemExit), module.killed_at_the_end(other, started):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert started.process.poll() == -signal.SIGKILL


def test_the_bare_step_trains(load):
    training = load("training")
    size = training.SIZES["toy"]
    unet = UNet2DModel.from_config(size.unet_config())
    before = unet.conv_in.weight.detach().clone()
    load("bare").make_step(unet, size.batch_size)()
    assert not torch.equal(unet.conv_in.weight, before)


def run_toy(script, tmp_path, *flags):
    output = tmp_path / "result"
    size = ["--sizes", "toy", "--turns=2", "--seconds=0.2", "--starts=0"]
    done = script("benchmarks/training.py", *size, f"--output={output}", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.with_suffix(".json").read_text())
    assert output.with_suffix(".md").read_text() in done.stdout
    return result["sizes"]["toy"], output.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_training_benchmark_runs_at_toy_size(script, tmp_path):
    result, table = run_toy(script, tmp_path)
    assert set(result["images_per_s"]) == {"ours", "bare"} and set(result["ratios"]) == {"bare"}
    median, low, high = result["ratios"]["bare"]
    assert 0 < low <= median <= high
    for name, fractions in result["fractions"].items():
        assert sum(fractions.values()) == pytest.approx(1)
        for part in ("forward", "backward", "optimizer"):
            assert fractions[part] > 0, (name, part)
        assert ({"EMA", "data", "clip"} <= fractions.keys()) == (name == "ours")
        assert result["peak_memory_mib"][name] > 100
    assert table.count("| 8, 4 |") == 2


@pytest.mark.slow
def test_the_example_is_timed_in_the_same_way(script, tmp_path):
    """train.py accepts the example's command lines, so it stands in for the example."""
    result, _ = run_toy(script, tmp_path, f"--peer={ROOT / 'train.py'}")
    assert set(result["ratios"]) == {"bare", "example", "example as launched"}
    assert result["fractions"]["example"].keys() == result["fractions"]["ours"].keys()


@pytest.mark.slow
def test_processes_are_compared_and_all_end(script, tmp_path):
    """Workers of torchrun have their own sessions, so they do not end with their launcher."""
    flags = ["--size=toy", "--turns=1", "--seconds=0.2", "--steps=12"]
    done = script("benchmarks/processes.py", *flags, env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("2 processes against 1 with 2 micro-batches, 4 images a step: ")
    assert [line[:17] for line in lines[1:]] == ["rank 0: 12 steps,", "rank 1: 12 steps,"]
    commands = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(tmp_path) in " ".join(command)]
