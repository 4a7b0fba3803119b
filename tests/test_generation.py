"""Image k from seed k, against stock diffusers.

Equality is exact where one program computes the same thing twice. A batch of another size may take
other kernels, so there a pixel may differ by one level of 255.
"""

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm import generation, pipeline, samplers
from ddpm.errors import UsageError

SAMPLERS = list(samplers.SAMPLERS)


@pytest.fixture
def folder(tmp_path, make_unet, chain):
    """A pipeline of 8x8 gray images, as training exports it."""
    pipeline.export(make_unet(), chain, tmp_path / "model")
    return tmp_path / "model"


def draw(artifact, seeds, *, sampler="ddpm", steps=5, batch_size=16) -> torch.Tensor:
    made, steps = samplers.build_sampler(sampler, artifact.scheduler_config, steps)
    drawn = list(generation.generate(artifact.unet, made, steps, seeds, batch_size))
    assert [seed for seed, _ in drawn] == list(seeds)
    return torch.stack([image for _, image in drawn])


def at_most_one_level_apart(images: torch.Tensor, others: torch.Tensor) -> bool:
    return bool((images.int() - others.int()).abs().max() <= 1)


# What is drawn


def test_same_generators_give_the_pixels_of_stock_diffusers(folder):
    stock = DDPMPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    expected = stock(batch_size=3, generator=generators, num_inference_steps=7).images
    drawn = draw(pipeline.load(str(folder)), [3, 4, 5], steps=7)
    for image, reference in zip(drawn, expected, strict=True):
        assert np.array_equal(image[0].numpy(), np.array(reference))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_depends_only_on_its_seed(folder, sampler):
    artifact = pipeline.load(str(folder))
    torch.manual_seed(0)
    three = draw(artifact, [7, 8, 9], sampler=sampler)
    torch.manual_seed(1)
    torch.rand(5)
    assert torch.equal(draw(artifact, [7, 8, 9], sampler=sampler), three)
    assert at_most_one_level_apart(draw(artifact, [8], sampler=sampler)[0], three[1])
    assert at_most_one_level_apart(draw(artifact, [9, 7], sampler=sampler), three[[2, 0]])
    assert not torch.equal(three[0], three[1])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batch_size_changes_no_image(folder, batch_size):
    artifact = pipeline.load(str(folder))
    drawn = draw(artifact, range(5), batch_size=batch_size)
    assert at_most_one_level_apart(drawn, draw(artifact, range(5), batch_size=5))


def test_no_seeds_no_images(folder):
    artifact = pipeline.load(str(folder))
    made, steps = samplers.build_sampler("ddim", artifact.scheduler_config, 2)
    assert list(generation.generate(artifact.unet, made, steps, [], 4)) == []


def test_generating_leaves_no_gradient_and_no_trace_in_the_global_generator(folder):
    artifact = pipeline.load(str(folder))
    before = torch.get_rng_state()
    draw(artifact, [0])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in artifact.unet.parameters())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_every_sampler_draws_on_every_schedule(make_unet, sampler, schedule, steps):
    config = DDPMScheduler(num_train_timesteps=20, beta_schedule=schedule).config
    made, steps = samplers.build_sampler(sampler, config, steps)
    ((_, image),) = generation.generate(make_unet(channels=3), made, steps, [0], 1)
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert image.float().std() > 0


def test_device_by_name():
    assert generation.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="--device nonsense cannot be used here"):
        generation.choose_device("nonsense")
    assert isinstance(generation.choose_device("auto"), torch.device)
