"""Decode one image file into uint8 pixels of the training resolution.

Pillow decodes and resizes. Transparency is composited over a background color or kept as a fourth
channel, EXIF orientation is applied, 16-bit and float images are scaled to 8 bits, and what the
file was like is returned with its pixels. Color profiles (ICC) are not applied.
"""

import re
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from ddpm.config.data import DataConfig
from ddpm.config.values import Resolution, parse_color, size_of
from ddpm.data.file_kind import kind_of
from ddpm.data.image_file import read_image_file
from ddpm.errors import printable

MAX_PIXELS = 2**27
"""Larger images (134 million pixels) are refused by their header, before anything is decoded."""
LARGE_IMAGE_PIXELS = 2**24
"""Larger images are decoded one at a time, whatever the number of threads, to bound memory."""
MAX_ASPECT = 16
"""Images with a larger aspect ratio are cut to their middle before a square is cropped."""
HIGH_BIT_DEPTH_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes with more than 8 bits in a channel."""
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL, GDAL_NODATA = 258, 277, 42113
"""Tags of TIFF."""
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns an image upright, by its EXIF orientation."""

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", module=r"PIL\.")  # broken metadata; broken pixels raise
Image.init()
FORMATS = tuple(name for name in Image.ID if name != "EPS")
"""Formats that are read: all of Pillow's but EPS, a program that Ghostscript would execute."""
_large_image_lock = threading.Lock()

Color = tuple[int, int, int]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of each number of channels."""


class DecodeError(Exception):
    """A row that cannot be read. The message is the reason, after the name of the file if any."""


@dataclass(frozen=True)
class DecodeConfig:
    """All settings that change a decoded byte; part of the key of the pixel cache."""

    resolution: Resolution
    resize_mode: Literal["crop", "pad", "stretch"]
    center_crop: bool
    background: Color | None
    """None keeps the transparency."""
    channels: int | None
    value_range: tuple[float, float] | None

    @classmethod
    def of(cls, config: DataConfig) -> "DecodeConfig":
        """Return the settings of decoding among those of the data."""
        return cls(
            resolution=config.resolution,
            resize_mode=config.resize_mode,
            center_crop=config.center_crop,
            background=None if config.channels == 4 else parse_color(config.background),
            channels=config.channels,
            value_range=config.value_limits,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of `resolution`."""
        return size_of(self.resolution)


@dataclass(frozen=True)
class ImageInfo:
    """Properties of an image file. `low` and `high`: extreme values of more than 8 bits.

    `width` and `height` are those of the file, which `sideways` (EXIF) exchanges.
    """

    mode: str
    width: int
    height: int
    bits: int
    alpha: bool
    rotated: bool
    icc: bool
    animated: bool
    extra_bands: bool
    low: float | None = None
    high: float | None = None
    sideways: bool = False

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width after the EXIF orientation is applied."""
        return (self.width, self.height) if self.sideways else (self.height, self.width)


def decode_row(
    value: dict[str, Any] | bytes | list[Any] | None, config: DecodeConfig, hub_id: str | None
) -> tuple[np.ndarray, ImageInfo]:
    """Decode {"bytes": ..., "path": ...}, bytes, or a list of one of them, to [C, H, W] uint8.

    `hub_id` is the id of the dataset on the Hub, None for the user's own data.

    C is `config.channels`; if that is None, 1 for an image without any color, else 3. H and W are
    the resolution, or larger in one direction if the crop is random. DecodeError if the row cannot
    be read.
    """
    try:
        if isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"{len(value)} images in one row; give each a row of its own")
            value = value[0]
        file = read_image_file(value, hub_id)
        image, info = decode_image(file, config.background, config.value_range)
        if config.channels is not None and image.mode != MODES[config.channels]:
            image = image.convert(MODES[config.channels])
        array = np.asarray(resize(image, config))
    except Exception as error:  # Pillow's plugins raise many types for broken files
        raise DecodeError(failure_reason(value, error)) from error
    if array.ndim == 2:
        return array[None], info
    if config.channels is None and _is_gray(array[:1]) and _is_gray(array):
        return np.ascontiguousarray(array[None, :, :, 0]), info
    return np.ascontiguousarray(array.transpose(2, 0, 1)), info


def failure_reason(value: Any, error: Exception) -> str:
    """Return a short reason why a row cannot be read, with the name of its file if it has one."""
    reason = str(error).split("\n")[0]
    if isinstance(error, UnidentifiedImageError) or not reason:
        reason = "not a readable image"
    elif isinstance(error, Image.DecompressionBombError):
        reason = f"more pixels than the limit of {MAX_PIXELS:,}; make it smaller first"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    path = value.get("path") if isinstance(value, dict) else None
    return printable(f"{Path(path.split('::')[0]).name}: {reason}" if path else reason)


def is_image(file: BinaryIO) -> bool:
    """Return whether Pillow reads the format of an open file, by its header."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return not isinstance(image, ImageFile.StubImageFile)
    except Exception:  # Pillow's plugins raise many types
        return False


def decode_image(
    file: BinaryIO, background: Color | None, value_range: tuple[float, float] | None = None
) -> tuple[Image.Image, ImageInfo]:
    """Decode the first frame of an open file to an upright, opaque image in mode L or RGB.

    If `background` is None, a file with transparency becomes RGBA instead: straight alpha, as in a
    PNG, and black where it is 0, since what is stored there is arbitrary and would be trained on.

    Values of 16 bits are scaled from 0..65535 and floats from 0..1, or both from `value_range`, to
    0..255. ValueError for values outside of that range, for images above MAX_PIXELS, and for what
    is no image, with the kind of file that it is.
    """
    with _open_image(file) as image:
        num_pixels = image.width * image.height
        if num_pixels > MAX_PIXELS:
            raise ValueError(
                f"{image.width}x{image.height} pixels are more than the limit of {MAX_PIXELS:,}; "
                "make it smaller first"
            )
        properties: dict[str, Any] = {
            "mode": image.mode,
            "width": image.width,
            "height": image.height,
            "bits": _bits(image),
            "alpha": image.has_transparency_data,
            "icc": bool(image.info.get("icc_profile")),
            "extra_bands": _has_extra_bands(image),
        }
        with _large_image_lock if num_pixels > LARGE_IMAGE_PIXELS else nullcontext():
            pixels, extremes = _to_8_bit(image, file, properties["bits"], background, value_range)
            if pixels.mode == "RGBA":
                properties["alpha"] = pixels.getextrema()[3][0] < 255
                array = np.asarray(pixels)
                pixels = Image.fromarray(array * (array[:, :, 3:] > 0))
            # Only after loading: in some formats these read further, or drop what was read.
            orientation, animated = _orientation(image), _is_animated(image)
    rotated = orientation in EXIF_TRANSPOSES
    if rotated:
        pixels = pixels.transpose(EXIF_TRANSPOSES[orientation])
    properties |= {"rotated": rotated, "sideways": orientation >= 5, "animated": animated}
    return pixels, ImageInfo(**properties, **extremes)


def _open_image(file: BinaryIO) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
        if not isinstance(image, ImageFile.StubImageFile):
            return image
    except UnidentifiedImageError:
        pass
    kind = kind_of(file)
    raise ValueError(f"not a readable image{f': {kind}' if kind else ''}")


def resize(image: Image.Image, config: DecodeConfig) -> Image.Image:
    """Resize to the resolution with antialiasing; before a random crop, one side may be longer."""
    height, width = config.size
    if config.resize_mode == "stretch":
        return _resize_to(image, width, height)
    if config.resize_mode == "pad":
        scale = min(width / image.width, height / image.height)
        inner = _resize_to(image, *(max(1, round(side * scale)) for side in image.size))
        return _pad(inner, config)
    widest = max(1, MAX_ASPECT * width * image.height // height)
    highest = max(1, MAX_ASPECT * height * image.width // width)
    image = _center_crop(image, min(image.width, widest), min(image.height, highest))
    # The side that needs the larger scale becomes that of the resolution.
    pairs = ((width, image.width), (height, image.height))
    target, source = max(pairs, key=lambda pair: pair[0] / pair[1])
    image = _resize_to(image, *(int(target * side / source) for side in image.size))
    return _center_crop(image, width, height) if config.center_crop else image


# Properties of a file


def _bits(image: Image.Image) -> int:
    """Return the stored bits of a channel; but in TIFF, only Pillow's name of the codec tells."""
    if image.mode in ("1", "I", "F"):
        return 1 if image.mode == "1" else 32
    if image.format == "TIFF" and image.mode in ("RGB", "RGBA"):
        return image.tag_v2.get(BITS_PER_SAMPLE, (8,))[0]
    if image.format not in ("PNG", "TIFF", "PPM") or image.mode == "P":
        return 16 if image.mode in HIGH_BIT_DEPTH_MODES else 8
    depth = re.search(r";(\d+)", str(image.tile[0].args)) if image.tile else None
    return int(depth[1]) if depth else 8


def _has_extra_bands(image: Image.Image) -> bool:
    """Return whether a TIFF has more bands than its mode, such as infrared after RGB."""
    if image.format != "TIFF":
        return False
    return image.tag_v2.get(SAMPLES_PER_PIXEL, 1) > len(image.getbands())


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the EXIF data is broken."""
    with suppress(Exception):
        return int(image.getexif().get(0x0112, 1))
    return 1


def _is_animated(image: Image.Image) -> bool:
    with suppress(Exception):  # reads the second frame, which may be broken
        animated = bool(getattr(image, "is_animated", False))
        image.seek(0)
        return animated
    return False


def _transparent_value(image: Image.Image) -> Any:
    """Return the value or color that a PNG declares transparent (tRNS), or None."""
    return image.info.get("transparency")


def _is_gray(array: np.ndarray) -> bool:
    """Return whether all channels of [H, W, C] are equal."""
    return bool((array == array[:, :, :1]).all())


# Pixels of every mode -> L or RGB, or RGBA without a background


def _to_8_bit(
    image: Image.Image,
    file: BinaryIO,
    bits: int,
    background: Color | None,
    value_range: tuple[float, float] | None,
) -> tuple[Image.Image, dict[str, float]]:
    """Load an opened image over the background; with extreme values above 8 bits."""
    is_color = image.format in ("PNG", "TIFF") and image.mode in ("RGB", "RGBA")
    # Premultiplied colors (RGBa) are divided by alpha byte by byte, so only by Pillow.
    if bits == 16 and is_color and "RGBa" not in str(image.tile[0].args):
        values = _load_16_bit_color(image, file)
    else:
        image.load()
        if image.mode not in HIGH_BIT_DEPTH_MODES:
            return _convert_8_bit(image, background, bits), {}
        values = np.asarray(image)[:, :, None]
    default_range = (0.0, 1.0 if image.mode == "F" else 65535.0)
    try:
        return _convert_high_bit_depth(
            values, _transparent_value(image), background, value_range or default_range
        )
    except ValueError as error:
        no_data = image.tag_v2.get(GDAL_NODATA) if image.format == "TIFF" else None
        if no_data is None:
            raise
        hint = f"{no_data!s:.20} stands for no data: fill it first (docs/data.md)"
        raise ValueError(f"{error}; {hint}") from error


def _load_16_bit_color(image: Image.Image, file: BinaryIO) -> np.ndarray:
    """Load a PNG or TIFF of 16 bits in a channel as [H, W, C] uint16.

    Pillow has no mode for these and keeps the upper byte of each value. Its codec for the opposite
    byte order keeps the lower one.
    """
    if image.tile[0].args == "LA;16B":
        both = _load_with_codec(file, lambda codec: "RGBA").astype(np.uint16)
        return both[:, :, 0::2] << 8 | both[:, :, 1::2]
    is_big_endian = image.format == "PNG" or image.tag_v2.prefix == b"MM"
    if image.tile[0].codec_name == "libtiff":
        is_big_endian = sys.byteorder == "big"
    upper, lower = (
        _load_with_codec(file, lambda codec, order=order: f"{codec.partition(';')[0]};16{order}")
        for order in ("BL" if is_big_endian else "LB")
    )
    return upper.astype(np.uint16) << 8 | lower


def _load_with_codec(file: BinaryIO, codec_of: Callable[[str], str]) -> np.ndarray:
    """Load the pixels of a file as if its bytes had the layout of another codec of Pillow."""
    file.seek(0)
    with Image.open(file) as image:
        for index, tile in enumerate(image.tile):
            # In TIFF the codec is the first of several arguments.
            args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
            args = (codec_of(args[0]), *args[1:])
            image.tile[index] = tile._replace(args=args if len(args) > 1 else args[0])
        image.load()
        return np.asarray(image)


def _convert_high_bit_depth(
    values: np.ndarray,
    transparent: Any,
    background: Color | None,
    value_range: tuple[float, float],
) -> tuple[Image.Image, dict[str, float]]:
    """Scale [H, W, C] of more than 8 bits (L, LA, RGB or RGBA) over the background."""
    alpha = None
    if values.shape[2] in (2, 4):
        values, alpha = values[:, :, :-1], values[:, :, -1:].astype(np.float32) / 65535
    elif transparent is not None:
        is_opaque = (values != np.asarray(transparent)).any(axis=2, keepdims=True)
        alpha = is_opaque.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    black, white = value_range
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("contains values that are not finite numbers; fill them first")
    if not black <= low <= high <= white:
        raise ValueError(
            f"values from {low:g} to {high:g}, expected {black:g} to {white:g} "
            "(--value_range changes that)"
        )
    scaled = (values.astype(np.float32) - black) * (255.0 / (white - black))
    if alpha is not None and background is None:
        colors = np.broadcast_to(scaled, (*scaled.shape[:2], 3))
        scaled = np.concatenate((colors, alpha * 255), axis=2)
    elif alpha is not None:
        scaled = scaled * alpha + np.asarray(background, np.float32) * (1 - alpha)
    pixels = np.rint(scaled).astype(np.uint8)
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return image, {"low": low, "high": high}


def _convert_8_bit(image: Image.Image, background: Color | None, bits: int) -> Image.Image:
    """Convert any mode of at most 8 bits, over the background."""
    transparent = _transparent_value(image)
    if isinstance(transparent, int) and image.mode == "L" and bits < 8:
        # A PNG states its transparent gray in units of its bit depth; Pillow's pixels are 8-bit.
        image.info["transparency"] = transparent * 255 // (2**bits - 1)
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if background is None:
            return image
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


# Geometry


def _resize_to(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    # Pillow's bilinear filter widens its support when it reduces: that is the antialiasing. It
    # weights the colors of RGBA by their alpha.
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, config: DecodeConfig) -> Image.Image:
    """Center the image on the background color, which may make a gray image RGB."""
    if config.background is None:
        fill = (0, 0, 0, 0)
    else:
        if config.channels != 1 and len(set(config.background)) > 1:
            image = image.convert("RGB")
        fill = Image.new("RGB", (1, 1), config.background).convert(image.mode).getpixel((0, 0))
    height, width = config.size
    padded = Image.new(image.mode, (width, height), fill)
    padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return padded
