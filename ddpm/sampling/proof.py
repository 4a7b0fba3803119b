"""Proof images: what a model generates from fixed seeds, kept with it for others to compare.

    proof.json              seeds, scheduler, steps; sha256 of the pixels and of the model's files
    proof/seed-00000.png    the images, lossless
    proof/label-00000.png   one image each of some classes, for a model with classes

Training writes them from the weights in memory, push.py ships them and compares what the Hub gives
back, and `sample.py MODEL --verify` compares on any other machine. They are generated on the CPU in
float32 by the one generation path, so that the same machine gives the same bits.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm import download, hub, run_folder
from ddpm.config.values import Scheduler
from ddpm.diffusion import schedulers
from ddpm.diffusion.class_labels import fold_label, has_classes, null_label
from ddpm.errors import UsageError, UserError, foreign_errors
from ddpm.file_io import file_sha256, read_json, write_json
from ddpm.run_folder import (
    CONDITIONAL,
    CONDITIONAL_CONFIG,
    CONDITIONAL_FILES,
    CONDITIONAL_LABELS,
    PIPELINE_FILES,
    PROOF,
    PROOF_IMAGES,
    UNET_WEIGHTS,
)
from ddpm.sampling import generate, image_io, pipeline_folder, unet_files
from ddpm.sampling.guidance import DEFAULT_GUIDANCE_SCALE, ClassGuidance
from ddpm.typed_json import parse_json

SEEDS = (0, 1)
SCHEDULER = schedulers.DETERMINISTIC_SCHEDULER
STEPS = 10
TOLERANCE = 2
"""Largest difference of a pixel, of 255, that the rounding of another processor explains."""
MAX_IMAGES = 16
"""Largest number of images that a downloaded proof may ask for."""
MAX_STEPS = 1000
"""Largest number of steps that a downloaded proof may ask for."""


@dataclass(frozen=True)
class Proof:
    """The content of proof.json. ValueError for values that cannot be.

    The images are those of `seeds` without a class, then one of each class in `labels`: of the
    first from seed 0, of the next from seed 1. `pixels_sha256` is the hash of their uint8 values,
    each [C, H, W]; `files` gives the sha256 of the model's files.
    """

    seeds: list[int]
    scheduler: Scheduler
    num_inference_steps: int
    pixels_sha256: str
    files: dict[str, str]
    versions: dict[str, str]
    labels: list[int] = field(default_factory=list)
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE

    def __post_init__(self) -> None:
        if not self.seeds or len(self.seeds) + len(self.labels) > MAX_IMAGES:
            raise ValueError(f"{len(self.seeds)} seeds; give 1 to {MAX_IMAGES}")
        if not all(0 <= seed < 2**63 for seed in self.seeds):
            raise ValueError("a seed is not in 0..2**63 - 1")
        if not 1 <= self.num_inference_steps <= MAX_STEPS:
            raise ValueError(f"num_inference_steps is not in 1..{MAX_STEPS}")


@dataclass(frozen=True)
class ProofResult:
    """How far the images generated here are from those of the proof."""

    name: str
    version: str
    difference: int
    """Largest difference of a pixel, of 255."""
    num_images: int


def write_proof(output_dir: Path, unet: UNet2DModel, scheduler: DDPMScheduler) -> Proof:
    """Generate the proof of a pipeline that was just exported and write it to the same folder.

    `unet` holds the exported weights, on any device. A copy of them is used on the CPU, not the
    exported file, so that a faulty export is found by whoever compares. Call on one process.
    """
    conditional, labels = None, []
    copy = UNet2DModel.from_config(unet.config).eval()
    copy.load_state_dict({name: value.cpu() for name, value in unet.state_dict().items()})
    if has_classes(copy):
        null = null_label(copy)
        conditional, copy, labels = copy, fold_label(copy, null), sorted({0, null - 1})
    proof = Proof(
        seeds=list(SEEDS),
        scheduler=SCHEDULER,
        num_inference_steps=min(STEPS, int(scheduler.config.get("num_train_timesteps", 1000))),
        pixels_sha256="",
        files=file_hashes(output_dir),
        versions={name: version(name) for name in ("diffusers", "torch")},
        labels=labels,
    )
    images = draw_proof_images(proof, copy, conditional, scheduler.config)
    proof = replace(proof, pixels_sha256=_sha256(images))
    (output_dir / PROOF_IMAGES).mkdir(exist_ok=True)
    for name, image in zip(proof_file_names(proof)[1:], images, strict=True):
        image_io.save_png(image, output_dir / name, {})
    write_json(output_dir / PROOF, asdict(proof))
    return proof


def write_proof_from_folder(folder: Path, name: str) -> Proof:
    """Call `write_proof` with the weights in the folder, for a pipeline from elsewhere."""
    stock, conditional = load_with_diffusers(folder, name)
    return write_proof(folder, conditional or stock.unet, stock.scheduler)


def draw_proof_images(
    proof: Proof,
    unet: UNet2DModel,
    conditional: UNet2DModel | None,
    scheduler_config: dict[str, Any],
) -> torch.Tensor:
    """Return the images of a proof: [N, C, H, W] uint8. The UNets are on the CPU, in eval mode.

    `conditional` is the one with classes, if there is one.
    """
    scheduler = schedulers.build_sampling_scheduler(
        proof.scheduler, scheduler_config, proof.num_inference_steps
    )
    images = list(generate.generate_images(unet, scheduler, proof.seeds, len(proof.seeds)))
    if conditional is not None:
        guidance = ClassGuidance(proof.labels.__getitem__, proof.guidance_scale)
        seeds = range(len(proof.labels))
        images += generate.generate_images(
            conditional, scheduler, seeds, MAX_IMAGES, guidance=guidance
        )
    return torch.stack([image for _, image in images])


def read_proof(folder: Path, name: str) -> Proof | None:
    """Read the proof in a folder; None if there is none. UserError for a bad one."""
    if not (folder / PROOF).is_file():
        return None
    return parse_json(Proof, read_json(folder / PROOF), f"{name}: {PROOF}")


def compare_with_proof(folder: Path, name: str, version: str) -> ProofResult:
    """Load a pipeline with stock diffusers, generate its proof images and compare the pixels.

    UserError if there is no complete proof, or if a pixel differs by more than TOLERANCE.
    """
    proof = read_proof(folder, name)
    if proof is None:
        raise UserError(
            f"{name} has no {PROOF}, so there is nothing to compare with: it was not published by "
            "this project's push.py."
        )
    stock, conditional = load_with_diffusers(folder, name)
    num_classes = 0 if conditional is None else null_label(conditional)
    if bool(proof.labels) != bool(num_classes) or not all(
        0 <= label < num_classes for label in proof.labels
    ):
        raise UserError(f"{name}: {PROOF} shows other classes than the model has.")
    try:
        images = draw_proof_images(proof, stock.unet, conditional, stock.scheduler.config)
    except UsageError as error:
        raise UserError(f"{name}: {PROOF} does not belong to this model ({error})") from None
    difference = max_difference(images, read_proof_images(folder, proof, name))
    if difference > TOLERANCE:
        raise UserError(
            f"{name} draws other images than its proof: the largest difference of a pixel is "
            f"{difference} of 255, and rounding explains {TOLERANCE}. The files or the software "
            "differ from those of the proof; do not trust this copy."
        )
    return ProofResult(name, version, difference, len(images))


def verify_model(model: str, revision: str | None = None) -> ProofResult:
    """Call `compare_with_proof` for a folder, or for an id on the Hub with verified files."""
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"--revision belongs to models on the Hub; {model} is a folder here.")
        return compare_with_proof(folder, str(folder), file_sha256(_require_files(folder, model)))
    if not hub.is_repo_id(model):
        raise UserError(f"{model} is neither a folder here nor the id of a model on the Hub.")
    patterns = [*PIPELINE_FILES, *CONDITIONAL_FILES, PROOF, f"{PROOF_IMAGES}/*.png"]
    snapshot = download.download_snapshot(model, revision=revision, allow_patterns=patterns)
    return compare_with_proof(snapshot.folder, model, snapshot.commit)


def load_with_diffusers(folder: Path, name: str) -> tuple[DDPMPipeline, UNet2DModel | None]:
    """Load a pipeline and its UNet with classes, if there is one, with stock diffusers.

    On the CPU in eval mode; `name` is for errors. UserError for anything but safetensors and
    classes of diffusers, and for a UNet with classes that is not that of the pipeline.
    """
    _require_files(folder, name)
    pipeline_folder.require_plain_pipeline(folder, name)
    is_conditional, options = run_folder.has_classes(folder), {"use_safetensors": True}
    if is_conditional:
        class_names = unet_files.read_labels(folder / CONDITIONAL_LABELS, name)
        unet_files.read_unet_config(folder / CONDITIONAL_CONFIG, name, len(class_names))
    with foreign_errors(f"diffusers cannot load the pipeline in {name}"):
        stock = DDPMPipeline.from_pretrained(folder, local_files_only=True, **options)
        unet_files.require_finite(stock.unet, name)
        stock.unet.eval()
        if not is_conditional:
            return stock, None
        conditional = UNet2DModel.from_pretrained(folder / CONDITIONAL, **options)
    unet_files.require_same_unet(stock.unet, conditional, name)
    return stock, conditional.eval()


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of the model."""
    return {name: file_sha256(folder / name) for name in run_folder.model_files(folder)}


def proof_image_name(seed: int) -> str:
    """Return the path of the image of a seed, relative to the folder of proof.json."""
    return f"{PROOF_IMAGES}/seed-{seed:05d}.png"


def proof_file_names(proof: Proof) -> list[str]:
    """Return the relative paths of proof.json and its images."""
    labels = (f"{PROOF_IMAGES}/label-{label:05d}.png" for label in proof.labels)
    return [PROOF, *map(proof_image_name, proof.seeds), *labels]


def read_proof_images(folder: Path, proof: Proof, name: str) -> torch.Tensor:
    """Read the stored images: [N, C, H, W] uint8. UserError if they are not those of the proof."""
    with foreign_errors(f"{name}: an image of {PROOF} cannot be read"):
        paths = (folder / name for name in proof_file_names(proof)[1:])
        images = torch.stack([image_io.read_png(path) for path in paths])
    if _sha256(images) != proof.pixels_sha256:
        raise UserError(f"{name}: the images in {PROOF_IMAGES}/ are not those of {PROOF}.")
    return images


def max_difference(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return the largest difference of a pixel; 255 for images that differ in size."""
    return 255 if one.shape != other.shape else int((one.int() - other.int()).abs().max())


def _require_files(folder: Path, name: str) -> Path:
    """Return the path of the weights. UserError if a file of the pipeline is missing."""
    missing = [file for file in run_folder.model_files(folder) if not (folder / file).is_file()]
    if UNET_WEIGHTS in missing:
        raise UserError(
            f"{name} has no {UNET_WEIGHTS}. Only safetensors are loaded: pickled weights can run "
            "code. Ask its author to convert them."
        )
    if missing:
        raise UserError(f"{name} is not complete: {', '.join(missing)} missing.")
    return folder / UNET_WEIGHTS


def _sha256(images: torch.Tensor | Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()
