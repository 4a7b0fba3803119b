"""Ways to make a step faster, each timed in turn against plain float32, with its losses.

    python benchmarks/levers.py --device cuda --size preset-32 [--steps 200] [--turns 5]
    python benchmarks/levers.py --size 8 --levers bf16 channels_last compile

A lever joins words by +: tf32, bf16, fused (AdamW), channels_last, compile, blocks (each residual
block is compiled by itself), graphs (compile with CUDA graphs). Each trains the same weights on the
same batches with the same noise. The table has the time of the first step, the speed as a multiple
of the plain one, model FLOPs utilization on a GPU, and the largest relative difference of the
losses, smoothed over ten steps.
"""

import contextlib
import copy
import statistics
import sys
import time
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from flops import peak_tflops, training_flops
from program import machine, spread
from workloads import SIZES

from ddpm.device import prepare_device

LEVERS = (
    "tf32",
    "fused",
    "bf16",
    "bf16+fused",
    "bf16+fused+channels_last",
    "bf16+fused+compile",
    "bf16+fused+channels_last+compile",
    "bf16+fused+channels_last+graphs",
)
WORDS = {"tf32", "bf16", "fused", "channels_last", "compile", "blocks", "graphs"}


class Loop:
    """A training loop with some of the levers."""

    def __init__(self, name: str, unet: UNet2DModel, batch_size: int, device: str):
        self.name, self.device = name, torch.device(device)
        self.words = set(name.split("+")) - {"plain"}
        if self.words - WORDS:
            sys.exit(f"--levers {name}: the words are {', '.join(sorted(WORDS))}.")
        self.unet = copy.deepcopy(unet).to(device).train()
        if "channels_last" in self.words:
            self.unet.to(memory_format=torch.channels_last)
        if self.words & {"compile", "graphs"}:
            mode = "reduce-overhead" if "graphs" in self.words else None
            self.unet.compile(dynamic=False, mode=mode)
        if "blocks" in self.words:
            for module in self.unet.modules():
                if isinstance(module, ResnetBlock2D):
                    module.compile(dynamic=False)
        fused = "fused" in self.words
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, fused=fused)
        side, channels = unet.config.sample_size, unet.config.in_channels
        self.shape = (batch_size, channels, side, side)
        self.losses: list[torch.Tensor] = []

    def step(self) -> None:
        """Take a step, whose batch is a function of its number."""
        generator = torch.Generator(self.device).manual_seed(len(self.losses))
        options = {"generator": generator, "device": self.device}
        noise, images = torch.randn(self.shape, **options), torch.randn(self.shape, **options)
        timesteps = torch.randint(1000, self.shape[:1], **options)
        noisy = 0.5 * (noise + images)
        if "channels_last" in self.words:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        if "graphs" in self.words:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16, "bf16" in self.words):
            prediction = self.unet(noisy, timesteps, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach().clone())

    def run(self, steps: int) -> float:
        """Take some steps, and return the seconds of one."""
        with precision("tf32" in self.words):
            wait(self.device)
            started = time.perf_counter()
            for _ in range(steps):
                self.step()
            wait(self.device)
        return (time.perf_counter() - started) / steps


def main(
    size: str = "8",
    levers: tuple[str, ...] = LEVERS,
    steps: int = 200,
    turns: int = 5,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Print each time as it comes, and then a table."""
    prepare_device(device)  # as train.py does
    workload = SIZES[size]
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(workload.unet_config())
    loops = [Loop(name, unet, workload.batch_size, device) for name in ("plain", *levers)]
    first: dict[str, float] = {}
    for loop in loops:
        first[loop.name] = loop.run(1)
        print(f"{loop.name}: {first[loop.name]:.1f} s for the first step", flush=True)
    times: dict[str, list[float]] = {loop.name: [] for loop in loops}
    for _ in range(turns):
        for loop in loops:
            seconds = loop.run(max(1, (steps - 1) // turns))
            print(f"{loop.name}: {workload.batch_size / seconds:.1f} images/s", flush=True)
            times[loop.name].append(seconds)
    flops = training_flops(workload.unet_config(), workload.batch_size)
    print(f"{machine(device)}\n{size}: {workload.resolution} pixels, batch {workload.batch_size}\n")
    print("| levers | images/s | of plain | first step, s | MFU (bf16) | losses differ by |")
    print("|---|---|---|---|---|---|")
    for loop in loops:
        seconds = statistics.median(times[loop.name])
        median, low, high = spread(
            [a / b for a, b in zip(times["plain"], times[loop.name], strict=True)]
        )
        print(
            f"| {loop.name} | {workload.batch_size / seconds:.1f} | {median:.2f} ({low:.2f} to "
            f"{high:.2f}) | {first[loop.name]:.1f} | {utilization(flops / seconds, device)} | "
            f"{difference(loops[0].losses, loop.losses):.1e} |"
        )


def difference(plain: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the largest relative difference of two loss curves, as means over ten steps."""
    width = min(10, len(plain))
    means = [torch.stack(losses).cpu().unfold(0, width, 1).mean(1) for losses in (plain, other)]
    return ((means[1] - means[0]).abs() / means[0]).max().item()


def utilization(flops_a_second: float, device: str) -> str:
    peak = peak_tflops(device)
    return f"{flops_a_second / 1e12 / peak:.1%}" if peak else "-"


@contextlib.contextmanager
def precision(tf32: bool):
    """Compute float32 matrix products and convolutions in TF32, or not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    tyro.cli(main)
