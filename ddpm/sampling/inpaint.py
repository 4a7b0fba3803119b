"""A picture that is given: noised by as much as asked for and restored, or painted anew in a hole.

Legend: x0 the picture [C, H, W] float32 in [-1, 1]; level the part of the noising chain that is
gone through, from 0 (untouched) to 1 (nothing left).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from ddpm.data.transforms import to_pixels
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError
from ddpm.sampling import generate

STRIP_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.95)
"""Levels on the strip, beside the one asked for."""
INPAINTING_SCHEDULERS = ("ddpm", "ddim")
"""Samplers without a memory of earlier steps, which going back and forth would spoil."""


@dataclass(frozen=True)
class RestoredImage:
    """What became of a picture at one level; images are [C, H, W] uint8.

    `timestep` is where it began, `prediction` the model's estimate of x0 in one step from there.
    """

    level: float
    timestep: int
    noisy: torch.Tensor
    prediction: torch.Tensor
    restored: torch.Tensor


def restore_image(
    unet: UNet2DModel,
    scheduler: SamplingScheduler,
    original: torch.Tensor,
    level: float,
    seed: int,
) -> RestoredImage:
    """Add noise to `original` up to `level` and denoise it in that part of the steps.

    The level is rounded to the nearest step of the walk, at least one.
    """
    steps = scheduler.num_inference_steps
    going = max(1, round(level * steps))
    begin = steps - going
    timestep = scheduler.set_timesteps(begin)[0]
    generator = torch.Generator().manual_seed(seed)
    noise = generate.initial_noise(unet, [generator])
    noisy = scheduler.add_noise(original[None].to(unet.device), noise, int(timestep))
    seen: list[torch.Tensor] = []
    restored = generate.denoise(
        unet,
        scheduler,
        noisy,
        [generator],
        begin,
        lambda timestep, images, x0: seen.append(x0),
    )
    pixels = to_pixels(torch.cat((noisy, seen[0], restored)))
    return RestoredImage(going / steps, int(timestep), *pixels)


def rms_difference(image: torch.Tensor, original: torch.Tensor) -> float:
    """Root of the mean square difference of two uint8 images, in levels of 255."""
    return float((image.double() - original.double()).square().mean().sqrt())


@torch.no_grad()
def inpaint(
    unet: UNet2DModel,
    scheduler: SamplingScheduler,
    original: torch.Tensor,
    hole: torch.Tensor,
    num_resamples: int,
    seeds: Sequence[int],
) -> torch.Tensor:
    """Paint what `hole` [1, H, W] in {0, 1} covers, keep the rest: [B, C, H, W] uint8, one a seed.

    RePaint (arXiv 2201.09865, algorithm 1, jumps of one step): what is kept is set to the original
    with the noise of the step, and every step is walked `num_resamples` times, going back between,
    so that what is painted can agree with its surroundings. `scheduler` must be one of
    INPAINTING_SCHEDULERS.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = generate.initial_noise(unet, generators)
    original, hole = original.to(images), hole.to(images)
    timesteps = scheduler.set_timesteps()
    fresh = _fresh_noise(images, generators)
    for index, timestep in enumerate(timesteps):
        at_end = index + 1 == len(timesteps)
        for again in range(num_resamples, 0, -1):
            output = generate.predict(unet, images, timestep)
            output = scheduler.convert_model_output(output, images, timestep)
            painted = scheduler.step(output, timestep, images, generators)
            if at_end:
                images = hole * painted + (1 - hole) * original
                break
            below = int(timesteps[index + 1])
            kept = scheduler.add_noise(original[None], fresh(), below)
            images = hole * painted + (1 - hole) * kept
            if again == 1:
                break
            ratio = float(scheduler.alphas_cumprod[int(timestep)] / scheduler.alphas_cumprod[below])
            images = ratio**0.5 * images + (1 - ratio) ** 0.5 * fresh()  # q(x_t | x_below)
    return to_pixels(images)


def require_inpainting_scheduler(name: str) -> None:
    """UsageError for a sampler that cannot go back and forth."""
    if name not in INPAINTING_SCHEDULERS:
        raise UsageError(
            f"--mask with --scheduler {name}: painting goes back and forth between "
            f"steps, which works with {' or '.join(INPAINTING_SCHEDULERS)} only."
        )


def _fresh_noise(
    images: torch.Tensor, generators: list[torch.Generator]
) -> Callable[[], torch.Tensor]:
    return lambda: randn_tensor(images.shape, generator=generators, device=images.device)
