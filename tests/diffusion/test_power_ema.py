"""Power-function averages: the formulas against integrals, the averages against sums, snapshots."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpm.config.evaluate import MAX_SIGMA_REL
from ddpm.diffusion import power_ema
from ddpm.diffusion.power_ema import PowerEMA, Profile, solve_posthoc_weights
from ddpm.errors import UserError
from tests.diffusion.test_ema import walk

MIDPOINTS = (np.arange(200_000) + 0.5) / 100_000
"""Midpoints of a fine grid over two units of time: integrals are sums over it."""
GIVEN = [Profile(step, sigma_rel) for step in range(20, 1001, 20) for sigma_rel in (0.05, 0.10)]

# Formulas


def weighting(profile: Profile, taus: np.ndarray) -> np.ndarray:
    """The density with which the average weighs the weights of each moment."""
    gamma = power_ema.sigma_rel_to_gamma(profile.sigma_rel)
    density = (gamma + 1) * (taus / profile.step) ** gamma / profile.step
    return np.where(taus <= profile.step, density, 0.0)


def average_by_updates(profile: Profile, weights: np.ndarray) -> np.ndarray:
    """The average [D] of weights [T, D], by the updates of training alone."""
    average, gamma = np.zeros(weights.shape[1]), power_ema.sigma_rel_to_gamma(profile.sigma_rel)
    for step in range(1, profile.step + 1):
        decay = power_ema.power_ema_decay(step, gamma)
        average = decay * average + (1 - decay) * weights[step - 1]
    return average


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.2, MAX_SIGMA_REL])
def test_sigma_rel_is_the_standard_deviation_of_the_weighting(sigma_rel):
    gamma = power_ema.sigma_rel_to_gamma(sigma_rel)
    assert power_ema.gamma_to_sigma_rel(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    taus = MIDPOINTS[:100_000]
    density = weighting(Profile(1, sigma_rel), taus) / 100_000
    mean = (density * taus).sum()
    assert density.sum() == pytest.approx(1, rel=1e-5)
    assert np.sqrt((density * (taus - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-4)


def test_exponents_are_those_of_the_paper():
    """6.94 and 16.97, section 3.1."""
    assert power_ema.sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert power_ema.sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Profile(2, 0.05), Profile(2, 0.05)),
        (Profile(2, 0.05), Profile(2, 0.2)),
        (Profile(1, 0.05), Profile(2, 0.1)),
        (Profile(2, 0.1), Profile(1, 0.05)),
        (Profile(1, 0.15), Profile(2, 0.25)),
    ],
)
def test_inner_products_are_the_integrals(one, other):
    integral = (weighting(one, MIDPOINTS) * weighting(other, MIDPOINTS)).sum() / 100_000
    assert power_ema.inner_products([one], [other])[0, 0] == pytest.approx(integral, rel=1e-4)


def test_updates_weigh_each_step_by_the_integral_over_it():
    """So the averages of training are those of the closed form, integrated over each step."""
    gamma, steps = power_ema.sigma_rel_to_gamma(0.1), 40
    weights = average_by_updates(Profile(steps, 0.1), np.eye(steps))
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    np.testing.assert_allclose(weights, np.diff(edges), rtol=1e-12)


@pytest.mark.parametrize(
    ("sigma_rel", "max_error"),
    [(0.02, 0.02), (0.03, 5e-3), (0.07, 1e-3), (0.15, 2e-3), (0.2, 5e-3)],
)
def test_any_length_is_built_from_two(sigma_rel, max_error):
    """For a random walk of the weights, the sum is the average that updates would have given."""
    noise = np.random.default_rng(0).normal(size=(1000, 50))
    weights = noise.cumsum(0) / 10 + noise
    target = Profile(1000, sigma_rel)
    fit = solve_posthoc_weights(GIVEN, target)
    built = sum(
        w * average_by_updates(profile, weights)
        for w, profile in zip(fit.weights, GIVEN, strict=True)
    )
    expected = average_by_updates(target, weights)
    assert sum(fit.weights) == pytest.approx(1)
    assert fit.error < max_error
    norm = np.sqrt((weighting(target, np.arange(1, 1001)) ** 2).sum())  # of averaged white noise
    assert np.abs(built - expected).max() < 8 * max_error * norm + 1e-3
    closest = average_by_updates(Profile(1000, 0.05 if sigma_rel < 0.07 else 0.10), weights)
    assert np.abs(built - expected).max() < 0.2 * np.abs(closest - expected).max()


def test_error_is_the_distance_of_the_weightings():
    given = [Profile(step, sigma_rel) for step in (1, 2) for sigma_rel in (0.05, 0.10)]
    fit = solve_posthoc_weights(given, Profile(2, 0.2))
    target = weighting(Profile(2, 0.2), MIDPOINTS)

    def squared_distance(weights) -> float:
        built = sum(w * weighting(p, MIDPOINTS) for w, p in zip(weights, given, strict=True))
        return ((built - target) ** 2).sum()

    smallest = squared_distance(fit.weights)
    assert fit.error == pytest.approx(np.sqrt(smallest / (target**2).sum()), rel=1e-3)
    assert fit.error > 0.1
    for index in range(4):  # no other weights with sum 1 come as close
        for change in (-0.01, 0.01):
            changed = np.array(fit.weights)
            changed[index] += change
            assert squared_distance(changed / changed.sum()) > 0.97 * smallest


def test_given_profile_is_itself():
    fit = solve_posthoc_weights(GIVEN, Profile(1000, 0.05))
    index = GIVEN.index(Profile(1000, 0.05))
    assert fit.error == 0 and fit.weights[index] == 1
    assert sorted(fit.weights)[:-1] == [0.0] * (len(GIVEN) - 1)
    # So says the least-squares fit, too.
    fit = solve_posthoc_weights(GIVEN, Profile(1000, 0.05 + 1e-9))
    assert fit.error < 1e-4 and fit.weights[index] == pytest.approx(1, abs=1e-3)


def test_impossible_length_has_a_large_error():
    given = [Profile(1000, 0.05), Profile(1000, 0.10)]
    assert solve_posthoc_weights(given, Profile(1000, 0.07)).error < 0.1
    assert solve_posthoc_weights(given, Profile(1000, 0.02)).error > 0.3
    assert solve_posthoc_weights(given, Profile(1000, 0.25)).error > 0.3


# Averages


@pytest.fixture
def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def test_averages_weigh_each_step_by_its_profile(module):
    """Against the sum over the weights of all steps, each by the integral over its step."""
    averages, generator, history = PowerEMA(module), torch.Generator().manual_seed(0), []
    for step in range(1, 31):
        walk(module, generator)
        averages.update(step)
        history.append(module[0].weight.detach().double())
    for sigma_rel, average in averages.averages.items():
        edges = (torch.arange(31) / 30).double() ** (power_ema.sigma_rel_to_gamma(sigma_rel) + 1)
        expected = (torch.stack(history) * edges.diff()[:, None, None]).sum(0)
        torch.testing.assert_close(average["0.weight"].double(), expected, rtol=1e-5, atol=1e-5)
    short, long = (averages.averages[s]["0.weight"] for s in power_ema.SIGMA_RELS)
    assert not torch.equal(short, long)


def test_averages_are_float32_copies(module):
    averages = PowerEMA(module.to(torch.bfloat16))
    walk(module, torch.Generator().manual_seed(0))
    for average in averages.averages.values():
        assert all(v.dtype == torch.float32 and not v.requires_grad for v in average.values())
        assert not torch.equal(average["0.weight"], module[0].weight.float())


def test_saved_averages_are_loaded(module, tmp_path):
    saved = PowerEMA(module)
    saved.begin(5)
    walk(module, torch.Generator().manual_seed(0))
    saved.update(6)
    saved.save(tmp_path / "main.safetensors", 6, main=True)
    saved.save(tmp_path / "other.safetensors", 6, main=False)
    loaded = PowerEMA(module)
    storage = loaded.averages[0.05]["0.weight"].data_ptr()
    loaded.load(tmp_path / "main.safetensors")
    assert loaded.began == 5 and loaded.averages[0.05]["0.weight"].data_ptr() == storage
    for name, value in saved.state().items():
        assert torch.equal(loaded.state()[name], value)
    assert not (tmp_path / "other.safetensors").exists()
    with pytest.raises(KeyError, match="another model"):
        PowerEMA(torch.nn.Linear(1, 1)).load(tmp_path / "main.safetensors")


def test_averages_begin_at_a_checkpoint_without_them(module, tmp_path):
    averages, reports = PowerEMA(module), []
    walk(module, torch.Generator().manual_seed(0))
    averages.resume(tmp_path, 7, reports.append)
    assert averages.began == 7 and "begin at step 7" in reports[0]
    assert torch.equal(averages.averages[0.10]["0.weight"], module[0].weight)


def test_sharded_averages_are_gathered():
    averages = PowerEMA(torch.nn.Linear(2, 1, bias=False))
    averages.averages = {0.05: {"weight": SimpleNamespace(full_tensor=lambda: "gathered")}}
    assert averages.state() == {"0.05/weight": "gathered"}


# Snapshots


def kept_steps(last: int) -> list[int]:
    """The snapshots of a run of `last` steps, by doing what a run does."""
    kept: list[int] = []
    for step in range(1, last + 1):
        if power_ema.snapshot_due(step) or step == last:
            kept = [*(older for older in kept if power_ema.is_snapshot_kept(older, step)), step]
    return kept


def test_snapshots_are_few_and_dense_at_the_end():
    counts = {}
    for last in (6, 100, 256, 257, 1000, 1024, 1025, 5000, 16_384, 16_385):
        kept = kept_steps(last)
        counts[last] = len(kept)
        assert kept[-1] == last
        if last > 200:
            assert last - kept[-2] <= last / 32 and kept[0] <= last / 8
            given = [Profile(step, s) for step in kept for s in power_ema.SIGMA_RELS]
            for sigma_rel, max_error in ((0.02, 0.05), (0.07, 2e-3), (0.15, 6e-3), (0.2, 0.03)):
                assert solve_posthoc_weights(given, Profile(last, sigma_rel)).error < max_error
    # From one doubling of the interval to the next
    assert max(len(kept_steps(last)) for last in range(250, 520)) == power_ema.MAX_SNAPSHOTS
    assert max(counts.values()) <= power_ema.MAX_SNAPSHOTS


def test_resumed_run_keeps_the_same_snapshots(module, tmp_path):
    """Resumed from an earlier checkpoint: later snapshots are deleted, and the end is the same."""

    def train(folder, first, last):
        power_ema.delete_snapshots_after(folder, first)
        assert all(step <= first for step in power_ema.list_snapshots(folder))
        for step in range(first + 1, last + 1):
            if power_ema.snapshot_due(step) or step == last:
                PowerEMA(module).snapshot(folder, step, main=True)
        return list(power_ema.list_snapshots(folder))

    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight = train(tmp_path / "straight", 0, 300)
    assert straight == kept_steps(300)
    assert 270 in train(tmp_path / "resumed", 0, 270)
    assert train(tmp_path / "resumed", 250, 300) == straight
    tensors = load_file(next(iter(power_ema.list_snapshots(tmp_path / "resumed").values())))
    assert set(tensors) == set(PowerEMA(module).state())


def test_full_disk_leaves_no_partial_snapshot(module, make_disk):
    disk = make_disk(16)
    PowerEMA(module).snapshot(disk, 4, main=True)
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
    with pytest.raises(UserError, match=r"step-000008.*No space left.*no_post_hoc_ema"):
        PowerEMA(module).snapshot(disk, 8, main=True)
    assert [path.name for path in (disk / "ema").iterdir()] == ["step-000004.safetensors"]


def test_announced_size_is_that_of_all_snapshots(module):
    mebibytes = 2 * 4 * (3 * 4 + 4 + 4 * 2 + 2) / 2**20
    assert (
        f"{power_ema.MAX_SNAPSHOTS} snapshots of {mebibytes:,.3g} MiB"
        in PowerEMA(module).announcement()
    )
