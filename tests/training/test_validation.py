"""Evaluations during training: correct, the same after a kill, and without effect on the run."""

import itertools
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline
from safetensors.torch import load_file

from ddpm import file_io, run_folder, run_record
from ddpm.accelerator import make_accelerator
from ddpm.config.data import DataConfig
from ddpm.config.parser import given_flags, parse_evaluate, parse_train
from ddpm.data import dataset
from ddpm.diffusion.ema import EMA
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import evaluator, metrics, report
from ddpm.sampling import pipeline
from ddpm.training import validation
from ddpm.training.step import build_train_state
from tests.conftest import ROOT
from tests.tiny import FLAGS, RGBA_CLASSES
from tests.training.bits import Killed, assert_same_bits, final_state, kill, read_lines
from tests.training.test_fsdp import CONFIG

DIGITS = ROOT / "data" / "digits"
ON_DIGITS = (
    "--train_data_dir=None",
    f"--dataset_name={DIGITS}",
    "--split=train[:40]",
    "--save_images_epochs=0",
    "--save_model_epochs=0",
    "--ddpm_num_steps=20",
    "--eval_steps=2",
)
STREAMED = ("--streaming", "--split=train", "--rows_per_epoch=40")
MEASURED = ("--eval_images=16", "--keep_best")


@pytest.fixture(autouse=True)
def eight_loss_images(monkeypatch):
    for module in (validation, report):
        monkeypatch.setattr(module, "MAX_LOSS_IMAGES", 8)


@pytest.fixture
def train(train_tiny, tmp_path):
    """train(name, *flags): six steps on 40 digits, evaluated after every second."""
    return lambda name, *flags: train_tiny(tmp_path / name, *ON_DIGITS, *flags)


@pytest.fixture
def measured_run(trained_run):
    """A copy of a finished run with all measurements, and the best pipeline."""
    return trained_run("measured", *ON_DIGITS, *MEASURED)


def read_evaluations(folder):
    lines = read_lines(folder)
    return [line for line in lines if any(name.startswith("eval_") for name in line)]


def open_evaluator(folder, *flags):
    argv = [str(folder), "--num_images=16", "--batch_size=4", "--num_inference_steps=2", *flags]
    config = evaluator.complete_config(parse_evaluate(argv), given_flags(argv))
    return evaluator.open_evaluator(make_accelerator(None), config)


def test_resume_repeats_evaluations_bit_exact(train, trained_run, measured_run, monkeypatch):
    """Also the best pipeline; and the weights are those of a run without evaluations."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, EMA, "update", 6)
        train("killed", *MEASURED)
    killed = train("killed", *MEASURED)
    assert [line["step"] for line in read_evaluations(measured_run)] == [2, 4, 6]
    assert read_evaluations(killed) == read_evaluations(measured_run)
    assert validation.read_best(killed) == validation.read_best(measured_run)
    assert_same_bits(final_state(killed), final_state(measured_run))
    unmeasured = trained_run("unmeasured", *ON_DIGITS, "--eval_steps=0")
    assert_same_bits(final_state(unmeasured), final_state(measured_run))


def test_values_are_those_of_evaluate(measured_run):
    assert_same_as_evaluate(measured_run)


def assert_same_as_evaluate(run, *flags):
    """At the last step evaluate.py measures the same EMA and raw weights."""
    last = read_evaluations(run)[-1]
    opened = open_evaluator(run, *flags)
    losses = report.measure_timestep_loss(opened).held_out
    for name, weights in (("eval_loss", "model"), ("eval_loss_raw", "raw")):
        by_band = [last[f"{name}_band_{band}"] for band in range(10)]
        assert by_band == pytest.approx(losses[weights], rel=1e-5)
        assert last[name] == pytest.approx(sum(losses[weights]) / 10, rel=1e-5)
    assert last["eval_loss"] != last["eval_loss_raw"]
    trained = opened.dataset_features(opened.trained)
    distance = metrics.frechet_distance(opened.generated_features(), trained)
    assert last["eval_frechet_distance"] == pytest.approx(distance, rel=1e-3)


def test_images_with_classes_and_transparency_are_measured_as_by_evaluate(trained_run):
    """On white, in the features of the digits' network."""
    features = f"--features={DIGITS / 'features.safetensors'}"
    flags = ("--save_images_epochs=0", "--ddpm_num_steps=20", "--eval_steps=6", features)
    run = trained_run("rgba", *RGBA_CLASSES, *MEASURED, *flags)
    assert_same_as_evaluate(run, features)
    assert run_record.read_record(run).dataset.channels == 4
    best = pipeline.load_model(str(run / "best"), conditional=True)
    assert best.unet.config.out_channels == 4 and len(best.class_names) == 3


def test_classes_are_measured_as_by_evaluate_and_kept_with_the_best(trained_run):
    run = trained_run("classes", *ON_DIGITS, *MEASURED, "--class_conditional", "--eval_steps=6")
    assert_same_as_evaluate(run)
    best = pipeline.load_model(str(run / "best"), conditional=True)
    assert best.class_names == tuple("0123456789")
    step = validation.read_best(run).step
    weights = load_file(run / f"checkpoint-{step}" / "ema.safetensors")
    assert_same_bits(dict(best.unet.state_dict()), weights)
    checkpoint = pipeline.load_model(str(run / f"checkpoint-{step}"), conditional=None)
    assert checkpoint.class_names == best.class_names
    assert_same_bits(dict(checkpoint.unet.state_dict()), weights)


def test_without_ema_there_is_one_loss(train):
    folder = train("raw", "--no_use_ema", "--max_train_steps=2")
    (line,) = read_evaluations(folder)
    assert "eval_loss" in line and "eval_loss_raw" not in line


def test_warnings_are_printed_once(train, capsys):
    """Raw weights that are much better than an EMA that stands still."""
    train("lagging", "--ema_max_decay=1", "--ema_power=99", "--max_train_steps=4")
    output = capsys.readouterr().out
    assert output.count("The average lags") == 1
    assert "step 2: held-out loss" in output and "step 4: held-out loss" in output


def test_streamed_run_is_evaluated(train):
    folder = train("stream", *STREAMED, "--max_train_steps=2")
    assert [line["step"] for line in read_evaluations(folder)] == [2]


# Held-out images


def contents(images):
    return {bytes(images.pixels(row).numpy()) for row in range(len(images))}


def test_held_out_fraction_is_chosen_by_the_seed_and_never_trained_on(tmp_path):
    config = DataConfig(
        dataset_name=str(DIGITS),
        split="train[:40]",
        resolution=8,
        held_out=0.5,
        cache_dir=str(tmp_path),
    )
    trained = dataset.load_images(config, False, seed=3)
    everything = dataset.load_images(replace(config, held_out=0.0), False)
    assert (len(trained), len(trained.held_out), trained.facts.images) == (20, 20, 20)
    assert trained.facts.held_out == {"share": 0.5, "seed": 3, "images": 20}
    held_out = contents(trained.held_out)
    assert contents(trained) | held_out == contents(everything)
    assert not contents(trained) & held_out
    batch = trained.batch(trained.rows(0, 90), torch.Generator()).images
    assert {bytes(image.numpy()) for image in batch} == contents(trained)
    assert contents(dataset.load_images(config, False, seed=3).held_out) == held_out
    assert contents(dataset.load_images(config, False, seed=4).held_out) != held_out


def test_evaluate_holds_out_the_same_images(train):
    folder = train("fraction", "--held_out=0.5", "--seed=5", "--max_train_steps=2")
    record = file_io.read_json(folder / run_folder.RECORD)["dataset"]
    assert record["held_out"] == {"share": 0.5, "seed": 5, "images": 20}
    opened = open_evaluator(folder)
    assert (len(opened.trained), len(opened.held_out)) == (20, 20)
    losses = report.measure_timestep_loss(opened).held_out["model"]
    last = read_evaluations(folder)[-1]
    assert [last[f"eval_loss_band_{b}"] for b in range(10)] == pytest.approx(losses, rel=1e-5)
    with pytest.raises(UsageError, match="held_out was 0.5, now 0.4"):
        train("fraction", "--held_out=0.4", "--seed=5")
    run_record.write_record(folder, dataset={**record, "pixels_sha256": "0" * 64})
    with pytest.raises(UserError, match="other images than those that it has not seen"):
        open_evaluator(folder)


def test_stream_gives_the_first_of_its_held_out_images(tmp_path):
    config = DataConfig(
        dataset_name=str(DIGITS),
        resolution=8,
        streaming=True,
        rows_per_epoch=40,
        cache_dir=str(tmp_path),
    )
    stream = dataset.load_images(config, False)
    held_out = dataset.load_held_out(config, stream, False, 7)
    decoded = replace(config, streaming=False, rows_per_epoch=None, split="test")
    test = dataset.load_images(decoded, False)
    assert len(held_out) == 7
    assert all(torch.equal(held_out.pixels(row), test.pixels(row)) for row in range(7))


def test_what_cannot_be_measured_is_refused_before_the_first_step(
    train, pictures, monkeypatch, tmp_path
):
    folder = ("--dataset_name=None", f"--train_data_dir={pictures}", "--split=train")
    features = f"--features={DIGITS / 'features.safetensors'}"
    for flags, message in (
        (folder, r"no test or validation split.*--held_out 0\.05"),
        ((*folder, "--eval_images=16", features), "10 images; no distance means anything"),
        ((*STREAMED, "--eval_images=16"), "--streaming does not keep"),
        (("--held_out=0.2",), "holds out 8; fewer than 16 measure nothing"),
        (("--held_out=0.99",), r"--held_out 0\.99 of 40 images leaves none"),
    ):
        with pytest.raises(UserError, match=message):
            train("x", *flags)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install -r requirements-evaluate.txt"):
        train("x", "--eval_images=16")
    assert not (tmp_path / "x").exists()


# The best pipeline


def test_best_pipeline_is_complete_and_loads(measured_run):
    best = validation.read_best(measured_run)
    lines = read_evaluations(measured_run)
    values = {line["step"]: line["eval_frechet_distance"] for line in lines}
    assert best.value == min(values.values()) == values[best.step]
    assert (best.measure, best.num_images) == ("eval_frechet_distance", 16)
    weights = load_file(measured_run / f"checkpoint-{best.step}" / "ema.safetensors")
    stock = DDPMPipeline.from_pretrained(measured_run / "best")
    assert_same_bits(dict(stock.unet.state_dict()), weights)
    assert pipeline.load_model(str(measured_run / "best")).name == "best"
    assert run_record.read_record(measured_run / "best").training.steps == best.step
    assert run_folder.default_repo_name(measured_run / "best") == "measured-best"
    assert not list(measured_run.glob(".best*"))
    run_folder.delete_run(measured_run)
    assert not (measured_run / "best").exists()


def test_worse_model_never_replaces_the_best(train, measured_run, capsys):
    """Not after a resume from before it either, which is noted; another metric is refused."""
    path = measured_run / "best" / run_folder.BEST_JSON
    best = {**json.loads(path.read_text()), "value": 1e-9, "step": 6}
    path.write_text(json.dumps(best))
    shutil.rmtree(measured_run / "checkpoint-6")
    train("measured", *MEASURED)
    assert json.loads(path.read_text()) == best
    assert "is of step 6, after the one that this run resumes from" in capsys.readouterr().out
    names = (run_folder.TRAIN_CONFIG, run_folder.RECORD, run_folder.METRICS)
    before = {name: (measured_run / name).read_bytes() for name in names}
    with pytest.raises(UserError, match=r"chosen by measure eval_fr.*now it would be by measure"):
        train("measured", "--keep_best", "--max_train_steps=8")
    assert {name: (measured_run / name).read_bytes() for name in names} == before


def test_kill_leaves_the_old_best_pipeline_or_the_new_one(
    pictures, tiny_unet, monkeypatch, tmp_path
):
    """At every rename of the second one that is kept, one after the other."""
    folder = tmp_path / "run"
    command = [f"--train_data_dir={pictures}", f"--model_config_name_or_path={tiny_unet}"]
    config = parse_train([*command, f"--output_dir={folder}", *FLAGS])
    AcceleratorState._reset_state(reset_partial_state=True)
    state = build_train_state(make_accelerator("no"), config)
    file_io.write_json(folder / run_folder.TRAIN_CONFIG, {})
    file_io.write_json(folder / run_folder.RECORD, {})
    best = validation.BestPipeline(step=2, value=1.0, measure="eval_loss")
    validation.keep_best(state, best)
    weights = {2: (folder / "best" / run_folder.UNET_WEIGHTS).read_bytes()}
    with torch.no_grad():
        for average in state.ema.average.values():
            average.add_(1.0)
    kept_steps = []
    for at_call in itertools.count(1):
        try:
            with monkeypatch.context() as patch:
                kill(patch, validation.os, "replace", at_call)
                validation.keep_best(state, replace(best, step=4))
            break
        except Killed:
            validation.finish_interrupted_swap(folder)
        kept = validation.read_best(folder).step
        content = (folder / "best" / run_folder.UNET_WEIGHTS).read_bytes()
        assert weights.setdefault(kept, content) == content
        DDPMPipeline.from_pretrained(folder / "best")
        assert not list(folder.glob(".best*"))
        kept_steps.append(kept)
    # A kill before the last rename, of the complete new pipeline, is the first that keeps it.
    assert len(kept_steps) > 5 and kept_steps == [*[2] * (len(kept_steps) - 1), 4]
    assert weights[2] != weights[4]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "FSDP"])
def test_two_processes_measure_what_one_does(script, tiny_unet, tmp_path, sharded):
    """An odd number of images, so that the processes measure different numbers of them."""
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
    for expected, line in zip(read_evaluations(one), read_evaluations(two), strict=True):
        assert line == pytest.approx(expected, rel=1e-2)
    best = [validation.read_best(folder).value for folder in (one, two)]
    assert best[0] == pytest.approx(best[1], rel=1e-2)
    assert done.stdout.count("step 2: held-out loss") == 1
    DDPMPipeline.from_pretrained(two / "best")
