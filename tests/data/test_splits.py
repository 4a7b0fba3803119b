"""Expressions of splits: which rows they name, and what is held out of training."""

import itertools
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from ddpm.config.data import DataConfig
from ddpm.data import dataset, splits
from ddpm.errors import UserError
from tests.data.opened import opened
from tests.files import gray, with_path, write_parquet

SIZES = {"train": 10, "test": 4, "a-b": 2}
EXPRESSIONS = {
    "train": range(10),
    "a-b": ["a-b 0", "a-b 1"],
    "train[:80%]": range(8),
    "train[80%:]": (8, 9),
    "train[10%:20%]": [1],
    "train[2:4]": (2, 3),
    "train[-3:]": (7, 8, 9),
    "train[:-8]": (0, 1),
    "train[:1000]": range(10),
    "train[50:]": (),
    "train[:1]+train[:2]": (0, 0, 1),
    "test": [f"test {row}" for row in range(4)],
    "train[9:] + test[:1]": [9, "test 0"],
    "all": [*range(10), *(f"test {row}" for row in range(4)), "a-b 0", "a-b 1"],
}


def rows_of(expression: str) -> list:
    return [
        row if part.split == "train" else f"{part.split} {row}"
        for part in splits.resolve(expression, SIZES)
        for row in range(part.start, part.stop)
    ]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expression_names_rows(expression):
    assert rows_of(expression) == list(EXPRESSIONS[expression])


def test_percents_of_rounding_down_name_as_many_rows_each():
    one, other = (
        splits.resolve(f"train[{start}%:{start + 10}%](pct1_dropremainder)", {"train": 199})
        for start in (0, 90)
    )
    assert (one, other) == ([splits.Part("train", 0, 10)], [splits.Part("train", 90, 100)])


def test_overlap_is_that_of_the_rows():
    for one, other in itertools.product(EXPRESSIONS, repeat=2):
        common = set(rows_of(one)) & set(rows_of(other))
        assert splits.overlap(one, other, SIZES) is bool(common) or "all" in (one, other)


def test_without_sizes_slices_of_one_split_overlap():
    assert splits.overlap("train[:1]", "train[1:]", {})
    assert splits.overlap("train+test", "test", {})
    assert not splits.overlap("train[:1]+a-b", "test", {})


def test_what_is_no_split_is_refused():
    for text in ("", "train[1]", "train[:0.8]", "train[::2]", "train[_:]", "train[:5%](up)", "a b"):
        with pytest.raises(UserError, match="is not a split: give a name, a slice.*train.:80%"):
            splits.resolve(text, SIZES)


# Datasets


def parquet(folder: Path) -> DataConfig:
    for split, values in VALUES.items():
        write_parquet(folder / f"{split}.parquet", gray(*values))
    return DataConfig(dataset_name=str(folder), resolution=4)


def images(folder: Path) -> DataConfig:
    for split, values in VALUES.items():
        (folder / split).mkdir(parents=True)
        for value, file in zip(values, gray(*values), strict=True):
            (folder / split / f"{value}.png").write_bytes(file)
    return DataConfig(train_data_dir=str(folder), resolution=4)


def saved(folder: Path) -> DataConfig:
    features = datasets.Features({"image": datasets.Image()})
    datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [with_path(file) for file in gray(*values)]}, features=features
            )
            for split, values in VALUES.items()
        }
    ).save_to_disk(folder)
    return DataConfig(dataset_name=str(folder), resolution=4)


VALUES = {"train": (11, 12, 13), "test": (21, 22), "validation": (12, 31)}


@pytest.mark.parametrize("make", [parquet, images, saved], ids=lambda make: make.__name__)
def test_slices_and_sums_are_read(make, tmp_path):
    config = make(tmp_path / "data")
    names = {"dataset_name": config.dataset_name, "train_data_dir": config.train_data_dir}
    for streaming, (split, values) in itertools.product(
        (False, True),
        {
            "train[:2]": [11, 12],
            "train[-1:]+test": [13, 21, 22],
            "train[50%:]": [13],
            "test+train": [21, 22, 11, 12, 13],
        }.items(),
    ):
        if streaming and make is parquet and "[" in split:
            with pytest.raises(UserError, match="with --streaming is for folders of images and of"):
                opened(streaming, **names, split=split)
        else:
            assert opened(streaming, **names, split=split)[1] == values
    for split, reason in (
        ("train[2:1]", "a slice of train.2:1. ends before it begins"),
        ("train[5:]", "has no rows in its split"),
        ("train[:0.5]", "is not a split: give a name"),
        ("dev[:2]", 'Unknown split "dev". Should be one of'),
    ):
        with pytest.raises(UserError, match=reason):
            opened(**names, split=split)


def test_dataset_that_was_saved_without_splits_is_train_or_has_its_own_name(tmp_path):
    rows = parquet(tmp_path / "data")
    for split in ("test", "train"):
        one = datasets.load_dataset(rows.dataset_name, split=split)
        one.save_to_disk(tmp_path / split)
        for expression in {f"{split}[1:]", "train[1:]"}:
            values = opened(dataset_name=str(tmp_path / split), split=expression)[1]
            assert values == list(VALUES[split][1:])
        with pytest.raises(UserError, match="Unknown split .validation"):
            opened(dataset_name=str(tmp_path / split), split="validation")


@pytest.mark.parametrize("make", [parquet, images, saved], ids=lambda make: make.__name__)
def test_held_out_images_were_not_trained_on(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dataset, "MIN_IMAGES", 1)
    config = replace(make(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))

    def held_out(trained: str, split: str | None = None, also: tuple[str, ...] = ()) -> set | None:
        """The values of the held-out images."""
        split_config = replace(config, split=trained)
        images = dataset.load_images(split_config, False)
        rows = dataset.load_held_out(split_config, images, True, 99, split, also)
        return rows and {int(rows.pixels(row)[0, 0, 0]) for row in range(len(rows))}

    assert held_out("train") == held_out("train[:2]") == {21, 22}
    assert held_out("test[:1]") == {31, 12}
    assert held_out("train[:1]", "train[1:]") == {12, 13}
    assert capsys.readouterr().out == ""
    assert held_out("train+test") == held_out("test+train[:2]") == {31}
    assert held_out("train", None, ("train+test",)) == {31}
    assert "1 of the 2 held-out images (split validation) are also" in capsys.readouterr().out
    assert held_out("all") is held_out("train+test+validation") is None
    assert held_out("train[1:2]", "validation[:1]") is None  # the same pixels
    monkeypatch.setattr(dataset, "MIN_IMAGES", 2)
    assert held_out("train+test") is None
    assert "The other 1 are too few to measure anything" in capsys.readouterr().out
    for trained, split in (
        ("train+test", "test"),
        ("train", "train"),
        ("train[:2]", "train[-2:]"),
        ("all", "train[2:]"),
        ("test", "test[:50%]"),
    ):
        with pytest.raises(UserError, match="has images that were trained on, those of"):
            held_out(trained, split)
    for also in ("train+test", "test+nosuch"):  # of the record of a model, from anyone
        with pytest.raises(UserError, match="has images that were trained on, those of"):
            held_out("train", "test", (also,))


def test_held_out_rows_of_a_stream_were_not_trained_on(tmp_path):
    config = replace(parquet(tmp_path), streaming=True, rows_per_epoch=5, split="train+test")
    stream = dataset.load_images(config, False)
    assert dataset.load_held_out(config, stream, False, 9).facts.split == "validation"
    with pytest.raises(UserError, match="The split test has images that were trained on"):
        dataset.load_held_out(config, stream, False, 9, "test")
