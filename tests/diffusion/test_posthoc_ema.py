"""Averages of any length, built after training from what a run has kept."""

import pytest
import torch

from ddpm import run_folder
from ddpm.diffusion import power_ema
from ddpm.diffusion.power_ema import PowerEMA, open_posthoc_ema
from ddpm.errors import UserError
from tests.diffusion.test_ema import walk

STEPS, LENGTHS = 200, (0.03, 0.07, 0.15)


def small_module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """A folder with the snapshots of a small model that changes at random, its PowerEMA, and
    averages of LENGTHS kept directly in float64: (folder, power_ema, {sigma_rel: state dict})."""
    folder = tmp_path_factory.mktemp("snapshots")
    torch.manual_seed(0)
    module = small_module()
    kept, generator = PowerEMA(module), torch.Generator().manual_seed(0)
    direct = {
        s: {n: torch.zeros_like(p).double() for n, p in module.named_parameters()} for s in LENGTHS
    }
    for step in range(1, STEPS + 1):
        walk(module, generator)
        kept.update(step)
        for sigma_rel, average in direct.items():
            beta = power_ema.power_ema_decay(step, power_ema.sigma_rel_to_gamma(sigma_rel))
            for name, weight in module.named_parameters():
                average[name].mul_(beta).add_((1 - beta) * weight.detach().double())
        if power_ema.snapshot_due(step) or step == STEPS:
            kept.snapshot(folder, step, main=True)
    return folder, kept, direct


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_a_built_average_is_the_one_that_training_would_have_kept(snapshots, sigma_rel):
    folder, kept, direct = snapshots
    posthoc_ema = open_posthoc_ema(folder)
    assert posthoc_ema.step == STEPS
    built = posthoc_ema.build(sigma_rel)
    for name, average in direct[sigma_rel].items():
        error = (built[name] - average).norm()
        nearest = min((value[name] - average).norm() for value in kept.averages.values())
        assert error / average.norm() < 0.02 and error < 0.2 * nearest
        assert built[name].dtype == torch.float32


def test_a_length_that_was_kept_is_built_to_the_bit(snapshots):
    folder, kept, _ = snapshots
    for sigma_rel, average in kept.averages.items():
        built = open_posthoc_ema(folder).build(sigma_rel)
        assert built.keys() == average.keys()
        assert all(torch.equal(built[name], average[name]) for name in average)


def test_averages_in_checkpoints_are_used_too(snapshots, tmp_path):
    """Without snapshots the two averages of a checkpoint are all that there is."""
    folder, kept, _ = snapshots
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    checkpoint.mkdir()
    kept.save(checkpoint / run_folder.POWER_EMA, STEPS, main=True)
    posthoc_ema = open_posthoc_ema(tmp_path)
    assert {profile.sigma_rel for profile in posthoc_ema.files} == set(power_ema.SIGMA_RELS)
    posthoc_ema.require([0.05, 0.07, 0.10])
    with pytest.raises(UserError, match=r"0\.02.*2 averages.*Give lengths from 0\.0\d* to 0\.1"):
        posthoc_ema.require([0.02, 0.05])
    num_snapshots = len(power_ema.list_snapshots(folder))
    assert len(open_posthoc_ema(folder).files) == 2 * num_snapshots


def test_averages_that_began_late_are_left_out(tmp_path):
    """One that began at step 150 holds, at 200, more of its start than of its profile."""
    (tmp_path / "ema").mkdir()
    late = PowerEMA(small_module())
    late.begin(150)
    late.save(tmp_path / "ema" / "step-000200.safetensors", 200, main=True)
    with pytest.raises(UserError, match="that began long enough ago"):
        open_posthoc_ema(tmp_path)
    late.save(tmp_path / "ema" / "step-000240.safetensors", 240, main=True)
    late.save(tmp_path / "ema" / "step-001000.safetensors", 1000, main=True)
    files = open_posthoc_ema(tmp_path).files
    assert [(p.step, p.sigma_rel) for p in files] == [(240, 0.05), (1000, 0.05), (1000, 0.10)]


def test_a_folder_without_readable_averages_is_refused(tmp_path):
    with pytest.raises(UserError, match="train with --post_hoc_ema"):
        open_posthoc_ema(tmp_path)
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "step-000006.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="step-000006.safetensors cannot be read"):
        open_posthoc_ema(tmp_path)
