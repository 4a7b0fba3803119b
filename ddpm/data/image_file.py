"""The file of an image: the bytes of a row, or the file that its path names.

A path in a dataset of the Hub is text from a stranger. It may only lead to a file of that dataset:
below its snapshot in the cache of the Hub, at its own hf:// address when it is streamed, or inside
a zip file that lies there. Anything else is refused before it is opened. The user's own data may
name any local file.
"""

import io
import os
import stat
import time
import zipfile
from functools import lru_cache
from typing import Any, BinaryIO

from ddpm import download

MAX_FILE_BYTES = 2**30
"""Largest size of a file, and of a member of a zip archive after unpacking."""
MAX_SECONDS = 60.0
"""Longest time to read a file."""
ZIP_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compressions that zipfile unpacks piece by piece; of the others, a small piece can be huge."""


def read_image_file(value: dict[str, Any] | bytes | None, hub_id: str | None) -> BinaryIO:
    """Return the content of a row {"bytes": ..., "path": ...}, or of its bytes.

    `hub_id` is the id of the dataset on the Hub, None for the user's own data. ValueError for a row
    without an image, for a path that points outside the dataset, for anything but a regular file,
    and above MAX_FILE_BYTES or MAX_SECONDS.
    """
    if isinstance(value, bytes):
        value = {"bytes": value}
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise ValueError("no image in this row")
    if value.get("bytes") is not None:
        _require_size(len(value["bytes"]))
        return io.BytesIO(value["bytes"])
    if not _is_inside(_split(value["path"])[1], hub_id):
        raise ValueError("points outside the dataset")
    file, size = open_file(value["path"])
    with file:
        _require_size(size)
        return io.BytesIO(_read(file))


def open_file(path: str) -> tuple[BinaryIO, int]:
    """Return an open file, which may be zip://MEMBER::ARCHIVE, and its size."""
    member, path = _split(path)
    return _open(path) if member is None else _open_member(path, member)


def _split(path: str) -> tuple[str | None, str]:
    """Return the member of a zip file, None for any other path, and the file."""
    if not path.startswith("zip://"):
        return None, path
    member, _, archive = path.removeprefix("zip://").rpartition("::")
    return member, archive


def _is_inside(path: str, hub_id: str | None) -> bool:
    """Return whether a path or an address may be opened for a row of the dataset."""
    if hub_id is None:
        return "://" not in path
    if "://" in path:
        is_own = path.startswith(f"hf://datasets/{hub_id}@")
        return is_own and "::" not in path and ".." not in path.split("/")
    snapshots = os.path.realpath(download.dataset_folder(hub_id, "."))
    repo, cache = os.path.dirname(snapshots), os.path.dirname(os.path.dirname(snapshots))
    file, folder = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    # A file of a snapshot is a link to blobs/ of its repository, or on to those that all share.
    return _is_below(folder, snapshots) and (
        _is_below(file, repo) or _is_below(file, os.path.join(cache, "blobs"))
    )


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def _open(path: str) -> tuple[BinaryIO, int]:
    """Return an open file, at an address or on this machine, and its size."""
    if "://" in path:
        import fsspec

        file = fsspec.open(path, "rb").open()
        return file, file.size
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would block forever
        raise ValueError("not a regular file")
    return open(path, "rb"), status.st_size


def _open_member(archive: str, member: str) -> tuple[BinaryIO, int]:
    """Return an open member of a zip file, and its size."""
    info = _open_zip(archive).getinfo(member)
    if info.compress_type not in ZIP_COMPRESSIONS:
        raise ValueError("compressed in another way than deflate")
    return _open_zip(archive).open(info), info.file_size


@lru_cache(maxsize=8)
def _open_zip(path: str) -> zipfile.ZipFile:
    """Open an archive and keep its table of contents; reading members is thread-safe."""
    return zipfile.ZipFile(_open(path)[0])


def _read(file: BinaryIO) -> bytes:
    """Return the content of an open file, whatever size it states."""
    content, end = bytearray(), time.monotonic() + MAX_SECONDS
    while chunk := file.read(2**20):
        content += chunk
        _require_size(len(content))
        if time.monotonic() > end:
            raise ValueError(f"not read after {MAX_SECONDS:g} seconds")
    return bytes(content)


def _require_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"larger than the limit of {MAX_FILE_BYTES:,} bytes")
