"""A dataset that is read as it is needed: for data larger than the disk.

The stream is one endless sequence of rows, the same on any number of processes (blocks.py makes it
so): every process reads all rows and decodes those at its own positions. The place where a block
begins goes into the checkpoint, so a resumed run opens the shards there and reads at most one block
again: not a row is skipped or seen twice.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from ddpm.config.train import DataConfig
from ddpm.data import decode, transforms
from ddpm.data.decode import DecodeConfig
from ddpm.data.report import MAX_EXAMPLES, DataReport
from ddpm.data.shard_reader import ShardReader, ShuffledBlocks
from ddpm.data.source import Source
from ddpm.errors import UserError

PROBE_ROWS = 256
"""Rows that are looked at before the first step."""


class ImageStream:
    """A dataset that is read as it is needed; in ImageSet's place.

    `len()` is the rows that count as an epoch. Channels are those of the first rows, as is the
    report. One thread reads ahead and decodes, with the help of a pool, what the next call of
    `batch` will ask for: the positions of one process lie at equal distances.
    """

    def __init__(self, source: Source, config: DataConfig, look: DecodeConfig, seed: int):
        self.num_rows = config.rows_per_epoch or source.num_rows
        if self.num_rows is None:
            raise UserError(
                f"The dataset {source.facts['name']} does not say how many rows it streams. Give "
                "--rows_per_epoch N: what counts as an epoch."
            )
        self.look, self.limit = look, config.max_bad_images
        self.resolution, self.seen, self.unreadable = config.resolution, 0, 0
        self._blocks = ShuffledBlocks(ShardReader(source, seed), config.shuffle_buffer_size)
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._thread = ThreadPoolExecutor(1)
        self._last: int | None = None
        self._ahead: dict[tuple[int, int], Future[list[torch.Tensor]]] = {}
        self.report = self._probe(source, config)
        self.channels = self.report["channels"]
        self.look = replace(look, channels=self.channels)
        self.facts = {**source.facts, **self.report}

    def __len__(self) -> int:
        return self.num_rows

    def rows(self, first: int, count: int) -> range:
        """Positions in the endless stream: they stand for rows here."""
        return range(first, first + count)

    def batch(
        self, rows: Sequence[int], generator: torch.Generator, random_flip: bool
    ) -> torch.Tensor:
        """Neighbouring positions, cropped and flipped by draws of `generator`: [B, C, R, R] uint8.

        UserError when more images than `max_bad_images` allows turned out unreadable; until then
        the next readable one of the block stands in for each.
        """
        first, count = rows[0], len(rows)
        coming = self._ahead.pop((first, count), None)
        images = (coming or self._thread.submit(self._decode, first, count)).result()
        self._ahead.clear()
        if self._last is not None and first > self._last:
            following = 2 * first - self._last
            ahead = self._thread.submit(self._decode, following, count)
            self._ahead[following, count] = ahead
        self._last = first
        self._refuse_bad()
        draws = transforms.draw_crops_and_flips(count, generator)
        cut = transforms.random_crop(images, self.resolution, draws)
        return transforms.random_flip(cut, draws) if random_flip else cut

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps to go on from `position`: the mark of its block, as JSON."""
        return self._thread.submit(self._blocks.mark, position).result()

    def restore(self, state: dict[str, Any] | None, position: int) -> None:
        """Go on from what `state` gave; without it, everything before `position` is read again."""
        if state is not None:
            self._thread.submit(self._blocks.restore, state).result()

    def _decode(self, first: int, count: int) -> list[torch.Tensor]:
        values = [
            (position, self._blocks.row(position)) for position in range(first, first + count)
        ]
        decoded = list(self._pool.map(lambda pair: self._read(pair[1]), values))
        self.seen += count
        return [
            torch.tensor(self._instead(position, result) if isinstance(result, str) else result)
            for (position, _), result in zip(values, decoded, strict=True)
        ]

    def _read(self, value: Any) -> np.ndarray | str:
        try:
            return decode.decode_row(value, self.look)[0]
        except Exception as error:  # Pillow raises many kinds; every one means: unreadable
            return decode.failure_reason(value, error)

    def _instead(self, position: int, reason: str) -> np.ndarray:
        """The next readable row of the block, whatever process asks."""
        self.unreadable += 1
        if self.unreadable <= MAX_EXAMPLES:
            print(f"Skipped at position {position:,} of the stream: {reason}", file=sys.stderr)
        for offset in range(1, self._blocks.length(position)):
            result = self._read(self._blocks.row(position, offset))
            if not isinstance(result, str):
                return result
        raise UserError(
            f"None of the {self._blocks.length(position):,} images around position {position:,} of "
            f"the stream can be read. The first: {reason}."
        )

    def _refuse_bad(self) -> None:
        if self.unreadable > self.limit * max(self.seen, 1000):
            raise UserError(
                f"{self.unreadable} of the {self.seen:,} images read since the start cannot be "
                f"read, more than --max_bad_images {self.limit:g} allows. Mend or remove them, or "
                "raise the limit to skip them."
            )

    def _probe(self, source: Source, config: DataConfig) -> dict[str, Any]:
        """Look at the first rows: channels, report, and the identity of the stream."""
        count = min(PROBE_ROWS, self._blocks.length(0))
        report = DataReport(self.look, count)
        values = [self._blocks.row(position) for position in range(count)]
        most, identity = 1, hashlib.sha256()
        for row, result in enumerate(self._pool.map(report.read, range(count), values)):
            if isinstance(result, str):
                report.add_bad(row, result)
                continue
            pixels, *notes = result
            report.add(row, *notes)
            most = max(most, len(pixels))
            identity.update(pixels.tobytes())
        if len(report.bad) == count:
            raise UserError(
                f"None of the first {count} images of {source.facts['name']} can be read. The "
                f"first: row {report.bad[0][0]}: {report.bad[0][1]}."
            )
        named = {
            **source.facts,
            **asdict(self.look),
            "buffer": config.shuffle_buffer_size,
            "shards": self._blocks.reader.num_shards,
        }
        identity.update(json.dumps(named, sort_keys=True).encode())
        return {
            "pixels_sha256": identity.hexdigest(),
            **report.facts(self.look.channels or most),
            "images": self.num_rows,
            "probed": count,
        }
