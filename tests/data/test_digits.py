"""The digits in data/ are what their card says, and what the script makes."""

import importlib.util
from pathlib import Path

import datasets
import numpy as np
import pytest

DIGITS = Path(__file__).parents[2] / "data" / "digits"


@pytest.fixture(scope="module")
def digits() -> datasets.DatasetDict:
    return datasets.load_dataset(str(DIGITS))


def test_digits_are_what_their_card_says(digits):
    assert {split: len(rows) for split, rows in digits.items()} == {"train": 1437, "test": 360}
    for rows in digits.values():
        assert rows.features["image"] == datasets.Image()
        assert rows.features["label"].names == [str(digit) for digit in range(10)]
        assert set(rows["label"]) == set(range(10))
        assert {(image.mode, image.size) for image in rows["image"]} == {("L", (8, 8))}


def test_held_out_digits_are_not_among_those_trained_on(digits):
    trained, held_out = (
        {np.asarray(image).tobytes() for image in digits[split]["image"]}
        for split in ("train", "test")
    )
    assert len(trained) == 1437
    assert not trained & held_out


def test_every_digit_has_the_same_share_of_both_splits(digits):
    shares = [np.bincount(digits[split]["label"]) / len(digits[split]) for split in digits]
    assert np.abs(shares[0] - shares[1]).max() < 0.003


def test_digits_are_black_paper_and_white_ink(digits):
    pixels = np.stack([np.asarray(image) for image in digits["train"]["image"]])
    assert set(np.unique(pixels)) <= {round(ink * 255 / 16) for ink in range(17)}
    assert pixels[:, :, 0].mean() < 5  # the left edge is paper
    assert pixels.max() == 255


def test_digits_and_their_card_are_what_the_script_makes(digits, monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("make_digits", DIGITS.parent / "make_digits.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "FOLDER", tmp_path / "digits")
    script.main()
    assert (tmp_path / "digits/README.md").read_text() == (DIGITS / "README.md").read_text()
    made = datasets.load_dataset(str(tmp_path / "digits"))
    for split, rows in digits.items():
        assert made[split]["label"] == rows["label"]
        assert made[split]["image"] == rows["image"]
