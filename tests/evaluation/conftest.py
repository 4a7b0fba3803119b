"""A run folder with an untrained model of the digits, opened for evaluation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

DIGITS = Path(__file__).parents[2] / "data" / "digits"


@pytest.fixture
def digits_run(tmp_path, make_unet, chain) -> Path:
    """A run folder: an untrained model with 20 timesteps, and the config that names its data."""
    from ddpm import run_folder
    from ddpm.sampling import pipeline

    folder = tmp_path / "run"
    pipeline.export_pipeline(make_unet(), chain, folder)
    config = {"dataset_name": str(DIGITS), "resolution": 8, "split": "train[:60]"}
    (folder / run_folder.TRAIN_CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture
def open_digits(digits_run) -> Callable:
    """open_digits(*flags, model=folder) -> an evaluator of 40 images in 2 steps."""
    from ddpm.accelerator import make_accelerator
    from ddpm.config.parser import given_flags, parse_evaluate
    from ddpm.evaluation.evaluator import complete_config, open_evaluator

    def open_model(*flags: str, model: Path = digits_run):
        argv = [str(model), "--num_images=40", "--batch_size=16", *flags]
        if "--samplers" not in flags:
            argv.insert(1, "--num_inference_steps=2")
        config = complete_config(parse_evaluate(argv), given_flags(argv))
        return open_evaluator(make_accelerator(None), config)

    return open_model
