"""Files and datasets for the tests: images, some of which no library writes, and JSON."""

import io
import json
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


def tiff(
    pixels: np.ndarray,
    photometric: int = 1,
    extra: tuple[int, ...] = (),
    planar: bool = False,
    big_endian: bool = False,
    no_data: bytes = b"",
) -> bytes:
    """An uncompressed TIFF of [H, W, bands] in any type of number, also of bands without a color.

    photometric: 1 for gray, 2 for RGB. extra: what the bands after those are, 2 for alpha.
    """
    order = ">" if big_endian else "<"
    height, width, bands = pixels.shape
    planes = pixels.transpose(2, 0, 1) if planar else pixels[None]
    data = planes.astype(pixels.dtype.newbyteorder(order)).tobytes()
    size = len(data) // len(planes)
    values = {
        256: (width,),
        257: (height,),
        258: (8 * pixels.itemsize,) * bands,
        259: (1,),
        262: (photometric,),
        273: tuple(8 + index * size for index in range(len(planes))),
        277: (bands,),
        278: (height,),
        279: (size,) * len(planes),
        284: (1 + planar,),
        338: extra,
        339: (1 + "uif".index(pixels.dtype.kind),) * bands,
    }
    tags = {tag: (4, struct.pack(f"{order}{len(v)}I", *v)) for tag, v in values.items() if v}
    if no_data:
        tags[42113] = (2, no_data)
    directory, long_values = struct.pack(f"{order}H", len(tags)), b""
    after = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, (kind, value) in sorted(tags.items()):
        count = len(value) // (4 if kind == 4 else 1)
        inline = value.ljust(4, b"\0")
        if len(value) > 4:
            inline = struct.pack(f"{order}I", after + len(long_values))
            long_values += value
        directory += struct.pack(f"{order}HHI", tag, kind, count) + inline
    start = (b"MM" if big_endian else b"II") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return start + data + directory + bytes(4) + long_values


def with_path(file: bytes | None, path: str | None = None) -> dict | None:
    return None if file is None else {"bytes": file, "path": path}


def write_parquet(path: Path, files: list[bytes | None], column: str = "image") -> Path:
    """Write a parquet file with the columns `id` and `column`, an Image."""
    path.parent.mkdir(exist_ok=True, parents=True)
    features = Features({"id": Value("int64"), column: datasets.Image()})
    columns = {"id": list(range(len(files))), column: [with_path(file) for file in files]}
    Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def edit_json(path: Path, **changes: object) -> None:
    """Change some entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
