"""benchmarks/training.py: it runs whole, and what it counts is what a hand counts."""

import importlib.util
import json
import sys
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).parent.parent


def load(name):
    """A file of benchmarks/, which are scripts and no package."""
    spec = importlib.util.spec_from_file_location(
        f"benchmark_{name}", ROOT / f"benchmarks/{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    return load("training")


def test_flops_of_a_convolution_are_those_counted_by_hand(benchmark):
    """2 x 4 x 4 outputs of 8 channels, each a sum of 3 x 3 x 3 products: forward, and as many for
    the gradient of the weights; the input of a first layer has none."""
    forward = 2 * (2 * 4 * 4 * 8) * (3 * 3 * 3)
    layer = torch.nn.Conv2d(3, 8, 3, padding=1)
    assert benchmark.count_flops(layer, torch.zeros(2, 3, 4, 4)) == 2 * forward
    inner = torch.zeros(2, 3, 4, 4, requires_grad=True)
    assert benchmark.count_flops(layer, inner) == 3 * forward


def test_flops_of_the_cifar10_unet_are_those_of_its_layers(benchmark):
    """12.44 GFLOP forward an image, and three times that with the backward pass, a bit less."""
    settings = benchmark.SIZES["preset-32"].settings()
    each = benchmark.training_flops(settings, 2) / 2
    assert each == benchmark.training_flops(settings, 1)
    assert 2.9 * 12.44e9 < each < 3.05 * 12.44e9


def test_a_step_is_counted_without_its_chores(benchmark, tmp_path):
    program = benchmark.Program("ours", [], tmp_path, images=4)
    marks = [
        {"time": 10.0, "chores": {"preview": 9.0}, "parts": {"forward": 9.0}},  # of the turn before
        {"time": 10.5, "chores": {}, "parts": {"forward": 0.2, "backward": 0.25}},
        {"time": 12.0, "chores": {"preview": 1.0}, "parts": {"forward": 0.2, "backward": 0.2}},
    ]
    assert program.take(marks) == pytest.approx([0.5, 0.5])
    assert program.chores == {"preview": [1.0]}
    assert program.shares() == pytest.approx({"forward": 0.4, "backward": 0.45, "other": 0.15})


def run_toy(script, tmp_path, *flags):
    output = tmp_path / "found"
    done = script(
        "benchmarks/training.py",
        "--sizes",
        "toy",
        "--turns=2",
        "--seconds=0.2",
        "--starts=0",
        f"--output={output}",
        *flags,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.with_suffix(".json").read_text())
    assert output.with_suffix(".md").read_text() in done.stdout
    return found["sizes"]["toy"], output.with_suffix(".md").read_text()


def test_the_whole_benchmark_runs_at_toy_size(script, tmp_path):
    found, table = run_toy(script, tmp_path)
    assert set(found["images_per_s"]) == {"ours", "bare"} and set(found["ratios"]) == {"bare"}
    middle, low, high = found["ratios"]["bare"]
    assert 0 < low <= middle <= high
    for name, shares in found["shares"].items():
        assert sum(shares.values()) == pytest.approx(1)
        for part in ("forward", "backward", "optimizer"):
            assert shares[part] > 0, (name, part)
        assert ("EMA" in shares and "data" in shares and "clip" in shares) == (name == "ours")
        assert found["peak_memory_mib"][name] > 100
    assert table.count("| 8, 4 |") == 2


@pytest.mark.slow
def test_the_example_is_measured_by_the_same_clock(script, tmp_path):
    """train.py takes the example's command lines, so here it stands in for it."""
    found, _ = run_toy(script, tmp_path, f"--peer={ROOT / 'train.py'}")
    assert set(found["ratios"]) == {"bare", "example", "example as launched"}
    assert found["shares"]["example"].keys() == found["shares"]["ours"].keys()


@pytest.mark.slow
def test_processes_are_compared_and_none_is_left(script, tmp_path):
    """Workers of torchrun have sessions of their own, so they do not end with their launcher."""
    done = script(
        "benchmarks/processes.py",
        "--size=toy",
        "--turns=1",
        "--seconds=0.2",
        "--steps=12",
        env={"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("2 processes against 1 with 2 micro-batches, 4 images a step: ")
    assert [line[:17] for line in lines[1:]] == ["rank 0: 12 steps,", "rank 1: 12 steps,"]
    assert not [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(p.info["cmdline"] or ())
    ]
