"""The two averages that other lengths are built from, and their snapshots."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ddpm.diffusion import power_ema
from ddpm.diffusion.power_ema import PowerEMA
from ddpm.errors import UserError
from tests.diffusion.test_ema import walk


@pytest.fixture
def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def test_averages_weigh_each_step_by_its_profile(module):
    """Against the sum over all weights that there were, by the integral over each step."""
    found, generator, path = PowerEMA(module), torch.Generator().manual_seed(0), []
    for step in range(1, 31):
        walk(module, generator)
        found.update(step)
        path.append(module[0].weight.detach().double())
    for sigma_rel, average in found.averages.items():
        edges = (torch.arange(31) / 30).double() ** (power_ema.sigma_rel_to_gamma(sigma_rel) + 1)
        by_hand = (torch.stack(path) * edges.diff()[:, None, None]).sum(0)
        torch.testing.assert_close(average["0.weight"].double(), by_hand, rtol=1e-5, atol=1e-5)
    short, long = (found.averages[s]["0.weight"] for s in power_ema.SIGMA_RELS)
    assert not torch.equal(short, long)


def test_averages_are_float32_of_their_own(module):
    found = PowerEMA(module.to(torch.bfloat16))
    walk(module, torch.Generator().manual_seed(0))
    for average in found.averages.values():
        assert all(v.dtype == torch.float32 and not v.requires_grad for v in average.values())
        assert not torch.equal(average["0.weight"], module[0].weight.float())


def test_what_is_saved_comes_back(module, tmp_path):
    found = PowerEMA(module)
    found.begin(5)
    walk(module, torch.Generator().manual_seed(0))
    found.update(6)
    found.save(tmp_path / "t.safetensors", 6, main=True)
    found.save(tmp_path / "other.safetensors", 6, main=False)
    other = PowerEMA(module)
    storage = other.averages[0.05]["0.weight"].data_ptr()
    other.load(tmp_path / "t.safetensors")
    assert other.began == 5 and other.averages[0.05]["0.weight"].data_ptr() == storage
    for name, value in found.state().items():
        assert torch.equal(other.state()[name], value)
    assert not (tmp_path / "other.safetensors").exists()
    with pytest.raises(KeyError, match="another model"):
        PowerEMA(torch.nn.Linear(1, 1)).load(tmp_path / "t.safetensors")


def test_a_checkpoint_without_them_is_where_they_begin(module, tmp_path):
    found, said = PowerEMA(module), []
    walk(module, torch.Generator().manual_seed(0))
    found.resume(tmp_path, 7, said.append)
    assert found.began == 7 and "begin at step 7" in said[0]
    assert torch.equal(found.averages[0.10]["0.weight"], module[0].weight)


def steps_kept(last: int) -> list[int]:
    """What a run that goes to `last` keeps, by doing what a run does."""
    kept: list[int] = []
    for step in range(1, last + 1):
        if power_ema.snapshot_due(step) or step == last:
            kept = [*(older for older in kept if power_ema.is_snapshot_kept(older, step)), step]
    return kept


def test_snapshots_are_few_and_dense_at_the_end():
    counts = {}
    for last in (6, 100, 256, 257, 1000, 1024, 1025, 5000, 16_384, 16_385):
        kept = steps_kept(last)
        counts[last] = len(kept)
        assert kept[-1] == last
        if last > 200:
            assert last - kept[-2] <= last / 32 and kept[0] <= last / 8
            given = [power_ema.Profile(step, s) for step in kept for s in power_ema.SIGMA_RELS]
            for sigma_rel, most in ((0.02, 0.05), (0.07, 2e-3), (0.15, 6e-3), (0.2, 0.03)):
                assert (
                    power_ema.solve_posthoc_weights(given, power_ema.Profile(last, sigma_rel)).error
                    < most
                )
    # From one doubling of the interval to the next
    assert max(len(steps_kept(last)) for last in range(250, 520)) == power_ema.MAX_SNAPSHOTS
    assert max(counts.values()) <= power_ema.MAX_SNAPSHOTS


def test_a_run_that_was_stopped_keeps_the_same(module, tmp_path):
    """Resumed from an earlier checkpoint: later snapshots go, and the end is the same."""

    def go(folder, first, last):
        power_ema.delete_snapshots_after(folder, first)
        assert all(step <= first for step in power_ema.list_snapshots(folder))
        for step in range(first + 1, last + 1):
            if power_ema.snapshot_due(step) or step == last:
                PowerEMA(module).snapshot(folder, step, main=True)
        return list(power_ema.list_snapshots(folder))

    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = go(tmp_path / "straight", 0, 300)
    assert straight == steps_kept(300)
    assert 270 in go(tmp_path / "stopped", 0, 270)
    assert go(tmp_path / "stopped", 250, 300) == straight
    tensors = load_file(next(iter(power_ema.list_snapshots(tmp_path / "stopped").values())))
    assert set(tensors) == set(PowerEMA(module).state())


def test_a_full_disk_leaves_no_half_snapshot(module, make_disk):
    disk = make_disk(16)
    PowerEMA(module).snapshot(disk, 4, main=True)
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
    with pytest.raises(UserError, match=r"step-000008.*No space left.*no_post_hoc_ema"):
        PowerEMA(module).snapshot(disk, 8, main=True)
    assert [path.name for path in (disk / "ema").iterdir()] == ["step-000004.safetensors"]


def test_the_announcement_is_what_lies_on_disk_at_most(module):
    found = PowerEMA(module)
    values = 3 * 4 + 4 + 4 * 2 + 2
    assert (
        f"{power_ema.MAX_SNAPSHOTS} snapshots of {2 * 4 * values / 2**20:,.3g} MiB"
        in found.announcement()
    )


def test_sharded_averages_are_put_together():
    """As FSDP's tensors are: whole only when all processes ask."""
    found = PowerEMA(torch.nn.Linear(2, 1, bias=False))
    found.averages = {0.05: {"weight": SimpleNamespace(full_tensor=lambda: "whole")}}
    assert found.state() == {"0.05/weight": "whole"}
