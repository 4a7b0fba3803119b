"""Proof images: the same pixels from the same files, and an error when they are not."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm import file_io, run_folder
from ddpm.errors import UsageError, UserError
from ddpm.sampling import pipeline, proof


@pytest.fixture
def folder(make_unet, chain, tmp_path):
    """An exported pipeline with the proof that training writes."""
    unet, folder = make_unet(), tmp_path / "model"
    pipeline.export_pipeline(unet, chain, folder)
    proof.write_proof(folder, unet, chain)
    return folder


def test_proof_images_are_those_of_stock_ddim(folder, make_unet, chain):
    """With generators of the same seeds."""
    from diffusers import DDIMPipeline

    stock = DDIMPipeline.from_pretrained(folder, use_safetensors=True)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in proof.SEEDS]
    images = stock(
        batch_size=2, generator=generators, num_inference_steps=proof.STEPS, output_type="np"
    ).images
    expected = (images[..., 0] * 255).round().astype(np.uint8)
    for seed, image in zip(proof.SEEDS, expected, strict=True):
        with Image.open(folder / proof.proof_image_name(seed)) as stored:
            assert np.array_equal(np.asarray(stored), image)
    value = json.loads((folder / "proof.json").read_text())
    assert value["pixels_sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert (value["scheduler"], value["num_inference_steps"]) == ("ddim", 10)
    assert value["seeds"] == [0, 1]


def test_same_machine_gives_the_same_bits(folder):
    result = proof.verify_model(str(folder))
    assert result.difference == 0 and result.num_images == 2
    assert result.version == file_io.file_sha256(folder / run_folder.UNET_WEIGHTS)


def test_proof_is_of_the_weights_in_memory(make_unet, chain, tmp_path):
    """A faulty export is found, since the proof was not made from the exported file."""
    unet, other, folder = make_unet(), make_unet(seed=1), tmp_path / "model"
    pipeline.export_pipeline(other, chain, folder)
    proof.write_proof(folder, unet, chain)
    with pytest.raises(UserError, match="draws other images than its proof"):
        proof.verify_model(str(folder))


def test_changed_weight_is_an_error(folder):
    weights = load_file(folder / run_folder.UNET_WEIGHTS)
    weights["conv_out.bias"] += 0.05
    save_file(weights, folder / run_folder.UNET_WEIGHTS)
    with pytest.raises(UserError, match=r"largest difference of a pixel is \d+ of 255"):
        proof.verify_model(str(folder))


@pytest.mark.parametrize("off", [1, proof.TOLERANCE, proof.TOLERANCE + 1])
def test_rounding_is_allowed_up_to_the_tolerance(folder, monkeypatch, off):
    real = proof.draw_proof_images
    monkeypatch.setattr(
        proof, "draw_proof_images", lambda *args: (real(*args).int() - off).abs().byte()
    )
    if off > proof.TOLERANCE:
        with pytest.raises(UserError, match=f"{off} of 255, and rounding explains"):
            proof.verify_model(str(folder))
    else:
        assert proof.verify_model(str(folder)).difference == off


def test_changed_or_missing_image_is_an_error(folder):
    Image.new("L", (8, 8)).save(folder / proof.proof_image_name(1))
    with pytest.raises(UserError, match="are not those of proof.json"):
        proof.verify_model(str(folder))
    (folder / proof.proof_image_name(1)).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        proof.verify_model(str(folder))


def test_model_without_a_proof_is_an_error(folder):
    (folder / "proof.json").unlink()
    with pytest.raises(UserError, match="has no proof.json, so there is nothing to compare"):
        proof.verify_model(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": ["../../secret"]},
        {"seeds": []},
        {"seeds": [0] * 17},
        {"seeds": [-1]},
        {"seeds": None},
        {"scheduler": "eval"},
        {"num_inference_steps": "10"},
        {"num_inference_steps": True},
        {"pixels_sha256": 3},
        {"files": ["unet"]},
        {"files": {"unet": None}},
        {"versions": None},
    ],
    ids=str,
)
def test_bad_foreign_proof_is_refused(folder, change):
    value = json.loads((folder / "proof.json").read_text())
    (folder / "proof.json").write_text(json.dumps({**value, **change}))
    with pytest.raises(UserError, match="proof.json: "):
        proof.verify_model(str(folder))


def test_proof_with_more_steps_than_the_model_is_an_error(folder):
    value = json.loads((folder / "proof.json").read_text())
    (folder / "proof.json").write_text(json.dumps({**value, "num_inference_steps": 900}))
    with pytest.raises(UserError, match="does not belong to this model"):
        proof.verify_model(str(folder))


def test_short_noise_schedule_has_fewer_steps(make_unet, tmp_path):
    from diffusers import DDPMScheduler

    unet, scheduler = make_unet(), DDPMScheduler(num_train_timesteps=4)
    pipeline.export_pipeline(unet, scheduler, tmp_path / "model")
    assert proof.write_proof(tmp_path / "model", unet, scheduler).num_inference_steps == 4


# From the Hub


def put_on_hub(hub, folder, repo_id, **change):
    files = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    return hub.create_repo("model", repo_id).write({**files, **change}, "all")


def test_model_on_the_hub_is_verified_by_its_commit(hub, folder):
    commit = put_on_hub(hub, folder, "alice/verified")
    result = proof.verify_model("alice/verified", commit)
    assert result.difference == 0 and result.version == commit
    with pytest.raises(UsageError, match="is a folder here"):
        proof.verify_model(str(folder), "main")
    with pytest.raises(UserError, match="neither a folder here nor the id"):
        proof.verify_model("./nowhere")


def test_model_changed_on_the_hub_is_an_error(hub, folder, tmp_path):
    weights = load_file(folder / run_folder.UNET_WEIGHTS)
    weights["conv_out.bias"] += 0.05
    save_file(weights, tmp_path / "other")
    change = {run_folder.UNET_WEIGHTS: (tmp_path / "other").read_bytes()}
    put_on_hub(hub, folder, "alice/changed", **change)
    with pytest.raises(UserError, match="alice/changed draws other images than its proof"):
        proof.verify_model("alice/changed")


@pytest.mark.slow
def test_sample_verify_prints_the_largest_difference(hub, folder, script, tmp_path):
    commit = put_on_hub(hub, folder, "alice/by-command")
    done = script("sample.py", "alice/by-command", "--verify", cwd=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"alice/by-command at {commit[:12]}: 2 proof images drawn again on the CPU; "
        "largest difference of a pixel 0 of 255.\n"
    )
    Image.new("L", (8, 8)).save(folder / proof.proof_image_name(1))
    done = script("sample.py", folder, "--verify")
    assert done.returncode == 1 and done.stderr.startswith("error: ")
