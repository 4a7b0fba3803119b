"""Opening one image of a dataset, or of a person: bytes, a file, a member of a zip, an address."""

import io
import os
import stat
import zipfile
from functools import lru_cache
from typing import Any

MAX_FILE = 2**30
"""Bytes that a file may have, or a member of a zip archive unpack to."""


def open_row(value: dict[str, Any] | None) -> Any:
    """The open binary file of a row: its bytes, a file here, a member of a zip, or an address."""
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise ValueError("no image in this row")
    if value.get("bytes") is not None:
        return io.BytesIO(value["bytes"])
    path = value["path"]
    inner, is_chained, outer = path.removeprefix("zip://").partition("::")
    if path.startswith("zip://") and is_chained and "://" not in outer:
        member = _archive(outer).getinfo(inner)
        if member.file_size > MAX_FILE:
            raise ValueError(f"unpacks to {member.file_size:,} bytes")
        return io.BytesIO(_archive(outer).read(member))
    if "://" in path:
        import fsspec

        with fsspec.open(path, "rb") as remote:
            return io.BytesIO(remote.read())
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # a pipe would keep us waiting for ever
        raise ValueError("not a regular file")
    if about.st_size > MAX_FILE:
        raise ValueError(f"a file of {about.st_size:,} bytes")
    with open(path, "rb") as file:
        return io.BytesIO(file.read())


@lru_cache(maxsize=8)
def _archive(path: str) -> zipfile.ZipFile:
    """A zip archive, its table of contents read once; reading members is safe in threads."""
    return zipfile.ZipFile(path)
