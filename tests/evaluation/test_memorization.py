"""Copies of training images, found among images that are none."""

import pytest
import torch

from ddpm.evaluation import memorization


def points(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def test_nearest_by_hand():
    trained = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 5.0]])
    found = memorization.nearest_neighbors(
        torch.tensor([[9.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), trained
    )
    assert found.rows.tolist() == [1, 2, 0]
    assert found.distances.tolist() == pytest.approx([1, 10**0.5, 0])
    assert found.closest(2) == [2, 0]


def test_nearest_of_training_images_is_another_one(monkeypatch):
    """In chunks too: the image itself is left out by its own row, not by that in the chunk."""
    trained = torch.tensor([[0.0], [1.0], [3.0], [3.5], [9.0]])
    monkeypatch.setattr(memorization, "CHUNK", 2)
    found = memorization.nearest_neighbors(trained, trained, themselves=True)
    assert found.rows.tolist() == [1, 0, 3, 2, 3]
    assert found.distances.tolist() == pytest.approx([1, 1, 0.5, 0.5, 5.5])


def test_share_of_copies_is_found():
    """Three of ten drawn points are training points moved a hair."""
    trained, unseen = points(500, 0), points(300, 1)
    fresh, copies = points(350, 2), trained[:150] + 1e-3
    verdict = memorization.memorization_stats(
        memorization.nearest_neighbors(torch.cat((fresh, copies)), trained),
        memorization.nearest_neighbors(unseen, trained),
    )
    assert 0.3 <= verdict["memorised"] < 0.34
    assert verdict["nearer_than_unseen"] == pytest.approx(0.3 + 0.7 * 0.5, abs=0.04)


def test_nothing_is_copied_by_new_points_of_the_same_kind():
    trained = points(500, 0)
    drawn, unseen = (memorization.nearest_neighbors(points(1000, seed), trained) for seed in (1, 2))
    verdict = memorization.memorization_stats(drawn, unseen)
    assert verdict["memorised"] < 0.03
    assert verdict["nearer_than_unseen"] == pytest.approx(0.5, abs=0.04)
    themselves = memorization.memorization_stats(unseen, unseen)
    assert themselves["memorised"] == 0.01
    assert themselves["nearer_than_unseen"] == pytest.approx(0.5)


def test_nearer_than_unseen_by_hand():
    """Of the 2 x 2 pairs one drawn is nearer in two, and one ties in one."""
    drawn = memorization.Nearest(torch.tensor([1.0, 3.0]), torch.tensor([0, 0]))
    unseen = memorization.Nearest(torch.tensor([3.0, 2.0]), torch.tensor([0, 0]))
    assert memorization.memorization_stats(drawn, unseen)["nearer_than_unseen"] == (2 + 0.5) / 4


def test_sheet_shows_the_closest_pairs():
    """Image k is a plain square of gray k, so the sheet tells which were chosen."""
    drawn = memorization.Nearest(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([7, 8, 9]))
    unseen = memorization.Nearest(torch.tensor([4.0, 2.0]), torch.tensor([5, 6]))

    def plain(base: int):
        return lambda number: torch.full((1, 64, 64), base + number, dtype=torch.uint8)

    sheet = memorization.closest_pairs_grid(drawn, unseen, plain(10), plain(20), plain(30))
    seen = [[sheet.getpixel((x * 66 + 30, y * 66 + 30)) for x in range(2)] for y in range(4)]
    assert seen == [[11, 12], [38, 39], [21, 20], [36, 35]]
