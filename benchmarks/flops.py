"""Floating-point operations of a training step, and what GPUs can do."""

from typing import Any

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}
"""Dense bf16 of NVIDIA's data sheets, by a word in the device's name."""


def peak_tflops(device: str) -> float | None:
    """Return the peak of the GPU in use, or None on a CPU or an unlisted GPU."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((tflops for word, tflops in PEAK_TFLOPS.items() if word in name), None)


def training_flops(config: dict[str, Any], batch_size: int) -> int:
    """Count a forward and a backward pass; a multiply-add counts as two operations."""
    with torch.device("meta"):
        unet = UNet2DModel.from_config(config)
        images = torch.zeros(batch_size, 3, config["sample_size"], config["sample_size"])
        return count_flops(unet, images, torch.zeros(batch_size, dtype=torch.int64))


def count_flops(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Count forward and backward of a module, with tensors on any device, meta included."""
    with FlopCounterMode(display=False) as counter:
        output = module(*inputs)
        (output if isinstance(output, torch.Tensor) else output.sample).sum().backward()
    return counter.get_total_flops()
