"""The limit of a training loop: a UNet2DModel on one synthetic batch, and nothing else.

    python benchmarks/bare.py CONFIG_FOLDER BATCH_SIZE [--mixed_precision bf16] [--device cuda]

Forward, mean squared error, backward, fused AdamW; no data, no clipping, no average, no logs. On a
CPU it keeps what it frees, as train.py does. It runs until it is stopped; benchmarks/training.py
starts it through benchmarks/probe.py.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from ddpm.device import prepare_device  # noqa: E402


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
    step = bare_step(unet, args.batch_size, args.mixed_precision == "bf16")
    while True:
        step()


def bare_step(unet: UNet2DModel, batch_size: int, bf16: bool = False) -> Callable[[], None]:
    """A training step on one synthetic batch, made here, on the device of the UNet."""
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
