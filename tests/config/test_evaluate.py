"""The settings of evaluate.py: contradictions, and settings of a run."""

import json

import pytest

from ddpm.config.base import flatten
from ddpm.config.data import DataConfig
from ddpm.config.evaluate import EvaluateConfig
from ddpm.config.train import TrainConfig
from ddpm.errors import UsageError, UserError


def refusal(**settings) -> str:
    """Return the message that refuses these settings."""
    with pytest.raises(UsageError) as error:
        EvaluateConfig(**settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("samplers", "choices"),
    [
        ((), []),
        (("ddim:10", "ddpm", "unipc:7"), [("ddim", 10), ("ddpm", None), ("unipc", 7)]),
    ],
)
def test_samplers_are_names_and_steps(samplers, choices):
    assert EvaluateConfig(model="run", samplers=samplers).sampler_choices == choices


@pytest.mark.parametrize(
    ("samplers", "message"),
    [
        (["ddim:10", "ddim:010", "ddim"], "names ddim:10 twice"),
        (["dmim:10"], "--samplers dmim:10: 'dmim' is no sampler. Did you mean ddim?"),
        (["/a/run"], "--samplers /a/run: '/a/run' is no sampler. Give one of ddpm, ddim,"),
        (["ddim:"], "--samplers ddim:: give a number of steps after the colon, as in ddim:10"),
        (["ddim:0"], "--samplers ddim:0: give a number"),
        (["ddim:5,10"], "--samplers ddim:5,10: give a number"),
        (["ddim:-5"], "--samplers ddim:-5: give a number"),
    ],
)
def test_samplers_that_cannot_be_compared_are_refused(samplers, message):
    assert message in refusal(model="run", samplers=tuple(samplers))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 0}, "--num_images is 0; it must be at least 1"),
        ({"seed": -1}, "--seed -1"),
        ({"revision": "a/../b"}, "--revision is a/../b; it must be a branch, a tag or a commit"),
        ({"samplers": (), "scheduler": "ddpm"}, "--scheduler has no effect with --samplers"),
        ({"samplers": (), "num_inference_steps": 9}, "--num_inference_steps has no effect with"),
        ({"samplers": (), "ema_lengths": "0.1"}, "--samplers and --ema_lengths are two commands"),
        ({"samplers": (), "guidance_scales": "1"}, "--samplers and --guidance_scales are two"),
        *(({"guidance_scales": t}, "numbers from 0, no class, to 100") for t in ("", "1,", "nan")),
        *(({"guidance_scales": t}, "--guidance_scales: give") for t in ("-1", "1,101", "inf")),
        ({"guidance_scale": -0.5}, "--guidance_scale: give numbers from 0"),
        ({"export_best": True}, "--export_best has no effect without --ema_lengths"),
        *(({"ema_lengths": text}, "give numbers above 0, to 0.28") for text in ("0", "0.3", "nan")),
        *(({"ema_lengths": text}, "give numbers above 0, to 0.28") for text in ("", "0.05,", "a")),
    ],
)
def test_evaluate_settings_that_cannot_work_are_refused(settings, message):
    assert message in refusal(model="run", **settings)


def test_guidance_scales_are_ascending_numbers():
    assert EvaluateConfig(model="run", guidance_scales="4,0,1,1.0").scales == (0, 1, 4)


def test_ema_lengths_are_ascending_numbers():
    assert EvaluateConfig(model="run", ema_lengths="0.10,0.02,0.1").sigma_rels == (0.02, 0.10)
    assert EvaluateConfig(model="run").sigma_rels == ()


def test_data_settings_of_the_run_are_used_where_no_flag_was_given(tmp_path):
    path = tmp_path / "train_config.json"
    run = {"dataset_name": "a/b", "resolution": 8, "split": "all", "seed": 5, "learning_rate": 1}
    run |= {"streaming": True, "rows_per_epoch": 9}
    path.write_text(json.dumps(run))
    config = EvaluateConfig(model="run", data=DataConfig(resolution=64))

    merged = config.with_settings_of_run(path, set())
    assert merged.data == DataConfig(dataset_name="a/b", resolution=8, split="all")
    assert merged.held_out_seed == 5
    merged = config.with_settings_of_run(path, {"resolution", "held_out_seed"})
    assert merged.data == DataConfig(dataset_name="a/b", resolution=64, split="all")
    assert merged.held_out_seed == 0


def test_another_dataset_does_not_get_the_split_of_the_run(tmp_path):
    path = tmp_path / "train_config.json"
    path.write_text(json.dumps({"dataset_name": "a/b", "resolution": 8, "split": "all"}))
    config = EvaluateConfig(model="run", data=DataConfig(train_data_dir="photos"))
    merged = config.with_settings_of_run(path, {"train_data_dir"})
    assert merged.data == DataConfig(train_data_dir="photos", resolution=8)


def test_settings_of_a_run_are_checked(tmp_path):
    path = tmp_path / "train_config.json"
    for settings, message in (
        ({"dataset_name": 5}, "dataset_name is 5; it must be a text"),
        ({"dataset_revision": "../.."}, "--dataset_revision is ../..; it must be a branch"),
        ({"seed": -1}, "--held_out_seed is -1; it must be 0 or more"),
    ):
        path.write_text(json.dumps(settings))
        with pytest.raises(UserError, match=message):
            EvaluateConfig(model="run").with_settings_of_run(path, set())


def test_a_model_on_the_hub_names_no_place_of_this_machine(tmp_path):
    """Its train_config.json is somebody else's."""
    path, known = tmp_path / "train_config.json", DataConfig(dataset_name="a/b", resolution=8)
    settings = {**flatten(known), "cache_dir": "/home/you", "features": "net.pt", "seed": 3}
    path.write_text(json.dumps(settings))
    merged = EvaluateConfig(model="they/m").with_settings_of_run(path, set(), on_hub=True)
    assert merged == EvaluateConfig(model="they/m", data=known, held_out_seed=3)
    path.write_text(json.dumps({**flatten(TrainConfig()), "train_data_dir": "photos"}))
    merged = EvaluateConfig(model="they/m").with_settings_of_run(path, set(), on_hub=True)
    assert merged.data == DataConfig()
