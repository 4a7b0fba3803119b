"""Copies of training images, found among images that are not copies."""

import pytest
import torch

from ddpm.evaluation import memorization
from ddpm.evaluation.memorization import Nearest, memorization_stats, nearest_neighbors


def points(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def test_nearest_neighbors_by_hand():
    trained = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 5.0]])
    nearest = nearest_neighbors(torch.tensor([[9.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), trained)
    assert nearest.rows.tolist() == [1, 2, 0]
    assert nearest.distances.tolist() == pytest.approx([1, 10**0.5, 0])
    assert nearest.closest(2) == [2, 0]


def test_the_nearest_of_training_images_is_another_one(monkeypatch):
    """In chunks too: an image is excluded by its own row, not by that within the chunk."""
    trained = torch.tensor([[0.0], [1.0], [3.0], [3.5], [9.0]])
    monkeypatch.setattr(memorization, "CHUNK", 2)
    nearest = nearest_neighbors(trained, trained, exclude_self=True)
    assert nearest.rows.tolist() == [1, 0, 3, 2, 3]
    assert nearest.distances.tolist() == pytest.approx([1, 1, 0.5, 0.5, 5.5])


def test_the_fraction_of_copies_is_found():
    """Three of ten generated points are training points, moved a little."""
    trained, unseen = points(500, 0), points(300, 1)
    new, copies = points(350, 2), trained[:150] + 1e-3
    stats = memorization_stats(
        nearest_neighbors(torch.cat((new, copies)), trained), nearest_neighbors(unseen, trained)
    )
    assert 0.3 <= stats.memorised < 0.34
    assert stats.nearer_than_unseen == pytest.approx(0.3 + 0.7 * 0.5, abs=0.04)


def test_new_points_of_the_same_distribution_are_no_copies():
    trained = points(500, 0)
    generated, unseen = (nearest_neighbors(points(1000, seed), trained) for seed in (1, 2))
    stats = memorization_stats(generated, unseen)
    assert stats.memorised < 0.03
    assert stats.nearer_than_unseen == pytest.approx(0.5, abs=0.04)
    same = memorization_stats(unseen, unseen)
    assert same.memorised == 0.01
    assert same.nearer_than_unseen == pytest.approx(0.5)


def test_nearer_than_unseen_by_hand():
    """Of the 2 x 2 pairs, a generated image is nearer in two and as near in one."""
    generated = Nearest(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
    unseen = Nearest(torch.tensor([3.0, 2.0]), torch.tensor([0, 0]))
    assert memorization_stats(generated, unseen).nearer_than_unseen == (2 + 0.5) / 4


def test_the_grid_shows_the_closest_pairs():
    """Image k is a plain square of gray k, so the grid shows which were chosen."""
    generated = Nearest(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([7, 8, 9]))
    unseen = Nearest(torch.tensor([4.0, 2.0]), torch.tensor([5, 6]))

    def plain(base: int):
        return lambda number: torch.full((1, 64, 64), base + number, dtype=torch.uint8)

    grid = memorization.closest_pairs_grid(generated, unseen, plain(10), plain(20), plain(30))
    grays = [[grid.getpixel((x * 66 + 30, y * 66 + 30)) for x in range(2)] for y in range(4)]
    assert grays == [[11, 12], [38, 39], [21, 20], [36, 35]]
