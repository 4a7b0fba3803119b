"""What a run takes on 1, 8 and 64 GPUs, on paper: tables from counts, measurements and assumptions.

    python benchmarks/cluster.py [--measure] [--rows 1000000] [--network_gb_s 40] ...

Counted: parameters of the presets. Measured, by `--measure` on this machine, and
else as `Measured` has them: the speed of a checkpoint, of decoding, and of comparing decoded images
with their checksum; the requests to the Hub. Assumed, as `Assumptions` names them: GPUs, links and
disks that are not here.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from workloads import ROOT, SIZES

GIB = 2**30
CLUSTERS = ((1, 1), (1, 8), (8, 8))
"""Machines, and the GPUs of each."""


@dataclass(frozen=True)
class Measured:
    """What `--measure` found on one core of the machine of docs/performance.md."""

    checkpoint_gb_s: float = 0.633
    """Bytes of a checkpoint that the main process hands to the disk in a CPU second, in 10^9."""
    decoded_images_s: float = 1148.0
    """JPEGs of 256x256 to 64x64 that a core decodes in a second."""
    handed_over_images_s: float = 3300.0
    """Images of a few pixels in a second: what Python does for each, on one core at a time."""
    compared_gb_s: float = 9.0
    """Bytes of decoded images whose checksum a core computes in a second, in 10^9."""
    first_requests: tuple[float, float] = (16.0, 4.0)
    """Requests of a process that opens a dataset of the Hub: in any case, and for each file."""
    later_requests: tuple[float, float] = (15.0, 0.0)
    """The same once all files are in its cache."""


@dataclass(frozen=True)
class Assumptions:
    """Hardware that was not measured here."""

    gpu_link_gb_s: float = 300.0
    """Bytes a GPU sends to others of its machine in a second, in 10^9: NVLink at two thirds."""
    network_gb_s: float = 40.0
    """The same for a machine to others: a link of 400 Gbit/s at 80%."""
    disk_gb_s: float = 1.0
    """Bytes that a disk or a shared file system writes in a second, in 10^9."""
    cores: int = 32
    """Cores of a machine that decode."""


def main(
    measured: tyro.conf.OmitArgPrefixes[Measured] = Measured(),  # noqa: B008
    assumed: tyro.conf.OmitArgPrefixes[Assumptions] = Assumptions(),  # noqa: B008
    rows: int = 1_000_000,
    files: int = 40,
    bytes_per_row: int = 20_000,
    measure: bool = False,
) -> None:
    """Print the tables; the dataset has `rows` images in `files` of the Hub."""
    if measure:
        measured = measure_here()
        print(json.dumps(asdict(measured)))
    print("\n".join([*model_table(measured, assumed), ""]))
    print("\n".join(data_table(measured, assumed, rows, files, bytes_per_row)))


def all_reduce_seconds(size: float, machines: int, gpus: int, assumed: Assumptions) -> float:
    """Return the seconds to add up `size` bytes over all GPUs, first within each machine.

    In a ring of n members each sends and receives 2 (n - 1) / n of the bytes (Patarasuk and Yuan
    2009). Between machines, each GPU sends its part of them, all through the link of the machine.
    """
    inside = 2 * (gpus - 1) / gpus * size / (assumed.gpu_link_gb_s * 1e9)
    between = 2 * (machines - 1) / machines * size / (assumed.network_gb_s * 1e9)
    return inside + between


def model_table(measured: Measured, assumed: Assumptions) -> list[str]:
    """Return what a checkpoint and the all-reduce of a step take for each preset."""
    lines = [
        "| pixels | parameters | checkpoint | written in | all-reduce on 8 GPUs | on 64 GPUs |",
        "|---|---|---|---|---|---|",
    ]
    written = min(measured.checkpoint_gb_s, assumed.disk_gb_s)
    for name, size in SIZES.items():
        if not name.startswith("preset"):
            continue
        from diffusers import UNet2DModel
        from torch import device

        with device("meta"):
            parameters = UNet2DModel.from_config(size.unet_config()).num_parameters()
        checkpoint = 16 * parameters  # weights, two moments and the average, float32
        reduced = [all_reduce_seconds(4 * parameters, m, g, assumed) for m, g in CLUSTERS[1:]]
        cells = [f"{1000 * seconds:.1f} ms" for seconds in reduced]
        lines.append(
            f"| {size.resolution} | {parameters / 1e6:.1f} M | "
            f"{checkpoint / 1e9:.2f} GB | {checkpoint / written / 1e9:.1f} s | "
            f"{' | '.join(cells)} |"
        )
    return lines


def data_table(
    measured: Measured, assumed: Assumptions, rows: int, files: int, bytes_per_row: int
) -> list[str]:
    """Return what a dataset of the Hub takes, decoded to 64x64, without a shared disk."""
    decoded = rows * 3 * 64 * 64
    columns = []
    for machines, gpus in CLUSTERS:
        processes = machines * gpus
        decoded_s = min(measured.decoded_images_s * assumed.cores, measured.handed_over_images_s)
        # The first process of a machine downloads; the others find its files.
        first, later = measured.first_requests, measured.later_requests
        again = later[0] + later[1] * files
        once = first[0] + first[1] * files
        columns.append(
            [
                f"{machines * rows * bytes_per_row / 1e9:,.0f} GB",
                f"{machines * once + (processes - machines) * again:,.0f}",
                f"{processes * again:,.0f}",
                f"{rows / decoded_s / 60:,.0f} min",
                f"{machines * decoded / 1e9:,.0f} GB",
                f"{decoded / measured.compared_gb_s / 1e9:,.0f} s",
                f"{gpus * 40 * rows / 1e9:,.2f} GB",
            ]
        )
    names = (
        "downloaded by all machines",
        "requests to the Hub, first start",
        "each later start",
        f"decoding, {assumed.cores} cores a machine",
        "decoded images on all disks",
        "comparing them at each start",
        "index and order in a machine's memory",
    )
    heads = [f"{m} x {g} GPU{'s' * (m * g > 1)}" for m, g in CLUSTERS]
    cells = [
        [name, *values] for name, values in zip(names, zip(*columns, strict=True), strict=True)
    ]
    table = [[f"{rows:,} images in {files} files", *heads], *cells]
    lines = [f"| {' | '.join(line)} |" for line in table]
    return [lines[0], "|---|---|---|---|", *lines[1:]]


# Measurements


def measure_here() -> Measured:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        checkpoint, decode, compare = checkpoint_rate(folder), decode_rate(), compare_rate(folder)
        first, later = zip(*(hub_requests(folder, files) for files in (2, 6)), strict=True)
    lines = [((6 * a - 2 * b) / 4, (b - a) / 4) for a, b in (first, later)]  # through both counts
    return Measured(
        checkpoint_gb_s=checkpoint,
        decoded_images_s=decode,
        compared_gb_s=compare,
        first_requests=lines[0],
        later_requests=lines[1],
    )


def checkpoint_rate(folder: Path) -> float:
    """Write a checkpoint of the preset for 32 pixels, and return 10^9 bytes a CPU second."""
    import torch
    from accelerate import Accelerator
    from diffusers import UNet2DModel

    from ddpm.config.train import EMAConfig
    from ddpm.diffusion.ema import EMA
    from ddpm.run_record import CheckpointState
    from ddpm.training.checkpoint import save_checkpoint

    accelerator = Accelerator(cpu=True)
    unet = UNet2DModel.from_config(SIZES["preset-32"].unet_config())
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    for weight in unet.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    unet, optimizer = accelerator.prepare(unet, optimizer)
    state = CheckpointState(
        step=1, micro_batches=1, pixels_sha256="0" * 64, seconds=0.0, num_parameters=1
    )
    started = time.process_time()
    path = save_checkpoint(accelerator, EMA(unet, EMAConfig()), state, folder, None)
    seconds = time.process_time() - started
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return round(size / seconds / 1e9, 3)


def decode_rate(count: int = 500) -> float:
    import numpy as np
    from PIL import Image

    from ddpm.config.train import DataConfig
    from ddpm.data.decode import DecodeConfig, decode_row

    small = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG")
    row, config = {"bytes": file.getvalue(), "path": None}, DecodeConfig.of(DataConfig())
    started = time.process_time()
    for _ in range(count):
        decode_row(row, config, None)
    return round(count / (time.process_time() - started))


def compare_rate(folder: Path) -> float:
    import xxhash

    from ddpm.file_io import file_hash

    path = folder / "pixels"
    path.write_bytes(os.urandom(2**20) * 256)
    started = time.process_time()
    file_hash(path, xxhash.xxh3_128())
    return round(path.stat().st_size / (time.process_time() - started) / 1e9, 1)


def hub_requests(folder: Path, files: int) -> tuple[int, int]:
    """Return the requests of a process that opens a dataset of so many files, and of the next."""
    from large_data import write_parquet

    from tests.hub import Hub

    home = folder / f"home-{files}"
    home.mkdir()
    write_parquet(home / "data", rows=files, side=8, rows_per_file=1)
    code = (
        "from ddpm.config.train import DataConfig\n"
        "from ddpm.data.source import open_source\n"
        "open_source(DataConfig(dataset_name='me/data'))"
    )
    counts = []
    with Hub(home / "hub") as hub:
        environment = {**os.environ, **hub.env(hub.add_user("me"), home / "cache")}
        contents = {f"data/{path.name}": path.read_bytes() for path in (home / "data").iterdir()}
        hub.create_repo("dataset", "me/data").write(contents)
        for _ in range(2):
            hub.clear_requests()
            subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
            counts.append(len(hub.requests))
    return counts[0], counts[1]


if __name__ == "__main__":
    tyro.cli(main)
