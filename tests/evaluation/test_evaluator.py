"""The evaluator: which model, which images, and what cannot be measured."""

import io
import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from huggingface_hub import HfApi
from PIL import Image

from ddpm import run_folder, run_record
from ddpm.config.data import DataConfig
from ddpm.config.parser import given_flags, parse_evaluate
from ddpm.data import dataset, source
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import metrics, report
from ddpm.evaluation.evaluator import complete_config, require_output_dir
from ddpm.evaluation.features import dataset_image
from ddpm.sampling import image_io, pipeline
from tests.evaluation.conftest import DIGITS
from tests.evaluation.test_features import Means

pytest.importorskip("torch_fidelity")


def test_features_of_generated_images_do_not_depend_on_the_batch_size(open_digits):
    one, other = (open_digits(f"--batch_size={size}").generated_features() for size in (16, 7))
    assert one.shape == (40, 64)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-2)


def test_real_images_are_cropped_as_in_training_but_the_same_each_time(tmp_path):
    for number in range(20):
        ramp = torch.arange(24, dtype=torch.uint8).repeat(8, 1)[None] * 10 + number
        image_io.save_png(ramp, tmp_path / f"{number:02d}.png", {})
    data = DataConfig(train_data_dir=str(tmp_path), resolution=8)
    images = dataset.load_images(data, False)
    crops = [dataset_image(images, row) for row in range(20)]
    assert all(crop.shape == (1, 8, 8) for crop in crops)
    assert len({int(crop.min()) // 10 for crop in crops}) > 4
    assert all(torch.equal(dataset_image(images, row), crops[row]) for row in range(20))


def test_data_settings_are_those_of_the_run_unless_given(digits_run):
    (digits_run / run_folder.TRAIN_CONFIG).write_text(
        json.dumps({"dataset_name": "a/b", "split": "train[:9]", "resize_mode": "pad"})
    )

    def data(*flags):
        argv = [str(digits_run), *flags]
        return complete_config(parse_evaluate(argv), given_flags(argv)).data

    assert (data().dataset_name, data().split, data().resize_mode) == ("a/b", "train[:9]", "pad")
    assert data("--split", "test").split == "test"
    other = data("--dataset_name", "c/d")
    assert (other.dataset_name, other.split, other.resize_mode) == ("c/d", "train", "pad")
    folder = data("--train_data_dir=x")
    assert (folder.dataset_name, folder.train_data_dir) == (None, "x")


def shades(count: int) -> Dataset:
    """A dataset of plain gray images, each of another gray."""
    rows = []
    for gray in range(count):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), gray, dtype=np.uint8)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    return Dataset.from_dict({"image": rows}, features=Features({"image": datasets.Image()}))


def test_data_on_the_hub_are_those_of_the_commit_that_the_run_recorded(digits_run, alice):
    """The dataset has changed since; a run folder and its published copy both name the commit."""
    api = HfApi()
    api.create_repo("alice/shades", repo_type="dataset")
    commits = [shades(count).push_to_hub("alice/shades").oid for count in (20, 30)]
    assert commits[0] != commits[1]
    config = {"dataset_name": "alice/shades", "dataset_revision": "main"}
    (digits_run / run_folder.TRAIN_CONFIG).write_text(json.dumps(config))
    recorded = {"name": "alice/shades", "on_hub": True, "revision": commits[0], "split": "train"}
    run_record.write_record(digits_run, dataset=recorded)
    api.create_repo("alice/shader")
    api.upload_folder(repo_id="alice/shader", folder_path=str(digits_run))

    def loaded(*flags):
        config = complete_config(parse_evaluate(flags), given_flags(flags))
        images = dataset.load_images(replace(config.data, resolution=8), False)
        return len(images), images.facts.revision

    run = str(digits_run)
    assert loaded(run) == loaded("alice/shader") == (20, commits[0])
    assert loaded(run, "--dataset_name=alice/shades") == (20, commits[0])
    assert loaded(run, "--dataset_revision=main") == (30, commits[1])
    run_record.write_record(digits_run, dataset={**recorded, "name": "alice/others"})
    assert loaded(run) == (30, commits[1])  # the recorded commit is of other data


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


def test_held_out_split_is_none_that_the_run_trained_on(digits_run, open_digits):
    """Also when the generated images are compared with another split than that of the run."""
    for split in ("train+test", "test[:50%]"):
        recorded = {"name": "digits", "split": split}
        run_record.write_record(digits_run, dataset=recorded)
        assert open_digits("--split=train").held_out is None
        with pytest.raises(UserError, match="The split test has images that were trained on, .*"):
            open_digits("--split=train", "--eval_split=test")
    assert len(open_digits("--split=train", "--eval_split=test[50%:]").held_out) == 180
    run_record.write_record(digits_run, dataset={**recorded, "name": "others"})
    assert len(open_digits("--split=train").held_out) == 360


def test_what_cannot_be_measured_is_refused(digits_run, open_digits, tmp_path, make_unet, chain):
    def message(*flags):
        with pytest.raises(UserError) as refusal:
            open_digits(*flags)
        return str(refusal.value)

    assert "fewer than 16" in message("--num_images=15")
    assert "no such file" in message("--features=none.pt")
    assert 'Unknown split "tset"' in message("--eval_split=tset")
    (digits_run / run_folder.TRAIN_CONFIG).unlink()
    assert "does not say what it was trained on" in message()
    pipeline.export_pipeline(make_unet(resolution=16), chain, tmp_path / "large")
    evaluator = open_digits(
        f"--dataset_name={DIGITS}", "--split=train[:16]", model=tmp_path / "large"
    )
    with pytest.raises(UserError, match="features.safetensors.*must have 8x8 pixels"):
        evaluator.dataset_features(evaluator.trained)
    with pytest.raises(UsageError, match="must be at least 1"):
        parse_evaluate([str(digits_run), "--num_images=0"])
    with pytest.raises(UsageError, match="not both"):
        parse_evaluate([str(digits_run), "--dataset_name=a/b", "--train_data_dir=c"])


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_rectangles_are_measured_with_images_of_their_size(tmp_path, open_digits, make_unet, chain):
    pipeline.export_pipeline(make_unet(resolution=(8, 12)), chain, tmp_path / "wide")
    (tmp_path / "data").mkdir()
    for number in range(24):
        noise = torch.randint(0, 256, (1, 10 + number % 3, 15), dtype=torch.uint8)
        image_io.save_png(noise, tmp_path / "data" / f"{number:02d}.png", {})
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    evaluator = open_digits(
        f"--train_data_dir={tmp_path / 'data'}",
        f"--features={tmp_path / 'means.pt'}",
        model=tmp_path / "wide",
    )
    assert evaluator.config.data.resolution == 64 and evaluator.trained.size == (8, 12)
    assert dataset_image(evaluator.trained, 0).shape == (1, 8, 12)
    extracted = report.extract_features(evaluator)
    evaluation = report.evaluate(evaluator, extracted, tmp_path)
    assert evaluation.metrics["frechet_distance"] > 0
    pairs = [image_io.read_png(path) for path in (tmp_path / "evaluation").glob("*.png")]
    assert (1, 4 * 50 + 2, 12 * 74 + 2) in [pair.shape for pair in pairs]


@pytest.mark.parametrize("resolution", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_emoji_are_measured_by_their_own_network(
    resolution, tmp_path, open_digits, make_unet, chain, capsys
):
    """With transparency, and with fewer classes than the network has logits."""
    unet = make_unet(resolution=resolution, channels=4, num_classes=3)
    pipeline.export_pipeline(unet, chain, tmp_path / "emoji", ["animals", "flags", "smileys"])
    evaluator = open_digits(
        f"--dataset_name={DIGITS.parent / 'emoji'}",
        "--dataset_config_name=faces-hearts-flags",
        "--split=train[:40]",
        model=tmp_path / "emoji",
    )
    assert "features.safetensors has 10 logits, the model 3 classes" in capsys.readouterr().out
    extracted = report.extract_features(evaluator)
    assert extracted.generated.shape == (40, 64) and extracted.held_out.shape == (46, 64)
    noise, unseen = (
        metrics.frechet_distance(features, extracted.trained)
        for features in (extracted.generated, extracted.held_out)
    )
    assert noise > 2 * unseen


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_rgba_images_are_measured_over_the_background(tmp_path, open_digits, make_unet, chain):
    """Features of the dataset are those of its images over the color, which the results name."""
    pipeline.export_pipeline(make_unet(channels=4), chain, tmp_path / "rgba")
    (tmp_path / "data").mkdir()
    for number in range(24):
        noise = torch.randint(0, 256, (4, 8, 8), dtype=torch.uint8)
        image_io.save_png(noise, tmp_path / "data" / f"{number:02d}.png", {})
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    flags = [f"--train_data_dir={tmp_path / 'data'}", f"--features={tmp_path / 'means.pt'}"]
    values = {}
    for color, rgb in (("white", (255,) * 3), ("#ff0000", (255, 0, 0))):
        evaluator = open_digits(*flags, f"--background={color}", model=tmp_path / "rgba")
        pixels = evaluator.trained.pixels(0).permute(1, 2, 0).numpy()
        under = Image.new("RGBA", (8, 8), (*rgb, 255))
        shown = Image.alpha_composite(under, Image.fromarray(pixels)).convert("RGB")
        expected = Means()(torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None])[0]
        values[color] = evaluator.dataset_features(evaluator.trained)
        torch.testing.assert_close(values[color][0], expected, atol=0.6, rtol=0)
    assert not torch.equal(*values.values())
    extracted = report.extract_features(evaluator)
    evaluation = report.evaluate(evaluator, extracted, tmp_path)
    assert evaluation.features["background"] == "#ff0000"
    assert "over #ff0000 (--background)" in report.format_evaluation(evaluation)


def test_a_checkpoint_needs_an_output_dir(tmp_path):
    folder = tmp_path / "run" / "checkpoint-5"
    folder.mkdir(parents=True)
    (folder / run_folder.CHECKPOINT_STATE).write_text("{}")
    with pytest.raises(UsageError, match="--output_dir"):
        require_output_dir(parse_evaluate([str(folder)]))
    config = parse_evaluate([str(folder), f"--output_dir={tmp_path}"])
    assert require_output_dir(config) == tmp_path


def test_a_model_on_the_hub_chooses_no_place_of_this_machine(
    alice, digits_run, tmp_path, monkeypatch
):
    """Its train_config.json is somebody else's: a dataset on the Hub, and how to read it."""
    api = HfApi()
    api.create_repo("alice/digits")
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "you/private"):
        (tmp_path / folder).mkdir(parents=True)
    argv = ["alice/digits"]

    def completed(**settings):
        content = json.dumps(settings).encode()
        api.upload_file(
            path_or_fileobj=content, path_in_repo=run_folder.TRAIN_CONFIG, repo_id=argv[0]
        )
        return complete_config(parse_evaluate(argv), given_flags(argv))

    places = {"cache_dir": "/home/you/cache", "features": "net.pt", "output_dir": "/home/you"}
    config = completed(dataset_name="a/b", split="test", resize_mode="pad", **places)
    data = DataConfig(dataset_name="a/b", split="test", resize_mode="pad")
    assert config == replace(parse_evaluate(argv), data=data)
    assert require_output_dir(config) == Path("digits")
    for name in (str(DIGITS), "photos", "you/private", "~/photos"):
        with pytest.raises(UsageError, match="which is no id on the Hub or names a file or folder"):
            completed(dataset_name=name)
    for name in ("hf://datasets/you/private", "a/b/c"):
        with pytest.raises(UsageError, match="which is no id on the Hub"):
            completed(dataset_name=name)
    with pytest.raises(UsageError, match="does not say what it was trained on"):
        completed(train_data_dir="photos")
    argv.append("--dataset_name=./photos")
    assert completed(train_data_dir="/home").data == DataConfig(dataset_name="./photos")


def test_a_model_on_the_hub_is_not_evaluated_into_another_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_evaluate(["alice/digits"])
    Path("digits").mkdir()
    assert require_output_dir(config) == Path("digits")
    for name in (run_folder.MODEL_INDEX, run_folder.RECORD, run_folder.TRAIN_CONFIG):
        (tmp_path / "digits" / name).write_text("{}")
        with pytest.raises(UsageError, match=r"digits is a model here.*of alice/digits: say with"):
            require_output_dir(config)
        (tmp_path / "digits" / name).unlink()
