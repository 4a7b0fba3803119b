"""Measured guidance scales in evaluation.json: which is best, and what is refused."""

import copy

import pytest

from ddpm import file_io
from ddpm.errors import UserError
from ddpm.evaluation.results import Evaluation, ModelVersion, read_evaluation
from ddpm.run_folder import EVALUATION
from ddpm.sampling import sampler_results
from ddpm.sampling.guidance_results import (
    GuidanceCurve,
    GuidanceResult,
    read_guidance_curve,
    read_guidance_scale,
)


def make_result(scale: float, distance: float, accuracy: float | None = None, noise: float = 0.01):
    """An entry whose distance is `noise` higher without one group, and lower without another."""
    values = {
        "frechet_distance": distance,
        "kernel_distance": 0.1,
        "precision": 0.5,
        "recall": 0.25,
    }
    if accuracy is not None:
        values["label_accuracy"] = accuracy
    leaving_out = (distance + noise, distance - noise, *[distance] * 8)
    return GuidanceResult(guidance_scale=scale, metrics=values, leaving_out=leaving_out)


def make_curve(*entries: GuidanceResult) -> GuidanceCurve:
    return GuidanceCurve(
        num_images=1000, seeds=[0, 999], scheduler="ddim", num_inference_steps=5, entries=entries
    )


CURVE = make_curve(
    make_result(0, 1.9, 0.1), make_result(1, 2.01, 0.8, noise=0.1), make_result(1.5, 2.0, 0.9)
)


@pytest.fixture
def folder(class_folder):
    weights = sampler_results.unet_weights_sha256(class_folder)
    evaluation = Evaluation(
        metrics={"frechet_distance": 2.01}, model=ModelVersion(version=weights), guidance=CURVE
    )
    evaluation.write(class_folder / EVALUATION)
    return class_folder


def test_the_best_scale_has_the_lowest_distance_of_those_with_a_class(folder):
    assert read_guidance_scale(folder) == 1.5 and read_guidance_curve(folder) == CURVE
    verdicts = [CURVE.verdict(entry) for entry in CURVE.entries]
    assert verdicts == ["without a class", "as good as the best", "best"]
    worse = make_curve(make_result(1, 9.0), make_result(2, 2.0))
    assert [worse.verdict(entry) for entry in worse.entries] == ["", "best"]
    no_class = make_curve(make_result(0, 1.0))
    assert no_class.best_scale == 2.0 and no_class.verdict(no_class.best) == "without a class"


def test_scales_of_other_weights_are_not_used(folder):
    entries = file_io.read_json(folder / EVALUATION)
    for model in ({"version": "other"}, {"size": 5}):
        file_io.write_json(folder / EVALUATION, {**entries, "model": model})
        assert read_guidance_scale(folder) is None
    file_io.write_json(folder / EVALUATION, {"metrics": {"fid": 3.2}})  # as people write it
    assert read_guidance_scale(folder) is None
    (folder / EVALUATION).unlink()
    assert read_guidance_scale(folder) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", -1),
        ("guidance_scale", 1e9),
        ("guidance_scale", "2"),
        ("guidance_scale", None),
        ("metrics", {}),
        ("metrics", {"fid": 1.0}),
        ("metrics", {"frechet_distance": 1e300}),
        ("leaving_out", [1.0]),
        ("leaving_out", [1.0] * 9),
    ],
)
def test_a_bad_entry_of_a_foreign_file_is_refused(folder, name, value):
    entries = copy.deepcopy(file_io.read_json(folder / EVALUATION))
    entries["guidance"]["entries"][1][name] = value
    file_io.write_json(folder / EVALUATION, entries)
    for read in (read_guidance_scale, read_evaluation):
        with pytest.raises(UserError, match="evaluation.json: guidance"):
            read(folder)


@pytest.mark.parametrize(
    "change", [{"entries": []}, {"seeds": [1]}, {"num_images": "x"}, {"scheduler": 3}], ids=str
)
def test_a_curve_that_cannot_be_is_refused(folder, change):
    entries = file_io.read_json(folder / EVALUATION)
    entries["guidance"] |= change
    file_io.write_json(folder / EVALUATION, entries)
    with pytest.raises(UserError, match="evaluation.json: guidance"):
        read_guidance_scale(folder)
