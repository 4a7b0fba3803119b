"""The image files of a local folder or zip file: which are trained on, and which are left out.

Every image counts, whatever its name, its ending and its depth, also in linked folders and in zip
files. Names decide only about splits at the top of the folder (train/ and test/), about hidden
files, and about what other programs leave behind. `datasets` would leave out, without a word,
whatever has a word like "test" somewhere in its path, and what its list of endings does not have.
"""

import csv
import hashlib
import io
import json
import os
import posixpath
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from pyarrow import parquet

from ddpm.data.decode import is_image
from ddpm.data.file_kind import kind_of
from ddpm.data.image_file import open_file, read_image_file
from ddpm.errors import UserError, first_line

IMAGE_ENDINGS = frozenset(ImageFolder.EXTENSIONS)
"""Endings of files that are rows in any case. Files with others are rows if Pillow reads them."""
OTHER_ENDINGS = re.compile(
    r"\.(txt|caption|json|jsonl|csv|tsv|xml|ya?ml|toml|ini|cfg|md|rst|html?|css|js|py|ipynb|sh|log|"
    r"lst|xmp|aae|thm|ovr|pgw|tfw|jgw|prj|identifier)"
)
"""Endings of files that describe the images next to them, or repeat them smaller."""
RAW_ENDINGS = re.compile(r"\.(dng|nef|nrw|cr2|cr3|arw|sr2|orf|rw2|raf|pef|srw|3fr|iiq)")
"""Endings of raw camera files, in which Pillow finds only a preview."""
TABLE_ENDINGS = (".parquet", ".arrow", ".tar")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
JUNK = ("thumbs.db", "desktop.ini", ".ds_store", "__macosx", "@eadir", ".ipynb_checkpoints", ".git")
JUNK += ("$recycle.bin", "#recycle", "@recycle")
"""Files and folders of other programs, in lower case; also ._*, which macOS writes."""
SPLITS = {
    split: re.compile(rf"(^|[-._ 0-9])({words})([-._ 0-9]|$)", re.IGNORECASE)
    for split, words in (
        ("train", "train|training"),
        ("validation", "validation|valid|val|dev"),
        ("test", "test|testing|eval|evaluation"),
    )
}
"""The splits, and what `datasets` takes for their names."""

CLASS_COLUMN = "label"
"""Column of the class folders, as `datasets` names it."""

INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")

Row = dict[str, Any]
LeftOut = dict[str, list[str]]


@dataclass(frozen=True)
class ImageListing:
    """The images of a folder.

    splits: the rows of each split in order, {column: path}; "zip://MEMBER::ARCHIVE" in a zip file.
        With a column of labels, {column: label} is among them.
    left_out: the names of the files that are no rows, by the reason.
    has_tables: whether there are also files of datasets, such as parquet.
    """

    splits: dict[str, list[Row]]
    left_out: LeftOut
    has_tables: bool


@dataclass(frozen=True)
class _File:
    """A file in the folder or in a zip file there.

    name: below the folder, with the zip file as a folder.
    path: as in a row.
    location: below the folder, as if the zip file were unpacked there; metadata refer to it.
    """

    name: str
    path: str
    location: str
    is_broken_zip: bool = False


def list_images(root: str, label_column: str | None = None) -> ImageListing:
    """List a folder, or a zip file.

    `label_column` is that of the metadata, or CLASS_COLUMN for the names of the folders in which
    the images are, without those at the top.
    """
    left_out: LeftOut = defaultdict(list)
    root = os.path.abspath(root)
    is_zip, has_tables = os.path.isfile(root), False
    images, metadata = [], []
    for file in _members(root, "") if is_zip else _files(root, left_out):
        name = posixpath.basename(file.name)
        ending = posixpath.splitext(name)[1].lower()
        if any(part.startswith(".") for part in file.name.split("/")):
            if ending in IMAGE_ENDINGS:
                left_out["hidden"].append(file.name)
        elif name in METADATA_FILES:
            metadata.append(file)
        elif ending in IMAGE_ENDINGS or file.is_broken_zip:
            images.append(file)
        elif RAW_ENDINGS.fullmatch(ending):
            left_out["raw camera files, to be developed first"].append(file.name)
        elif not OTHER_ENDINGS.fullmatch(ending):
            has_tables |= ending in TABLE_ENDINGS or name.lower().endswith(".tar.gz")
            reason = _why_no_image(file.path)
            if reason is None:
                images.append(file)
            else:
                left_out[reason].append(file.name)
    layout = {} if is_zip else _split_layout([file.name for file in images])
    tops = {"", *layout, *map(posixpath.dirname, layout)}
    splits = {
        split: _rows(root, files, described, left_out, label_column, tops)
        for split, (files, described) in _by_split(layout, images, metadata, left_out).items()
    }
    return ImageListing(splits, dict(left_out), has_tables)


def fingerprint(rows: list[Row], label_column: str | None) -> str:
    """Return a hash of rows, and of the sizes and times of their files."""
    sha256 = hashlib.sha256(json.dumps(rows, default=str).encode())
    cells = (cell for row in rows for cell in row.items())
    paths = {path for column, path in cells if path is not None and column != label_column}
    for file in sorted({path.rpartition("::")[2] for path in paths}):
        with suppress(OSError):
            status = os.stat(file)
            sha256.update(f"{status.st_mtime_ns} {status.st_size} ".encode())
    return sha256.hexdigest()


# Files


def _files(root: str, left_out: LeftOut) -> Iterator[_File]:
    """Yield the files of a folder by name, then the members of its zip files."""
    archives = []
    for name in sorted(_walk(root, left_out)):
        path, text = os.path.join(root, name), _as_utf8(name)
        if path != _as_utf8(path):  # which no row can contain
            path = f"{_as_utf8(path)} (the name is not UTF-8)"
        if _is_zip(name):
            archives.append((path, text))
        else:
            yield _File(text, path, text)
    for path, text in archives:
        yield from _members(path, text)


def _as_utf8(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _walk(root: str, left_out: LeftOut) -> Iterator[str]:
    """Yield the name of every file below a folder. Each folder is read once, links to it last."""
    folders, links = [""], []
    seen = {(status.st_dev, status.st_ino) for status in map(os.stat, Path(root).resolve().parents)}
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(os.path.join(root, folder))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            names = sorted(os.listdir(os.path.join(root, folder)))
        except OSError as error:
            left_out[f"a folder that cannot be read: {error.strerror}"].append(
                _as_utf8(folder) or "."
            )
            continue
        for name in filter(_is_no_junk, names):
            path = os.path.join(root, folder, name)
            if not os.path.isdir(path):
                yield posixpath.join(folder, name)
            else:
                (links if os.path.islink(path) else folders).append(posixpath.join(folder, name))


def _members(path: str, name: str) -> Iterator[_File]:
    """Yield the members of a zip file, in each folder the files first; itself if it is broken."""
    try:
        with open_file(path)[0] as file, zipfile.ZipFile(file) as archive:
            members = dict.fromkeys(info.filename for info in archive.infolist())
    except Exception:  # zipfile raises many types
        file_name = os.path.basename(path)
        yield _File(name or file_name, f"zip://{file_name}::{path}", name, is_broken_zip=True)
        return
    for member in sorted(members, key=_files_first):
        if not member.endswith("/") and all(map(_is_no_junk, member.split("/"))):
            location = posixpath.join(posixpath.dirname(name), member)
            yield _File(posixpath.join(name, member), f"zip://{member}::{path}", location)


def _is_zip(name: str) -> bool:
    return name.lower().endswith(".zip")


def _files_first(member: str) -> list[tuple[bool, str]]:
    *folders, name = member.split("/")
    return [*((True, folder) for folder in folders), (False, name)]


def _is_no_junk(name: str) -> bool:
    return name.lower() not in JUNK and not name.startswith("._")


def _why_no_image(path: str) -> str | None:
    """Return None for a file whose format Pillow reads, else why it is left out."""
    reason = "no image that Pillow reads"
    with suppress(Exception), open_file(path)[0] as file:  # zipfile raises many types
        if is_image(file):
            return None
        if kind := kind_of(file):
            return f"{reason}: {kind}"
    return reason


# Splits


def _split_layout(names: list[str]) -> dict[str, str | None]:
    """Return {beginning of names: split} of a folder whose top has splits, {} for any other.

    Its top is the first folder with more than one folder or file. There, folders for training and
    for something else are a layout, and so are folders that are all named for a split, and files
    named for a split of which some are for training and some are not.
    """
    prefix = ""
    while names:
        rests = [name.removeprefix(prefix).partition("/") for name in names]
        tops = {top for top, _, _ in rests}
        folders = {top for top, slash, _ in rests if slash}
        layout = {f"{prefix}{top}": _split_of(top) for top in tops}
        only = next(iter(tops))
        if tops == folders == {only} and _split_of(only) is None and not _is_zip(only):
            prefix += f"{only}/"
            continue
        in_folders = {_split_of(folder) for folder in folders} - {None}
        in_all = set(layout.values())
        is_layout = {"train"} < in_folders or (
            None not in in_all and (folders == tops or {"train"} < in_all)
        )
        return layout if is_layout else {}
    return {}


def _split_of(name: str) -> str | None:
    return next((split for split, pattern in SPLITS.items() if pattern.search(name)), None)


def _by_split(
    layout: dict[str, str | None], images: list[_File], metadata: list[_File], left_out: LeftOut
) -> dict[str, tuple[list[_File], list[_File]]]:
    """Return the images and the metadata files of each split; all are train without a layout."""
    if not layout:
        return {"train": (images, metadata)}
    names = {split for split in layout.values() if split}
    splits = {split: ([], []) for split in SPLITS if split in names}
    for kind, files in enumerate((images, metadata)):
        for file in files:
            parts = file.name.split("/")
            beginnings = ("/".join(parts[:end]) for end in range(1, len(parts) + 1))
            split = next((layout[start] for start in beginnings if start in layout), None)
            if split is None:
                left_out[f"outside of the splits {', '.join(splits)}"].append(file.name)
            else:
                splits[split][kind].append(file)
    return splits


# Metadata


def _rows(
    root: str,
    images: list[_File],
    metadata: list[_File],
    left_out: LeftOut,
    label_column: str | None,
    tops: set[str],
) -> list[Row]:
    """Return the rows of metadata files, then the other images by their paths."""
    paths = {file.location: file.path for file in images}
    entries = [pair for file in metadata for pair in _read_metadata(root, file, paths, left_out)]
    described = [row for row, _ in entries]
    columns = dict.fromkeys(column for row in described for column in row)
    in_metadata = {path for row in described for path in row.values()}
    others = [file for file in images if file.path not in in_metadata]
    if len(columns) > 1:
        for file in others:
            left_out["not in the metadata, which have several columns of images"].append(file.name)
        rows = [{column: row.get(column) for column in columns} for row in described]
    else:
        column = next(iter(columns), "image")
        rows = [*described, *({column: file.path} for file in others)]
    if label_column is None or not rows:
        return rows
    if label_column in rows[0]:
        raise UserError(f"--label_column {label_column} is a column of images. Choose another.")
    if any(label_column in entry for _, entry in entries):
        labels = _label_cells([entry.get(label_column) for _, entry in entries])
        labels += [None] * (len(rows) - len(labels))
    elif label_column == CLASS_COLUMN:
        folders = {file.path: posixpath.dirname(file.location) for file in images}
        names = {path: posixpath.basename(f) for path, f in folders.items() if f not in tops}
        labels = [names.get(next(iter(row.values()))) for row in rows]
    else:
        labels = []
    if not any(label is not None for label in labels):
        return rows
    return [{**row, label_column: label} for row, label in zip(rows, labels, strict=True)]


def _label_cells(cells: list[Any]) -> list[Any]:
    """Return cells of metadata; texts of integers, as a CSV file has them, as integers."""
    cells = [None if isinstance(cell, str) and not cell.strip() else cell for cell in cells]
    texts = [cell for cell in cells if cell is not None]
    if all(isinstance(text, str) and INTEGER.fullmatch(text) for text in texts):
        return [None if cell is None else int(cell) for cell in cells]
    return cells


def _read_metadata(
    root: str, file: _File, paths: dict[str, str], left_out: LeftOut
) -> list[tuple[Row, dict[Any, Any]]]:
    """Return each row of one metadata file with all its entries.

    None if it describes no image here.
    """
    try:
        described = _parse_metadata(file)
    except Exception as error:  # the parsers raise many types
        left_out[f"metadata that cannot be read: {first_line(error)}"].append(file.name)
        return []
    rows: list[tuple[Row, dict[Any, Any]]] = []
    for entry in described:
        row: Row = {}
        for key, value in entry.items():
            if isinstance(key, str) and (key == "file_name" or key.endswith("_file_name")):
                folder = posixpath.dirname(file.location)
                location = posixpath.normpath(posixpath.join(folder, str(value).replace("\\", "/")))
                if location.startswith(("..", "/")) or "://" in location:
                    left_out["metadata of files outside of the folder"].append(file.name)
                    return []
                column = key.removesuffix("file_name").removesuffix("_") or "image"
                row[column] = paths.get(location, os.path.join(root, location)) if value else None
        if row:
            rows.append((row, entry))
    if not {path for row, _ in rows for path in row.values()} & set(paths.values()):
        left_out["metadata of none of the images"].append(file.name)
        return []
    return rows


def _parse_metadata(file: _File) -> list[dict[Any, Any]]:
    content = read_image_file({"bytes": None, "path": file.path}, None)
    if file.name.endswith(".parquet"):
        return parquet.read_table(content).to_pylist()
    text = content.read().decode("utf-8-sig")
    if file.name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text, newline="")))
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return [row for row in rows if isinstance(row, dict)]
