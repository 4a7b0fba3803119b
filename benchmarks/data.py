"""Feeding images: this project's decode-once cache against decoding in a DataLoader each epoch.

    python benchmarks/data.py [--num_images 4000] [--epochs 3] [--repeats 2]

Writes PNGs of 64x64 into a temporary folder and reads them three ways, each in a process and a
cache of its own, in turn: `ddpm.data.dataset`, and the usual chain of torchvision transforms (Resize,
CenterCrop, RandomHorizontalFlip, ToTensor, Normalize) set on the dataset, behind a DataLoader with
0 and with 2 workers. Each serves shuffled batches of float32 in [-1, 1]. Timed from opening the
folder to the end of the first epoch, and for each later epoch; imports are not timed. Memory is the
highest sum over a way's processes of what each has for itself and its share of what it shares
(PSS, sampled; Linux only).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).parent.parent
WAYS = ("ours", "loader, 0 workers", "loader, 2 workers")
SIDE, BATCH = 64, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3, help="later epochs that are timed")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each way, in turn")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.folder, given.epochs)))
        return
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "images")
        make_images(folder, given.num_images)
        results = {way: [] for way in WAYS}
        for repeat in range(given.repeats):
            for way in WAYS:
                cache = Path(home, f"cache-{repeat}-{WAYS.index(way)}")
                results[way].append(run(way, folder, cache, given.epochs))
    print(table(results, given.num_images))


def make_images(folder: Path, count: int) -> None:
    """Smooth colour pictures with some noise on them, about 10 kB each as PNG."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
        grainy = smooth + noise.integers(-8, 9, smooth.shape)
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.png")


def run(way: str, folder: Path, cache: Path, epochs: int) -> dict[str, float]:
    """One way in a process of its own, its memory watched from outside."""
    command = [
        sys.executable,
        __file__,
        "--way",
        way,
        "--folder",
        str(folder),
        "--epochs",
        str(epochs),
    ]
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(proportional_bytes(pid) for pid in family(process.pid)))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return {**json.loads(process.stdout.read()), "peak_mib": peak / 2**20}


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except OSError:
        return []
    return [pid, *(member for child in children for member in family(child))]


def proportional_bytes(pid: int) -> int:
    """Memory of a process, pages shared by n processes counted as 1/n."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(way: str, folder: str, epochs: int) -> dict[str, float]:
    """Seconds to the end of the first epoch, and of a later one on average, with images seen."""
    sys.path.insert(0, str(ROOT))
    prepare = ours if way == "ours" else loader
    warm_up()
    started = time.perf_counter()
    epoch = prepare(folder, 2 if "2" in way else 0)
    seen = epoch(0)
    first = time.perf_counter() - started
    later = []
    for number in range(1, epochs + 1):
        started = time.perf_counter()
        assert epoch(number) == seen
        later.append(time.perf_counter() - started)
    return {"seen": seen, "first": first, "later": mean(later)}


def warm_up() -> None:
    """Import what either way needs, and start torch."""
    import datasets  # noqa: F401
    import torch
    from torchvision.transforms import v2  # noqa: F401

    # noqa: F401

    torch.ones(2, 2) @ torch.ones(2, 2)


def ours(folder: str, num_workers: int):
    from ddpm.config.train import DataConfig
    from ddpm.data import order, transforms
    from ddpm.data.dataset import load_images

    config = DataConfig(train_data_dir=folder, resolution=SIDE, center_crop=True, random_flip=True)
    data, _ = load_images(config, show_progress=False)

    def epoch(number: int) -> int:
        seen = 0
        for first in range(0, len(data) - BATCH + 1, BATCH):
            rows = data.rows(number * len(data) + first, BATCH)
            cuts = order.make_generator(0, "pixels", number, first)
            seen += len(transforms.to_model(data.batch(rows, cuts, config.random_flip)))
        return seen

    return epoch


def loader(folder: str, num_workers: int):
    import datasets
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2

    chain = v2.Compose(
        [
            v2.Resize(SIDE),
            v2.CenterCrop(SIDE),
            v2.RandomHorizontalFlip(),
            v2.ToTensor(),
            v2.Normalize([0.5], [0.5]),
        ]
    )
    dataset = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
    dataset.set_transform(
        lambda rows: {"pixels": [chain(image.convert("RGB")) for image in rows["image"]]}
    )
    batches = DataLoader(
        dataset, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=num_workers
    )
    return lambda number: sum(len(batch["pixels"]) for batch in batches)


def table(results: dict[str, list[dict[str, float]]], count: int) -> str:
    """Medians as Markdown; ratios are ours to each loader's, in images/s."""
    middle = {
        way: {name: median(one[name] for one in runs) for name in runs[0]}
        for way, runs in results.items()
    }
    lines = [
        f"{count:,} PNGs of {SIDE}x{SIDE}, batches of {BATCH}, median of "
        f"{len(results['ours'])} runs.",
        "",
        "| | images/s to the end of the first epoch | images/s in a later epoch | peak MiB |",
        "|---|---|---|---|",
    ]
    for way, one in middle.items():
        lines.append(
            f"| {way} | {one['seen'] / one['first']:,.0f} | {one['seen'] / one['later']:,.0f} | "
            f"{one['peak_mib']:,.0f} |"
        )
    for way in WAYS[1:]:
        rate = {name: middle[way][name] / middle["ours"][name] for name in ("first", "later")}
        memory = middle["ours"]["peak_mib"] / middle[way]["peak_mib"]
        lines.append(
            f"| ours / {way} | {rate['first']:.2f}x | {rate['later']:,.0f}x | {memory:.2f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
