"""The settings of push.py, sample.py and evaluate.py, a sentence under each field.

Those of train.py are in config.py, by the rooms that take them.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from ddpm.config.train import DataConfig

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


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """All of push.py's settings."""

    output_dir: Positional[Annotated[str, tyro.conf.arg(metavar="OUTPUT_DIR")]]
    """The run folder of train.py."""
    repo_id: Positional[Annotated[str | None, tyro.conf.arg(metavar="REPO_ID")]] = None
    """you/name; None is your name and the folder's."""
    private: bool = False
    """Create the repository private. One that is public is refused: change that on its page."""
    revision: str | None = None
    """Branch to commit to, created when missing; None is main."""
    tag: str | None = None
    """Name for the commit, given once it is proved; one that exists elsewhere is refused."""
    create_pr: bool = False
    """Open a pull request instead of committing to main. Needs no right to write there."""
    commit_message: str = "Publish DDPM pipeline"
    """Title of the commit."""
    license: str | None = None
    """Licence of the model for the card (an identifier of the Hub such as apache-2.0)."""
    dry_run: bool = False
    """Print what would be sent, with the card, and stop. Needs no account."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """All of sample.py's settings."""

    model: Positional[Annotated[str | None, tyro.conf.arg(metavar="MODEL")]] = None
    """An id on the Hub (owner/name), a folder with a pipeline, or a checkpoint of a run folder.
    May be left out with --like."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub; None is the newest on main."""
    num_images: int = 16
    """How many images."""
    seed: int = 0
    """Seed of the first image; image k has seed + k."""
    scheduler: Scheduler | None = None
    """Which sampler turns noise into images; None is dpmsolver-sde (ddim
    beside --interpolate and --image), or with --prompt the pipeline's own."""
    num_inference_steps: int | None = None
    """Denoising steps; None is 50, the whole chain for ddpm, or the pipeline's own default."""
    quality: Quality | None = None
    """Choose sampler and steps by what was measured of this model (evaluate.py --samplers): best is
    the lowest distance, good the least time not to be told from it, fast at most 10 steps."""
    batch_size: int = 16
    """Images denoised at once; does not change any image. Halved when memory runs out."""
    output_dir: str = "samples"
    """Folder for seed-00000.png, ... and grid.png."""
    like: str | None = None
    """A PNG made by this command: its model, revision, seed and settings are taken from it, so that
    it is made again. Other flags win."""
    npz: bool = False
    """Also write samples.npz: all images as one uint8 array [N, H, W, C], as FID tools read it."""
    parquet: bool = False
    """Also write samples.parquet: an image dataset that `datasets` loads."""
    trajectory: bool = False
    """Also write a strip and a GIF of each image on its way: x_t, and the predicted picture."""
    interpolate: tuple[int, int] | None = None
    """Two seeds: draw num_images from noises on the way from the first to the second."""
    image: str | None = None
    """A picture to start from: restored after --noise_level of noise, painted anew in a --mask, or
    changed by a --prompt."""
    noise_level: float | None = None
    """How far up the noising chain --image goes, above 0 to 1; None is 0.5."""
    mask: str | None = None
    """A picture of the size of --image: what is white is painted anew, what is black is kept."""
    num_resamples: int = 10
    """How often each step is walked under a --mask; more agrees better with what is kept."""
    background: str = "white"
    """What shows through transparent pixels of --image: a colour name or #rrggbb."""
    prompt: str | None = None
    """What to draw, in words, for a text-to-image pipeline."""
    negative_prompt: str | None = None
    """What the picture should not show."""
    guidance_scale: float | None = None
    """How closely to follow the words; None is the pipeline's own default."""
    height: int | None = None
    """Height of pictures drawn from words, in pixels; None is the pipeline's own."""
    width: int | None = None
    """Width of pictures drawn from words, in pixels; None is the pipeline's own."""
    strength: float | None = None
    """How much of --image to replace when there is a --prompt, above 0 to 1."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the networks compute in; noise, schedule and PNGs keep their precision."""
    compile: bool = False
    """Compile the network first (torch.compile): slower to start, faster after."""
    verify: bool = False
    """Draw no samples: draw the proof images that came with the model, and compare the pixels."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """All of evaluate.py's settings. Those about data that are not given are those of the run."""

    model: Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """A run folder of train.py, a folder with a pipeline, a checkpoint, or an id on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub; None is the newest on main."""
    num_images: int = 1000
    """How many images to draw. Frechet distances of different numbers cannot be compared."""
    seed: int = 0
    """Seed of the first image; image k has seed + k."""
    scheduler: Scheduler | None = None
    """Which sampler turns noise into images; None is dpmsolver-sde."""
    num_inference_steps: int | None = None
    """Denoising steps; None is 50, or the whole chain for ddpm."""
    samplers: tuple[str, ...] | None = None
    """Measure samplers against each other instead, and write the menu that sample.py --quality
    chooses from. Each is NAME:STEPS, or NAME for its usual steps, as in --samplers ddim:10 ddpm;
    without any: ddim, dpmsolver++ and unipc in 5, 10, 20 and 50 steps, and ddpm."""
    batch_size: int = 64
    """Images of one process that are denoised or looked at at once; changes no number."""
    features: str | None = None
    """File of the network whose features are compared: TorchScript (.pt) or torch.export (.pt2),
    pixels [B, 3, H, W] uint8 to [B, D]. None is the one that the dataset's folder brings
    (features.safetensors), else Inception."""
    eval_split: str | None = None
    """Split that was held out; None is test or validation where the dataset has one."""
    ema_lengths: str | None = None
    """Also build and measure averages of these lengths (sigma_rel, as in 0.02,0.05,0.10,0.15) of a
    run that was trained with --post_hoc_ema."""
    export_best: bool = False
    """Put the best of --ema_lengths into the run folder's pipeline, and measure that one. What it
    replaces goes to ema/before."""
    held_out_seed: int = 0
    """Seed of the run, which decided what its --held_out left out; a run folder knows it."""
    output_dir: str | None = None
    """Folder for evaluation.json; None is MODEL, or a folder named like a model of the Hub."""
    data: DataConfig = field(default_factory=DataConfig)
