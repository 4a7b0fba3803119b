"""A picture that is given: noised by as much as asked for and restored, or painted anew in a hole.

Legend: x0 the picture [C, H, W] float32 in [-1, 1]; level the part of the noising chain that is
gone through, from 0 (untouched) to 1 (nothing left).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from ddpm.diffusion import schedulers
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError
from ddpm.sampling import generate
from ddpm.sampling.image_io import to_pixels

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
    sampler: SamplingScheduler,
    num_inference_steps: int,
    original: torch.Tensor,
    level: float,
    seed: int,
) -> RestoredImage:
    """Add noise to `original` up to `level` and denoise it in that part of the steps.

    The level is rounded to the nearest step of the walk, at least one.
    """
    going = max(1, round(level * num_inference_steps))
    begin = num_inference_steps - going
    timestep = schedulers.set_timesteps(sampler, num_inference_steps, begin)[0]
    generator = torch.Generator().manual_seed(seed)
    noise = generate.initial_noise(unet, [generator])
    noisy = add_noise(sampler, original[None].to(unet.device), noise, int(timestep))
    seen: list[torch.Tensor] = []
    restored = generate.denoise(
        unet,
        sampler,
        num_inference_steps,
        noisy,
        [generator],
        begin,
        lambda timestep, images, x0: seen.append(x0),
    )
    pixels = to_pixels(torch.cat((noisy, seen[0], restored)))
    return RestoredImage(going / num_inference_steps, int(timestep), *pixels)


def add_noise(
    sampler: SamplingScheduler, images: torch.Tensor, noise: torch.Tensor, timestep: int
) -> torch.Tensor:
    """x_t from x0: arXiv 2006.11239, eq. 4. Timestep -1 is x0 itself."""
    alphas_cumprod = float(sampler.alphas_cumprod[timestep]) if timestep >= 0 else 1.0
    return alphas_cumprod**0.5 * images + (1 - alphas_cumprod) ** 0.5 * noise


def rms_difference(image: torch.Tensor, original: torch.Tensor) -> float:
    """Root of the mean square difference of two uint8 images, in levels of 255."""
    return float((image.double() - original.double()).square().mean().sqrt())


@torch.no_grad()
def inpaint(
    unet: UNet2DModel,
    sampler: SamplingScheduler,
    num_inference_steps: int,
    original: torch.Tensor,
    hole: torch.Tensor,
    num_resamples: int,
    seeds: Sequence[int],
) -> torch.Tensor:
    """Paint what `hole` [1, H, W] in {0, 1} covers, keep the rest: [B, C, H, W] uint8, one a seed.

    RePaint (arXiv 2201.09865, algorithm 1, jumps of one step): what is kept is set to the original
    with the noise of the step, and every step is walked `num_resamples` times, going back between,
    so that what is painted can agree with its surroundings. `sampler` must be one of REPAINTS.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = generate.initial_noise(unet, generators)
    original, hole = original.to(images), hole.to(images)
    timesteps = schedulers.set_timesteps(sampler, num_inference_steps)
    fresh = _fresh_noise(images, generators)
    extra = {"generator": generators} if sampler.takes_generator else {}
    for index, timestep in enumerate(timesteps):
        at_end = index + 1 == len(timesteps)
        below = -1 if at_end else int(timesteps[index + 1])
        for again in range(num_resamples, 0, -1):
            output = generate.predict(unet, images, timestep)
            output = schedulers.convert_model_output(sampler, output, images, timestep)
            painted = sampler.scheduler.step(output, timestep, images, **extra).prev_sample
            kept = add_noise(sampler, original[None], fresh(), below)
            images = hole * painted + (1 - hole) * kept
            if again == 1 or at_end:
                break
            ratio = float(sampler.alphas_cumprod[int(timestep)] / sampler.alphas_cumprod[below])
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
