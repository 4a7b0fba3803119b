"""Read a dataset as it is needed, for data larger than the disk.

The stream is one endless sequence of rows, the same on any number of processes (shard_reader.py):
every process reads all rows and decodes those at its own positions. A checkpoint keeps where the
current block begins, so a resumed run opens the shards there and reads at most one block again; no
row is skipped or seen twice.
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

from ddpm.config.data import DataConfig
from ddpm.data import transforms
from ddpm.data.decode import DecodeConfig, DecodeError, ImageInfo, decode_row
from ddpm.data.report import MAX_EXAMPLES, DataReport, hash_image
from ddpm.data.shard_reader import ShardReader, ShuffledBlocks
from ddpm.data.source import Source
from ddpm.errors import UserError
from ddpm.run_record import DatasetRecord

PROBE_ROWS = 256
"""Rows that are decoded before the first step, for the data report and the number of channels."""
SOURCE_FIELDS = ("name", "on_hub", "revision", "config_name", "split", "image_column", "rows")
CARD_FIELDS = ("title", "license")
"""Facts that are part of the hash of a stream; those of the dataset card only if it has them."""


class ImageStream:
    """A dataset that is read as it is needed. Implements `dataset.BatchSource`.

    One thread reads ahead what the next call of `batch` will need, since the positions of one
    process are equally spaced, and a pool of threads decodes it. `facts` are those of the record.
    """

    class_names: list[str] | None = None

    def __init__(self, source: Source, config: DataConfig, decode_config: DecodeConfig, seed: int):
        self.num_rows = config.rows_per_epoch or source.facts.rows
        if self.num_rows is None:
            raise UserError(
                f"The dataset {source.facts.name} does not say how many rows it streams. Give "
                "--rows_per_epoch N: what counts as an epoch."
            )
        self.size, self.max_bad_images = config.size, config.max_bad_images
        self.num_read, self.num_unreadable = 0, 0
        self._decode_config, self._source = decode_config, source
        self.class_names = source.labels and source.labels.names
        self._blocks = ShuffledBlocks(ShardReader(source, seed), config.shuffle_buffer_size)
        self._decoders = ThreadPoolExecutor(os.cpu_count())
        self._reader = ThreadPoolExecutor(1)
        self._last_position: int | None = None
        self._ahead: dict[tuple[int, int], Future[tuple[list[torch.Tensor], list[Any]]]] = {}
        self.facts = self._probe(source, config)
        self.channels = self.facts.channels
        self._decode_config = replace(decode_config, channels=self.channels)

    def __len__(self) -> int:
        return self.num_rows

    def rows(self, start: int, count: int) -> range:
        """Return positions of the endless sequence, which identify rows here."""
        return range(start, start + count)

    def batch(
        self,
        rows: Sequence[int],
        generator: torch.Generator,
        augmentation: DataConfig | None = None,
    ) -> transforms.Batch:
        """Return consecutive positions, cropped and augmented by draws of a CPU generator.

        Each unreadable image is replaced by the next readable one of its block. UserError when
        there are more of them than `max_bad_images` allows.
        """
        start, count = rows[0], len(rows)
        future = self._ahead.pop((start, count), None)
        images, labels = (future or self._reader.submit(self._decode, start, count)).result()
        self._ahead.clear()
        if self._last_position is not None and start > self._last_position:
            following = 2 * start - self._last_position
            self._ahead[following, count] = self._reader.submit(self._decode, following, count)
        self._last_position = start
        self._require_readable()
        draws = transforms.draw_transforms(count, generator)
        crops = transforms.random_crop(images, self.size, draws)
        if augmentation is not None:
            crops = transforms.augment(crops, draws, augmentation)
        labels = None if self.class_names is None else torch.tensor(labels)
        return transforms.Batch(crops, labels)

    def state(self, position: int) -> dict[str, Any]:
        """Return JSON to continue from `position`: where its block begins."""
        return self._reader.submit(self._blocks.mark, position).result()

    def restore(self, state: dict[str, Any] | None, position: int) -> None:
        """Continue from a state; without one, everything before `position` is read again."""
        if state is not None:
            self._reader.submit(self._blocks.restore, state).result()

    def _decode(self, start: int, count: int) -> tuple[list[torch.Tensor], list[int | None]]:
        """Return the images of consecutive positions, and their labels."""
        rows = [self._blocks.row(position) for position in range(start, start + count)]
        results = list(self._decoders.map(self._decode_row, rows))
        self.num_read += count
        images = []
        for index, result in enumerate(results):
            if isinstance(result, DecodeError):
                rows[index], result = self._replacement(start + index, result)
            images.append(torch.tensor(result[0]))
        return images, [self._source.label_id(row) for row in rows]

    def _decode_row(self, row: dict[str, Any]) -> tuple[np.ndarray, ImageInfo] | DecodeError:
        try:
            value = row[self._source.column]
            return decode_row(value, self._decode_config, self._source.hub_id)
        except DecodeError as error:
            return error

    def _replacement(
        self, position: int, error: DecodeError
    ) -> tuple[dict[str, Any], tuple[np.ndarray, ImageInfo]]:
        """Return the next readable row of the block; the same one on every process."""
        self.num_unreadable += 1
        if self.num_unreadable <= MAX_EXAMPLES:
            print(f"Skipped at position {position:,} of the stream: {error}", file=sys.stderr)
        for offset in range(1, self._blocks.length(position)):
            row = self._blocks.row(position, offset)
            result = self._decode_row(row)
            if not isinstance(result, DecodeError):
                return row, result
        raise UserError(
            f"None of the {self._blocks.length(position):,} images around position {position:,} of "
            f"the stream can be read. The first: {error}."
        )

    def _require_readable(self) -> None:
        if self.num_unreadable > self.max_bad_images * max(self.num_read, 1000):
            raise UserError(
                f"{self.num_unreadable} of the {self.num_read:,} images read since the start "
                f"cannot be read, more than --max_bad_images {self.max_bad_images:g} allows. Fix "
                "or remove them, or raise the limit to skip them."
            )

    def _probe(self, source: Source, config: DataConfig) -> DatasetRecord:
        """Decode the first rows for the data report and a hash that identifies the stream."""
        count = min(PROBE_ROWS, self._blocks.length(0))
        report = DataReport(self._decode_config, count)
        rows = [self._blocks.row(position) for position in range(count)]
        channels, sha256, labels = 1, hashlib.sha256(), []
        for row, result in enumerate(self._decoders.map(self._decode_row, rows)):
            if isinstance(result, DecodeError):
                report.add_unreadable(row, str(result))
                continue
            pixels, info = result
            report.add(row, info, hash_image(pixels, report.is_compared(row)))
            channels = max(channels, len(pixels))
            sha256.update(pixels.tobytes())
            labels.append(source.label_id(rows[row]))
        if len(report.unreadable) == count:
            row, reason = report.unreadable[0]
            raise UserError(
                f"None of the first {count} images of {source.facts.name} can be read. The "
                f"first: row {row}: {reason}."
            )
        settings = {
            **{name: getattr(source.facts, name) for name in SOURCE_FIELDS},
            **{name: text for name in CARD_FIELDS if (text := getattr(source.facts, name))},
            **asdict(self._decode_config),
            "buffer": config.shuffle_buffer_size,
            "shards": self._blocks.reader.num_shards,
        }
        sha256.update(json.dumps(settings, sort_keys=True).encode())
        facts = report.facts(self._decode_config.channels or channels)
        pixels_sha256 = sha256.hexdigest()
        facts |= {"images": self.num_rows, "probed": count, "pixels_sha256": pixels_sha256}
        if source.labels is not None:
            facts |= source.labels.facts(pixels_sha256, labels)
        return replace(source.facts, **facts)
