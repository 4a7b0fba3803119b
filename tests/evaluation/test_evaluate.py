"""What evaluate.py measures, against torch-fidelity's own computation on files."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from huggingface_hub import HfApi
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file

from ddpm import run_folder
from ddpm.accelerator import make_accelerator
from ddpm.config.parser import given_flags, parse_evaluate
from ddpm.config.train import DataConfig
from ddpm.data import dataset, source
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import evaluator, plots, report
from ddpm.publishing import model_card
from ddpm.sampling import image_io, pipeline

torch_fidelity = pytest.importorskip("torch_fidelity")

DIGITS = Path(__file__).parents[2] / "data" / "digits"
FEW = ["--num_images=40", "--num_inference_steps=2", "--batch_size=16"]


@pytest.fixture
def run(tmp_path, make_unet, chain):
    """A run folder: an untrained model of digits, and the settings that it would have come from."""
    folder = tmp_path / "run"
    pipeline.export_pipeline(make_unet(), chain, folder)
    settings = {"dataset_name": str(DIGITS), "resolution": 8, "train_batch_size": 4}
    (folder / run_folder.TRAIN_CONFIG).write_text(json.dumps(settings))
    return folder


def opened(folder: Path, *flags: str) -> evaluator.Evaluator:
    argv = [str(folder), *FEW, *flags]
    config = evaluator.complete_config(parse_evaluate(argv), given_flags(argv))
    return evaluator.open_evaluator(make_accelerator(None), config)


def refused(folder: Path, *flags: str) -> str:
    with pytest.raises(UserError) as told:
        opened(folder, *flags)
    return str(told.value)


def test_numbers_are_those_of_the_librarys_own_computation(run, tmp_path, script):
    """sample.py's PNGs against PNGs of the data, by torch-fidelity alone, in the same features."""
    exam = opened(run)
    found = report.compute_metrics(exam, report.extract_features(exam))

    class Digits(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = exam.features.network

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
            return (self.network(pixels),)

    torch_fidelity.register_feature_extractor("digits", Digits)
    real = tmp_path / "real"
    real.mkdir()
    for row in range(len(exam.trained)):
        image = evaluator.real_image(exam.trained, row)
        image_io.save_png(image, real / f"{row:05d}.png", {})
    drawn = tmp_path / "drawn"
    done = script(
        "sample.py", run, "--num_images=40", "--num_inference_steps=2", f"--output_dir={drawn}"
    )
    assert done.returncode == 0, done.stderr
    (drawn / "grid.png").unlink()
    theirs = torch_fidelity.calculate_metrics(
        input1=str(drawn),
        input2=str(real),
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
    ours = found["metrics"]
    assert found["kernel_subset_size"] == 20
    assert ours["frechet_distance"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["kernel_distance"] == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-3
    )
    assert ours["kernel_distance_spread"] == pytest.approx(
        theirs["kernel_inception_distance_std"], rel=1e-3
    )
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-3)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-3)


def test_noise_is_worse_than_held_out_digits_and_the_card_says_so(run, tmp_path):
    exam = opened(run, "--num_inference_steps=1")
    found = report.compute_metrics(exam, report.extract_features(exam))
    assert found["held_out"]["num_images"] == 360
    assert found["as_many_as_held_out"]["num_images"] == 40
    assert found["held_out"]["frechet_distance"] * 10 < found["metrics"]["frechet_distance"]
    path = report.write_evaluation(exam, found, run)
    measured = json.loads(path.read_text())
    assert measured["num_images"] == 40 and measured["seeds"] == [0, 39]
    assert measured["sampler"] == {"scheduler": "dpmsolver-sde", "num_inference_steps": 1}
    assert measured["environment"]["versions"]["torch-fidelity"] == torch_fidelity.__version__
    text = model_card.render_card(run, "you/digits", None, None)
    assert "| Frechet distance |" in text
    assert "Measured on 40 drawn images (`dpmsolver-sde` in 1 step, seeds 0 to 39)." in text
    assert "held out: the floor" in report.format_metrics(found)


def test_data_is_named_unless_the_record_names_the_same(run):
    exam = opened(run)
    found = {"metrics": {"recall": 0.5}}
    path = report.write_evaluation(exam, found, run)
    assert json.loads(path.read_text()) == {"dataset": "digits", **found}
    run_folder.write_record(run, dataset={"name": "digits", "split": "train"})
    report.write_evaluation(exam, found, run)
    assert json.loads(path.read_text()) == found


def test_features_do_not_depend_on_the_batch(run):
    exam, other = opened(run), opened(run, "--batch_size=7")
    scheduler = replace(exam.scheduler, num_inference_steps=2)
    whole = evaluator.generated_features(exam, scheduler, 20)
    parts = evaluator.generated_features(other, scheduler, 20)
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=2e-2)


def test_real_images_are_cropped_as_in_training_the_same_each_time(run, tmp_path):
    """Wide images: a random crop of each row, but not of another one each time."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for number in range(20):
        ramp = torch.arange(24, dtype=torch.uint8).repeat(8, 1)[None] * 10 + number
        image_io.save_png(ramp, folder / f"{number:02d}.png", {})
    data = DataConfig(train_data_dir=str(folder), resolution=8)
    real = dataset.load_images(data, False)
    cut = [evaluator.real_image(real, row) for row in range(20)]
    assert all(image.shape == (1, 8, 8) for image in cut)
    assert len({int(image.min()) // 10 for image in cut}) > 4
    assert all(torch.equal(evaluator.real_image(real, row), cut[row]) for row in range(20))


def test_settings_about_data_are_the_runs_unless_given(run):
    (run / run_folder.TRAIN_CONFIG).write_text(
        json.dumps({"dataset_name": "a/b", "split": "train[:9]", "resize_mode": "pad"})
    )

    def data(*flags):
        argv = [str(run), *flags]
        return evaluator.complete_config(parse_evaluate(argv), given_flags(argv)).data

    assert (data().dataset_name, data().split, data().resize_mode) == ("a/b", "train[:9]", "pad")
    assert data("--split", "test").split == "test"
    other = data("--dataset_name", "c/d")
    assert (other.dataset_name, other.split, other.resize_mode) == ("c/d", "train", "pad")
    folder = data("--train_data_dir=x")
    assert (folder.dataset_name, folder.train_data_dir) == (None, "x")


def test_data_of_the_hub_are_those_of_the_commit_that_was_trained_on(run, alice):
    """The dataset has changed since; a run folder and its published copy both say what it was."""
    api = HfApi()
    api.create_repo("alice/shades", repo_type="dataset")
    commits = []
    for count in (20, 30):
        files = [
            row.tobytes() for row in np.arange(count, dtype=np.uint8).repeat(64).reshape(-1, 64)
        ]
        shades = [io.BytesIO() for _ in files]
        for file, pixels in zip(shades, files, strict=True):
            Image.frombytes("L", (8, 8), pixels).save(file, "PNG")
        rows = {"image": [{"bytes": file.getvalue(), "path": None} for file in shades]}
        data = Dataset.from_dict(rows, features=Features({"image": datasets.Image()}))
        commits.append(data.push_to_hub("alice/shades").oid)
    assert commits[0] != commits[1]
    settings = {"dataset_name": "alice/shades", "dataset_revision": "main"}
    (run / run_folder.TRAIN_CONFIG).write_text(json.dumps(settings))
    recorded = {"name": "alice/shades", "on_hub": True, "revision": commits[0], "split": "train"}
    run_folder.write_record(run, dataset=recorded)
    api.create_repo("alice/shader")
    api.upload_folder(repo_id="alice/shader", folder_path=str(run))

    def taken(*flags):
        config = evaluator.complete_config(parse_evaluate(flags), given_flags(flags))
        images = dataset.load_images(replace(config.data, resolution=8), False)
        return len(images), images.facts.revision

    assert taken(str(run)) == taken("alice/shader") == (20, commits[0])
    assert taken(str(run), "--dataset_name=alice/shades") == (20, commits[0])
    assert taken(str(run), "--dataset_revision=main") == (30, commits[1])
    run_folder.write_record(run, dataset={**recorded, "name": "alice/others"})
    assert taken(str(run)) == (30, commits[1])  # what was recorded is of other data


def test_held_out_split_is_found_by_its_name(tmp_path):
    assert source.find_held_out_split(DataConfig(dataset_name=str(DIGITS))) == "test"
    assert source.find_held_out_split(DataConfig(dataset_name=str(DIGITS), split="test")) is None
    parquet = next((DIGITS / "data").glob("test*"))
    assert source.find_held_out_split(DataConfig(dataset_name=str(parquet))) is None
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for number in range(2):
            image = torch.full((1, 8, 8), number, dtype=torch.uint8)
            image_io.save_png(image, tmp_path / split / f"{number}.png", {})
    assert source.find_held_out_split(DataConfig(train_data_dir=str(tmp_path))) == "validation"
    assert source.find_held_out_split(DataConfig(train_data_dir=str(tmp_path / "train"))) is None


def test_what_cannot_be_measured_is_refused(run, tmp_path, make_unet, chain):
    assert "fewer than 16" in refused(run, "--num_images=15")
    assert "no such file" in refused(run, "--features=none.pt")
    assert 'Unknown split "tset"' in refused(run, "--eval_split=tset")
    (run / run_folder.TRAIN_CONFIG).unlink()
    assert "does not say what it was trained on" in refused(run)
    pipeline.export_pipeline(make_unet(resolution=16), chain, tmp_path / "large")
    with pytest.raises(UserError, match="features.safetensors.*images of 8x8 pixels"):
        report.extract_features(opened(tmp_path / "large", f"--dataset_name={DIGITS}"))
    with pytest.raises(UsageError, match="must be at least 1"):
        parse_evaluate([str(run), "--num_images=0"])
    with pytest.raises(UsageError, match="not both"):
        parse_evaluate([str(run), "--dataset_name=a/b", "--train_data_dir=c"])


def test_a_checkpoint_is_measured_somewhere_else(tmp_path):
    folder = tmp_path / "run" / "checkpoint-5"
    folder.mkdir(parents=True)
    (folder / run_folder.CHECKPOINT_STATE).write_text("{}")
    with pytest.raises(UsageError, match="--output_dir"):
        evaluator.require_output_dir(parse_evaluate([str(folder)]))
    given = parse_evaluate([str(folder), f"--output_dir={tmp_path}"])
    assert evaluator.require_output_dir(given) == tmp_path


def test_a_model_of_the_hub_is_measured_by_its_published_settings(alice, hub, run):
    api = HfApi()
    api.create_repo("alice/digits")
    api.upload_folder(repo_id="alice/digits", folder_path=str(run))
    argv = ["alice/digits"]
    config = evaluator.complete_config(parse_evaluate(argv), given_flags(argv))
    assert config.data.dataset_name == str(DIGITS)
    assert evaluator.require_output_dir(config) == Path("digits")


def test_a_model_of_the_hub_is_not_measured_into_another_models_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_evaluate(["alice/digits"])
    Path("digits").mkdir()
    assert evaluator.require_output_dir(config) == Path("digits")
    for name in (run_folder.MODEL_INDEX, run_folder.RECORD, run_folder.TRAIN_CONFIG):
        (tmp_path / "digits" / name).write_text("{}")
        with pytest.raises(UsageError, match=r"digits is a model here.*of alice/digits: say with"):
            evaluator.require_output_dir(config)
        (tmp_path / "digits" / name).unlink()


def test_without_the_library_one_sentence(monkeypatch):
    from ddpm.evaluation.features import require_torch_fidelity

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install -r requirements-evaluate.txt"):
        require_torch_fidelity()


@pytest.mark.slow
def test_two_processes_measure_what_one_does(run, tmp_path, script):
    """An odd number of images, so that the shares differ."""
    words = ["evaluate.py", run, *FEW, "--num_images=41"]
    alone = script(*words, f"--output_dir={tmp_path / 'one'}")
    assert alone.returncode == 0, alone.stderr
    assert "41 images of seeds 0 to 40" in alone.stdout
    both = script(
        "--config_file",
        "accelerate_config.yaml",
        "--num_processes",
        "2",
        *words,
        f"--output_dir={tmp_path / 'two'}",
        launch=True,
    )
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("Measured:") == 1
    one, two = (
        run_folder.read_json(tmp_path / name / "evaluation.json") for name in ("one", "two")
    )
    assert two["environment"]["num_processes"] == 2
    for key in ("metrics", "held_out", "as_many_as_held_out"):
        assert two[key] == pytest.approx(one[key], rel=1e-3), key


def test_copies_are_told_and_shown(run, tmp_path):
    """A model that 'draws' training images: every one is a copy, and the sheet shows them."""
    exam = opened(run)
    trained = evaluator.split_features(exam, exam.trained)
    held_out = evaluator.split_features(exam, exam.held_out)
    looked = report.ExtractedFeatures(trained[:40], trained, held_out, 1.0)
    copies = report.measure_memorization(exam, looked, tmp_path)
    assert copies["memorised"] == 1 and copies["compared_with"] == "held-out images"
    assert "100.0% of the drawn images" in report.format_memorization(copies)
    text = image_io.read_png_text(tmp_path / "evaluation" / "nearest.png")
    assert text["lines"].startswith("drawn; nearest trained")
    alone = report.measure_memorization(
        replace(exam, held_out=None), replace(looked, held_out=None), tmp_path
    )
    assert alone["compared_with"] == "training images among themselves"


def test_losses_of_average_and_raw_weights(run, make_unet, monkeypatch):
    """Raw weights are told when their checkpoint's average is what was exported, not otherwise."""
    monkeypatch.setattr(report, "MAX_LOSS_IMAGES", 20)
    folder = run / "checkpoint-7"
    folder.mkdir()
    (folder / run_folder.CHECKPOINT_STATE).write_text("{}")
    exported = load_file(run / run_folder.UNET_WEIGHTS)
    save_file(exported, folder / "ema.safetensors")
    save_file(make_unet(seed=1).state_dict(), folder / "model.safetensors")
    exam = opened(run)
    levels = report.measure_timestep_loss(exam)
    assert levels["num_images"] == 20
    (run / "evaluation").mkdir()
    (run / "evaluation" / "mine.txt").write_text("kept")
    report.plot_timestep_loss(exam, levels, run)
    drawn = image_io.read_png(run / "evaluation" / "loss-by-band.png")
    for colour in plots.COLOURS[:4]:  # held out and trained on, each averaged and raw
        wanted = torch.tensor(ImageColor.getrgb(colour))[:, None, None]
        assert (drawn == wanted).all(0)[:, plots.LEFT :].sum() > 50
    assert (run / "evaluation" / "mine.txt").read_text() == "kept"
    assert levels["held_out"].keys() == levels["trained"].keys() == {"model", "raw"}
    assert levels["held_out"]["model"] != levels["held_out"]["raw"]
    assert len(levels["held_out"]["raw"]) == len(levels["bands"])
    save_file(exported, folder / "model.safetensors")
    same = report.measure_timestep_loss(opened(run))["held_out"]
    assert same["model"] == same["raw"] == levels["held_out"]["model"]
    save_file(make_unet(seed=2).state_dict(), folder / "ema.safetensors")
    assert report.measure_timestep_loss(opened(run))["held_out"].keys() == {"model"}


def test_what_is_off_is_said_in_a_sentence():
    levels = {
        "bands": [(0, 4), (5, 9)],
        "held_out": {"model": [0.2, 0.4], "raw": [0.2, 0.4]},
        "trained": {"model": [0.2, 0.4]},
    }
    assert len(report.format_timestep_loss(levels).splitlines()) == 3
    lagging = {**levels, "held_out": {"model": [0.2, 0.4], "raw": [0.1, 0.3]}}
    assert "The average lags" in report.format_timestep_loss(lagging)
    learnt = report.format_timestep_loss({**levels, "trained": {"model": [0.1, 0.2]}})
    assert "cost 100% more" in learnt and "lags" not in learnt
