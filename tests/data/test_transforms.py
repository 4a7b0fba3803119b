"""Crops and augmentations, and the scale between pixels and model values."""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from torchvision.transforms.v2 import functional

from ddpm.config.data import DataConfig
from ddpm.data import transforms


def images(*shapes: tuple[int, int], channels: int = 1) -> list[torch.Tensor]:
    """The value of a pixel is its column, plus 20 x its row, plus 100 for each further channel."""
    return [
        (
            torch.arange(width)
            + 20 * torch.arange(height)[:, None]
            + 100 * torch.arange(channels)[:, None, None]
        ).to(torch.uint8)
        for height, width in shapes
    ]


def draws(count: int, seed: int = 0) -> torch.Tensor:
    return transforms.draw_transforms(count, torch.Generator().manual_seed(seed))


def test_crops_cover_all_offsets():
    wide, tall = images((4, 12), (12, 4))
    crops = transforms.random_crop([wide.numpy(), tall.numpy()] * 200, (4, 4), draws(400))
    assert crops.shape == (400, 1, 4, 4)
    lefts = crops[::2, 0, 0, 0]
    assert set(lefts.tolist()) == set(range(9))
    assert (crops[::2, 0, 0] == lefts[:, None] + torch.arange(4)).all()
    assert set((crops[1::2, 0, 0, 0] // 20).tolist()) == set(range(9))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (5, 2)])
def test_gather_crops_equals_random_crop(size, channels):
    stored = images((5, 9), (7, 5), (5, 5), (6, 7), channels=channels)
    flat = torch.cat([image.flatten() for image in stored])
    sizes = torch.tensor([image.numel() for image in stored])
    offsets = sizes.cumsum(0) - sizes
    shapes = torch.tensor([image.shape[1:] for image in stored])
    rows = torch.tensor([2, 0, 3, 1, 0])
    crops = transforms.gather_crops(flat, offsets[rows], shapes[rows], channels, size, draws(5))
    assert crops.shape == (5, channels, *size)
    assert torch.equal(
        crops, transforms.random_crop([stored[row].numpy() for row in rows], size, draws(5))
    )


def test_flip_mirrors_images_whose_draw_is_below_one_half():
    batch = torch.stack(images((4, 4), (4, 4), (4, 4)))
    flipped = transforms.random_flip(batch, torch.tensor([[0, 0, 0.49], [0, 0, 0.5], [0, 0, 0.99]]))
    assert torch.equal(flipped[0], batch[0].flip(-1))
    assert torch.equal(flipped[1:], batch[1:])


def augmented(batch: torch.Tensor, **settings) -> torch.Tensor:
    config = DataConfig(resolution=tuple(batch.shape[2:]), **settings)
    return transforms.augment(batch, draws(len(batch)), config)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_vertical_flip_turns_half_of_the_images_upside_down(size):
    batch = torch.stack(images(size, channels=4) * 200)
    flipped = augmented(batch, random_vertical_flip=True)
    is_flipped = (flipped == batch.flip(-2)).flatten(1).all(1)
    assert (is_flipped | (flipped == batch).flatten(1).all(1)).all()
    assert 70 < is_flipped.sum() < 130


def test_rotation_turns_a_quarter_of_the_images_each_way():
    batch = torch.stack(images((4, 4), channels=4) * 400)
    rotated = augmented(batch, random_rotate90=True)
    ways = torch.stack([(rotated == batch.rot90(k, (2, 3))).flatten(1).all(1) for k in range(4)])
    assert (ways.sum(0) == 1).all()
    assert ((ways.sum(1) > 70) & (ways.sum(1) < 130)).all()


def test_flips_and_rotations_give_each_of_the_eight_ways():
    batch = torch.stack(images((4, 4)) * 800)
    changed = augmented(batch, random_flip=True, random_vertical_flip=True, random_rotate90=True)
    _, counts = changed.flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == 8 and counts.min() > 60


@pytest.mark.parametrize("size", [(4, 4), (3, 6)])
def test_shifted_images_are_crops_of_images_with_repeated_edges(size):
    """All 25 crops of torchvision's padding occur, about equally often, in all channels."""
    (image,) = images(size, channels=4)
    shifted = augmented(torch.stack([image] * 1000), random_shift=2)
    padded = functional.pad(image, [2], padding_mode="edge")
    height, width = size
    crops = torch.stack(
        [padded[:, y : y + height, x : x + width] for y in range(5) for x in range(5)]
    )
    is_crop = (shifted[:, None] == crops).flatten(2).all(2)
    assert (is_crop.sum(1) == 1).all()
    assert is_crop.sum(0).min() > 15 and is_crop.sum(0).max() < 70


def test_a_setting_does_not_change_the_draws_of_another():
    """So a seed gives the same crops and flips as before vertical flips, rotations and shifts."""
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(draws(20)[:, :3], torch.rand(20, 3, generator=generator))
    batch = torch.stack(images((4, 4)) * 20)
    assert torch.equal(augmented(batch), batch)
    both = augmented(batch, random_flip=True, random_vertical_flip=True)
    flipped = transforms.random_flip(batch, draws(20))
    assert torch.equal(both, transforms.random_vertical_flip(flipped, draws(20)))


def test_draws_depend_only_on_the_generator():
    torch.rand(3)
    assert torch.equal(draws(5), draws(5))
    assert not torch.equal(draws(5), draws(5, seed=1))
    assert 0.4 < (draws(2000)[:, 2] < 0.5).float().mean() < 0.6


def test_model_values_are_in_minus_one_to_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    values = transforms.to_model(pixels)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([-1.0, -0.6, 1.0]))
    assert pixels.tolist() == [0, 51, 255]


def test_pixels_are_rounded_as_diffusers_does():
    images = torch.linspace(-1.2, 1.2, 5000).view(1, 1, 50, 100)
    array = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    (expected,) = DDPMPipeline.numpy_to_pil(array)
    assert np.array_equal(transforms.to_pixels(images)[0, 0].numpy(), np.array(expected))


def test_pixels_by_hand():
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])
    assert transforms.to_pixels(values).tolist() == [0, 0, 128, 255, 255]


def test_pixels_and_model_values_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(transforms.to_pixels(transforms.to_model(pixels)), pixels)
