"""Speed of feeding images: the cache of decoded images against a DataLoader that decodes again.

    python benchmarks/data.py [--num_images 4000] [--epochs 3] [--repeats 2] [--streaming]

Writes PNGs of 64x64 and reads them by three loaders in turn, each in its own process with its own
cache: `ddpm.data.dataset`, and the usual torchvision transforms (Resize, CenterCrop,
RandomHorizontalFlip, ToTensor, Normalize) of a dataset in a DataLoader with 0 and with 2 workers.
Each yields shuffled batches of float32 in [-1, 1]. The time is that from opening the folder to the
end of the first epoch, and that of each later epoch, without imports. Memory is the highest sum of
the proportional set sizes (PSS, sampled; Linux only) of a loader's processes.

With --streaming, `ddpm.data.stream` is compared with the same transforms of a streamed and shuffled
dataset in a DataLoader, both from a Hub on this machine that answers each request after 50 ms. It
has the images in 16 parquet files, as `push_to_hub` of `datasets` writes them. The 5 s that
`datasets` sleeps at the end of each epoch are switched off.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

from workloads import write_images

LOADERS = ("ours", "loader, 0 workers", "loader, 2 workers")
SIDE, BATCH = 64, 64
SHARDS, DELAY = 16, 0.05
"""Files of the streamed dataset, and the seconds before each response."""
PUSH = """
import sys, datasets
images = datasets.load_dataset("imagefolder", data_dir=sys.argv[1], split="train")
images.push_to_hub("benchmark/images", num_shards=int(sys.argv[2]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=3, help="later epochs that are timed")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each loader, in turn")
    parser.add_argument("--streaming", action="store_true", help="from a Hub, not from a folder")
    parser.add_argument("--loader", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loader:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        folder, hub = Path(home, "images"), None
        write_images(folder, options.num_images, SIDE)
        if options.streaming:
            hub, folder = stack.enter_context(slow_hub(folder)), "benchmark/images"
        results = {name: [] for name in LOADERS}
        for repeat in range(options.repeats):
            for name in LOADERS:
                cache = Path(home, f"cache-{repeat}-{LOADERS.index(name)}")
                offline = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
                flags = [f"--loader={name}", f"--folder={folder}", *sys.argv[1:]]
                results[name].append(run(flags, hub.env(None, cache) if hub else offline))
    print(table(results, options.num_images))


@contextlib.contextmanager
def slow_hub(folder: Path):
    """Push the images of a folder to a Hub that then answers each request after a delay."""
    from tests.hub import Fault, Hub

    with Hub(folder.parent / "hub") as hub:
        account = hub.env(hub.add_user("benchmark"), folder.parent / "pushing")
        command = [sys.executable, "-c", PUSH, folder, str(SHARDS)]
        subprocess.run(command, env={**os.environ, **account}, check=True, capture_output=True)
        hub.inject(Fault("delay", seconds=DELAY, times=None))
        yield hub


def run(flags: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Time a loader in its own process, and sample the memory of that."""
    command = [sys.executable, __file__, *flags]
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(proportional_bytes(pid) for pid in process_tree(process.pid)))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return {**json.loads(process.stdout.read()), "peak_mib": peak / 2**20}


def process_tree(pid: int) -> list[int]:
    """Return a process and all that it started."""
    try:
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except OSError:
        return []
    return [pid, *(member for child in children for member in process_tree(child))]


def proportional_bytes(pid: int) -> int:
    """Return the memory of a process; a page shared by n processes counts as 1/n."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return images an epoch, seconds to the end of the first, and mean seconds of a later one."""
    prepare = ours if options.loader == "ours" else dataloader
    warm_up()
    started = time.perf_counter()
    epoch = prepare(options, 2 if "2" in options.loader else 0)
    seen = epoch(0)
    first = time.perf_counter() - started
    later = []
    for number in range(1, options.epochs + 1):
        started = time.perf_counter()
        assert epoch(number) == seen
        later.append(time.perf_counter() - started)
    return {"seen": seen, "first": first, "later": mean(later)}


def warm_up() -> None:
    """Import what the loaders need, and start torch."""
    import datasets
    import torch
    from torchvision.transforms import v2  # noqa: F401

    import ddpm.data.dataset  # noqa: F401

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0

    torch.ones(2, 2) @ torch.ones(2, 2)


def ours(options: argparse.Namespace, num_workers: int):
    from ddpm.config.data import DataConfig
    from ddpm.cpu_threads import set_wait_policy
    from ddpm.data import order, transforms
    from ddpm.data.dataset import load_images

    set_wait_policy("auto")  # the default of train.py
    source = {"train_data_dir": options.folder}
    if options.streaming:
        rows = options.num_images // BATCH * BATCH
        source = {"dataset_name": options.folder, "streaming": True, "rows_per_epoch": rows}
    config = DataConfig(**source, resolution=SIDE, center_crop=True, random_flip=True)
    data = load_images(config, show_progress=False)

    def epoch(number: int) -> int:
        seen = 0
        for first in range(0, len(data) - BATCH + 1, BATCH):
            rows = data.rows(number * len(data) + first, BATCH)
            generator = order.make_generator(0, "pixels", number, first)
            seen += len(transforms.to_model(data.batch(rows, generator, config).images))
        return seen

    return epoch


def dataloader(options: argparse.Namespace, num_workers: int):
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

    def transform(rows):
        return {"pixels": [chain(image.convert("RGB")) for image in rows["image"]]}

    settings = {"batch_size": BATCH, "drop_last": True, "num_workers": num_workers}
    if options.streaming:
        dataset = datasets.load_dataset(options.folder, split="train", streaming=True)
        dataset = dataset.shuffle(seed=0, buffer_size=1000)
        columns = list(dataset.features)
        dataset = dataset.map(transform, batched=True, batch_size=BATCH, remove_columns=columns)
        batches = DataLoader(dataset, **settings)
    else:
        dataset = datasets.load_dataset("imagefolder", data_dir=options.folder, split="train")
        dataset.set_transform(transform)
        batches = DataLoader(dataset, shuffle=True, **settings)

    def epoch(number: int) -> int:
        if options.streaming:
            dataset.set_epoch(number)
        return sum(len(batch["pixels"]) for batch in batches)

    return epoch


def table(results: dict[str, list[dict[str, float]]], count: int) -> str:
    """Return medians as Markdown, with the ratios of ours to each DataLoader."""
    medians = {
        name: {key: median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    lines = [
        f"{count:,} PNGs of {SIDE}x{SIDE}, batches of {BATCH}, median of "
        f"{len(results['ours'])} runs.",
        "",
        "| | images/s to the end of the first epoch | images/s in a later epoch | peak MiB |",
        "|---|---|---|---|",
    ]
    for name, run in medians.items():
        lines.append(
            f"| {name} | {run['seen'] / run['first']:,.0f} | {run['seen'] / run['later']:,.0f} | "
            f"{run['peak_mib']:,.0f} |"
        )
    for name in LOADERS[1:]:
        speed = {key: medians[name][key] / medians["ours"][key] for key in ("first", "later")}
        memory = medians["ours"]["peak_mib"] / medians[name]["peak_mib"]
        lines.append(
            f"| ours / {name} | {speed['first']:.2f}x | {speed['later']:.3g}x | {memory:.2f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
