"""The table of sampling schedulers, and a scheduler prepared for one model.

The schedulers are diffusers', used as they are. `SamplingScheduler` adds three things: sampling
starts at the last timestep (trailing spacing), the predicted x_0 is clipped to the range of the
pixels for every scheduler, and a number of steps that a scheduler cannot space evenly is replaced.

To add a scheduler, add a row to `SCHEDULERS` and its name to the choices of `--scheduler`
(`Scheduler` in ddpm/config/values.py); a test compares the two.

Notation: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM, arXiv 2006.11239, eq. 4) with
abar = alphas_cumprod [T] and T training timesteps.
"""

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.utils import DummyObject

from ddpm.diffusion import objective
from ddpm.errors import UsageError, UserError, first_line, foreign_errors
from ddpm.typed_json import require_settings

DEFAULT_SCHEDULER = "dpmsolver-sde"
"""Its 50 steps come as close to the data as all steps of ddpm; deterministic solvers do not
(docs/evaluation.md)."""
DETERMINISTIC_SCHEDULER = "ddim"
"""Used where the image must depend on the initial noise alone: interpolation, restoring, proofs."""
DEFAULT_STEPS = 50
"""Number of denoising steps by default, except for ddpm, which takes all T."""
NO_SIGNAL = 1e-6
"""A schedule with abar_T below this ends in pure noise: squaredcos_cap_v2 does, linear does not."""
DDPM_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
"""DDPMScheduler's defaults for keys that a config leaves out; other schedulers' defaults differ."""


@dataclass(frozen=True)
class SchedulerSpec:
    """A row of the table: a scheduler class of diffusers and how it is used.

    `step_input`: what `step` receives. None passes the model's output on, and the scheduler clips
    x_0 itself (clip_sample). Schedulers that cannot clip receive the clipped x_0 ("sample"), or the
    noise computed from it ("epsilon") if they support no other prediction type.
    `integer_stride`: the scheduler moves T // steps timesteps at a time.
    `min_steps`: fewer steps diverge on a schedule that ends in pure noise.
    """

    scheduler_class: type[SchedulerMixin]
    step_input: Literal["sample", "epsilon"] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    integer_stride: bool = False
    min_steps: int = 1


SCHEDULERS: dict[str, SchedulerSpec] = {
    "ddpm": SchedulerSpec(DDPMScheduler),
    "ddim": SchedulerSpec(DDIMScheduler, integer_stride=True),
    "pndm": SchedulerSpec(
        PNDMScheduler,
        "epsilon",
        {"skip_prk_steps": True, "set_alpha_to_one": True},
        integer_stride=True,
        min_steps=50,
    ),
    "dpmsolver++": SchedulerSpec(
        DPMSolverMultistepScheduler,
        "sample",
        {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"},
    ),
    "dpmsolver-sde": SchedulerSpec(
        DPMSolverMultistepScheduler,
        "sample",
        {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"},
    ),
    "unipc": SchedulerSpec(UniPCMultistepScheduler, "sample"),
    "euler": SchedulerSpec(EulerDiscreteScheduler, "sample"),
    "euler-ancestral": SchedulerSpec(EulerAncestralDiscreteScheduler, "epsilon"),
    "heun": SchedulerSpec(HeunDiscreteScheduler, "epsilon", min_steps=50),
    "deis": SchedulerSpec(DEISMultistepScheduler, "sample"),
}


LIMITS = {
    "num_train_timesteps": (1, 10**5),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "trained_betas": (0, 1),
    "steps_offset": (0, 10**5),
    "solver_order": (1, 3),
    "dynamic_thresholding_ratio": (0, 1),
    "clip_sample_range": (0, 1e6),
    "sample_max_value": (0, 1e6),
    "sigma_min": (0, 1e6),
    "sigma_max": (0, 1e6),
    "correct_steps": (0, 100),
    "": (-1e6, 1e6),
}
"""Lowest and highest number of each setting of a scheduler, and of those not named."""


@dataclass(frozen=True)
class SamplingScheduler:
    """A scheduler of diffusers prepared for one model and one number of steps.

    `prediction_type` is what the model predicts, `step_input` what the scheduler's `step` receives
    (see SchedulerSpec). x_0 is clipped to [-clip_range, clip_range]; None leaves it as it is.
    """

    scheduler: SchedulerMixin
    num_inference_steps: int
    prediction_type: objective.PredictionType
    step_input: Literal["sample", "epsilon"] | None
    clip_range: float | None

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """abar_t of the noise schedule: [T] float32."""
        return self.scheduler.alphas_cumprod

    def set_timesteps(self, begin: int = 0) -> torch.Tensor:
        """Reset the scheduler and return the descending timesteps, without the first `begin` steps.

        For some numbers of steps (61 of 1000), diffusers' trailing spacing, an arange with a float
        step, ends one value late, in timestep -1. That would read the noisiest entry of
        alphas_cumprod and spoil the finished image, so it is removed.
        """
        scheduler = self.scheduler
        scheduler.set_timesteps(self.num_inference_steps)
        valid = int((scheduler.timesteps >= 0).sum())
        if valid < len(scheduler.timesteps):
            scheduler.timesteps = scheduler.timesteps[:valid]
            if hasattr(scheduler, "sigmas"):  # one for each timestep, and a last 0
                scheduler.sigmas = torch.cat((scheduler.sigmas[:valid], scheduler.sigmas[-1:]))
        if isinstance(scheduler, PNDMScheduler):
            # PNDM does its first step in two halves, so its second timestep must come twice.
            timesteps = torch.unique_consecutive(scheduler.timesteps)[begin:]
            scheduler.timesteps = torch.cat((timesteps[:2], timesteps[1:]))
            return scheduler.timesteps
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin * scheduler.order)
        return scheduler.timesteps[begin * scheduler.order :]

    def add_noise(self, images: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """Return x_t of `images` [B, C, H, W]; its factors are computed in float64."""
        return objective.add_noise(
            self.alphas_cumprod.double(), images, noise, torch.tensor([timestep])
        )

    def predict_original_sample(
        self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """Return the clipped x_0 [B, C, H, W] that `prediction` for x_t = `noisy` stands for."""
        original = objective.predict_original(
            self.prediction_type, prediction, noisy, *self._signal_and_sigma(timestep)
        )
        limit = self.clip_range
        return original if limit is None else original.clamp(-limit, limit)

    def clip_prediction(
        self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """Return what the model would predict for x_t = `noisy` if x_0 were the clipped one.

        DDIM clips x_0 but takes the noise from the prediction as it is. With a guided prediction,
        whose x_0 is far out of range, the two then differ so much that its images have other
        classes than asked for.
        """
        if self.clip_range is None:
            return prediction
        original = self.predict_original_sample(prediction, noisy, timestep)
        if self.prediction_type == "sample":
            return original
        signal, sigma = self._signal_and_sigma(timestep)
        noise = (noisy - signal * original) / sigma
        return noise if self.prediction_type == "epsilon" else signal * noise - sigma * original

    def convert_model_output(
        self, prediction: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """Return the model's prediction for x_t = `noisy` as the `step_input` of the scheduler."""
        if self.step_input is None:
            return prediction
        original = self.predict_original_sample(prediction, noisy, timestep)
        if self.step_input == "sample":
            return original
        signal, sigma = self._signal_and_sigma(timestep)
        return (noisy - signal * original) / sigma

    def step(
        self,
        step_input: torch.Tensor,
        timestep: torch.Tensor,
        images: torch.Tensor,
        generators: Sequence[torch.Generator],
    ) -> torch.Tensor:
        """Return the images one step later; stochastic schedulers draw noise from `generators`."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": list(generators)} if takes_generator else {}
        return self.scheduler.step(step_input, timestep, images, **extra).prev_sample

    def _signal_and_sigma(self, timestep: torch.Tensor) -> tuple[float, float]:
        """Return sqrt(abar_t) and sqrt(1 - abar_t), computed in float64."""
        abar = float(self.alphas_cumprod[int(timestep)])
        return abar**0.5, (1 - abar) ** 0.5


def parse_scheduler_config(config: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the class and the settings in a scheduler_config.json; other entries are left out.

    Settings that any scheduler of ours has count, since it would get them. Raise UserError, which
    begins with `source`, for a class that diffusers does not have, a wrong type, and a number
    outside LIMITS.
    """
    name = config.get("_class_name", DDPMScheduler.__name__)
    is_name = isinstance(name, str) and re.fullmatch("[A-Za-z0-9]+Scheduler", name)
    scheduler_class = getattr(diffusers, name, None) if is_name else None
    # A DummyObject stands for a class that needs a package which is not installed
    if not isinstance(scheduler_class, DummyObject) and not (
        isinstance(scheduler_class, type) and issubclass(scheduler_class, SchedulerMixin)
    ):
        raise UserError(
            f"{source}: {name!r:.60} is no scheduler of diffusers {diffusers.__version__}."
        )
    # The default of DPMSolver, which JSON has no number for
    config = {n: v for n, v in config.items() if (n, v) != ("lambda_min_clipped", -math.inf)}
    settings = require_settings(_setting_hints(scheduler_class), LIMITS, config, source)
    betas = settings.get("trained_betas")
    if betas is not None and len(betas) != settings.get("num_train_timesteps", 1000):
        raise UserError(f"{source}: trained_betas must have one number for each timestep.")
    return {"_class_name": name, **settings}


@cache
def _setting_hints(scheduler_class: type[SchedulerMixin]) -> dict[str, Any]:
    """Return the types of the settings of a scheduler class and of those in SCHEDULERS.

    A text may be any, since the lists of choices in diffusers are not complete; a wrong one is an
    error of `build_sampling_scheduler`. A setting whose default is None may be null.
    """
    options: dict[str, list[Any]] = {}
    for kind in (scheduler_class, *(spec.scheduler_class for spec in SCHEDULERS.values())):
        parameters = inspect.signature(kind.__init__).parameters
        for name, hint in get_type_hints(kind.__init__).items():
            types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            types = [str if get_origin(option) is Literal else option for option in types]
            if name in parameters and parameters[name].default is None:
                types.append(NoneType)
            options.setdefault(name, []).extend(types)
    hints = {name: Union[tuple(types)] for name, types in options.items()}  # noqa: UP007
    return {**hints, "prediction_type": objective.PredictionType}


def build_sampling_scheduler(
    name: str, scheduler_config: dict[str, Any], num_inference_steps: int | None
) -> SamplingScheduler:
    """Return the scheduler `name` for a model that was trained with `scheduler_config`.

    Its number of steps is `num_inference_steps`, the scheduler's default for None, or the nearest
    number that does not spoil the images. Raise UsageError for a number outside 1..T and for a
    noise schedule that this scheduler does not support, UserError if its first step fails.
    """
    spec = SCHEDULERS[name]
    num_timesteps = int(scheduler_config.get("num_train_timesteps", 1000))
    steps = num_inference_steps
    if steps is None:
        steps = num_timesteps if name == "ddpm" else min(DEFAULT_STEPS, num_timesteps)
    if not 1 <= steps <= num_timesteps:
        raise UsageError(
            f"--num_inference_steps {num_inference_steps}: this model was trained with "
            f"{num_timesteps} steps, so give a number from 1 to {num_timesteps}."
        )
    scheduler = _create_scheduler(name, spec, scheduler_config)
    if spec.integer_stride:
        steps = evenly_dividing_steps(steps, num_timesteps)
    if float(scheduler.alphas_cumprod[-1]) < NO_SIGNAL:
        steps = max(steps, min(spec.min_steps, num_timesteps))
    clips = bool(scheduler_config.get("clip_sample", True))
    sampling_scheduler = SamplingScheduler(
        scheduler=scheduler,
        num_inference_steps=steps,
        prediction_type=str(scheduler_config.get("prediction_type", "epsilon")),
        step_input=spec.step_input,
        clip_range=float(scheduler_config.get("clip_sample_range", 1.0)) if clips else None,
    )
    with foreign_errors(f"--scheduler {name} cannot take {steps} steps with this model"):
        pixel, timestep = torch.zeros(1, 1, 1, 1), sampling_scheduler.set_timesteps()[0]
        scheduler.scale_model_input(pixel, timestep)
        sampling_scheduler.step(pixel, timestep, pixel, [torch.Generator()])
    return sampling_scheduler


def build_latent_scheduler(name: str, scheduler_config: dict[str, Any]) -> SchedulerMixin:
    """Return the scheduler `name` for a latent diffusion model, whose latents are not clipped.

    Raise UsageError for a model with another kind of noise, such as flow matching.
    """
    if "beta_schedule" not in scheduler_config:
        raise UsageError(
            f"--scheduler {name}: this model has a noise of another kind "
            f"({scheduler_config.get('_class_name')}). Leave it out."
        )
    return _create_scheduler(name, replace(SCHEDULERS[name], step_input=None), scheduler_config)


def evenly_dividing_steps(steps: int, num_timesteps: int) -> int:
    """Return `steps`, or a number near it that divides `num_timesteps` more evenly.

    DDIM and PNDM move num_timesteps // steps timesteps at a time, however the timesteps of the
    model are spaced. If the two differ by more than 5%, noise is left in the image.
    """
    spacing = num_timesteps / steps
    if spacing - num_timesteps // steps <= spacing / 20:
        return steps
    return num_timesteps // round(spacing)


def _create_scheduler(
    name: str, spec: SchedulerSpec, scheduler_config: dict[str, Any]
) -> SchedulerMixin:
    """Return a scheduler with the noise schedule of `scheduler_config` and trailing spacing."""
    parameters = inspect.signature(spec.scheduler_class.__init__).parameters
    config = {**DDPM_DEFAULTS, **scheduler_config, "timestep_spacing": "trailing", **spec.config}
    if spec.step_input is not None:
        config |= {"prediction_type": spec.step_input, "thresholding": False, "clip_sample": False}
    try:
        if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in parameters:
            raise ValueError("it has no noise schedule that ends at zero signal")
        return spec.scheduler_class(**{k: v for k, v in config.items() if k in parameters})
    except Exception as error:  # the classes check few of their settings
        raise UsageError(
            f"--scheduler {name} does not support the noise schedule of this model "
            f"({first_line(error)}). Use --scheduler ddpm or ddim."
        ) from None
