"""diffusers' unconditional example: its command lines and its tests' cases, with train.py in place.

The dataset and the UNet's config are served by the tests' Hub under the names that the real Hub
has them.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.config import parser
from ddpm.config.base import flatten
from ddpm.config.parser import parse_train
from ddpm.config.train import TrainConfig
from ddpm.errors import UsageError
from tests.conftest import ROOT
from tests.tiny import TINY_UNET

FLAGS_OF_THE_EXAMPLE = """
--dataset_name=a/b --dataset_config_name=c --model_config_name_or_path=d --output_dir=e
--overwrite_output_dir --cache_dir=f --resolution=32 --center_crop --random_flip
--train_batch_size=2 --eval_batch_size=3 --dataloader_num_workers=4 --num_epochs=5
--save_images_epochs=6 --save_model_epochs=7 --gradient_accumulation_steps=8 --learning_rate=9e-5
--lr_scheduler=linear --lr_warmup_steps=10 --adam_beta1=0.5 --adam_beta2=0.6
--adam_weight_decay=0.01 --adam_epsilon=1e-7 --use_ema --ema_inv_gamma=2 --ema_power=0.5
--ema_max_decay=0.9 --push_to_hub --hub_model_id=g/h --hub_private_repo
--logger=tensorboard --logging_dir=i --local_rank=0 --mixed_precision=bf16 --prediction_type=sample
--ddpm_num_steps=100 --ddpm_num_inference_steps=11 --ddpm_beta_schedule=scaled_linear
--checkpointing_steps=12 --checkpoints_total_limit=13 --resume_from_checkpoint=latest
--enable_xformers_memory_efficient_attention --preserve_input_precision
"""

README_FLOWERS = """
--dataset_name="huggan/flowers-102-categories" --resolution=64 --center_crop --random_flip
--output_dir="ddpm-ema-flowers-64" --train_batch_size=16 --num_epochs=100
--gradient_accumulation_steps=1 --use_ema --learning_rate=1e-4 --lr_warmup_steps=500
--mixed_precision=no --push_to_hub
"""
README_POKEMON = README_FLOWERS.replace("flowers-102-categories", "pokemon").replace(
    "ddpm-ema-flowers-64", "ddpm-ema-pokemon-64"
)
README_MANY_GPUS = README_POKEMON.replace(
    "--mixed_precision=no --push_to_hub", '--mixed_precision="fp16" --logger="wandb"'
)


def split(command: str) -> list[str]:
    """Split a command as a shell does."""
    return command.replace('"', "").split()


# Flags


def test_every_flag_of_the_example_has_its_meaning(capsys):
    """Flags without effect are accepted, each with a line that gives the reason."""
    values = flatten(parse_train(split(FLAGS_OF_THE_EXAMPLE)))
    expected = {
        "dataset_name": "a/b",
        "dataset_config_name": "c",
        "output_dir": "e",
        "model_config_name_or_path": "d",
        "overwrite_output_dir": True,
        "cache_dir": "f",
        "resolution": 32,
        "center_crop": True,
        "random_flip": True,
        "train_batch_size": 2,
        "eval_batch_size": 3,
        "num_epochs": 5,
        "save_images_epochs": 6,
        "save_model_epochs": 7,
        "gradient_accumulation_steps": 8,
        "learning_rate": 9e-5,
        "lr_scheduler": "linear",
        "lr_warmup_steps": 10,
        "adam_beta1": 0.5,
        "adam_beta2": 0.6,
        "adam_weight_decay": 0.01,
        "adam_epsilon": 1e-7,
        "use_ema": True,
        "ema_inv_gamma": 2.0,
        "ema_power": 0.5,
        "ema_max_decay": 0.9,
        "push_to_hub": True,
        "hub_model_id": "g/h",
        "hub_private_repo": True,
        "logger": "tensorboard",
        "logging_dir": "i",
        "mixed_precision": "bf16",
        "prediction_type": "sample",
        "ddpm_num_steps": 100,
        "ddpm_num_inference_steps": 11,
        "ddpm_beta_schedule": "scaled_linear",
        "checkpointing_steps": 12,
        "checkpoints_total_limit": 13,
        "resume_from_checkpoint": "latest",
    }
    assert {name: values[name] for name in expected} == expected
    warnings = capsys.readouterr().err
    for name in parser.IGNORED_FLAGS:
        assert warnings.count(f"--{name} has no effect: ") == 1
    assert len(warnings.splitlines()) == len(parser.IGNORED_FLAGS) == 4


@pytest.mark.parametrize("command", [README_FLOWERS, README_POKEMON, README_MANY_GPUS])
def test_command_lines_of_its_documentation_are_accepted(command, capsys):
    values = flatten(parse_train(split(command)))
    assert values["output_dir"].startswith("ddpm-ema-") and values["resolution"] == 64
    assert values["push_to_hub"] is not (values["logger"] == "wandb")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("form", [["--hub_token=canary"], ["--hub-token", "canary"]])
def test_a_token_on_the_command_line_is_refused_with_what_to_do(form, capsys):
    with pytest.raises(UsageError, match="hf auth login. or set HF_TOKEN") as caught:
        parse_train(["--dataset_name=a/b", *form, "--resolution=32"])
    output = capsys.readouterr()
    assert "canary" not in f"{caught.value}{output.err}{output.out}"


def test_only_the_first_process_prints(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    parse_train(split(FLAGS_OF_THE_EXAMPLE))
    assert capsys.readouterr().err == ""


# Its test-suite


@pytest.fixture(scope="session")
def served(session_hub, tmp_path_factory):
    """Six images of two classes under the names of two datasets, and the config of a UNet."""
    hub, tmp_path = session_hub, tmp_path_factory.mktemp("served")
    noise, files = np.random.default_rng(0), {}
    for index in range(6):
        pixels = noise.integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "one.png")
        kind = "cats" if index % 2 else "dogs"
        files[f"train/{kind}/{index}.png"] = (tmp_path / "one.png").read_bytes()
    for name in ("hf-internal-testing/dummy_image_class_data", "huggan/flowers-102-categories"):
        hub.create_repo("dataset", name).write(files, "six")
    config = json.dumps({**TINY_UNET, "sample_size": 64}).encode()
    hub.create_repo("model", "diffusers/ddpm_dummy").write({"config.json": config}, "tiny")


@pytest.fixture
def dummies(hub, served, tmp_path):
    """The environment of a user who is logged in to that Hub."""
    return hub.env(hub.add_user("alice"), tmp_path / "home")


def example(folder: Path, *more: str) -> list[str]:
    return [
        "train.py",
        "--dataset_name",
        "hf-internal-testing/dummy_image_class_data",
        "--model_config_name_or_path",
        "diffusers/ddpm_dummy",
        "--resolution",
        "64",
        "--output_dir",
        str(folder),
        "--gradient_accumulation_steps",
        "1",
        "--learning_rate",
        "1e-3",
        "--lr_warmup_steps",
        "5",
        *more,
    ]


def checkpoints(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if "checkpoint" in name}


@pytest.mark.slow
def test_train_unconditional(script, dummies, tmp_path):
    flags = ["--train_batch_size", "2", "--num_epochs", "1", "--ddpm_num_inference_steps", "2"]
    done = script(*example(tmp_path / "run", *flags), env=dummies, launch=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "run" / "scheduler" / "scheduler_config.json").is_file()


@pytest.mark.slow
def test_unconditional_checkpointing_checkpoints_total_limit(script, dummies, tmp_path):
    flags = [
        "--train_batch_size",
        "1",
        "--num_epochs",
        "1",
        "--ddpm_num_inference_steps",
        "2",
        "--checkpointing_steps=2",
        "--checkpoints_total_limit=2",
    ]
    done = script(*example(tmp_path / "run", *flags), env=dummies, launch=True)
    assert done.returncode == 0, done.stderr
    assert checkpoints(tmp_path / "run") == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.slow
def test_unconditional_checkpointing_removes_multiple_checkpoints(script, dummies, tmp_path):
    common = [
        "--train_batch_size",
        "1",
        "--ddpm_num_inference_steps",
        "1",
        "--checkpointing_steps=2",
    ]
    done = script(
        *example(tmp_path / "run", *common, "--num_epochs", "1"), env=dummies, launch=True
    )
    assert done.returncode == 0, done.stderr
    assert checkpoints(tmp_path / "run") == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    again = example(
        tmp_path / "run",
        *common,
        "--num_epochs",
        "2",
        "--resume_from_checkpoint=checkpoint-6",
        "--checkpoints_total_limit=2",
    )
    done = script(*again, env=dummies, launch=True)
    assert done.returncode == 0, done.stderr
    assert "num_epochs was 1, now 2" in done.stdout
    assert checkpoints(tmp_path / "run") == {"checkpoint-10", "checkpoint-12"}


# Its documentation, shortened to two steps of a tiny UNet


@pytest.mark.slow
def test_flowers_is_trained_and_pushed(hub, script, dummies, tmp_path):
    short = [
        "--max_train_steps=2",
        "--model_config_name_or_path=diffusers/ddpm_dummy",
        "--ddpm_num_inference_steps=2",
    ]
    command = [str(ROOT / "train.py"), *split(README_FLOWERS), *short]
    token = dummies["HF_TOKEN"]
    env = {name: value for name, value in dummies.items() if name != "HF_TOKEN"}
    refused = script(*command, env=env, cwd=tmp_path)
    assert refused.returncode == 1 and "hf auth login" in refused.stderr
    assert not (tmp_path / "ddpm-ema-flowers-64").exists()

    private = ["--hub_private_repo", "--logger=wandb"]
    given = script(*command, *private, f"--hub_token={token}", env=env, cwd=tmp_path, launch=True)
    assert given.returncode != 0 and "set HF_TOKEN" in given.stderr
    assert token not in given.stdout + given.stderr, "accelerate printed the command line"
    done = script(*command, *private, env=dummies, cwd=tmp_path, launch=True)
    assert done.returncode == 0, done.stderr
    assert "Published and proved: " in done.stdout
    model = hub.repo("model", "alice/ddpm-ema-flowers-64")
    assert model.is_private and len(model.commits()) == 2
    assert re.search(r"Next: python sample.py alice/ddpm-ema-flowers-64 --revision", done.stdout)

    # The token is in no file: not in the settings, and not where W&B notes the command line.
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert not [path for path in written if token.encode() in path.read_bytes()]
    assert token not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_folder_and_half_precision_without_a_gpu(script, pictures, tmp_path):
    """`--train_data_dir <path>`; fp16 is for GPUs, so it is an error message here."""
    command = [
        "train.py",
        "--train_data_dir",
        pictures,
        "--resolution=8",
        "--max_train_steps=2",
        "--output_dir",
        tmp_path / "run",
        "--mixed_precision=fp16",
    ]
    done = script(*command, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert "error: --mixed_precision fp16 needs a GPU" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


# The page about it


def test_tests_that_the_page_names_exist():
    page = (ROOT / "docs" / "from-diffusers.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", page))
    assert len(named) > 30
    sources = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*")}
    assert not [name for file, name in named if f"def {name}(" not in sources.get(file, "")]


def test_every_flag_that_the_page_names_is_accepted():
    page = (ROOT / "docs" / "from-diffusers.md").read_text(encoding="utf-8")
    known = {*flatten(TrainConfig()), *parser.IGNORED_FLAGS, "hub_token", "help"}
    flags = {name.removeprefix("no_") for name in re.findall(r"--(\w+)", page)}
    assert len(flags) > 30 and not flags - known
