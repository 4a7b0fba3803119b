"""Samplers compared: evaluation's own numbers, one sampler after the other, kept as measured."""

import sys

import pytest
import torch
from diffusers import DDPMScheduler

import evaluate
from ddpm import file_io, run_folder
from ddpm.errors import UsageError
from ddpm.evaluation import compare_samplers, report
from ddpm.evaluation.compare_samplers import Stopwatch, list_candidates
from ddpm.sampling import pipeline, sampler_results

pytest.importorskip("torch_fidelity")


@pytest.fixture
def compare(digits_run, open_digits):
    """compare(*flags) -> the sampler table after evaluate.py --samplers with these flags."""

    def run(*flags):
        return compare_samplers.compare_samplers(open_digits("--samplers", *flags), digits_run)

    return run


def names(candidates) -> list[str]:
    return [f"{candidate.name}:{candidate.steps}" for candidate in candidates]


def entries(folder) -> list[str]:
    table = sampler_results.read_sampler_table_file(folder / run_folder.SAMPLER_TABLE)
    return [f"{entry.scheduler}:{entry.num_inference_steps}" for entry in table.entries]


def test_default_samplers_are_those_that_the_model_has_timesteps_for(
    digits_run, open_digits, make_unet
):
    candidates = list_candidates(open_digits("--samplers"))
    default = [f"{name}:{n}" for name in compare_samplers.DEFAULT_NAMES for n in (5, 10, 20)]
    assert sorted(names(candidates)) == sorted([*default, "ddpm:20"])
    assert [candidate.steps for candidate in candidates] == [5] * 3 + [10] * 3 + [20] * 4
    pipeline.export_pipeline(make_unet(), DDPMScheduler(), digits_run)
    candidates = names(list_candidates(open_digits("--samplers")))
    assert len(candidates) == 13 and candidates[-1] == "ddpm:1000"


def test_named_samplers_have_steps_that_they_can_space(open_digits):
    """DDIM cannot space 12 of 20 timesteps evenly; what replaces them is measured once."""
    candidates = list_candidates(open_digits("--samplers", "ddim:12", "ddim:10", "ddpm", "heun:3"))
    assert names(candidates) == ["heun:3", "ddim:10", "ddpm:20"]
    with pytest.raises(UsageError, match="--samplers ddim:21: this model was trained with 20"):
        list_candidates(open_digits("--samplers", "ddim:21"))


def test_an_entry_is_what_evaluation_measures(compare, digits_run, open_digits):
    table = compare("unipc:2", "ddpm:3")
    evaluator = open_digits("--scheduler=unipc")
    evaluation = report.compute_metrics(evaluator, report.extract_features(evaluator))
    assert table.entries[0].metrics == evaluation.metrics
    assert entries(digits_run) == ["unipc:2", "ddpm:3"]
    for name in ("num_images", "seeds", "features", "reference"):
        assert getattr(table, name) == getattr(evaluation, name)
    assert table.entries[0].distance == evaluation.metrics["frechet_distance"]
    assert len(table.entries[0].leaving_out) == 10
    assert sampler_results.read_sampler_table(digits_run).entries == table.entries
    assert (digits_run / "evaluation" / "trade-off.png").is_file()
    lines = compare_samplers.format_sampler_table(table).splitlines()
    assert len(lines) == 3 and lines[0].split()[:3] == ["sampler", "steps", "Frechet"]
    assert any("best" in line for line in lines)


def test_an_interruption_loses_only_the_entry_in_progress(compare, digits_run, monkeypatch, capsys):
    """Killed in the second; the same command measures what is missing, and nothing twice."""
    measure, measured = compare_samplers._measure, []

    def kill_at_unipc(evaluator, candidate, real):
        measured.append(candidate.name)
        if measured == ["ddim", "unipc"]:
            raise KeyboardInterrupt
        return measure(evaluator, candidate, real)

    monkeypatch.setattr(compare_samplers, "_measure", kill_at_unipc)
    with pytest.raises(KeyboardInterrupt):
        compare("ddim:2", "unipc:3", "ddpm:4")
    assert entries(digits_run) == ["ddim:2"] and measured == ["ddim", "unipc"]
    path = digits_run / run_folder.SAMPLER_TABLE
    first = file_io.read_json(path)["entries"][0]
    compare("ddim:2", "unipc:3", "ddpm:4")
    assert entries(digits_run) == ["ddim:2", "unipc:3", "ddpm:4"]
    assert measured == ["ddim", "unipc", "unipc", "ddpm"]
    assert file_io.read_json(path)["entries"][0] == first
    assert "samplers.json: 1. To go: 2." in capsys.readouterr().out
    assert len(compare("ddim:2").entries) == 3 and len(measured) == 4


def test_entries_measured_with_other_settings_are_not_mixed(compare, digits_run, make_unet, chain):
    compare("ddim:2")
    before = (digits_run / run_folder.SAMPLER_TABLE).read_bytes()
    for flag, message in (
        ("--num_images=41", "other num images: 40, now 41"),
        ("--seed=1", r"other seeds: \[0, 39\], now \[1, 40\]"),
        ("--split=train[:50]", "other reference"),
        ("--batch_size=8", "other batch size: 16, now 8"),
    ):
        with pytest.raises(UsageError, match=f"{message}.*give another --output_dir"):
            compare("unipc:2", flag)
    assert (digits_run / run_folder.SAMPLER_TABLE).read_bytes() == before
    pipeline.export_pipeline(make_unet(seed=1), chain, digits_run)
    compare("unipc:2")
    assert entries(digits_run) == ["unipc:2"]  # those of other weights are gone


def test_the_quickest_full_batch_counts(monkeypatch):
    """Batches of 2 that take 5, 3 and, not full, 1 second; the time in between does not count."""
    clock = iter([0, 5, 5, 5, 100, 103, 200, 200, 300, 301, 301])
    monkeypatch.setattr(compare_samplers.time, "perf_counter", lambda: next(clock))
    stopwatch = Stopwatch(2)
    images = [(seed, torch.zeros(1)) for seed in range(5)]
    assert list(stopwatch.measure(iter(images))) == images
    assert stopwatch.waits == [5, 0, 3, 0, 1]
    assert stopwatch.seconds_per_image == 1.5
    few = Stopwatch(64)
    few.waits = [4.0, 0.0]
    assert few.seconds_per_image == 2.0


def test_the_command_prints_the_table_and_the_next_command(
    digits_run, open_digits, monkeypatch, capsys
):
    flags = ["--samplers", "ddim:2", "--num_images=40"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(digits_run), *flags])
    evaluate.main()
    output = capsys.readouterr().out
    assert "40 images of seeds 0 to 39, each sampler in turn, against 60 of digits" in output
    assert "ddim, 2 steps: 1 of 1" in output and "fast good best" in output
    assert f"Next: python sample.py {digits_run} --quality good" in output
    elsewhere = compare_samplers.next_step(open_digits("--samplers"), digits_run / "other")
    assert "other/samplers.json; sample.py --quality reads it in the model's own" in elsewhere
    assert not (digits_run / run_folder.EVALUATION).exists()


@pytest.mark.slow
def test_two_processes_measure_the_same_table(digits_run, tmp_path, script):
    """An odd number of images, so that the processes have different numbers of them."""
    command = ["evaluate.py", digits_run, "--num_images=41", "--samplers", "ddim:2", "ddpm:3"]
    alone = script(*command, f"--output_dir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    launch = ["--config_file", "accelerate_config.yaml", "--num_processes", "2", *command]
    launch.append(f"--output_dir={tmp_path / 'two'}")
    both = script(*launch, launch=True)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("2 of 2") == 1
    one, two = (
        sampler_results.read_sampler_table_file(tmp_path / name / run_folder.SAMPLER_TABLE)
        for name in ("one", "two")
    )
    for expected, entry in zip(one.entries, two.entries, strict=True):
        assert str(expected) == str(entry)
        assert entry.distance == pytest.approx(expected.distance, rel=1e-3)
        assert entry.leaving_out == pytest.approx(expected.leaving_out, rel=1e-3)
    again = script(*launch, launch=True)
    assert again.returncode == 0 and "samplers.json: 2. To go: 0." in again.stdout, again.stderr
