"""Pictures as files: PNG with text, a picture to start from, grids, strips, GIF, npz, parquet.

Legend: an image is a tensor [C, H, W] uint8, C of 1 (gray) or 3 (RGB), unless said otherwise.
Everything is written beside and then renamed, so a file is whole or it is not there.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddpm.config.train import parse_color
from ddpm.data import decode
from ddpm.errors import UserError

SMALLEST_SIDE = 64
"""Smaller images are enlarged to at least this many pixels on sheets, strips and GIFs."""
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 80, 1500
PARQUET_ROWS = 1000
"""Images a row group of a parquet file: how much is in memory at once."""

Frame = TypeVar("Frame")


def to_pil(image: torch.Tensor) -> Image.Image:
    """An image -> mode L or RGB."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def pil_to_tensor(picture: Image.Image) -> torch.Tensor:
    """Mode L or RGB -> an image."""
    array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


# PNG


def save_png(image: torch.Tensor | Image.Image, path: Path, text: dict[str, str]) -> None:
    """Write a PNG whole or not at all, with `text` as its text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    picture = to_pil(image) if isinstance(image, torch.Tensor) else image
    partial = _beside(path)
    picture.save(partial, "PNG", pnginfo=info)
    os.replace(partial, path)


def read_png_text(path: Path) -> dict[str, str]:
    """The text chunks of a PNG; empty for a file that is no PNG or is cut short."""
    try:
        with Image.open(path) as image:
            image.load()
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError):
        return {}


def read_png(path: Path) -> torch.Tensor:
    """A PNG of mode L or RGB -> an image."""
    with Image.open(path) as picture:
        return pil_to_tensor(picture)


# A picture that somebody gives


def read_image(path: Path, channels: int, background: str = "white") -> torch.Tensor:
    """Any image file -> an image, read as training reads its images (the decoding room).

    UserError for a file that is missing or cannot be read, UsageError for no colour.
    """
    colour = parse_color(background)
    try:
        picture, _ = decode.decode_image(decode.open_image_file({"path": str(path)}), colour)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = decode.failure_reason(None, error)
        raise UserError(f"{path} cannot be read as a picture ({reason}).") from None
    return pil_to_tensor(picture.convert("L" if channels == 1 else "RGB"))


def resize_and_crop(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """An image scaled to cover height x width, antialiased, and cut to its middle."""
    scale = max(height / image.shape[1], width / image.shape[2])
    sides = [max(n, int(s * scale)) for n, s in zip((height, width), image.shape[1:], strict=True)]
    if sides != list(image.shape[1:]):
        image = torch.nn.functional.interpolate(
            image[None], sides, mode="bilinear", antialias=True, align_corners=False
        )[0]
    top, left = (round((s - n) / 2) for s, n in zip(sides, (height, width), strict=True))
    return image[:, top : top + height, left : left + width]


# Many on one sheet


def make_grid(images: Sequence[torch.Tensor], columns: int | None = None) -> Image.Image:
    """Images, all alike, side by side on white; as square as can be unless `columns` is given.

    Pixels are repeated a whole number of times until an image is 64 wide or more; nothing is
    smoothed.
    """
    channels, height, width = images[0].shape
    factor = max(1, math.ceil(SMALLEST_SIDE / max(height, width)))
    columns = columns or math.ceil(math.sqrt(len(images)))
    gap, tall, wide = 2, height * factor, width * factor
    rows = math.ceil(len(images) / columns)
    sheet = np.full(
        (rows * (tall + gap) + gap, columns * (wide + gap) + gap, channels), 255, dtype=np.uint8
    )
    for index, image in enumerate(images):
        top, left = (
            gap + n * (s + gap) for n, s in zip(divmod(index, columns), (tall, wide), strict=True)
        )
        large = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        sheet[top : top + tall, left : left + wide] = large.permute(1, 2, 0).numpy()
    return Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)


def evenly_spaced(frames: Sequence[Frame], count: int) -> list[Frame]:
    """At most `count` of many, evenly, with the first and the last."""
    if len(frames) <= count:
        return list(frames)
    return [frames[round(k * (len(frames) - 1) / (count - 1))] for k in range(count)]


def save_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """An endless animation that rests on its last frame."""
    partial = _beside(path)
    times = [FRAME_MILLISECONDS] * (len(frames) - 1) + [LAST_FRAME_MILLISECONDS]
    frames[0].save(partial, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    os.replace(partial, path)


# Many in one file


def save_npz(paths: Sequence[Path], seeds: Sequence[int], path: Path) -> None:
    """PNGs as one array: `arr_0` [N, H, W, C] uint8, which FID tools read, and `seeds` [N]."""
    images = np.stack([read_png(file).permute(1, 2, 0).numpy() for file in paths])
    partial = _beside(path)
    with open(partial, "wb") as file:
        np.savez(file, images, seeds=np.array(seeds, dtype=np.int64))
    os.replace(partial, path)


def save_parquet(paths: Sequence[Path], seeds: Sequence[int], path: Path) -> None:
    """PNGs, byte for byte, as a dataset: columns `image`, which datasets reads as Image, and
    `seed`. UserError when pyarrow is not here."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("--parquet needs pyarrow: pip install pyarrow.") from None
    kinds = {"image": {"_type": "Image"}, "seed": {"dtype": "int64", "_type": "Value"}}
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [("image", picture), ("seed", pyarrow.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": kinds}})},
    )
    partial = _beside(path)
    with parquet.ParquetWriter(partial, schema) as writer:
        for start in range(0, len(paths), PARQUET_ROWS):
            part = slice(start, start + PARQUET_ROWS)
            images = [{"bytes": file.read_bytes(), "path": file.name} for file in paths[part]]
            table = {"image": images, "seed": list(seeds[part])}
            writer.write_table(pyarrow.Table.from_pydict(table, schema))
    os.replace(partial, path)


def _beside(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f".{path.name}.partial")
