"""Atomic file writes, JSON, and hashes: a reader sees the old content or the new one."""

import errno
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from ddpm.errors import UserError, first_line

JSON_LIMIT = 2**22
"""Largest JSON file in bytes that is read. In memory, a value takes up to 30 times as much."""
JSON_DEPTH = 32
"""Most nested lists and objects in a JSON file, far below what Python's recursion allows."""
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What CIFS, VirtualBox and FUSE answer where they cannot flush a folder or a file."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old or the new content, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link to another place
    with open(partial, "wb") as file:
        file.write(content)
    fsync_and_rename(partial, path)


def fsync_and_rename(partial: Path, path: Path) -> None:
    """Rename a written file to `path` once its content is on disk."""
    fsync_file(partial)
    os.replace(partial, path)
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write indented UTF-8 JSON atomically. Raise ValueError for NaN and infinity."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path, limit: int = JSON_LIMIT, source: str | None = None) -> dict[str, Any]:
    """Return the object in a JSON file of at most `limit` bytes.

    Raise UserError for a file that is missing, too large, not JSON, or holds another kind of value.
    It names `source`, by default the path.
    """
    source = source or str(path)
    try:
        value = json.loads(read_bytes(path, limit))
        _require_shallow(value)
        json.dumps(value, ensure_ascii=False).encode()  # raises for half a surrogate pair
    except FileNotFoundError:
        raise UserError(f"{source} does not exist.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{source} cannot be read as JSON ({first_line(error)}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{source} must be a JSON object.")
    return value


def _require_shallow(value: Any, levels: int = JSON_DEPTH) -> None:
    """Raise ValueError for more than `levels` nested lists and objects."""
    if isinstance(value, (dict, list)):
        if levels == 0:
            raise ValueError(f"more than {JSON_DEPTH} nested lists and objects")
        for item in value.values() if isinstance(value, dict) else value:
            _require_shallow(item, levels - 1)


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file. Raise ValueError for another kind, or above `limit`.

    Devices and pipes are not opened: they may have no end, or block.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no file")
    if status.st_size > limit:
        raise ValueError(f"{status.st_size:,} bytes are more than the limit of {limit:,}")
    with open(path, "rb") as file:
        return file.read(limit)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    return file_hash(path, hashlib.sha256())


def file_hash(path: Path, digest: Any) -> str:
    """Return the hash of a file, in hex. `digest` is a new object with the methods of hashlib's."""
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def write_failure_reason(error: BaseException, folder: Path) -> str:
    """Return a few words on why a file could not be written into `folder`.

    torch and safetensors wrap the system's error or lose it; a disk with less than a page free is
    full. Call this before anything is deleted.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    if shutil.disk_usage(folder).free < 4096:
        return "No space left on device"
    return first_line(error)


def fsync_file(path: Path) -> None:
    """Flush a written file."""
    with open(path, "rb+") as file:  # Windows flushes no file that is open for reading alone
        _fsync(file.fileno())


def fsync_dir(folder: Path) -> None:
    """Flush the entries of a folder, so that renames survive a power cut (POSIX only)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            _fsync(handle)
        finally:
            os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, then the folders, before the folder is renamed."""
    for path in folder.rglob("*"):
        if path.is_file():
            fsync_file(path)
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        fsync_dir(path)


def _fsync(handle: int) -> None:
    """Flush an open file or folder, unless its file system has no such operation."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
