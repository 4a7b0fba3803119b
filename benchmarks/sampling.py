"""Sampling against diffusers' pipelines: seconds an image, overhead, start-up, pixels; batches.

    python benchmarks/sampling.py ddpm-digits [--steps 50] [--batch_size 16] [--rounds 5]
    python benchmarks/sampling.py ddpm-digits --processes 256 4096

MODEL is a folder with an unconditional pipeline. Ours and theirs are timed in turn; the ratio is
that of the medians. Equality compares the pixels of PNGs. With --processes NUM_IMAGES..., only
sample.py as a whole is timed, in turn: one process on all cores against a process for each core.
"""

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
from program import LAUNCH, spread
from workloads import ROOT

from ddpm.cpu_threads import usable_cores
from ddpm.diffusion import schedulers
from ddpm.sampling import generate, pipeline

STOCK = {"ddpm": DDPMPipeline, "ddim": DDIMPipeline}
BATCHES = (1, 4, 16, 32, 64)
START = """
import sys, torch
from diffusers import DDPMPipeline
pipe = DDPMPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
pipe(num_inference_steps=1).images[0].save(sys.argv[2])
"""


def main(
    model: tyro.conf.Positional[str],
    steps: int = 50,
    batch_size: int = 16,
    rounds: int = 5,
    processes: tuple[int, ...] = (),
) -> None:
    """Print speed, start-up and differences, or the speed of processes."""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {steps} steps, batch "
        f"{batch_size}, {rounds} rounds in turn: {model}"
    )
    if processes:
        for num_images in processes:
            compare_processes(model, num_images, steps, rounds)
        return
    compare_batches(model, rounds)
    for name in STOCK:
        compare_speed(model, name, steps, batch_size, rounds)
    with tempfile.TemporaryDirectory() as scratch:
        compare_start(model, Path(scratch), rounds)
        compare_images(model, Path(scratch))


@torch.no_grad()
def compare_batches(model: str, rounds: int) -> None:
    """Print the speed of the UNet by the batch, and whether the batch changes a bit of an image."""
    unet = pipeline.load_model(model).unet
    noise = generate.initial_noise(unet, generate.make_generators(range(BATCHES[-1])))
    speed: dict[int, list[float]] = {size: [] for size in BATCHES}
    for _ in range(rounds):
        for size in BATCHES:
            started = time.perf_counter()
            for part in noise.split(size):
                unet(part, 500)
            speed[size].append(len(noise) / (time.perf_counter() - started))
    expected = unet(noise[:16], 500).sample
    for size in BATCHES:
        ratios = [a / b for a, b in zip(speed[size], speed[16], strict=True)]
        same = torch.equal(unet(noise[:size], 500).sample[:16], expected[:size])
        print(
            f"batch {size}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) of the speed of 16, {'the same' if same else 'other'} bits"
        )


def compare_processes(model: str, num_images: int, steps: int, rounds: int) -> None:
    """Print the seconds of sample.py with one process, and with a process for each core."""
    flags = [f"--num_images={num_images}", f"--num_inference_steps={steps}", "--scheduler=ddim"]
    times: dict[int, list[float]] = {1: [], usable_cores(): []}
    for _ in range(rounds):
        for count, seconds in times.items():
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                run_sample(model, Path(folder), flags, count)
                seconds.append(time.perf_counter() - started)
    one, many = times.values()
    ratio, low, high = spread([a / b for a, b in zip(one, many, strict=True)])
    print(
        f"{num_images} images: {statistics.median(one):.1f} s with one process, "
        f"{statistics.median(many):.1f} with {usable_cores()}, {ratio:.2f} times the speed "
        f"({low:.2f} to {high:.2f})",
        flush=True,
    )


def compare_speed(model: str, name: str, steps: int, batch_size: int, rounds: int) -> None:
    """Print the seconds an image, and the fraction of ours outside the UNet."""
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
        images = stock(
            batch_size=batch_size,
            generator=generators,
            num_inference_steps=scheduler.num_inference_steps,
            output_type="np",
        ).images
        return torch.from_numpy((images * 255).round().astype("uint8")).permute(0, 3, 1, 2)

    def ours() -> torch.Tensor:
        images = generate.generate_images(artifact.unet, scheduler, seeds, batch_size)
        return torch.stack([image for _, image in images])

    assert torch.equal(ours(), theirs()), "different pixels from diffusers"
    unet = Stopwatch(artifact.unet)
    times: dict[Callable, list[float]] = {ours: [], theirs: []}
    overheads = []
    for _ in range(rounds):
        for sample, seconds in times.items():
            unet.seconds = 0.0
            started = time.perf_counter()
            sample()
            seconds.append(time.perf_counter() - started)
            if sample is ours:
                overheads.append(1 - unet.seconds / seconds[-1])
    our_median, stock_median = (statistics.median(values) / batch_size for values in times.values())
    print(
        f"{name}: {1000 * our_median:.1f} ms an image, {type(stock).__name__} "
        f"{1000 * stock_median:.1f}: {stock_median / our_median:.3f} times its speed, the same "
        f"pixels; outside the UNet {statistics.median(overheads):.1%}"
    )


class Stopwatch:
    """Add up the seconds of a module's calls."""

    def __init__(self, module: torch.nn.Module):
        self.seconds = self.started = 0.0
        module.register_forward_pre_hook(self.start)
        module.register_forward_hook(self.stop)

    def start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.started


def compare_start(model: str, scratch: Path, rounds: int) -> None:
    """Print the seconds from the command to the first image, with one sampling step."""
    sample = ["sample.py", model, "--num_images=1", "--num_inference_steps=1"]
    times: dict[str, list[float]] = {"sample.py": [], "DDPMPipeline": []}
    for index in range(rounds):
        for name, arguments in (
            ("sample.py", [*sample, f"--output_dir={scratch / str(index)}"]),
            ("DDPMPipeline", ["-c", START, model, str(scratch / "a.png")]),
        ):
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(
        "start-up to the first image, one step: "
        + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in medians.items())
    )


def compare_images(model: str, scratch: Path) -> None:
    """Print how many bytes differ from those of batch 16 in one process."""
    flags = ["--num_images=16", "--num_inference_steps=20"]
    for name in ("ddim", "ddpm", "dpmsolver-sde"):
        expected = sample(model, scratch / f"{name}-16", [*flags, f"--scheduler={name}"])
        for batch, processes in ((["--batch_size=1"], 1), (["--batch_size=3"], 1), ([], 2)):
            folder = scratch / f"{name}-{'-'.join(batch)}{processes}"
            images = sample(model, folder, [*flags, f"--scheduler={name}", *batch], processes)
            difference = np.abs(images.astype(int) - expected.astype(int))
            label = " ".join(batch) or f"{processes} processes"
            print(
                f"{name}, {label}: {int((difference > 0).sum())} of {difference.size} bytes differ "
                f"from batch 16 in one process, by {int(difference.max())} of 255 at most"
            )


def sample(model: str, folder: Path, flags: list[str], processes: int = 1) -> np.ndarray:
    """Return all images of sample.py, [N, ...] uint8, drawn by that many processes."""
    run_sample(model, folder, flags, processes)
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("seed-*.png"))])


def run_sample(model: str, folder: Path, flags: list[str], processes: int) -> None:
    """Run sample.py, launched as the README does it for more than one process."""
    launch = [*LAUNCH, "--config_file=accelerate_config.yaml", f"--num_processes={processes}"]
    launcher = launch if processes > 1 else [sys.executable]
    command = [*launcher, "sample.py", model, *flags, f"--output_dir={folder}"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)


if __name__ == "__main__":
    tyro.cli(main)
