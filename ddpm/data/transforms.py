"""What a step does to its pixels: random crops and flips, and the scale that the UNet sees.

Every draw comes from the step's own generator, so the same generator gives the same pixels on any
process and device. Legend: B batch, C channels, R resolution, H, W height and width of a row.
"""

from collections.abc import Sequence

import torch


def draw_crops_and_flips(count: int, generator: torch.Generator) -> torch.Tensor:
    """[count, 3] numbers in [0, 1) of a CPU generator: top, left and flip of each image."""
    return torch.rand(count, 3, generator=generator)


def crop_offsets(shapes: torch.Tensor, resolution: int, draws: torch.Tensor) -> torch.Tensor:
    """Top and left of each crop, [B, 2] int64, for images of `shapes` [B, 2] (height, width)."""
    return (draws[:, :2] * (shapes - resolution + 1)).long()


def random_crop(
    images: Sequence[torch.Tensor], resolution: int, draws: torch.Tensor
) -> torch.Tensor:
    """Images [C, H, W], each of its own size and at least R high and wide -> [B, C, R, R]."""
    shapes = torch.tensor([image.shape[1:] for image in images])
    return torch.stack(
        [
            image[:, top : top + resolution, left : left + resolution]
            for image, (top, left) in zip(
                images, crop_offsets(shapes, resolution, draws).tolist(), strict=True
            )
        ]
    )


def gather_crops(
    flat: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    channels: int,
    resolution: int,
    draws: torch.Tensor,
) -> torch.Tensor:
    """`crop` in one indexing of all images' pixels laid end to end, as an accelerator likes it.

    flat: [bytes] uint8; offsets: [B] where each image begins; shapes: [B, 2]; all on one device.
    """
    top_left = crop_offsets(shapes, resolution, draws)
    height, width = shapes[:, 0, None], shapes[:, 1, None]
    side = torch.arange(resolution, device=flat.device)
    rows = (top_left[:, :1] + side) * width  # [B, R], in pixels from the channel's first
    columns = top_left[:, 1:] + side  # [B, R]
    planes = offsets[:, None] + torch.arange(channels, device=flat.device) * (height * width)
    where = planes[:, :, None, None] + rows[:, None, :, None] + columns[:, None, None, :]
    return flat[where]


def random_flip(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Mirror those of [B, C, R, R] whose third draw is below a half, left to right."""
    mirrored = (draws[:, 2] < 0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def to_model(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels -> float32 in [-1, 1]: what the UNet sees."""
    return images.float().div_(127.5).sub_(1.0)
