"""Page faults that keeping freed memory saves on a CPU, and the kernel's fraction of a step.

    python benchmarks/faults.py [--sizes 8 32 64] [--steps 15]

The step of bare.py, with and without `ddpm.device.keep_freed_memory`, each in its own process on
one thread. The results are counters of the kernel, which other work on the machine hardly changes.
"""

import json
import os
import resource
import subprocess
import sys

import torch
import tyro
from bare import make_step
from diffusers import UNet2DModel
from workloads import SIZES

from ddpm import device


def main(sizes: tuple[str, ...] = ("8", "32", "64"), steps: int = 15) -> None:
    """Print a table."""
    print("| pixels, batch | freed memory | page faults a step | kernel's fraction of CPU time |")
    print("|---|---|---|---|")
    for name in sizes:
        for freed in ("returned", "kept"):
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, freed, str(steps)],
                check=True,
                text=True,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            faults, kernel = json.loads(done.stdout)
            size = f"{SIZES[name].resolution}, {SIZES[name].batch_size}"
            print(f"| {size} | {freed} | {faults:,.0f} | {kernel:.1%} |", flush=True)


def measure(name: str, freed: str, steps: str) -> None:
    """Train in this process, and print faults a step and the kernel's fraction of its time."""
    if freed == "kept" and not device.keep_freed_memory():
        sys.exit("This C library cannot be asked to keep what is freed.")
    size = SIZES[name]
    torch.manual_seed(0)
    step = make_step(UNet2DModel.from_config(size.unet_config()), size.batch_size)
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(int(steps)):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    faults = (after.ru_minflt - before.ru_minflt) / int(steps)
    print(json.dumps([faults, system / (system + user)]))


if __name__ == "__main__":
    measure(*sys.argv[2:]) if sys.argv[1:2] == ["--one"] else tyro.cli(main)
