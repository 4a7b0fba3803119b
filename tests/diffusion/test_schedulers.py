"""The table of samplers, against a model that is known in closed form.

The analytic denoiser is the exact one for a mixture of three Gaussians on two pixels, so the
images of an ODE solver have one right answer, and those of an SDE solver one right distribution.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from ddpm.diffusion import schedulers
from ddpm.errors import UsageError
from ddpm.sampling import generate

SAMPLERS = list(schedulers.SCHEDULERS)
STOCHASTIC = ["ddpm", "dpmsolver-sde", "euler-ancestral"]
ODE = [name for name in SAMPLERS if name not in STOCHASTIC]
SCHEDULES = ["linear", "squaredcos_cap_v2"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
MODES = torch.tensor([[-0.7, -0.2], [0.6, 0.1], [0.0, 0.75]], dtype=torch.float64)
STD = 0.1


class Mixture:
    """What a perfect UNet says where the data is a mixture of Gaussians at MODES, width STD."""

    config = SimpleNamespace(in_channels=1, sample_size=(1, 2))
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, chain: DDPMScheduler):
        self.alphas_cumprod = chain.alphas_cumprod.double()
        self.prediction_type = chain.config.prediction_type

    def __call__(self, images, timestep):
        abar = self.alphas_cumprod[int(timestep)]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        flat = images.double().flatten(1)
        apart = flat[:, None] - alpha * MODES
        variance = abar * STD**2 + 1 - abar
        weights = torch.softmax(-apart.square().sum(-1) / (2 * variance), dim=1)
        noise = sigma * (weights[..., None] * apart).sum(1) / variance  # -sigma x score
        original = (flat - sigma * noise) / alpha
        said = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * original,
            "sample": original,
        }
        return SimpleNamespace(sample=said[self.prediction_type].view_as(images).float())


def walk(name, steps, chain, num_images=32, seed=0):
    scheduler = schedulers.build_sampling_scheduler(name, chain.config, steps)
    generators = [torch.Generator().manual_seed(seed + k) for k in range(num_images)]
    unet = Mixture(chain)
    noise = generate.initial_noise(unet, generators)
    return generate.denoise(unet, scheduler, noise, generators)


@pytest.fixture(scope="module")
def reference():
    """DDIM with all 1000 steps, on each schedule."""
    chains = {name: DDPMScheduler(beta_schedule=name) for name in SCHEDULES}
    return {name: walk("ddim", 1000, chain) for name, chain in chains.items()}


def apart(images, others):
    """The median image's largest difference of a pixel; pixels are in [-1, 1]."""
    return float((images - others).abs().flatten(1).max(1).values.median())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ODE)
def test_ode_solvers_converge_to_ddim_with_many_steps(name, schedule, reference):
    """Within 0.03 of [-1, 1] at 50 steps and 0.006 at 200: less than a level of 255 is 0.0078."""
    chain = DDPMScheduler(beta_schedule=schedule)
    at_50, at_200 = (apart(walk(name, n, chain), reference[schedule]) for n in (50, 200))
    assert at_200 < 0.006
    assert at_50 < 0.03
    assert at_200 < at_50 or at_200 < 0.003


@pytest.mark.parametrize("name", STOCHASTIC)
def test_sde_solvers_draw_from_the_distribution(name):
    """A third of the images at each mode, as wide as the data: 300 images, by hand 4 sigma."""
    images = walk(name, 100, DDPMScheduler(), num_images=300).double().flatten(1)
    nearest = torch.cdist(images, MODES).argmin(1)
    for mode in range(3):
        of_mode = images[nearest == mode]
        assert len(of_mode) / 300 == pytest.approx(1 / 3, abs=4 * (2 / 9 / 300) ** 0.5)
        assert of_mode.std(dim=0).tolist() == pytest.approx([STD, STD], rel=0.25)
        assert (of_mode.mean(0) - MODES[mode]).abs().max() < 0.04


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_the_model_predicts_changes_nothing(name):
    """Noise, velocity and image are one statement in three forms; also for solvers that know one
    form only."""
    first, *others = (
        walk(name, 60, DDPMScheduler(prediction_type=kind), num_images=8) for kind in PREDICTIONS
    )
    for other in others:
        torch.testing.assert_close(other, first, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ODE)
def test_every_sampler_begins_with_the_same_noise(name):
    """What the model is first asked is the seed's noise, also where x is kept in other units."""
    chain = DDPMScheduler(num_train_timesteps=20)  # ends with much signal: units matter
    seen = []

    class Watched(Mixture):
        def __call__(self, images, timestep):
            seen.append(images)
            return super().__call__(images, timestep)

    scheduler = schedulers.build_sampling_scheduler(name, chain.config, 5)
    noise = torch.randn(2, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    generate.denoise(Watched(chain), scheduler, noise, [torch.Generator()] * 2)
    torch.testing.assert_close(seen[0], noise)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_predicted_image_stays_in_range(name, kind):
    """A model that exaggerates tenfold: the range of the chain holds at every step, else not."""

    class Loud(Mixture):
        def __call__(self, images, timestep):
            return SimpleNamespace(sample=10 * super().__call__(images, timestep).sample)

    for clips, limit in ((True, 1.0), (True, 2.0), (False, None)):
        chain = DDPMScheduler(
            20,
            beta_schedule="squaredcos_cap_v2",
            prediction_type=kind,
            clip_sample=clips,
            clip_sample_range=limit or 1.0,
        )
        scheduler = schedulers.build_sampling_scheduler(name, chain.config, 10)
        assert scheduler.clip_range == limit
        noise = torch.randn(4, 1, 1, 2, generator=torch.Generator().manual_seed(0))
        seen: list[torch.Tensor] = []
        end = generate.denoise(
            Loud(chain),
            scheduler,
            noise,
            [torch.Generator()] * 4,
            callback=lambda *step, seen=seen: seen.append(step[2]),
        )
        assert (float(torch.stack(seen).abs().max()) <= (limit or 1.0)) == clips
        if name not in ("pndm", "deis"):  # these go beyond the last x0, or not quite to it
            assert (float(end.abs().max()) <= (limit or 1.0) + 1e-3) == clips


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("config", ["live", "file", "partial"])
def test_sampler_walks_the_chain_the_model_was_trained_with(name, config):
    """A live config lists which values are defaults, and from_config then takes those of the other
    class: HeunDiscreteScheduler would start its betas at 0.00085 instead of 0.0001."""
    trained = DDPMScheduler()
    given = dict(trained.config)
    if config != "live":
        given.pop("_use_default_values")
    if config == "partial":
        given = {"_class_name": "DDPMScheduler", "clip_sample": True}
    scheduler = schedulers.build_sampling_scheduler(name, given, 5)
    torch.testing.assert_close(scheduler.alphas_cumprod, trained.alphas_cumprod)
    assert scheduler.scheduler.config.timestep_spacing == "trailing"
    cosine = DDPMScheduler(40, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler = schedulers.build_sampling_scheduler(name, cosine.config, 5)
    torch.testing.assert_close(scheduler.alphas_cumprod, cosine.alphas_cumprod)
    assert scheduler.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 10, 25, 50, 61, 103])
def test_chain_is_walked_from_pure_noise_to_its_end(name, steps):
    """61 and 103 are two of the counts for which diffusers' trailing spacing, an arange with a
    float step, appends timestep -1: the noisiest entry of alphas_cumprod, taken after the last."""
    sampling = schedulers.build_sampling_scheduler(name, DDPMScheduler().config, steps)
    counted = sampling.num_inference_steps
    timesteps = torch.unique_consecutive(sampling.set_timesteps()).tolist()
    assert len(timesteps) == counted
    assert counted == steps or (name, steps) in {("ddim", 103), ("pndm", 103)}
    assert timesteps[0] == 999 and timesteps[-1] >= 0
    assert timesteps == sorted(set(timesteps), reverse=True)
    scheduler = sampling.scheduler
    if hasattr(scheduler, "sigmas"):
        assert len(scheduler.sigmas) == len(scheduler.timesteps) + 1


def test_steps_that_leave_noise_in_the_image_are_respaced():
    """DDIM goes down T // steps at a time: with 501 steps of 1000 that is one, while the model is
    asked at every second timestep. By hand, and in the images."""
    by_hand = {501: 500, 600: 500, 700: 1000, 300: 333, 103: 100, 150: 142}
    assert {n: schedulers.evenly_dividing_steps(n, 1000) for n in by_hand} == by_hand
    kept = [*range(1, 51), 61, 100, 125, 200, 250, 333, 500, 1000]
    assert [schedulers.evenly_dividing_steps(n, 1000) for n in kept] == kept
    chain = DDPMScheduler()
    reference = walk("ddim", 1000, chain, 64)
    respaced = apart(walk("ddim", 501, chain, 64), reference)
    unet = Mixture(chain)
    scheduler = schedulers.build_sampling_scheduler("ddim", chain.config, 500)
    generators = [torch.Generator().manual_seed(k) for k in range(64)]
    noise = generate.initial_noise(unet, generators)
    as_asked = apart(
        generate.denoise(unet, replace(scheduler, num_inference_steps=501), noise, generators),
        reference,
    )
    assert respaced < 0.01 < 0.05 < as_asked


@pytest.mark.parametrize("name", ["pndm", "heun"])
def test_solvers_that_go_astray_on_a_chain_without_signal_take_more_steps(name):
    cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert schedulers.build_sampling_scheduler(name, cosine.config, 10).num_inference_steps == 50
    assert schedulers.build_sampling_scheduler(name, cosine.config, 100).num_inference_steps == 100
    assert (
        schedulers.build_sampling_scheduler(name, DDPMScheduler().config, 10).num_inference_steps
        == 10
    )


@pytest.mark.parametrize("steps", [0, -1, 21])
@pytest.mark.parametrize("name", SAMPLERS)
def test_step_count_outside_the_chain_is_refused(chain, name, steps):
    with pytest.raises(UsageError, match="give a number from 1 to 20"):
        schedulers.build_sampling_scheduler(name, chain.config, steps)


def test_step_count_has_a_default_within_the_chain(chain):
    long = DDPMScheduler().config
    assert schedulers.build_sampling_scheduler("ddpm", long, None).num_inference_steps == 1000
    assert schedulers.build_sampling_scheduler("ddim", long, None).num_inference_steps == 50
    assert schedulers.build_sampling_scheduler("ddim", chain.config, None).num_inference_steps == 20


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "settings", [{"beta_schedule": "sigmoid"}, {"rescale_betas_zero_snr": True}]
)
def test_chain_that_a_sampler_does_not_know_is_refused_or_walked(name, settings):
    """DDPM knows sigmoid and chains of zero terminal signal; what others ignore they may not walk
    in silence."""
    trained = DDPMScheduler(20, prediction_type="v_prediction", **settings)
    try:
        scheduler = schedulers.build_sampling_scheduler(name, trained.config, 5)
    except UsageError as error:
        assert f"--scheduler {name} does not know the chain" in str(error)
        assert name != "ddpm"
    else:
        torch.testing.assert_close(
            scheduler.alphas_cumprod, trained.alphas_cumprod, atol=1e-7, rtol=1e-5
        )


@pytest.mark.parametrize("name", ODE)
def test_walk_can_begin_in_the_middle(name):
    """From the exact x_t of a walk's middle, the rest of it arrives where the whole one does."""
    chain = DDPMScheduler()
    scheduler = schedulers.build_sampling_scheduler(name, chain.config, 200)
    unet = Mixture(chain)
    seen = {}
    noise = torch.randn(16, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    whole = generate.denoise(
        unet, scheduler, noise, [], callback=lambda t, x, x0: seen.setdefault(t, x)
    )
    timestep = int(scheduler.set_timesteps(begin=100)[0])
    assert timestep == 499
    rest = generate.denoise(unet, scheduler, seen[timestep], [], begin=100)
    assert apart(rest, whole) < 0.005


# A model that was trained


@pytest.fixture(scope="module")
def trained():
    """A small UNet after 150 steps on bright bars on black, some seconds; and its chain."""
    chain = DDPMScheduler(prediction_type="v_prediction")
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
            target = chain.get_velocity(images, noise, timesteps)
            said = unet(chain.add_noise(images, noise, timesteps), timesteps).sample
            torch.nn.functional.mse_loss(said, target).backward()
            optimizer.step()
            optimizer.zero_grad()
    return unet.eval(), chain


def drawn_by(trained, name, steps):
    unet, chain = trained
    scheduler = schedulers.build_sampling_scheduler(name, chain.config, steps)
    drawn = generate.generate_images(unet, scheduler, range(4), 4)
    return torch.stack([image for _, image in drawn]).float()


@pytest.fixture(scope="module")
def reference_of_trained(trained):
    """DDIM in 250 steps."""
    return drawn_by(trained, "ddim", 250)


@pytest.mark.parametrize("name", ODE)
def test_ode_solvers_converge_on_a_trained_model(name, trained, reference_of_trained):
    """50 steps give the images of DDIM in 250 within 6 levels of 255 on average. No less, because
    DDIM moves along the unclipped noise and the others along that of the clipped x0."""
    apart = (drawn_by(trained, name, 50) - reference_of_trained).abs()
    assert reference_of_trained.std() > 30
    assert apart.mean() <= 6


def test_few_steps_are_not_taken_for_converged(trained, reference_of_trained):
    """The tolerance above tells: three steps of DDIM are beyond it."""
    assert (drawn_by(trained, "ddim", 3) - reference_of_trained).abs().mean() > 6
