"""The settings of sample.py, with a sentence under each field."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from ddpm.config.base import (
    require_at_least_one,
    require_no_file,
    require_revision,
    require_seed,
)
from ddpm.config.values import (
    MAX_GUIDANCE_SCALE,
    Scheduler,
    WaitPolicy,
    parse_color,
    parse_numbers,
)
from ddpm.errors import UsageError

Quality = Literal["fast", "good", "best"]
MAX_IMAGES = 10**9
ALL_CLASSES = "all"


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
        levels = parse_numbers(self.guidance_interval)
        if len(levels) != 2 or not 0 <= levels[0] < levels[1] <= 1:
            raise UsageError(
                f"--guidance_interval {self.guidance_interval}: give two numbers from 0 to 1, the "
                "lower one first, as in 0.2,0.8."
            )
        return levels

    @property
    def restores(self) -> bool:
        """Whether noise is added to --image and removed again."""
        return self.image is not None and self.prompt is None and self.mask is None
