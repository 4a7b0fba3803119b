"""Load the images of a dataset as uint8 pixels, ready to be made into batches.

Rows are decoded once into a file (pixel_cache.py), which is read into memory where it fits easily,
onto the accelerator where it fits there, and memory-mapped otherwise. Crops and augmentations
are drawn each time a row is used (transforms.py). `--streaming` reads rows as they are needed
(stream.py).

N: rows, B: batch, C: channels (1, 3 or 4), H and W: height and width.
"""

import copy
import hashlib
import mmap
import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
import xxhash

from ddpm.config.base import MIN_IMAGES
from ddpm.config.data import DataConfig
from ddpm.config.values import Resolution, size_of
from ddpm.data import order, splits, transforms
from ddpm.data.decode import DecodeConfig
from ddpm.data.image_column import TAR_ADVICE
from ddpm.data.image_folder import IMAGE_ENDINGS
from ddpm.data.labels import count_classes
from ddpm.data.pixel_cache import CachedPixels, decode_once
from ddpm.data.source import Source, find_held_out_split, open_source, take_rows
from ddpm.data.stream import ImageStream
from ddpm.errors import UserError
from ddpm.run_record import DatasetRecord

SMALL_ROW = 2**16
"""Bytes of a row below which a mapped file is read row by row."""


class BatchSource(Protocol):
    """What training reads: an ImageDataset, decoded once, or an ImageStream, read as needed."""

    channels: int
    size: tuple[int, int]
    """Height and width of a batch."""
    class_names: list[str] | None
    """Names of the classes by their ids 0 to K - 1; None if no labels are trained on."""
    facts: DatasetRecord
    """What the record says about the data."""
    notes: Sequence[str]
    """Lines for the log, on what a run with these data costs."""

    def __len__(self) -> int:
        """Return the number of rows of an epoch."""
        ...

    def rows(self, start: int, count: int) -> Sequence[int]:
        """Return the rows at positions [start, start + count) of the endless shuffled sequence."""
        ...

    def batch(
        self,
        rows: Sequence[int],
        generator: torch.Generator,
        augmentation: DataConfig | None = None,
    ) -> transforms.Batch:
        """Return rows, cropped and augmented by draws of a CPU generator."""
        ...

    def state(self, position: int) -> dict[str, Any] | None:
        """Return JSON that a checkpoint keeps to continue from `position`: this process's part."""
        ...

    def restore(self, state: dict[str, Any] | None, position: int) -> None:
        """Continue from `position`, with what `state` returned there on all processes together."""
        ...


class ImageDataset:
    """N images of one dataset as uint8. Implements `BatchSource`.

    Batches are on the accelerator if all pixels fit in a tenth of its free memory, else on the CPU.
    `facts` are those of the record, `held_out` the images that --held_out excludes.
    """

    held_out: "ImageDataset | None" = None
    class_names: list[str] | None = None
    notes = ()

    def __init__(
        self,
        cached: CachedPixels,
        resolution: Resolution,
        device: torch.device | None = None,
        seed: int = 0,
    ):
        self.resolution, self.size = resolution, size_of(resolution)
        self.channels, self.seed = cached.channels, seed
        self.facts, self.cache_dir = cached.facts, cached.path.parent.parent
        self.class_names = cached.class_names
        self._labels = None if cached.labels is None else torch.tensor(cached.labels).long()
        self.shapes = torch.tensor(cached.shapes).long()
        sizes = self.shapes.prod(dim=1) * self.channels
        self._offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        self._selected: torch.Tensor | None = None
        self._flat = _open_pixels(cached.path, len(self.shapes))
        self._pinned = device is not None and device.type == "cuda"
        on_accelerator = device is not None and device.type != "cpu"
        if on_accelerator and self._flat.nbytes < _free_memory(device) // 10:
            self._flat, self._pinned = self._flat.to(device), False
        self.device = self._flat.device
        self._uncropped: torch.Tensor | None = None
        if (self.shapes == torch.tensor(self.size)).all():
            self._uncropped = self._flat.view(-1, self.channels, *self.size)

    def __len__(self) -> int:
        return len(self.shapes) if self._selected is None else len(self._selected)

    @property
    def labels(self) -> torch.Tensor | None:
        """The label of each row, [N] int64, K for a row without one; None without labels."""
        if self._labels is None or self._selected is None:
            return self._labels
        return self._labels[self._selected]

    @property
    def fingerprint(self) -> str:
        """A sha256 of the pixels, their shapes, and which of them are selected."""
        sha256 = hashlib.sha256(f"{self.facts.pixels_sha256} {self.resolution}".encode())
        for numbers in (self.shapes, self._selected):
            sha256.update(b"all" if numbers is None else numbers.numpy().tobytes())
        return sha256.hexdigest()

    def select(self, rows: Sequence[int] | torch.Tensor) -> "ImageDataset":
        """Return a dataset of some of the rows, which shares the pixels."""
        selection = copy.copy(self)
        selection._selected = torch.as_tensor(rows, dtype=torch.int64)
        return selection

    def row_digests(self) -> np.ndarray:
        """Return a hash of the pixels of each row, [N] uint64."""
        flat, offsets = self._flat.cpu().numpy(), self._offsets.numpy()
        rows = range(len(self)) if self._selected is None else self._selected.numpy()
        digests = (xxhash.xxh3_64_intdigest(flat[offsets[r] : offsets[r + 1]]) for r in rows)
        return np.fromiter(digests, np.uint64, len(self))

    def rows(self, start: int, count: int) -> list[int]:
        """Return the rows at positions [start, start + count) of the endless shuffled sequence."""
        return order.row_indices(self.seed, len(self), start, count)

    def pixels(self, row: int) -> torch.Tensor:
        """Return a copy of one image as it was decoded and resized: [C, H, W] uint8."""
        row = self._stored_rows([row])[0]
        height, width = self.shapes[row].tolist()
        flat = self._flat[self._offsets[row] : self._offsets[row + 1]]
        return flat.view(self.channels, height, width).clone()

    def batch(
        self,
        rows: Sequence[int],
        generator: torch.Generator,
        augmentation: DataConfig | None = None,
    ) -> transforms.Batch:
        """Return rows, cropped and augmented by draws of a CPU generator."""
        draws = transforms.draw_transforms(len(rows), generator)
        if self._uncropped is not None:
            index = torch.as_tensor(self._stored_rows(rows))
            images = self._uncropped[transforms.upload(index, self.device)]
        elif self.device.type == "cpu":
            pixels = [self.pixels(row).numpy() for row in rows]
            images = transforms.random_crop(pixels, self.size, draws)
        else:
            images = self._gather(rows, draws)
        if augmentation is not None:
            images = transforms.augment(images, draws, augmentation)
        labels = None if self._labels is None else self._labels[self._stored_rows(rows)]
        return transforms.Batch(images.pin_memory() if self._pinned else images, labels)

    def state(self, position: int) -> None:
        """Return None: the rows at a position are a function of the seed."""

    def restore(self, state: None, position: int) -> None:
        """Do nothing, as there is no state."""

    def _stored_rows(self, rows: Sequence[int]) -> Sequence[int]:
        """Return the numbers of rows in the file."""
        return rows if self._selected is None else self._selected[list(rows)].tolist()

    def _gather(self, rows: Sequence[int], draws: torch.Tensor) -> torch.Tensor:
        stored = self._stored_rows(rows)
        offsets, shapes = self._offsets[stored], self.shapes[stored]
        return transforms.gather_crops(
            self._flat,
            transforms.upload(offsets, self.device),
            transforms.upload(shapes, self.device),
            self.channels,
            self.size,
            transforms.upload(draws, self.device),
        )


def load_images(
    config: DataConfig,
    show_progress: bool,
    device: torch.device | None = None,
    seed: int = 0,
    class_names: list[str] | None = None,
    lanes: order.Lanes | None = None,
) -> ImageDataset | ImageStream:
    """Return the images of a config. Every process may call this, and must for a stream in lanes.

    `seed` is that of the order of rows, `lanes` are those of a stream, one without. With
    `class_names`, those of a model, the labels are its ids: rows of other classes have no label.
    UserError for a dataset that is missing or empty, has
    no or several image columns, or no classes where labels are asked for, does not fit on the disk,
    has more unreadable images than `max_bad_images` allows, or no transparency for 4 channels.
    """
    decode_config = DecodeConfig.of(config)
    source = open_source(config, class_names)
    if config.streaming:
        images = ImageStream(source, config, decode_config, seed, lanes)
    else:
        images = _load_decoded(source, config, show_progress, device, seed)
    _require_transparency(images.facts)
    return _hold_out(images, config.held_out) if config.held_out else images


def load_held_out(
    config: DataConfig,
    images: ImageDataset | ImageStream,
    show_progress: bool,
    max_rows: int,
    split: str | None = None,
    trained: Collection[str] = (),
) -> ImageDataset | None:
    """Return images of the same dataset that are not in `images`; None if there are none.

    These are the ones of --held_out, else those of `split`, else of the first of
    splits.HELD_OUT_SPLITS, without those whose pixels are also in `images`. Of a stream the first
    `max_rows` are decoded. Labels are the ids of `images`. UserError as for `load_images`, and if
    `split` has rows that were trained on: those of the config's split, and of the expressions
    `trained`.
    """
    if split is None and isinstance(images, ImageDataset) and images.held_out is not None:
        return _without_copies(images.held_out, images, show_progress)
    trained = {config.split, *trained}
    chosen = split or find_held_out_split(config, trained)
    if chosen is None:
        return None
    config = replace(
        config,
        split=chosen,
        held_out=0.0,
        channels=images.channels,
        label_column=images.facts.label_column,
    )
    source = open_source(config, images.class_names)
    for expression in sorted(trained):
        if splits.overlap(expression, chosen, source.split_sizes):
            raise UserError(
                f"The split {chosen} has images that were trained on, those of {expression}: give "
                "another --eval_split, such as the rest of a slice."
            )
    if config.streaming:
        source = take_rows(source, max_rows)
    held_out = _load_decoded(source, config, show_progress)
    if isinstance(images, ImageDataset):
        held_out = _without_copies(held_out, images, show_progress)
    return held_out


def _without_copies(
    held_out: ImageDataset, images: ImageDataset, show_progress: bool
) -> ImageDataset | None:
    """Return the held-out images whose pixels are not in `images`.

    None if there are none, and if so many are left out that fewer than MIN_IMAGES stay.
    """
    # By sorting: the table that numpy 2.0 may choose overflows where a digest needs all 64 bits
    is_copy = np.isin(held_out.row_digests(), images.row_digests(), kind="sort")
    rows = np.flatnonzero(~is_copy).tolist()
    if show_progress and len(rows) < len(held_out):
        print(
            f"{len(held_out) - len(rows):,} of the {len(held_out):,} held-out images (split "
            f"{held_out.facts.split}) are also trained on: they are left out."
        )
    if len(rows) == len(held_out):
        return held_out
    if len(rows) < MIN_IMAGES:
        if show_progress and rows:
            print(f"The other {len(rows)} are too few to measure anything (at least {MIN_IMAGES}).")
        return None
    return held_out.select(rows)


def _load_decoded(
    source: Source,
    config: DataConfig,
    show_progress: bool,
    device: torch.device | None = None,
    seed: int = 0,
) -> ImageDataset:
    cache_dir = Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm-pixels"
    cached = decode_once(source, DecodeConfig.of(config), cache_dir, show_progress)
    _require_readable(cached.facts, config.max_bad_images)
    return ImageDataset(cached, config.resolution, device, seed)


def _hold_out(images: ImageDataset, fraction: float) -> ImageDataset:
    """Return the images without a random fraction, which becomes their `held_out`."""
    held_out = order.held_out_rows(images.seed, len(images), fraction)
    if len(held_out) >= len(images):
        raise UserError(f"--held_out {fraction:g} of {len(images)} images leaves none to train on.")
    if len(held_out) < MIN_IMAGES:
        raise UserError(
            f"--held_out {fraction:g} of {len(images)} images holds out {len(held_out)}; fewer "
            f"than {MIN_IMAGES} measure nothing. Give a larger fraction."
        )
    is_trained = torch.ones(len(images), dtype=torch.bool)
    is_trained[held_out] = False
    trained = images.select(is_trained.nonzero().flatten())
    trained.held_out = images.select(held_out)
    entry = {"share": fraction, "seed": images.seed, "images": len(held_out)}
    trained.facts = replace(images.facts, images=len(trained), held_out=entry)
    if trained.labels is not None:
        counts = count_classes(trained.class_names, trained.labels.tolist())
        trained.facts = replace(trained.facts, **counts)
    return trained


def _require_readable(facts: DatasetRecord, max_bad_images: float) -> None:
    examples = f"The first: {'; '.join(facts.unreadable_first)}."
    if facts.images == 0:
        raise UserError(f"None of the {facts.rows} images can be read. {examples}")
    if facts.unreadable > max_bad_images * facts.rows:
        raise UserError(
            f"{facts.unreadable} of {facts.rows} images cannot be read, more than --max_bad_images "
            f"{max_bad_images:g} allows. {examples} Fix or remove them, or raise the limit to skip "
            f"them.{_tar_advice(facts)}"
        )


def _require_transparency(facts: DatasetRecord) -> None:
    if facts.channels == 4 and not facts.alpha:
        raise UserError(
            f"None of the {sum(facts.modes.values()):,} images of {facts.name} that were read has "
            "any transparency, and a model of 4 channels draws it: give images with an alpha "
            "channel, or train a model of 3 channels."
        )


def _tar_advice(facts: DatasetRecord) -> str:
    """Return TAR_ADVICE if rows of a column like jpg or png are empty, as of tars with both."""
    is_ending = f".{facts.image_column}".endswith(tuple(IMAGE_ENDINGS))
    is_empty = any("no image in this row" in example for example in facts.unreadable_first)
    return TAR_ADVICE if is_ending and is_empty else ""


def _open_pixels(path: Path, num_rows: int) -> torch.Tensor:
    """Return the bytes of a file: a copy if that takes little of the free memory, else mapped."""
    processes, size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), path.stat().st_size
    if size <= _free_memory(torch.device("cpu")) // (4 * processes):
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    # Linux maps no more writable memory than there is, also copy-on-write. Nothing here writes.
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM") and size < SMALL_ROW * num_rows:
        mapped.madvise(mmap.MADV_RANDOM)  # else up to MiBs around each row are read with it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of memory that is not writable
        return torch.frombuffer(mapped, dtype=torch.uint8)


def _free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; 0 if they are unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
