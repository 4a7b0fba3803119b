"""Rows and seeds as functions of the step."""

from collections import Counter

import pytest
import torch

from ddpm.data import order


@pytest.mark.parametrize("start", [0, 1, 7, 20, 33])
def test_every_epoch_covers_each_row_once(start):
    epoch = start // 7 * 7
    assert sorted(order.row_indices(3, num_rows=7, start=epoch, count=7)) == list(range(7))


def test_batches_tile_the_sequence_across_epochs():
    sequence = order.row_indices(3, num_rows=7, start=0, count=70)
    batches = [order.row_indices(3, num_rows=7, start=start, count=5) for start in range(0, 70, 5)]
    assert sum(batches, []) == sequence
    assert set(Counter(sequence).values()) == {10}


def test_batch_larger_than_the_data_is_full():
    assert Counter(order.row_indices(0, num_rows=3, start=0, count=9)) == {0: 3, 1: 3, 2: 3}


def test_resume_neither_skips_nor_repeats_a_row():
    uninterrupted = order.row_indices(5, num_rows=10, start=0, count=30)
    before = order.row_indices(5, num_rows=10, start=0, count=12)
    order._permutation.cache_clear()  # another process
    after = order.row_indices(5, num_rows=10, start=12, count=18)
    assert before + after == uninterrupted


def test_epochs_and_seeds_are_shuffled_differently():
    first, second = (order.row_indices(0, 50, start, 50) for start in (0, 50))
    assert first != second
    assert first != list(range(50))
    assert order.row_indices(1, 50, 0, 50) != first


@pytest.mark.parametrize("count", [1, 16, 100])
def test_late_position_replays_nothing(count, monkeypatch):
    calls = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: calls.append(a) or randperm(*a, **k))
    order._permutation.cache_clear()
    rows = order.row_indices(0, num_rows=100, start=1_000_000 * count + 99, count=count)
    assert len(rows) == count
    assert len(calls) <= 2


def test_one_epoch_draws_one_permutation(monkeypatch):
    calls = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: calls.append(a) or randperm(*a, **k))
    order._permutation.cache_clear()
    for start in range(0, 100, 10):
        order.row_indices(0, num_rows=100, start=start, count=10)
    assert len(calls) == 1


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_micro_batches_are_the_same_on_any_number_of_processes(processes, accumulation):
    parts = [order.micro_batches(p, processes, accumulation) for p in range(processes)]
    assert all(len(part) == accumulation for part in parts)
    assert sorted(m for part in parts for m in part) == list(range(6))


def test_step_has_the_same_rows_and_draws_on_one_process_or_two():
    """1 process x 2 micro-batches equals 2 processes x 1."""

    def rows_and_draws(
        processes: int, accumulation: int
    ) -> dict[int, tuple[list[int], list[float]]]:
        results = {}
        for process in range(processes):
            for m in order.micro_batches(process, processes, accumulation):
                generator = order.make_generator(0, "noise", step=4, micro_batch=m)
                rows = order.row_indices(0, num_rows=9, start=(4 * 2 + m) * 3, count=3)
                results[m] = rows, torch.randn(5, generator=generator).tolist()
        return results

    assert rows_and_draws(1, 2) == rows_and_draws(2, 1)


def test_every_purpose_has_its_own_seed():
    seeds = [
        order.derive_seed(seed, purpose, step, micro_batch)
        for seed in range(3)
        for purpose in order.PURPOSES
        for step in range(5)
        for micro_batch in range(3)
    ]
    assert len(set(seeds)) == len(seeds) == 3 * len(order.PURPOSES) * 5 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_is_a_function_of_the_step():
    first, again, other = (
        torch.rand(4, generator=order.make_generator(0, "noise", step, 1)) for step in (8, 8, 9)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_seeds_never_change():
    """A run that is resumed with a newer version must continue with the same draws."""
    assert order.derive_seed(0, "noise", 0, 0) == 8597659618385908031
    assert order.row_indices(0, num_rows=8, start=0, count=8) == [3, 2, 5, 1, 7, 4, 6, 0]
