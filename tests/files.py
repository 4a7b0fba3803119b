"""Image files and datasets for the tests, some of which no library writes."""

import io
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from PIL import Image

PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""Adam7: left, top, step right, step down of each pass of an interlaced PNG."""


def encoded(array, mode: str | None = None, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image file with these pixels."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def gray(*values: int, size: int = 4) -> list[bytes]:
    """Square gray images, one of each value."""
    return [encoded(np.full((size, size), value, np.uint8)) for value in values]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes: [H, W] or [H, W, C]."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def photo(size: int, seed: int = 0) -> Image.Image:
    """A smooth RGB image, similar to a photograph."""
    small = Image.fromarray(noise(8, 8, 3, seed=seed))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, bits: int = 8, color: int = 0, interlaced: int = 0) -> bytes:
    """The beginning of a PNG: signature and IHDR."""
    content = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", content)


def png(
    values, color: int, bits: int = 16, transparent: tuple = (), interlaced: bool = False
) -> bytes:
    """A PNG of [H, W, C] values with color type 0, 2, 4 or 6 and 8 or 16 bits."""
    array = np.asarray(values).astype(">u2" if bits == 16 else "u1")
    array = array.reshape(*array.shape[:2], -1)
    height, width = array.shape[:2]
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    raw = b""
    for left, top, right, down in passes:
        part = array[top::down, left::right]
        if part.size:
            raw += b"".join(b"\0" + row.tobytes() for row in part)
    trns = (
        chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    )
    start = header(width, height, bits, color, int(interlaced))
    return start + trns + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def with_path(file: bytes | None, path: str | None = None) -> dict | None:
    return None if file is None else {"bytes": file, "path": path}


def write_parquet(path: Path, files: list[bytes | None], column: str = "image") -> Path:
    """Write a parquet file with the columns `id` and `column`, an Image."""
    path.parent.mkdir(exist_ok=True, parents=True)
    features = Features({"id": Value("int64"), column: datasets.Image()})
    columns = {"id": list(range(len(files))), column: [with_path(file) for file in files]}
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return path
