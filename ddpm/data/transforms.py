"""Random crops, flips, rotations and shifts of a batch; pixels as model values; compositing.

All draws come from a generator of the step (order.py), so the same generator gives the same pixels
on any process and device. B: batch, C: channels, H and W: height and width, of a batch `size`.
torchvision is imported when the first batch needs it: that takes 0.2 s, and only flips do.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ddpm.config.data import DataConfig


class Batch(NamedTuple):
    """Images [B, C, H, W] uint8, and their labels [B] int64 on the CPU, in 0..K; K is no class.

    `labels` is None if no labels are trained on.
    """

    images: torch.Tensor
    labels: torch.Tensor | None


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device without waiting for what is queued there."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def draw_transforms(count: int, generator: torch.Generator) -> torch.Tensor:
    """Return [count, 7] numbers in [0, 1) of a CPU generator, for each image: top and left of its
    crop; flips left to right and upside down; quarter turns; shifts down and to the right.

    All are drawn whatever is used, so that no setting changes the draws of another.
    """
    draws = [torch.rand(count, columns, generator=generator) for columns in (3, 4)]
    return torch.cat(draws, dim=1)


def crop_offsets(
    shapes: torch.Tensor, size: tuple[int, int], draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return top and left of each crop, [B] int64 each, for images of `shapes` [B, 2] (H, W)."""
    top, left = ((draws[:, i] * (shapes[:, i] - size[i] + 1)).long() for i in (0, 1))
    return top, left


def random_crop(
    images: Sequence[np.ndarray], size: tuple[int, int], draws: torch.Tensor
) -> torch.Tensor:
    """Crop images [C, ., .] of any sizes that are at least H and W to one batch [B, C, H, W]."""
    shapes = torch.tensor([image.shape[1:] for image in images])
    tops, lefts = crop_offsets(shapes, size, draws)
    crops = [
        image[:, top : top + size[0], left : left + size[1]]
        for image, top, left in zip(images, tops.tolist(), lefts.tolist(), strict=True)
    ]
    return torch.from_numpy(np.stack(crops))


def gather_crops(
    flat: torch.Tensor,
    offsets: torch.Tensor,
    shapes: torch.Tensor,
    channels: int,
    size: tuple[int, int],
    draws: torch.Tensor,
) -> torch.Tensor:
    """Return the same as `random_crop` by one indexing operation, for images on an accelerator.

    flat: [bytes] uint8, the pixels of all images end to end; offsets: [B], where each image of the
    batch begins; shapes: [B, 2]; all on one device.
    """
    top, left = crop_offsets(shapes, size, draws)
    down, right, channel = (torch.arange(n, device=flat.device) for n in (*size, channels))
    height, width = shapes[:, 0, None], shapes[:, 1, None]
    rows = (top[:, None] + down) * width  # [B, H], in pixels from the start of the channel
    columns = left[:, None] + right  # [B, W]
    planes = offsets[:, None] + channel * (height * width)
    index = planes[:, :, None, None] + rows[:, None, :, None] + columns[:, None, None, :]
    return flat[index]


def augment(images: torch.Tensor, draws: torch.Tensor, config: DataConfig) -> torch.Tensor:
    """Flip, rotate and shift images [B, C, H, W] as the settings say, in this order."""
    if config.random_flip:
        images = random_flip(images, draws)
    if config.random_vertical_flip:
        images = random_vertical_flip(images, draws)
    if config.random_rotate90:
        images = random_rotate90(images, draws)
    if config.random_shift:
        images = random_shift(images, draws, config.random_shift)
    return images


def random_flip(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Mirror the images of [B, C, H, W] whose third draw is below 0.5, left to right."""
    from torchvision.transforms.v2 import functional

    is_flipped = upload(draws[:, 2] < 0.5, images.device)
    return torch.where(is_flipped[:, None, None, None], functional.horizontal_flip(images), images)


def random_vertical_flip(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Mirror the images of [B, C, H, W] whose fourth draw is below 0.5, top to bottom."""
    from torchvision.transforms.v2 import functional

    is_flipped = upload(draws[:, 3] < 0.5, images.device)
    return torch.where(is_flipped[:, None, None, None], functional.vertical_flip(images), images)


def random_rotate90(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Turn square images [B, C, N, N] counterclockwise by 0, 1, 2 or 3 quarter turns each."""
    turns = upload((draws[:, 4] * 4).long(), images.device)[:, None, None, None]
    rotated = images
    for count in (1, 2, 3):
        rotated = torch.where(turns == count, torch.rot90(images, count, (2, 3)), rotated)
    return rotated.contiguous()


def random_shift(images: torch.Tensor, draws: torch.Tensor, pixels: int) -> torch.Tensor:
    """Move each image of [B, C, H, W] by a whole number of pixels from -`pixels` to `pixels`, down
    and to the right; the pixels at its border are repeated, as torchvision's padding "edge" does.
    """
    shifts = (draws[:, 5:7] * (2 * pixels + 1)).long() - pixels
    rows, columns = (
        upload((torch.arange(size) - shift[:, None]).clamp(0, size - 1), images.device)
        for size, shift in zip(images.shape[2:], shifts.T, strict=True)
    )
    image, channel = (torch.arange(n, device=images.device) for n in images.shape[:2])
    rows, columns = rows[:, None, :, None], columns[:, None, None, :]
    return images[image[:, None, None, None], channel[:, None, None], rows, columns]


def composite(images: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Show RGBA images [..., 4, H, W] uint8 over a background: [..., 3, H, W] uint8.

    `background` is uint8 of a shape that broadcasts to the result, such as [3, 1, 1] of a color.
    """
    colors, alpha = images[..., :3, :, :].float(), images[..., 3:, :, :].float() / 255
    return (colors * alpha + background.to(colors) * (1 - alpha)).round().to(torch.uint8)


def to_model(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 pixels of any shape to float32 in [-1, 1], the range that the model reads."""
    return images.float().div_(127.5).sub_(1.0)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Convert values in [-1, 1] to uint8 on the CPU, rounded as diffusers' pipelines do."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
