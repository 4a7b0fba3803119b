"""Preview grids: what a model generates from the same seeds at each step of its training.

With classes, the grid has a row for each of the first ones, of images without guidance and, at
their right, of the same seeds with it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from PIL import Image

from ddpm.diffusion import schedulers
from ddpm.sampling import generate, image_io
from ddpm.sampling.guidance import DEFAULT_GUIDANCE_SCALE, ClassGuidance, ImageKey, LabeledSeed

MAX_ROWS = 10
"""Most classes in a grid."""
GUIDANCE_SCALES = (1.0, DEFAULT_GUIDANCE_SCALE)


def generate_preview(
    unet: UNet2DModel,
    scheduler_config: dict[str, Any],
    num_images: int,
    num_inference_steps: int,
    class_names: Sequence[str] | None = None,
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.cpu,
) -> Image.Image:
    """Return the grid of about `num_images` images, at each guidance scale of a UNet with classes.

    Call on each of `world_size` processes; each generates its part, of which `gather` makes the
    whole [N, C, H, W] uint8.
    """
    scheduler = schedulers.build_sampling_scheduler(
        schedulers.DEFAULT_SCHEDULER, scheduler_config, num_inference_steps
    )

    def images_of(keys: list[ImageKey], guidance: ClassGuidance | None) -> list[torch.Tensor]:
        count = math.ceil(len(keys) / world_size)  # as many on each process: FSDP needs them all
        local = [keys[k % len(keys)] for k in range(rank * count, (rank + 1) * count)]
        # No larger than a batch without classes; guidance doubles it
        batch_size = math.ceil(num_images / world_size / (1 if guidance is None else 2))
        drawn = generate.generate_images(unet, scheduler, local, batch_size, guidance=guidance)
        return list(gather(torch.stack([image for _, image in drawn]))[: len(keys)])

    if class_names is None:
        return image_io.make_grid(images_of(list(range(num_images)), None))
    names = image_io.names_in_ascii(class_names[:MAX_ROWS])
    columns = max(1, num_images // len(names))
    keys = [LabeledSeed(label, seed) for label in range(len(names)) for seed in range(columns)]
    parts = [
        images_of(keys, ClassGuidance(lambda key: key.label, scale)) for scale in GUIDANCE_SCALES
    ]
    cells = [
        image
        for row in range(0, len(keys), columns)
        for part in parts
        for image in part[row : row + columns]
    ]
    return image_io.make_grid(cells, len(parts) * columns, names)
