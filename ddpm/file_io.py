"""Atomic file writes, JSON, and hashes: a reader sees the old content or the new one."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ddpm.errors import UserError


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old or the new content, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
    fsync_and_rename(partial, path)


def fsync_and_rename(partial: Path, path: Path) -> None:
    """Rename a written file to `path` once its content is on disk."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write indented UTF-8 JSON atomically. Raise ValueError for NaN and infinity."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raise UserError for a file that is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from None


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
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def fsync_dir(folder: Path) -> None:
    """Flush the entries of a folder, so that renames survive a power cut (POSIX only)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, then the folders, before the folder is renamed."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        fsync_dir(path)
