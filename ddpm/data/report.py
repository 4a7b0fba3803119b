"""What is in the data: told before the first step, and kept in the run's record.

Every image is noted once, when it is decoded. Rows with the same pixels after resizing are exact
duplicates. Near ones are the closest by a perceptual hash (imagehash's dhash), confirmed on small
copies; they are looked for among at most `MAX_COMPARED` rows, spread evenly, because that search
compares each with each.
"""

import hashlib
from collections import Counter
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from ddpm.data import decode
from ddpm.data.decode import DecodeConfig, ImageInfo

MAX_COMPARED = 20_000
NEAR_BITS, NEAR_LEVELS = 10, 6.0
"""Near duplicates: at most so many of the hash's 64 bits, and mean levels of 255, apart."""
THUMB = 16
MAX_EXAMPLES = 5
"""How many examples of a finding are kept."""


def pixel_digest(pixels: np.ndarray) -> bytes:
    """What two images have in common only if they have the same pixels and shape."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).digest()[:16]


def perceptual_hash(pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """[C, H, W] uint8 -> (64 bits of perceptual hash, thumbnail [16, 16] uint8).

    Of colours it takes the green channel, which is most of what the eye calls bright.
    """
    thumb = Image.fromarray(pixels[len(pixels) // 2])
    thumb = thumb.resize((THUMB, THUMB), Image.Resampling.BOX)
    bits = np.packbits(imagehash.dhash(thumb).hash)
    return int.from_bytes(bits.tobytes(), "big"), np.asarray(thumb)


class DataReport:
    """Notes on the images of one dataset, in the order of its rows. `num_rows` may be unknown."""

    def __init__(self, look: DecodeConfig, num_rows: int | None):
        self.look = look
        self.every = -(-num_rows // MAX_COMPARED) if num_rows else 1
        self.bad: list[tuple[int, str]] = []
        self.counts: dict[str, Counter[Any]] = {
            name: Counter() for name in ("modes", "sizes", "bit_depths")
        }
        self.flags: Counter[str] = Counter()
        self.ranges: dict[str, list[float]] = {}
        self.lost: list[float] = []
        self.digests: dict[bytes, int] = {}
        self.copies: list[tuple[int, int]] = []
        self.rows: list[int] = []
        self.hashes: list[int] = []
        self.thumbs: list[np.ndarray] = []

    def read(
        self, row: int, value: Any
    ) -> tuple[np.ndarray, ImageInfo, bytes, tuple[int, np.ndarray] | None] | str:
        """Decode a row: its pixels and what `add` takes, or why it cannot be read. Changes nothing,
        so threads may call it."""
        try:
            pixels, seen = decode.decode_row(value, self.look)
        except Exception as error:  # Pillow raises many kinds; every one means: unreadable
            return decode.failure_reason(value, error)
        compared = perceptual_hash(pixels) if row % self.every == 0 else None
        return pixels, seen, pixel_digest(pixels), compared

    def add_bad(self, row: int, reason: str) -> None:
        self.bad.append((row, reason))

    def add(
        self, row: int, seen: ImageInfo, digest: bytes, likeness: tuple[int, np.ndarray] | None
    ) -> None:
        """Note a readable image; `likeness` of those rows that are compared."""
        self.counts["modes"][seen.mode] += 1
        self.counts["sizes"][f"{seen.width}x{seen.height}"] += 1
        self.counts["bit_depths"][str(seen.bits)] += 1
        short, long = sorted((seen.width, seen.height))
        self.flags.update(
            name
            for name, is_so in (
                ("alpha", seen.alpha),
                ("exif_rotated", seen.rotated),
                ("icc_profiles", seen.icc),
                ("animated", seen.animated),
                ("enlarged", short < self.look.resolution),
            )
            if is_so
        )
        if seen.low is not None:
            low, high = self.ranges.setdefault(seen.mode, [seen.low, seen.high])
            self.ranges[seen.mode] = [min(low, seen.low), max(high, seen.high)]
        self.lost.append(1 - short / long if self.look.resize_mode == "crop" else 0.0)
        first = self.digests.setdefault(digest, row)
        if first != row:
            self.copies.append((row, first))
        elif likeness is not None:
            self.rows.append(row)
            self.hashes.append(likeness[0])
            self.thumbs.append(likeness[1])

    def facts(self, channels: int) -> dict[str, Any]:
        """All that was noted, as JSON has it."""
        near = near_duplicates(self.rows, self.hashes, self.thumbs)
        return {
            "images": len(self.lost),
            "channels": channels,
            "channels_why": self._why(channels),
            "modes": dict(self.counts["modes"].most_common()),
            "sizes": dict(self.counts["sizes"].most_common(MAX_EXAMPLES)),
            "distinct_sizes": len(self.counts["sizes"]),
            "bit_depths": dict(self.counts["bit_depths"].most_common()),
            "value_ranges": self.ranges,
            "resize_mode": self.look.resize_mode,
            "crop_loses_mean": round(float(np.mean(self.lost or [0.0])), 4),
            "crop_loses_most": round(max(self.lost, default=0.0), 4),
            **{
                name: self.flags[name]
                for name in ("alpha", "exif_rotated", "icc_profiles", "animated", "enlarged")
            },
            "unreadable": len(self.bad),
            "unreadable_first": [f"row {row}: {reason}" for row, reason in self.bad[:MAX_EXAMPLES]],
            "exact_duplicates": len(self.copies),
            "exact_first": [
                f"row {row} = row {first}" for row, first in self.copies[:MAX_EXAMPLES]
            ],
            "near_duplicates": len(near),
            "near_first": [f"row {row} ~ row {other}" for row, other in near[:MAX_EXAMPLES]],
            "near_compared": len(self.rows),
        }

    def _why(self, channels: int) -> str:
        if self.look.channels is not None:
            return "--channels"
        return "no image has any colour" if channels == 1 else "some images have colour"


def near_duplicates(
    rows: list[int], hashes: list[int], thumbs: list[np.ndarray]
) -> list[tuple[int, int]]:
    """(row, earlier row that looks like it) for every row that has one; the nearest by the hash."""
    bits, small = np.array(hashes, dtype=np.uint64), np.array(thumbs, dtype=np.int16)
    found = []
    for index in range(1, len(rows)):
        apart = np.bitwise_count(bits[:index] ^ bits[index])
        nearest = int(apart.argmin())
        if apart[nearest] <= NEAR_BITS:
            levels = np.abs(small[index] - small[nearest]).mean()
            if levels <= NEAR_LEVELS:
                found.append((rows[index], rows[nearest]))
    return found


def format_report(facts: dict[str, Any]) -> list[str]:
    """The report as a person reads it, from the facts of the record."""
    rows = "rows of unknown number" if facts["rows"] is None else f"{facts['rows']:,} rows"
    if "probed" in facts:
        rows += f", streamed; the first {facts['probed']:,} were looked at"
    told = [
        f"Data: {facts['name']}, split {facts['split']}, column {facts['image_column']}: {rows}.",
        f"Trained as {'gray' if facts['channels'] == 1 else 'RGB'} ({facts['channels_why']}). "
        f"Stored as {_counted(facts['modes'])}; {_counted(facts['bit_depths'])} bits a channel.",
        f"Sizes: {_counted(facts['sizes'])}"
        + (
            f" and {facts['distinct_sizes'] - MAX_EXAMPLES:,} more"
            * (facts["distinct_sizes"] > MAX_EXAMPLES)
        )
        + ".",
    ]
    if facts["crop_loses_most"]:
        told.append(
            f"Cropping to squares leaves out {facts['crop_loses_mean']:.0%} of an image on "
            f"average, {facts['crop_loses_most']:.0%} at most (--resize_mode pad keeps all)."
        )
    for name, words in (
        ("enlarged", "are smaller than the resolution and enlarged"),
        ("alpha", "have transparency: the --background shows through"),
        ("exif_rotated", "were turned upright by their EXIF orientation"),
        ("icc_profiles", "carry a colour profile, which is left alone"),
        ("animated", "are animated: the first frame is taken"),
    ):
        if facts[name]:
            told.append(f"{facts[name]:,} {words}.")
    for mode, (low, high) in facts["value_ranges"].items():
        told.append(f"Values of mode {mode} run from {low:g} to {high:g} (--value_range scales).")
    if facts["unreadable"]:
        first = "; ".join(facts["unreadable_first"])
        told.append(f"{facts['unreadable']:,} unreadable images are skipped: {first}.")
    if facts["exact_duplicates"]:
        first = "; ".join(facts["exact_first"])
        told.append(f"{facts['exact_duplicates']:,} have the pixels of an earlier one: {first}.")
    if facts["near_duplicates"]:
        among = f"among {facts['near_compared']:,} compared"
        first = "; ".join(facts["near_first"])
        told.append(f"{facts['near_duplicates']:,} look like an earlier one, {among}: {first}.")
    return told


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} of {what}" for what, count in counts.items())
