"""The image column: found by its type, by its bytes, or explained."""

import base64
import os

import datasets
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from pyarrow import parquet

from ddpm.config.data import DataConfig
from ddpm.data import decode
from ddpm.data.image_column import find_image_column
from ddpm.data.source import open_source
from ddpm.errors import UserError
from tests.data.opened import VALUES, opened, value_of
from tests.files import gray, noise, with_path


def dataset_of(**kinds) -> Dataset:
    return Dataset.from_dict({name: [] for name in kinds}, features=Features(kinds))


@pytest.mark.parametrize("name", ["image", "img", "picture of it", "label"])
def test_column_is_found_by_its_type(name):
    rows = dataset_of(**{"image_id": Value("string"), name: datasets.Image()})
    assert find_image_column(rows, None, "d") == name
    assert find_image_column(rows, name, "d") == name


def test_several_image_columns_need_a_choice():
    rows = dataset_of(front=datasets.Image(), back=datasets.Image(), id=Value("int64"))
    with pytest.raises(UserError, match="several image columns: front, back. Choose one with"):
        find_image_column(rows, None, "owner/name")
    assert find_image_column(rows, "back", "owner/name") == "back"


def test_missing_image_column_lists_the_columns():
    rows = dataset_of(text=Value("float32"), many=Sequence(Value("int64")), c=ClassLabel(2))
    with pytest.raises(UserError, match="owner/name has no column of type Image") as error:
        find_image_column(rows, None, "owner/name")
    assert "text (float32)" in str(error.value)
    assert "cast" not in str(error.value)


BASE64 = base64.b64encode(gray(1)[0]).decode()
HINTS = {
    # cells of the column "file" -> what to do
    "paths": (["a.png"], r"dataset\.cast_column\('file', datasets\.Image\(\)\)\.save_to_disk"),
    "URLs": ([None, "", "https://a.org/b"], "file contains URLs, not images: download them into"),
    "buckets": (["s3://a/b.png"], "file contains URLs, not images"),
    "base64": ([BASE64], "file contains no image files but text such as base64, to be converted"),
    "data URLs": ([f"data:image/png;base64,{BASE64}"], "but text such as base64"),
    "hex": ([gray(1)[0].hex()], "but text such as base64"),
    "pixels": ([noise(9, 9, 3).tolist()], r"file contains no image files but numbers, to be conv"),
    "flat pixels": ([noise(784).tolist()], "but numbers"),
    "bytes of pixels": ([noise(9, 9).tobytes()], r"but bytes of another kind, to be converted"),
    "tars": ([bytes(257) + b"ustar"], "no image files but tar, to be unpacked first"),
    "struct": ([{"image": {"data": b"a"}}], r"make columns of its parts: dataset.flatten\(\)"),
    "labels": ([3], r"file \(int64\), id \(int64\)\. docs/data.md says what is read"),
}


@pytest.mark.parametrize("kind", HINTS)
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_something_else_are_explained(kind, streaming):
    cells, hint = HINTS[kind]
    rows = Dataset.from_dict({"text": ["a"] * len(cells), "file": cells, "id": [1] * len(cells)})
    if kind == "labels":
        rows = rows.remove_columns("text")
    rows = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(UserError, match=f"has no column of type Image.*{hint}"):
        find_image_column(rows, None, "d")
    if kind != "labels":
        with pytest.raises(UserError, match=f"--image_column file: .*{hint}"):
            find_image_column(rows, "file", "d")


def test_arrays_and_columns_of_pixels_are_explained():
    arrays = Features({"pixels": datasets.Array3D((9, 9, 3), "uint8")})
    rows = Dataset.from_dict({"pixels": [noise(9, 9, 3)]}, features=arrays)
    with pytest.raises(UserError, match="pixels contains no image files but numbers"):
        find_image_column(rows, None, "d")
    rows = Dataset.from_dict({f"pixel{n}": [0] for n in range(64)})
    with pytest.raises(UserError, match=r"pixel19 \(int64\) and 44 more\. docs/data.md says"):
        find_image_column(rows, None, "d")


def test_images_in_a_struct_are_columns_of_a_flattened_dataset(tmp_path):
    """As the sentence about structs advises."""
    samples = [{"image": {"data": file, "name": "a"}} for file in gray(*VALUES)]
    Dataset.from_dict({"sample": samples}).flatten().save_to_disk(tmp_path / "flat")
    assert opened(dataset_name=str(tmp_path / "flat"))[1] == list(VALUES)


def test_bytes_are_judged_by_more_than_the_first_row():
    rows = Dataset.from_dict({"file": [None, b"broken", *gray(1)]})
    assert find_image_column(rows, None, "d") == "file"


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_are_not_opened(tmp_path, streaming):
    """`datasets` decodes whatever images a row has, so a row is never read as a whole."""
    os.mkfifo(tmp_path / "pipe.png")
    kinds = {"text": Value("string"), "pages": {"front": datasets.Image()}}
    image = {"bytes": None, "path": str(tmp_path / "pipe.png")}
    cells = {"text": ["a"], "pages": [{"front": image}]}
    rows = Dataset.from_dict(cells, features=Features(kinds))
    rows = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(UserError, match="no column of type Image.*If images are in pages"):
        find_image_column(rows, None, "d")


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CELLS = {
    # what pandas, polars, dask and pyarrow write for images without the type of `datasets`
    "struct": (STRUCT, lambda file: {"bytes": file, "path": "a.png"}),
    "struct with more": (
        pa.struct([("bytes", pa.binary()), ("path", pa.string()), ("width", pa.int64())]),
        lambda file: {"bytes": file, "path": None, "width": 4},
    ),
    "struct without a path": (pa.struct([("bytes", pa.large_binary())]), lambda f: {"bytes": f}),
    "bytes": (pa.binary(), lambda file: file),
    "large bytes": (pa.large_binary(), lambda file: file),
    "list of one struct": (pa.list_(STRUCT), lambda file: [{"bytes": file, "path": None}]),
    "large list of one struct": (pa.large_list(STRUCT), lambda file: [{"bytes": file}]),
    "list of bytes": (pa.list_(pa.binary()), lambda file: [file]),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_image_files_without_the_type_image_are_read(kind, streaming, tmp_path):
    cell_type, cell = CELLS[kind]
    cells = pa.array([cell(file) for file in gray(*VALUES)], cell_type)
    digests = pa.array([b"\x00\x01"] * 3, pa.binary())
    table = pa.table({"id": [1, 2, 3], "md5": digests, "scan": cells})
    parquet.write_table(table, tmp_path / "a.parquet")
    config = {"dataset_name": str(tmp_path / "a.parquet")}
    for wanted in (None, "scan"):
        source, values = opened(streaming, **config, image_column=wanted)
        assert (source.column, values) == ("scan", list(VALUES))
    with pytest.raises(UserError, match="--image_column md5: the dataset .* has no image column"):
        opened(streaming, **config, image_column="md5")


def test_lists_of_images_are_read_where_they_have_one(tmp_path):
    first, second, third = (with_path(file) for file in gray(*VALUES))
    rows = {"images": [[first], [second, third], []]}
    features = Features({"images": datasets.List(datasets.Image())})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        source = open_source(
            DataConfig(dataset_name=str(tmp_path / "a.parquet"), streaming=streaming)
        )
        cells = [row["images"] for row in source.dataset]
        assert value_of(cells[0]) == VALUES[0]
        for cell in cells[1:]:
            with pytest.raises(decode.DecodeError, match=f"{len(cell)} images in one row"):
                value_of(cell)


@pytest.mark.parametrize("wanted", ["absent", "text"])
def test_wrong_column_lists_the_columns(wanted):
    rows = dataset_of(text=Value("string"), image=datasets.Image())
    with pytest.raises(UserError, match=f"--image_column {wanted}: the dataset d has no") as error:
        find_image_column(rows, wanted, "d")
    assert "Its columns: text (string), image (Image)." in str(error.value)
