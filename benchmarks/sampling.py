"""Sampling against stock diffusers: seconds an image, time outside the UNet, start-up, equality.

    python benchmarks/sampling.py ddpm-digits [--steps 50] [--batch_size 16] [--rounds 5]

MODEL is a folder with an unconditional pipeline. Ours and theirs are timed in turn, so that what
else the machine does meets both; the ratio is of the medians. Equality compares PNG pixels.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import DDIMPipeline, DDPMPipeline
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ddpm.diffusion import schedulers  # noqa: E402
from ddpm.sampling import generate, pipeline  # noqa: E402

STOCK = {"ddpm": DDPMPipeline, "ddim": DDIMPipeline}
START = """
import sys, torch
from diffusers import DDPMPipeline
pipe = DDPMPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe(num_inference_steps=1).images[0].save(sys.argv[2])
"""


def main(
    model: tyro.conf.Positional[str], steps: int = 50, batch_size: int = 16, rounds: int = 5
) -> None:
    """Print what the head of this file names."""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {steps} steps, batch "
        f"{batch_size}, {rounds} rounds in turn: {model}"
    )
    for name in STOCK:
        compare_speed(model, name, steps, batch_size, rounds)
    with tempfile.TemporaryDirectory() as scratch:
        compare_start(model, Path(scratch), rounds)
        compare_images(model, Path(scratch))


def compare_speed(model: str, name: str, steps: int, batch_size: int, rounds: int) -> None:
    """Seconds an image, ours and theirs, and the part of ours that is not the UNet."""
    artifact = pipeline.load_model(model)
    scheduler = schedulers.build_sampling_scheduler(name, artifact.scheduler_config, steps)
    stock = STOCK[name].from_pretrained(model)
    stock.scheduler = type(stock.scheduler).from_config(
        stock.scheduler.config, timestep_spacing="trailing"
    )
    stock.set_progress_bar_config(disable=True)
    seeds = range(batch_size)

    def theirs() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        drawn = stock(
            batch_size=batch_size,
            generator=generators,
            num_inference_steps=scheduler.num_inference_steps,
            output_type="np",
        ).images
        return torch.from_numpy((drawn * 255).round().astype("uint8")).permute(0, 3, 1, 2)

    def ours() -> torch.Tensor:
        drawn = generate.generate_images(artifact.unet, scheduler, seeds, batch_size)
        return torch.stack([image for _, image in drawn])

    assert torch.equal(ours(), theirs()), "other pixels than stock diffusers"
    inside = Stopwatch(artifact.unet)
    taken: dict[Callable, list[float]] = {ours: [], theirs: []}
    shares = []
    for _ in range(rounds):
        for draw, times in taken.items():
            inside.seconds = 0.0
            began = time.perf_counter()
            draw()
            times.append(time.perf_counter() - began)
            if draw is ours:
                shares.append(1 - inside.seconds / times[-1])
    mine, stocks = (statistics.median(times) / batch_size for times in taken.values())
    print(
        f"{name}: {1000 * mine:.1f} ms an image, {type(stock).__name__} {1000 * stocks:.1f}: "
        f"{stocks / mine:.3f} times its speed, the same pixels; outside the UNet "
        f"{statistics.median(shares):.1%}"
    )


class Stopwatch:
    """Seconds spent in a module's calls."""

    def __init__(self, module: torch.nn.Module):
        self.seconds = self.began = 0.0
        module.register_forward_pre_hook(self.start)
        module.register_forward_hook(self.stop)

    def start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.began


def compare_start(model: str, scratch: Path, rounds: int) -> None:
    """Seconds from the command to the first image of one step."""
    sampled = ["sample.py", model, "--num_images=1", "--num_inference_steps=1"]
    taken: dict[str, list[float]] = {"sample.py": [], "DDPMPipeline": []}
    for index in range(rounds):
        for name, words in (
            ("sample.py", [*sampled, f"--output_dir={scratch / str(index)}"]),
            ("DDPMPipeline", ["-c", START, model, str(scratch / "a.png")]),
        ):
            began = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
            taken[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    print(
        "start-up to the first image, one step: "
        + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in medians.items())
    )


def compare_images(model: str, scratch: Path) -> None:
    """Bytes that differ from those of batch 16 in one process."""
    flags = ["--num_images=16", "--num_inference_steps=20"]
    for name in ("ddim", "ddpm", "dpmsolver-sde"):
        base = draw(model, scratch / f"{name}-16", [*flags, f"--scheduler={name}"])
        for words, processes in ((["--batch_size=1"], 1), (["--batch_size=3"], 1), ([], 2)):
            where = scratch / f"{name}-{'-'.join(words)}{processes}"
            found = draw(model, where, [*flags, f"--scheduler={name}", *words], processes)
            apart = np.abs(found.astype(int) - base.astype(int))
            said = " ".join(words) or f"{processes} processes"
            print(
                f"{name}, {said}: {int((apart > 0).sum())} of {apart.size} bytes differ from "
                f"batch 16 in one process, by {int(apart.max())} of 255 at most"
            )


def draw(model: str, folder: Path, flags: list[str], processes: int = 1) -> np.ndarray:
    """All images of sample.py: [N, ...] uint8. The processes are told as a launcher tells them."""
    words = [sys.executable, "sample.py", model, *flags, f"--output_dir={folder}"]
    running = [
        subprocess.Popen(
            words,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes)},
        )
        for rank in range(processes)
    ]
    if any(process.wait() for process in running):
        raise SystemExit(f"{' '.join(words)} failed")
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("seed-*.png"))])


if __name__ == "__main__":
    tyro.cli(main)
