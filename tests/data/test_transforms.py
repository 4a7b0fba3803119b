"""Crops and flips: inside, reaching every place, the same by slices and by one gather."""

import pytest
import torch

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
    return transforms.draw_crops_and_flips(count, torch.Generator().manual_seed(seed))


def test_crop_stays_inside_and_reaches_both_ends():
    wide, tall = images((4, 12), (12, 4))
    found = transforms.random_crop([wide, tall] * 200, 4, draws(400))
    assert found.shape == (400, 1, 4, 4)
    lefts = found[::2, 0, 0, 0]
    assert set(lefts.tolist()) == set(range(9))
    assert (found[::2, 0, 0] == lefts[:, None] + torch.arange(4)).all()
    assert set((found[1::2, 0, 0, 0] // 20).tolist()) == set(range(9))


@pytest.mark.parametrize("channels", [1, 3])
def test_one_gather_is_the_same_as_slices(channels):
    made = images((4, 9), (7, 4), (4, 4), (5, 6), channels=channels)
    flat = torch.cat([image.flatten() for image in made])
    sizes = torch.tensor([image.numel() for image in made])
    offsets = sizes.cumsum(0) - sizes
    shapes = torch.tensor([image.shape[1:] for image in made])
    order = torch.tensor([2, 0, 3, 1, 0])
    numbers = draws(5)
    found = transforms.gather_crops(flat, offsets[order], shapes[order], channels, 4, numbers)
    assert torch.equal(found, transforms.random_crop([made[i] for i in order], 4, numbers))


def test_flip_mirrors_those_below_a_half_and_nothing_else():
    batch = torch.stack(images((4, 4), (4, 4), (4, 4)))
    numbers = torch.tensor([[0, 0, 0.49], [0, 0, 0.5], [0, 0, 0.99]])
    found = transforms.random_flip(batch, numbers)
    assert torch.equal(found[0], batch[0].flip(-1))
    assert torch.equal(found[1:], batch[1:])


def test_draws_depend_only_on_the_generator():
    torch.rand(3)
    assert torch.equal(draws(5), draws(5))
    assert not torch.equal(draws(5), draws(5, seed=1))
    assert 0.4 < (draws(2000)[:, 2] < 0.5).float().mean() < 0.6


def test_model_sees_minus_one_to_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    found = transforms.to_model(pixels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([-1.0, -0.6, 1.0]))
    assert pixels.tolist() == [0, 51, 255]
