"""Text to image: a tiny Stable Diffusion with random weights, from the tests' own Hub.

What generates is slow: transformers and the pipeline take ten seconds to load.
"""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.config.parser import parse_sample
from ddpm.errors import UsageError, UserError
from ddpm.sampling import pipeline_folder, sampler, text_to_image
from tests.sampling.tiny_stable import files_of, make_stable

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    return make_stable(tmp_path_factory.mktemp("stable"))


@pytest.fixture
def described(tmp_path):
    """The settings of a Stable Diffusion, with files in the place of weights: nothing loads it."""
    folder = tmp_path / "described"
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    for name in ("unet", "vae"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        (folder / name / "diffusion_pytorch_model.safetensors").write_bytes(name.encode())
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def generate(folder, *flags, seeds=(0, 1)):
    """A sampler of a prompt in 2 steps, and its images [B, 3, H, W]; 16 x 16 without --image."""
    has_image = any(flag.startswith("--image") for flag in flags)
    size = [] if has_image else ["--height=16", "--width=16"]
    arguments = [str(folder), "--prompt=an apple", "--num_inference_steps=2", "--device=cpu"]
    loaded = sampler.load_sampler(parse_sample([*arguments, *size, *flags]))
    images = list(loaded.generate(seeds))
    assert [seed for seed, _ in images] == list(seeds)
    return loaded, torch.stack([image for _, image in images])


@pytest.fixture(scope="module")
def apples(stable):
    """The images of the default settings."""
    return generate(stable)[1]


@pytest.mark.slow
def test_prompt_gives_the_pixels_of_stock_diffusers(stable):
    from diffusers import StableDiffusionPipeline

    loaded, images = generate(stable, "--guidance_scale=3", "--negative_prompt=pear")
    pipe = StableDiffusionPipeline.from_pretrained(stable, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for seed, image in enumerate(images):
        expected = pipe(
            "an apple",
            negative_prompt="pear",
            guidance_scale=3,
            height=16,
            width=16,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        pixels = image.permute(1, 2, 0).numpy().astype(int)
        assert np.abs(pixels - np.asarray(expected)).max() <= 1
    assert loaded.metadata["prompt"] == "an apple"
    assert loaded.metadata["scheduler"] == "PNDMScheduler"
    assert loaded.metadata["guidance_scale"] == "3.0"


@pytest.mark.slow
def test_image_depends_on_its_seed_and_its_prompt(stable, apples):
    _, one = generate(stable, seeds=[1])
    assert (one[0].int() - apples[1].int()).abs().max() <= 1
    assert not torch.equal(apples[0], apples[1])
    _, other = generate(stable, "--prompt=a pear", "--guidance_scale=9")
    assert not torch.equal(other, apples)


@pytest.mark.slow
def test_default_number_of_steps_is_recorded(stable):
    config = parse_sample([str(stable), "--prompt=x", "--device=cpu"])
    assert sampler.load_sampler(config).metadata["num_inference_steps"] == "50"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpmsolver++", "ddim", "euler", "pndm", "unipc"])
def test_another_scheduler_can_be_chosen(stable, name):
    loaded, images = generate(stable, f"--scheduler={name}")
    assert loaded.metadata["scheduler"] == name
    assert images.shape == (2, 3, 16, 16) and images.float().std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_gives_similar_images(stable, apples, dtype):
    loaded, images = generate(stable, f"--dtype={dtype}")
    assert images.dtype == torch.uint8 and loaded.metadata["dtype"] == dtype
    assert (images.int() - apples.int()).abs().float().mean() < 4


@pytest.mark.slow
def test_image_and_prompt_give_an_image(stable, tmp_path):
    """Its size is that of the image, cropped to what the encoder halves, unless one is given."""
    pixels = np.random.default_rng(0).integers(0, 256, (19, 25, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    image = f"--image={tmp_path / 'start.png'}"
    loaded, images = generate(stable, image, "--strength=0.5", "--num_inference_steps=4")
    assert images.shape == (2, 3, 18, 24)  # this encoder halves once
    assert len(loaded.metadata["image_sha256"]) == 64
    _, sized = generate(stable, image, "--height=8", "--width=16", "--strength=1")
    assert sized.shape == (2, 3, 8, 16)
    _, weaker = generate(stable, image, "--height=8", "--width=16", "--strength=0.5")
    assert not torch.equal(sized, weaker)


EXTRAS = {
    "unet/diffusion_pytorch_model.bin": b"code",
    "unet/model.py": b"print(1)",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half",
    "big.ckpt": b"code",
    "768-v-ema.safetensors": b"5 GB",
}


def test_pickles_and_code_are_not_downloaded(hub, described):
    files = files_of(described)
    hub.create_repo("model", "bob/described").write({**files, **EXTRAS}, "all")
    assert files_of(pipeline_folder.find_pipeline("bob/described").folder) == files


@pytest.mark.slow
def test_a_model_on_the_hub_gives_the_same_images(hub, stable, apples):
    files = files_of(stable)
    commit = hub.create_repo("model", "bob/stable").write({**files, **EXTRAS}, "all")
    loaded, images = generate("bob/stable")
    assert loaded.metadata["version"] == commit
    assert torch.equal(images, apples)
    downloaded = set(files_of(pipeline_folder.find_pipeline("bob/stable").folder))
    assert downloaded == {name for name in files if name != "README.md"}


def test_prompt_for_an_unconditional_model_is_refused(run_folder):
    with pytest.raises(UsageError, match="is a DDPMPipeline: it draws without words. Leave out"):
        sampler.load_sampler(parse_sample([str(run_folder), "--prompt=an apple"]))


def test_text_to_image_without_a_prompt_is_refused(described):
    with pytest.raises(UserError, match="StableDiffusionPipeline .* except for --prompt"):
        sampler.load_sampler(parse_sample([str(described)]))


def test_missing_transformers_is_an_error_with_advice(described, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install -r requirements-prompt.txt"):
        generate(described)


def test_pickled_weights_and_code_of_the_repository_are_refused(described):
    folder = described
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="only diffusion_pytorch_model.bin in vae/"):
        generate(folder)
    weights.with_suffix(".bin").rename(weights)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["mine", "MyUNet"]}))
    with pytest.raises(UserError, match=r'wants code of its own \(\["mine", "MyUNet"\]'):
        generate(folder)


@pytest.mark.slow
def test_settings_that_the_pipeline_refuses_are_an_error(stable):
    with pytest.raises(UserError, match="StableDiffusionPipeline refuses these settings"):
        generate(stable, "--height=17")


@pytest.mark.slow
def test_out_of_memory_halves_the_batch(stable, capsys):
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
        pipeline_folder.find_pipeline(str(stable)), config, torch.float32
    )
    call = type(pipe).__call__

    class Limited(type(pipe)):
        def __call__(self, *args, **settings):
            if len(settings["generator"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return call(self, *args, **settings)

    pipe.__class__ = Limited
    seeds = [seed for seed, _ in text_to_image.generate_from_prompt(pipe, config, range(5))]
    assert seeds == list(range(5))
    assert "Out of memory with 5 images at once: going on with 2." in capsys.readouterr().err
