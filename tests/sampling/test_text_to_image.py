"""Pictures from words: a tiny Stable Diffusion with random weights, from the tests' own Hub."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.config.parser import parse_sample
from ddpm.errors import UsageError, UserError
from ddpm.sampling import pipeline, sampler, text_to_image
from tests.sampling.tiny_stable import make_stable

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    return make_stable(tmp_path_factory.mktemp("stable"))


def paint(folder, *flags, seeds=(0, 1)):
    words = ["--num_inference_steps=2", "--height=16", "--width=16", "--device=cpu"]
    if any(flag.startswith("--image") for flag in flags):
        words = [words[0], words[3]]
    config = parse_sample([str(folder), "--prompt=an apple", *words, *flags])
    loaded = sampler.load_sampler(config)
    drawn = list(loaded.generate(seeds))
    assert [seed for seed, _ in drawn] == list(seeds)
    return loaded, torch.stack([image for _, image in drawn])


def test_words_become_the_pixels_of_stock_diffusers(stable):
    from diffusers import StableDiffusionPipeline

    loaded, drawn = paint(stable, "--guidance_scale=3", "--negative_prompt=pear")
    pipe = StableDiffusionPipeline.from_pretrained(stable, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for seed, image in enumerate(drawn):
        expected = pipe(
            "an apple",
            negative_prompt="pear",
            guidance_scale=3,
            height=16,
            width=16,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        found = image.permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - np.asarray(expected)).max() <= 1
    assert loaded.metadata["prompt"] == "an apple"
    assert loaded.metadata["scheduler"] == "PNDMScheduler"
    assert loaded.metadata["guidance_scale"] == "3.0"


def test_picture_depends_on_its_seed_and_its_words(stable):
    _, two = paint(stable)
    _, one = paint(stable, seeds=[1])
    assert (one[0].int() - two[1].int()).abs().max() <= 1
    assert not torch.equal(two[0], two[1])
    _, other = paint(stable, "--prompt=a pear", "--guidance_scale=9")
    assert not torch.equal(other, two)


def test_default_number_of_steps_is_the_pipelines_own_and_said(stable):
    config = parse_sample([str(stable), "--prompt=x", "--device=cpu"])
    assert sampler.load_sampler(config).origin["num_inference_steps"] == "50"


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "euler", "pndm", "unipc"])
def test_another_scheduler_can_be_asked_for(stable, name):
    loaded, drawn = paint(stable, f"--scheduler={name}")
    assert loaded.metadata["scheduler"] == name
    assert drawn.shape == (2, 3, 16, 16) and drawn.float().std() > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_gives_pictures(stable, dtype):
    _, whole = paint(stable)
    loaded, half = paint(stable, f"--dtype={dtype}")
    assert half.dtype == torch.uint8 and loaded.metadata["dtype"] == dtype
    assert (half.int() - whole.int()).abs().float().mean() < 4


def test_picture_and_words_become_a_picture(stable, tmp_path):
    """A little strength leaves more of the picture than much; its size is kept, cut to what the
    encoder halves."""
    noise = np.random.default_rng(0).integers(0, 256, (19, 25, 4), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "start.png")
    image = f"--image={tmp_path / 'start.png'}"
    loaded, drawn = paint(stable, image, "--strength=0.5", "--num_inference_steps=4")
    assert drawn.shape == (2, 3, 18, 24)  # this encoder halves once
    assert len(loaded.metadata["image_sha256"]) == 64
    _, more = paint(stable, image, "--strength=1", "--num_inference_steps=4")
    assert not torch.equal(drawn, more)
    _, sized = paint(stable, image, "--height=8", "--width=16", "--strength=1")
    assert sized.shape == (2, 3, 8, 16)


def test_from_the_hub_come_no_pickles_and_no_code(hub, stable, tmp_path, monkeypatch):
    files = {
        path.relative_to(stable).as_posix(): path.read_bytes()
        for path in stable.rglob("*")
        if path.is_file()
    }
    extras = {
        "unet/diffusion_pytorch_model.bin": b"code",
        "unet/model.py": b"print(1)",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
        "big.ckpt": b"code",
        "768-v-ema.safetensors": b"5 GB",
    }
    commit = hub.create_repo("model", "bob/stable").write({**files, **extras}, "all")
    hub.clear_requests()
    loaded, drawn = paint("bob/stable")
    assert loaded.metadata["version"] == commit
    assert torch.equal(drawn, paint(stable)[1])
    found = pipeline.find_pipeline("bob/stable")
    here = {
        path.relative_to(found.folder).as_posix()
        for path in found.folder.rglob("*")
        if path.is_file()
    }
    assert here == {name for name in files if name != "README.md"}


def test_words_for_a_model_without_words(run_folder):
    with pytest.raises(UsageError, match="is a DDPMPipeline: it draws without words. Leave out"):
        sampler.load_sampler(parse_sample([str(run_folder), "--prompt=an apple"]))


def test_no_words_for_a_model_that_needs_them(stable):
    with pytest.raises(UserError, match="StableDiffusionPipeline .* without --prompt it draws"):
        sampler.load_sampler(parse_sample([str(stable)]))


def test_missing_transformers_is_one_sentence(stable, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install -r requirements-prompt.txt"):
        paint(stable)


def test_pickles_only_and_own_code_are_refused(stable, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(stable, folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="only diffusion_pytorch_model.bin in vae/"):
        paint(folder)
    weights.with_suffix(".bin").rename(weights)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["mine", "MyUNet"]}))
    with pytest.raises(UserError, match=r'wants code of its own \(\["mine", "MyUNet"\]'):
        paint(folder)


def test_settings_the_pipeline_refuses_are_one_sentence(stable):
    with pytest.raises(UserError, match="StableDiffusionPipeline refuses these settings"):
        paint(stable, "--height=17")


def test_out_of_memory_halves_the_batch_here_too(stable, capsys):
    config = parse_sample(
        [
            str(stable),
            "--prompt=x",
            "--num_inference_steps=1",
            "--height=16",
            "--width=16",
            "--device=cpu",
        ]
    )
    pipe = text_to_image.load_text_to_image(
        pipeline.find_pipeline(str(stable)), config, torch.float32
    )
    whole = type(pipe).__call__

    class Crowded(type(pipe)):
        def __call__(self, *args, **settings):
            if len(settings["generator"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return whole(self, *args, **settings)

    pipe.__class__ = Crowded
    drawn = [seed for seed, _ in text_to_image.generate_from_prompt(pipe, config, range(5))]
    assert drawn == list(range(5))
    assert "Out of memory with 5 images at once: going on with 2." in capsys.readouterr().err
