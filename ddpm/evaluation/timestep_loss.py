"""Loss by noise level: how well a model denoises images, band by band of the chain.

The mean loss over all timesteps hides what is learnt where: late bands (much noise) are about the
layout, early ones about detail. Each image gets one timestep and one noise in each band, which are
functions of (image, band): two models see the same, so that their difference is theirs.

Legend: B images of a batch, K bands, T timesteps.
"""

from collections.abc import Sequence

import torch
from diffusers import UNet2DModel

from ddpm.data import order
from ddpm.diffusion import objective
from ddpm.diffusion.schedulers import SamplingScheduler

NUM_BANDS = 10
SEED = 0


def timestep_bands(num_timesteps: int, num_bands: int = NUM_BANDS) -> list[tuple[int, int]]:
    """First and last timestep of each band; fewer bands where there are fewer timesteps."""
    count = min(num_bands, num_timesteps)
    edges = [round(num_timesteps * band / count) for band in range(count + 1)]
    return [(first, after - 1) for first, after in zip(edges, edges[1:], strict=False)]


@torch.no_grad()
def loss_by_timestep(
    unet: UNet2DModel, scheduler: SamplingScheduler, images: torch.Tensor, numbers: Sequence[int]
) -> torch.Tensor:
    """Mean squared error of what the model predicts, for each image and band: [B, K] float32, CPU.

    images: [B, C, H, W] float32 in [-1, 1]; `numbers`: what each is known by, [B]. Unweighted, in
    units of what the model predicts. `unet` is used as it is, in eval mode.
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(unet.device)
    images = images.to(unet.device)
    found = []
    for band, (first, last) in enumerate(timestep_bands(len(alphas_cumprod))):
        noise, timesteps = _draw(images.shape, numbers, band, first, last)
        noise, timesteps = noise.to(unet.device), timesteps.to(unet.device)
        noisy = objective.add_noise(alphas_cumprod, images, noise, timesteps)
        wanted = objective.prediction_target(
            scheduler.prediction_type, alphas_cumprod, images, noise, timesteps
        )
        errors = (unet(noisy, timesteps).sample.float() - wanted).square()
        found.append(errors.flatten(1).mean(1).cpu())
    return torch.stack(found, dim=1)


def _draw(
    shape: torch.Size, numbers: Sequence[int], band: int, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [B, C, H, W] and timesteps [B] in [first, last], by (image, band) alone."""
    noise, timesteps = [], []
    for number in numbers:
        generator = order.make_generator(SEED, "noise", number, band)
        noise.append(torch.randn(shape[1:], generator=generator))
        timesteps.append(torch.randint(first, last + 1, (), generator=generator))
    return torch.stack(noise), torch.stack(timesteps)
