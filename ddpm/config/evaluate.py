"""The settings of evaluate.py, with a sentence under each field."""

from collections.abc import Set
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from ddpm.config.base import (
    nest,
    read_settings,
    require_at_least_one,
    require_not_negative,
    require_revision,
    require_seed,
)
from ddpm.config.data import DATASET_DEPENDENT_FIELDS, DATASET_FIELDS, DataConfig
from ddpm.config.train import TrainConfig
from ddpm.config.values import (
    MAX_GUIDANCE_SCALE,
    Scheduler,
    WaitPolicy,
    parse_numbers,
    parse_sampler_choice,
)
from ddpm.errors import UsageError

MAX_SIGMA_REL = 0.28
"""Largest sigma_rel of an average: 0.289 is the plain mean over the run."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """All of evaluate.py's settings. Settings of the data default to those of the run."""

    model: Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder of train.py, a folder with a pipeline, a checkpoint, or an id on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub; None is the newest on main."""
    num_images: int = 1000
    """Number of images to generate. Frechet distances of different numbers cannot be compared."""
    seed: int = 0
    """Seed of the first image; image k has seed + k."""
    scheduler: Scheduler | None = None
    """Sampler that turns noise into images; None is dpmsolver-sde."""
    num_inference_steps: int | None = None
    """Denoising steps; None is 50, or all timesteps for ddpm."""
    samplers: tuple[str, ...] | None = None
    """Compare samplers instead, and write the table that sample.py --quality selects from. Each is
    NAME:STEPS, or NAME for its usual steps, as in --samplers ddim:10 ddpm; without any: ddim,
    dpmsolver++ and unipc in 5, 10, 20 and 50 steps, and ddpm."""
    batch_size: int = 64
    """Images of one process that pass through a network at once; changes no result."""
    guidance_scale: float | None = None
    """Guidance to the classes of a model that has them, which are drawn in the proportions of the
    training data; None is 1, the distribution of the model itself."""
    guidance_scales: str | None = None
    """Also measure these guidance scales, as in 0,1,1.5,2,4: sample.py --quality uses the one with
    the lowest distance."""
    features: str | None = None
    """Feature network: a file, TorchScript (.pt) or torch.export (.pt2), pixels [B, 3, H, W]
    uint8 to [B, D], or to that and logits [B, K] of K classes; or an image model on the Hub, such
    as facebook/dinov2-base. None is the one in the dataset's folder (features.safetensors, as in
    data/digits and data/emoji), else Inception."""
    eval_split: str | None = None
    """Split that was held out; None is test or validation where the dataset has one."""
    ema_lengths: str | None = None
    """Also build and measure averages of these lengths (sigma_rel, as in 0.02,0.05,0.10,0.15) of a
    run that was trained with --post_hoc_ema."""
    export_best: bool = False
    """Put the best of --ema_lengths into the run folder's pipeline, and measure it. The replaced
    files go to ema/before."""
    held_out_seed: int = 0
    """Seed of the run, which chose the rows of its --held_out; read from a run folder."""
    output_dir: str | None = None
    """Folder for evaluation.json; None is MODEL, or a folder named like a model of the Hub."""
    cpu_wait_policy: WaitPolicy = "auto"
    """How CPU threads wait for each other: spin (active), sleep (passive), or sleep while other
    work needs the cores (auto). On Linux only; OMP_WAIT_POLICY and GOMP_SPINCOUNT win."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        require_at_least_one(self, "num_images", "batch_size", "num_inference_steps")
        require_revision(self, "revision")
        require_seed(self.seed, self.num_images)
        require_not_negative(self, "held_out_seed")
        if self.samplers is not None:
            self._check_samplers()
        if self.export_best and self.ema_lengths is None:
            raise UsageError(
                "--export_best has no effect without --ema_lengths: add it, or leave both."
            )
        if self.guidance_scale is not None:
            require_guidance_scale("guidance_scale", self.guidance_scale)
        _ = self.sigma_rels, self.scales  # raise

    def _check_samplers(self) -> None:
        """Raise UsageError for --samplers that cannot be measured, or flags in conflict with it."""
        choices = self.sampler_choices
        for word, choice in zip(self.samplers or (), choices, strict=True):
            if choices.count(choice) > 1:
                raise UsageError(f"--samplers names {word} twice: leave one out.")
        for name in ("ema_lengths", "guidance_scales"):
            if getattr(self, name) is not None:
                raise UsageError(f"--samplers and --{name} are two commands: give one of them.")
        for name in ("scheduler", "num_inference_steps"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"--{name} has no effect with --samplers, which names samplers and steps "
                    "itself: leave one out."
                )

    @property
    def sampler_choices(self) -> list[tuple[str, int | None]]:
        """`samplers` as pairs of a scheduler and its steps; None is the usual number of steps."""
        return [parse_sampler_choice(word) for word in self.samplers or ()]

    @property
    def sigma_rels(self) -> tuple[float, ...]:
        """`ema_lengths` as different numbers in ascending order; empty for None."""
        if self.ema_lengths is None:
            return ()
        lengths = {*parse_numbers(self.ema_lengths)}
        if not all(0 < length <= MAX_SIGMA_REL for length in lengths):
            raise UsageError(
                f"--ema_lengths {self.ema_lengths}: give numbers above 0, to {MAX_SIGMA_REL}, such "
                "as 0.02,0.05,0.10,0.15."
            )
        return tuple(sorted(lengths))

    @property
    def scales(self) -> tuple[float, ...]:
        """`guidance_scales` as different numbers in ascending order; empty for None."""
        if self.guidance_scales is None:
            return ()
        scales = {*parse_numbers(self.guidance_scales)}
        for scale in scales:
            require_guidance_scale("guidance_scales", scale)
        return tuple(sorted(scales))

    def with_settings_of_run(
        self, path: Path, given: Set[str], *, on_hub: bool = False
    ) -> "EvaluateConfig":
        """Return these settings with those of a run's train_config.json where no flag was given.

        `given` are the names of the flags on the command line. Another dataset on the command line
        brings its own settings: only how images are resized is then the run's. A model `on_hub`
        may be somebody else's: it names no folder of this machine.
        """
        settings = read_settings(TrainConfig, path, unknown="ignore")
        # The images are decoded once, also those of a run that streamed them
        names = {item.name for item in fields(DataConfig)} - given - {"streaming", "rows_per_epoch"}
        if given & DATASET_FIELDS:
            names -= DATASET_FIELDS | DATASET_DEPENDENT_FIELDS
        if on_hub:
            names -= {item.name for item in fields(DataConfig) if item.metadata} - {"dataset_name"}
        run = nest(DataConfig, settings)
        data = replace(self.data, **{name: getattr(run, name) for name in names})
        seed = self.held_out_seed
        if "held_out_seed" not in given:
            seed = settings.get("seed", seed)
        return replace(self, data=data, held_out_seed=seed)


def require_guidance_scale(name: str, scale: float) -> None:
    """Raise UsageError for a guidance scale that is no number from 0 to MAX_GUIDANCE_SCALE."""
    if not 0 <= scale <= MAX_GUIDANCE_SCALE:
        raise UsageError(
            f"--{name}: give numbers from 0, no class, to {MAX_GUIDANCE_SCALE}; 1 is no guidance."
        )
