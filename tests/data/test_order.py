"""Rows and randomness as functions of the step."""

from collections import Counter

import pytest
import torch

from ddpm.data import order


@pytest.mark.parametrize("start", [0, 1, 7, 20, 33])
def test_every_epoch_of_the_stream_covers_each_row_once(start):
    epoch = start // 7 * 7
    assert sorted(order.row_indices(3, num_rows=7, start=epoch, count=7)) == list(range(7))


def test_batches_tile_the_stream_across_epoch_borders():
    whole = order.row_indices(3, num_rows=7, start=0, count=70)
    batches = [order.row_indices(3, num_rows=7, start=start, count=5) for start in range(0, 70, 5)]
    assert sum(batches, []) == whole
    assert set(Counter(whole).values()) == {10}


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
def test_a_late_position_replays_nothing(count, monkeypatch):
    made = []
    shuffle = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: made.append(a) or shuffle(*a, **k))
    order._permutation.cache_clear()
    found = order.row_indices(0, num_rows=100, start=1_000_000 * count + 99, count=count)
    assert len(found) == count
    assert len(made) <= 2


def test_one_pass_over_the_data_makes_one_permutation(monkeypatch):
    made = []
    shuffle = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: made.append(a) or shuffle(*a, **k))
    order._permutation.cache_clear()
    for start in range(0, 100, 10):
        order.row_indices(0, num_rows=100, start=start, count=10)
    assert len(made) == 1


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_micro_batches_are_the_same_on_any_number_of_processes(processes, accumulation):
    shares = [order.micro_batches(p, processes, accumulation) for p in range(processes)]
    assert all(len(share) == accumulation for share in shares)
    assert sorted(m for share in shares for m in share) == list(range(6))


def test_step_sees_the_same_rows_and_draws_on_one_process_or_two():
    """1 process x 2 micro-batches and 2 processes x 1: m decides, not the process."""

    def seen(processes: int, accumulation: int) -> dict[int, tuple[list[int], list[float]]]:
        found = {}
        for process in range(processes):
            for m in order.micro_batches(process, processes, accumulation):
                generator = order.make_generator(0, "noise", step=4, micro_batch=m)
                rows = order.row_indices(0, num_rows=9, start=(4 * 2 + m) * 3, count=3)
                found[m] = rows, torch.randn(5, generator=generator).tolist()
        return found

    assert seen(1, 2) == seen(2, 1)


def test_every_use_of_randomness_has_its_own_seed():
    seeds = [
        order.derive_seed(seed, stream, step, micro_batch)
        for seed in range(3)
        for stream in order.PURPOSES
        for step in range(5)
        for micro_batch in range(3)
    ]
    assert len(set(seeds)) == len(seeds) == 3 * len(order.PURPOSES) * 5 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_have_distinct_numbers():
    assert len(set(order.PURPOSES.values())) == len(order.RANDOM_STREAMS)


def test_generator_draws_the_same_whenever_it_is_made():
    first, again, other = (
        torch.rand(4, generator=order.make_generator(0, "noise", step, 1)) for step in (8, 8, 9)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_seeds_stay_what_they_were():
    """A run resumed with a newer version must go on in the same stream."""
    assert order.derive_seed(0, "noise", 0, 0) == 8597659618385908031
    assert order.row_indices(0, num_rows=8, start=0, count=8) == [3, 2, 5, 1, 7, 4, 6, 0]
