"""Image files: PNG with text, grids, GIF, npz, parquet, and reading any image.

An image is a tensor [C, H, W] uint8 with C = 1 (gray), 3 (RGB) or 4 (RGBA, with straight alpha),
unless said otherwise. Grids and GIFs show transparency as a checkerboard. Files are written under a
temporary name and renamed, so a file is complete or it is not there.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ddpm.config.values import parse_color
from ddpm.data import decode
from ddpm.data.image_file import read_image_file
from ddpm.data.transforms import composite
from ddpm.errors import UserError, foreign_errors
from ddpm.file_io import read_bytes

MIN_GRID_SIDE = 64
"""Smaller images are enlarged to at least this many pixels in grids and GIFs."""
GRID_PADDING = 2
"""White pixels around each image of a grid."""
CHECKERBOARD, SQUARE_SIDE = (255, 204), 8
"""Grays and pixels of the squares behind transparent images."""
ROW_NAME_LENGTH = 16
"""Longest name of a row in characters; of longer ones the end is left out."""
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 80, 1500
PARQUET_ROWS = 1000
"""Images in a row group of a parquet file, which is held in memory at once."""

PNG_LIMIT = 2**29
"""Largest PNG file in bytes that is read."""

Frame = TypeVar("Frame")


def to_pil(image: torch.Tensor) -> Image.Image:
    """Convert an image to mode L, RGB or RGBA."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def pil_to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert mode L, RGB or RGBA to an image tensor."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def save_png(image: torch.Tensor | Image.Image, path: Path, text: dict[str, str]) -> None:
    """Write a PNG with `text` as its text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    if isinstance(image, torch.Tensor):
        image = to_pil(image)
    with _replacing(path) as partial:
        image.save(partial, "PNG", pnginfo=info)


def read_png_text(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG; {} for a file that `open_png` refuses."""
    try:
        return {key: str(value) for key, value in open_png(path).text.items()}
    except UserError:
        return {}


def read_png(path: Path) -> torch.Tensor:
    """Read a PNG of mode L, RGB or RGBA. UserError for any other file."""
    image = open_png(path)
    if image.mode not in decode.MODES.values():
        raise UserError(f"{path} is a PNG of mode {image.mode}, not L, RGB or RGBA.")
    return pil_to_tensor(image)


def open_png(path: Path) -> Image.Image:
    """Load a whole PNG file.

    UserError for other formats, files that are cut short, animations, whose frames have no limit,
    and files above PNG_LIMIT; Pillow limits their texts, and their pixels to 2 x decode.MAX_PIXELS.
    """
    with foreign_errors(f"{path} cannot be read as a PNG"):
        image = Image.open(io.BytesIO(read_bytes(path, PNG_LIMIT)), formats=("PNG",))
        if image.is_animated:
            raise ValueError("it is animated")
        image.load()
        return image


def read_image(path: Path, channels: int, background: str = "white") -> torch.Tensor:
    """Read any image file as training reads its images, converted to 1, 3 or 4 channels.

    Four keep its transparency, and `background` has no use. UserError for a file that is missing or
    cannot be read, UsageError for an unknown color.
    """
    color = None if channels == 4 else parse_color(background)
    try:
        image, _ = decode.decode_image(read_image_file({"path": str(path)}, None), color)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = decode.failure_reason(None, error)
        raise UserError(f"{path} cannot be read as an image ({reason}).") from None
    return pil_to_tensor(image.convert(decode.MODES[channels]))


def resize_and_crop(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scale an image to cover height x width, with antialiasing, and crop its center."""
    scale = max(height / image.shape[1], width / image.shape[2])
    sides = [max(n, int(s * scale)) for n, s in zip((height, width), image.shape[1:], strict=True)]
    if sides != list(image.shape[1:]) and len(image) == 4:  # Pillow weights colors by alpha
        image = pil_to_tensor(to_pil(image).resize(sides[::-1], Image.Resampling.BILINEAR))
    elif sides != list(image.shape[1:]):
        image = torch.nn.functional.interpolate(
            image[None], sides, mode="bilinear", antialias=True, align_corners=False
        )[0]
    top, left = (round((s - n) / 2) for s, n in zip(sides, (height, width), strict=True))
    return image[:, top : top + height, left : left + width]


def _on_checkerboard(images: torch.Tensor) -> torch.Tensor:
    """Show RGBA images [N, 4, H, W] over gray squares: [N, 3, H, W]."""
    rows, columns = (torch.arange(side) // SQUARE_SIDE for side in images.shape[2:])
    squares = torch.tensor(CHECKERBOARD)[(rows[:, None] + columns) % 2]
    return composite(images, squares)


def make_grid(
    images: Sequence[torch.Tensor],
    columns: int | None = None,
    row_names: Sequence[str] | None = None,
) -> Image.Image:
    """Arrange images of one shape on white, in a square grid unless `columns` is given.

    Small images are enlarged by repeating pixels until their longer side has 64 or more. The names
    of the rows, of classes say, are written at their left.
    """
    from torchvision import utils  # late: only grids need it, and it takes time to load

    height, width = images[0].shape[1:]
    factor = math.ceil(MIN_GRID_SIDE / max(height, width))
    batch = torch.stack(list(images)).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    if batch.shape[1] == 4:
        batch = _on_checkerboard(batch)
    if len(batch) == 1:  # torchvision returns a single image without padding
        grid = torch.nn.functional.pad(batch[0], [GRID_PADDING] * 4, value=255)
    else:
        columns = columns or math.ceil(math.sqrt(len(batch)))
        grid = utils.make_grid(batch, nrow=columns, padding=GRID_PADDING, pad_value=255)
    picture = to_pil(grid[: batch.shape[1]])  # torchvision repeats a gray channel three times
    return picture if row_names is None else _with_row_names(picture, row_names)


def names_in_ascii(names: Sequence[str]) -> list[str]:
    """Return names for a grid; one that its font, of ASCII alone, cannot write is a number."""
    return [name if name.isascii() else str(number) for number, name in enumerate(names)]


def _with_row_names(grid: Image.Image, row_names: Sequence[str]) -> Image.Image:
    """Return a grid with a name in ASCII at the left of each row."""
    height = grid.height / len(row_names)
    font = ImageFont.load_default(max(10.0, height / 5))
    names = [
        f"{name[: ROW_NAME_LENGTH - 3]}..." if len(name) > ROW_NAME_LENGTH else name
        for name in row_names
    ]
    margin = font.size / 2
    left = math.ceil(max(map(font.getlength, names)) + 2 * margin)
    picture = Image.new(grid.mode, (left + grid.width, grid.height), "white")
    picture.paste(grid, (left, 0))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        draw.text((left - margin, (row + 0.5) * height), name, "black", font, anchor="rm")
    return picture


def evenly_spaced(frames: Sequence[Frame], count: int) -> list[Frame]:
    """Return at most `count` frames, evenly spaced, with the first and the last."""
    if len(frames) <= count:
        return list(frames)
    return [frames[round(k * (len(frames) - 1) / (count - 1))] for k in range(count)]


def save_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Write an endless animation that stays on its last frame for longer."""
    durations = [FRAME_MILLISECONDS] * (len(frames) - 1) + [LAST_FRAME_MILLISECONDS]
    settings = {"append_images": frames[1:], "duration": durations, "loop": 0}
    with _replacing(path) as partial:
        frames[0].save(partial, "GIF", save_all=True, **settings)


def save_npz(
    paths: Sequence[Path],
    seeds: Sequence[int],
    path: Path,
    labels: Sequence[int] = (),
) -> None:
    """Write PNGs as one array, `arr_0` [N, H, W, C] uint8 as FID tools read it, and `seeds` [N].

    Those of classes have their ids as `labels` [N].
    """
    numbers = {"seeds": np.array(seeds, dtype=np.int64)}
    if labels:
        numbers["labels"] = np.array(labels, dtype=np.int64)
    images = np.stack([read_png(png).permute(1, 2, 0).numpy() for png in paths])
    with _replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, images, **numbers)


def save_parquet(
    paths: Sequence[Path],
    seeds: Sequence[int],
    path: Path,
    labels: Sequence[int] = (),
    class_names: Sequence[str] | None = None,
) -> None:
    """Write the bytes of PNGs as a dataset with columns `image` (an Image for datasets) and `seed`.

    With classes also `label` (a ClassLabel). UserError if pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("--parquet needs pyarrow: pip install pyarrow.") from None
    features = {"image": {"_type": "Image"}, "seed": {"dtype": "int64", "_type": "Value"}}
    numbers = {"seed": seeds}
    if labels:
        features["label"] = {"names": list(class_names), "_type": "ClassLabel"}
        numbers["label"] = labels
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [("image", image), *((name, pyarrow.int64()) for name in numbers)],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with _replacing(path) as partial, parquet.ParquetWriter(partial, schema) as writer:
        for start in range(0, len(paths), PARQUET_ROWS):
            rows = slice(start, start + PARQUET_ROWS)
            images = [{"bytes": png.read_bytes(), "path": png.name} for png in paths[rows]]
            table = {"image": images, **{name: list(numbers[name][rows]) for name in numbers}}
            writer.write_table(pyarrow.Table.from_pydict(table, schema))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield the path to write to; it is renamed to `path` when all has been written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link to another place
    yield partial
    os.replace(partial, path)
