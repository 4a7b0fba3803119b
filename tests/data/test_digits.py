"""data/digits equals its dataset card and the output of its script."""

import importlib.util
from pathlib import Path

import datasets
import numpy as np
import pytest

DIGITS = Path(__file__).parents[2] / "data" / "digits"


@pytest.fixture(scope="module")
def digits() -> datasets.DatasetDict:
    return datasets.load_dataset(str(DIGITS))


def test_digits_match_their_card(digits):
    assert {split: len(rows) for split, rows in digits.items()} == {"train": 1437, "test": 360}
    for rows in digits.values():
        assert rows.features["image"] == datasets.Image()
        assert rows.features["label"].names == [str(digit) for digit in range(10)]
        assert set(rows["label"]) == set(range(10))
        assert {(image.mode, image.size) for image in rows["image"]} == {("L", (8, 8))}


def test_splits_do_not_overlap(digits):
    trained, held_out = (
        {np.asarray(image).tobytes() for image in digits[split]["image"]}
        for split in ("train", "test")
    )
    assert len(trained) == 1437
    assert not trained & held_out


def test_splits_have_the_same_class_frequencies(digits):
    frequencies = [np.bincount(digits[split]["label"]) / len(digits[split]) for split in digits]
    assert np.abs(frequencies[0] - frequencies[1]).max() < 0.003


def test_digits_are_white_on_black(digits):
    pixels = np.stack([np.asarray(image) for image in digits["train"]["image"]])
    assert set(np.unique(pixels)) <= {round(ink * 255 / 16) for ink in range(17)}
    assert pixels[:, :, 0].mean() < 5  # the left edge is background
    assert pixels.max() == 255


@pytest.mark.slow
def test_script_makes_the_same_digits_and_card(digits, monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("make_digits", DIGITS.parent / "make_digits.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "FOLDER", tmp_path / "digits")
    script.main()
    assert (tmp_path / "digits/README.md").read_text() == (DIGITS / "README.md").read_text()
    remade = datasets.load_dataset(str(tmp_path / "digits"))
    for split, rows in digits.items():
        assert remade[split]["label"] == rows["label"]
        assert remade[split]["image"] == rows["image"]
