"""Many small images: time and memory to decode them once, to start again, and to find a batch.

    python benchmarks/large_data.py [--rows 100000 1000000] [--side 8] [--indexed_rows 10000000]

Writes PNGs of random colors into parquet files of 10,000 rows and opens them, each time in a new
process: the first is killed with SIGKILL once half of the rows are decoded, the second goes on,
the third finds all of them decoded. Each then takes a batch from two epochs. Memory is the highest
of a process's own (RssAnon; Linux only), without the files that it maps. Times are CPU seconds of
all threads, after the imports: on one core without other work, as they pass.

`--indexed_rows` are not decoded: their pixels, 64x64, are a file with holes, which takes no space.
Everything else is as for so many decoded rows: their shapes, the order of each epoch, batches.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from workloads import ROOT

BATCH = 64
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--indexed_rows", type=int, default=10_000_000)
    parser.add_argument("--folder", help="where the files are written and deleted again")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        work = load_indexed if options.measure == "indexed" else load_decoded
        print(json.dumps(work(options)))
        return
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            home = Path(name)
            written = write_parquet(home / "data", rows, options.side)
            print(f"{rows:,} PNGs of {options.side}x{options.side}, {written / MIB:,.0f} MiB")
            flags = [f"--folder={home}", f"--side={options.side}", "--measure=decoded"]
            cache, half = home / "hf/ddpm-pixels", rows * options.side**2 * 3 // 2
            for label, until in (
                ("killed halfway", lambda c=cache, h=half: bytes_in(c) >= h),
                ("gone on to the end", None),
                ("started again", None),
            ):
                print(f"  {label}: {run(flags, until)}", flush=True)
            sizes = {path.name: path.stat().st_size for path in cache.glob("*/*")}
            print(f"  files: {', '.join(f'{n} {s / MIB:,.1f} MiB' for n, s in sizes.items())}")
    if options.indexed_rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            flags = [f"--folder={name}", f"--indexed_rows={options.indexed_rows}"]
            print(f"{options.indexed_rows:,} indexed rows: {run([*flags, '--measure=indexed'])}")


def write_parquet(folder: Path, rows: int, side: int, rows_per_file: int = 10_000) -> int:
    """Write the images, and return the bytes of all files."""
    import datasets

    folder.mkdir()
    generator = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(decode=False)})
    for first in range(0, rows, rows_per_file):
        count = min(rows_per_file, rows - first)
        images = map(png, generator.integers(0, 256, (count, side, side, 3), np.uint8))
        cells = [{"bytes": content, "path": None} for content in images]
        table = datasets.Dataset.from_dict({"image": cells}, features=features)
        table.to_parquet(folder / f"train-{first // rows_per_file:05d}.parquet")
    return sum(path.stat().st_size for path in folder.iterdir())


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def bytes_in(cache: Path) -> int:
    """Return the bytes of the images that are decoded so far."""
    return sum(path.stat().st_size for path in cache.glob("*.partial/pixels.bin"))


def run(flags: list[str], until: Callable[[], bool] | None = None) -> str:
    """Run a measurement in its own process, to its end or `until`; return its results in words."""
    command = [sys.executable, __file__, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, own_mib(process.pid))
        if until is not None and until():
            process.kill()
            process.wait()
        time.sleep(0.2)
    if until is not None:
        return f"peak {peak:,.0f} MiB"
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    seconds = json.loads(process.stdout.read())
    parts = ", ".join(f"{name} {value:,.3f} s" for name, value in seconds.items())
    return f"{parts}, peak {peak:,.0f} MiB"


def own_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


class Seconds(dict[str, float]):
    """The CPU seconds of each part of a measurement."""

    def __init__(self) -> None:
        super().__init__()
        self.last = time.process_time()

    def end(self, part: str) -> None:
        now = time.process_time()
        self[part], self.last = now - self.last, now


def load_decoded(options: argparse.Namespace) -> Seconds:
    home = Path(options.folder)
    os.environ["HF_HOME"] = str(home / "hub")
    from ddpm.config.train import DataConfig
    from ddpm.data import dataset
    from ddpm.data.decode import DecodeConfig
    from ddpm.data.source import open_source

    config = DataConfig(
        dataset_name=str(home / "data"), resolution=options.side, cache_dir=str(home / "hf")
    )
    seconds = Seconds()
    source = open_source(config)
    seconds.end("open")
    cache_dir = home / "hf/ddpm-pixels"
    cached = dataset.decode_once(source, DecodeConfig.of(config), cache_dir, True)
    seconds.end("decode or compare")
    images = dataset.ImageDataset(cached, options.side)
    seconds.end("index")
    take_batches(images, seconds)
    return seconds


def load_indexed(options: argparse.Namespace) -> Seconds:
    from ddpm.data import dataset
    from ddpm.data.pixel_cache import CachedPixels
    from ddpm.run_record import DatasetRecord

    path, rows = Path(options.folder, "key/pixels.bin"), options.indexed_rows
    path.parent.mkdir()
    with open(path, "wb") as file:
        file.truncate(rows * 3 * 64 * 64)
    shapes = np.full((rows, 2), 64, np.int32)
    seconds = Seconds()
    facts = DatasetRecord(
        name="indexed", on_hub=False, split="train", image_column="image", rows=rows
    )
    images = dataset.ImageDataset(CachedPixels(path, 3, shapes, facts, None, None), 64)
    seconds.end("index")
    take_batches(images, seconds)
    shutil.rmtree(path.parent)
    return seconds


def take_batches(images, seconds: Seconds) -> None:
    """Take a batch at the beginning of two epochs, and one right after it."""
    from ddpm.data import order

    for number, position in enumerate((0, len(images), len(images) + BATCH)):
        generator = order.make_generator(0, "pixels", number, 0)
        images.batch(images.rows(position, BATCH), generator)
        seconds.end(f"batch at {position:,}")


if __name__ == "__main__":
    main()
