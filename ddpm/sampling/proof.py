"""Proof images: what a model draws from fixed seeds, kept beside it for others to compare with.

    proof.json              seeds, scheduler, steps; sha256 of the pixels and of the model's files
    proof/seed-00000.png    the pixels; lossless, and to be looked at

Training writes them from the weights it holds, push.py ships them and compares what the Hub gives
back, `sample.py MODEL --verify` compares on any other machine. They are drawn on the CPU in
float32 by the one generation path, so that the same machine draws the same bits.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm import hub
from ddpm.diffusion import schedulers
from ddpm.errors import UsageError, UserError
from ddpm.run_folder import (
    PIPELINE_FILES,
    PROOF,
    PROOF_IMAGES,
    UNET_WEIGHTS,
    read_json,
    write_json,
)
from ddpm.sampling import generate, image_io, pipeline

SEEDS = (0, 1)
SCHEDULER = schedulers.DETERMINISTIC_SCHEDULER
STEPS = 10
TOLERANCE = 2
"""Largest difference of a pixel, of 255, that another processor's rounding is allowed to make."""
MOST_IMAGES = 16
"""More than this a foreign proof may not ask a machine to draw."""


@dataclass(frozen=True)
class Proof:
    """What proof.json says. `pixels_sha256` is of the images' uint8 values in the order of `seeds`,
    each [C, H, W]; `files` maps the pipeline's files to the sha256 they had."""

    seeds: list[int]
    scheduler: str
    num_inference_steps: int
    pixels_sha256: str
    files: dict[str, str]
    versions: dict[str, str]


@dataclass(frozen=True)
class ProofResult:
    """How far the images drawn here are from those of the proof."""

    name: str
    version: str
    difference: int
    """Largest difference of a pixel, of 255."""
    num_images: int


def write_proof(output_dir: Path, unet: UNet2DModel, scheduler: DDPMScheduler) -> Proof:
    """Draw the proof images of a pipeline that was just exported and put them beside it.

    `unet` holds the weights that were exported, on any device; a copy of them draws on the CPU, so
    that a fault of the export itself is found when somebody compares. Call on one process.
    """
    copy = UNet2DModel.from_config(unet.config)
    copy.load_state_dict({name: value.cpu() for name, value in unet.state_dict().items()})
    chain = int(scheduler.config.get("num_train_timesteps", 1000))
    proof = Proof(
        seeds=list(SEEDS),
        scheduler=SCHEDULER,
        num_inference_steps=min(STEPS, chain),
        pixels_sha256="",
        files=file_hashes(output_dir),
        versions={name: version(name) for name in ("diffusers", "torch")},
    )
    images = draw_proof_images(copy.eval(), scheduler.config, proof)
    proof = replace(proof, pixels_sha256=_sha256(images))
    (output_dir / PROOF_IMAGES).mkdir(exist_ok=True)
    for seed, image in zip(proof.seeds, images, strict=True):
        image_io.save_png(image, output_dir / proof_image_name(seed), {"seed": str(seed)})
    write_json(output_dir / PROOF, asdict(proof))
    return proof


def write_proof_from_folder(folder: Path, name: str) -> Proof:
    """`write_proof` for a pipeline of other origin: from the weights in its own folder."""
    stock = load_with_diffusers(folder, name)
    return write_proof(folder, stock.unet, stock.scheduler)


def draw_proof_images(
    unet: UNet2DModel, scheduler_config: dict[str, Any], proof: Proof
) -> torch.Tensor:
    """The images of a proof: [N, C, H, W] uint8. `unet` is on the CPU, in eval mode."""
    scheduler = schedulers.build_sampling_scheduler(
        proof.scheduler, scheduler_config, proof.num_inference_steps
    )
    drawn = generate.generate_images(unet, scheduler, proof.seeds, len(proof.seeds))
    return torch.stack([image for _, image in drawn])


def read_proof(folder: Path, name: str) -> Proof | None:
    """The proof that lies in a folder; None where there is none. UserError for one that is not."""
    if not (folder / PROOF).is_file():
        return None
    try:
        proof = Proof(**read_json(folder / PROOF))
        seeds, steps = proof.seeds, proof.num_inference_steps
        whole = all(type(n) is int for n in (*seeds, steps)) and all(
            0 <= seed < 2**63 for seed in seeds
        )
        if whole and 0 < len(seeds) <= MOST_IMAGES and proof.scheduler in schedulers.SCHEDULERS:
            return proof
    except (TypeError, AttributeError):
        pass
    raise UserError(f"{name}: {PROOF} is not a proof that this command can read.")


def compare_with_proof(folder: Path, name: str, version: str) -> ProofResult:
    """Load a folder's pipeline with stock diffusers, draw its proof's images, compare the pixels.

    UserError when there is no whole proof, and when the images differ by more than TOLERANCE.
    """
    proof = read_proof(folder, name)
    if proof is None:
        raise UserError(
            f"{name} has no {PROOF}, so there is nothing to compare with: it was not published by "
            "this project's push.py."
        )
    stock = load_with_diffusers(folder, name)
    try:
        images = draw_proof_images(stock.unet, stock.scheduler.config, proof)
    except UsageError as error:
        raise UserError(f"{name}: {PROOF} does not belong to this model ({error})") from None
    verdict = ProofResult(
        name, version, max_difference(images, read_proof_images(folder, proof, name)), len(images)
    )
    if verdict.difference > TOLERANCE:
        raise UserError(
            f"{name} draws other images than its proof: the largest difference of a pixel is "
            f"{verdict.difference} of 255, and rounding explains {TOLERANCE}. The files or the "
            "software differ from those of the proof; do not trust this copy."
        )
    return verdict


def verify_model(model: str, revision: str | None = None) -> ProofResult:
    """`compare` for a folder or an id on the Hub, whose files are checked against its hashes."""
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"--revision belongs to models on the Hub; {model} is a folder here.")
        return compare_with_proof(
            folder, str(folder), pipeline.file_sha256(_weights(folder, model))
        )
    if not hub.is_repo_id(model):
        raise UserError(f"{model} is neither a folder here nor the id of a model on the Hub.")
    wanted = [*PIPELINE_FILES, PROOF, f"{PROOF_IMAGES}/*.png"]
    snapshot = hub.download_snapshot(model, revision=revision, allow_patterns=wanted)
    return compare_with_proof(snapshot.folder, model, snapshot.commit)


def load_with_diffusers(folder: Path, name: str) -> DDPMPipeline:
    """Any such folder as stock diffusers loads it, on the CPU in eval mode; `name` is for errors.

    Only safetensors, and only classes of diffusers: UserError for whatever else a folder asks for.
    """
    _weights(folder, name)
    pipeline.require_plain_index(folder, name)
    try:
        stock = DDPMPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"diffusers cannot load the pipeline in {name}: {reason}") from error
    stock.unet.eval()
    return stock


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file of the pipeline."""
    return {name: pipeline.file_sha256(folder / name) for name in PIPELINE_FILES}


def proof_image_name(seed: int) -> str:
    """Where the image of a seed lies, below the folder of proof.json."""
    return f"{PROOF_IMAGES}/seed-{seed:05d}.png"


def proof_file_names(proof: Proof) -> list[str]:
    """proof.json and its images."""
    return [PROOF, *(proof_image_name(seed) for seed in proof.seeds)]


def read_proof_images(folder: Path, proof: Proof, name: str) -> torch.Tensor:
    """The images that lie beside proof.json: [N, C, H, W] uint8. UserError when not as it says."""
    try:
        images = torch.stack([image_io.read_png(folder / proof_image_name(s)) for s in proof.seeds])
    except (OSError, SyntaxError, RuntimeError) as error:
        raise UserError(f"{name}: an image of {PROOF} cannot be read ({error}).") from None
    if _sha256(images) != proof.pixels_sha256:
        raise UserError(f"{name}: the images in {PROOF_IMAGES}/ are not those of {PROOF}.")
    return images


def max_difference(one: torch.Tensor, other: torch.Tensor) -> int:
    """Largest difference of a pixel; 255 for images that differ in size."""
    return 255 if one.shape != other.shape else int((one.int() - other.int()).abs().max())


def _weights(folder: Path, name: str) -> Path:
    missing = [file for file in PIPELINE_FILES if not (folder / file).is_file()]
    if UNET_WEIGHTS in missing:
        raise UserError(
            f"{name} has no {UNET_WEIGHTS}. Only safetensors are loaded: pickled weights can run "
            "code. Ask its author to convert them."
        )
    if missing:
        raise UserError(f"{name} is not whole: {', '.join(missing)} missing.")
    return folder / UNET_WEIGHTS


def _sha256(images: torch.Tensor | Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()
