"""One image file -> uint8 pixels of the size that is trained on, right in every mode.

Pillow decodes and resizes. Nothing transparent is left: it shows the background. What the file was
like comes back beside its pixels. Colour profiles (ICC) are left alone: numbers are taken as they
stand.
"""

import io
import os
import re
import stat
import threading
import warnings
import zipfile
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from ddpm.config.train import DataConfig
from ddpm.errors import UsageError

MAX_PIXELS = 2**27
"""Pixels of an image, 134 million: more is refused from the header, before any are decoded."""
LARGE_IMAGE_PIXELS = 2**24
"""Images above so many pixels are decoded one at a time, whatever the number of threads."""
MAX_ASPECT = 16
"""Before a square is cropped out, longer images are cut to their middle of this aspect."""
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters is raised, the rest is read
Image.init()
FORMATS = tuple(kind for kind in Image.ID if kind != "EPS")
"""What may be an image: all that Pillow knows but EPS, which is a program that Ghostscript runs."""

HIGH_BIT_DEPTH_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts an image upright, by its EXIF orientation."""
_one_large = threading.Lock()

Color = tuple[int, int, int]


@dataclass(frozen=True)
class DecodeConfig:
    """How files become pixels: all settings that change a stored byte."""

    resolution: int
    resize_mode: Literal["crop", "pad", "stretch"]
    center_crop: bool
    background: Color
    channels: int | None
    value_range: tuple[float, float] | None

    @classmethod
    def of(cls, config: DataConfig) -> "DecodeConfig":
        """UsageError for a background or a range that means nothing."""
        return cls(
            resolution=config.resolution,
            resize_mode=config.resize_mode,
            center_crop=config.center_crop,
            background=parse_color(config.background),
            channels=config.channels,
            value_range=parse_value_range(config.value_range),
        )


@dataclass(frozen=True)
class ImageInfo:
    """What a file was like. `low`, `high`: its extreme values where they are deeper than 8 bits."""

    mode: str
    width: int
    height: int
    bits: int
    alpha: bool
    rotated: bool
    icc: bool
    animated: bool
    low: float | None = None
    high: float | None = None


def decode_row(value: dict[str, Any] | None, look: DecodeConfig) -> tuple[np.ndarray, ImageInfo]:
    """A row of an undecoded Image column -> [C, H, W] uint8 and what the file was like.

    C is `look.channels`; where that is None, 1 for an image without any colour, else 3. H and W are
    the resolution; with random crops the shorter of them. Raises whatever Pillow raises for a file
    that it cannot read, ValueError for one that should not be read.
    """
    image, seen = decode_image(open_image_file(value), look.background, look.value_range)
    if look.channels is not None:
        image = image.convert("L" if look.channels == 1 else "RGB")
    array = np.asarray(resize(image, look))
    if array.ndim == 2:
        return array[None], seen
    if look.channels is None and _is_gray(array[:1]) and _is_gray(array):
        return np.ascontiguousarray(array[None, :, :, 0]), seen
    return np.ascontiguousarray(array.transpose(2, 0, 1)), seen


def failure_reason(value: dict[str, Any] | None, error: Exception) -> str:
    """Why a row cannot be read, in a few words that name its file where it has one."""
    reason = str(error).split("\n")[0]
    if isinstance(error, UnidentifiedImageError) or not reason:
        reason = "not a readable image"
    elif isinstance(error, Image.DecompressionBombError):
        reason = f"more than the {MAX_PIXELS:,} pixels that are taken; make it smaller first"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    path = value.get("path") if value else None
    return f"{Path(path.split('::')[0]).name}: {reason}" if path else reason


def decode_image(
    file: Any, background: Color, value_range: tuple[float, float] | None = None
) -> tuple[Image.Image, ImageInfo]:
    """An open binary file -> its first frame in mode L or RGB, upright, opaque; what it was like.

    Gray and colours of 16 bits are scaled from 0..65535, or `value_range`, to 0..255, floats from
    0..1. Values out of these ranges are a ValueError.
    """
    with Image.open(file, formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise ValueError(
                f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS:,} that are "
                "taken; make it smaller first"
            )
        stored: dict[str, Any] = {
            "mode": image.mode,
            "width": image.width,
            "height": image.height,
            "bits": _bits(image),
            "alpha": image.has_transparency_data,
            "icc": bool(image.info.get("icc_profile")),
        }
        with _one_large if pixels > LARGE_IMAGE_PIXELS else nullcontext():
            opaque, extremes = _opaque(image, file, stored["bits"], background, value_range)
            # Only now: in some formats these read on, or lose what was read.
            turn, animated = _orientation(image), _animated(image)
    if turn in EXIF_TRANSPOSES:
        opaque = opaque.transpose(EXIF_TRANSPOSES[turn])
    return opaque, ImageInfo(
        **stored, **extremes, rotated=turn in EXIF_TRANSPOSES, animated=animated
    )


def resize(image: Image.Image, look: DecodeConfig) -> Image.Image:
    """Resized with antialiasing to the resolution; the shorter side alone before a random crop."""
    size = look.resolution
    if look.resize_mode == "stretch":
        return _resized(image, size, size)
    if look.resize_mode == "pad":
        scale = size / max(image.size)
        return _padded(_resized(image, *(max(1, round(side * scale)) for side in image.size)), look)
    short = min(image.size)
    if max(image.size) > MAX_ASPECT * short:
        image = _middle(image, *(min(side, MAX_ASPECT * short) for side in image.size))
    image = _resized(image, *(int(size * side / short) for side in image.size))
    return _middle(image, size, size) if look.center_crop else image


def parse_color(text: str) -> Color:
    """A colour name or #rrggbb as three bytes; UsageError for anything else."""
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise UsageError(
            f"--background {text} is no colour. Give white, black or #rrggbb."
        ) from None


def parse_value_range(text: str | None) -> tuple[float, float] | None:
    """LOW,HIGH as two numbers; UsageError for anything else."""
    if text is None:
        return None
    with suppress(ValueError):
        low, high = (float(part) for part in text.split(","))
        if np.isfinite(low) and np.isfinite(high) and low < high:
            return low, high
    raise UsageError(
        f"--value_range {text} is no range. Give the values of black and white, as in 0,4095."
    )


def _bits(image: Image.Image) -> int:
    """Bits of a channel as the file stores it; the depth is only in the name of Pillow's codec."""
    if image.mode in ("1", "I", "F"):
        return {"1": 1}.get(image.mode, 32)
    if image.format not in ("PNG", "TIFF", "PPM") or image.mode == "P":
        return 16 if image.mode in HIGH_BIT_DEPTH_MODES else 8
    found = re.search(r";(\d+)", str(image.tile[0].args)) if image.tile else None
    return int(found[1]) if found else 8


def _orientation(image: Image.Image) -> int:
    """The camera's note of what is up, 1 to 8; broken EXIF is none."""
    with suppress(Exception):
        return int(image.getexif().get(0x0112, 1))
    return 1


def _animated(image: Image.Image) -> bool:
    with suppress(Exception):  # looks for a second frame, which may be broken
        animated = bool(getattr(image, "is_animated", False))
        image.seek(0)
        return animated
    return False


def _key(image: Image.Image) -> Any:
    """The value, or colour, that a PNG declares transparent; None where there is none."""
    return image.info.get("transparency")


def _opaque(
    image: Image.Image,
    file: Any,
    bits: int,
    background: Color,
    value_range: tuple[float, float] | None,
) -> tuple[Image.Image, dict[str, float]]:
    """A file just opened -> mode L or RGB over the background, and its extremes where deep."""
    if image.format == "PNG" and bits == 16 and image.mode in ("RGB", "RGBA"):
        values = _deep_png(file, image.tile[0].args)
    else:
        image.load()
        if image.mode not in HIGH_BIT_DEPTH_MODES:
            return _from_shallow(image, background, bits), {}
        values = np.asarray(image)[:, :, None]
    usual = (0.0, 1.0 if image.mode == "F" else 65535.0)
    return _from_deep(values, _key(image), background, value_range or usual)


def _deep_png(file: Any, codec: str) -> np.ndarray:
    """A PNG of 16 bits a channel -> [H, W, C] uint16.

    Pillow has no mode for it and keeps the upper byte of each value. Its codec for the other order
    of bytes keeps the lower one.
    """
    if codec == "LA;16B":
        both = _unpacked(file, "RGBA").astype(np.uint16)
        return both[:, :, 0::2] << 8 | both[:, :, 1::2]
    upper = _unpacked(file, codec).astype(np.uint16)
    return upper << 8 | _unpacked(file, f"{codec.removesuffix('B')}L")


def _unpacked(file: Any, codec: str) -> np.ndarray:
    """A file's pixels as another of Pillow's codecs understands its bytes."""
    file.seek(0)
    with Image.open(file) as image:
        image.tile = [image.tile[0]._replace(args=codec)]
        image.load()
        return np.asarray(image)


def _from_deep(
    values: np.ndarray, key: Any, background: Color, limits: tuple[float, float]
) -> tuple[Image.Image, dict[str, float]]:
    """[H, W, C] deeper than 8 bits, C of L, LA, RGB or RGBA -> L or RGB, and the extreme values."""
    alpha = None
    if values.shape[2] in (2, 4):
        values, alpha = values[:, :, :-1], values[:, :, -1:].astype(np.float32) / 65535
    elif key is not None:
        alpha = (values != np.asarray(key)).any(axis=2, keepdims=True).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    black, white = limits
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("holds values that are no finite numbers")
    if not black <= low <= high <= white:
        raise ValueError(
            f"values from {low:g} to {high:g} where {black:g} to {white:g} was expected "
            "(--value_range changes that)"
        )
    scaled = (values.astype(np.float32) - black) * (255.0 / (white - black))
    if alpha is not None:
        scaled = scaled * alpha + np.asarray(background, np.float32) * (1 - alpha)
    pixels = np.rint(scaled).astype(np.uint8)
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return image, {"low": low, "high": high}


def _from_shallow(image: Image.Image, background: Color, bits: int) -> Image.Image:
    """Any mode of 8 bits or fewer -> L or RGB over the background."""
    if isinstance(_key(image), int) and image.mode == "L" and bits < 8:
        # A PNG's transparent gray is in units of its depth, Pillow's pixels are not.
        image.info["transparency"] = _key(image) * 255 // (2**bits - 1)
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _is_gray(array: np.ndarray) -> bool:
    return bool((array == array[:, :, :1]).all())


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """Pillow's bilinear widens its support when it shrinks: that is the antialiasing."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _padded(image: Image.Image, look: DecodeConfig) -> Image.Image:
    """In the middle of a square of the background, which may bring colour into a gray image."""
    if look.channels != 1 and len(set(look.background)) > 1:
        image = image.convert("RGB")
    paper = Image.new("RGB", (1, 1), look.background).convert(image.mode).getpixel((0, 0))
    square = Image.new(image.mode, (look.resolution, look.resolution), paper)
    square.paste(image, tuple((look.resolution - side) // 2 for side in image.size))
    return square


# Opening one image of a dataset, or of a person: bytes, a file, a member of a zip, an address.

MAX_FILE_BYTES = 2**30
"""Bytes that a file may have, or a member of a zip archive unpack to."""


def open_image_file(value: dict[str, Any] | None) -> Any:
    """The open binary file of a row: its bytes, a file here, a member of a zip, or an address."""
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise ValueError("no image in this row")
    if value.get("bytes") is not None:
        return io.BytesIO(value["bytes"])
    path = value["path"]
    inner, is_chained, outer = path.removeprefix("zip://").partition("::")
    if path.startswith("zip://") and is_chained and "://" not in outer:
        member = _archive(outer).getinfo(inner)
        if member.file_size > MAX_FILE_BYTES:
            raise ValueError(f"unpacks to {member.file_size:,} bytes")
        return io.BytesIO(_archive(outer).read(member))
    if "://" in path:
        import fsspec

        with fsspec.open(path, "rb") as remote:
            return io.BytesIO(remote.read())
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # a pipe would keep us waiting for ever
        raise ValueError("not a regular file")
    if about.st_size > MAX_FILE_BYTES:
        raise ValueError(f"a file of {about.st_size:,} bytes")
    with open(path, "rb") as file:
        return io.BytesIO(file.read())


@lru_cache(maxsize=8)
def _archive(path: str) -> zipfile.ZipFile:
    """A zip archive, its table of contents read once; reading members is safe in threads."""
    return zipfile.ZipFile(path)
