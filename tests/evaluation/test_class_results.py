"""Models with classes: what is measured of all images, of each class, and of guidance scales."""

import sys
from dataclasses import replace

import datasets
import pytest
import torch
from safetensors.torch import save_file

import evaluate
from ddpm import file_io, run_folder
from ddpm.data.transforms import to_model
from ddpm.diffusion.class_labels import fold_label
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import class_results, compare_guidance, metrics, report, timestep_loss
from ddpm.evaluation.features import DATASET_FEATURES, dataset_image, load_small_classifier
from ddpm.evaluation.results import Evaluation, ModelVersion, read_evaluation
from ddpm.publishing import model_card
from ddpm.sampling import generate, guidance_results, pipeline
from tests.evaluation.conftest import DIGITS

pytest.importorskip("torch_fidelity")

DIGIT_NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(report, "MAX_LOSS_IMAGES", 16)
    monkeypatch.setattr(class_results, "MIN_IMAGES", 4)


@pytest.fixture
def class_run(digits_run, make_unet, chain):
    """The run of `digits_run` with classes."""
    unet = make_unet(num_classes=10)
    unet.class_embedding.weight.data *= 4
    pipeline.export_pipeline(unet, chain, digits_run, DIGIT_NAMES)
    path = digits_run / run_folder.TRAIN_CONFIG
    file_io.write_json(path, {**file_io.read_json(path), "class_conditional": True})
    return digits_run


def test_the_command_measures_classes_and_guidance_scales(class_run, monkeypatch, capsys):
    flags = ["--num_images=40", "--num_inference_steps=1", "--guidance_scales=2,0,1"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(class_run), *flags])
    evaluate.main()
    output = capsys.readouterr().out
    assert "10 classes, guidance 1, against 60 of digits" in output
    assert output.count("Generating with guidance") == 2  # 1 is that of the evaluation
    evaluation = read_evaluation(class_run)
    assert evaluation.guidance_scale == 1
    # The digits' network reads all but one of the 360 held-out digits
    assert evaluation.held_out["label_accuracy"] == pytest.approx(359 / 360)
    assert [result.name for result in evaluation.classes] == DIGIT_NAMES
    assert sum(result.num_images for result in evaluation.classes) == 40
    assert any("frechet_distance" in result.metrics for result in evaluation.classes)
    accuracy = sum(r.metrics["label_accuracy"] * r.num_images for r in evaluation.classes) / 40
    assert evaluation.metrics["label_accuracy"] == pytest.approx(accuracy)
    assert evaluation.loss_by_band.held_out_by_class.keys() <= {*DIGIT_NAMES}
    curve = evaluation.guidance
    assert [entry.guidance_scale for entry in curve.entries] == [0, 1, 2]
    assert curve.entries[1].distance == evaluation.metrics["frechet_distance"]
    assert len({entry.distance for entry in curve.entries}) == 3
    best = min(curve.entries[1:], key=lambda entry: entry.metrics["frechet_distance"])
    assert guidance_results.read_guidance_scale(class_run) == best.guidance_scale
    assert (class_run / "evaluation" / run_folder.GUIDANCE).is_file()
    card = model_card.render_card(class_run, "you/digits")
    assert "| guidance scale | Frechet distance | label accuracy | |" in card
    assert "| Label accuracy |" in card and "| id | class | images trained on | label acc" in card


def test_measured_scales_are_kept_for_the_same_weights_network_and_data(class_run, open_digits):
    evaluator = open_digits("--guidance_scales=1")
    extracted = report.extract_features(evaluator)
    curve = compare_guidance.compare_guidance_scales(evaluator, extracted, class_run)
    first = Evaluation(metrics={"recall": 0.5}, **report.evaluation_context(evaluator))
    report.write_evaluation(evaluator, replace(first, guidance=curve), class_run)
    report.write_evaluation(evaluator, replace(first, seeds=[5, 44]), class_run)
    assert read_evaluation(class_run).guidance == curve
    for change in (
        {"model": ModelVersion(version="of other weights")},
        {"features": {**first.features, "version": "of another network"}},
        {"reference": {**first.reference, "pixels_sha256": "of other images"}},
    ):
        report.write_evaluation(evaluator, replace(first, guidance=curve), class_run)
        report.write_evaluation(evaluator, replace(first, **change), class_run)
        assert read_evaluation(class_run).guidance is None
    (class_run / run_folder.EVALUATION).write_text("broken")
    report.write_evaluation(evaluator, first, class_run)
    assert read_evaluation(class_run).metrics == {"recall": 0.5}


def test_label_accuracy_is_that_of_the_generated_files(class_run, open_digits):
    """Also with images without a label, which are of no class and are not counted."""
    evaluator = open_digits("--guidance_scale=3")
    labels = [seed % 11 for seed in range(40)]
    guidance = replace(evaluator.guidance, label_of=labels.__getitem__)
    evaluator = replace(evaluator, guidance=guidance)
    vectors, predicted = evaluator.generate_and_classify()
    images = generate.generate_images(
        evaluator.model.unet, evaluator.scheduler, range(40), 40, guidance=guidance
    )
    pixels = torch.stack([image for _, image in images])
    net = load_small_classifier(DIGITS / DATASET_FEATURES)
    with torch.inference_mode():
        expected = net.classify(pixels).argmax(1)
        torch.testing.assert_close(vectors, net(pixels), rtol=1e-3, atol=2e-2)
    assert (predicted == expected).float().mean() > 0.9  # one gray level may decide
    correct = [bool(predicted[k] == label) for k, label in enumerate(labels) if label < 10]
    assert class_results.label_accuracy(evaluator, predicted) == pytest.approx(
        sum(correct) / len(correct)
    )
    assert evaluator.labels.tolist() == labels


def test_distances_and_copies_are_those_of_the_images_of_a_class(class_run, open_digits):
    """A model that "generates" training images: all of each class are copies."""
    evaluator = open_digits()
    trained = evaluator.dataset_features(evaluator.trained)
    own_labels = evaluator.trained.labels.tolist()
    guidance = replace(evaluator.guidance, label_of=own_labels.__getitem__)
    evaluator = replace(evaluator, guidance=guidance)
    is_copy = torch.zeros(40, dtype=torch.bool)
    is_copy[:7] = True
    results = class_results.measure_classes(evaluator, trained[:40], trained, None, is_copy)
    assert sum(result.copies for result in results) == 7
    for result in results:
        label = int(result.name)
        chosen = [k for k in range(40) if own_labels[k] == label]
        assert result.num_images == len(chosen)
        assert result.copies == sum(k < 7 for k in chosen)
        real = trained[evaluator.trained.labels == label]
        assert bool(result.metrics) == (len(chosen) >= 4 and len(real) >= 4)
        if result.metrics:
            expected = metrics.frechet_distance(trained[chosen], real)
            assert result.metrics["frechet_distance"] == pytest.approx(expected)
    assert {bool(result.metrics) for result in results} == {True, False}


def test_held_out_loss_is_that_of_the_labels(class_run, open_digits):
    """The UNet of one class, without a class embedding, has the losses of its images."""
    evaluator, rows = open_digits(), list(range(20))
    losses = evaluator.timestep_losses(evaluator.model.unet, evaluator.held_out, rows)
    for row in (0, 7):
        label = int(evaluator.held_out.labels[row])
        folded = fold_label(evaluator.model.unet, label)
        image = to_model(dataset_image(evaluator.held_out, row))[None]
        expected = timestep_loss.loss_by_timestep(folded, evaluator.scheduler, image, [row])
        torch.testing.assert_close(losses[row : row + 1], expected, rtol=1e-3, atol=1e-4)
    means = class_results.loss_by_class(evaluator, rows, losses)
    labels = evaluator.held_out.labels[rows]
    for name, value in means.items():
        assert value == pytest.approx(float(losses[labels == int(name)].mean()))


def test_data_without_labels_and_other_classifiers_are_measured_as_far_as_they_go(
    class_run, open_digits, make_unet, chain, capsys
):
    names = ["even", "odd"]
    pipeline.export_pipeline(make_unet(num_classes=2), chain, class_run, names)
    evaluator = open_digits(f"--dataset_name={DIGITS}", "--split=train[:60]")
    output = capsys.readouterr().out
    assert "features.safetensors has 10 logits, the model 2 classes" in output
    assert "The classes of the real images are not read: --class_conditional" in output
    assert evaluator.labels.tolist().count(0) == pytest.approx(20, abs=1)
    extracted = report.extract_features(evaluator)
    assert extracted.predicted is extracted.held_out_accuracy is None
    results = class_results.measure_classes(
        evaluator, extracted.generated, extracted.trained, None, torch.zeros(40, dtype=torch.bool)
    )
    assert [(result.name, result.metrics) for result in results] == [("even", {}), ("odd", {})]
    assert report.measure_timestep_loss(evaluator).held_out_by_class is None


class Standardizing(torch.nn.Module):
    """Pixels of an image over their standard deviation: NaN for one of a single color."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = pixels.float().flatten(1)
        values = values / values.std(1, keepdim=True)
        return values, values[:, :10]


def test_a_classifier_is_tried_with_real_images(class_run, open_digits, tmp_path):
    torch.jit.script(Standardizing()).save(str(tmp_path / "own.pt"))
    assert open_digits(f"--features={tmp_path / 'own.pt'}").has_classifier


def test_labels_of_a_model_without_classes_and_a_small_split_are_mentioned(
    open_digits, tmp_path, capsys
):
    rows = datasets.load_dataset(str(DIGITS), split="train")
    for split, count in (("train", 40), ("test", 15)):
        rows.select(range(50, 50 + count) if split == "train" else range(count)).to_parquet(
            tmp_path / "data" / f"{split}.parquet"
        )
    data = [f"--dataset_name={tmp_path / 'data'}", "--split=train", "--class_conditional"]
    features = f"--features={DIGITS / DATASET_FEATURES}"
    assert open_digits(*data, features).held_out is None
    output = capsys.readouterr().out
    assert "run has no classes: nothing is measured by the labels" in output
    assert "The held-out split test has 15 images and is left out" in output
    with pytest.raises(UserError, match="the held-out split: 15 images"):
        open_digits(*data, features, "--eval_split=test")


@pytest.mark.parametrize("flag", ["--guidance_scale=1", "--guidance_scales=0,1"])
def test_guidance_is_refused_for_a_model_without_classes(open_digits, flag):
    with pytest.raises(UsageError, match="run has no classes: leave out --guidance_scale"):
        open_digits(flag)


def test_raw_weights_have_the_classes_of_the_exported_ones(class_run, open_digits, make_unet):
    checkpoint = class_run / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / run_folder.CHECKPOINT_STATE).write_text("{}")
    evaluator = open_digits()
    save_file(evaluator.model.unet.state_dict(), checkpoint / run_folder.EMA_WEIGHTS)
    raw = make_unet(seed=1, num_classes=10).state_dict()
    save_file(raw, checkpoint / run_folder.RAW_WEIGHTS)
    loaded = evaluator.load_raw_unet().state_dict()
    assert loaded.keys() == raw.keys()
    assert all(torch.equal(loaded[name], value) for name, value in raw.items())
