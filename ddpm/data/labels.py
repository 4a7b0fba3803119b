"""The class labels of a dataset: their column, the names of the classes, and the id of each row.

K: classes. Their ids are 0 to K - 1 in the order of the names; a row without a label has id K.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow
from datasets.features.features import generate_from_arrow_type

from ddpm.data.image_column import type_name
from ddpm.errors import UserError, printable

MAX_CLASSES = 100_000
MAX_NAME_LENGTH = 1_000
"""Longest name of a class in characters, as it is printed."""
MAX_NAMES_BYTES = 2**20
"""Most bytes of all names as JSON, so that record.json and labels.json stay below JSON_LIMIT."""
WEBDATASET_COLUMN = "cls"
"""Column of the labels in a webdataset, which has no columns of type ClassLabel."""
ADVICE = "Choose another --label_column, or train without labels."

Split = datasets.Dataset | datasets.IterableDataset


@dataclass(frozen=True)
class ClassLabels:
    """The classes of one column. `ids` has the id of every cell that the column may contain."""

    column: str
    names: list[str]
    ids: dict[Any, int]
    source: str
    """The column in words, for errors."""

    def id_of(self, cell: Any) -> int:
        """Return the id of a cell. UserError for one that is no label of the column."""
        if cell not in self.ids:
            raise UserError(
                f"{self.source} has the label {cell}. Classes are numbered from 0, -1 is no label, "
                f"and each class of a ClassLabel has a name. Correct the labels. {ADVICE}"
            )
        return self.ids[cell]

    def facts(self, pixels_sha256: str, ids: Sequence[int]) -> dict[str, Any]:
        """Return entries of a DatasetRecord: the images of each class, and a hash with labels."""
        sha256 = hashlib.sha256(f"{pixels_sha256} {self.names} {ids}".encode()).hexdigest()
        return {"pixels_sha256": sha256, **count_classes(self.names, ids)}


def find_labels(
    dataset: Split,
    wanted: str | None,
    image_column: str,
    name: str,
    num_rows: int | None,
    on_hub: bool,
    class_names: list[str] | None = None,
) -> ClassLabels:
    """Return the classes of the column `wanted`, or else of the only one of type ClassLabel.

    Classes without a row are left out, except in a stream, whose rows are not known.

    With `class_names`, of the data that a model was trained on, the ids are theirs: rows of other
    classes have no label, nor has any row if there is no such column. UserError for a column that
    has no classes to tell apart.
    """
    if class_names is not None and wanted and wanted not in (dataset.features or {}):
        return ClassLabels(wanted, class_names, {None: len(class_names)}, "")
    column = find_label_column(dataset, wanted, image_column, name)
    source, feature = f"The column {column} of the dataset {name}", dataset.features[column]
    _require_type(feature, source)
    is_named = isinstance(feature, datasets.ClassLabel)
    if not is_named and on_hub and isinstance(dataset, datasets.IterableDataset):
        raise UserError(
            f"{source} is no ClassLabel, so its classes are known only after reading all of it, "
            "which --streaming avoids. Leave --streaming out, or copy the dataset with such a "
            "column."
        )
    is_read = not is_named or isinstance(dataset, datasets.Dataset)
    cells = _distinct_cells(dataset, column, source) if is_read else set()
    no_label = {None, -1, *filter(_is_no_label, cells)}
    values = range(len(feature.names)) if is_named else sorted(filter(_is_class, cells - no_label))
    if is_named and is_read:
        values = [value for value in values if value in cells]
    names = map(feature.names.__getitem__, values) if is_named else map(_name_of, values)
    names = _printed_names(names, source)
    known = {known_name: index for index, known_name in enumerate(class_names or names)}
    ids = {cell: known.get(text, len(known)) for cell, text in zip(values, names, strict=True)}
    labels = ClassLabels(column, list(known), ids | dict.fromkeys(no_label, len(known)), source)
    for cell in cells:
        labels.id_of(cell)
    if class_names is None:
        _require_classes(names, num_rows, source)
    return labels


def label_feature(cells: list[Any]) -> Any:
    """Return the type of a column with these cells; ClassLabel with sorted names for texts."""
    labels = [cell for cell in cells if cell is not None]
    if all(isinstance(label, str) for label in labels):
        return datasets.ClassLabel(names=sorted(set(labels)))
    return generate_from_arrow_type(pyarrow.array(labels).type)


def count_classes(names: Sequence[str], ids: Sequence[int]) -> dict[str, Any]:
    """Return the number of images of each class, and of none, as entries of a DatasetRecord."""
    counts = Counter(ids)
    classes = {name: counts[index] for index, name in enumerate(names)}
    return {"classes": classes, "unlabeled": counts[len(names)]}


def find_label_column(dataset: Split, wanted: str | None, image_column: str, name: str) -> str:
    """Return `wanted`, or the only column of type ClassLabel, or else that of a webdataset.

    UserError lists the columns.
    """
    features = dataset.features or {}
    listed = ", ".join(f"{column} ({type_name(kind)})" for column, kind in features.items())
    if wanted == image_column:
        raise UserError(f"--label_column {wanted} is a column of images. Choose another.")
    if wanted in features:
        return wanted
    if wanted is not None:
        raise UserError(
            f"--label_column {wanted}: the dataset {name} has no column of that name. "
            f"Its columns: {listed}."
        )
    candidates = [c for c, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not candidates and WEBDATASET_COLUMN in features:
        return WEBDATASET_COLUMN
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UserError(
            f"The dataset {name} has several columns of type ClassLabel: {', '.join(candidates)}. "
            "Choose one with --label_column."
        )
    raise UserError(
        f"The dataset {name} has no column of type ClassLabel. Its columns: "
        f"{listed}. Choose one of integers or texts with --label_column, or sort "
        "the images into a folder for each class."
    )


def _require_type(feature: Any, source: str) -> None:
    dtype = feature.dtype if isinstance(feature, datasets.ClassLabel | datasets.Value) else ""
    if not dtype.startswith(("int", "uint", "bool", "string", "large_string")):
        raise UserError(
            f"{source} is of type {type_name(feature)}. Labels are of type ClassLabel, integers, "
            f"booleans or texts. {ADVICE}"
        )


def _distinct_cells(dataset: Split, column: str, source: str) -> set[Any]:
    """Return the distinct cells of a column, of a stream by reading all of it once."""
    cells: set[Any] = set()
    for batch in dataset.select_columns([column]).iter(batch_size=1000):
        cells.update(batch[column])
        if len(cells) > MAX_CLASSES:
            raise UserError(
                f"{source} has more than {MAX_CLASSES:,} different labels, the limit. {ADVICE}"
            )
    return cells


def _is_no_label(cell: Any) -> bool:
    return cell is None or (not cell.strip() if isinstance(cell, str) else cell == -1)


def _is_class(cell: Any) -> bool:
    return isinstance(cell, str) or cell >= 0


def _name_of(cell: int | bool | str) -> str:
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def _printed_names(names: Iterable[str], source: str) -> list[str]:
    """Return names as they are printed. UserError unless each differs from all others."""
    printed: dict[str, None] = {}
    num_bytes = 0
    for name in names:
        text = printable(name)
        if not text.strip():
            raise UserError(f"{source} has a class with an empty name. {ADVICE}")
        if max(len(name), len(text)) > MAX_NAME_LENGTH:
            raise UserError(
                f"{source} has a label of more than {MAX_NAME_LENGTH:,} characters, {text:.60}... "
                f"{ADVICE}"
            )
        if text in printed:
            raise UserError(f"{source} has two classes that are printed as {text}. {ADVICE}")
        printed[text] = None
        if len(printed) > MAX_CLASSES:
            raise UserError(f"{source} has more than {MAX_CLASSES:,} classes, the limit. {ADVICE}")
        num_bytes += len(json.dumps(text, ensure_ascii=False).encode())
        if num_bytes > MAX_NAMES_BYTES:
            raise UserError(
                f"The names of all classes in {source[0].lower()}{source[1:]} take more than "
                f"{MAX_NAMES_BYTES:,} bytes, the limit. {ADVICE}"
            )
    return list(printed)


def _require_classes(names: list[str], num_rows: int | None, source: str) -> None:
    """Raise UserError unless there are two classes or more, and not more than images."""
    if len(names) < 2:
        number = "only one class" if names else "no class"
        raise UserError(f"{source} has {number}, so there is nothing to condition on. {ADVICE}")
    if num_rows is not None and len(names) > num_rows:
        raise UserError(
            f"{source} has {len(names):,} classes, more than the {num_rows:,} images. {ADVICE}"
        )
