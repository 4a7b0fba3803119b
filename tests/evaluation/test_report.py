"""What evaluate.py measures, compared with torch-fidelity's own computation on files."""

import json
import sys
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

import evaluate
from ddpm import file_io, run_folder, run_record
from ddpm.evaluation import report, results
from ddpm.evaluation.features import dataset_image
from ddpm.evaluation.results import Evaluation, TimestepLosses
from ddpm.publishing import model_card
from ddpm.sampling import generate, image_io

torch_fidelity = pytest.importorskip("torch_fidelity")


def test_metrics_are_those_of_the_library_on_png_files(open_digits, tmp_path):
    """The PNGs of generated and of real images, measured by torch-fidelity alone."""
    evaluator = open_digits()
    evaluation = report.compute_metrics(evaluator, report.extract_features(evaluator))

    class Digits(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = evaluator.extractor.network

        @staticmethod
        def get_provided_features_list():
            return ("64",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "64"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, pixels):
            return self.network(pixels)[:1]

    torch_fidelity.register_feature_extractor("digits", Digits)
    folders = [tmp_path / "generated", tmp_path / "real"]
    images = generate.generate_images(evaluator.model.unet, evaluator.scheduler, range(40), 16)
    real = ((row, dataset_image(evaluator.trained, row)) for row in range(len(evaluator.trained)))
    for folder, numbered in zip(folders, (images, real), strict=True):
        folder.mkdir()
        for number, image in numbered:
            image_io.save_png(image, folder / f"{number:05d}.png", {})
    expected = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor="digits",
        cuda=False,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=20,
        verbose=False,
        save_cpu_ram=True,
        cache=False,
        samples_find_ext="png",
    )
    assert evaluation.kernel_subset_size == 20
    for name, key in (
        ("frechet_distance", "frechet_inception_distance"),
        ("kernel_distance", "kernel_inception_distance_mean"),
        ("kernel_distance_spread", "kernel_inception_distance_std"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert evaluation.metrics[name] == pytest.approx(expected[key], rel=1e-3, abs=1e-3), name


def test_the_command_measures_noise_as_worse_than_held_out_digits_and_the_card_shows_it(
    digits_run, monkeypatch, capsys
):
    monkeypatch.setattr(report, "MAX_LOSS_IMAGES", 16)
    flags = ["--num_images=40", "--num_inference_steps=1", "--split=train"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(digits_run), *flags])
    evaluate.main()
    output = capsys.readouterr().out
    assert "40 images of seeds 0 to 39, dpmsolver-sde, 1 steps, against 1,437 of digits" in output
    assert "held out (reference)" in output and "of the generated images are nearer" in output
    assert "loss at timesteps" in output and f"Measured: {digits_run}" in output
    entries = json.loads((digits_run / run_folder.EVALUATION).read_text())
    assert list(entries)[:4] == ["dataset", "metrics", "num_images", "model"]
    assert list(entries["metrics"])[0] == "frechet_distance" and "memorised" in entries["metrics"]
    assert entries["num_images"] == 40 and entries["seeds"] == [0, 39]
    assert entries["sampler"] == {"scheduler": "dpmsolver-sde", "num_inference_steps": 1}
    assert entries["environment"]["versions"]["torch-fidelity"] == torch_fidelity.__version__
    assert entries["held_out"]["num_images"] == 360
    assert entries["as_many_as_held_out"]["num_images"] == 40
    distance = entries["metrics"]["frechet_distance"]
    assert entries["held_out"]["frechet_distance"] * 10 < distance
    assert results.read_evaluation(digits_run).metrics["frechet_distance"] == distance
    text = model_card.render_card(digits_run, "you/digits", None, None)
    assert "| Frechet distance |" in text
    assert "Measured on 40 generated images (`dpmsolver-sde` in 1 step, seeds 0 to 39)" in text


def test_the_dataset_is_named_unless_the_record_names_the_same(digits_run, open_digits):
    evaluator = open_digits()
    evaluation = Evaluation(metrics={"recall": 0.5})
    path = report.write_evaluation(evaluator, evaluation, digits_run)
    assert json.loads(path.read_text()) == {"dataset": "digits", "metrics": {"recall": 0.5}}
    run_record.write_record(digits_run, dataset={"name": "digits", "split": "train[:60]"})
    report.write_evaluation(evaluator, evaluation, digits_run)
    assert json.loads(path.read_text()) == {"metrics": {"recall": 0.5}}


def test_copies_are_counted_and_shown(open_digits, tmp_path):
    """A model that "generates" training images: every one is a copy, and the grid shows them."""
    evaluator = open_digits()
    trained = evaluator.dataset_features(evaluator.trained)
    held_out = evaluator.dataset_features(evaluator.held_out)
    extracted = report.ExtractedFeatures(trained[:40], trained, held_out, 1.0)
    memorized, compared_with, is_copy = report.measure_memorization(evaluator, extracted, tmp_path)
    assert is_copy.all() and memorized.memorised == 1 and compared_with == "held-out images"
    evaluation = Evaluation(
        metrics={"memorised": 1.0}, memorisation={"compared_with": compared_with}
    )
    assert "100.0% of the generated images" in report.format_memorization(evaluation)
    text = image_io.read_png_text(tmp_path / "evaluation" / "nearest.png")
    assert text["lines"].startswith("drawn; nearest trained")
    _, compared_with, _ = report.measure_memorization(
        replace(evaluator, held_out=None), replace(extracted, held_out=None), tmp_path
    )
    assert compared_with == "training images among themselves"


def test_raw_weights_are_measured_if_their_average_was_exported(
    digits_run, open_digits, make_unet, monkeypatch
):
    monkeypatch.setattr(report, "MAX_LOSS_IMAGES", 16)
    folder = digits_run / "checkpoint-7"
    folder.mkdir()
    (folder / run_folder.CHECKPOINT_STATE).write_text("{}")
    exported = load_file(digits_run / run_folder.UNET_WEIGHTS)
    save_file(exported, folder / run_folder.EMA_WEIGHTS)
    save_file(make_unet(seed=1).state_dict(), folder / run_folder.RAW_WEIGHTS)
    losses = report.measure_timestep_loss(open_digits())
    assert losses.num_images == 16
    assert losses.held_out.keys() == losses.trained.keys() == {"model", "raw"}
    assert losses.held_out["model"] != losses.held_out["raw"]
    assert len(losses.held_out["raw"]) == len(losses.bands)
    save_file(exported, folder / run_folder.RAW_WEIGHTS)
    same = report.measure_timestep_loss(open_digits()).held_out
    assert same["model"] == same["raw"] == losses.held_out["model"]
    save_file(make_unet(seed=2).state_dict(), folder / run_folder.EMA_WEIGHTS)
    assert report.measure_timestep_loss(open_digits()).held_out.keys() == {"model"}


def test_noteworthy_losses_have_a_remark():
    losses = TimestepLosses(
        num_images=20,
        bands=[[0, 4], [5, 9]],
        held_out={"model": [0.2, 0.4], "raw": [0.2, 0.4]},
        trained={"model": [0.2, 0.4]},
    )
    assert len(report.format_timestep_loss(losses).splitlines()) == 3
    lagging = replace(losses, held_out={"model": [0.2, 0.4], "raw": [0.1, 0.3]})
    assert "The average lags" in report.format_timestep_loss(lagging)
    overfitted = report.format_timestep_loss(replace(losses, trained={"model": [0.1, 0.2]}))
    assert "a loss 100% above" in overfitted and "lags" not in overfitted


@pytest.mark.slow
def test_two_processes_measure_what_one_does(digits_run, tmp_path, script):
    """An odd number of images, so that the processes have different numbers of them."""
    command = ["evaluate.py", digits_run, "--num_images=41", "--num_inference_steps=2"]
    alone = script(*command, f"--output_dir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    assert "41 images of seeds 0 to 40" in alone.stdout
    launch = ["--config_file", "accelerate_config.yaml", "--num_processes", "2", *command]
    both = script(*launch, f"--output_dir={tmp_path / 'two'}", launch=True)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("Measured:") == 1
    one, two = (file_io.read_json(tmp_path / n / "evaluation.json") for n in ("one", "two"))
    assert two["environment"]["num_processes"] == 2
    for key in ("metrics", "held_out", "as_many_as_held_out"):
        assert two[key] == pytest.approx(one[key], rel=1e-3), key
