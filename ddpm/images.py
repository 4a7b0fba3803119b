"""From a dataset's name to uint8 pixels, decoded once.

A Hub id, a local folder laid out like one and a folder of image files all take `datasets`' own
path. The image column is found by its type. Every row is decoded, composited, resized and written
once to a memory-mapped file in the HF cache, keyed by the dataset's fingerprint and what was done
to the pixels; later epochs, runs and processes read that file. Crops and flips are drawn afresh
each time a row is used, from the generator of its step.

Legend: N rows, B batch, C channels (1 or 3), R resolution, H, W height and width of a row, where
min(H, W) = R.
"""

import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import DatasetCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image, ImageColor, ImageOps
from torchvision.transforms.v2 import functional as geometry
from tqdm.auto import tqdm

from ddpm import hub
from ddpm.config import DataConfig
from ddpm.errors import UsageError, UserError

GRAY_MODES = frozenset(("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"))
PIXELS, INDEX = "pixels.bin", "index.json"
LAYOUT = 2
"""Raise when the meaning of a cache file changes: old ones are then left alone."""


@dataclass(frozen=True)
class Source:
    """A split as `datasets` opened it, with what the record says about where it came from."""

    dataset: datasets.Dataset
    column: str
    facts: dict[str, Any]


class ImageSet:
    """N images of one dataset as uint8, ready to be cut into batches.

    `channels` is 1 when every image is gray, else 3. `report` is what was found on the way in.
    """

    def __init__(self, folder: Path, resolution: int):
        index = json.loads((folder / INDEX).read_text())
        self.resolution, self.channels = resolution, int(index["channels"])
        self.report: dict[str, Any] = index["report"]
        shapes = np.array(index["shapes"], dtype=np.int64).reshape(-1, 2)
        self.shapes = shapes
        self.offsets = np.concatenate([[0], np.cumsum(shapes.prod(axis=1) * self.channels)])
        # Copy-on-write: torch wants writable memory, and nothing here writes.
        self._flat = torch.from_numpy(np.memmap(folder / PIXELS, dtype=np.uint8, mode="c"))
        square = bool((shapes == resolution).all())
        self._square = (
            self._flat.view(-1, self.channels, resolution, resolution) if square else None
        )

    def __len__(self) -> int:
        return len(self.shapes)

    def pixels(self, row: int) -> torch.Tensor:
        """One image as it was decoded and resized: [C, H, W] uint8."""
        height, width = self.shapes[row]
        flat = self._flat[self.offsets[row] : self.offsets[row + 1]]
        return flat.view(self.channels, height, width)

    def batch(
        self, rows: Sequence[int], generator: torch.Generator, random_flip: bool
    ) -> torch.Tensor:
        """Rows, cropped and flipped by draws of the CPU `generator`: [B, C, R, R] uint8."""
        draws = torch.rand(len(rows), 3, generator=generator)
        if self._square is not None:
            images = self._square[torch.as_tensor(rows)]
        else:
            size = self.resolution
            corners = (draws[:, :2] * (torch.from_numpy(self.shapes[rows]) - size + 1)).long()
            images = torch.stack(
                [
                    self.pixels(row)[:, top : top + size, left : left + size]
                    for row, (top, left) in zip(rows, corners.tolist(), strict=True)
                ]
            )
        if random_flip:
            images = torch.where(draws[:, 2, None, None, None] < 0.5, images.flip(-1), images)
        return images


def to_model(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels -> float32 in [-1, 1]: what the UNet sees."""
    return images.float().div_(127.5).sub_(1.0)


def load(config: DataConfig, show_progress: bool) -> tuple[ImageSet, dict[str, Any]]:
    """The images a config names, with the facts for the record. Safe to call on every process.

    The first process to come decodes; others, of this run or another, wait and find the file.
    Raises UserError for a dataset that is missing, empty, has no or several image columns, or more
    unreadable images than `max_bad_images` allows.
    """
    source = open_source(config)
    background = _colour(config.background)
    what = {
        "layout": LAYOUT,
        "fingerprint": source.dataset._fingerprint,
        "column": source.column,
        "resolution": config.resolution,
        "center_crop": config.center_crop,
        "background": background,
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    cache = Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm-pixels"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / key
    with FileLock(cache / f"{key}.lock"):
        if not (folder / INDEX).exists():
            _decode_all(source, config, background, folder, show_progress)
    _refuse_bad(json.loads((folder / INDEX).read_text())["report"], source, config.max_bad_images)
    images = ImageSet(folder, config.resolution)
    facts = {**source.facts, "split": config.split, "image_column": source.column,
             **images.report}  # fmt: skip
    return images, facts


def open_source(config: DataConfig) -> Source:
    """Find the dataset, pin its revision, open the split and find the image column."""
    name = config.dataset_name or config.train_data_dir
    assert name, "the config names no data"
    thing = f"The dataset {name}"
    on_hub, revision = False, None
    options: dict[str, Any] = {"split": config.split, "cache_dir": config.cache_dir}
    if config.dataset_name is None:
        if not Path(name).is_dir():
            raise UserError(f"--train_data_dir {name} is not a folder.")
        path, options["data_dir"] = "imagefolder", name
    elif Path(name).is_dir():
        path, options["name"] = name, config.dataset_config_name
    elif not hub.is_repo_id(name):
        raise UserError(f"--dataset_name {name} is neither a folder here nor an id on the Hub.")
    else:
        on_hub, path = True, name
        with hub.told(thing, revision=config.dataset_revision):
            revision = _resolve(name, config.dataset_revision)
        options |= {"name": config.dataset_config_name, "revision": revision}
    with hub.told(thing, revision=config.dataset_revision):
        try:
            dataset = datasets.load_dataset(path, **options)
        except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
            if hub.explain(error, thing):
                raise
            if "corresponds to no data" in str(error):
                raise UserError(
                    f"{thing} has no rows in its split {config.split!r}. Choose another --split."
                ) from error
            reason = str(error).strip().split("\n")[0].rstrip(".!")
            raise UserError(f"{thing} cannot be opened: {reason}.") from error
    facts = {
        "name": name if on_hub else Path(name).name,
        "on_hub": on_hub,
        "revision": revision,
        "config_name": config.dataset_config_name,
        "rows": len(dataset),
        **_card_facts(name, on_hub, revision),
    }
    return Source(dataset, find_column(dataset, config.image_column, name), facts)


def find_column(dataset: datasets.Dataset, wanted: str | None, name: str) -> str:
    """The column of type Image, or the one asked for. UserError lists what there is."""
    columns = {column: _type_name(feature) for column, feature in dataset.features.items()}
    listed = ", ".join(f"{column} ({kind})" for column, kind in columns.items())
    if wanted is not None:
        if columns.get(wanted) == "Image":
            return wanted
        raise UserError(
            f"--image_column {wanted}: the dataset {name} has no column of images of that name. "
            f"Its columns: {listed}."
        )
    found = [column for column, kind in columns.items() if kind == "Image"]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"The dataset {name} has several columns of images: {', '.join(found)}. "
            "Choose one with --image_column."
        )
    raise UserError(
        f"The dataset {name} has no column of type Image. Its columns: {listed}. Where one holds "
        "paths or bytes of images, cast it first: dataset.cast_column(name, datasets.Image())."
    )


def decode(data: bytes | str, channels: int, background: tuple[int, int, int]) -> np.ndarray:
    """The bytes (or path) of an image file -> [H, W, C] uint8, upright, nothing transparent left.

    Gray of 16 bits and more is taken as 0..65535, floats as 0..1. Raises what Pillow raises for a
    file that it cannot read, ValueError for values out of these ranges.
    """
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[:, :, None] if channels == 1 else array


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float gray -> mode L."""
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    top = 1.0 if image.mode == "F" else 65535.0
    if not (low >= 0.0 and high <= top):
        raise ValueError(f"values from {low:g} to {high:g} where 0 to {top:g} was expected")
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


def _resize(array: np.ndarray, resolution: int, center_crop: bool) -> np.ndarray:
    """[H, W, C] -> [C, H', W'] with min(H', W') = resolution, antialiased; or square."""
    image = torch.from_numpy(array.transpose(2, 0, 1).copy())
    if min(image.shape[1:]) != resolution:
        image = geometry.resize(image, [resolution], antialias=True)
    if center_crop:
        image = geometry.center_crop(image, [resolution, resolution])
    return image.numpy()


def _resolve(repo_id: str, revision: str | None) -> str | None:
    """The commit that a dataset's revision stands for; what was asked for when off the network."""
    if hub.offline():
        return revision or "main"
    return hub.call(hub.HfApi().dataset_info, repo_id, revision=revision).sha


def _card_facts(name: str, on_hub: bool, revision: str | None) -> dict[str, Any]:
    """Title and licence as the dataset's own card gives them; nothing where there is no card."""
    try:
        if on_hub:
            path = hf_hub_download(name, "README.md", repo_type="dataset", revision=revision)
        else:
            path = Path(name) / "README.md"
        data = DatasetCard.load(path).data
    except (OSError, ValueError, EntryNotFoundError):
        return {}
    return {key: value for key, value in (("title", data.get("pretty_name")),
                                          ("license", data.get("license"))) if value}  # fmt: skip


def _decode_all(
    source: Source,
    config: DataConfig,
    background: tuple[int, int, int],
    folder: Path,
    show_progress: bool,
) -> None:
    """Write the cache folder: two passes, one over the headers, one over the pixels."""
    column = source.dataset.select_columns(source.column)
    column = column.cast_column(source.column, datasets.Image(decode=False))
    modes, sizes = Counter[str](), Counter[str]()
    bad: dict[int, str] = {}
    for row, value in enumerate(_values(column, source.column)):
        try:
            with Image.open(_file(value)) as header:
                modes[header.mode] += 1
                sizes[f"{header.width}x{header.height}"] += 1
        except Exception as error:  # Pillow raises many kinds; every one means: unreadable
            bad[row] = _named(value, error)
    channels = 1 if modes and set(modes) <= GRAY_MODES else 3

    def read(numbered: tuple[int, dict[str, Any]]) -> np.ndarray | str:
        row, value = numbered
        if row in bad:
            return bad[row]
        try:
            content = value["bytes"] if value["bytes"] is not None else value["path"]
            array = decode(content, channels, background)
            return _resize(array, config.resolution, config.center_crop)
        except Exception as error:
            return _named(value, error)

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    shapes: list[list[int]] = []
    digest = hashlib.sha256()
    rows = tqdm(
        _in_threads(read, enumerate(_values(column, source.column))),
        total=len(column), desc="Decoding images once", unit=" images",
        disable=None if show_progress else True, leave=False,
    )  # fmt: skip
    with open(partial / PIXELS, "wb") as file:
        for row, result in enumerate(rows):
            if isinstance(result, str):
                bad[row] = result
            else:
                content = result.tobytes()
                file.write(content)
                digest.update(content)
                shapes.append(list(result.shape[1:]))
    report = {
        "images": len(shapes),
        "pixels_sha256": digest.hexdigest(),
        "channels": channels,
        "modes": dict(modes.most_common()),
        "sizes": dict(sizes.most_common(5)),
        "unreadable": len(bad),
        "unreadable_first": [f"row {row}: {text}" for row, text in sorted(bad.items())[:5]],
    }
    index = {"channels": channels, "shapes": shapes, "report": report}
    (partial / INDEX).write_text(json.dumps(index))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _refuse_bad(report: dict[str, Any], source: Source, limit: float) -> None:
    num_rows, num_bad = len(source.dataset), report["unreadable"]
    first = f"The first: {'; '.join(report['unreadable_first'])}."
    if report["images"] == 0:
        raise UserError(f"None of the {num_rows} images can be read. {first}")
    if num_bad > limit * num_rows:
        raise UserError(
            f"{num_bad} of {num_rows} images cannot be read, more than --max_bad_images {limit:g} "
            f"allows. {first} Mend or remove them, or raise the limit to skip them."
        )


def _in_threads(function: Any, values: Iterable[Any], ahead: int = 256) -> Iterator[Any]:
    """`map` over threads (Pillow and torchvision let go of the GIL), in order, bounded memory."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = []
        for value in values:
            pending.append(pool.submit(function, value))
            if len(pending) >= ahead:
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


def _values(column: datasets.Dataset, name: str) -> Iterator[dict[str, Any]]:
    for batch in column.iter(batch_size=256):
        for value in batch[name]:
            yield value or {"bytes": None, "path": None}


def _file(value: dict[str, Any]) -> Any:
    if value["bytes"] is not None:
        return io.BytesIO(value["bytes"])
    if value["path"] is None:
        raise ValueError("no image in this row")
    return value["path"]


def _named(value: dict[str, Any], error: Exception) -> str:
    reason = "not a readable image" if "BytesIO" in str(error) else str(error)
    return f"{Path(value['path']).name}: {reason}" if value["path"] else reason


def _type_name(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__ \
        if not isinstance(feature, datasets.Image) else "Image"  # fmt: skip


def _colour(text: str) -> tuple[int, int, int]:
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise UsageError(
            f"--background {text} is no colour. Give white, black or #rrggbb."
        ) from None
