"""The artifact: a plain diffusers pipeline folder, exported whole and loaded from anywhere.

Loading reads JSON and safetensors only and never runs code of a repository. What it finds may be:

    model_index.json  unet/  scheduler/       as training exports it, and as diffusers does today
    model_index.json  config.json  diffusion_pytorch_model.safetensors  scheduler_config.json
                                              the flat layout of the first diffusers models
    checkpoint-500/                           of a run folder: its average, else its raw weights
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpm import hub
from ddpm.config.parser import parse_train
from ddpm.diffusion.unet import build_scheduler, build_unet
from ddpm.errors import UsageError, UserError
from ddpm.run_folder import (
    CHECKPOINT_STATE,
    MODEL_INDEX,
    SAMPLER_TABLE,
    SCHEDULER_CONFIG,
    TRAIN_CONFIG,
    UNET_CONFIG,
    UNET_WEIGHTS,
    checkpoints,
    fsync_dir,
    fsync_tree,
    read_json,
    write_failure_reason,
)

logging.disable_progress_bar()  # diffusers' bar over the parts of a pipeline

SUPPORTED_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
"""Those whose noise every sampler knows."""
CUSTOM_LOOP_PIPELINES = ("ScoreSdeVePipeline", "KarrasVePipeline")
"""Those with another kind of noise: drawn by diffusers' own pipeline, by its own scheduler."""
UNETS = (["diffusers", "UNet2DModel"], ["diffusers", "UNetUnconditionalModel"])
"""The unconditional UNet, under its name of today and that of the first diffusers."""
WEIGHTS = ("diffusion_pytorch_model", "model")
"""Names of weights, without .safetensors, in diffusers and in transformers."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline's folder on this disk and its model_index.json; `version` is the commit on the
    Hub, None for a folder."""

    folder: Path
    name: str
    version: str | None
    index: dict[str, Any]

    @property
    def kind(self) -> str:
        """The class of the pipeline."""
        return str(self.index.get("_class_name"))


@dataclass(frozen=True)
class UnconditionalModel:
    """A loaded model: `version` is its commit on the Hub, or the sha256 of a folder's weights.

    `kind` is the class of pipeline that it is published as.
    """

    unet: UNet2DModel
    scheduler_config: dict[str, Any]
    name: str
    version: str
    kind: str = "DDPMPipeline"


def export_pipeline(unet: UNet2DModel, scheduler: DDPMScheduler, output_dir: Path) -> None:
    """Put a DDPMPipeline into `output_dir`, file by file, each whole: old or new, never half.

    What is being written lies in a hidden folder beside until it is complete and on disk. UserError
    for a disk that cannot take it.
    """
    partial = output_dir / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    whole = DDPMPipeline(unet=unet, scheduler=scheduler)
    try:
        whole.save_pretrained(partial, safe_serialization=True)
        fsync_tree(partial)
    except (OSError, SafetensorError) as error:
        reason = write_failure_reason(error, output_dir)
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"The pipeline could not be written to {output_dir} ({reason}). "
            "What was there before is untouched. Make room, then run the same command again."
        ) from error
    for name in (SCHEDULER_CONFIG, UNET_CONFIG, UNET_WEIGHTS, MODEL_INDEX):
        destination = output_dir / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, destination)
        fsync_dir(destination.parent)
    shutil.rmtree(partial)


def load_model(
    model: str, revision: str | None = None, cache_dir: str | None = None
) -> UnconditionalModel:
    """Load `model`, a folder or an id on the Hub, on the CPU in float32 and eval mode.

    Files of the Hub are checked against the Hub's hashes before they are read. UserError for what
    is not an unconditional pipeline, and for weights that are not safetensors.
    """
    folder = Path(model)
    if (folder / CHECKPOINT_STATE).is_file():
        _no_revision(model, revision)
        return _load_checkpoint(folder)
    return load_from_folder(find_pipeline(model, revision, cache_dir))


def find_pipeline(
    model: str, revision: str | None = None, cache_dir: str | None = None
) -> PipelineFolder:
    """Where `model` lies, after fetching it from the Hub if it is no folder here.

    From the Hub come JSON, tokenizers' text and safetensors of the parts that model_index.json
    names, nothing else. UserError for what is no diffusers pipeline or asks for code of its own.
    """
    folder = Path(model)
    if folder.is_dir():
        _no_revision(model, revision)
        name = folder.resolve().name
        return PipelineFolder(folder, name, None, _read_index(folder, name))
    if not hub.is_repo_id(model):
        raise UserError(f"{model} is neither a folder here nor the id of a model on the Hub.")
    first = hub.download_snapshot(
        model, revision=revision, allow_patterns=[MODEL_INDEX, "config.json"], cache_dir=cache_dir
    )
    index = _read_index(first.folder, model)
    whole = hub.download_snapshot(
        model, revision=first.commit, allow_patterns=_files_of(index), cache_dir=cache_dir
    )
    return PipelineFolder(whole.folder, model, first.commit, index)


def load_from_folder(found: PipelineFolder) -> UnconditionalModel:
    """The UNet and the noising chain of an unconditional pipeline that lies on this disk."""
    name = found.name
    if (
        found.kind not in (*SUPPORTED_PIPELINES, *CUSTOM_LOOP_PIPELINES)
        or found.index.get("unet") not in UNETS
    ):
        raise UserError(
            f"{name} is a {found.kind} that this command cannot sample: without --prompt it draws "
            f"from unconditional pipelines with a UNet2DModel ({', '.join(SUPPORTED_PIPELINES + CUSTOM_LOOP_PIPELINES)})."
        )
    unet_folder = _part(found.folder, "unet")
    require_safetensors(unet_folder, name)
    scheduler = _part(found.folder, "scheduler") / Path(SCHEDULER_CONFIG).name
    missing = [
        path for path in (unet_folder / Path(UNET_CONFIG).name, scheduler) if not path.is_file()
    ]
    if missing:
        names = ", ".join(path.relative_to(found.folder).as_posix() for path in missing)
        raise UserError(f"{name} is not whole: {names} missing.")
    try:
        unet = UNet2DModel.from_pretrained(unet_folder, use_safetensors=True, local_files_only=True)
        config = read_json(scheduler)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name} cannot be loaded: {reason}") from error
    _require_drawable(unet, name)
    weights = unet_folder / Path(UNET_WEIGHTS).name
    version = found.version or (
        file_sha256(weights) if weights.is_file() else weights_sha256(found)
    )
    return UnconditionalModel(unet.eval(), config, name, version, found.kind)


def require_safetensors(folder: Path, name: str) -> None:
    """UserError unless the weights in `folder` are safetensors, whole or in numbered parts."""
    if any(any(folder.glob(f"{stem}*.safetensors")) for stem in WEIGHTS):
        return
    pickled = (
        [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLE_SUFFIXES]
        if folder.is_dir()
        else []
    )
    has = f"only {pickled[0]}" if pickled else "no weights in that format"
    raise UserError(
        f"{name} has {has} in {folder.name}/. Only safetensors are loaded: pickled weights can run "
        "code. Ask its author to convert them (save_pretrained does)."
    )


def weights_sha256(found: PipelineFolder) -> str:
    """What stands for a commit of a pipeline in a folder: sha256 over those of its weights."""
    weights = sorted(found.folder.rglob("*.safetensors"))
    return hashlib.sha256("".join(map(file_sha256, weights)).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def _no_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(f"--revision belongs to models on the Hub; {model} is a folder here.")


def _read_index(folder: Path, name: str) -> dict[str, Any]:
    """model_index.json, refused unless it describes parts that diffusers itself knows."""
    if not (folder / MODEL_INDEX).is_file():
        if checkpoints(folder):
            newest = list(checkpoints(folder).values())[-1]
            hint = f"It has checkpoints: give {newest}, or finish the run."
        else:
            hint = (
                "For a training run that was cut short, run train.py again with the same "
                "command to finish it."
            )
        raise UserError(f"{name} is no diffusers pipeline: it has no {MODEL_INDEX}. {hint}")
    index = read_json(folder / MODEL_INDEX)
    if not isinstance(index, dict) or not index.get("_class_name"):
        raise UserError(
            f"{name} has a {MODEL_INDEX} that this command cannot sample: it names no pipeline."
        )
    own = index["_class_name"] if not isinstance(index["_class_name"], str) else None
    for part, kind in index.items():
        if part.startswith("_") or not isinstance(kind, list) or kind == [None, None]:
            continue
        known = (
            kind
            and isinstance(kind[0], str)
            and (kind[0] in ("diffusers", "transformers") or hasattr(diffusers.pipelines, kind[0]))
        )
        own = own or (None if known else kind)
    if own:
        raise UserError(
            f"{name} wants code of its own ({json.dumps(own)} in {MODEL_INDEX}), which this "
            "command cannot sample: it never runs code of a repository."
        )
    return index


def _files_of(index: dict[str, Any]) -> list[str]:
    """Patterns of the files to fetch: no pickles, no code, no half-precision doubles."""
    weights = [f"{stem}{part}.safetensors" for stem in WEIGHTS for part in ("", "-?????-of-?????")]
    kinds = ["*.json", "*.txt", "*.model", *weights]
    parts = [
        name for name, kind in index.items() if not name.startswith("_") and isinstance(kind, list)
    ]
    flat = [
        MODEL_INDEX,
        "config.json",
        Path(SCHEDULER_CONFIG).name,
        Path(UNET_WEIGHTS).name,
        SAMPLER_TABLE,
    ]
    return [*flat, *(f"{part}/{kind}" for part in parts for kind in kinds)]


def _part(folder: Path, name: str) -> Path:
    """Where a part of a pipeline lies: its folder, or the top of a flat one, as diffusers looks."""
    return folder / name if (folder / name).is_dir() else folder


def _require_drawable(unet: UNet2DModel, name: str) -> None:
    config = unet.config
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise UserError(f"{name} draws a class that must be named, which this command cannot do.")
    if config.in_channels not in (1, 3) or config.out_channels != config.in_channels:
        raise UserError(
            f"{name} turns {config.in_channels} channels into {config.out_channels}: this command "
            "draws gray or RGB pixels, as many channels as go in."
        )
    if config.sample_size is None:
        raise UserError(f"{name} does not say how large its images are (sample_size in its UNet).")


def _load_checkpoint(folder: Path) -> UnconditionalModel:
    """checkpoint-N of a run folder: the average if there is one, with the run's own settings."""
    run = folder.resolve().parent
    config = parse_train(["--config", str(run / TRAIN_CONFIG)])
    path = next(
        (
            folder / name
            for name in ("ema.safetensors", "model.safetensors")
            if (folder / name).is_file()
        ),
        None,
    )
    if path is None:
        raise UserError(f"{folder} is not whole: it has neither ema nor model.safetensors.")
    try:
        weights = load_file(path)
        channels = weights["conv_in.weight"].shape[1]
        unet = build_unet(config.model, config.data.resolution, channels)
        unet.load_state_dict(weights)
    except (SafetensorError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} cannot be loaded: {reason}") from error
    scheduler = dict(build_scheduler(config.diffusion).config)
    return UnconditionalModel(
        unet.eval(), scheduler, f"{run.name}/{folder.resolve().name}", file_sha256(path)
    )
