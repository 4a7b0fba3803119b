"""Every recipe parses and builds its model; those with data in this repository train."""

import json
import os
import re
from pathlib import Path

import datasets
import pytest
import torch

from ddpm.accelerator import make_accelerator
from ddpm.config.parser import parse_train
from ddpm.diffusion.unet import build_scheduler, build_unet
from ddpm.publishing.background import Publisher
from ddpm.training import loop
from tests import tiny
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.json"))
NAMES = [path.stem for path in RECIPES]
LOCAL = [path for path in RECIPES if json.loads(path.read_text())["dataset_name"][0] == "."]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Recipes name their data relative to the repository."""
    monkeypatch.chdir(ROOT)


def test_the_page_lists_every_recipe():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[([\w-]+)\]\(\.\./recipes/([\w-]+)\.json\)", page, re.M)
    assert sorted(listed) == sorted((name, name) for name in NAMES)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_parses_and_builds_its_model(path):
    """The command line refuses unknown settings; the model is built on the meta device."""
    recipe = json.loads(path.read_text())
    config = parse_train(["--config", str(path)])
    assert config.data.dataset_name == recipe["dataset_name"]
    assert config.data.resolution == recipe["resolution"]
    assert config.output_dir.startswith("ddpm-")
    channels = config.data.channels or (1 if path.stem.startswith("digits") else 3)
    with torch.device("meta"):
        unet = build_unet(config.model, config.data.resolution, channels)
    assert unet.config.sample_size == recipe["resolution"]
    assert unet.config.in_channels == channels
    assert len(build_scheduler(config.diffusion).alphas_cumprod) == 1000


@pytest.mark.parametrize("path", LOCAL, ids=[path.stem for path in LOCAL])
def test_a_recipe_with_local_data_takes_two_steps(path, tmp_path):
    config = parse_train(
        [
            "--config",
            str(path),
            f"--output_dir={tmp_path / 'run'}",
            "--split=train[:100]",
            "--max_train_steps=2",
            "--train_batch_size=4",
            "--lr_warmup_steps=1",
            "--eval_batch_size=2",
            "--ddpm_num_inference_steps=2",
            "--logging_steps=1",
            "--eval_steps=0",
        ]
    )
    with tiny.as_new_process():
        loop.train(
            make_accelerator("no"),
            config,
            Publisher(Path(config.output_dir), config.hub),
        )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 2 for loss in losses)
    assert os.listdir(tmp_path / "run" / "samples") == ["step-000002.png"]


def test_emoji_keep_their_transparency_and_name_their_source():
    folder = ROOT / "data" / "emoji"
    splits = {split: datasets.load_dataset(str(folder), split=split) for split in ("train", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 1719, "test": 192}
    assert not set(splits["train"]["unified"]) & set(splits["test"]["unified"])
    small = datasets.load_dataset(str(folder), "faces-hearts-flags", split="train")
    assert len(small) == 413 and set(small["unified"]) < set(splits["train"]["unified"])
    hearts = [row for row in small if "HEART" in row["name"]]
    assert len(hearts) > 10
    for row in hearts:
        assert (row["image"].mode, row["image"].size) == ("RGBA", (32, 32))
        assert row["image"].getchannel("A").getextrema()[0] == 0
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 4_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: cc-by-4.0" in card and "copyright Twitter, Inc and other" in card
