"""Decode every row of a dataset once into a file that later epochs, runs and processes read.

The file is in the cache of `datasets`, under a key of the dataset's fingerprint and all settings
that change a decoded byte:

    ddpm-pixels/<key>/pixels.bin    the rows end to end, each [C, H, W] uint8
    ddpm-pixels/<key>/rows.npy      H and W of each row, and its label if labels are asked for
    ddpm-pixels/<key>/index.json    channels, the data report, and checksums of both files and of
                                    the rest of this one; written last
    ddpm-pixels/<key>.partial/      what is decoded so far: pixels.bin, and in rows.jsonl what the
                                    report counts of each row

The checksums (XXH3) are compared whenever a cache is opened, as the sha256 that a run records must
be that of the pixels it trains on. XXH3 reads 12 GiB/s where sha256 reads 0.3.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from filelock import FileLock
from tqdm.auto import tqdm

from ddpm.cpu_threads import usable_cores
from ddpm.data.decode import DecodeConfig, DecodeError, ImageInfo, decode_row
from ddpm.data.open_errors import data_errors
from ddpm.data.report import DataReport, ImageHashes, hash_image, pixel_digest
from ddpm.data.source import Source
from ddpm.errors import UserError
from ddpm.file_io import file_hash, fsync_file
from ddpm.run_record import DatasetRecord

PIXELS, ROWS, INDEX = "pixels.bin", "rows.npy", "index.json"
JOURNAL = "rows.jsonl"
LAYOUT = 6
"""Part of the key. Increase it when the meaning of a cache file changes: old files are ignored."""
ROWS_PER_TASK = 16
"""Rows that a thread decodes in one task."""
SECONDS_OF_A_LINE = 30
"""Seconds between two lines on how far decoding is."""

Entry = list[Any] | str
"""One row as JSON: [shape, ImageInfo, *ImageHashes], or why it is unreadable."""
Task, Result = TypeVar("Task"), TypeVar("Result")


@dataclass(frozen=True)
class CachedPixels:
    """The decoded rows of a dataset: N images of one number of channels."""

    path: Path
    """The rows end to end, each [channels, H, W] uint8."""
    channels: int
    shapes: np.ndarray
    """[N, 2] int32: H and W of each row."""
    facts: DatasetRecord
    labels: np.ndarray | None
    """[N] int32: the label of each row, len(class_names) for a row without one."""
    class_names: list[str] | None


def decode_once(
    source: Source, config: DecodeConfig, cache_dir: Path, show_progress: bool
) -> CachedPixels:
    """Return the decoded rows of a source; the first process that calls this decodes them.

    Other processes, of this run or another, wait and read its file. What an interrupted process has
    decoded is kept. UserError if the disk has too little space.
    """
    key = _cache_key(source, config)
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / key
    if cached := _read(folder, source):
        return cached
    with FileLock(cache_dir / f"{key}.lock"):
        if cached := _read(folder, source):  # another process has decoded it in the meantime
            return cached
        if folder.exists():
            print(f"The decoded images in {folder} are damaged: decoding again.", file=sys.stderr)
        _require_disk_space(folder, source, config)
        _decode_all(source, config, folder, show_progress)
        if cached := _read(folder, source):
            return cached
    raise UserError(
        f"The disk does not keep what is written to {folder}. Give another --cache_dir."
    )


def _cache_key(source: Source, config: DecodeConfig) -> str:
    settings = {
        "layout": LAYOUT,
        "fingerprint": source.dataset._fingerprint,
        "column": source.column,
        "hub_id": source.hub_id,
        **asdict(config),
    }
    if source.labels is not None:
        ids = sorted(map(repr, source.labels.ids.items()))
        settings["labels"] = [source.labels.column, source.labels.names, ids]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _read(folder: Path, source: Source) -> CachedPixels | None:
    """Return what a cache folder holds; None if it is absent or damaged."""
    try:
        index = json.loads((folder / INDEX).read_text())
        checksum = index.pop("checksum")
        if checksum != xxhash.xxh3_128_hexdigest(json.dumps(index).encode()):
            return None
        for name in (PIXELS, ROWS):
            if index[name] != file_hash(folder / name, xxhash.xxh3_128()):
                return None
        rows = np.load(folder / ROWS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    facts = replace(source.facts, **index["report"])
    labels = None if source.labels is None else rows[:, 2]
    class_names = source.labels and source.labels.names
    return CachedPixels(folder / PIXELS, index["channels"], rows[:, :2], facts, labels, class_names)


def _decode_all(source: Source, config: DecodeConfig, folder: Path, show_progress: bool) -> None:
    """Write a cache folder under a temporary name and rename it; a killed process leaves that."""
    partial = _partial(folder)
    partial.mkdir(exist_ok=True)
    decoded = _DecodedRows(config, source.facts.rows)
    decoded.read(partial)
    start = decoded.count
    if start and show_progress:
        print(f"{start:,} images are decoded already: going on from there.", file=sys.stderr)
    with open(partial / PIXELS, "ab") as pixels, open(partial / JOURNAL, "ab") as journal:
        results = _decoded_rows(source, config, decoded.report, start, show_progress)
        for entry, content in results:
            pixels.write(content)
            journal.write(json.dumps(entry).encode() + b"\n")
            decoded.add(entry, content)
    sha256, report = decoded.sha256, decoded.report
    shapes = np.array(decoded.shapes, dtype=np.int32).reshape(-1, 3)
    channels = config.channels or int(shapes[:, 0].max(initial=0)) or 1
    if (shapes[:, 0] != channels).any():
        sha256 = _repeat_gray(partial / PIXELS, shapes)
    facts = {"pixels_sha256": sha256.hexdigest(), **report.facts(channels)}
    rows = shapes[:, 1:]
    if source.labels is not None:
        labels = np.array(source.label_ids(), dtype=np.int32)[np.array(report.rows)]
        facts |= source.labels.facts(facts["pixels_sha256"], labels.tolist())
        rows = np.column_stack([rows, labels])
    np.save(partial / ROWS, rows)
    index = {"channels": channels, "report": facts}
    index |= {name: file_hash(partial / name, xxhash.xxh3_128()) for name in (PIXELS, ROWS)}
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(index).encode())
    (partial / INDEX).write_text(json.dumps({"checksum": checksum, **index}))
    for name in (PIXELS, ROWS, INDEX):
        fsync_file(partial / name)
    (partial / JOURNAL).unlink()
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _partial(folder: Path) -> Path:
    """Return the folder in which a cache folder is made."""
    return folder.with_name(f"{folder.name}.partial")


class _DecodedRows:
    """The first `count` rows of a dataset, as far as they are decoded."""

    def __init__(self, config: DecodeConfig, num_rows: int):
        self.report, self.count = DataReport(config, num_rows), 0
        self.shapes = array("i")  # C, H and W of each readable row
        self.sha256 = hashlib.sha256()

    def add(self, entry: Entry, content: bytes) -> None:
        """Count the next row."""
        if isinstance(entry, str):
            self.report.add_unreadable(self.count, entry)
        else:
            shape, info, digest, difference_hash, thumbnail = entry
            if thumbnail is not None:
                thumbnail = np.array(thumbnail, np.uint8)
            hashes = ImageHashes(digest, difference_hash, thumbnail)
            self.report.add(self.count, ImageInfo(*info), hashes)
            self.shapes.extend(shape)
            self.sha256.update(content)
        self.count += 1

    def read(self, partial: Path) -> None:
        """Count the rows that an interrupted process wrote, and cut off what is not complete.

        A row is complete if its pixels have the digest of its entry.
        """
        sizes = {PIXELS: 0, JOURNAL: 0}
        with open(partial / PIXELS, "a+b") as pixels, open(partial / JOURNAL, "a+b") as journal:
            pixels.seek(0)
            journal.seek(0)
            with suppress(ValueError, TypeError, LookupError, RecursionError):
                for line in journal:
                    entry, content = json.loads(line), b""
                    if not isinstance(entry, str):
                        content = pixels.read(math.prod(entry[0]))
                        if pixel_digest(tuple(entry[0]), content) != entry[2]:
                            break
                    if not line.endswith(b"\n"):
                        break
                    self.add(entry, content)
                    sizes = {PIXELS: pixels.tell(), JOURNAL: sizes[JOURNAL] + len(line)}
            for file, name in ((pixels, PIXELS), (journal, JOURNAL)):
                file.truncate(sizes[name])


def _decoded_rows(
    source: Source, config: DecodeConfig, report: DataReport, start: int, show_progress: bool
) -> Iterator[tuple[Entry, bytes]]:
    """Yield the entry and the pixels of every row from `start`, decoded in threads, in order."""

    def decode(task: tuple[int, Sequence[Any]]) -> list[tuple[Entry, bytes]]:
        return [
            _decode_and_hash(value, config, source.hub_id, report.is_compared(row))
            for row, value in enumerate(task[1], task[0])
        ]

    def values() -> Iterator[Sequence[Any]]:
        with data_errors(f"The dataset {source.facts.name}"):
            for batch in source.dataset.skip(start).iter(batch_size=ROWS_PER_TASK):
                yield batch[source.column]

    count, total = start, source.facts.rows
    tasks = zip(range(start, total, ROWS_PER_TASK), values(), strict=True)
    began = printed = time.monotonic()
    with tqdm(
        initial=start,
        total=total,
        desc="Decoding images once",
        unit=" images",
        disable=None if show_progress else True,
        leave=False,
    ) as bar:
        for rows in _map_in_threads(decode, tasks):
            yield from rows
            count += len(rows)
            bar.update(len(rows))
            now = time.monotonic()
            if show_progress and bar.disable and now - printed >= SECONDS_OF_A_LINE:
                print(_progress_line(start, count, total, now - began), file=sys.stderr, flush=True)
                printed = now


def _progress_line(start: int, count: int, total: int, seconds: float) -> str:
    """Return how far decoding is, for where no terminal shows a bar."""
    rate = (count - start) / seconds
    left = tqdm.format_interval((total - count) / rate)
    return f"Decoded {count:,} of {total:,} images: {rate:,.0f} images/s, {left} left."


def _decode_and_hash(
    value: Any, config: DecodeConfig, hub_id: str | None, is_compared: bool
) -> tuple[Entry, bytes]:
    try:
        pixels, info = decode_row(value, config, hub_id)
    except DecodeError as error:
        return str(error), b""
    hashes = hash_image(pixels, is_compared)
    thumbnail = None if hashes.thumbnail is None else hashes.thumbnail.tolist()
    facts = list(vars(info).values())
    return [pixels.shape, facts, hashes.digest, hashes.difference_hash, thumbnail], pixels.tobytes()


def _map_in_threads(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """Yield the results in order, with bounded memory. Pillow releases the GIL while it decodes."""
    workers = usable_cores()
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _repeat_gray(path: Path, shapes: np.ndarray) -> Any:
    """Rewrite a file of gray and RGB rows with three channels in each; return its new sha256."""
    sha256, rewritten = hashlib.sha256(), path.with_suffix(".rgb")
    with open(path, "rb") as source, open(rewritten, "wb") as target:
        for channels, height, width in shapes:
            content = source.read(channels * height * width) * (1 if channels == 3 else 3)
            target.write(content)
            sha256.update(content)
    os.replace(rewritten, path)
    return sha256


def _require_disk_space(folder: Path, source: Source, config: DecodeConfig) -> None:
    height, width = config.size
    required, free = source.facts.rows * height * width, shutil.disk_usage(folder.parent).free
    with suppress(OSError):
        free += (_partial(folder) / PIXELS).stat().st_size
    if required > free:
        raise UserError(
            f"{source.facts.rows:,} images of {width}x{height} need at least "
            f"{required / 2**30:,.1f} GiB in {folder.parent}, where {free / 2**30:,.1f} GiB are "
            "free. Give another --cache_dir, a smaller --resolution, or --streaming."
        )
