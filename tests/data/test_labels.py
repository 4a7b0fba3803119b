"""Class labels: their column, the names of the classes, and the label of every row."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from ddpm.config.data import DataConfig
from ddpm.data import dataset, pixel_cache, report
from ddpm.data.labels import find_labels
from ddpm.errors import UserError
from tests.files import gray, with_path

DIGITS = Path(__file__).parents[2] / "data" / "digits"
PETS = ClassLabel(names=["dog", "cat"])


def rows_of(cells: list, feature, column: str = "label", first: int = 0) -> Dataset:
    """Gray images, whose values count from `first`, and a column of labels."""
    files = [with_path(file) for file in gray(*range(first, first + len(cells)))]
    features = Features({"image": datasets.Image(), column: feature})
    return Dataset.from_dict({"image": files, column: cells}, features=features)


@pytest.fixture
def parquet(tmp_path):
    """parquet(cells, feature, column) -> settings of a dataset with these labels."""

    def write(cells: list, feature, column: str = "label", split: str = "train") -> dict:
        (tmp_path / "data").mkdir(exist_ok=True)
        rows = rows_of(cells, feature, column, first=0 if split == "train" else 100)
        rows.to_parquet(tmp_path / f"data/{split}.parquet")
        return {"dataset_name": str(tmp_path / "data")}

    return write


def load(class_names: list[str] | None = None, **settings):
    config = DataConfig(**{"resolution": 4, "class_conditional": True, **settings})
    return dataset.load_images(config, False, class_names=class_names)


def stream_of(count: int) -> dict:
    return {"streaming": True, "rows_per_epoch": count}


def labels_by_value(images) -> dict[int, int]:
    """{gray value: label} of all rows of a dataset, or of an epoch of a stream."""
    batch = images.batch(images.rows(0, len(images)), torch.Generator())
    assert batch.labels.dtype == torch.int64
    values = batch.images[:, 0, 0, 0].tolist()
    return dict(sorted(zip(values, batch.labels.tolist(), strict=True)))


def error_of(**settings) -> str:
    with pytest.raises(UserError) as error:
        load(**settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# Types of columns

COLUMNS = {
    "ClassLabel": (PETS, [1, 0, None, 1, -1], ["dog", "cat"], [1, 0, 2, 1, 2]),
    "unused class": (ClassLabel(names=["c", "b", "a"]), [1, 2, 2, 1], ["b", "a"], [0, 1, 1, 0]),
    "integers": (Value("int32"), [7, 10, -1, 7, None], ["7", "10"], [0, 1, 2, 0, 2]),
    "bytes": (Value("uint8"), [255, 0, 3, 0], ["0", "3", "255"], [2, 0, 1, 0]),
    "booleans": (Value("bool"), [True, False, None], ["false", "true"], [1, 0, 2]),
    "texts": (Value("string"), ["b", "", "a", None, " "], ["a", "b"], [1, 2, 0, 2, 2]),
    "large texts": (Value("large_string"), ["犬", "a\n", "犬"], ["a\\n", "犬"], [1, 0, 1]),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", COLUMNS)
def test_types_of_columns(parquet, kind, streaming):
    feature, cells, names, labels = COLUMNS[kind]
    settings = parquet(cells, feature, "kind")
    if streaming:
        settings |= stream_of(len(cells))
        if kind == "unused class":  # the rows of a stream are not known
            names, labels = feature.names, cells
    images = load(**settings, label_column="kind")
    assert images.class_names == names
    assert labels_by_value(images) == dict(enumerate(labels))
    assert images.facts.label_column == "kind"
    assert images.facts.classes == {name: labels.count(index) for index, name in enumerate(names)}
    assert images.facts.unlabeled == labels.count(len(names))


REFUSED = {
    "floats": (Value("float64"), [0.0, 1.0], "is of type float64. Labels are of type ClassLabel"),
    "lists": (datasets.List(Value("int64")), [[0], [1]], "is of type List"),
    "structs": ({"a": Value("int64")}, [{"a": 0}, {"a": 1}], "is of type"),
    "bytes": (Value("binary"), [b"a", b"b"], "is of type binary"),
    "nothing": (Value("null"), [None, None], "is of type null"),
    "negative": (Value("int64"), [0, 1, -2], "has the label -2"),
    "one class": (Value("string"), ["a", "a", None], "has only one class"),
    "one used class": (PETS, [1, 1, -1], "has only one class"),
    "no class": (Value("int64"), [-1, -1], "has no class"),
    "empty name": (ClassLabel(names=["a", " "]), [0, 1], "has a class with an empty name"),
    "same names": (Value("string"), ["a\n", "a\\n"], r"has two classes that are printed as a\n."),
    "long name": (Value("string"), ["a" * 1001, "b"], "has a label of more than 1,000 characters"),
    "escaped": (Value("string"), ["\1" * 501, "b"], "has a label of more than 1,000 characters"),
}


def test_names_of_classes_fit_into_the_files_of_a_run(monkeypatch):
    """All names together: record.json and labels.json hold them, quoted and escaped."""
    for cell in ("a" * 900, '"' * 500, "\u732b" * 350):
        rows = Dataset.from_dict({"label": [f"{index:04}{cell}" for index in range(1200)]})
        with pytest.raises(UserError, match="^The names of all classes in the column label of"):
            find_labels(rows, "label", "image", "d", 1200, False)
    monkeypatch.setattr("ddpm.data.labels.MAX_NAMES_BYTES", 6)
    assert find_labels(rows_of(["a", "b"], Value("string")), "label", "image", "d", 2, False)


def test_more_classes_than_images_are_refused():
    """Of a stream, whose classes are those of the column's type."""
    features = datasets.Features({"image": datasets.Image(), "kind": ClassLabel(num_classes=3)})
    stream = datasets.IterableDataset.from_generator(lambda: iter(()), features=features)
    with pytest.raises(UserError, match="has 3 classes, more than the 2 images"):
        find_labels(stream, "kind", "image", "owner/name", 2, on_hub=True)


@pytest.mark.parametrize("kind", REFUSED)
def test_columns_without_classes_are_refused(parquet, kind):
    feature, cells, message = REFUSED[kind]
    error = error_of(**parquet(cells, feature, "kind"), label_column="kind")
    assert error.startswith("The column kind of the dataset ") and f"/data {message}" in error
    assert "--label_column" in error


def test_number_of_classes_is_limited(monkeypatch):
    """Distinct texts are counted while they are read."""
    monkeypatch.setattr("ddpm.data.labels.MAX_CLASSES", 3)
    rows = rows_of(["a", "b", "c", "d"], Value("string"))
    with pytest.raises(UserError, match="more than 3 different labels"):
        find_labels(rows, "label", "image", "d", 4, False)
    stream = rows_of([0] * 4, ClassLabel(num_classes=4)).to_iterable_dataset()
    with pytest.raises(UserError, match="more than 3 classes"):
        find_labels(stream, None, "image", "d", None, True)


@pytest.mark.parametrize("cell", [2, -2])
def test_labels_without_a_name_are_refused(cell):
    """A parquet file may state other names than it has labels."""
    rows = Dataset(rows_of([0, 1, cell], Value("int64")).data, info=rows_of([0], PETS).info)
    with pytest.raises(UserError, match=f"has the label {cell}. Classes are numbered from 0"):
        find_labels(rows, None, "image", "d", 3, False)
    stream = rows.to_iterable_dataset()
    labels = find_labels(stream, None, "image", "d", 3, False)
    with pytest.raises(UserError, match=f"has the label {cell}. Classes are numbered from 0"):
        labels.id_of(cell)


# Finding the column


def test_column_must_be_chosen_among_several_or_exist(parquet, tmp_path):
    rows = rows_of([0, 1], PETS).add_column("fine", [1, 0]).cast_column("fine", PETS)
    rows.to_parquet(tmp_path / "rows.parquet")
    settings = {"dataset_name": str(tmp_path / "rows.parquet")}
    error = "rows.parquet has several columns of type ClassLabel: label, fine."
    assert error in error_of(**settings)
    assert labels_by_value(load(**settings, label_column="fine")) == {0: 1, 1: 0}
    error = error_of(**settings, label_column="fne")
    assert "no column of that name. Its columns: image (Image), label (ClassLabel), fine" in error
    assert "label_column image is a column of images" in error_of(**settings, label_column="image")
    error = error_of(**parquet([0, 1], Value("int64")))
    assert (
        "data has no column of type ClassLabel. Its columns: image (Image), label (int64)" in error
    )


def test_saved_datasets_have_their_names(tmp_path):
    DatasetDict({"train": rows_of([1, 0, 1], PETS)}).save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        images = load(dataset_name=str(tmp_path / "saved"), streaming=streaming)
        assert (images.class_names, labels_by_value(images)) == (["dog", "cat"], {0: 1, 1: 0, 2: 1})


def test_digits_have_ten_classes():
    images = load(dataset_name=str(DIGITS), resolution=8)
    expected = datasets.load_dataset(str(DIGITS), split="train")["label"]
    assert images.labels.tolist() == list(expected)
    assert images.class_names == list("0123456789")
    assert sum(images.facts.classes.values()) == len(images) == 1437


def webdataset(path: Path, classes: list[int | None]) -> str:
    with tarfile.open(path, "w") as archive:
        for value, label in enumerate(classes):
            members = {"png": gray(value)[0]}
            if label is not None:
                members["cls"] = str(label).encode()
            for ending, content in members.items():
                member = tarfile.TarInfo(f"{value}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_webdatasets_have_the_column_cls(tmp_path, streaming):
    name = webdataset(tmp_path / "a.tar", [2, 0, 0, 0, 0, 0, None, -1])
    images = load(dataset_name=name, **(stream_of(8) if streaming else {}))
    assert images.class_names == ["0", "2"]
    assert list(labels_by_value(images).values()) == [1, 0, 0, 0, 0, 0, 2, 2]


def test_stream_of_the_hub_needs_names():
    """Its classes would be known only after downloading all of it."""
    stream = rows_of([0, 1], Value("int64")).to_iterable_dataset()
    with pytest.raises(UserError, match="which --streaming avoids. Leave --streaming out"):
        find_labels(stream, "label", "image", "owner/name", 2, on_hub=True)
    stream = rows_of([0, 1], PETS).to_iterable_dataset()
    assert find_labels(stream, None, "image", "owner/name", 2, on_hub=True).names == PETS.names


# Folders of images

FOLDERS = {
    "classes": (["b/0.png", "a/1.png", "b/2.png"], ["a", "b"], [1, 0, 1]),
    "root": (["b/0.png", "a/1.png", "2.png"], ["a", "b"], [1, 0, 2]),
    "nested": (["x/b/0.png", "x/a/1.png", "y/b/2.png"], ["a", "b"], [1, 0, 1]),
    "depths": (["x/0.png", "x/a/1.png"], ["a", "x"], [1, 0]),
    "splits": (["train/b/0.png", "train/a/1.png", "train/2.png", "test/c/3.png"], "ab", [1, 0, 2]),
    "deep splits": (["p/train/b/0.png", "p/train/a/1.png", "p/test/c/3.png"], "ab", [1, 0]),
    "hostile names": (["$(rm)/0.png", "--x\n/1.png"], ["$(rm)", "--x\\n"], [0, 1]),
}


def write_folder(folder: Path, names: list[str]) -> dict:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gray(int(path.stem))[0])
    return {"train_data_dir": str(folder)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", FOLDERS)
def test_class_folders(tmp_path, layout, streaming):
    names, class_names, labels = FOLDERS[layout]
    settings = write_folder(tmp_path, names)
    if streaming:
        settings |= stream_of(len(labels))
    images = load(**settings)
    assert images.class_names == sorted(class_names)
    assert labels_by_value(images) == dict(enumerate(labels))
    assert images.facts.label_column == "label"


def test_folder_without_classes(tmp_path):
    settings = write_folder(tmp_path, ["0.png", "1.png"])
    error = error_of(**settings, label_column="image")
    assert error == "--label_column image is a column of images. Choose another."
    assert "or sort the images into a folder for each class" in error_of(**settings)
    settings = write_folder(tmp_path / "one", ["only/0.png", "only/1.png"])
    assert "has only one class" in error_of(**settings)


METADATA = {
    "metadata.csv": "file_name,kind\na/0.png,10\n1.png,9\n2.png,\n3.png,-1\n",
    "metadata.jsonl": "\n".join(
        json.dumps({"file_name": name, "kind": kind})
        for name, kind in (("a/0.png", "b"), ("1.png", "a"), ("2.png", None), ("3.png", " "))
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", METADATA)
def test_column_of_metadata(tmp_path, name, streaming):
    settings = write_folder(tmp_path, ["a/0.png", "1.png", "2.png", "3.png", "b/4.png"])
    (tmp_path / name).write_text(METADATA[name])
    if streaming:
        settings |= stream_of(5)
    images = load(**settings, label_column="kind")
    assert images.class_names == (["9", "10"] if name.endswith("csv") else ["a", "b"])
    assert labels_by_value(images) == {0: 1, 1: 0, 2: 2, 3: 2, 4: 2}
    assert "no column of that name" in error_of(**settings, label_column="knd")


def test_labels_of_metadata_come_before_folders(tmp_path):
    settings = write_folder(tmp_path, ["a/0.png", "b/1.png", "b/2.png"])
    entries = [
        {"file_name": f"{name}.png", "label": label}
        for name, label in (("a/0", "x"), ("b/1", "y"), ("b/2", "x"))
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    images = load(**settings)
    assert (images.class_names, labels_by_value(images)) == (["x", "y"], {0: 0, 1: 1, 2: 0})
    entries[0]["label"] = 1
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert "has labels in label that make no column" in error_of(**settings)
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(json.dumps({**entry, "{x}": entry["label"]}) for entry in entries)
    )
    assert "has labels in {x} that make no column" in error_of(**settings, label_column="{x}")


# From the column to batches


def test_unreadable_rows_drop_their_labels(parquet, tmp_path):
    rows = rows_of([0, 1, 1, 0], PETS).cast_column("image", datasets.Image(decode=False))
    cells = [row["image"] for row in rows]
    cells[1] = {"bytes": b"bad", "path": None}
    rows = Dataset.from_dict({"image": cells, "label": rows["label"]}, features=rows.features)
    rows.to_parquet(tmp_path / "rows.parquet")
    settings = {"dataset_name": str(tmp_path / "rows.parquet"), "max_bad_images": 0.5}
    images = load(**settings)
    assert labels_by_value(images) == {0: 0, 2: 1, 3: 0}
    assert images.facts.classes == {"dog": 2, "cat": 1}
    stream = load(**settings, **stream_of(4))
    batch = stream.batch(stream.rows(0, 4), torch.Generator())
    expected = [{0: 0, 2: 1, 3: 0}[value] for value in batch.images[:, 0, 0, 0].tolist()]
    assert batch.labels.tolist() == expected
    assert stream.facts.classes == {"dog": 2, "cat": 1}


def test_cache_without_labels_stays_valid(parquet, monkeypatch):
    settings = parquet([0, 1, 1], PETS)
    plain = load(**settings, class_conditional=False)
    labeled = load(**settings)
    assert plain.labels is plain.class_names is plain.facts.label_column is None
    assert plain.batch([0], torch.Generator()).labels is None
    assert plain.facts.classes == {}
    assert plain.facts.pixels_sha256 != labeled.facts.pixels_sha256
    monkeypatch.setattr(pixel_cache, "_decode_all", lambda *_: pytest.fail("decoded again"))
    assert load(**settings, class_conditional=False).facts == plain.facts
    again = load(**settings)
    assert (again.facts, again.labels.tolist()) == (labeled.facts, [0, 1, 1])


def test_hash_depends_on_labels(parquet):
    def sha256s(cells, names) -> list[str]:
        settings = parquet(cells, ClassLabel(names=names))
        both = load(**settings), load(**settings, **stream_of(3))
        return [images.facts.pixels_sha256 for images in both]

    hashes = sha256s([0, 1, 1], ["a", "b"]), sha256s([0, 1, 0], ["a", "b"])
    hashes = [*hashes, sha256s([0, 1, 1], ["a", "c"])]
    assert len({sha256 for both in hashes for sha256 in both}) == 6


def test_selected_rows_keep_their_labels(parquet):
    images = load(**parquet([0, 1] * 20, PETS), held_out=0.4)
    for part in (images, images.held_out):
        parity = {value: value % 2 for value in labels_by_value(part)}
        assert labels_by_value(part) == parity
        assert part.labels.tolist() == [
            int(part.pixels(row)[0, 0, 0]) % 2 for row in range(len(part))
        ]
    assert sum(images.facts.classes.values()) == len(images) == 24


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_split_has_the_ids_of_training(parquet, streaming):
    """Names decide; a class that was not trained on is none."""
    parquet(["dog", "bird", "cat"], Value("string"), split="test")
    settings = parquet(["dog", "cat", "dog"], Value("string"))
    settings |= {"label_column": "label", **(stream_of(3) if streaming else {})}
    config = DataConfig(resolution=4, **settings)
    images = dataset.load_images(config, False)
    held_out = dataset.load_held_out(config, images, False, max_rows=3)
    assert held_out.class_names == images.class_names == ["cat", "dog"]
    assert held_out.labels.tolist() == [1, 2, 0]
    assert held_out.facts.unlabeled == 1
    model = load(["bird", "cat", "dog"], **settings)
    assert labels_by_value(model) == {0: 2, 1: 1, 2: 2}


def test_held_out_folder_without_classes(tmp_path):
    settings = write_folder(tmp_path, ["train/a/0.png", "train/b/1.png", "test/2.png"])
    config = DataConfig(resolution=4, class_conditional=True, **settings)
    images = dataset.load_images(config, False)
    assert dataset.load_held_out(config, images, False, max_rows=3).labels.tolist() == [2]


# The report


def test_report_has_the_classes(parquet):
    def line(facts) -> str:
        lines = report.format_report(facts)
        return next(line for line in lines if line.startswith("Classes"))

    images = load(**parquet([1, 0, 1, None], PETS))
    counts = "Classes: 2, from column label: dog (1), cat (2)"
    assert line(images.facts) == f"{counts}; 1 row without a label trains the null class."
    facts = replace(images.facts, unlabeled=1200)
    assert line(facts) == f"{counts}; 1,200 rows without a label train the null class."
    images = load(**parquet(list(range(14)), Value("int64")), label_column="label")
    assert line(images.facts).endswith("11 (1), and 2 more.")
