"""Rows of a stream, shuffled, by position: for data larger than the disk.

The stream is one endless sequence of rows, the same on any number of processes: in each epoch the
shards come in an order of their own, up to `WIDTH` of them are read in turn, and blocks of
`shuffle_buffer_size` rows are shuffled whole; all of it a function of (seed, epoch, block). Every
process reads all rows and decodes those at its own positions. The place where a block begins is a
small JSON object that goes into the checkpoint, so a resumed run opens the shards there and reads
at most one block again: not a row is skipped or seen twice.
"""

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import torch

from ddpm import cutting, datareport, decoding, hub, order
from ddpm.config import DataConfig
from ddpm.decoding import Look
from ddpm.errors import UserError
from ddpm.sources import Source, reason_of

WIDTH = 8
"""Shards that are read in turn."""
MAX_SHARDS = 1024
PROBED = 256
"""Rows that are looked at before the first step."""

Place = dict[str, Any]
"""Where reading stands: {"epoch", "next", "turn", "open": [[shard, state of datasets], ...]}."""
START: Place = {"epoch": 0, "next": 0, "turn": 0, "open": []}


@dataclass
class Shard:
    """One open shard: its number, the rest of its rows, and where that begins.

    `opened_at` is the state of `datasets` that it was opened with, None for its beginning.
    """

    number: int
    dataset: datasets.IterableDataset
    rows: Iterator[dict[str, Any]]
    opened_at: dict[str, Any] | None
    was_read: bool = False

    def read(self) -> dict[str, Any]:
        row = next(self.rows)
        self.was_read = True
        return row

    def state(self) -> dict[str, Any] | None:
        return self.dataset.state_dict() if self.was_read else self.opened_at


class Reader:
    """The rows of one epoch after the other, some shards at a time, from any place onwards."""

    def __init__(self, source: Source, seed: int):
        self.dataset, self.column, self.seed = source.dataset, source.column, seed
        self.thing = f"The dataset {source.facts['name']}"
        self.num_shards = max(1, min(source.dataset.num_shards, MAX_SHARDS))
        self.seek(START)

    def place(self) -> Place:
        """Where the next row is."""
        shards = [[shard.number, shard.state()] for shard in self._open]
        return {"epoch": self.epoch, "next": self._next, "turn": self._turn, "open": shards}

    def seek(self, place: Place) -> None:
        self.epoch, self._next, self._turn = place["epoch"], place["next"], place["turn"]
        shuffled = np.random.default_rng(order.seed_of(self.seed, "order", self.epoch, 0))
        self._order = shuffled.permutation(self.num_shards).tolist()
        self._open = [self._opened(number, state) for number, state in place["open"]]

    def rows(self, count: int) -> list[Any]:
        """The next rows of this epoch, fewer at its end; none when it is over."""
        found: list[Any] = []
        with hub.told(self.thing):
            while len(found) < count:
                while len(self._open) < WIDTH and self._next < self.num_shards:
                    self._open.append(self._opened(self._order[self._next], None))
                    self._next += 1
                if not self._open:
                    break
                self._turn %= len(self._open)
                try:
                    found.append(self._open[self._turn].read()[self.column])
                    self._turn += 1
                except StopIteration:
                    del self._open[self._turn]
                except Exception as error:  # of any builder; every one means: not readable
                    if hub.explain(error, self.thing):
                        raise
                    raise UserError(
                        f"{self.thing} cannot be read further: {reason_of(error)}. The same "
                        "command goes on from the last checkpoint."
                    ) from error
        return found

    def _opened(self, number: int, state: dict[str, Any] | None) -> Shard:
        dataset = self.dataset.shard(num_shards=self.num_shards, index=number)
        if state is not None:
            dataset.load_state_dict(state)
        return Shard(number, dataset, iter(dataset), state)


@dataclass
class Block:
    """Neighbouring rows, shuffled: `first` is the first's position, `place` where reading began."""

    first: int
    number: int
    place: Place
    rows: list[Any]

    def mark(self) -> dict[str, Any]:
        return {"first": self.first, "block": self.number, "place": self.place}


class Blocks:
    """Rows by position. Going forward costs reading; going back, reading from a remembered mark."""

    def __init__(self, reader: Reader, size: int):
        self.reader, self.size = reader, size
        self._blocks: deque[Block] = deque(maxlen=2)
        self._marks: deque[dict[str, Any]] = deque(maxlen=64)
        self._jump({"first": 0, "block": 0, "place": START})

    def row(self, position: int, offset: int = 0) -> Any:
        """The row at `position`, or `offset` further in the same block, round its end."""
        block = self._block(position)
        return block.rows[(position - block.first + offset) % len(block.rows)]

    def length(self, position: int) -> int:
        """Rows in the block of `position`."""
        return len(self._block(position).rows)

    def mark(self, position: int) -> dict[str, Any]:
        """What to remember to go on from `position`: the block that it is in."""
        return self._block(position).mark()

    def restore(self, mark: dict[str, Any]) -> None:
        self._jump(mark)

    def _jump(self, mark: dict[str, Any]) -> None:
        self.reader.seek(mark["place"])
        self._blocks.clear()
        self._marks.append(mark)
        self._end, self._number = mark["first"], mark["block"]

    def _block(self, position: int) -> Block:
        if position < (self._blocks[0].first if self._blocks else self._end):
            before = [mark for mark in self._marks if mark["first"] <= position]
            self._jump(max(before, key=lambda mark: mark["first"], default=self._start()))
        while position >= self._end:
            self._read()
        return next(b for b in self._blocks if b.first <= position < b.first + len(b.rows))

    def _start(self) -> dict[str, Any]:
        return {"first": 0, "block": 0, "place": START}

    def _read(self) -> None:
        place = self.reader.place()
        rows = self.reader.rows(self.size)
        if not rows:
            if self._number == 0:
                raise UserError(f"{self.reader.thing} has no rows. Choose another --split.")
            self.reader.seek({**START, "epoch": self.reader.epoch + 1})
            self._number = 0
            return
        seed = order.seed_of(self.reader.seed, "order", self.reader.epoch, self._number + 1)
        shuffled = np.random.default_rng(seed).permutation(len(rows))
        block = Block(self._end, self._number, place, [rows[index] for index in shuffled])
        self._blocks.append(block)
        self._marks.append(block.mark())
        self._end, self._number = self._end + len(rows), self._number + 1


class Stream:
    """A dataset that is read as it is needed; in ImageSet's place.

    `len()` is the rows that count as an epoch. Channels are those of the first rows, as is the
    report. One thread reads ahead and decodes, with the help of a pool, what the next call of
    `batch` will ask for: the positions of one process lie at equal distances.
    """

    def __init__(self, source: Source, config: DataConfig, look: Look, seed: int):
        self.num_rows = config.rows_per_epoch or source.num_rows
        if self.num_rows is None:
            raise UserError(
                f"The dataset {source.facts['name']} does not say how many rows it streams. Give "
                "--rows_per_epoch N: what counts as an epoch."
            )
        self.look, self.limit = look, config.max_bad_images
        self.resolution, self.seen, self.unreadable = config.resolution, 0, 0
        self._blocks = Blocks(Reader(source, seed), config.shuffle_buffer_size)
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._thread = ThreadPoolExecutor(1)
        self._last: int | None = None
        self._ahead: dict[tuple[int, int], Future[list[torch.Tensor]]] = {}
        self.report = self._probe(source, config)
        self.channels = self.report["channels"]
        self.look = Look(**{**asdict(look), "channels": self.channels})
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
        draws = cutting.draw(count, generator)
        cut = cutting.crop(images, self.resolution, draws)
        return cutting.flip(cut, draws) if random_flip else cut

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
            torch.from_numpy(self._instead(position, result) if isinstance(result, str) else result)
            for (position, _), result in zip(values, decoded, strict=True)
        ]

    def _read(self, value: Any) -> np.ndarray | str:
        try:
            return decoding.read(value, self.look)[0]
        except Exception as error:  # Pillow raises many kinds; every one means: unreadable
            return decoding.why(value, error)

    def _instead(self, position: int, reason: str) -> np.ndarray:
        """The next readable row of the block, whatever process asks."""
        self.unreadable += 1
        if self.unreadable <= datareport.FIRST:
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
        count = min(PROBED, self._blocks.length(0))
        report = datareport.Report(self.look, count)
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
        named = {**source.facts, **asdict(self.look), "buffer": config.shuffle_buffer_size,
                 "shards": self._blocks.reader.num_shards}  # fmt: skip
        identity.update(json.dumps(named, sort_keys=True).encode())
        return {
            "pixels_sha256": identity.hexdigest(),
            **report.facts(self.look.channels or most),
            "images": self.num_rows,
            "probed": count,
        }
