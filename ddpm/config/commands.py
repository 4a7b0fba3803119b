"""The settings of push.py, sample.py and evaluate.py, with a sentence under each field.

The checks of a command are in its `__post_init__` and raise UsageError.
"""

import difflib
import math
import re
from collections.abc import Set
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from tyro.conf import Positional

from ddpm.config.base import (
    REVISION,
    nest,
    read_settings,
    require_at_least_one,
    require_no_file,
    require_not_negative,
    require_revision,
)
from ddpm.config.train import DataConfig, TrainConfig, WaitPolicy, parse_color
from ddpm.errors import UsageError

MAX_IMAGES = 10**9
MAX_GUIDANCE_SCALE = 100
ALL_CLASSES = "all"
MAX_SIGMA_REL = 0.28
"""Largest sigma_rel of an average: 0.289 is the plain mean over the run."""

Scheduler = Literal[
    "ddpm",
    "ddim",
    "pndm",
    "dpmsolver++",
    "dpmsolver-sde",
    "unipc",
    "euler",
    "euler-ancestral",
    "heun",
    "deis",
]
Quality = Literal["fast", "good", "best"]

DATASET_FIELDS = {"dataset_name", "train_data_dir"}
DATASET_DEPENDENT_FIELDS = {
    "dataset_config_name",
    "dataset_revision",
    "split",
    "image_column",
    "class_conditional",
    "label_column",
    "value_range",
    "held_out",
}
"""Settings that mean something only for the dataset that they were given with."""


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """All of push.py's settings."""

    output_dir: Positional[Annotated[str, tyro.conf.arg(metavar="OUTPUT_DIR")]]
    """The run folder of train.py."""
    repo_id: Positional[Annotated[str | None, tyro.conf.arg(metavar="REPO_ID")]] = None
    """you/name; None is your name and the folder's."""
    private: bool = False
    """Create the repository private. A public one is refused: change that on its page."""
    revision: str | None = None
    """Branch to commit to, created when missing; None is main."""
    tag: str | None = None
    """Tag for the commit, created once it is proved; an existing tag of another commit is
    refused."""
    create_pr: bool = False
    """Open a pull request instead of committing to main. Needs no write access."""
    commit_message: str = "Publish DDPM pipeline"
    """Title of the commit."""
    license: str | None = None
    """License of the model for the card (an identifier of the Hub such as apache-2.0)."""
    space: tuple[str, ...] | None = None
    """Also publish a demo of the model, a Gradio Space, as you/name; without a name it is that of
    the model and -demo."""
    dry_run: bool = False
    """Print the files that would be sent, and the card, and stop. Needs no account."""

    def __post_init__(self) -> None:
        for flag, name in (("--revision", self.revision), ("--tag", self.tag)):
            if name is not None and not is_ref_name(name):
                raise UsageError(
                    f"{flag} {name!r} is no name for a branch or tag: use letters, digits "
                    "and - _ . as in v1.0."
                )
        if self.create_pr and (self.revision or self.tag):
            other = "--revision" if self.revision else "--tag"
            raise UsageError(
                f"--create_pr proposes a commit to main, so {other} does not go with it. Leave one "
                "of the two out."
            )
        if self.space is not None and len(self.space) > 1:
            raise UsageError(f"--space {' '.join(self.space)}: give one name, or none.")
        if self.space is not None and self.create_pr:
            raise UsageError(
                "--space shows what main holds, and --create_pr only proposes it. Leave one of the "
                "two out, and give --space once the proposal is merged."
            )
        if not self.commit_message.strip():
            raise UsageError("--commit_message is empty: give the commit a title, or leave it out.")

    def space_id(self, repo_id: str) -> str:
        """Return the name of the Space of --space for the demo of a model."""
        return self.space[0] if self.space else f"{repo_id}-demo"


def is_ref_name(name: str) -> bool:
    """Return whether git accepts `name` for a branch or tag, and it does not look like a commit."""
    wrong = name.endswith((".", ".lock")) or name.startswith("refs/")
    return bool(REVISION.fullmatch(name)) and not wrong and not re.fullmatch(r"[0-9a-f]{40}", name)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """All of sample.py's settings."""

    model: Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """An id on the Hub (owner/name), a folder with a pipeline, or a checkpoint of a run folder.
    Optional with --like."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub; None is the newest on main."""
    num_images: int = 16
    """Number of images."""
    seed: int = 0
    """Seed of the first image; image k has seed + k."""
    scheduler: Scheduler | None = None
    """Sampler that turns noise into images; None is dpmsolver-sde (ddim with --interpolate and
    --image), or with --prompt the pipeline's own."""
    num_inference_steps: int | None = None
    """Denoising steps; None is 50, all timesteps for ddpm, or the pipeline's own default."""
    quality: Quality | None = None
    """Select sampler and steps by the measurements of this model (evaluate.py --samplers): best has
    the lowest distance, good the least time with a distance that is not significantly higher, fast
    the lowest distance in at most 10 steps."""
    batch_size: int | None = None
    """Images denoised at once; changes no image. None is 64 for images of up to 32 x 32 pixels,
    else 16. Halved when memory runs out."""
    output_dir: str = "samples"
    """Folder for seed-00000.png, ... and grid.png."""
    like: str | None = None
    """A PNG made by this command, to generate again: model, revision, seed and settings are read
    from it. Flags override them."""
    npz: bool = False
    """Also write samples.npz: all images as one uint8 array [N, H, W, C], as FID tools read it."""
    parquet: bool = False
    """Also write samples.parquet: an image dataset that `datasets` loads."""
    trajectory: bool = False
    """Also write a strip and a GIF of each image during denoising: x_t and the predicted image."""
    interpolate: tuple[int, int] | None = None
    """Two seeds: generate num_images from noises interpolated between those of the two."""
    image: str | None = None
    """An image to start from: restored after --noise_level of noise, inpainted in a --mask, or
    changed by a --prompt."""
    noise_level: float | None = None
    """Fraction of the timesteps that add noise to --image, above 0 to 1; None is 0.5."""
    mask: str | None = None
    """A mask of the size of --image: white is inpainted, black is kept."""
    num_resamples: int = 10
    """Times that each denoising step is repeated with a --mask (RePaint); more fits the kept part
    better."""
    background: str = "white"
    """Color behind transparent pixels of --image: a name or #rrggbb. A model of RGBA images keeps
    them transparent."""
    class_label: str | int | None = None
    """Class to draw with a model that has classes: its name, or else its id; all draws num_images
    of each. None draws without a class."""
    guidance_scale: float | None = None
    """Strength of classifier-free guidance by the class or the prompt, from -100 to 100; 1 is no
    guidance. None is 2 for a class, and the pipeline's own default for a prompt."""
    guidance_interval: str | None = None
    """Noise levels LOW,HIGH from 0 to 1 between which images are guided to their class, as in
    0.2,0.8; None is 0,1."""
    prompt: str | None = None
    """Text of what to generate, for a text-to-image pipeline."""
    negative_prompt: str | None = None
    """Text of what the image should not show."""
    height: int | None = None
    """Height of images with a --prompt, in pixels; None is the pipeline's own."""
    width: int | None = None
    """Width of images with a --prompt, in pixels; None is the pipeline's own."""
    strength: float | None = None
    """Fraction of --image to replace with a --prompt, above 0 to 1."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    cpu_wait_policy: WaitPolicy = "auto"
    """How CPU threads wait for each other: spin (active), sleep (passive), or sleep while other
    work needs the cores (auto). On Linux only; OMP_WAIT_POLICY and GOMP_SPINCOUNT win."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the networks; noise, schedule and PNGs keep theirs."""
    compile: bool = False
    """Compile the network first (torch.compile): slower to start, faster after."""
    verify: bool = False
    """Generate only the proof images that were published with the model, and compare the pixels."""

    def __post_init__(self) -> None:
        require_at_least_one(
            self,
            "num_images",
            "batch_size",
            "num_inference_steps",
            "num_resamples",
            "height",
            "width",
        )
        if self.num_images > MAX_IMAGES:
            raise UsageError(f"--num_images {self.num_images}: give at most {MAX_IMAGES:,}.")
        require_no_file("output_dir", self.output_dir)
        require_revision(self, "revision")
        for seed in (self.seed, *(self.interpolate or ())):
            require_seed(seed, self.num_images)
        for name in ("noise_level", "strength"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"--{name} is {value}; give a number above 0, up to 1.")
        scale = self.guidance_scale
        if scale is not None and not abs(scale) <= MAX_GUIDANCE_SCALE:  # false for NaN too
            raise UsageError(
                f"--guidance_scale is {scale}; give a number from -{MAX_GUIDANCE_SCALE} to "
                f"{MAX_GUIDANCE_SCALE}."
            )
        _ = self.guidance_levels  # raises
        if self.background != "white":
            parse_color(self.background)
        if self.model is None and self.like is None:
            raise UsageError(
                "Name a MODEL: an id on the Hub, a folder, or a checkpoint. Or give --like "
                "image.png."
            )
        self._check_dependencies()
        self._check_conflicts()

    def _check_dependencies(self) -> None:
        """Raise UsageError for a flag that has an effect only with another one."""
        for name, needed in (
            ("noise_level", "image"),
            ("mask", "image"),
            ("strength", "image"),
            ("strength", "prompt"),
            ("negative_prompt", "prompt"),
            ("guidance_interval", "class_label"),
            ("height", "prompt"),
            ("width", "prompt"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise UsageError(
                    f"--{name} has no effect without --{needed}: add it, or leave both."
                )
        if self.guidance_scale is not None and self.class_label is self.prompt is None:
            raise UsageError(
                "--guidance_scale has no effect without --class_label or --prompt: add one of "
                "them, or leave it out."
            )

    def _check_conflicts(self) -> None:
        """Raise UsageError for flags that ask for different things."""
        if self.quality is not None:
            for name in ("scheduler", "num_inference_steps", "prompt", "like", "verify"):
                if getattr(self, name) not in (None, False):
                    raise UsageError(
                        f"--quality chooses the sampler and its steps, so --{name} does not go "
                        "with it: leave one out."
                    )
        if self.class_label is not None:
            is_all = self.class_label == ALL_CLASSES
            for name, is_given in (
                ("prompt", self.prompt is not None),
                ("verify", self.verify),
                ("interpolate", is_all and self.interpolate is not None),
                ("like", is_all and self.like is not None),
                ("image", is_all and self.restores),
            ):
                if is_given:
                    value = f" {ALL_CLASSES}" if is_all else ""
                    raise UsageError(
                        f"--class_label{value} does not go with --{name}: leave one out."
                    )
        modes = {
            "prompt": self.prompt is not None,
            "mask": self.mask is not None,
            "noise_level": self.noise_level is not None,
            "interpolate": self.interpolate is not None,
            "trajectory": self.trajectory,
        }
        given = [f"--{name}" for name, is_given in modes.items() if is_given]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} do different things: give one of them.")
        if self.image is not None and (self.interpolate is not None or self.trajectory):
            raise UsageError(f"--image and {given[0]} do different things: give one of them.")
        if self.restores and (self.npz or self.parquet):
            raise UsageError(
                "--npz and --parquet collect generated images; restoring --image makes none."
            )

    @property
    def guidance_levels(self) -> tuple[float, float]:
        """`guidance_interval` as two numbers; 0 and 1 for None."""
        if self.guidance_interval is None:
            return 0.0, 1.0
        try:
            low, high = map(float, self.guidance_interval.split(","))
        except ValueError:
            low, high = math.nan, math.nan
        if not 0 <= low < high <= 1:
            raise UsageError(
                f"--guidance_interval {self.guidance_interval}: give two numbers from 0 to 1, the "
                "lower one first, as in 0.2,0.8."
            )
        return low, high

    @property
    def restores(self) -> bool:
        """Whether noise is added to --image and removed again."""
        return self.image is not None and self.prompt is None and self.mask is None


def require_seed(seed: int, num_images: int) -> None:
    """Raise UsageError for a first seed whose range of seeds does not fit into 63 bits."""
    if not 0 <= seed <= 2**63 - num_images:
        raise UsageError(f"--seed {seed}: give a number from 0 to 2**63.")


def require_guidance_scale(name: str, scale: float) -> None:
    """Raise UsageError for a guidance scale that is no number from 0 to MAX_GUIDANCE_SCALE."""
    if not 0 <= scale <= MAX_GUIDANCE_SCALE:
        raise UsageError(
            f"--{name}: give numbers from 0, no class, to {MAX_GUIDANCE_SCALE}; 1 is no guidance."
        )


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
    as facebook/dinov2-base. None is the one in the dataset's folder (features.safetensors), else
    Inception."""
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
        try:
            lengths = {float(word) for word in self.ema_lengths.split(",")}
        except ValueError:
            lengths = {0.0}
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
        try:
            scales = {float(word) for word in self.guidance_scales.split(",")}
        except ValueError:
            scales = {-1.0}
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


def parse_sampler_choice(word: str) -> tuple[str, int | None]:
    """Return NAME:STEPS, or NAME alone, as a pair. Raise UsageError for an unknown name, and for
    steps that are no number above 0."""
    known = get_args(Scheduler)
    name, colon, steps = word.partition(":")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Give one of {', '.join(known)}."
        raise UsageError(f"--samplers {word}: {name!r} is no sampler. {hint}")
    if colon and not re.fullmatch("0*[1-9][0-9]{0,8}", steps, flags=re.ASCII):
        raise UsageError(
            f"--samplers {word}: give a number of steps after the colon, as in {name}:10, or "
            f"{name} alone."
        )
    return name, int(steps) if colon else None
