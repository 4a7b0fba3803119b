"""The settings of train.py: which cannot work, and the values that are read from their text."""

import ast
import dataclasses
from pathlib import Path

import pytest

from ddpm.config import data, evaluate, push, sample, train
from ddpm.config.base import dump, nest, setting_fields
from ddpm.config.data import DataConfig
from ddpm.config.train import OptimizationConfig, TrackingConfig, TrainConfig
from ddpm.config.values import parse_color, parse_loggers
from ddpm.errors import UsageError


def refusal(**settings) -> str:
    """Return the message that refuses these settings."""
    with pytest.raises(UsageError) as error:
        nest(TrainConfig, {"dataset_name": "owner/name", **settings})
    return str(error.value)


@pytest.mark.parametrize("module", [data, train, push, sample, evaluate])
def test_every_field_is_documented(module):
    """The docstring under a field is its --help."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(kind.body, [*kind.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "Config" not in ast.unparse(field.annotation):
                assert isinstance(after, ast.Expr), field.target.id


def test_every_text_is_known_to_be_a_place_or_not():
    """A setting that names a file, a folder or an address of the user is marked as PLACE."""
    fields = setting_fields(TrainConfig).values()
    texts = {item.name for item in fields if item.type in (str, str | None) and not item.metadata}
    assert texts == {
        *("dataset_config_name", "dataset_revision", "split", "image_column", "label_column"),
        *("background", "value_range", "budget", "lr_step_rules", "pretrained_revision"),
    }


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().output_dir = "elsewhere"


@pytest.mark.parametrize(
    "name",
    [
        "resolution",
        "train_batch_size",
        "gradient_accumulation_steps",
        "num_epochs",
        "max_train_steps",
        "lr_num_cycles",
        "ddpm_num_steps",
        "ddpm_num_inference_steps",
        "eval_batch_size",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "logging_steps",
        "shuffle_buffer_size",
        "rows_per_epoch",
        "ddp_timeout",
    ],
)
def test_counts_are_at_least_one(name):
    assert refusal(**{name: 0}) == f"--{name} is 0; it must be at least 1."


@pytest.mark.parametrize(
    "name",
    [
        "learning_rate",
        "lr_warmup_steps",
        "lr_power",
        "save_images_epochs",
        "save_model_epochs",
        "seed",
        "adam_epsilon",
        "adam_weight_decay",
        "ema_power",
        "eval_steps",
        "eval_images",
    ],
)
def test_amounts_are_not_negative(name):
    assert refusal(**{name: -1}) == f"--{name} is -1; it must be 0 or more."
    nest(TrainConfig, {name: 0})


@pytest.mark.parametrize("name", ["dropout", "max_bad_images", "ema_max_decay"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_fractions_lie_between_0_and_1(name, value):
    assert refusal(**{name: value}) == f"--{name} is {value}; it must lie between 0 and 1."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_data_dir": "photos"}, "Give --dataset_name or --train_data_dir, not both"),
        ({"resolution": 100_000}, "--resolution is 100000; a UNet on pixels goes up to 2048"),
        ({"resolution": (8, 4096)}, "--resolution is 8,4096; a UNet on pixels goes up to 2048"),
        ({"resolution": (0, 80)}, "--resolution is 0,80; it must be at least 1"),
        ({"resolution": (80, -1)}, "--resolution is 80,-1; it must be at least 1"),
        (
            {"resize_mode": "pad", "center_crop": True},
            "--center_crop has no effect with --resize_mode pad",
        ),
        ({"random_shift": -1}, "--random_shift is -1; it must be 0 or more"),
        (
            {"random_shift": 8, "resolution": (32, 8)},
            "--random_shift is 8; it must be below the shorter side of the images, 8 pixels",
        ),
        (
            {"random_rotate90": True, "resolution": (8, 16)},
            "--random_rotate90 turns squares, and --resolution is 8,16: leave one out",
        ),
        ({"held_out": 1.0}, "--held_out is 1.0; give a fraction from 0 to below 1"),
        ({"held_out": float("nan")}, "--held_out is nan; give a fraction"),
        (
            {"held_out": 0.1, "streaming": True},
            "--held_out chooses among all rows, which --streaming",
        ),
        *(
            (
                {"dataset_revision": text},
                f"--dataset_revision is {text}; it must be a branch, a tag",
            )
            for text in (
                "..",
                "a/../../b",
                "/etc/passwd",
                "https://a",
                "",
                "a b",
                "a/",
                "C:\\x",
                "-x",
            )
        ),
        ({"ddpm_num_steps": 10**12}, "--ddpm_num_steps is 1000000000000; give at most 100,000"),
        ({"budget": "9" * 400 + "h"}, "give a time"),
        ({"rows_per_epoch": 9}, "--rows_per_epoch is for --streaming"),
        ({"background": "whitish"}, "--background whitish is not a color"),
        ({"value_range": "5"}, "--value_range 5 is not a range"),
        ({"value_range": "5,5"}, "--value_range 5,5 is not a range"),
        ({"logit_std": 0.0}, "--logit_std is 0.0; it must be above 0"),
        ({"snr_gamma": 0.0}, "--snr_gamma is 0.0; give a number above 0, or leave it out"),
        ({"rescale_betas_zero_snr": True}, "use --prediction_type v_prediction or sample"),
        ({"learning_rate": float("nan")}, "--learning_rate is nan; it must be 0 or more"),
        ({"max_grad_norm": 0.0}, "--max_grad_norm is 0.0; it must be above 0"),
        ({"max_grad_norm": float("nan")}, "--max_grad_norm is nan; it must be above 0"),
        ({"adam_beta1": 1.0}, "--adam_beta1 is 1.0; give 0 to below 1"),
        ({"adam_beta2": -0.1}, "--adam_beta2 is -0.1; give 0 to below 1"),
        ({"ema_inv_gamma": 0.0}, "--ema_inv_gamma is 0.0; it must be above 0"),
        ({"ddp_timeout": 604_801}, "--ddp_timeout is 604801 s; at most 604800 s, a week."),
        ({"budget": "soon"}, "--budget soon: give a time such as 45s"),
        ({"budget": "0m"}, "--budget 0m: give a time"),
        ({"budget": "2h "}, "--budget 2h : give a time"),
        ({"lr_scheduler": "piecewise_constant"}, "--lr_step_rules go together"),
        ({"lr_step_rules": "1:10,0.1"}, "--lr_scheduler piecewise_constant and"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_step_rules": "10:x"},
            "--lr_step_rules 10:x: give factor:step pairs",
        ),
        (
            {"lr_scheduler": "polynomial", "learning_rate": 1e-8},
            "polynomial ends at 1e-7",
        ),
        ({"eval_steps": 9, "eval_images": 15}, "--eval_images is 15: a distance of fewer than 16"),
        ({"eval_images": 16}, "--eval_images has no effect without --eval_steps"),
        ({"keep_best": True}, "--keep_best has no effect without --eval_steps"),
        ({"eval_steps": 9, "features": "x.pt"}, "--features has no effect without --eval_images"),
        ({"class_dropout_prob": 0.3}, "--class_dropout_prob 0.3 has no effect without classes"),
        ({"ddpm_num_steps": 20}, "--ddpm_num_inference_steps is 25, more than the 20 timesteps"),
        ({"output_dir": __file__}, "is a file: give a folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    assert message in refusal(**settings)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("90m", 5400), ("2h", 7200), ("1h30m", 5400), ("0.5d", 43200), (None, None)],
)
def test_budget_is_a_time(text, seconds):
    assert OptimizationConfig(budget=text).budget_seconds == seconds


def test_value_range_is_two_numbers():
    assert DataConfig(value_range="-1,0.5").value_limits == (-1.0, 0.5)
    assert DataConfig().value_limits is None


def test_loggers_are_one_or_several(tmp_path):
    """A file of before, with one name, reads as it did; each name counts once."""
    assert TrackingConfig(logger="wandb") == TrackingConfig(logger=("wandb", "wandb"))
    assert TrackingConfig(logger=()).loggers == TrackingConfig(logger="none").loggers == ()
    path = tmp_path / "config.json"
    for loggers in ("wandb", ("wandb", "tensorboard")):
        config = TrainConfig(tracking=TrackingConfig(logger=loggers))
        path.write_text(dump(config))
        assert TrainConfig.from_json(path) == config
    with pytest.raises(UsageError, match="none,wandb: leave out none, or the others"):
        TrackingConfig(logger=("none", "wandb"))
    for text in ("", "wandb,their.module"):
        with pytest.raises(UsageError, match="is no tracker: give one or more of none, wandb, "):
            parse_loggers(text)


def test_color_is_a_name_or_hex():
    assert parse_color("white") == (255, 255, 255)
    assert parse_color("#010203") == (1, 2, 3)
