"""Decode every row of a dataset once into a file that later epochs, runs and processes read.

The file is in the cache of `datasets`, under a key of the dataset's fingerprint and all settings
that change a decoded byte:

    ddpm-pixels/<key>/pixels.bin    the rows end to end, each [C, H, W] uint8
    ddpm-pixels/<key>/index.json    channels, [H, W] of each row, the data report, labels if they
                                    are asked for, and checksums of the pixels and of the rest of
                                    this file; written last

The checksums (XXH3) are compared whenever a cache is opened, as the sha256 that a run records must
be that of the pixels it trains on. XXH3 reads 12 GiB/s where sha256 reads 0.3.
"""

import hashlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from filelock import FileLock
from tqdm.auto import tqdm

from ddpm.data.decode import DecodeConfig, DecodeError, ImageInfo, decode_row
from ddpm.data.open_errors import data_errors
from ddpm.data.report import DataReport, ImageHashes, hash_image
from ddpm.data.source import Source
from ddpm.errors import UserError
from ddpm.file_io import file_hash, fsync_file
from ddpm.run_record import DatasetRecord

PIXELS, INDEX = "pixels.bin", "index.json"
LAYOUT = 5
"""Part of the key. Increase it when the meaning of a cache file changes: old files are ignored."""
ROWS_PER_TASK = 16
"""Rows that a thread decodes in one task."""

DecodedRow = tuple[np.ndarray, ImageInfo, ImageHashes]
Task, Result = TypeVar("Task"), TypeVar("Result")


@dataclass(frozen=True)
class CachedPixels:
    """The decoded rows of a dataset: N images of one number of channels."""

    path: Path
    """The rows end to end, each [channels, H, W] uint8."""
    channels: int
    shapes: list[list[int]]
    """[H, W] of each row."""
    facts: DatasetRecord
    labels: list[int] | None
    """The label of each row, len(class_names) for a row without one."""
    class_names: list[str] | None


def decode_once(
    source: Source, config: DecodeConfig, cache_dir: Path, show_progress: bool
) -> CachedPixels:
    """Return the decoded rows of a source; the first process that calls this decodes them.

    Other processes, of this run or another, wait and read its file. UserError if the disk has too
    little space.
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
        _require_disk_space(cache_dir, source, config)
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
        if index["pixels"] != file_hash(folder / PIXELS, xxhash.xxh3_128()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    facts = replace(source.facts, **index["report"])
    labels, class_names = index.get("labels"), source.labels and source.labels.names
    return CachedPixels(
        folder / PIXELS, index["channels"], index["shapes"], facts, labels, class_names
    )


def _decode_all(source: Source, config: DecodeConfig, folder: Path, show_progress: bool) -> None:
    """Write a cache folder under a temporary name and rename it; a killed process leaves that."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    report = DataReport(config, source.facts.rows)
    shapes: list[tuple[int, ...]] = []
    label_ids, labels = source.label_ids(), []
    sha256 = hashlib.sha256()
    with open(partial / PIXELS, "wb") as file:
        for row, result in _decoded_rows(source, config, report, show_progress):
            if isinstance(result, DecodeError):
                report.add_unreadable(row, str(result))
                continue
            pixels, info, hashes = result
            report.add(row, info, hashes)
            content = pixels.tobytes()
            file.write(content)
            sha256.update(content)
            shapes.append(pixels.shape)
            labels.append(label_ids and label_ids[row])
    channels = config.channels or max((shape[0] for shape in shapes), default=1)
    if any(shape[0] != channels for shape in shapes):
        sha256 = _repeat_gray(partial / PIXELS, shapes)
    facts = {"pixels_sha256": sha256.hexdigest(), **report.facts(channels)}
    if source.labels is not None:
        facts |= source.labels.facts(facts["pixels_sha256"], labels)
    index = {
        "channels": channels,
        "shapes": [shape[1:] for shape in shapes],
        "report": facts,
        "pixels": file_hash(partial / PIXELS, xxhash.xxh3_128()),
        "labels": source.labels and labels,
    }
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(index).encode())
    (partial / INDEX).write_text(json.dumps({"checksum": checksum, **index}))
    for name in (PIXELS, INDEX):
        fsync_file(partial / name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _decoded_rows(
    source: Source, config: DecodeConfig, report: DataReport, show_progress: bool
) -> Iterator[tuple[int, DecodedRow | DecodeError]]:
    """Yield the number and the pixels of every row, decoded in threads, in order."""

    def decode(task: tuple[int, Sequence[Any]]) -> list[tuple[int, DecodedRow | DecodeError]]:
        return [
            (row, _decode_and_hash(value, config, source.hub_id, report.is_compared(row)))
            for row, value in enumerate(task[1], task[0])
        ]

    def values() -> Iterator[Sequence[Any]]:
        with data_errors(f"The dataset {source.facts.name}"):
            for batch in source.dataset.iter(batch_size=ROWS_PER_TASK):
                yield batch[source.column]

    tasks = zip(range(0, source.facts.rows, ROWS_PER_TASK), values(), strict=True)
    with tqdm(
        total=source.facts.rows,
        desc="Decoding images once",
        unit=" images",
        disable=None if show_progress else True,
        leave=False,
    ) as progress:
        for rows in _map_in_threads(decode, tasks):
            yield from rows
            progress.update(len(rows))


def _decode_and_hash(
    value: Any, config: DecodeConfig, hub_id: str | None, is_compared: bool
) -> DecodedRow | DecodeError:
    try:
        pixels, info = decode_row(value, config, hub_id)
    except DecodeError as error:
        return error
    return pixels, info, hash_image(pixels, is_compared)


def _map_in_threads(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
    """Yield the results in order, with bounded memory. Pillow releases the GIL while it decodes."""
    workers = os.cpu_count() or 1
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _repeat_gray(path: Path, shapes: list[tuple[int, ...]]) -> Any:
    """Rewrite a file of gray and RGB rows with three channels in each; return its new sha256."""
    sha256, rewritten = hashlib.sha256(), path.with_suffix(".rgb")
    with open(path, "rb") as source, open(rewritten, "wb") as target:
        for channels, height, width in shapes:
            content = source.read(channels * height * width) * (1 if channels == 3 else 3)
            target.write(content)
            sha256.update(content)
    os.replace(rewritten, path)
    return sha256


def _require_disk_space(cache_dir: Path, source: Source, config: DecodeConfig) -> None:
    height, width = config.size
    required, free = source.facts.rows * height * width, shutil.disk_usage(cache_dir).free
    if required > free:
        raise UserError(
            f"{source.facts.rows:,} images of {width}x{height} need at least "
            f"{required / 2**30:,.1f} GiB in {cache_dir}, where {free / 2**30:,.1f} GiB are free. "
            "Give another --cache_dir, a smaller --resolution, or --streaming."
        )
