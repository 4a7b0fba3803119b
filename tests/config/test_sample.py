"""The settings of sample.py: values out of range, and contradictions."""

import pytest

from ddpm.config.sample import SampleConfig
from ddpm.errors import UsageError


def refusal(**settings) -> str:
    """Return the message that refuses these settings."""
    with pytest.raises(UsageError) as error:
        SampleConfig(**settings)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    ["num_images", "batch_size", "num_inference_steps", "num_resamples", "height", "width"],
)
def test_sample_counts_are_at_least_one(name):
    message = refusal(model="m", **{"prompt": "x", name: 0})
    assert message == f"--{name} is 0; it must be at least 1."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "Name a MODEL"),
        ({"num_images": 10**9 + 1}, "give at most 1,000,000,000"),
        ({"seed": -1}, "--seed -1: give a number from 0 to 2**63"),
        ({"seed": 2**63 - 1}, "give a number from 0 to 2**63"),
        ({"interpolate": (1, -2)}, "--seed -2"),
        ({"output_dir": __file__}, "is a file: give a folder"),
        ({"background": "whitish", "image": "i.png"}, "--background whitish is not a color"),
        ({"quality": "good", "scheduler": "ddim"}, "so --scheduler does not go with it"),
        ({"quality": "best", "num_inference_steps": 9}, "so --num_inference_steps does not go"),
        ({"quality": "fast", "prompt": "x"}, "so --prompt does not go with it"),
        ({"quality": "fast", "like": "a.png"}, "so --like does not go with it"),
        ({"quality": "fast", "verify": True}, "so --verify does not go with it"),
        ({"noise_level": 0.5}, "--noise_level has no effect without --image"),
        ({"mask": "m.png"}, "--mask has no effect without --image"),
        ({"strength": 0.5, "image": "i.png"}, "--strength has no effect without --prompt"),
        ({"height": 64}, "--height has no effect without --prompt"),
        ({"image": "i.png", "noise_level": 0.0}, "--noise_level is 0.0; give a number above 0"),
        ({"image": "i.png", "noise_level": 1.5}, "up to 1"),
        ({"prompt": "x", "trajectory": True}, "--prompt and --trajectory do different things"),
        ({"image": "i.png", "interpolate": (1, 2)}, "--image and --interpolate"),
        ({"image": "i.png", "mask": "m", "noise_level": 0.5}, "--mask and --noise_level"),
        ({"class_label": "1", "prompt": "x"}, "--class_label does not go with --prompt"),
        ({"class_label": "1", "verify": True}, "--class_label does not go with --verify"),
        ({"class_label": "all", "image": "i.png"}, "--class_label all does not go with --image"),
        ({"class_label": "all", "like": "a.png"}, "--class_label all does not go with --like"),
        ({"class_label": "all", "interpolate": (1, 2)}, "all does not go with --interpolate"),
        ({"guidance_scale": 2.0}, "no effect without --class_label or --prompt"),
        ({"guidance_interval": "0,1"}, "--guidance_interval has no effect without --class_label"),
        ({"class_label": "1", "guidance_scale": 101.0}, "--guidance_scale is 101.0; give a number"),
        ({"class_label": "1", "guidance_scale": float("nan")}, "--guidance_scale is nan; give"),
        ({"prompt": "x", "guidance_scale": float("-inf")}, "--guidance_scale is -inf; give"),
        (
            {"class_label": "1", "guidance_interval": "0.8,0.2"},
            "the lower one first",
        ),
        ({"class_label": "1", "guidance_interval": "0.5,0.5"}, "give two numbers from 0 to 1"),
        ({"class_label": "1", "guidance_interval": "0.5"}, "give two numbers from 0 to 1"),
        ({"class_label": "1", "guidance_interval": "0,1,1"}, "give two numbers from 0 to 1"),
        ({"class_label": "1", "guidance_interval": "-0.1,1"}, "give two numbers from 0 to 1"),
        ({"class_label": "1", "guidance_interval": "nan,1"}, "give two numbers from 0 to 1"),
        ({"class_label": "1", "guidance_interval": "a,b"}, "give two numbers from 0 to 1"),
        ({"image": "i.png", "npz": True}, "restoring --image makes none"),
    ],
)
def test_sample_settings_that_cannot_work_are_refused(settings, message):
    assert message in refusal(**{"model": "m", **settings})


def test_class_settings_that_work_are_accepted():
    settings = {"class_label": "1", "guidance_scale": -9.5, "guidance_interval": "0,.5"}
    assert SampleConfig(model="m", **settings).guidance_levels == (0.0, 0.5)
    SampleConfig(model="m", class_label="all", image="i.png", mask="m.png")


def test_model_is_optional_with_like():
    assert SampleConfig(like="a.png").model is None
