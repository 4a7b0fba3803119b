"""The loss in bands of timesteps: how well a model denoises at each noise level.

The mean over all timesteps hides what is learned where: at late timesteps (much noise) the layout,
at early ones the detail. Each image has one timestep and one noise in each band, functions of
(image, band), so the noise that two models have in common cancels in their difference.

Notation: B images of a batch, K bands, T timesteps.
"""

from collections.abc import Sequence

import torch
from diffusers import UNet2DModel

from ddpm.data import order
from ddpm.data.dataset import ImageDataset
from ddpm.diffusion import objective
from ddpm.diffusion.class_labels import has_classes, null_label
from ddpm.diffusion.schedulers import SamplingScheduler

NUM_BANDS = 10
SEED = 0


def timestep_bands(num_timesteps: int) -> list[tuple[int, int]]:
    """Return the first and last timestep of each band; fewer bands if there are fewer timesteps."""
    count = min(NUM_BANDS, num_timesteps)
    edges = [round(num_timesteps * band / count) for band in range(count + 1)]
    return [(first, end - 1) for first, end in zip(edges, edges[1:], strict=False)]


def labels_for(unet: UNet2DModel, images: ImageDataset, rows: Sequence[int]) -> torch.Tensor | None:
    """Return the labels [B] of rows, the null class where none is known; None for a UNet without
    classes."""
    if not has_classes(unet):
        return None
    if images.labels is None:
        return torch.full((len(rows),), null_label(unet))
    return images.labels[list(rows)]


@torch.no_grad()
def loss_by_timestep(
    unet: UNet2DModel,
    scheduler: SamplingScheduler,
    images: torch.Tensor,
    rows: Sequence[int],
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean squared error of each image in each band: [B, K] float32 on the CPU.

    images: [B, C, H, W] float32 in [-1, 1]; `rows` [B] are the rows of the dataset that seed their
    noise. `labels` [B] are those of a UNet with classes. The error is unweighted, in units of what
    the model predicts. `unet` is in eval mode.
    """
    alphas_cumprod = scheduler.alphas_cumprod.to(unet.device)
    images = images.to(unet.device)
    options = {} if labels is None else {"class_labels": labels.to(unet.device)}
    losses = []
    for band, (first, last) in enumerate(timestep_bands(len(alphas_cumprod))):
        noise, timesteps = _sample_noise(images.shape, rows, band, first, last)
        noise, timesteps = noise.to(unet.device), timesteps.to(unet.device)
        noisy = objective.add_noise(alphas_cumprod, images, noise, timesteps)
        target = objective.prediction_target(
            scheduler.prediction_type, alphas_cumprod, images, noise, timesteps
        )
        prediction = unet(noisy, timesteps, **options).sample
        errors = (prediction.float() - target).square()
        losses.append(errors.flatten(1).mean(1).cpu())
    return torch.stack(losses, dim=1)


def _sample_noise(
    shape: torch.Size, rows: Sequence[int], band: int, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise [B, C, H, W] and timesteps [B] in [first, last], functions of (row, band)."""
    noise, timesteps = [], []
    for row in rows:
        generator = order.make_generator(SEED, "noise", row, band)
        noise.append(torch.randn(shape[1:], generator=generator))
        timesteps.append(torch.randint(first, last + 1, (), generator=generator))
    return torch.stack(noise), torch.stack(timesteps)
