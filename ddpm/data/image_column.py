"""Find the column of images in a dataset, whatever its name."""

import io
from dataclasses import replace
from typing import Any

import datasets

from ddpm.data.decode import is_image
from ddpm.errors import UserError

TAR_ADVICE = (
    " In a tar, what follows the first dot of a name is its column: to train on every image, "
    "unpack it into a folder, and give that as --train_data_dir."
)


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
    listed = ", ".join(f"{column} ({kind})" for column, kind in columns.items())
    image_columns = [column for column, kind in columns.items() if kind == "Image"]
    if wanted not in image_columns and (wanted or not image_columns):
        image_columns = _columns_of_files(dataset, wanted)
    if wanted in image_columns:
        return wanted
    if wanted is not None:
        raise UserError(
            f"--image_column {wanted}: the dataset {name} has no image column of that name. "
            f"Its columns: {listed}.{_cast_hint(dataset, columns, wanted)}"
        )
    if len(image_columns) == 1:
        return image_columns[0]
    if image_columns:
        raise UserError(
            f"The dataset {name} has several image columns: {', '.join(image_columns)}. "
            f"Choose one with --image_column.{TAR_ADVICE if '__key__' in columns else ''}"
        )
    raise UserError(
        f"The dataset {name} has no column of type Image. Its columns: {listed}."
        f"{_cast_hint(dataset, columns, None)}"
    )


def _columns_of_files(
    dataset: datasets.Dataset | datasets.IterableDataset, wanted: str | None
) -> list[str]:
    """Return the columns of image files without the type Image, or `wanted` if it is one.

    pandas, polars and others write a struct of "bytes" and "path", or plain bytes, of which the
    first must be an image. Both, and images, may be in lists, whose length decode_row checks.
    """
    columns = []
    for column, feature in (dataset.features or {}).items():
        if wanted not in (None, column):
            continue
        if isinstance(feature, datasets.List | datasets.LargeList):
            feature = feature.feature
        if getattr(feature, "dtype", None) in ("binary", "large_binary"):
            # Of this column alone: `datasets` opens whatever path an image in another column names.
            cell = next(iter(dataset.select_columns(column)), {}).get(column)
            cell = cell[0] if isinstance(cell, list) and cell else cell
            is_file = isinstance(cell, bytes) and is_image(io.BytesIO(cell))
        else:
            is_struct = isinstance(feature, dict) and {*feature} in ({"bytes"}, {"bytes", "path"})
            is_file = is_struct or isinstance(feature, datasets.Image)
        if is_file:
            columns.append(column)
    return columns


def undecoded(feature: Any) -> Any:
    """Return the type of a column with which `datasets` does not decode its images."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=undecoded(feature.feature))
    return datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature


def _cast_hint(
    dataset: datasets.Dataset | datasets.IterableDataset,
    columns: dict[str, str],
    wanted: str | None,
) -> str:
    """Return advice for a dataset with a column of bytes, paths or URLs, else an empty string."""
    types = ("string", "large_string", "binary", "large_binary", "str", "bytes")
    candidates = [c for c, name in columns.items() if name in types and wanted in (None, c)]
    if not candidates:
        return ""
    # Of these columns alone: `datasets` opens whatever path an image in another column names.
    first = next(iter(dataset.select_columns(candidates)), {})
    for column in candidates:
        if str(first.get(column)).startswith(("http://", "https://")):
            return (
                f" {column} contains URLs, not images: download them into a folder first, and "
                "give it as --train_data_dir."
            )
    return (
        f" If a column contains the bytes or the paths of image files, cast it and save: "
        f"dataset.cast_column({candidates[0]!r}, datasets.Image()).save_to_disk(FOLDER), then "
        "--dataset_name FOLDER."
    )


def type_name(feature: Any) -> str:
    """Return the type of a column in words, for a list of columns."""
    if isinstance(feature, datasets.Image | datasets.ClassLabel):
        return type(feature).__name__
    return getattr(feature, "dtype", None) or type(feature).__name__
