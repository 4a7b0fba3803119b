"""Image k from seed k, against stock diffusers.

Equality is exact where one program computes the same thing twice. A batch of another size may take
other kernels, so there a pixel may differ by one level of 255.
"""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler

from ddpm.data import transforms
from ddpm.diffusion import schedulers
from ddpm.errors import UserError
from ddpm.sampling import generate, pipeline

SAMPLERS = list(schedulers.SCHEDULERS)


@pytest.fixture
def folder(tmp_path, make_unet, chain):
    """A pipeline of 8x8 gray images, as training exports it."""
    pipeline.export_pipeline(make_unet(), chain, tmp_path / "model")
    return tmp_path / "model"


def draw(artifact, seeds, *, sampler="ddpm", steps=5, batch_size=16) -> torch.Tensor:
    scheduler = schedulers.build_sampling_scheduler(sampler, artifact.scheduler_config, steps)
    drawn = list(generate.generate_images(artifact.unet, scheduler, seeds, batch_size))
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
    drawn = draw(pipeline.load_model(str(folder)), [3, 4, 5], steps=7)
    for image, reference in zip(drawn, expected, strict=True):
        assert np.array_equal(image[0].numpy(), np.array(reference))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_depends_only_on_its_seed(folder, sampler):
    artifact = pipeline.load_model(str(folder))
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
    artifact = pipeline.load_model(str(folder))
    drawn = draw(artifact, range(5), batch_size=batch_size)
    assert at_most_one_level_apart(drawn, draw(artifact, range(5), batch_size=5))


def test_no_seeds_no_images(folder):
    artifact = pipeline.load_model(str(folder))
    scheduler = schedulers.build_sampling_scheduler("ddim", artifact.scheduler_config, 2)
    assert list(generate.generate_images(artifact.unet, scheduler, [], 4)) == []


def test_generating_leaves_no_gradient_and_no_trace_in_the_global_generator(folder):
    artifact = pipeline.load_model(str(folder))
    before = torch.get_rng_state()
    draw(artifact, [0])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in artifact.unet.parameters())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [1, 13])
def test_every_sampler_draws_on_every_schedule(make_unet, sampler, schedule, steps):
    config = DDPMScheduler(num_train_timesteps=20, beta_schedule=schedule).config
    scheduler = schedulers.build_sampling_scheduler(sampler, config, steps)
    ((_, image),) = generate.generate_images(make_unet(channels=3), scheduler, [0], 1)
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert image.float().std() > 0


# The whole chain, other pipelines, memory, precision


def stock_images(pipe, seeds, **settings) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = pipe(batch_size=len(seeds), generator=generators, output_type="np", **settings).images
    return torch.from_numpy((drawn * 255).round().astype("uint8")).permute(0, 3, 1, 2)


def test_whole_chain_is_stock_diffusers_whatever_its_spacing(tmp_path, make_unet):
    """With all steps there is one spacing: a model published with "leading" draws the same."""
    pipeline.export_pipeline(make_unet(channels=3), DDPMScheduler(num_train_timesteps=20), tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    expected = stock_images(stock, [5, 6], num_inference_steps=20)
    assert torch.equal(draw(pipeline.load_model(str(tmp_path)), [5, 6], steps=None), expected)


def test_ddim_gives_the_pixels_of_stock_diffusers(folder):
    stock = DDIMPipeline.from_pretrained(folder)
    expected = stock_images(stock, [3, 4, 5], num_inference_steps=10)
    drawn = draw(pipeline.load_model(str(folder)), [3, 4, 5], sampler="ddim", steps=10)
    assert torch.equal(drawn, expected)


class Crowded:
    """A UNet that runs out of memory above `most` images, as CUDA says it."""

    def __init__(self, unet, most):
        self.unet, self.most, self.asked = unet, most, []
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype

    def __call__(self, images, timestep):
        self.asked.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return self.unet(images, timestep)


def test_out_of_memory_halves_the_batch_and_says_so(make_unet, chain, capsys):
    scheduler = schedulers.build_sampling_scheduler("ddpm", chain.config, 2)
    crowded = Crowded(make_unet(), most=3)
    drawn = dict(generate.generate_images(crowded, scheduler, range(10), 8))
    assert crowded.asked[:3] == [8, 4, 2]
    assert max(crowded.asked[3:]) == 2  # what did not fit is not tried again
    said = capsys.readouterr().err
    assert "Out of memory with 8 images at once: going on with 4." in said
    assert "Out of memory with 4 images at once: going on with 2." in said
    plain = dict(generate.generate_images(make_unet(), scheduler, range(10), 2))
    assert list(drawn) == list(range(10))
    assert all(torch.equal(drawn[seed], plain[seed]) for seed in drawn)


def test_one_image_too_many_is_one_sentence(make_unet, chain):
    scheduler = schedulers.build_sampling_scheduler("ddpm", chain.config, 2)
    with pytest.raises(UserError, match="One image alone does not fit into memory"):
        list(generate.generate_images(Crowded(make_unet(), most=0), scheduler, [0], 4))


def test_other_errors_of_the_model_are_not_taken_for_memory(make_unet, chain):
    class Broken(Crowded):
        def __call__(self, images, timestep):
            raise RuntimeError("shapes do not match")

    scheduler = schedulers.build_sampling_scheduler("ddpm", chain.config, 2)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(generate.generate_images(Broken(make_unet(), 1), scheduler, [0], 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_is_of_the_model_alone(make_unet, chain, name, dtype):
    """Noise and schedule stay float32, so the images are those of float32 but for the model's own
    rounding: a bfloat16 has 3 digits, and the schedule in it would not."""
    scheduler = schedulers.build_sampling_scheduler(name, chain.config, 10)
    whole = torch.stack([i for _, i in generate.generate_images(make_unet(), scheduler, [1, 2], 2)])
    halved = make_unet().to(dtype=dtype)
    half = torch.stack([i for _, i in generate.generate_images(halved, scheduler, [1, 2], 2)])
    assert half.dtype == torch.uint8
    assert (half.int() - whole.int()).abs().float().mean() < 2
    assert whole.float().std() > 20


# On the way


def test_interpolation_runs_from_one_seed_to_the_other(make_unet, chain):
    scheduler = schedulers.build_sampling_scheduler("ddim", chain.config, 5)
    unet = make_unet()
    ends = [image for _, image in generate.generate_images(unet, scheduler, [3, 9], 2)]
    way = list(generate.interpolate_seeds(unet, scheduler, (3, 9), 5, range(5), 5))
    assert [k for k, _ in way] == [0, 1, 2, 3, 4]
    assert at_most_one_level_apart(way[0][1], ends[0])
    assert at_most_one_level_apart(way[-1][1], ends[1])
    assert not at_most_one_level_apart(way[2][1], ends[0])
    ((_, alone),) = generate.interpolate_seeds(unet, scheduler, (3, 9), 5, [2], 1)
    assert at_most_one_level_apart(alone, way[2][1])


def test_first_image_on_the_way_is_the_first_seeds_also_with_noise_at_the_steps(make_unet, chain):
    scheduler = schedulers.build_sampling_scheduler("ddpm", chain.config, 5)
    unet = make_unet()
    ((_, end),) = generate.generate_images(unet, scheduler, [3], 1)
    ((_, first),) = generate.interpolate_seeds(unet, scheduler, (3, 9), 4, [0], 1)
    assert torch.equal(first, end)


def test_slerp_by_hand():
    """Half way between right angles: both parts weigh sqrt(1/2), so the length is kept."""
    a, b = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
    half = generate.slerp(a, b, torch.tensor([0.5]))
    torch.testing.assert_close(half, torch.full((1, 1, 1, 2), 2**0.5))
    third = generate.slerp(a, b, torch.tensor([1 / 3]))
    torch.testing.assert_close(third, torch.tensor([[[[3**0.5, 1.0]]]]))
    same = generate.slerp(a, a, torch.tensor([0.3]))
    torch.testing.assert_close(same, a)


def test_watcher_sees_noise_first_and_the_last_prediction_is_the_image(make_unet, chain):
    scheduler = schedulers.build_sampling_scheduler("ddim", chain.config, 5)
    seen = []
    unet = make_unet()
    ((_, image),) = generate.generate_images(
        unet, scheduler, [4], 1, callback=lambda *step: seen.append(step)
    )
    assert [timestep for timestep, _, _ in seen] == [19, 15, 11, 7, 3]
    noise = generate.initial_noise(unet, [torch.Generator().manual_seed(4)])
    assert torch.equal(seen[0][1], noise)
    assert at_most_one_level_apart(transforms.to_pixels(seen[-1][2])[0], image)


@pytest.mark.slow
def test_compiled_model_draws_the_same(make_unet, chain):
    scheduler = schedulers.build_sampling_scheduler("ddim", chain.config, 3)
    plain = torch.stack(
        [i for _, i in generate.generate_images(make_unet(), scheduler, [0, 1, 2], 2)]
    )
    unet = make_unet()
    unet.compile()
    compiled = [image for _, image in generate.generate_images(unet, scheduler, [0, 1, 2], 2)]
    assert at_most_one_level_apart(torch.stack(compiled), plain)
