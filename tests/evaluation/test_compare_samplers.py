"""Samplers against each other: the evaluation's own numbers, one after the other, kept as made."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import evaluate
from ddpm import run_folder
from ddpm.accelerator import make_accelerator
from ddpm.config.parser import given_flags, parse_evaluate
from ddpm.errors import UsageError
from ddpm.evaluation import compare_samplers, evaluator, report
from ddpm.sampling import pipeline, sampler_table

pytest.importorskip("torch_fidelity")

DIGITS = Path(__file__).parents[2] / "data" / "digits"


@pytest.fixture
def run(tmp_path, make_unet, chain):
    """A run folder: an untrained model of digits on a chain of 20 steps."""
    folder = tmp_path / "run"
    pipeline.export_pipeline(make_unet(), chain, folder)
    settings = {"dataset_name": str(DIGITS), "resolution": 8, "split": "train[:60]"}
    (folder / run_folder.TRAIN_CONFIG).write_text(json.dumps(settings))
    return folder


def opened(folder: Path, *flags: str) -> evaluator.Evaluator:
    argv = [str(folder), "--num_images=40", "--batch_size=16", *flags]
    config = evaluator.complete_config(parse_evaluate(argv), given_flags(argv))
    return evaluator.open_evaluator(make_accelerator(None), config)


def names(found: list[compare_samplers.Candidate]) -> list[str]:
    return [f"{each.name}:{each.steps}" for each in found]


def entries(folder: Path) -> list[str]:
    listed = run_folder.read_json(folder / run_folder.SAMPLER_TABLE)["entries"]
    return [f"{each['scheduler']}:{each['num_inference_steps']}" for each in listed]


def test_usual_samplers_are_those_that_the_chain_has_steps_for(run, make_unet):
    found = names(compare_samplers.list_candidates(opened(run, "--samplers")))
    assert sorted(found) == sorted(
        [f"{name}:{steps}" for name in compare_samplers.NAMES for steps in (5, 10, 20)]
        + ["ddpm:20"]
    )
    assert [int(each.split(":")[1]) for each in found] == [5] * 3 + [10] * 3 + [20] * 4
    pipeline.export_pipeline(make_unet(), DDPMScheduler(), run)
    found = names(compare_samplers.list_candidates(opened(run, "--samplers")))
    assert len(found) == 13 and found[-1] == "ddpm:1000"


def test_named_samplers_are_as_asked_or_as_they_can_be_walked(run, make_unet):
    """DDIM cannot walk 12 of 20 evenly: what it is replaced by is measured once."""
    asked = ["ddim:12", "ddim:10", "ddpm", "heun:3"]
    assert names(compare_samplers.list_candidates(opened(run, "--samplers", *asked))) == [
        "heun:3",
        "ddim:10",
        "ddpm:20",
    ]
    with pytest.raises(UsageError, match="--samplers ddim:21: this model was trained with 20"):
        compare_samplers.list_candidates(opened(run, "--samplers", "ddim:21"))


def test_an_entry_is_what_evaluation_measures(run):
    exam = opened(run, "--samplers", "unipc:2", "ddpm:3")
    made = compare_samplers.compare_samplers(exam, run)
    single = opened(run, "--scheduler=unipc", "--num_inference_steps=2")
    wanted = report.compute_metrics(single, report.extract_features(single))
    listed = run_folder.read_json(run / run_folder.SAMPLER_TABLE)
    assert listed["entries"][0]["metrics"] == wanted["metrics"]
    assert entries(run) == ["unipc:2", "ddpm:3"]
    for name in ("num_images", "seeds", "features", "reference"):
        assert listed[name] == wanted[name]
    assert made.entries[0].distance == wanted["metrics"]["frechet_distance"]
    assert len(made.entries[0].leaving_out) == 10
    assert sampler_table.read_sampler_table(run).entries == made.entries
    assert (run / "evaluation" / "trade-off.png").is_file()
    table = compare_samplers.format_sampler_table(made).splitlines()
    assert len(table) == 3 and table[0].split()[:3] == ["sampler", "steps", "Frechet"]
    assert any("best" in line for line in table)


def test_a_kill_loses_the_entry_in_progress_alone(run, monkeypatch, capsys):
    """Killed in the second; the same command measures what is missing, and draws nothing twice."""
    measure, seen = compare_samplers._measure, []

    def killed(exam, candidate, real):
        seen.append(candidate.name)
        if candidate.name == "unipc":
            raise KeyboardInterrupt
        return measure(exam, candidate, real)

    asked = ["--samplers", "ddim:2", "unipc:3", "ddpm:4"]
    monkeypatch.setattr(compare_samplers, "_measure", killed)
    with pytest.raises(KeyboardInterrupt):
        compare_samplers.compare_samplers(opened(run, *asked), run)
    assert entries(run) == ["ddim:2"] and seen == ["ddim", "unipc"]
    first = run_folder.read_json(run / run_folder.SAMPLER_TABLE)["entries"][0]

    def noted(exam, candidate, real):
        seen.append(candidate.name)
        return measure(exam, candidate, real)

    monkeypatch.setattr(compare_samplers, "_measure", noted)
    compare_samplers.compare_samplers(opened(run, *asked), run)
    assert entries(run) == ["ddim:2", "unipc:3", "ddpm:4"]
    assert seen == ["ddim", "unipc", "unipc", "ddpm"]
    assert run_folder.read_json(run / run_folder.SAMPLER_TABLE)["entries"][0] == first
    assert "samplers.json: 1. To go: 2." in capsys.readouterr().out
    made = compare_samplers.compare_samplers(opened(run, "--samplers", "ddim:2"), run)
    assert len(made.entries) == 3 and len(seen) == 4


def test_entries_measured_otherwise_are_not_mixed(run, make_unet, chain):
    compare_samplers.compare_samplers(opened(run, "--samplers", "ddim:2"), run)
    before = (run / run_folder.SAMPLER_TABLE).read_bytes()
    for flag, words in (
        ("--num_images=41", "other num images: 40, now 41"),
        ("--seed=1", r"other seeds: \[0, 39\], now \[1, 40\]"),
        ("--split=train[:50]", "other reference"),
        ("--batch_size=8", "other batch size: 16, now 8"),
    ):
        with pytest.raises(UsageError, match=f"{words}.*give another --output_dir"):
            compare_samplers.compare_samplers(opened(run, "--samplers", "unipc:2", flag), run)
    assert (run / run_folder.SAMPLER_TABLE).read_bytes() == before
    pipeline.export_pipeline(make_unet(seed=1), chain, run)
    compare_samplers.compare_samplers(opened(run, "--samplers", "unipc:2"), run)
    assert entries(run) == ["unipc:2"]  # those of other weights are gone


def test_the_quickest_whole_batch_counts(monkeypatch):
    """Batches of 2 that take 5, 3 and, not full, 1 second; what is done in between does not."""
    clock = iter([0, 5, 5, 5, 100, 103, 200, 200, 300, 301, 301])
    monkeypatch.setattr(compare_samplers.time, "perf_counter", lambda: next(clock))
    watch = compare_samplers.Stopwatch(2)
    images = [(seed, torch.zeros(1)) for seed in range(5)]
    assert list(watch.through(iter(images))) == images
    assert watch.waits == [5, 0, 3, 0, 1]
    assert watch.seconds_per_image == 1.5
    few = compare_samplers.Stopwatch(64)
    few.waits = [4.0, 0.0]
    assert few.seconds_per_image == 2.0


def test_the_command_prints_the_menu_and_the_next_one(run, monkeypatch, capsys):
    flags = ["--samplers", "ddim:2", "--num_images=40"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), *flags])
    evaluate.main()
    said = capsys.readouterr().out
    assert "40 images of seeds 0 to 39, each sampler in turn, against 60 of digits" in said
    assert "ddim, 2 steps: 1 of 1" in said and "fast good best" in said
    assert f"Next: python sample.py {run} --quality good" in said
    elsewhere = compare_samplers.next_step(opened(run, "--samplers"), run / "other")
    assert "other/samplers.json; sample.py --quality reads it in the model's own" in elsewhere
    assert not (run / run_folder.EVALUATION).exists()


@pytest.mark.slow
def test_two_processes_make_the_same_menu(run, tmp_path, script):
    """An odd number of images, so that the shares differ; then nothing is left to do."""
    words = ["evaluate.py", run, "--num_images=41", "--samplers", "ddim:2", "ddpm:3"]
    alone = script(*words, f"--output_dir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    both = [
        "--config_file",
        "accelerate_config.yaml",
        "--num_processes",
        "2",
        *words,
        f"--output_dir={tmp_path / 'two'}",
    ]
    done = script(*both, launch=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 of 2") == 1
    one, two = (
        sampler_table.read_sampler_table_file(tmp_path / name / run_folder.SAMPLER_TABLE)
        for name in ("one", "two")
    )
    for mine, theirs in zip(one.entries, two.entries, strict=True):
        assert str(mine) == str(theirs)
        assert theirs.distance == pytest.approx(mine.distance, rel=1e-3)
        assert theirs.leaving_out == pytest.approx(mine.leaving_out, rel=1e-3)
    again = script(*both, launch=True)
    assert again.returncode == 0 and "samplers.json: 2. To go: 0." in again.stdout, again.stderr
