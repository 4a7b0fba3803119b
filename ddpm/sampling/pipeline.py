"""The artifact: a plain diffusers pipeline folder, exported atomically and loaded from anywhere.

Loading reads JSON and safetensors only and never runs code of a repository. A model may be:

    model_index.json  unet/  scheduler/       as training exports it, and as diffusers does today
    model_index.json  config.json  diffusion_pytorch_model.safetensors  scheduler_config.json
                                              the flat layout of the first diffusers models
    checkpoint-500/                           of a run folder: its EMA weights, else its raw weights

A model with classes is two UNets: that of the pipeline draws without a class, and is the one in

    conditional/    config.json  diffusion_pytorch_model.safetensors  labels.json {"0": "cat", ...}

with its null class folded into the weights (diffusion/class_labels.py).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpm.config.train import TrainConfig
from ddpm.diffusion.class_labels import EMBEDDING, fold_label, null_label
from ddpm.diffusion.unet import build_scheduler, build_unet, empty_unet
from ddpm.errors import UserError, foreign_errors
from ddpm.file_io import (
    file_sha256,
    fsync_dir,
    fsync_tree,
    write_failure_reason,
    write_json,
)
from ddpm.run_folder import (
    CHECKPOINT_STATE,
    CONDITIONAL,
    CONDITIONAL_CONFIG,
    CONDITIONAL_FILES,
    CONDITIONAL_LABELS,
    CONDITIONAL_WEIGHTS,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    TRAIN_CONFIG,
    UNET_CONFIG,
    UNET_WEIGHTS,
    export_was_interrupted,
    has_classes,
)
from ddpm.run_record import read_record
from ddpm.sampling.pipeline_folder import (
    PipelineFolder,
    find_pipeline,
    read_scheduler_config,
    require_classes,
    require_no_revision,
    require_unet,
)
from ddpm.sampling.unet_files import (
    load_unet,
    read_labels,
    read_unet_config,
    require_finite,
    require_safetensors,
    require_same_unet,
)


@dataclass(frozen=True)
class DiffusionModel:
    """A loaded model. `version` is its commit on the Hub, or the sha256 of a folder's weights.

    `kind` is the class of pipeline that it is published as. `class_names` are those of a UNet with
    classes, by their ids; None if it has none.
    """

    unet: UNet2DModel
    scheduler_config: dict[str, Any]
    name: str
    version: str
    kind: str = "DDPMPipeline"
    class_names: tuple[str, ...] | None = None


def export_pipeline(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    output_dir: Path,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a DDPMPipeline into `output_dir`; each file is replaced atomically.

    A UNet with classes, whose names are `class_names`, is written to conditional/ too. The files
    are complete and on disk in a hidden folder before the first is renamed. Raise UserError for
    weights that are no numbers, and if the disk cannot take them.
    """
    require_finite(unet, "The model")
    partial = output_dir / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    settings, weights = [SCHEDULER_CONFIG, UNET_CONFIG], [UNET_WEIGHTS]
    try:
        if class_names is not None:
            settings += [CONDITIONAL_CONFIG, CONDITIONAL_LABELS]
            weights += [CONDITIONAL_WEIGHTS]
            unet.save_pretrained(partial / CONDITIONAL)
            write_json(partial / CONDITIONAL_LABELS, dict(enumerate(class_names)))
            unet = fold_label(unet, null_label(unet))
        pipe = DDPMPipeline(unet=unet, scheduler=scheduler)
        pipe.save_pretrained(partial, safe_serialization=True)
        fsync_tree(partial)
    except (OSError, SafetensorError) as error:
        reason = write_failure_reason(error, output_dir)
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"The pipeline could not be written to {output_dir} ({reason}). "
            "What was there before is untouched. Free some space, then run the same command again."
        ) from error
    # The weights of both UNets directly after each other, since each belongs to the other, and
    # model_index.json last: a folder that has one is complete.
    for name in (*settings, *weights, MODEL_INDEX):
        destination = output_dir / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, destination)
        fsync_dir(destination.parent)
    shutil.rmtree(partial)


def export_settings(unet: UNet2DModel, scheduler: DDPMScheduler, output_dir: Path) -> None:
    """Write the settings of a pipeline alone, by which checkpoints of a run are loaded.

    Those of its UNet are without classes, as in `export_pipeline`.
    """
    with torch.device("meta"):
        plain = UNet2DModel.from_config(unet.config, num_class_embeds=None)
    for config, name in ((plain, UNET_CONFIG), (scheduler, SCHEDULER_CONFIG)):
        (output_dir / name).parent.mkdir(exist_ok=True)
        write_json(output_dir / name, json.loads(config.to_json_string()))


def load_model(
    model: str,
    revision: str | None = None,
    cache_dir: str | None = None,
    conditional: bool | None = False,
) -> DiffusionModel:
    """Load `model`, a folder or an id on the Hub, on the CPU in float32 and eval mode.

    With `conditional`, its UNet is the one with classes; None: if it has one. Files of the Hub are
    checked against the Hub's hashes before they are read. Raise UserError for anything but an
    unconditional pipeline, for weights that are not safetensors, and with `conditional` for a model
    without classes.
    """
    folder = Path(model)
    if (folder / CHECKPOINT_STATE).is_file():
        require_no_revision(model, revision)
        return _load_checkpoint(folder, conditional)
    found = find_pipeline(model, revision, cache_dir, conditional, unet_only=True)
    loaded = load_from_folder(found)
    if conditional is None:
        conditional = has_classes(found.folder)
    return _with_classes(loaded, found.folder) if conditional else loaded


def load_from_folder(pipeline: PipelineFolder) -> DiffusionModel:
    """Load the UNet and the scheduler's config of an unconditional pipeline on this disk."""
    name = pipeline.name
    require_unet(name, pipeline.index)
    unet_folder = _component_folder(pipeline.folder, "unet")
    require_safetensors(unet_folder, name)
    scheduler_folder = _component_folder(pipeline.folder, "scheduler")
    configs = (
        unet_folder / Path(UNET_CONFIG).name,
        scheduler_folder / Path(SCHEDULER_CONFIG).name,
    )
    missing = [path for path in configs if not path.is_file()]
    if missing:
        names = ", ".join(path.relative_to(pipeline.folder).as_posix() for path in missing)
        raise UserError(f"{name} is not whole: {names} missing.")
    scheduler_config = read_scheduler_config(configs[1], name)
    unet = load_unet(unet_folder, name)
    length = scheduler_config.get("num_train_timesteps", 1000)
    if unet.config.time_embedding_type == "learned" and unet.config.num_train_timesteps < length:
        raise UserError(f"{name}: its UNet knows fewer timesteps than its scheduler.")
    weights = unet_folder / Path(UNET_WEIGHTS).name
    version = pipeline.version or (
        file_sha256(weights) if weights.is_file() else weights_sha256(pipeline)
    )
    return DiffusionModel(unet.eval(), scheduler_config, name, version, pipeline.kind)


def weights_sha256(pipeline: PipelineFolder) -> str:
    """Return the version of a pipeline in a local folder: the sha256 over those of its weights."""
    weights = sorted(pipeline.folder.rglob("*.safetensors"))
    return hashlib.sha256("".join(map(file_sha256, weights)).encode()).hexdigest()


def _component_folder(folder: Path, name: str) -> Path:
    """Return the folder of a component: `folder` itself in the flat layout, as in diffusers."""
    return folder / name if (folder / name).is_dir() else folder


def _with_classes(model: DiffusionModel, folder: Path) -> DiffusionModel:
    """Return the model with the UNet of conditional/ and the names of its classes."""
    require_classes(folder, model.name, CONDITIONAL_FILES)
    class_names = read_labels(folder / CONDITIONAL_LABELS, model.name)
    unet = load_unet(folder / CONDITIONAL, model.name, len(class_names))
    if not export_was_interrupted(folder):  # between their weights; the next export completes it
        require_same_unet(model.unet, unet, model.name)
    return replace(model, unet=unet.eval(), class_names=class_names)


def _load_checkpoint(folder: Path, conditional: bool | None) -> DiffusionModel:
    """Load checkpoint-N of a run: its EMA weights if it has any, with the run's own config."""
    run = folder.resolve().parent
    config = TrainConfig.from_json(run / TRAIN_CONFIG)
    paths = [folder / name for name in ("ema.safetensors", "model.safetensors")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder} is not whole: it has neither ema nor model.safetensors.")
    with foreign_errors(f"{folder} cannot be loaded"):
        weights = load_file(path)
        num_classes = len(weights[EMBEDDING]) - 1 if EMBEDDING in weights else None
        if (run / UNET_CONFIG).is_file():
            settings = read_unet_config(run / UNET_CONFIG, str(run))
            settings["num_class_embeds"] = None if num_classes is None else num_classes + 1
            unet = empty_unet(settings, str(run))
            scheduler_config = read_scheduler_config(run / SCHEDULER_CONFIG, str(run))
        else:  # of a run before its first export, by an earlier version
            channels = weights["conv_in.weight"].shape[1]
            unet = build_unet(config.model, config.data.resolution, channels, num_classes)
            scheduler_config = dict(build_scheduler(config.diffusion).config)
        unet.load_state_dict(weights, assign=True)
    require_finite(unet, str(folder))
    class_names = None
    if conditional or (conditional is None and num_classes is not None):
        class_names = _recorded_classes(run, num_classes)
    elif num_classes is not None:
        unet = fold_label(unet, num_classes)
    return DiffusionModel(
        class_names=class_names,
        unet=unet.eval(),
        scheduler_config=scheduler_config,
        name=f"{run.name}/{folder.resolve().name}",
        version=file_sha256(path),
    )


def _recorded_classes(run: Path, num_classes: int | None) -> tuple[str, ...]:
    """Return the names of the classes in a run's record. UserError for a run without classes."""
    recorded = read_record(run).dataset
    names = tuple(recorded.classes) if recorded is not None else ()
    if num_classes is None or len(names) != num_classes:
        raise UserError(f"{run} was trained without classes. Leave out --class_label.")
    return names
