"""Image k from seed k, against stock diffusers.

Equality is exact where one program computes the same thing twice. A batch of another size may use
other kernels, so there a pixel may differ by one level of 255.
"""

import json
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler

from ddpm.data.transforms import to_pixels
from ddpm.diffusion.schedulers import SCHEDULERS, build_sampling_scheduler
from ddpm.errors import UserError
from ddpm.sampling import generate, pipeline

NAMES = list(SCHEDULERS)


@pytest.fixture
def folder(tmp_path, make_unet, chain):
    """A pipeline of 8x8 gray images, as training exports it."""
    pipeline.export_pipeline(make_unet(), chain, tmp_path / "model")
    return tmp_path / "model"


def images_of(unet, scheduler, seeds, batch_size=16) -> torch.Tensor:
    """The images of some seeds: [B, C, H, W] uint8."""
    images = list(generate.generate_images(unet, scheduler, seeds, batch_size))
    assert [seed for seed, _ in images] == list(seeds)
    return torch.stack([image for _, image in images])


def images_of_folder(folder, seeds, *, name="ddpm", steps=5) -> torch.Tensor:
    model = pipeline.load_model(str(folder))
    return images_of(
        model.unet, build_sampling_scheduler(name, model.scheduler_config, steps), seeds
    )


def differ_by_at_most_one_level(images: torch.Tensor, others: torch.Tensor) -> bool:
    return bool((images.int() - others.int()).abs().max() <= 1)


def test_stock_diffusers_draws_the_same_rgba_pixels(tmp_path, make_unet, chain):
    pipeline.export_pipeline(make_unet(channels=4), chain, tmp_path / "rgba")
    stock = DDPMPipeline.from_pretrained(tmp_path / "rgba")
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    pictures = stock(3, generators, num_inference_steps=5).images
    assert {picture.mode for picture in pictures} == {"RGBA"}
    images = images_of_folder(tmp_path / "rgba", range(3))
    assert np.array_equal(np.stack(pictures), images.permute(0, 2, 3, 1))


# Seeds


@pytest.mark.parametrize("name", NAMES)
def test_image_depends_only_on_its_seed(make_unet, chain, name):
    unet, scheduler = make_unet(), build_sampling_scheduler(name, chain.config, 5)
    torch.manual_seed(0)
    three = images_of(unet, scheduler, [7, 8, 9])
    torch.manual_seed(1)
    assert torch.equal(images_of(unet, scheduler, [7, 8, 9]), three)
    assert differ_by_at_most_one_level(images_of(unet, scheduler, [9, 7]), three[[2, 0]])
    assert not torch.equal(three[0], three[1])


def test_batch_size_changes_no_image(make_unet, chain):
    unet, scheduler = make_unet(), build_sampling_scheduler("ddpm", chain.config, 5)
    expected = images_of(unet, scheduler, range(5), batch_size=5)
    for batch_size in (1, 2, 100):
        images = images_of(unet, scheduler, range(5), batch_size)
        assert differ_by_at_most_one_level(images, expected)


def test_small_images_come_in_larger_batches(make_unet, chain):
    unet = make_unet()
    assert generate.default_batch_size(unet) == generate.SMALL_IMAGE_BATCH
    unet.register_to_config(sample_size=(32, 33))
    assert generate.default_batch_size(unet) == generate.BATCH


def test_no_seeds_give_no_images(make_unet, chain):
    scheduler = build_sampling_scheduler("ddim", chain.config, 2)
    assert list(generate.generate_images(make_unet(), scheduler, [], 4)) == []


def test_generating_leaves_no_gradients_and_the_global_generator(make_unet, chain):
    unet = make_unet()
    state = torch.get_rng_state()
    images_of(unet, build_sampling_scheduler("ddpm", chain.config, 5), [0])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in unet.parameters())


def schedules_and_steps() -> list:
    """Each scheduler with each schedule and each number of steps once; their product is slow."""
    cases = []
    for index, (name, schedule, steps) in enumerate(
        product(NAMES, ["scaled_linear", "squaredcos_cap_v2"], [1, 13])
    ):
        is_fast = index % 4 in (0, 3) if NAMES.index(name) % 2 else index % 4 in (1, 2)
        marks = () if is_fast else pytest.mark.slow
        cases.append(pytest.param(name, schedule, steps, marks=marks))
    return cases


@pytest.mark.parametrize(("name", "schedule", "steps"), schedules_and_steps())
def test_every_scheduler_samples_every_noise_schedule(make_unet, name, schedule, steps):
    config = DDPMScheduler(num_train_timesteps=20, beta_schedule=schedule).config
    scheduler = build_sampling_scheduler(name, config, steps)
    image = images_of(make_unet(channels=3), scheduler, [0])[0]
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert image.float().std() > 0


# Stock diffusers


def stock_images(pipe, seeds, **settings) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = pipe(batch_size=len(seeds), generator=generators, output_type="np", **settings)
    return torch.from_numpy((output.images * 255).round().astype("uint8")).permute(0, 3, 1, 2)


def test_ddpm_gives_the_pixels_of_stock_diffusers(folder):
    stock = DDPMPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    expected = stock(batch_size=3, generator=generators, num_inference_steps=7).images
    images = images_of_folder(folder, [3, 4, 5], steps=7)
    for image, reference in zip(images, expected, strict=True):
        assert np.array_equal(image[0].numpy(), np.array(reference))


@pytest.mark.parametrize("size", [(8, 12), (12, 8)])
def test_rectangles_have_the_pixels_of_stock_diffusers(tmp_path, make_unet, chain, size):
    pipeline.export_pipeline(make_unet(resolution=size, channels=3), chain, tmp_path)
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["sample_size"] == [*size]
    expected = stock_images(DDPMPipeline.from_pretrained(tmp_path), [3, 4], num_inference_steps=7)
    assert expected.shape == (2, 3, *size)
    assert torch.equal(images_of_folder(tmp_path, [3, 4], steps=7), expected)
    expected = stock_images(DDIMPipeline.from_pretrained(tmp_path), [3, 4], num_inference_steps=10)
    assert torch.equal(images_of_folder(tmp_path, [3, 4], name="ddim", steps=10), expected)


def test_ddim_gives_the_pixels_of_stock_diffusers(folder):
    expected = stock_images(DDIMPipeline.from_pretrained(folder), [3, 4, 5], num_inference_steps=10)
    assert torch.equal(images_of_folder(folder, [3, 4, 5], name="ddim", steps=10), expected)


def test_all_steps_give_the_pixels_of_stock_diffusers_whatever_its_spacing(tmp_path, make_unet):
    """All steps have one spacing: a model that was published with "leading" draws the same."""
    pipeline.export_pipeline(make_unet(channels=3), DDPMScheduler(num_train_timesteps=20), tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    expected = stock_images(stock, [5, 6], num_inference_steps=20)
    assert torch.equal(images_of_folder(tmp_path, [5, 6], steps=None), expected)


# Memory and precision


class LimitedUNet:
    """A UNet that runs out of memory above `max_batch_size` images, as CUDA reports it."""

    def __init__(self, unet, max_batch_size):
        self.unet, self.max_batch_size, self.batch_sizes = unet, max_batch_size, []
        self.config, self.device, self.dtype = unet.config, unet.device, unet.dtype

    def __call__(self, images, timestep):
        self.batch_sizes.append(len(images))
        if len(images) > self.max_batch_size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return self.unet(images, timestep)


def test_out_of_memory_halves_the_batch_and_reports_it(make_unet, chain, capsys):
    scheduler = build_sampling_scheduler("ddpm", chain.config, 2)
    limited = LimitedUNet(make_unet(), max_batch_size=3)
    images = images_of(limited, scheduler, range(10), batch_size=8)
    assert limited.batch_sizes[:3] == [8, 4, 2]
    assert max(limited.batch_sizes[3:]) == 2  # what did not fit is not tried again
    stderr = capsys.readouterr().err
    assert "Out of memory with 8 images at once: going on with 4." in stderr
    assert "Out of memory with 4 images at once: going on with 2." in stderr
    assert torch.equal(images, images_of(make_unet(), scheduler, range(10), batch_size=2))


def test_one_image_that_does_not_fit_is_an_error(make_unet, chain):
    scheduler = build_sampling_scheduler("ddpm", chain.config, 2)
    with pytest.raises(UserError, match="One image alone does not fit into memory"):
        images_of(LimitedUNet(make_unet(), max_batch_size=0), scheduler, [0])


def test_other_errors_of_the_model_are_raised(make_unet, chain):
    class Broken(LimitedUNet):
        def __call__(self, images, timestep):
            raise RuntimeError("shapes do not match")

    scheduler = build_sampling_scheduler("ddpm", chain.config, 2)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        images_of(Broken(make_unet(), 1), scheduler, [0])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if index % 4 in (0, 3) else pytest.mark.slow)
        for index, (name, dtype) in enumerate(product(NAMES, [torch.bfloat16, torch.float16]))
    ],
)
def test_only_the_model_computes_in_half_precision(make_unet, chain, name, dtype):
    """Noise and schedule stay float32, so the images are those of float32 but for the model's own
    rounding: a bfloat16 has 3 digits, with which the schedule would be another."""
    scheduler = build_sampling_scheduler(name, chain.config, 10)
    full = images_of(make_unet(), scheduler, [1, 2])
    half = images_of(make_unet().to(dtype=dtype), scheduler, [1, 2])
    assert half.dtype == torch.uint8
    assert (half.int() - full.int()).abs().float().mean() < 2
    assert full.float().std() > 20


# Interpolation and callbacks


def test_interpolation_goes_from_one_seed_to_the_other(make_unet, chain):
    unet, scheduler = make_unet(), build_sampling_scheduler("ddim", chain.config, 5)
    ends = images_of(unet, scheduler, [3, 9])
    images = dict(generate.interpolate_seeds(unet, scheduler, (3, 9), 5, range(5), 5))
    assert list(images) == [0, 1, 2, 3, 4]
    assert differ_by_at_most_one_level(images[0], ends[0])
    assert differ_by_at_most_one_level(images[4], ends[1])
    assert not differ_by_at_most_one_level(images[2], ends[0])
    ((_, alone),) = generate.interpolate_seeds(unet, scheduler, (3, 9), 5, [2], 1)
    assert differ_by_at_most_one_level(alone, images[2])


def test_interpolation_begins_with_the_first_seed_for_stochastic_schedulers(make_unet, chain):
    unet, scheduler = make_unet(), build_sampling_scheduler("ddpm", chain.config, 5)
    ((_, first),) = generate.interpolate_seeds(unet, scheduler, (3, 9), 4, [0], 1)
    assert torch.equal(first, images_of(unet, scheduler, [3])[0])


def test_slerp_by_hand():
    """Half way between orthogonal vectors both weigh sqrt(1/2), so the length is kept."""
    a, b = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
    half = generate.slerp(a, b, torch.tensor([0.5]))
    torch.testing.assert_close(half, torch.full((1, 1, 1, 2), 2**0.5))
    third = generate.slerp(a, b, torch.tensor([1 / 3]))
    torch.testing.assert_close(third, torch.tensor([[[[3**0.5, 1.0]]]]))
    same = generate.slerp(a, a, torch.tensor([0.3]))
    torch.testing.assert_close(same, a)


def test_callback_gets_the_initial_noise_first_and_the_image_last(make_unet, chain):
    unet, scheduler = make_unet(), build_sampling_scheduler("ddim", chain.config, 5)
    calls = []
    ((_, image),) = generate.generate_images(
        unet, scheduler, [4], 1, callback=lambda *arguments: calls.append(arguments)
    )
    assert [timestep for timestep, _, _ in calls] == [19, 15, 11, 7, 3]
    noise = generate.initial_noise(unet, [torch.Generator().manual_seed(4)])
    assert torch.equal(calls[0][1], noise)
    assert differ_by_at_most_one_level(to_pixels(calls[-1][2])[0], image)


@pytest.mark.slow
def test_compiled_model_draws_the_same(make_unet, chain):
    scheduler = build_sampling_scheduler("ddim", chain.config, 3)
    expected = images_of(make_unet(), scheduler, [0, 1, 2], 2)
    unet = make_unet()
    unet.compile()
    assert differ_by_at_most_one_level(images_of(unet, scheduler, [0, 1, 2], 2), expected)
