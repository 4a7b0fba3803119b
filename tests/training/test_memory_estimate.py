"""What a step holds: counted bytes, and a line in the batch size."""

import pytest
import torch

from ddpm.training import dry_run
from ddpm.training.dry_run import LiveBytes, MemoryEstimate


def test_live_bytes_are_those_counted_by_hand():
    """Two tensors of 400 and 800 bytes at once; views, changes in place and the freed one do not
    count."""
    given = torch.zeros(100)
    with LiveBytes() as live:
        one = given + 1  # 400
        one.view(10, 10).mul_(2)
        given.add_(1)
        two = torch.cat([one, one])  # 800
        assert live.now == live.peak == 1200
        del one
        assert live.now == 800
        three = two[:100] + 1  # 400
        assert live.now == 1200
        del two, three
    assert live.now == 0 and live.peak == 1200


def test_a_backward_pass_is_counted():
    """exp keeps its result of 4000 bytes; at the end only the gradient is left."""
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        kept = weight.exp().sum()
        assert live.now == 4004
        kept.backward()
        del kept
    assert live.now == 4000 and 8000 < live.peak < 8100


def test_the_line_and_what_fits():
    line = MemoryEstimate(fixed=100.0, per_image=2.5)
    assert line.at(8) == 120.0
    assert line.largest(120.0) == 8 and line.largest(122.4) == 8
    assert line.largest(99.0) == 0


@pytest.mark.parametrize("asked", [2, 31, 64])
def test_the_line_goes_through_two_batches(monkeypatch, asked):
    """On a step that holds 3 MiB and 2 an image, but 30 in any small batch."""
    steps = []
    monkeypatch.setattr(dry_run, "_step", lambda parts, size: steps.append(size))
    monkeypatch.setattr(dry_run, "_held", lambda device: 50 * 2**20)
    monkeypatch.setattr(dry_run, "available_mib", lambda device: 1000.0)

    def peak(device, held, work):
        work()
        return max(30, 3 + 2 * steps[-1]) * 2**20

    monkeypatch.setattr(dry_run, "_peak", peak)
    optimization = type("O", (), {"train_batch_size": asked})
    config = type("C", (), {"optimization": optimization})
    accelerator = type("A", (), {"device": torch.device("cpu")})
    line = dry_run.estimate_memory(type("P", (), {"config": config, "accelerator": accelerator}))
    if asked == 64:
        assert steps == [1, 4, 8, 16, 32]
        assert line == MemoryEstimate(53.0, 2.0)
    else:
        assert steps == [1, 4, 8]
        assert line == MemoryEstimate(80.0, 0.0)


@pytest.mark.parametrize(("size", "peak"), [(1000, 700), (1100, 700), (1750, 750)])
def test_a_process_that_grew_by_more_than_its_tensors_is_told(monkeypatch, size, peak):
    """Two tensors of 350 bytes that live together; the process had 1000 and has `size`."""
    monkeypatch.setattr(dry_run, "_held", lambda device: size)
    calls = []

    def work():
        calls.append([torch.ones(350, dtype=torch.uint8) for _ in range(2)])
        calls[-1].clear()

    assert dry_run._peak(torch.device("cpu"), 1000, work) == peak
    assert len(calls) == 2
