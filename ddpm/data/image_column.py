"""Find the column of images in a dataset, whatever its name."""

import io
import itertools
import re
from dataclasses import replace
from typing import Any

import datasets

from ddpm.data.decode import is_image
from ddpm.data.file_kind import CONVERT, kind_of
from ddpm.errors import UserError

TAR_ADVICE = (
    " In a tar, what follows the first dot of a name is its column: to train on every image, "
    "unpack it into a folder, and give that as --train_data_dir."
)
MAX_PROBED_ROWS = 16
"""Rows by which a column without the type Image is judged."""
MAX_LISTED_COLUMNS = 20


def find_image_column(
    dataset: datasets.Dataset | datasets.IterableDataset, wanted: str | None, name: str
) -> str:
    """Return `wanted`, or the only column of type Image, or else the only one of image files.

    UserError lists the columns.
    """
    columns = {c: type_name(feature) for c, feature in (dataset.features or {}).items()}
    if not columns:  # some streams know the types of their columns only from their rows
        first = next(iter(dataset), {})
        columns = {column: type(cell).__name__ for column, cell in first.items()}
    names = [f"{column} ({kind})" for column, kind in columns.items()]
    listed = ", ".join(names[:MAX_LISTED_COLUMNS])
    if len(names) > MAX_LISTED_COLUMNS:
        listed += f" and {len(names) - MAX_LISTED_COLUMNS:,} more"
    image_columns = [column for column, kind in columns.items() if kind == "Image"]
    if wanted not in image_columns and (wanted or not image_columns):
        image_columns = _columns_of_files(dataset, wanted)
    if wanted in image_columns:
        return wanted
    if wanted is not None:
        raise UserError(
            f"--image_column {wanted}: the dataset {name} has no image column of that name. "
            f"Its columns: {listed}.{_hint(dataset, wanted)}"
        )
    if len(image_columns) == 1:
        return image_columns[0]
    if image_columns:
        raise UserError(
            f"The dataset {name} has several image columns: "
            f"{', '.join(image_columns[:MAX_LISTED_COLUMNS])}. Choose one with --image_column."
            f"{TAR_ADVICE if '__key__' in columns else ''}"
        )
    raise UserError(
        f"The dataset {name} has no column of type Image. Its columns: {listed}."
        f"{_hint(dataset, None)}"
    )


def _columns_of_files(
    dataset: datasets.Dataset | datasets.IterableDataset, wanted: str | None
) -> list[str]:
    """Return the columns of image files without the type Image, or `wanted` if it is one.

    pandas, polars and others write a struct with "bytes", or plain bytes, of which one of the first
    must be an image. Both, and images, may be in lists, whose length decode_row checks.
    """
    columns = []
    for column, feature in (dataset.features or {}).items():
        if wanted not in (None, column):
            continue
        if isinstance(feature, datasets.List | datasets.LargeList):
            feature = feature.feature
        if getattr(feature, "dtype", None) in ("binary", "large_binary"):
            # Of this column alone: `datasets` opens whatever path an image in another column names.
            cells = [row.get(column) for row in _probed_rows(dataset.select_columns(column))]
            files = [cell[0] if isinstance(cell, list) and cell else cell for cell in cells]
            is_file = any(isinstance(file, bytes) and is_image(io.BytesIO(file)) for file in files)
        else:
            has_bytes = isinstance(feature, dict) and "bytes" in feature
            is_file = has_bytes or isinstance(feature, datasets.Image)
        if is_file:
            columns.append(column)
    return columns


def _probed_rows(dataset: datasets.Dataset | datasets.IterableDataset) -> list[dict[str, Any]]:
    # Before datasets 5.2, `take` of a dataset with fewer rows raises IndexError.
    return list(itertools.islice(dataset, MAX_PROBED_ROWS))


def undecoded(feature: Any) -> Any:
    """Return the type of a column with which `datasets` does not decode its images."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=undecoded(feature.feature))
    return datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature


def _hint(dataset: datasets.Dataset | datasets.IterableDataset, wanted: str | None) -> str:
    """Return what to do about columns that are no images, by what their first rows contain."""
    features = {c: f for c, f in (dataset.features or {}).items() if wanted in (None, c)}
    # Of these columns alone: `datasets` opens whatever path an image in another column names.
    columns = [c for c, feature in features.items() if _is_plain(feature) and c[:2] != "__"]
    rows = _probed_rows(dataset.select_columns(columns) if features else dataset)
    hints = [(0, "" if wanted else " docs/data.md says what is read, and converts more.")]
    for column in columns or (rows[0] if rows and wanted is None else [wanted]):
        cells = (row.get(column) for row in rows)
        hints.append(_hint_of(column, next((cell for cell in cells if cell), None)))
    for column, feature in features.items():
        if isinstance(feature, dict):
            save = "dataset.flatten().save_to_disk(FOLDER), then --dataset_name FOLDER"
            hints.append((1, f" If images are in {column}, make columns of its parts: {save}."))
    return max(hints)[1]


def _is_plain(feature: Any) -> bool:
    """Return whether a column contains values or arrays of numbers, and no files."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _is_plain(feature.feature)
    arrays = datasets.Array2D | datasets.Array3D | datasets.Array4D | datasets.Array5D
    return isinstance(feature, datasets.Value | arrays)


def _hint_of(column: str | None, cell: Any) -> tuple[int, str]:
    """Return what to do with a column, after a number: how likely it is the one of images."""
    if isinstance(cell, str) and re.match(r"\w+://", cell):
        return 4, (
            f" {column} contains URLs, not images: download them into a folder first, and give it "
            "as --train_data_dir."
        )
    if isinstance(cell, str) and re.fullmatch(r".{1,1000}\.\w{2,5}", cell):
        return 3, (
            f" If {column} contains the paths of image files, cast it and save: "
            f"dataset.cast_column({column!r}, datasets.Image()).save_to_disk(FOLDER), then "
            "--dataset_name FOLDER."
        )
    contents = None
    if isinstance(cell, str) and re.match(r"[\w:;,+/=-]{64}", cell):
        contents = f"text such as base64, {CONVERT}"
    elif isinstance(cell, list) and len(str(cell)) > 300:
        contents = f"numbers, {CONVERT}"
    elif isinstance(cell, bytes):
        contents = kind_of(io.BytesIO(cell)) or f"bytes of another kind, {CONVERT}"
    if contents is None:
        return 0, ""
    return 2, f" {column} contains no image files but {contents}."


def type_name(feature: Any) -> str:
    """Return the type of a column in words, for a list of columns."""
    if isinstance(feature, datasets.Image | datasets.ClassLabel):
        return type(feature).__name__
    return getattr(feature, "dtype", None) or type(feature).__name__
