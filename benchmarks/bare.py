"""The limit of a training loop: a UNet2DModel on one synthetic batch, and nothing more.

    python benchmarks/bare.py CONFIG_FOLDER BATCH_SIZE [--mixed_precision bf16] [--device cuda]

Forward, mean squared error, backward, fused AdamW; no data, clipping, EMA or logs. On a CPU it
keeps freed memory, as train.py does. It runs until it is killed; training.py starts it with
probe.py.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from workloads import ROOT  # noqa: F401

from ddpm.device import prepare_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("batch_size", type=int)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    prepare_device(args.device)
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(UNet2DModel.load_config(args.config)).to(args.device)
    step = make_step(unet, args.batch_size, args.mixed_precision == "bf16")
    while True:
        step()


def make_step(unet: UNet2DModel, batch_size: int, bf16: bool = False) -> Callable[[], None]:
    """Return a training step on one synthetic batch, on the device of the UNet."""
    unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    side, device = unet.config.sample_size, unet.device
    noisy = torch.randn(batch_size, unet.config.in_channels, side, side, device=device)
    noise = torch.randn_like(noisy)
    timesteps = torch.randint(1000, noisy.shape[:1], device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, bf16):
            prediction = unet(noisy, timesteps, return_dict=False)[0]
        F.mse_loss(prediction.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
