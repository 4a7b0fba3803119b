"""--dry_run: counted bytes, a line in the batch size, and what it prints."""

import json
from types import SimpleNamespace

import pytest
import torch

from ddpm import run_folder
from ddpm.errors import UsageError, UserError
from ddpm.training import dry_run, loop
from ddpm.training.dry_run import LiveBytes, MemoryEstimate


@pytest.fixture
def dry_run_tiny(train_tiny, monkeypatch):
    """train_tiny, with the dry run in the place of training."""
    monkeypatch.setattr(
        loop, "train", lambda accelerator, config, _: dry_run.dry_run(accelerator, config)
    )
    return train_tiny


def test_dry_run_prints_and_writes_nothing(dry_run_tiny, capsys, tmp_path):
    folder = dry_run_tiny(tmp_path / "dry", "--dry_run", "--resolution=8,12")
    assert not folder.exists()
    output = capsys.readouterr().out
    settings = json.loads(output[: output.index("\n}") + 2])
    assert settings["max_train_steps"] == 6 and settings["dropout"] == 0.1
    assert "M parameters on 10 RGB images of 12x8" in output
    assert "10 rows" in output
    for text in ("images/s", "MiB", "All 6 steps: about 0:00:0", "no run was started"):
        assert text in output
    folder.mkdir()
    (folder / run_folder.MODEL_INDEX).write_text("{}")
    with pytest.raises(UsageError, match="not a run that can be resumed"):
        dry_run_tiny(folder, "--dry_run")


def test_batch_that_does_not_fit_is_refused_before_it_is_tried(
    dry_run_tiny, monkeypatch, capsys, tmp_path
):
    estimate = MemoryEstimate(fixed=100.0, per_image=10.0)
    monkeypatch.setattr(dry_run, "estimate_memory", lambda state: estimate)
    monkeypatch.setattr(dry_run, "available_mib", lambda device: 130.0)
    monkeypatch.setattr(dry_run, "_seconds_per_step", lambda state: 0.5)
    dry_run_tiny(tmp_path / "fits", "--dry_run", "--train_batch_size=3")
    output = capsys.readouterr().out
    assert "predicted: about 130 MiB, of which 10.0 MiB an image" in output
    assert "largest --train_batch_size for the 130 MiB there: about 3." in output
    with pytest.raises(UserError, match=r"batch_size 4 needs about 140 MiB, and 130.*Give 3 at m"):
        dry_run_tiny(tmp_path / "fits", "--dry_run")


def test_live_bytes_are_counted():
    """Two tensors of 400 and 800 bytes at once; views and changes in place do not count."""
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


def test_largest_batch_is_on_the_line():
    estimate = MemoryEstimate(fixed=100.0, per_image=2.5)
    assert estimate.at(8) == 120.0
    assert estimate.largest(120.0) == 8 and estimate.largest(122.4) == 8
    assert estimate.largest(99.0) == 0


@pytest.mark.parametrize(
    ("batch_size", "measured", "expected"),
    [
        (2, [1, 4, 8], MemoryEstimate(80.0, 0.0)),
        (31, [1, 4, 8], MemoryEstimate(80.0, 0.0)),
        (64, [1, 4, 8, 16, 32], MemoryEstimate(53.0, 2.0)),
    ],
)
def test_line_goes_through_two_batches(monkeypatch, batch_size, measured, expected):
    """A step holds 3 MiB and 2 an image, but 30 in any small batch; the process 50 before."""
    steps = []
    monkeypatch.setattr(dry_run, "_step", lambda state, size: steps.append(size))
    monkeypatch.setattr(dry_run, "_held", lambda device: 50 * 2**20)
    monkeypatch.setattr(dry_run, "available_mib", lambda device: 1000.0)

    def peak(device, held, work):
        work()
        return max(30, 3 + 2 * steps[-1]) * 2**20

    monkeypatch.setattr(dry_run, "_peak", peak)
    config = SimpleNamespace(optimization=SimpleNamespace(train_batch_size=batch_size))
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda values: values)
    state = SimpleNamespace(config=config, accelerator=accelerator)
    assert dry_run.estimate_memory(state) == expected
    assert steps == measured


@pytest.mark.parametrize(("size", "peak"), [(1000, 700), (1100, 700), (1750, 750)])
def test_growth_of_the_process_counts_where_it_exceeds_the_tensors(monkeypatch, size, peak):
    """Two tensors of 350 bytes that live together; the process had 1000 and has `size`."""
    monkeypatch.setattr(dry_run, "_held", lambda device: size)
    calls = []

    def work():
        calls.append([torch.ones(350, dtype=torch.uint8) for _ in range(2)])
        calls[-1].clear()

    assert dry_run._peak(torch.device("cpu"), 1000, work) == peak
    assert len(calls) == 2
