"""Git's arithmetic: the ids of blobs, trees and commits, and the pointer that stands for LFS files.

The ids are the ones git itself would give, so a clone of the same content agrees with the server.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# What the Hub keeps out of git by name, whatever the size; other files go by content and size.
LFS_SUFFIXES = (
    *(".7z", ".arrow", ".avro", ".bin", ".bz2", ".ckpt", ".gz", ".h5", ".jpeg", ".jpg", ".lz4"),
    *(".mlmodel", ".model", ".mp3", ".mp4", ".msgpack", ".npy", ".npz", ".onnx", ".parquet"),
    *(".pb", ".pickle", ".pkl", ".png", ".pt", ".pth", ".safetensors", ".tar", ".tflite", ".tgz"),
    *(".wav", ".webp", ".xz", ".zip", ".zst"),
)
LARGEST_REGULAR_FILE = 10 * 1000 * 1000  # bytes


@dataclass(frozen=True)
class File:
    """A file in a commit.

    oid: git's blob id, of the pointer text for an LFS file.
    size: bytes of the real content.
    sha256: of the real content for an LFS file, None for a regular one.
    """

    oid: str
    size: int
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> File:
        return cls(object_id("blob", content), len(content))

    @classmethod
    def lfs(cls, sha256: str, size: int) -> File:
        return cls(object_id("blob", lfs_pointer(sha256, size)), size, sha256)


def object_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    version = "https://git-lfs.github.com/spec/v1"
    return f"version {version}\noid sha256:{sha256}\nsize {size}\n".encode()


def xet_hash(sha256: str) -> str:
    """The Xet hash of an LFS file, and of the xorb it is served as; back again for such a hash.

    A real one is computed from the chunks, but clients do not compare it with what they receive.
    """
    return sha256[::-1]


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether the file is kept outside git; `sample` is its beginning. Empty files never are."""
    if size == 0:
        return False
    if size > LARGEST_REGULAR_FILE or path.lower().endswith(LFS_SUFFIXES) or b"\0" in sample:
        return True
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        # A character cut in two by the end of the sample does not make the file binary.
        return error.start < len(sample) - 3
    return False


def tree_ids(files: Mapping[str, File]) -> dict[str, str]:
    """The tree id of every folder; the root is the empty name."""
    children: dict[str, list[tuple[str, str, str]]] = {"": []}
    for path, file in files.items():
        folder, _, name = path.rpartition("/")
        children.setdefault(folder, []).append(("100644", name, file.oid))
        while folder:
            folder = folder.rpartition("/")[0]
            children.setdefault(folder, [])
    ids: dict[str, str] = {}
    for folder in sorted(children, key=lambda name: -name.count("/") if name else 1):
        # Git sorts a folder as if its name ended with a slash.
        entries = sorted(children[folder], key=lambda e: e[1] + "/" * (e[0] == "40000"))
        content = b"".join(
            f"{mode} {name}".encode() + b"\0" + bytes.fromhex(oid) for mode, name, oid in entries
        )
        ids[folder] = object_id("tree", content)
        if folder:
            parent, _, name = folder.rpartition("/")
            children[parent].append(("40000", name, ids[folder]))
    return ids


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, then rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    with os.fdopen(handle, "wb") as target:
        target.write(content)
    os.replace(beside, path)
