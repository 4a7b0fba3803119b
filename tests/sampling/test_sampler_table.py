"""The menu: which sampler a word stands for, and what is more than noise."""

import copy

import pytest
import torch

from ddpm import run_folder
from ddpm.errors import UserError
from ddpm.evaluation import metrics
from ddpm.sampling import sampler_table
from ddpm.sampling.sampler_table import SamplerResult, SamplerTable

FACTS = {
    "num_images": 1000,
    "model": {"name": "m", "version": "v", "weights": "w"},
    "batch_size": 64,
    "device": "a machine",
}


def entry(
    name: str, steps: int, distance: float, seconds: float, noise: float = 0.1
) -> SamplerResult:
    """An entry whose distance moves by `noise` in one of ten groups and back in another."""
    moved = (distance + noise, distance - noise, *[distance] * 8)
    return SamplerResult(name, steps, distance, seconds, moved)


def as_json(each: SamplerResult) -> dict:
    return {
        "scheduler": each.scheduler,
        "num_inference_steps": each.num_inference_steps,
        "seconds_per_image": each.seconds,
        "leaving_out": list(each.leaving_out),
        "metrics": {
            "frechet_distance": each.distance,
            "kernel_distance": 0.1,
            "kernel_distance_spread": 0.01,
            "precision": 0.5,
            "recall": 0.25,
        },
    }


def menu_of(*entries: SamplerResult) -> SamplerTable:
    return sampler_table.parse_sampler_table(
        {**FACTS, "entries": [as_json(each) for each in entries]}
    )


def test_standard_error_by_hand():
    """Differences 1, 2 and 3: sqrt(2/3 * (1 + 0 + 1))."""
    one = SamplerResult("ddim", 5, 2.0, 1.0, (1.0, 3.0, 4.0))
    other = SamplerResult("unipc", 5, 0.0, 1.0, (0.0, 1.0, 1.0))
    assert sampler_table.jackknife_standard_error(one, other) == pytest.approx((4 / 3) ** 0.5)
    assert sampler_table.jackknife_standard_error(one, one) == 0


def test_standard_error_is_how_far_seeds_move_a_difference():
    """Drawn 150 times anew, the difference of two Frechet distances varies as the error of one
    draw says; drawn from the same noise it varies less than either distance does."""
    pytest.importorskip("torch_fidelity")
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 3, generator=generator)
    found, alone, told = [], [], []
    for _ in range(150):
        noise = torch.randn(200, 3, generator=generator)
        sets = (noise * 1.3 + 0.3, noise * 1.3 + torch.randn(200, 3, generator=generator) * 0.5)
        one, other = (
            SamplerResult(
                "ddim",
                5,
                metrics.frechet_distance(drawn, real),
                1.0,
                tuple(metrics.jackknife_distances(drawn, real)),
            )
            for drawn in sets
        )
        found.append(one.distance - other.distance)
        alone.append(one.distance)
        told.append(sampler_table.jackknife_standard_error(one, other) ** 2)
    spread = torch.tensor(found).std().item()
    assert (sum(told) / len(told)) ** 0.5 == pytest.approx(spread, rel=0.2)
    assert spread < torch.tensor(alone).std().item()


def test_words_stand_for_what_they_say():
    """Best: the lowest. Good: the least time of what cannot be told from it. Fast: 10 steps."""
    made = menu_of(
        entry("ddim", 5, 9.0, 0.005),
        entry("ddim", 10, 5.0, 0.010),
        entry("unipc", 10, 4.0, 0.012),
        entry("unipc", 20, 2.1, 0.020, noise=-0.1),
        entry("ddim", 50, 2.2, 0.050, noise=-0.1),
        entry("ddpm", 1000, 2.0, 1.000),
    )
    assert str(made.choose("best")) == "ddpm, 1000 steps"
    assert str(made.choose("good")) == "unipc, 20 steps"
    assert str(made.choose("fast")) == "unipc, 10 steps"
    words = sampler_table.explain_choice(made, "good")
    assert (
        "--quality good: unipc, 20 steps, a distance of 2.1, not to be told from the best" in words
    )
    assert "(ddpm, 1000 steps: 2), which takes 50 times as long" in words and "1,000" in words
    assert "the lowest of 10 steps or fewer (the best, ddpm" in sampler_table.explain_choice(
        made, "fast"
    )
    assert "the lowest distance of all" in sampler_table.explain_choice(made, "best")


def test_what_noise_explains_is_not_worse():
    """Noise of 0.1 in two groups, against none: an error of sqrt(0.9 * 0.02) = 0.134."""
    best = entry("unipc", 20, 2.0, 1.0, noise=0.0)
    assert not sampler_table.is_significantly_worse(entry("ddim", 20, 2.26, 1.0), best)
    assert sampler_table.is_significantly_worse(entry("ddim", 20, 2.28, 1.0), best)
    # What moves both alike is no doubt about their difference.
    assert sampler_table.is_significantly_worse(
        entry("ddim", 20, 2.01, 1.0), entry("unipc", 20, 2.0, 1.0)
    )


def test_fast_is_never_slower_than_good_nor_missing():
    short = menu_of(
        entry("ddim", 5, 2.1, 0.005, noise=-0.1),
        entry("unipc", 10, 2.05, 0.010),
        entry("unipc", 20, 2.0, 0.020),
    )
    assert short.fast is short.good and short.good.num_inference_steps == 5
    long = menu_of(entry("ddpm", 1000, 2.0, 1.0), entry("ddim", 50, 3.0, 0.05))
    assert str(long.fast) == "ddim, 50 steps"
    assert "the least time of all" in sampler_table.explain_choice(long, "fast")


@pytest.fixture
def folder(tmp_path):
    """A pipeline's weights with a menu made for them."""
    weights = tmp_path / run_folder.UNET_WEIGHTS
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    facts = {**FACTS, "model": {"weights": sampler_table.unet_weights_sha256(tmp_path)}}
    entries = [as_json(entry("ddim", 10, 2.0, 0.01)), as_json(entry("unipc", 20, 1.0, 0.02))]
    run_folder.write_json(tmp_path / run_folder.SAMPLER_TABLE, {**facts, "entries": entries})
    return tmp_path


def test_a_menu_belongs_to_its_weights(folder):
    made = sampler_table.read_sampler_table(folder)
    assert [str(each) for each in made.entries] == ["ddim, 10 steps", "unipc, 20 steps"]
    (folder / run_folder.UNET_WEIGHTS).write_bytes(b"trained on")
    assert sampler_table.read_sampler_table(folder) is None
    (folder / run_folder.SAMPLER_TABLE).unlink()
    assert sampler_table.read_sampler_table(folder) is None


def test_weights_are_known_in_every_layout(folder):
    today = sampler_table.unet_weights_sha256(folder)
    (folder / run_folder.UNET_WEIGHTS).rename(folder / "diffusion_pytorch_model.safetensors")
    assert sampler_table.unet_weights_sha256(folder) == today
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    parts = [folder / f"unet/diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    for part in parts:
        part.write_bytes(b"weights")
    both = sampler_table.unet_weights_sha256(folder)
    parts[1].write_bytes(b"others")
    assert len({today, both, sampler_table.unet_weights_sha256(folder)}) == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scheduler", "rm -rf"),
        ("scheduler", ["ddim"]),
        ("num_inference_steps", 0),
        ("num_inference_steps", "10"),
        ("num_inference_steps", True),
        ("seconds_per_image", 0),
        ("seconds_per_image", None),
        ("metrics", {}),
        ("metrics", {"fid": "low"}),
        ("metrics", 3),
        ("leaving_out", [1.0]),
        ("leaving_out", [1.0] * 9),
        ("leaving_out", ["a"] * 10),
        ("leaving_out", None),
        ("leaving_out", [1e200, -1e200] * 5),
        ("metrics", {"fid": 10**400}),
        ("num_inference_steps", 10**30),
    ],
)
def test_a_strangers_file_is_not_believed(folder, name, value):
    path = folder / run_folder.SAMPLER_TABLE
    good = run_folder.read_json(path)
    bad = copy.deepcopy(good)
    bad["entries"][1][name] = value
    run_folder.write_json(path, bad)
    with pytest.raises(UserError, match=r"samplers\.json is not as evaluate\.py --samplers writes"):
        sampler_table.read_sampler_table(folder)


@pytest.mark.parametrize(
    "facts", [[], {}, {"entries": []}, {"num_images": "many"}, {"num_images": -5}, {"model": {}}]
)
def test_a_file_of_something_else_is_told(folder, facts):
    path = folder / run_folder.SAMPLER_TABLE
    if isinstance(facts, dict) and facts:
        facts = {**run_folder.read_json(path), **facts}
    run_folder.write_json(path, facts)
    with pytest.raises(UserError, match="run that again, or move the file away"):
        sampler_table.read_sampler_table(folder)


def test_a_file_nested_without_end_is_told(folder):
    (folder / run_folder.SAMPLER_TABLE).write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        sampler_table.read_sampler_table(folder)


def test_rows_are_in_the_order_of_time_with_their_words(folder):
    rows = sampler_table.table_rows(sampler_table.read_sampler_table(folder))
    assert [row["scheduler"] for row in rows] == ["ddim", "unipc"]
    assert rows[0]["qualities"] == ["fast"] and rows[0]["is_worse"]
    assert rows[1]["qualities"] == ["good", "best"] and not rows[1]["is_worse"]
    assert rows[0]["distance_name"] == "frechet_distance" and rows[0]["metrics"]["recall"] == 0.25
