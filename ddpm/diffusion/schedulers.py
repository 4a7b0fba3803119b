"""The one table of samplers, and how each is told what the model predicts.

Schedulers are diffusers', used as they are. Three things are settled around them: every walk starts
at the last timestep (trailing spacing), the predicted picture x0 stays in the range of the pixels,
and a count of steps that a scheduler cannot space evenly is replaced by one that it can.

Legend: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (arXiv 2006.11239, eq. 4), T timesteps.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

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

from ddpm.errors import UsageError

DEFAULT_SCHEDULER = "dpmsolver-sde"
"""Draws from noise: its 50 steps come as near to the data as the whole chain of ddpm, which the
solvers without noise do not (docs/evaluation.md)."""
DETERMINISTIC_SCHEDULER = "ddim"
"""For what must hang on the start alone: between two seeds, from a picture, in a proof."""
DEFAULT_STEPS = 50
"""Denoising steps when none are asked for; the whole chain for ddpm."""
NO_SIGNAL = 1e-6
"""abar_T below which a chain ends in noise alone: squaredcos_cap_v2 does, linear does not."""
DDPM_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
"""DDPMScheduler's defaults, for what a config leaves out: those of other schedulers differ."""


@dataclass(frozen=True)
class SchedulerSpec:
    """A row of the table: a scheduler of diffusers, and what it is given at each step.

    `takes` None: what the model predicts, and the scheduler clips x0 itself (clip_sample). Others
    cannot clip: they are given the clipped x0 ("sample"), or the noise that belongs to it
    ("epsilon") where they know no other prediction. `strides`: it walks T // steps at a time.
    `fewest`: with fewer steps it goes astray on a chain that ends without signal.
    """

    kind: type[SchedulerMixin]
    takes: Literal["sample", "epsilon"] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    strides: bool = False
    fewest: int = 1


SCHEDULERS: dict[str, SchedulerSpec] = {
    "ddpm": SchedulerSpec(DDPMScheduler),
    "ddim": SchedulerSpec(DDIMScheduler, strides=True),
    "pndm": SchedulerSpec(
        PNDMScheduler,
        "epsilon",
        {"skip_prk_steps": True, "set_alpha_to_one": True},
        strides=True,
        fewest=50,
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
    "heun": SchedulerSpec(HeunDiscreteScheduler, "epsilon", fewest=50),
    "deis": SchedulerSpec(DEISMultistepScheduler, "sample"),
}


@dataclass(frozen=True)
class SamplingScheduler:
    """A scheduler ready for one model: `prediction_type` is what the model predicts, `limit` the
    range [-limit, limit] that x0 is kept in (None: it is not)."""

    scheduler: SchedulerMixin
    takes: Literal["sample", "epsilon"] | None
    prediction_type: str
    limit: float | None

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """abar_t of the chain: [T] float32."""
        return self.scheduler.alphas_cumprod

    @property
    def takes_generator(self) -> bool:
        """Whether the steps can draw noise of their own."""
        return "generator" in inspect.signature(self.scheduler.step).parameters


def build_sampling_scheduler(
    name: str, scheduler_config: dict[str, Any], num_inference_steps: int | None
) -> tuple[SamplingScheduler, int]:
    """The sampler called `name` for a model trained with `scheduler_config`, and its step count.

    Spacing is trailing, so that every step count starts at the last timestep, which is pure noise.
    The count is the one asked for, or the nearest that does not spoil the images. UsageError for a
    count outside 1..T, and for a chain that this scheduler does not know.
    """
    solver = SCHEDULERS[name]
    chain = int(scheduler_config.get("num_train_timesteps", 1000))
    steps = num_inference_steps
    if steps is None:
        steps = chain if name == "ddpm" else min(DEFAULT_STEPS, chain)
    if not 1 <= steps <= chain:
        raise UsageError(
            f"--num_inference_steps {num_inference_steps}: this model was trained with {chain} "
            f"steps, so give a number from 1 to {chain}."
        )
    clips = bool(scheduler_config.get("clip_sample", True))
    limit = float(scheduler_config.get("clip_sample_range", 1.0)) if clips else None
    predicts = str(scheduler_config.get("prediction_type", "epsilon"))
    scheduler = _build(name, solver, scheduler_config)
    if solver.strides:
        steps = evenly_dividing_steps(steps, chain)
    if float(scheduler.alphas_cumprod[-1]) < NO_SIGNAL:
        steps = max(steps, min(solver.fewest, chain))
    return SamplingScheduler(scheduler, solver.takes, predicts, limit), steps


def build_latent_scheduler(name: str, scheduler_config: dict[str, Any]) -> SchedulerMixin:
    """The scheduler called `name` for a model that draws latents: nothing is clipped there.

    UsageError for a model whose noise is of another kind, such as flow matching.
    """
    solver = SCHEDULERS[name]
    if "beta_schedule" not in scheduler_config:
        raise UsageError(
            f"--scheduler {name}: this model has a noise of another kind "
            f"({scheduler_config.get('_class_name')}). Leave it out."
        )
    return _build(name, SchedulerSpec(solver.kind, None, solver.settings), scheduler_config)


def evenly_dividing_steps(steps: int, chain: int) -> int:
    """`steps`, or a count near it that divides a chain of `chain` timesteps more evenly.

    DDIM and PNDM go down chain // steps timesteps at a time, whatever the spacing of those where
    the model is asked; where the two differ by more than a twentieth, noise is left in the image.
    """
    spacing = chain / steps
    if spacing - chain // steps <= spacing / 20:
        return steps
    return chain // round(spacing)


def set_timesteps(
    sampler: SamplingScheduler, num_inference_steps: int, begin: int = 0
) -> torch.Tensor:
    """Prepare a walk and return its timesteps, falling; `begin` steps at the start are left out.

    Less the timestep -1 that some counts get (61 of 1000 is one): diffusers spaces "trailing" with
    an arange of a float step, which may end one value late; -1 is then read as the noisiest entry
    of alphas_cumprod and spoils the finished image.
    """
    scheduler = sampler.scheduler
    scheduler.set_timesteps(num_inference_steps)
    keep = int((scheduler.timesteps >= 0).sum())
    if keep < len(scheduler.timesteps):
        scheduler.timesteps = scheduler.timesteps[:keep]
        if hasattr(scheduler, "sigmas"):  # one a timestep, and the 0 after the last
            scheduler.sigmas = torch.cat((scheduler.sigmas[:keep], scheduler.sigmas[-1:]))
    if isinstance(scheduler, PNDMScheduler):
        # Its second timestep comes twice, wherever it starts: the first step is done in two halves.
        each = torch.unique_consecutive(scheduler.timesteps)[begin:]
        scheduler.timesteps = torch.cat((each[:2], each[1:]))
        return scheduler.timesteps
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin * scheduler.order)
    return scheduler.timesteps[begin * scheduler.order :]


def predict_original_sample(
    sampler: SamplingScheduler, output: torch.Tensor, images: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """x0 as the model sees it in x_t = `images`, kept in range: [B, C, H, W].

    `output` is what the model said of `images` at `timestep`.
    """
    alpha, sigma = _levels(sampler, timestep)
    if sampler.prediction_type == "epsilon":
        original = (images - sigma * output) / alpha
    elif sampler.prediction_type == "v_prediction":  # arXiv 2202.00512, section 4
        original = alpha * images - sigma * output
    else:
        original = output
    return original if sampler.limit is None else original.clamp(-sampler.limit, sampler.limit)


def convert_model_output(
    sampler: SamplingScheduler, output: torch.Tensor, images: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """What the model said, in the form that the scheduler takes, with x0 kept in range."""
    if sampler.takes is None:
        return output
    original = predict_original_sample(sampler, output, images, timestep)
    if sampler.takes == "sample":
        return original
    alpha, sigma = _levels(sampler, timestep)
    return (images - alpha * original) / sigma


def _levels(sampler: SamplingScheduler, timestep: torch.Tensor) -> tuple[float, float]:
    """(sqrt(abar_t), sqrt(1 - abar_t)) at a timestep."""
    alphas_cumprod = float(sampler.alphas_cumprod[int(timestep)])
    return alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5


def _build(name: str, solver: SchedulerSpec, scheduler_config: dict[str, Any]) -> SchedulerMixin:
    extra = {"timestep_spacing": "trailing", **solver.settings}
    if solver.takes is not None:
        extra |= {"prediction_type": solver.takes, "thresholding": False, "clip_sample": False}
    known = inspect.signature(solver.kind.__init__).parameters
    unknown = scheduler_config.get("rescale_betas_zero_snr") and (
        "rescale_betas_zero_snr" not in known
    )
    try:
        if unknown:
            raise ValueError("it has no noise schedule that ends at zero signal")
        config = {
            **DDPM_DEFAULTS,
            **{
                key: value
                for key, value in scheduler_config.items()
                if not key.startswith("_") and key not in extra
            },
        }
        return solver.kind.from_config(config, **{k: v for k, v in extra.items() if k in known})
    except (NotImplementedError, ValueError) as error:
        raise UsageError(
            f"--scheduler {name} does not know the chain that this model was trained with "
            f"({error}). Use --scheduler ddpm or ddim."
        ) from None
