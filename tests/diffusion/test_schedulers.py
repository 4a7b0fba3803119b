"""The table of schedulers, against a model that is known in closed form.

The analytic denoiser is exact for a mixture of three Gaussians on two pixels, so the images of an
ODE solver have one right answer, and those of an SDE solver one right distribution.
"""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from ddpm.diffusion.schedulers import (
    SCHEDULERS,
    build_sampling_scheduler,
    evenly_dividing_steps,
)
from ddpm.errors import UsageError
from ddpm.sampling import generate

NAMES = list(SCHEDULERS)
STOCHASTIC = ["ddpm", "dpmsolver-sde", "euler-ancestral"]  # they add noise in their steps
ODE = [name for name in NAMES if name not in STOCHASTIC]
SCHEDULES = ["linear", "squaredcos_cap_v2"]
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
MODES = torch.tensor([[-0.7, -0.2], [0.6, 0.1], [0.0, 0.75]], dtype=torch.float64)
STD = 0.1


def each_name_once(names: list[str], options: list[str]) -> list:
    """The product of names and options; the fast tests take each name with one option in turn."""
    return [
        pytest.param(
            name,
            option,
            marks=() if option == options[names.index(name) % len(options)] else pytest.mark.slow,
        )
        for name, option in product(names, options)
    ]


class Mixture:
    """The optimal UNet for data from a mixture of Gaussians with means MODES and deviation STD."""

    config = SimpleNamespace(in_channels=1, sample_size=(1, 2))
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, trained: DDPMScheduler, gain: float = 1.0):
        self.alphas_cumprod = trained.alphas_cumprod.double()
        self.prediction_type = trained.config.prediction_type
        self.gain = gain
        self.inputs: list[torch.Tensor] = []

    def __call__(self, images, timestep):
        self.inputs.append(images)
        abar = self.alphas_cumprod[int(timestep)]
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        pixels = images.double().flatten(1)
        offsets = pixels[:, None] - signal * MODES
        variance = abar * STD**2 + 1 - abar
        weights = torch.softmax(-offsets.square().sum(-1) / (2 * variance), dim=1)
        noise = sigma * (weights[..., None] * offsets).sum(1) / variance  # -sigma x score
        original = (pixels - sigma * noise) / signal
        prediction = {
            "epsilon": noise,
            "v_prediction": signal * noise - sigma * original,
            "sample": original,
        }[self.prediction_type]
        return SimpleNamespace(sample=self.gain * prediction.view_as(images).float())


def sample(name, steps, trained, num_images=32):
    """Images of the mixture by a scheduler: [num_images, 1, 1, 2]."""
    scheduler = build_sampling_scheduler(name, trained.config, steps)
    return denoise(Mixture(trained), scheduler, num_images)


def denoise(unet, scheduler, num_images=32, **options):
    generators = [torch.Generator().manual_seed(seed) for seed in range(num_images)]
    noise = generate.initial_noise(unet, generators)

    def predict(noisy, timestep):
        return unet(noisy, timestep).sample

    return generate.denoise(predict, scheduler, noise, generators, **options)


@pytest.fixture(scope="module")
def reference():
    """The images of DDIM with all 1000 steps on a schedule."""
    images = {}

    def of_schedule(schedule: str) -> torch.Tensor:
        if schedule not in images:
            images[schedule] = sample("ddim", 1000, DDPMScheduler(beta_schedule=schedule))
        return images[schedule]

    return of_schedule


def distance(images, others):
    """The median over images of the largest difference of a pixel; pixels are in [-1, 1]."""
    return float((images - others).abs().flatten(1).max(1).values.median())


@pytest.mark.parametrize(("name", "schedule"), each_name_once(ODE, SCHEDULES))
def test_ode_solvers_converge_to_ddim_with_many_steps(name, schedule, reference):
    """Within 0.03 of [-1, 1] at 50 steps and 0.006 at 200: less than a level of 255 is 0.0078."""
    trained = DDPMScheduler(beta_schedule=schedule)
    at_50, at_200 = (distance(sample(name, n, trained), reference(schedule)) for n in (50, 200))
    assert at_200 < 0.006
    assert at_50 < 0.03
    assert at_200 < at_50 or at_200 < 0.003


@pytest.mark.parametrize("name", STOCHASTIC)
def test_sde_solvers_draw_from_the_distribution(name):
    """A third of 300 images at each mode, within 4 sigma, and as wide as the data."""
    images = sample(name, 100, DDPMScheduler(), num_images=300).double().flatten(1)
    nearest = torch.cdist(images, MODES).argmin(1)
    for mode in range(3):
        of_mode = images[nearest == mode]
        assert len(of_mode) / 300 == pytest.approx(1 / 3, abs=4 * (2 / 9 / 300) ** 0.5)
        assert of_mode.std(dim=0).tolist() == pytest.approx([STD, STD], rel=0.25)
        assert (of_mode.mean(0) - MODES[mode]).abs().max() < 0.04


@pytest.mark.parametrize("name", NAMES)
def test_prediction_type_does_not_change_the_images(name):
    """Also for solvers that support one prediction type only."""
    first, *others = (
        sample(name, 20, DDPMScheduler(prediction_type=prediction_type), num_images=8)
        for prediction_type in PREDICTION_TYPES
    )
    for other in others:
        torch.testing.assert_close(other, first, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ODE)
def test_first_input_of_the_model_is_the_initial_noise(name):
    """Also for schedulers that keep x_t in other units."""
    trained = DDPMScheduler(num_train_timesteps=20)  # ends with much signal, so units matter
    unet = Mixture(trained)
    denoise(unet, build_sampling_scheduler(name, trained.config, 5), 2)
    noise = [torch.randn(1, 1, 1, 2, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    torch.testing.assert_close(unet.inputs[0], torch.cat(noise))


@pytest.mark.parametrize(("name", "prediction_type"), each_name_once(NAMES, PREDICTION_TYPES))
def test_predicted_image_stays_in_range(name, prediction_type):
    """With predictions ten times too large, clipping holds at every step, if it is on."""
    for limit in (1.0, 2.0, None):
        trained = DDPMScheduler(
            20,
            beta_schedule="squaredcos_cap_v2",
            prediction_type=prediction_type,
            clip_sample=limit is not None,
            clip_sample_range=limit or 1.0,
        )
        scheduler = build_sampling_scheduler(name, trained.config, 10)
        assert scheduler.clip_range == limit
        originals: list[torch.Tensor] = []
        images = denoise(
            Mixture(trained, gain=10.0),
            scheduler,
            4,
            callback=lambda *step, originals=originals: originals.append(step[2]),
        )
        in_range = float(torch.stack(originals).abs().max()) <= (limit or 1.0)
        assert in_range == (limit is not None)
        if name not in ("pndm", "deis"):  # their last step does not end exactly at x_0
            in_range = float(images.abs().max()) <= (limit or 1.0) + 1e-3
            assert in_range == (limit is not None)


@pytest.mark.parametrize("name", NAMES)
def test_noise_schedule_is_the_one_of_training(name):
    """A config object lists which values are defaults, and from_config replaces those by the other
    class's: HeunDiscreteScheduler would start its betas at 0.00085 instead of 0.0001."""
    trained = DDPMScheduler()
    from_file = {k: v for k, v in trained.config.items() if k != "_use_default_values"}
    partial = {"_class_name": "DDPMScheduler", "clip_sample": True}
    for config in (trained.config, from_file, partial):
        scheduler = build_sampling_scheduler(name, config, 5)
        torch.testing.assert_close(scheduler.alphas_cumprod, trained.alphas_cumprod)
        assert scheduler.scheduler.config.timestep_spacing == "trailing"
    cosine = DDPMScheduler(40, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler = build_sampling_scheduler(name, cosine.config, 5)
    torch.testing.assert_close(scheduler.alphas_cumprod, cosine.alphas_cumprod)
    assert scheduler.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", NAMES)
def test_timesteps_descend_from_the_last_one(name):
    """61 and 103 are two of the counts for which diffusers' trailing spacing, an arange with a
    float step, appends timestep -1: the noisiest entry of alphas_cumprod, taken after the last."""
    for steps in (1, 2, 10, 25, 50, 61, 103):
        scheduler = build_sampling_scheduler(name, DDPMScheduler().config, steps)
        timesteps = torch.unique_consecutive(scheduler.set_timesteps()).tolist()
        assert len(timesteps) == scheduler.num_inference_steps
        assert len(timesteps) == steps or (name, steps) in {("ddim", 103), ("pndm", 103)}
        assert timesteps[0] == 999 and timesteps[-1] >= 0
        assert timesteps == sorted(set(timesteps), reverse=True)
        if hasattr(scheduler.scheduler, "sigmas"):
            assert len(scheduler.scheduler.sigmas) == len(scheduler.scheduler.timesteps) + 1


def test_numbers_of_steps_that_leave_noise_in_the_image_are_replaced(reference):
    """With 501 of 1000 steps DDIM moves 1000 // 501 = 1 timestep at a time, while the model is
    called at every second one. By hand, and in the images."""
    replaced = {501: 500, 600: 500, 700: 1000, 300: 333, 103: 100, 150: 142}
    assert {n: evenly_dividing_steps(n, 1000) for n in replaced} == replaced
    kept = [*range(1, 51), 61, 100, 125, 200, 250, 333, 500, 1000]
    assert [evenly_dividing_steps(n, 1000) for n in kept] == kept
    trained = DDPMScheduler()
    scheduler = build_sampling_scheduler("ddim", trained.config, 501)
    as_given = denoise(Mixture(trained), replace(scheduler, num_inference_steps=501))
    respaced = denoise(Mixture(trained), scheduler)
    assert distance(respaced, reference("linear")) < 0.01
    assert distance(as_given, reference("linear")) > 0.05


@pytest.mark.parametrize("name", ["pndm", "heun"])
def test_solvers_take_more_steps_on_a_schedule_without_signal(name):
    def steps(config, num_inference_steps):
        return build_sampling_scheduler(name, config, num_inference_steps).num_inference_steps

    cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2").config
    assert (steps(cosine, 10), steps(cosine, 100)) == (50, 100)
    assert steps(DDPMScheduler().config, 10) == 10


@pytest.mark.parametrize("steps", [0, -1, 21])
def test_number_of_steps_outside_the_schedule_is_refused(chain, steps):
    for name in NAMES:
        with pytest.raises(UsageError, match="give a number from 1 to 20"):
            build_sampling_scheduler(name, chain.config, steps)


def test_number_of_steps_has_a_default_within_the_schedule(chain):
    defaults = [
        build_sampling_scheduler(name, config, None).num_inference_steps
        for name, config in (
            ("ddpm", DDPMScheduler().config),
            ("ddim", DDPMScheduler().config),
            ("ddim", chain.config),
        )
    ]
    assert defaults == [1000, 50, 20]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "settings", [{"beta_schedule": "sigmoid"}, {"rescale_betas_zero_snr": True}]
)
def test_unsupported_noise_schedule_is_refused(name, settings):
    """DDPM supports sigmoid and zero terminal SNR; others support it, too, or raise."""
    trained = DDPMScheduler(20, prediction_type="v_prediction", **settings)
    try:
        scheduler = build_sampling_scheduler(name, trained.config, 5)
    except UsageError as error:
        assert f"--scheduler {name} does not support the noise schedule" in str(error)
        assert name != "ddpm"
    else:
        torch.testing.assert_close(
            scheduler.alphas_cumprod, trained.alphas_cumprod, atol=1e-7, rtol=1e-5
        )


@pytest.mark.parametrize("name", ODE)
def test_sampling_can_begin_in_the_middle(name):
    """From the exact x_t of the middle, the other half of the steps gives the same images."""
    trained = DDPMScheduler()
    scheduler = build_sampling_scheduler(name, trained.config, 100)
    noisy = {}
    images = denoise(
        Mixture(trained), scheduler, 16, callback=lambda t, x, x0: noisy.setdefault(t, x)
    )
    assert int(scheduler.set_timesteps(begin=50)[0]) == 499
    from_middle = generate.denoise(
        lambda *inputs: Mixture(trained)(*inputs).sample, scheduler, noisy[499], [], begin=50
    )
    assert distance(from_middle, images) < 0.01


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_added_noise_is_that_of_diffusers(schedule):
    """The factors are exact: float64, rounded once to float32."""
    trained = DDPMScheduler(beta_schedule=schedule)
    scheduler = build_sampling_scheduler("ddim", trained.config, 5)
    images, noise = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), -0.7)
    for timestep in (0, 1, *range(2, 998, 31), 998, 999):
        abar = float(trained.alphas_cumprod[timestep])
        by_hand = abar**0.5 * images + (1 - abar) ** 0.5 * noise
        noisy = scheduler.add_noise(images, noise, timestep)
        assert noisy.dtype == torch.float32 and torch.equal(noisy, by_hand)
        torch.testing.assert_close(
            noisy, trained.add_noise(images, noise, torch.tensor([timestep]))
        )


# A trained model


@pytest.fixture(scope="module")
def trained():
    """A small UNet after 150 steps on bright bars on black, and its scheduler."""
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        optimizer = torch.optim.Adam(unet.parameters(), lr=5e-3)
        for _ in range(150):
            images = torch.full((32, 1, 8, 8), -0.8)
            for image, row in zip(images, torch.randint(0, 7, (32,)), strict=True):
                image[:, row : row + 2] = 0.8
            noise, timesteps = torch.randn_like(images), torch.randint(0, 1000, (32,))
            target = scheduler.get_velocity(images, noise, timesteps)
            prediction = unet(scheduler.add_noise(images, noise, timesteps), timesteps).sample
            torch.nn.functional.mse_loss(prediction, target).backward()
            optimizer.step()
            optimizer.zero_grad()
    return unet.eval(), scheduler


def images_of_trained(trained, name, steps):
    unet, scheduler = trained
    scheduler = build_sampling_scheduler(name, scheduler.config, steps)
    images = generate.generate_images(unet, scheduler, range(4), 4)
    return torch.stack([image for _, image in images]).float()


@pytest.fixture(scope="module")
def reference_of_trained(trained):
    """The images of DDIM in 250 steps."""
    return images_of_trained(trained, "ddim", 250)


@pytest.mark.slow
@pytest.mark.parametrize("name", ODE)
def test_ode_solvers_converge_on_a_trained_model(name, trained, reference_of_trained):
    """50 steps give the images of DDIM in 250 within 6 levels of 255 on average. No less, because
    DDIM moves along the unclipped noise and the others along that of the clipped x_0."""
    difference = (images_of_trained(trained, name, 50) - reference_of_trained).abs()
    assert reference_of_trained.std() > 30
    assert difference.mean() <= 6


@pytest.mark.slow
def test_few_steps_are_outside_of_the_tolerance_of_convergence(trained, reference_of_trained):
    images = images_of_trained(trained, "ddim", 3)
    assert (images - reference_of_trained).abs().mean() > 6
