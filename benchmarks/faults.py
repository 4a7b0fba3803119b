"""What keeping freed memory saves on a CPU: page faults, and the kernel's share of a step.

    python benchmarks/faults.py [--sizes 8 32 64] [--steps 15]

A bare loop on one of benchmarks/training.py's sizes, with and without what train.py asks of the C
library (`ddpm.device.keep_freed_memory`), each in a process of its own and on one thread. Told are
counters of the kernel, not the clock's time: other work on the machine hardly touches them.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
import tyro
from diffusers import UNet2DModel

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from bare import bare_step  # noqa: E402
from training import SIZES  # noqa: E402

from ddpm import device  # noqa: E402


def main(sizes: tuple[str, ...] = ("8", "32", "64"), steps: int = 15) -> None:
    """Print a table."""
    print("| pixels, batch | freed memory | page faults a step | kernel's part of processor time |")
    print("|---|---|---|---|")
    for name in sizes:
        for word in ("returned", "kept"):
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, word, str(steps)],
                check=True,
                text=True,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            faults, part = json.loads(done.stdout)
            size = SIZES[name]
            print(
                f"| {size.resolution}, {size.batch_size} | {word} | {faults:,.0f} | {part:.1%} |",
                flush=True,
            )


def one(name: str, word: str, steps: str) -> None:
    """Train in this process, and print faults a step and the kernel's part."""
    if word == "kept" and not device.keep_freed_memory():
        sys.exit("This C library cannot be asked to keep what is freed.")
    size = SIZES[name]
    torch.manual_seed(0)
    step = bare_step(UNet2DModel.from_config(size.settings()), size.batch_size)
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(int(steps)):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    kernel = after.ru_stime - before.ru_stime
    part = kernel / (kernel + after.ru_utime - before.ru_utime)
    print(json.dumps([(after.ru_minflt - before.ru_minflt) / int(steps), part]))


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1:2] == ["--one"] else tyro.cli(main)
