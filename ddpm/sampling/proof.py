"""Proof images: what a model generates from fixed seeds, kept with it for others to compare.

    proof.json              seeds, scheduler, steps; sha256 of the pixels and of the model's files
    proof/seed-00000.png    the images, lossless

Training writes them from the weights in memory, push.py ships them and compares what the Hub gives
back, and `sample.py MODEL --verify` compares on any other machine. They are generated on the CPU in
float32 by the one generation path, so that the same machine gives the same bits.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm import download, hub
from ddpm.config.commands import Scheduler
from ddpm.diffusion import schedulers
from ddpm.errors import UsageError, UserError, foreign_errors
from ddpm.file_io import file_sha256, read_json, write_json
from ddpm.run_folder import PIPELINE_FILES, PROOF, PROOF_IMAGES, UNET_WEIGHTS
from ddpm.sampling import generate, image_io, pipeline
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

    `pixels_sha256` is the hash of the images' uint8 values in the order of `seeds`, each [C, H, W];
    `files` gives the sha256 of the pipeline's files.
    """

    seeds: list[int]
    scheduler: Scheduler
    num_inference_steps: int
    pixels_sha256: str
    files: dict[str, str]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        if not 1 <= len(self.seeds) <= MAX_IMAGES:
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
    copy = UNet2DModel.from_config(unet.config)
    copy.load_state_dict({name: value.cpu() for name, value in unet.state_dict().items()})
    steps = min(STEPS, int(scheduler.config.get("num_train_timesteps", 1000)))
    images = draw_proof_images(copy.eval(), scheduler.config, SEEDS, SCHEDULER, steps)
    proof = Proof(
        seeds=list(SEEDS),
        scheduler=SCHEDULER,
        num_inference_steps=steps,
        pixels_sha256=_sha256(images),
        files=file_hashes(output_dir),
        versions={name: version(name) for name in ("diffusers", "torch")},
    )
    (output_dir / PROOF_IMAGES).mkdir(exist_ok=True)
    for seed, image in zip(proof.seeds, images, strict=True):
        image_io.save_png(image, output_dir / proof_image_name(seed), {"seed": str(seed)})
    write_json(output_dir / PROOF, asdict(proof))
    return proof


def write_proof_from_folder(folder: Path, name: str) -> Proof:
    """Call `write_proof` with the weights in the folder, for a pipeline from elsewhere."""
    stock = load_with_diffusers(folder, name)
    return write_proof(folder, stock.unet, stock.scheduler)


def draw_proof_images(
    unet: UNet2DModel,
    scheduler_config: dict[str, Any],
    seeds: Sequence[int],
    scheduler_name: str,
    num_inference_steps: int,
) -> torch.Tensor:
    """Return the images of a proof: [N, C, H, W] uint8. `unet` is on the CPU, in eval mode."""
    scheduler = schedulers.build_sampling_scheduler(
        scheduler_name, scheduler_config, num_inference_steps
    )
    images = generate.generate_images(unet, scheduler, seeds, len(seeds))
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
    stock = load_with_diffusers(folder, name)
    try:
        images = draw_proof_images(
            stock.unet,
            stock.scheduler.config,
            proof.seeds,
            proof.scheduler,
            proof.num_inference_steps,
        )
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
    patterns = [*PIPELINE_FILES, PROOF, f"{PROOF_IMAGES}/*.png"]
    snapshot = download.download_snapshot(model, revision=revision, allow_patterns=patterns)
    return compare_with_proof(snapshot.folder, model, snapshot.commit)


def load_with_diffusers(folder: Path, name: str) -> DDPMPipeline:
    """Load a folder with stock diffusers, on the CPU in eval mode; `name` is for errors.

    UserError for anything but safetensors and classes of diffusers.
    """
    _require_files(folder, name)
    pipeline.require_plain_pipeline(folder, name)
    with foreign_errors(f"diffusers cannot load the pipeline in {name}"):
        stock = DDPMPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    pipeline.require_finite(stock.unet, name)
    stock.unet.eval()
    return stock


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of the pipeline."""
    return {name: file_sha256(folder / name) for name in PIPELINE_FILES}


def proof_image_name(seed: int) -> str:
    """Return the path of the image of a seed, relative to the folder of proof.json."""
    return f"{PROOF_IMAGES}/seed-{seed:05d}.png"


def proof_file_names(proof: Proof) -> list[str]:
    """Return the relative paths of proof.json and its images."""
    return [PROOF, *(proof_image_name(seed) for seed in proof.seeds)]


def read_proof_images(folder: Path, proof: Proof, name: str) -> torch.Tensor:
    """Read the stored images: [N, C, H, W] uint8. UserError if they are not those of the proof."""
    with foreign_errors(f"{name}: an image of {PROOF} cannot be read"):
        images = torch.stack([image_io.read_png(folder / proof_image_name(s)) for s in proof.seeds])
    if _sha256(images) != proof.pixels_sha256:
        raise UserError(f"{name}: the images in {PROOF_IMAGES}/ are not those of {PROOF}.")
    return images


def max_difference(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return the largest difference of a pixel; 255 for images that differ in size."""
    return 255 if one.shape != other.shape else int((one.int() - other.int()).abs().max())


def _require_files(folder: Path, name: str) -> Path:
    """Return the path of the weights. UserError if a file of the pipeline is missing."""
    missing = [file for file in PIPELINE_FILES if not (folder / file).is_file()]
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
