"""What a file is that Pillow does not read as an image, and what to do with it.

By its first bytes, whatever its name: what people have next to their images or in place of them.
Nothing here is unpacked or decoded.
"""

import re
from contextlib import suppress
from typing import BinaryIO

from PIL.TiffImagePlugin import ImageFileDirectory_v2

CONVERT = "to be converted first (docs/data.md)"
UNPACK = "to be unpacked first"
AS_DATASET = "to be given as --dataset_name"
FIRST_BYTES = 512
"""Bytes of a file that its kind is found by."""
KINDS = tuple(
    (re.compile(start, re.DOTALL | re.IGNORECASE), kind)
    for start, kind in (
        (rb"$", "an empty file"),
        (rb"version https://git-lfs", "a pointer of Git LFS: fetch the files with git lfs pull"),
        (rb"(\xef\xbb\xbf)?\s*(<\?xml.*|<!--.*)?(<!doctype svg.*)?<svg\b", f"SVG, {CONVERT}"),
        (
            rb"(\xef\xbb\xbf)?\s*(<!--.*)?<(!doctype html|html|head|body)\b",
            "a web page, which is to be replaced",
        ),
        (rb"\s*(<\?xml|[{\[]\s*[\"{\[\]}])", "XML or JSON"),
        (rb".{4}ftyp(hei|hev|mif|msf)", f"HEIC, {CONVERT}"),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", f"JPEG XL, {CONVERT}"),
        (rb".{4}ftyp|RIFF.{4}AVI |\x1a\x45\xdf\xa3", f"a video, {CONVERT}"),
        (rb"%PDF", f"PDF, {CONVERT}"),
        (rb"\x93NUMPY|PK\x03\x04.{26}[^/]+\.npy", f"NumPy, {CONVERT}"),
        (rb"MATLAB 5\.0", f"MATLAB, {CONVERT}"),
        (rb"\x89HDF", f"HDF5, {CONVERT}"),
        (rb".{16}\xde\xc0\xef\xbe", f"LMDB, {CONVERT}"),
        (rb"\x80[\x02-\x05]", f"a Python pickle, {CONVERT}"),
        (rb"\0\0[\x08-\x0e][\x01-\x04]\0", f"MNIST's IDX, {CONVERT}"),
        (rb".{128}DICM", f"DICOM, {CONVERT}"),
        (rb".{344}n[+i]1\0", f"NIfTI, {CONVERT}"),
        (rb"PK\x03\x04", f"zip, {UNPACK}"),
        (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", f"compressed, {UNPACK}"),
        (rb".{257}ustar", f"tar, {UNPACK} or {AS_DATASET}"),
        (rb"PAR1|ARROW1", f"a table, {AS_DATASET}"),
    )
)
"""How files begin, and the words for them; the first that fits counts."""


def kind_of(file: BinaryIO) -> str | None:
    """Return what an open file is, with what to do; None if that is not known."""
    with suppress(Exception):  # TIFF tags of others
        file.seek(0)
        start = file.read(FIRST_BYTES)
        if start[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(file, start[:8])
        if start[:4] in (b"II+\0", b"MM\0+"):  # BigTIFF
            return _tiff(file, start[:16])
        return next((kind for pattern, kind in KINDS if pattern.match(start)), None)
    return None


def _tiff(file: BinaryIO, header: bytes) -> str:
    """Return the bands of a TIFF that is none of Pillow's modes."""
    tags = ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    bands, bits = int(tags.get(277, 1)), int(tags.get(258, (1,))[0])
    numbers = {2: "signed integers", 3: "floats"}.get(tags.get(339, (1,))[0], "unsigned integers")
    plural = "s" * (bands != 1)
    return f"TIFF with {bands} band{plural} of {bits}-bit {numbers}, {CONVERT}"
