"""Data report: what the images of a dataset are like. Printed at the start, kept in record.json.

Rows with the same pixels after resizing are exact duplicates. Near duplicates have close difference
hashes (dHash: http://www.hackerfactor.com/blog/?/archives/529-Kind-of-Like-That.html), confirmed by
comparing thumbnails. Every row is compared with every other, so at most `MAX_COMPARED` rows, evenly
spaced, take part. Of each of the others the report keeps 16 bytes.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image

from ddpm.data.decode import DecodeConfig, ImageInfo
from ddpm.data.transforms import composite
from ddpm.errors import printable
from ddpm.run_record import DatasetRecord

MAX_COMPARED = 20_000
"""Rows that are searched for near duplicates."""
MAX_HASH_BITS, MAX_MEAN_DIFFERENCE = 10, 6.0
"""Near duplicates differ in at most so many of 64 bits, and by so many levels of 255 on average."""
THUMBNAIL_SIZE = 16
MAX_EXAMPLES = 5
"""Examples that are kept of each kind: unreadable rows, duplicates, sizes."""
MAX_CLASSES = 12
"""Classes that are printed with their number of images."""


@dataclass(frozen=True)
class ImageHashes:
    """`digest` is equal for equal pixels; `difference_hash` is close for similar images: 64 bits.

    The hash and its thumbnail, [16, 16] uint8, are None for rows that are not compared.
    """

    digest: int
    difference_hash: int | None
    thumbnail: np.ndarray | None


def hash_image(pixels: np.ndarray, is_compared: bool) -> ImageHashes:
    """Return the hashes of [C, H, W] uint8. Thread-safe."""
    digest = pixel_digest(pixels.shape, pixels.tobytes())
    if not is_compared:
        return ImageHashes(digest, None, None)
    if len(pixels) == 4:  # on gray, so that shapes in black and in white differ too
        pixels = composite(torch.from_numpy(pixels), torch.tensor(128)).numpy()
    green = Image.fromarray(pixels[len(pixels) // 2])  # the channel closest to brightness
    thumbnail = green.resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
    return ImageHashes(digest, difference_hash(thumbnail), np.asarray(thumbnail))


def pixel_digest(shape: tuple[int, ...], content: bytes) -> int:
    """Return 64 bits that are equal for equal pixels of an equal shape."""
    return xxhash.xxh3_64_intdigest(f"{shape}".encode() + content)


def difference_hash(image: Image.Image) -> int:
    """Return the dHash of an image of mode L: which of its 8x8 pixels are darker than the next."""
    small = np.asarray(image.resize((9, 8), Image.Resampling.LANCZOS))
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


class DataReport:
    """Counts over the images of one dataset, in the order of its rows."""

    def __init__(self, config: DecodeConfig, num_rows: int):
        self.config = config
        self.compared_interval = -(-num_rows // MAX_COMPARED)
        self.unreadable: list[tuple[int, str]] = []
        self.modes: Counter[str] = Counter()
        self.sizes: Counter[str] = Counter()
        self.bit_depths: Counter[str] = Counter()
        self.flags = Counter(
            alpha=0, exif_rotated=0, icc_profiles=0, animated=0, extra_bands=0, enlarged=0
        )
        self.value_ranges: dict[str, list[float]] = {}
        self.crop_loss_sum = self.crop_loss_most = 0.0
        self.rows, self.digests = array("Q"), array("Q")
        self.compared: list[tuple[int, ImageHashes]] = []

    def is_compared(self, row: int) -> bool:
        """Return whether a row is searched for near duplicates."""
        return row % self.compared_interval == 0

    def add_unreadable(self, row: int, reason: str) -> None:
        self.unreadable.append((row, reason))

    def add(self, row: int, info: ImageInfo, hashes: ImageHashes) -> None:
        """Count a decoded image."""
        self.modes[info.mode] += 1
        self.sizes[f"{info.width}x{info.height}"] += 1
        self.bit_depths[str(info.bits)] += 1
        (height, width), (target_height, target_width) = info.upright_size, self.config.size
        short, long = sorted((width * target_height, height * target_width))
        self.flags.update(
            alpha=info.alpha,
            exif_rotated=info.rotated,
            icc_profiles=info.icc,
            animated=info.animated,
            extra_bands=info.extra_bands,
            enlarged=height < target_height or width < target_width,
        )
        if info.low is not None and info.high is not None:
            low, high = self.value_ranges.get(info.mode, (info.low, info.high))
            self.value_ranges[info.mode] = [min(low, info.low), max(high, info.high)]
        crop_loss = 1 - short / long if self.config.resize_mode == "crop" else 0.0
        self.crop_loss_sum += crop_loss
        self.crop_loss_most = max(self.crop_loss_most, crop_loss)
        self.rows.append(row)
        self.digests.append(hashes.digest)
        if hashes.difference_hash is not None:
            self.compared.append((row, hashes))

    def facts(self, channels: int) -> dict[str, Any]:
        """Return all counts as entries of a DatasetRecord."""
        exact = exact_duplicates(np.array(self.rows), np.array(self.digests))
        is_new = ~np.isin([row for row, _ in self.compared], exact[:, 0])
        compared = [self.compared[index] for index in np.flatnonzero(is_new)]
        near = near_duplicates(compared)
        return {
            "images": len(self.rows),
            "channels": channels,
            "channels_why": self._channels_reason(channels),
            "modes": dict(self.modes.most_common()),
            "sizes": dict(self.sizes.most_common(MAX_EXAMPLES)),
            "distinct_sizes": len(self.sizes),
            "bit_depths": dict(self.bit_depths.most_common()),
            "value_ranges": self.value_ranges,
            "resize_mode": self.config.resize_mode,
            "crop_loses_mean": round(self.crop_loss_sum / max(1, len(self.rows)), 4),
            "crop_loses_most": round(self.crop_loss_most, 4),
            **self.flags,
            "unreadable": len(self.unreadable),
            "unreadable_first": _examples(self.unreadable, "row {}: {}"),
            "exact_duplicates": len(exact),
            "exact_first": _examples(exact, "row {} = row {}"),
            "near_duplicates": len(near),
            "near_first": _examples(near, "row {} ~ row {}"),
            "near_compared": len(compared),
        }

    def _channels_reason(self, channels: int) -> str:
        if self.config.channels is not None:
            return "set by --channels or the pretrained model"
        return "no image has any color" if channels == 1 else "some images have color"


def exact_duplicates(rows: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Return (row, first row) for every row with the digest of an earlier one, [number, 2].

    `rows` are in ascending order, `digests` one for each of them.
    """
    _, firsts, inverse = np.unique(digests, return_index=True, return_inverse=True)
    pairs = np.stack([rows, rows[firsts][inverse]], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def near_duplicates(compared: list[tuple[int, ImageHashes]]) -> list[tuple[int, int]]:
    """Return (row, earlier row) for every row whose closest earlier row is similar enough."""
    hashes = np.array([image.difference_hash for _, image in compared], dtype=np.uint64)
    thumbnails = np.array([image.thumbnail for _, image in compared], dtype=np.int16)
    pairs = []
    for index in range(1, len(compared)):
        distances = np.bitwise_count(hashes[:index] ^ hashes[index])
        closest = int(distances.argmin())
        if distances[closest] <= MAX_HASH_BITS:
            difference = np.abs(thumbnails[index] - thumbnails[closest]).mean()
            if difference <= MAX_MEAN_DIFFERENCE:
                pairs.append((compared[index][0], compared[closest][0]))
    return pairs


def format_report(facts: DatasetRecord) -> list[str]:
    """Return the lines that are printed before training, from the facts of the record."""
    rows = "rows of unknown number" if facts.rows is None else f"{facts.rows:,} rows"
    if facts.probed is not None:
        rows += f", streamed; the first {facts.probed:,} were checked"
    more = facts.distinct_sizes - MAX_EXAMPLES
    lines = [
        f"Data: {facts.name}, split {facts.split}, column {facts.image_column}: {rows}.",
        f"Trained as {facts.colors} ({facts.channels_why}). "
        f"Stored as {_counts(facts.modes)}; {_counts(facts.bit_depths)} bits a channel.",
        f"Sizes: {_counts(facts.sizes)}" + (f" and {more:,} more." if more > 0 else "."),
    ]
    if facts.classes:
        lines.append(_classes(facts))
    if facts.crop_loses_most:
        lines.append(
            f"Cropping cuts off {facts.crop_loses_mean:.0%} of an image on "
            f"average, {facts.crop_loses_most:.0%} at most (--resize_mode pad keeps all)."
        )
    kept, opaque = facts.channels == 4, sum(facts.modes.values()) - facts.alpha
    if kept and opaque:
        lines.append(f"{opaque:,} have no transparency: their fourth channel is opaque.")
    for name, description in (
        ("enlarged", "are smaller than the resolution and are enlarged"),
        (
            "alpha",
            "have transparency: "
            + ("the fourth channel" if kept else "the --background shows through"),
        ),
        ("exif_rotated", "were rotated by their EXIF orientation"),
        ("icc_profiles", "have a color profile, which is not applied"),
        ("animated", "have several frames or pages: the first is used (docs/data.md splits them)"),
        ("extra_bands", "have bands after gray or RGB, which are not used (docs/data.md)"),
    ):
        if count := getattr(facts, name):
            lines.append(f"{count:,} {description}.")
    for mode, (low, high) in facts.value_ranges.items():
        lines.append(f"Values of mode {mode} run from {low:g} to {high:g} (--value_range scales).")
    if facts.unreadable:
        examples = "; ".join(facts.unreadable_first)
        lines.append(f"{facts.unreadable:,} unreadable images are skipped: {examples}.")
    for reason, count in facts.left_out.items():
        names = ", ".join(facts.left_out_first.get(reason, []))
        lines.append(f"{count:,} left out ({reason}): {names}{', ...' * (count > MAX_EXAMPLES)}.")
    if facts.exact_duplicates:
        examples = "; ".join(facts.exact_first)
        lines.append(f"{facts.exact_duplicates:,} have the pixels of an earlier one: {examples}.")
    if facts.near_duplicates:
        examples = f"among {facts.near_compared:,} compared: {'; '.join(facts.near_first)}"
        lines.append(f"{facts.near_duplicates:,} are similar to an earlier one, {examples}.")
    return [printable(line) for line in lines]


def _examples(pairs: Sequence[Any], template: str) -> list[str]:
    return [template.format(*pair) for pair in pairs[:MAX_EXAMPLES]]


def _classes(facts: DatasetRecord) -> str:
    counts = [f"{name} ({count:,})" for name, count in facts.classes.items()]
    if len(counts) > MAX_CLASSES + 1:
        counts[MAX_CLASSES:] = [f"and {len(counts) - MAX_CLASSES:,} more"]
    line = f"Classes: {len(facts.classes):,}, from column {facts.label_column}: {', '.join(counts)}"
    if facts.unlabeled == 1:
        line += "; 1 row without a label trains the null class"
    elif facts.unlabeled:
        line += f"; {facts.unlabeled:,} rows without a label train the null class"
    return f"{line}."


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} of {name}" for name, count in counts.items())
