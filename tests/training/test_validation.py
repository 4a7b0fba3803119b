"""Evaluations on the way: right, the same after a stop, and without a trace in the run."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline
from safetensors.torch import load_file

from ddpm import run_folder
from ddpm.accelerator import make_accelerator
from ddpm.config.parser import given_flags, parse_evaluate, parse_train
from ddpm.config.train import DataConfig
from ddpm.data import dataset
from ddpm.diffusion.ema import EMA
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import evaluator, metrics, report
from ddpm.publishing.background import Publisher
from ddpm.sampling import pipeline
from ddpm.training import loop, validation
from tests.conftest import ROOT
from tests.training.test_fsdp import CONFIG
from tests.training.test_loop import STEPS, Killed, assert_same_bits, final_state, fresh_state, kill

DIGITS = ROOT / "data" / "digits"
__all__ = ["fresh_state"]


@pytest.fixture
def run(tiny_unet, tmp_path, monkeypatch):
    """run(name, flags...) trains on 40 digits into a folder: 6 steps, evaluated after every 2."""
    monkeypatch.setattr("ddpm.training.validation.MAX_LOSS_IMAGES", 8)

    def train(name, *flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = parse_train(
            [
                f"--dataset_name={DIGITS}",
                "--split=train[:40]",
                "--resolution=8",
                f"--model_config_name_or_path={tiny_unet}",
                f"--output_dir={tmp_path / name}",
                "--train_batch_size=4",
                f"--max_train_steps={STEPS}",
                "--lr_warmup_steps=2",
                "--learning_rate=1e-2",
                "--dropout=0.1",
                "--checkpointing_steps=2",
                "--save_images_epochs=0",
                "--save_model_epochs=0",
                "--ddpm_num_inference_steps=2",
                "--logging_steps=1",
                "--ddpm_num_steps=20",
                "--eval_steps=2",
                *flags,
            ]
        )
        accelerator = make_accelerator(None, config.tracking.logger, config.tracking.logging_dir)
        loop.train(accelerator, config, Publisher(Path(config.output_dir), config.hub))
        return tmp_path / name

    return train


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / run_folder.METRICS).read_text().splitlines()]
    return [line for line in lines if any(name.startswith("eval_") for name in line)]


def opened(folder, *flags):
    argv = [str(folder), "--num_images=16", "--batch_size=4", "--num_inference_steps=2", *flags]
    config = evaluator.complete_config(parse_evaluate(argv), given_flags(argv))
    return evaluator.open_evaluator(make_accelerator(None), config)


def test_a_stop_changes_no_line_and_looking_changes_no_weight(run, monkeypatch):
    """Evaluations of a run that was killed and went on, bit for bit, and the best pipeline too;
    the weights are those of a run that was not looked at."""
    watched = ["--eval_images=16", "--keep_best"]
    straight = run("straight", *watched)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, EMA, "update", 6)
        run("killed", *watched)
    killed = run("killed", *watched)
    assert [line["step"] for line in evaluations(straight)] == [2, 4, 6]
    assert evaluations(killed) == evaluations(straight)
    assert validation.read_best(killed) == validation.read_best(straight)
    assert_same_bits(final_state(killed), final_state(straight))
    assert_same_bits(final_state(run("unseen", "--eval_steps=0")), final_state(straight))


def test_values_are_those_of_the_weights_by_hand_and_of_evaluate(run, monkeypatch):
    """At the last step: average and raw weights as they were saved, measured by evaluate.py."""
    monkeypatch.setattr("ddpm.training.validation.MAX_LOSS_IMAGES", 12)
    monkeypatch.setattr(report, "MAX_LOSS_IMAGES", 12)
    folder = run("measured", "--eval_images=16")
    last = evaluations(folder)[-1]
    exam = opened(folder)
    levels = report.measure_timestep_loss(exam)["held_out"]
    for name, weights in (("eval_loss", "model"), ("eval_loss_raw", "raw")):
        by_band = [last[f"{name}_band_{band}"] for band in range(10)]
        assert by_band == pytest.approx(levels[weights], rel=1e-5)
        assert last[name] == pytest.approx(sum(levels[weights]) / 10, rel=1e-5)
    assert last["eval_loss"] != last["eval_loss_raw"]
    drawn = evaluator.generated_features(exam, exam.scheduler, 16)
    distance = metrics.frechet_distance(drawn, evaluator.split_features(exam, exam.trained))
    assert last["eval_frechet_distance"] == pytest.approx(distance, rel=1e-3)


def test_without_an_average_there_is_one_loss(run):
    folder = run("raw", "--no_use_ema", "--max_train_steps=2")
    (line,) = evaluations(folder)
    assert "eval_loss" in line and "eval_loss_raw" not in line
    assert json.loads((folder / run_folder.METRICS).read_text().splitlines()[-1])["loss"] > 0


def test_the_console_tells_what_is_off_once(run, capsys, monkeypatch):
    """Raw weights that are much better than an average that stands still."""
    run("lagging", "--ema_max_decay=1", "--ema_power=99", "--learning_rate=0.02")
    said = capsys.readouterr().out
    assert said.count("The average lags") == 1
    assert "step 2: held-out loss" in said and "step 6: held-out loss" in said


# A share that is held out


def test_a_share_is_held_out_by_the_seed_and_never_trained_on(tmp_path):
    data = DataConfig(
        dataset_name=str(DIGITS),
        split="train[:40]",
        resolution=8,
        held_out=0.5,
        cache_dir=str(tmp_path),
    )
    trained = dataset.load_images(data, False, seed=3)
    whole = dataset.load_images(DataConfig(**{**vars(data), "held_out": 0.0}), False)
    assert (len(trained), len(trained.held_out), trained.facts.images) == (20, 20, 20)
    assert trained.facts.held_out == {"share": 0.5, "seed": 3, "images": 20}

    def contents(some):
        return {bytes(some.pixels(row).numpy()) for row in range(len(some))}

    left_out = contents(trained.held_out)
    assert contents(trained) | left_out == contents(whole)
    assert not contents(trained) & left_out
    seen = trained.batch(trained.rows(0, 90), torch.Generator(), False)
    assert {bytes(image.numpy()) for image in seen} == contents(trained)
    again, other = (
        dataset.load_images(data, False, seed=3),
        dataset.load_images(data, False, seed=4),
    )
    assert contents(again.held_out) == left_out != contents(other.held_out)


def test_evaluate_holds_out_the_same_images(run, monkeypatch):
    monkeypatch.setattr("ddpm.training.validation.MAX_LOSS_IMAGES", 20)
    folder = run("share", "--held_out=0.5", "--seed=5")
    recorded = run_folder.read_record(folder).dataset
    assert recorded.held_out == {"share": 0.5, "seed": 5, "images": 20}
    exam = opened(folder)
    assert (len(exam.trained), len(exam.held_out)) == (20, 20)
    levels = report.measure_timestep_loss(exam)["held_out"]["model"]
    last = evaluations(folder)[-1]
    assert [last[f"eval_loss_band_{b}"] for b in range(10)] == pytest.approx(levels, rel=1e-5)
    with pytest.raises(UsageError, match="held_out was 0.5, now 0.4"):
        run("share", "--held_out=0.4", "--seed=5")
    run_folder.write_record(folder, dataset=dataclasses.replace(recorded, pixels_sha256="0" * 64))
    with pytest.raises(UserError, match="other images than those that it has not seen"):
        opened(folder)


def test_a_stream_lends_the_first_of_its_held_out_images(tmp_path):
    data = DataConfig(
        dataset_name=str(DIGITS),
        resolution=8,
        streaming=True,
        rows_per_epoch=40,
        cache_dir=str(tmp_path),
    )
    stream = dataset.load_images(data, False)
    found = dataset.load_held_out(data, stream, False, 7)
    decoded = DataConfig(
        **{**vars(data), "streaming": False, "rows_per_epoch": None, "split": "test"}
    )
    test = dataset.load_images(decoded, False)
    assert len(found) == 7
    assert all(torch.equal(found.pixels(row), test.pixels(row)) for row in range(7))


def test_a_streamed_run_is_evaluated(run):
    folder = run("stream", "--streaming", "--split=train", "--rows_per_epoch=40")
    assert [line["step"] for line in evaluations(folder)] == [2, 4, 6]


# What cannot be measured


def test_what_cannot_be_measured_is_refused_before_the_first_step(
    run, pictures, monkeypatch, tmp_path
):
    folder = ["--dataset_name=None", f"--train_data_dir={pictures}", "--split=train"]
    with pytest.raises(UsageError, match=r"no test or validation split.*--held_out 0\.05"):
        run("x", *folder)
    with pytest.raises(UserError, match="10 images; no distance means anything"):
        run("x", *folder, "--eval_images=16", f"--features={DIGITS / 'features.safetensors'}")
    with pytest.raises(UsageError, match="--streaming does not keep"):
        run("x", "--streaming", "--split=train", "--eval_images=16")
    with pytest.raises(UserError, match="holds out 8; fewer than 16 measure nothing"):
        run("x", "--held_out=0.2")
    with pytest.raises(UserError, match=r"--held_out 0\.99 of 40 images leaves none"):
        run("x", "--held_out=0.99")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install -r requirements-evaluate.txt"):
        run("x", "--eval_images=16")
    assert not (tmp_path / "x").exists()


# The best pipeline


def test_the_best_pipeline_is_whole_and_loads(run, tmp_path):
    folder = run("best", "--keep_best")
    kept = validation.read_best(folder)
    values = {line["step"]: line["eval_loss"] for line in evaluations(folder)}
    assert kept["value"] == min(values.values()) == values[kept["step"]]
    assert kept["measure"] == "eval_loss"
    stock = DDPMPipeline.from_pretrained(folder / "best")
    weights = load_file(folder / f"checkpoint-{kept['step']}" / "ema.safetensors")
    assert_same_bits(dict(stock.unet.state_dict()), weights)
    assert pipeline.load_model(str(folder / "best")).name == "best"
    record = run_folder.read_record(folder / "best")
    assert record.training.steps == kept["step"]
    assert run_folder.default_repo_name(folder / "best") == "best-best"
    assert not list(folder.glob(".best*"))
    run("best", "--overwrite_output_dir", "--max_train_steps=2")
    assert not (folder / "best").exists()


def test_a_worse_model_never_takes_its_place(run, capsys):
    """Kept through a resume that goes back before it, which says so; another measure is refused."""
    folder = run("kept", "--keep_best", "--max_train_steps=4")
    path = folder / "best" / run_folder.BEST_JSON
    better = {**json.loads(path.read_text()), "value": 1e-9}
    path.write_text(json.dumps(better))
    shutil.rmtree(folder / "checkpoint-4")
    capsys.readouterr()
    run("kept", "--keep_best")
    assert validation.read_best(folder) == better
    assert ("of step 4, after the one" in capsys.readouterr().out) == (better["step"] > 2)
    names = (run_folder.TRAIN_CONFIG, run_folder.RECORD, run_folder.METRICS)
    before = {name: (folder / name).read_bytes() for name in names}
    with pytest.raises(UserError, match=r"chosen by measure eval_loss.*now it would be by measure"):
        run("kept", "--keep_best", "--eval_images=16", "--max_train_steps=8")
    assert all((folder / name).read_bytes() == content for name, content in before.items())


@pytest.mark.parametrize("at_call", [3, 8, 9, 10])
def test_a_kill_leaves_the_old_one_or_the_new_one(run, monkeypatch, at_call, tmp_path):
    """At every rename of the second one that is kept; the same command tidies up."""
    monkeypatch.setattr(validation, "is_better", lambda output_dir, value: True)
    first = run("dies", "--keep_best", "--max_train_steps=2") / "best"
    old = (first / run_folder.UNET_WEIGHTS).read_bytes()
    real, calls = validation.os.replace, []

    def replace(source, target):
        if ".best" in f"{source}{target}":
            calls.append(1)
            if len(calls) == at_call:
                raise Killed
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace)
        try:
            run("dies", "--keep_best", "--max_train_steps=4")
        except Killed:
            validation.finish_interrupted_swap(tmp_path / "dies")
    facts = validation.read_best(tmp_path / "dies")
    weights = (first / run_folder.UNET_WEIGHTS).read_bytes()
    assert facts["step"] in (2, 4) and (weights == old) == (facts["step"] == 2)
    DDPMPipeline.from_pretrained(first)
    assert not list((tmp_path / "dies").glob(".best*"))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "FSDP"])
def test_two_processes_see_what_one_does(script, tiny_unet, tmp_path, sharded):
    """An odd number of images, so that the shares differ; sharded weights are kept whole."""
    flags = [
        f"--dataset_name={DIGITS}",
        "--split=train[:40]",
        "--resolution=8",
        f"--model_config_name_or_path={tiny_unet}",
        "--max_train_steps=4",
        "--lr_warmup_steps=0",
        "--train_batch_size=2",
        "--save_images_epochs=0",
        "--eval_steps=2",
        "--eval_images=17",
        "--keep_best",
        "--ddpm_num_inference_steps=2",
        "--logging_steps=1",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    done = script("train.py", *flags, "--gradient_accumulation_steps=2", f"--output_dir={one}")
    assert done.returncode == 0, done.stderr
    (tmp_path / "fsdp.yaml").write_text(CONFIG)
    plain = ["accelerate_config.yaml", "--num_processes=2", "train.py"]
    launch = [tmp_path / "fsdp.yaml", "tests/training/fsdp_on_cpu.py"] if sharded else plain
    done = script("--config_file", *launch, *flags, f"--output_dir={two}", launch=True)
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(evaluations(one), evaluations(two), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-2)
    assert validation.read_best(two)["value"] == pytest.approx(
        validation.read_best(one)["value"], rel=1e-2
    )
    assert done.stdout.count("step 2: held-out loss") == 1
    DDPMPipeline.from_pretrained(two / "best")
