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
from PIL import Image

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


def test_seconds_of_an_all_reduce_are_those_computed_by_hand(load):
    """8 GPUs send 2 x 7/8 of 300 GB at 300 GB/s; then 2 machines send 2 x 1/2 of it at 100 GB/s."""
    cluster = load("cluster")
    assumed = cluster.Assumptions(gpu_link_gb_s=300, network_gb_s=100)
    assert cluster.all_reduce_seconds(300e9, 1, 1, assumed) == 0
    assert cluster.all_reduce_seconds(300e9, 1, 8, assumed) == pytest.approx(1.75)
    assert cluster.all_reduce_seconds(300e9, 2, 8, assumed) == pytest.approx(1.75 + 3)


def test_tables_of_a_cluster_are_those_of_the_page(load):
    cluster = load("cluster")
    lines = cluster.data_table(cluster.Measured(), cluster.Assumptions(), 1_000_000, 40, 20_000)
    lines += cluster.model_table(cluster.Measured(), cluster.Assumptions())
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert [line for line in lines if line not in page] == []


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


def quality_results(load, folder):
    """Results of two recipes after 30 and 60 seconds, two training seeds each."""
    quality = load("quality")
    results = quality.read_results(folder)
    for name, distance in (("default", 4.0), ("batch@64", 6.0)):
        for limit, seed in ((30, 0), (30, 1), (60, 0), (60, 1)):
            facts = {"steps": 10 * limit + seed, "seconds": limit - 0.5, "images_per_s": 640.0}
            quality.add_result(results, folder, (name, limit, seed), facts)
            values = {"first": distance + seed, "second": 2 * distance}
            quality.add_result(results, folder, (name, limit, seed, "ddim:25", 0, 1000), values)
    quality.add_result(results, folder, ("held-out images", 360), {"first": 0.56, "second": 0.3})
    return quality, results


def test_the_table_of_quality_has_means_and_ranges(load, tmp_path):
    quality, results = quality_results(load, tmp_path)
    table = quality.to_markdown(results, 1000)
    assert table.splitlines() == [
        "| recipe | seconds | steps | images/s | ddim:25, first | ddim:25, second |",
        "|---|---|---|---|---|---|",
        "| batch@64 | 29.5 | 300 (300 to 301) | 640 | 6.5 (6 to 7) | 12 |",
        "| batch@64 | 59.5 | 600 (600 to 601) | 640 | 6.5 (6 to 7) | 12 |",
        "| default | 29.5 | 300 (300 to 301) | 640 | 4.5 (4 to 5) | 8 |",
        "| default | 59.5 | 600 (600 to 601) | 640 | 4.5 (4 to 5) | 8 |",
        "| held-out images, 360 images |  |  |  | 0.56 | 0.3 |",
    ]
    assert quality.to_markdown(quality.read_results(tmp_path), 1000) == table, (
        "read again from its file"
    )
    assert "(4 to 5)" not in quality.to_markdown(results, 100), "distances of other numbers differ"


def test_quality_is_drawn_with_its_range_and_the_floor(load, tmp_path):
    quality, results = quality_results(load, tmp_path)
    figure = quality.draw(results, 1000)
    first, second = figure.axes
    curve, floor = first.get_lines()[1], first.get_lines()[2]
    assert curve.get_label() == "batch@64"
    assert curve.get_xydata().tolist() == [[29.5, 6.5], [59.5, 6.5]]
    assert set(floor.get_ydata()) == {0.56} and floor.get_linestyle() == "--"
    assert first.get_xscale() == second.get_yscale() == "log"
    shade = first.collections[1].get_paths()[0].vertices
    assert (shade[:, 1].min(), shade[:, 1].max()) == (6, 7)
    assert quality.plots.save(figure, tmp_path / "quality.png")
    with Image.open(tmp_path / "quality.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > image.height > 100
    assert quality.draw({}, 1000) is None


def test_a_race_takes_turns_and_goes_on_after_a_stop(load, tmp_path, monkeypatch):
    quality, trained, drawn = load("quality"), [], []

    def train(run, *_):
        trained.append(run)
        return {"steps": 10, "seconds": 1.0, "images_per_s": 9.0}

    def sample(folder, *sampling):
        drawn.append((folder.name, *sampling))
        return torch.zeros(4, 1, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(quality, "train", train)
    monkeypatch.setattr(quality, "sample", sample)
    monkeypatch.setattr(quality, "draw", lambda *_: None)
    monkeypatch.setattr(quality, "measure", lambda images, race: {"first": float(len(images))})

    def race(**changes):
        trained.clear()
        drawn.clear()
        quality.main(
            seconds=(30, 60),
            training_seeds=(0, 1),
            sampling_seeds=(0,),
            samplers=("ddim:25",),
            peer=tmp_path / "train_unconditional.py",
            output_dir=str(tmp_path),
            **changes,
        )

    race(only="train", stop_after=80)  # the longer trainings would end later
    ours, theirs = "default", quality.EXAMPLE
    assert trained == [(ours, 30, 0), (theirs, 30, 0), (ours, 30, 1), (theirs, 30, 1)]
    assert not drawn
    race()
    assert trained == [(ours, 60, 0), (theirs, 60, 0), (ours, 60, 1), (theirs, 60, 1)]
    assert len(drawn) == 8 and drawn[1] == (f"{theirs}-30s-0", "ddim:25", 0, 1000)
    before = (tmp_path / "table.md").read_text()
    race()
    assert not trained and not drawn and (tmp_path / "table.md").read_text() == before


@pytest.mark.slow
def test_quality_trains_and_measures_a_recipe_and_the_example(script, tmp_path):
    """train.py accepts the example's command lines, so it stands in for the example."""
    flags = ["--recipes=batch@8", "--seconds=5", "--training_seeds=0", "--sampling_seeds=0"]
    flags += ["--num_images=64", "--samplers=ddim:5", f"--output_dir={tmp_path}"]
    flags += [f"--peer={ROOT / 'train.py'}"]
    done = script("benchmarks/quality.py", *flags, timeout=900)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table in done.stdout
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:]]
    assert [row[1] for row in rows] == [
        "batch@8",
        "diffusers-example",
        "held-out images, 360 images",
        "training images, 64 images",
    ]
    distances = [[float(cell) for cell in row[5:7]] for row in rows]
    assert min(distances[:2]) > max(distances[2:]), "models of 5 s are worse than real digits"
    assert all(float(cell.replace(",", "")) > 0 for row in rows[:2] for cell in row[2:5])
    assert (tmp_path / "quality.png").stat().st_size > 10_000
