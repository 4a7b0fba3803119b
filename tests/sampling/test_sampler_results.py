"""The sampler table: what --quality chooses, and which differences are more than chance."""

import copy
from dataclasses import asdict

import pytest
import torch

from ddpm import file_io, run_folder
from ddpm.errors import UserError
from ddpm.evaluation import metrics
from ddpm.sampling import sampler_results
from ddpm.sampling.sampler_results import (
    MeasuredModel,
    SamplerResult,
    SamplerTable,
    jackknife_standard_error,
)


def make_entry(
    scheduler: str, steps: int, distance: float, seconds: float, noise: float = 0.1
) -> SamplerResult:
    """An entry whose distance is `noise` higher without one of ten groups, and lower without
    another."""
    return SamplerResult(
        scheduler=scheduler,
        num_inference_steps=steps,
        seconds_per_image=seconds,
        metrics={
            "frechet_distance": distance,
            "kernel_distance": 0.1,
            "kernel_distance_spread": 0.01,
            "precision": 0.5,
            "recall": 0.25,
        },
        leaving_out=(distance + noise, distance - noise, *[distance] * 8),
    )


def make_table(*entries: SamplerResult, weights: str = "w") -> SamplerTable:
    return SamplerTable(
        num_images=1000,
        model=MeasuredModel(weights=weights, name="m", version="v"),
        batch_size=64,
        device="a machine",
        entries=entries,
    )


def test_jackknife_standard_error_by_hand():
    """Differences 1, 2 and 3: sqrt(2/3 * (1 + 0 + 1))."""
    one, other = (1.0, 3.0, 4.0), (0.0, 1.0, 1.0)
    assert jackknife_standard_error(one, other) == pytest.approx((4 / 3) ** 0.5)
    assert jackknife_standard_error(one, one) == 0


def test_jackknife_error_is_the_spread_over_seeds():
    """The difference of two Frechet distances, drawn 50 times, varies as much as the error of one
    draw predicts. With common noise it varies less than either distance does."""
    pytest.importorskip("torch_fidelity")
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 3, generator=generator)
    differences, distances, variances = [], [], []
    for _ in range(50):
        noise = torch.randn(200, 3, generator=generator)
        one = noise * 1.3 + 0.3
        other = noise * 1.3 + torch.randn(200, 3, generator=generator) * 0.5
        distances.append(metrics.frechet_distance(one, real))
        differences.append(distances[-1] - metrics.frechet_distance(other, real))
        error = jackknife_standard_error(
            list(metrics.jackknife_distances(one, real)),
            list(metrics.jackknife_distances(other, real)),
        )
        variances.append(error**2)
    spread = torch.tensor(differences).std().item()
    assert (sum(variances) / len(variances)) ** 0.5 == pytest.approx(spread, rel=0.2)
    assert spread < torch.tensor(distances).std().item()


def test_quality_chooses_and_explains():
    """best: the lowest distance. good: the quickest that is not significantly worse. fast: the
    lowest distance in 10 steps or fewer."""
    table = make_table(
        make_entry("ddim", 5, 9.0, 0.005),
        make_entry("ddim", 10, 5.0, 0.010),
        make_entry("unipc", 10, 4.0, 0.012),
        make_entry("unipc", 20, 2.1, 0.020, noise=-0.1),
        make_entry("ddim", 50, 2.2, 0.050, noise=-0.1),
        make_entry("ddpm", 1000, 2.0, 1.000),
    )
    assert str(table.choose("best")) == "ddpm, 1000 steps"
    assert str(table.choose("good")) == "unipc, 20 steps"
    assert str(table.choose("fast")) == "unipc, 10 steps"
    assert table.explain_choice("good") == (
        "--quality good: unipc, 20 steps, a distance of 2.1, not significantly worse than the best "
        "(ddpm, 1000 steps: 2), which takes 50 times as long; measured with 1,000 images each."
    )
    assert "the lowest in 10 steps or fewer (the best, ddpm" in table.explain_choice("fast")
    assert "the lowest distance of all" in table.explain_choice("best")
    assert [table.qualities(entry) for entry in table.by_time] == [
        [],
        [],
        ["fast"],
        ["good"],
        [],
        ["best"],
    ]


def test_difference_within_the_error_is_not_significant():
    """Noise of 0.1 in two groups against none: an error of sqrt(0.9 * 0.02) = 0.134."""
    best = make_entry("unipc", 20, 2.0, 1.0, noise=0.0)
    near, far = make_entry("ddim", 20, 2.26, 1.0), make_entry("ddim", 20, 2.28, 1.0)
    table = make_table(best, near, far)
    assert not table.is_significantly_worse(near)
    assert table.is_significantly_worse(far)
    # Noise that both have in common is no doubt about their difference.
    same_noise = make_entry("ddim", 20, 2.01, 1.0)
    table = make_table(make_entry("unipc", 20, 2.0, 1.0), same_noise)
    assert table.is_significantly_worse(same_noise)


def test_fast_is_never_slower_than_good_and_always_there():
    short = make_table(
        make_entry("ddim", 5, 2.1, 0.005, noise=-0.1),
        make_entry("unipc", 10, 2.05, 0.010),
        make_entry("unipc", 20, 2.0, 0.020),
    )
    assert short.fast is short.good and short.good.num_inference_steps == 5
    long = make_table(make_entry("ddpm", 1000, 2.0, 1.0), make_entry("ddim", 50, 3.0, 0.05))
    assert str(long.fast) == "ddim, 50 steps"
    assert "the quickest of all" in long.explain_choice("fast")


@pytest.fixture
def folder(tmp_path):
    """A pipeline's weights with a sampler table measured for them."""
    weights = tmp_path / run_folder.UNET_WEIGHTS
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    table = make_table(
        make_entry("ddim", 10, 2.0, 0.01),
        make_entry("unipc", 20, 1.0, 0.02),
        weights=sampler_results.unet_weights_sha256(tmp_path),
    )
    table.write(tmp_path / run_folder.SAMPLER_TABLE)
    return tmp_path


def test_table_is_read_as_written_for_its_weights_only(folder):
    table = sampler_results.read_sampler_table(folder)
    assert [str(entry) for entry in table.entries] == ["ddim, 10 steps", "unipc, 20 steps"]
    assert file_io.read_json(folder / run_folder.SAMPLER_TABLE) == {
        **asdict(table),
        "entries": [{**asdict(e), "leaving_out": list(e.leaving_out)} for e in table.entries],
    }
    (folder / run_folder.UNET_WEIGHTS).write_bytes(b"trained on")
    assert sampler_results.read_sampler_table(folder) is None
    (folder / run_folder.SAMPLER_TABLE).unlink()
    assert sampler_results.read_sampler_table(folder) is None


def test_table_of_an_older_version_is_read(folder):
    """Without the fields that only evaluate.py reads."""
    path = folder / run_folder.SAMPLER_TABLE
    value = file_io.read_json(path)
    known = {name: value[name] for name in ("num_images", "entries")}
    file_io.write_json(path, {**known, "model": {"weights": value["model"]["weights"]}})
    table = sampler_results.read_sampler_table(folder)
    assert len(table.entries) == 2 and table.device is None


def test_weights_are_hashed_in_every_layout(folder):
    today = sampler_results.unet_weights_sha256(folder)
    (folder / run_folder.UNET_WEIGHTS).rename(folder / "diffusion_pytorch_model.safetensors")
    assert sampler_results.unet_weights_sha256(folder) == today
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    parts = [folder / f"unet/diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    for part in parts:
        part.write_bytes(b"weights")
    both = sampler_results.unet_weights_sha256(folder)
    parts[1].write_bytes(b"others")
    assert len({today, both, sampler_results.unet_weights_sha256(folder)}) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scheduler", "rm -rf"),
        ("scheduler", ["ddim"]),
        ("num_inference_steps", 0),
        ("num_inference_steps", "10"),
        ("num_inference_steps", True),
        ("num_inference_steps", 10**30),
        ("seconds_per_image", 0),
        ("seconds_per_image", None),
        ("metrics", {}),
        ("metrics", {"fid": "low"}),
        ("metrics", {"fid": 10**400}),
        ("metrics", {"fid": 1.0, "kid": None}),
        ("metrics", 3),
        ("leaving_out", [1.0]),
        ("leaving_out", [1.0] * 9),
        ("leaving_out", ["a"] * 10),
        ("leaving_out", None),
        ("leaving_out", [1e200, -1e200] * 5),
    ],
)
def test_bad_entry_of_a_foreign_file_is_refused(folder, name, value):
    path = folder / run_folder.SAMPLER_TABLE
    bad = copy.deepcopy(file_io.read_json(path))
    bad["entries"][1][name] = value
    file_io.write_json(path, bad)
    with pytest.raises(UserError, match="It is not a table that evaluate.py"):
        sampler_results.read_sampler_table(folder)


@pytest.mark.parametrize(
    "change",
    [
        [],
        {},
        {"entries": []},
        {"entries": [3]},
        {"num_images": "many"},
        {"num_images": -5},
        {"model": {}},
        {"model": "m"},
        {"device": ["rm"]},
    ],
    ids=str,
)
def test_file_that_is_no_sampler_table_is_refused(folder, change):
    path = folder / run_folder.SAMPLER_TABLE
    value = {**file_io.read_json(path), **change} if change else change
    file_io.write_json(path, value)
    with pytest.raises(UserError, match="run that again, or move the file away"):
        sampler_results.read_sampler_table(folder)


def test_deeply_nested_file_is_refused(folder):
    (folder / run_folder.SAMPLER_TABLE).write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        sampler_results.read_sampler_table(folder)
