"""Configs as flat JSON: what is written is read back, and what does not fit is refused."""

import dataclasses
import json

import pytest

from ddpm.config.base import (
    dump,
    flatten,
    leads_outside,
    nest,
    read_settings,
    without_checks,
)
from ddpm.config.train import TrainConfig
from ddpm.errors import UsageError, UserError

OTHER_VALUES = {
    "ddpm_beta_schedule": "scaled_linear",
    "prediction_type": "sample",
    "lr_scheduler": "piecewise_constant",
    "mixed_precision": "bf16",
    "compile": "off",
    "cpu_wait_policy": "passive",
    "logger": "wandb",
    "train_data_dir": None,
    "dataset_revision": "refs/convert/parquet",
    "model_config_name_or_path": None,  # refused with a pretrained model
    "pretrained_revision": "v1.0",
    "resize_mode": "stretch",
    "center_crop": False,  # refused with "stretch"
    "background": "#102030",
    "value_range": "-1,0.5",
    "channels": 3,
    "rows_per_epoch": 7,
    "max_bad_images": 0.25,
    "held_out": 0.0,  # refused with streaming
    "snr_gamma": 5.0,
    "timestep_sampling": "logit_normal",
    "max_train_steps": 7,
    "budget": "1h30m",
    "lr_step_rules": "1:10,0.5",
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "checkpoints_total_limit": 3,
    "ddpm_num_steps": 77,
    "class_dropout_prob": 0.2,
    "dropout": 0.1,
    "ema_max_decay": 0.5,
    "eval_images": 16,
}


def other_value(name: str, default):
    """Return a valid value that is not the default."""
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)):
        return default * 2 + 1
    return "a value, with = and 'quotes' and ünïcode --seed"


def write(path, values) -> str:
    path.write_text(json.dumps(values))
    return path


def test_every_field_survives_json(tmp_path):
    flat = {name: other_value(name, value) for name, value in flatten(TrainConfig()).items()}
    config = nest(TrainConfig, {**flat, "dry_run": False})
    (tmp_path / "train_config.json").write_text(dump(config))
    assert TrainConfig.from_json(tmp_path / "train_config.json") == config


def test_flat_names_are_unique():
    names = [item.name for item in dataclasses.fields(TrainConfig)]
    for section in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(section.type):
            names.remove(section.name)
            names += [item.name for item in dataclasses.fields(section.type)]
    assert len(set(names)) == len(names) > 50
    assert list(flatten(TrainConfig())) == names or set(flatten(TrainConfig())) == set(names)


def test_absent_settings_have_their_defaults(tmp_path):
    config = TrainConfig.from_json(write(tmp_path / "run.json", {"resolution": 32}))
    assert config == nest(TrainConfig, {"resolution": 32})
    assert config.optimization == TrainConfig().optimization


def test_settings_that_a_flag_may_still_change_are_not_checked():
    config = without_checks(TrainConfig, {"eval_images": 16, "budget": "soon"})
    assert config.evaluation.eval_images == 16 and config.optimization.budget == "soon"
    assert config.data == TrainConfig().data
    with pytest.raises(UsageError):
        nest(TrainConfig, flatten(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1}, "'learning_rat', which is no setting. Did you mean learning_rate?"),
        ({"zzzz": 1}, "'zzzz', which is no setting. train.py --help lists them"),
        ({"resolution": [1]}, r"resolution is \[1\]; it must be a whole number or a list of 2"),
        ({"resolution": [8, 8, 8]}, "resolution is .*; it must be a whole number or a list of 2"),
        ({"resolution": [8, 8.5]}, "resolution is .*; it must be a whole number or a list of 2"),
        ({"resolution": "48,80"}, "resolution is '48,80'; it must be a whole number or a list"),
        ({"resolution": {"a": 1}}, "resolution is .*; it must be a whole number"),
        ({"resolution": "sixty"}, "resolution is 'sixty'; it must be a whole number"),
        ({"resolution": True}, "resolution is True; it must be a whole number"),
        ({"resolution": 64.5}, "resolution is 64.5; it must be a whole number"),
        ({"resolution": None}, "resolution is None; it must be a whole number"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"use_ema": None}, "use_ema is None; it must be true or false"),
        ({"use_ema": 1}, "use_ema is 1; it must be true or false"),
        ({"use_ema": "yes"}, "use_ema is 'yes'; it must be true or false"),
        ({"channels": 2}, "channels is 2; it must be one of 1, 3, 4"),
        ({"budget": 90}, "budget is 90; it must be a text"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, values, message):
    path = write(tmp_path / "run.json", values)
    with pytest.raises(UsageError, match=message) as error:
        read_settings(TrainConfig, path)
    assert str(error.value).startswith(str(path))


def test_file_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "run.json").write_text("resolution: 64")
    with pytest.raises(UserError, match=r"run\.json cannot be read as JSON"):
        read_settings(TrainConfig, tmp_path / "run.json")


def test_other_names_can_be_ignored(tmp_path):
    path = write(tmp_path / "run.json", {"resolution": 32, "private_note": "of mine"})
    assert read_settings(TrainConfig, path, unknown="ignore") == {"resolution": 32}


@pytest.mark.parametrize("text", ["a\x1b[2J", "a\nerror: b", "\0", "a" * 4097], ids=len)
def test_text_that_is_long_or_that_a_terminal_would_obey_is_refused(tmp_path, text):
    path = write(tmp_path / "run.json", {"background": text})
    with pytest.raises(UsageError, match="background is .*; give a text of one line") as error:
        read_settings(TrainConfig, path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "values",
    [{"hub_token": "secret"}, {"seed": "hf_" + "a1B2" * 8}, {"hf_" + "a1B2" * 8: "secret"}],
    ids=["name", "value", "key"],
)
def test_a_token_in_a_file_is_refused_and_not_repeated(tmp_path, values):
    path = write(tmp_path / "run.json", values)
    with pytest.raises(UsageError, match="looks like a token.*hf auth login") as error:
        read_settings(TrainConfig, path)
    assert "secret" not in str(error.value) and "a1B2" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "is_outside"),
    [
        *((place, False) for place in ("photos", "./data/digits", "owner/name", "a..b/c", "", ".")),
        *((place, True) for place in ("/x", "~", "~you/x", "..", "a/../b", "a\\..\\b", "\\x")),
        *((place, True) for place in ("C:x", "hub://a/b", "file:a", "zip::a", "https://a/b")),
        (None, False),
    ],
)
def test_places_outside_the_working_directory_are_known(place, is_outside):
    assert leads_outside(place) is is_outside
