"""From a dataset's name to uint8 pixels, decoded once.

Every row is decoded, made opaque, resized and written once to a file in the HF cache, keyed by the
dataset's fingerprint and what was done to the pixels. Later epochs, runs and processes read that
file: from a copy in memory where it fits easily, on the accelerator where it fits there, else
mapped. Crops and flips are drawn afresh each time a row is used (cutting.py). `--streaming` reads
rows as they come instead (streaming.py).

    ddpm-pixels/<key>/pixels.bin    the rows end to end, each [C, H, W]
    ddpm-pixels/<key>/index.json    their shapes, and the data report; written last

Legend: N rows, B batch, C channels (1 or 3), R resolution, H, W height and width of a row.
"""

import copy
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from ddpm.config.train import DataConfig
from ddpm.data import order, transforms
from ddpm.data.decode import DecodeConfig
from ddpm.data.report import DataReport
from ddpm.data.source import Source, find_held_out_split, open_source, take_rows
from ddpm.data.stream import ImageStream
from ddpm.data.transforms import to_model as to_model
from ddpm.errors import UserError

PIXELS, INDEX = "pixels.bin", "index.json"
LAYOUT = 3
"""Raise when the meaning of a cache file changes: old ones are then left alone."""
MIN_HELD_OUT = 16
"""Images that a held-out share must have; evaluate.py measures no fewer."""
ROWS_PER_TASK = 16
"""Rows that a thread decodes in one go."""


class ImageDataset:
    """N images of one dataset as uint8, ready to be cut into batches.

    `channels` is 1 when they are gray, else 3. `report` is what was found on the way in, `held_out`
    the images that were left out of these, None without. Batches are made on the accelerator when
    all pixels fit in a tenth of its free memory, else on the CPU.
    """

    held_out: "ImageDataset | None" = None

    def __init__(
        self, folder: Path, resolution: int, device: torch.device | None = None, seed: int = 0
    ):
        index = json.loads((folder / INDEX).read_text())
        self.resolution, self.channels = resolution, int(index["channels"])
        self.seed, self.report, self.cache = seed, index["report"], folder.parent
        self._chosen: torch.Tensor | None = None
        self.shapes = torch.tensor(index["shapes"], dtype=torch.int64).reshape(-1, 2)
        sizes = self.shapes.prod(dim=1) * self.channels
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        self._flat = _open_pixels(folder / PIXELS)
        self._pinned = device is not None and device.type == "cuda"
        if device is not None and device.type != "cpu" and self._flat.nbytes < _free(device) // 10:
            self._flat, self._pinned = self._flat.to(device), False
        self.device = self._flat.device
        square = bool((self.shapes == resolution).all())
        self._square = (
            self._flat.view(-1, self.channels, resolution, resolution) if square else None
        )

    def __len__(self) -> int:
        return len(self.shapes) if self._chosen is None else len(self._chosen)

    @property
    def content(self) -> str:
        """What stands for these images: sha256 of the pixels, their shapes, and which of them."""
        sha = hashlib.sha256(f"{self.report['pixels_sha256']} {self.resolution}".encode())
        for numbers in (self.shapes, self._chosen):
            sha.update(b"all" if numbers is None else numbers.numpy().tobytes())
        return sha.hexdigest()

    def chosen(self, rows: Sequence[int]) -> "ImageDataset":
        """Some of the images, numbered anew; the pixels are shared."""
        some = copy.copy(self)
        some._chosen = torch.tensor(rows, dtype=torch.int64)
        return some

    def rows(self, first: int, count: int) -> list[int]:
        """Row numbers at positions [first, first + count) of the endless shuffled stream."""
        return order.row_indices(self.seed, len(self), first, count)

    def pixels(self, row: int) -> torch.Tensor:
        """One image as it was decoded and resized: [C, H, W] uint8."""
        row = self._stored([row])[0]
        height, width = self.shapes[row].tolist()
        flat = self._flat[self.offsets[row] : self.offsets[row + 1]]
        return flat.view(self.channels, height, width)

    def batch(
        self, rows: Sequence[int], generator: torch.Generator, random_flip: bool
    ) -> torch.Tensor:
        """Rows, cropped and flipped by draws of the CPU `generator`: [B, C, R, R] uint8."""
        draws = transforms.draw_crops_and_flips(len(rows), generator)
        if self._square is not None:
            images = self._square[torch.as_tensor(self._stored(rows), device=self.device)]
        elif self.device.type == "cpu":
            images = transforms.random_crop(
                [self.pixels(row) for row in rows], self.resolution, draws
            )
        else:
            images = self._gathered(rows, draws)
        if random_flip:
            images = transforms.random_flip(images, draws)
        return images.pin_memory() if self._pinned else images

    def state(self, position: int) -> None:
        """Nothing: the rows at a position are a function of the seed."""
        return None

    def restore(self, state: None, position: int) -> None:
        """Nothing, as `state` is nothing."""

    def _stored(self, rows: Sequence[int]) -> Sequence[int]:
        """Where rows lie among those in the file."""
        return rows if self._chosen is None else self._chosen[list(rows)].tolist()

    def _gathered(self, rows: Sequence[int], draws: torch.Tensor) -> torch.Tensor:
        stored = self._stored(rows)
        offsets, shapes = self.offsets[stored], self.shapes[stored]
        return transforms.gather_crops(
            self._flat,
            offsets.to(self.device),
            shapes.to(self.device),
            self.channels,
            self.resolution,
            draws.to(self.device),
        )


def load_images(
    config: DataConfig, show_progress: bool, device: torch.device | None = None, seed: int = 0
) -> tuple[ImageDataset | ImageStream, dict[str, Any]]:
    """The images a config names, with the facts for the record. Safe to call on every process.

    The first process to come decodes; others, of this run or another, wait and find the file.
    `seed` is that of the order of rows. Raises UserError for a dataset that is missing, empty, has
    no or several image columns, does not fit on the disk, or has more unreadable images than
    `max_bad_images` allows.
    """
    look = DecodeConfig.of(config)
    source = open_source(config)
    if config.streaming:
        stream = ImageStream(source, config, look, seed)
        return stream, stream.facts
    images = _decoded(source, look, config, show_progress, device, seed)
    facts = {**source.facts, **images.report}
    return (images, facts) if not config.held_out else _hold_out(images, facts, config.held_out)


def _decoded(
    source: Source,
    look: DecodeConfig,
    config: DataConfig,
    show_progress: bool,
    device: torch.device | None = None,
    seed: int = 0,
) -> ImageDataset:
    """The rows of a source from the cache; the first process to come puts them there."""
    key = _key(source, look)
    cache = Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm-pixels"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / key
    with FileLock(cache / f"{key}.lock"):
        if not _is_whole(folder):
            _require_room(cache, source, look)
            _decode_all(source, look, folder, show_progress)
    report = json.loads((folder / INDEX).read_text())["report"]
    _refuse_bad(report, source.num_rows, config.max_bad_images)
    return ImageDataset(folder, config.resolution, device, seed)


def load_held_out(
    config: DataConfig,
    loaded: ImageDataset | ImageStream,
    show_progress: bool,
    most: int,
    split: str | None = None,
) -> ImageDataset | None:
    """Images of the same data that `loaded` leaves out; None where there are none.

    Those of --held_out, else `split`, else the first of sources.HELD_OUT. Of a stream the first
    `most` are read and kept. UserError as for `load`.
    """
    if split is None and isinstance(loaded, ImageDataset) and loaded.held_out is not None:
        return loaded.held_out
    split = split or find_held_out_split(config)
    if split is None or split == config.split:
        return None
    config = replace(config, split=split, held_out=0.0, channels=loaded.channels)
    source = open_source(config)
    if config.streaming:
        source = take_rows(source, most)
    return _decoded(source, DecodeConfig.of(config), config, show_progress)


def _hold_out(
    images: ImageDataset, facts: dict[str, Any], share: float
) -> tuple[ImageDataset, dict[str, Any]]:
    """The images without those that are held out, which they know."""
    left_out = order.held_out_rows(images.seed, len(images), share)
    if len(left_out) >= len(images):
        raise UserError(f"--held_out {share:g} of {len(images)} images leaves none to train on.")
    if len(left_out) < MIN_HELD_OUT:
        raise UserError(
            f"--held_out {share:g} of {len(images)} images holds out {len(left_out)}; fewer than "
            f"{MIN_HELD_OUT} measure nothing. Give a larger share."
        )
    trained = images.chosen(sorted(set(range(len(images))) - set(left_out)))
    trained.held_out = images.chosen(left_out)
    said = {"share": share, "seed": images.seed, "images": len(left_out)}
    return trained, {**facts, "images": len(trained), "held_out": said}


def _key(source: Source, look: DecodeConfig) -> str:
    what = {
        "layout": LAYOUT,
        "fingerprint": source.dataset._fingerprint,
        "column": source.column,
        **asdict(look),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _decode_all(source: Source, look: DecodeConfig, folder: Path, show_progress: bool) -> None:
    """Write the cache folder beside, then rename: a kill leaves only a `.partial` to overwrite."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    report = DataReport(look, source.num_rows)
    tasks = (
        (start, batch[source.column])
        for start, batch in zip(
            range(0, source.num_rows, ROWS_PER_TASK),
            source.dataset.iter(batch_size=ROWS_PER_TASK),
            strict=True,
        )
    )
    bar = tqdm(
        total=source.num_rows,
        desc="Decoding images once",
        unit=" images",
        disable=None if show_progress else True,
        leave=False,
    )
    shapes: list[list[int]] = []
    sha = hashlib.sha256()
    with open(partial / PIXELS, "wb") as file, bar:
        for results in map_in_threads(lambda task: _read_task(task, report), tasks):
            for row, result in results:
                if isinstance(result, str):
                    report.add_bad(row, result)
                    continue
                pixels, *notes = result
                report.add(row, *notes)
                content = pixels.tobytes()
                file.write(content)
                sha.update(content)
                shapes.append(list(pixels.shape))
            bar.update(len(results))
    channels = look.channels or max((shape[0] for shape in shapes), default=1)
    if any(shape[0] != channels for shape in shapes):
        sha = _repeat_gray(partial / PIXELS, shapes)
    facts = {"pixels_sha256": sha.hexdigest(), **report.facts(channels)}
    index = {"channels": channels, "shapes": [shape[1:] for shape in shapes], "report": facts}
    (partial / INDEX).write_text(json.dumps(index))
    for name in (PIXELS, INDEX):
        with open(partial / name, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _read_task(task: tuple[int, list[Any]], report: DataReport) -> list[tuple[int, Any]]:
    """Decode neighbouring rows: for each its number and what `report.read` gives."""
    start, values = task
    return [(row, report.read(row, value)) for row, value in enumerate(values, start)]


def _repeat_gray(path: Path, shapes: list[list[int]]) -> Any:
    """Give the gray rows of a file of mixed ones three equal channels; the new file's sha256."""
    sha, wide = hashlib.sha256(), path.with_suffix(".rgb")
    with open(path, "rb") as narrow, open(wide, "wb") as file:
        for channels, height, width in shapes:
            content = narrow.read(channels * height * width) * (1 if channels == 3 else 3)
            file.write(content)
            sha.update(content)
    os.replace(wide, path)
    return sha


def map_in_threads(function: Callable[[Any], Any], values: Iterable[Any]) -> Iterator[Any]:
    """`map` over threads (Pillow lets go of the GIL), in order, with bounded memory."""
    workers = os.cpu_count() or 1
    pending: deque[Any] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for value in values:
            pending.append(pool.submit(function, value))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _is_whole(folder: Path) -> bool:
    """Whether a cache folder is there with as many pixels as its index says."""
    try:
        index = json.loads((folder / INDEX).read_text())
        wanted = sum(height * width for height, width in index["shapes"]) * index["channels"]
        return (folder / PIXELS).stat().st_size == wanted
    except (OSError, ValueError, KeyError):
        return False


def _require_room(cache: Path, source: Source, look: DecodeConfig) -> None:
    needed = source.num_rows * look.resolution**2
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise UserError(
            f"{source.num_rows:,} images of {look.resolution}x{look.resolution} need at least "
            f"{needed / 2**30:,.1f} GiB in {cache}, where {free / 2**30:,.1f} GiB are free. Give "
            "another --cache_dir, a smaller --resolution, or --streaming."
        )


def _refuse_bad(report: dict[str, Any], num_rows: int, limit: float) -> None:
    num_bad = report["unreadable"]
    first = f"The first: {'; '.join(report['unreadable_first'])}."
    if report["images"] == 0:
        raise UserError(f"None of the {num_rows} images can be read. {first}")
    if num_bad > limit * num_rows:
        raise UserError(
            f"{num_bad} of {num_rows} images cannot be read, more than --max_bad_images {limit:g} "
            f"allows. {first} Mend or remove them, or raise the limit to skip them."
        )


def _open_pixels(path: Path) -> torch.Tensor:
    """The bytes of a cache file: a copy where that takes little of the free memory, else mapped."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if path.stat().st_size <= _free(torch.device("cpu")) // (4 * processes):
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    # Copy-on-write: torch wants writable memory, and nothing here writes.
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))


def _free(device: torch.device) -> int:
    """Bytes of memory that are free; 0 where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
