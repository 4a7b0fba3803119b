"""Read a dataset as it is needed, for data larger than the disk.

Micro-batch m of every step reads lane m, an endless sequence of rows of its own shards
(shard_reader.py), so a process reads only what it trains on, and a run sees the same rows on any
number of processes. A checkpoint keeps where the current block of each lane begins, so a resumed
run opens the shards there and reads at most one block again; no row is skipped or seen twice.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed

from ddpm.config.data import DataConfig
from ddpm.cpu_threads import usable_cores
from ddpm.data import transforms
from ddpm.data.decode import DecodeConfig, DecodeError, ImageInfo, decode_row
from ddpm.data.order import Lanes
from ddpm.data.report import MAX_EXAMPLES, DataReport, hash_image
from ddpm.data.shard_reader import (
    READING_THREADS,
    Row,
    ShardReader,
    ShuffledBlocks,
    block_rows,
    count_shards,
    lane_notes,
)
from ddpm.data.source import Source
from ddpm.errors import UserError
from ddpm.run_record import DatasetRecord

PROBE_ROWS = 256
"""Rows that are decoded before the first step, for the data report and the number of channels."""
PROBE_BYTES = 2**27
"""Decoded pixels of these rows that are kept for the first batches."""
SOURCE_FIELDS = ("name", "on_hub", "revision", "config_name", "split", "image_column", "rows")
CARD_FIELDS = ("title", "license")
"""Facts that are part of the hash of a stream; those of the dataset card only if it has them."""
DecodedRow = tuple[np.ndarray, ImageInfo]


class Decoded(NamedTuple):
    """Images of consecutive positions of a lane, their labels, the mark of the position after
    them, and what was skipped for each image that cannot be read."""

    images: list[np.ndarray]
    labels: list[int | None]
    mark: dict[str, Any]
    skipped: list[str]


class ImageStream:
    """A dataset that is read as it is needed. Implements `dataset.BatchSource`.

    Threads read the files ahead (shard_reader.py). One more thread prepares the next batch of each
    lane of this process, with a pool of threads that decodes its images. `facts` are those of the
    record.
    """

    class_names: list[str] | None = None

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        decode_config: DecodeConfig,
        seed: int,
        lanes: Lanes | None = None,
    ):
        self.num_rows = config.rows_per_epoch or source.facts.rows
        if self.num_rows is None:
            raise UserError(
                f"The dataset {source.facts.name} does not say how many rows it streams. Give "
                "--rows_per_epoch N: what counts as an epoch."
            )
        self.size, self.max_bad_images = config.size, config.max_bad_images
        self.num_read, self.num_unreadable = 0, 0
        self.lanes = lanes or Lanes()
        self.notes = lane_notes(count_shards(source, self.lanes.count), self.lanes.count)
        self._decode_config, self._source, self._seed = decode_config, source, seed
        self._buffer_rows = config.shuffle_buffer_size
        self.class_names = source.labels and source.labels.names
        self._num_decoders = usable_cores()
        self._decoders = ThreadPoolExecutor(self._num_decoders)
        self._file_readers = ThreadPoolExecutor(READING_THREADS)
        self._preparer = ThreadPoolExecutor(1)
        self._blocks = {lane: self._open_lane(lane) for lane in self.lanes.own}
        self._ahead: dict[int, tuple[int, int, Future[Decoded]]] = {}
        self._marks: dict[int, tuple[int, dict[str, Any]]] = {}
        self.facts = self._on_first_process(self._probe)
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
        """Return positions that follow in a lane, cropped and augmented by draws of a generator.

        Each unreadable image is replaced by the next readable one of its block. UserError when
        there are more of them than `max_bad_images` allows, or the data cannot be read; a later
        call reads the same rows again.
        """
        count, (lane, start) = len(rows), self.lanes.locate(rows[0])
        assert self.lanes.locate(rows[-1]) == (lane, start + count - 1), "rows of several lanes"
        try:
            decoded = self._prepare(lane, start, count).result()
        except Exception:
            self._ahead.clear()
            raise
        self._marks[lane] = start + count, decoded.mark
        self._count(count, decoded.skipped)
        self._prepare(lane, start + count, count)
        for other in self._blocks.keys() - self._ahead.keys():  # in the first step
            self._prepare(other, start, count)
        draws = transforms.draw_transforms(count, generator)
        crops = transforms.random_crop(decoded.images, self.size, draws)
        if augmentation is not None:
            crops = transforms.augment(crops, draws, augmentation)
        labels = None if self.class_names is None else torch.tensor(decoded.labels)
        return transforms.Batch(crops, labels)

    def state(self, position: int) -> dict[str, Any]:
        """Return JSON to continue from `position`: where the block of each lane begins, by its
        number. These are the lanes of this process."""
        _, start = self.lanes.locate(position)
        marks = {}
        for lane, blocks in self._blocks.items():
            after, mark = self._marks.get(lane, (None, None))
            if after != start:
                mark = self._preparer.submit(blocks.mark, start).result()
            marks[str(lane)] = mark
        return marks

    def restore(self, state: dict[str, Any] | None, position: int) -> None:
        """Continue from the states of all lanes; without, all before `position` is read again."""
        if state is None:
            return
        if "place" in state:  # of a version without lanes
            state = {"0": state}
        self._ahead.clear()
        self._marks.clear()
        for lane, blocks in self._blocks.items():
            self._preparer.submit(blocks.restore, state[str(lane)]).result()

    def _open_lane(self, lane: int) -> ShuffledBlocks:
        rows = block_rows(self._buffer_rows, self.lanes.count)
        threads, num_lanes = self._file_readers, self.lanes.count
        reader = ShardReader(self._source, self._seed, threads, rows, lane, num_lanes)
        kept = 2 if lane else 1 + -(-self._probe_rows // rows)
        return ShuffledBlocks(reader, rows, max(2, kept))

    def _prepare(self, lane: int, start: int, count: int) -> Future[Decoded]:
        """Return the batch at a position of a lane, which is prepared once."""
        *wanted, future = self._ahead.get(lane, (None, None, None))
        if wanted != [start, count]:
            future = self._preparer.submit(self._decode, lane, start, count)
            self._ahead[lane] = start, count, future
        return future

    def _decode(self, lane: int, start: int, count: int) -> Decoded:
        blocks, images = self._blocks[lane], []
        rows = [blocks.row(position) for position in range(start, start + count)]
        results, skipped = list(self._decode_rows(rows)), []
        for index, result in enumerate(results):
            if isinstance(result, DecodeError):
                skipped.append(f"{self._where(lane, start + index)}: {result}")
                rows[index], result = self._replacement(lane, start + index, result)
            images.append(result[0])
        labels = [self._source.label_id(row) for row in rows]
        return Decoded(images, labels, blocks.mark(start + count), skipped)

    def _decode_rows(self, rows: list[Row]) -> Iterator[DecodedRow | DecodeError]:
        """Decode on all threads, several rows in a task: starting one costs as much as an icon."""
        count = max(1, len(rows) // (4 * self._num_decoders))
        tasks = [rows[start : start + count] for start in range(0, len(rows), count)]
        decoded = self._decoders.map(lambda task: [self._decode_row(row) for row in task], tasks)
        return chain.from_iterable(decoded)

    def _decode_row(self, row: Row) -> DecodedRow | DecodeError:
        try:
            value = row[self._source.column]
            if isinstance(value, tuple):
                return value  # of the probe
            return decode_row(value, self._decode_config, self._source.hub_id)
        except DecodeError as error:
            return error

    def _replacement(self, lane: int, position: int, error: DecodeError) -> tuple[Row, DecodedRow]:
        """Return the next readable row of the block; the same one on every process."""
        blocks = self._blocks[lane]
        for offset in range(1, blocks.length(position)):
            row = blocks.row(position, offset)
            result = self._decode_row(row)
            if not isinstance(result, DecodeError):
                return row, result
        raise UserError(
            f"None of the {blocks.length(position):,} images around {self._where(lane, position)} "
            f"can be read. The first: {error}. A larger --shuffle_buffer_size has others to take."
        )

    def _where(self, lane: int, position: int) -> str:
        of_lane = f" of lane {lane}" if self.lanes.count > 1 else ""
        return f"position {position:,}{of_lane} of the stream"

    def _count(self, num_read: int, skipped: list[str]) -> None:
        """Count the images of a batch that is used, and print the first ones that were skipped."""
        for line in skipped[: max(0, MAX_EXAMPLES - self.num_unreadable)]:
            print(f"Skipped at {line}", file=sys.stderr)
        self.num_read += num_read
        self.num_unreadable += len(skipped)
        if self.num_unreadable > self.max_bad_images * max(self.num_read, 1000):
            raise UserError(
                f"{self.num_unreadable} of the {self.num_read:,} images read since the start "
                f"cannot be read, more than --max_bad_images {self.max_bad_images:g} allows. Fix "
                "or remove them, or raise the limit to skip them."
            )

    @property
    def _probe_rows(self) -> int:
        return min(PROBE_ROWS, self._buffer_rows)

    def _on_first_process(self, probe: Callable[[], DatasetRecord]) -> DatasetRecord:
        """Return what the first process finds in its lane 0; its UserError is raised on all."""
        if self.lanes.count == 1 or not torch.distributed.is_initialized():
            return probe()
        result: list[Any] = [None]
        if 0 in self._blocks:
            try:
                result = [probe()]
            except UserError as error:
                result = [error]
        torch.distributed.broadcast_object_list(result)
        if isinstance(result[0], UserError):
            raise result[0]
        return result[0]

    def _probe(self) -> DatasetRecord:
        """Decode the first rows for the data report and a hash that identifies the stream."""
        source, blocks = self._source, self._blocks.get(0) or self._open_lane(0)
        rows = blocks.first_rows(self._probe_rows)
        report = DataReport(self._decode_config, len(rows))
        channels, sha256, labels = 1, hashlib.sha256(), []
        decoded, decoded_bytes = [], 0
        for row, result in enumerate(self._decode_rows(rows)):
            if isinstance(result, DecodeError):
                report.add_unreadable(row, str(result))
                continue
            pixels, info = result
            decoded_bytes += pixels.nbytes
            if decoded_bytes <= PROBE_BYTES:
                decoded.append((rows[row], result))
            report.add(row, info, hash_image(pixels, report.is_compared(row)))
            channels = max(channels, len(pixels))
            sha256.update(pixels.tobytes())
            labels.append(source.label_id(rows[row]))
        if len(report.unreadable) == len(rows):
            row, reason = report.unreadable[0]
            raise UserError(
                f"None of the first {len(rows)} images of {source.facts.name} can be read. The "
                f"first: row {row}: {reason}."
            )
        settings = {
            **{name: getattr(source.facts, name) for name in SOURCE_FIELDS},
            **{name: text for name in CARD_FIELDS if (text := getattr(source.facts, name))},
            **asdict(self._decode_config),
            "buffer": self._buffer_rows,
            "shards": blocks.reader.num_shards,
        }
        sha256.update(json.dumps(settings, sort_keys=True).encode())
        channels = self._decode_config.channels or channels
        for row, result in decoded:
            if len(result[0]) == channels:
                row[source.column] = result  # the first batches need not decode it again
        facts = report.facts(channels)
        pixels_sha256 = sha256.hexdigest()
        facts |= {"images": self.num_rows, "probed": len(rows), "pixels_sha256": pixels_sha256}
        if source.labels is not None:
            facts |= source.labels.facts(pixels_sha256, labels)
        return replace(source.facts, **facts)
