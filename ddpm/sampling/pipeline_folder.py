"""The pipeline folder of anyone: what its model_index.json may name, and what is downloaded of it.

Only classes of diffusers and transformers, JSON, the text of tokenizers, and safetensors: code of a
repository is neither downloaded nor run.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusers.utils import logging

from ddpm import download, hub
from ddpm.diffusion.schedulers import parse_scheduler_config
from ddpm.diffusion.unet import empty_unet
from ddpm.errors import UsageError, UserError
from ddpm.file_io import read_json
from ddpm.run_folder import (
    CONDITIONAL_FILES,
    CONDITIONAL_LABELS,
    EVALUATION,
    MODEL_INDEX,
    SAMPLER_TABLE,
    SCHEDULER_CONFIG,
    UNET_CONFIG,
    UNET_WEIGHTS,
    checkpoints,
)
from ddpm.sampling.unet_files import WEIGHTS, ShardIndex, read_unet_config
from ddpm.typed_json import parse_json

logging.disable_progress_bar()  # diffusers' bar over the components of a pipeline

SUPPORTED_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
"""Pipelines whose noise every scheduler of ours supports."""
CUSTOM_LOOP_PIPELINES = ("ScoreSdeVePipeline", "KarrasVePipeline")
"""Pipelines with another kind of noise: sampled by diffusers' own pipeline and scheduler."""
UNETS = (("diffusers", "UNet2DModel"), ("diffusers", "UNetDiffusionModel"))
"""The unconditional UNet, under its name of today and that of the first diffusers."""
COMPONENT_JSON_LIMIT = 2**26
"""Largest JSON file in bytes of a component: a tokenizer's vocabulary may take 40 MB."""


@dataclass(frozen=True)
class ModelIndex:
    """A model_index.json that names classes of diffusers and transformers only.

    `components` maps each component to (library, class); `names` are all its public keys.
    """

    class_name: str
    components: dict[str, tuple[str, str]]
    names: frozenset[str]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "ModelIndex":
        """Check the JSON of a stranger. Raise ValueError with the JSON of code of its own, empty
        when it names no pipeline at all."""
        if not value.get("_class_name"):
            raise ValueError
        if not isinstance(value["_class_name"], str):
            raise ValueError(json.dumps(value["_class_name"]))
        components = {}
        for name, entry in value.items():
            if name.startswith("_") or not isinstance(entry, list) or entry == [None, None]:
                continue
            if len(entry) != 2 or not all(isinstance(item, str) for item in entry):
                raise ValueError(json.dumps(entry))
            if not name.isidentifier():  # it is the name of a folder too
                raise ValueError(json.dumps(name))
            library, class_name = entry
            # Other libraries are code of the repository, except for the modules of diffusers'
            # pipelines (["stable_diffusion", "StableDiffusionSafetyChecker"]).
            if library not in ("diffusers", "transformers") and not (
                library.isidentifier() and find_spec(f"diffusers.pipelines.{library}")
            ):
                raise ValueError(json.dumps(entry))
            components[name] = (library, class_name)
        names = frozenset(name for name in value if not name.startswith("_"))
        return cls(value["_class_name"], components, names)

    @property
    def is_plain(self) -> bool:
        """Whether it names a UNet2DModel and a scheduler of diffusers, and nothing else."""
        library, scheduler = self.components.get("scheduler", ("", ""))
        return (
            self.class_name in SUPPORTED_PIPELINES
            and self.components.get("unet") == UNETS[0]
            and library == "diffusers"
            and re.fullmatch(r"[A-Za-z0-9]+Scheduler", scheduler) is not None
            and self.names == {"unet", "scheduler"}
        )


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline on this disk. `version` is its commit on the Hub, None for a local folder."""

    folder: Path
    name: str
    version: str | None
    index: ModelIndex

    @property
    def kind(self) -> str:
        """The class of the pipeline."""
        return self.index.class_name


def find_pipeline(
    model: str,
    revision: str | None = None,
    cache_dir: str | None = None,
    conditional: bool | None = False,
    unet_only: bool = False,
) -> PipelineFolder:
    """Return the folder of `model`, downloaded from the Hub unless it is a local folder.

    Only JSON, the tokenizers' text and the safetensors of the components in model_index.json are
    downloaded, and those of its UNet with classes unless `conditional` is False. Raise UserError if
    it is no diffusers pipeline, needs code of its own, with `conditional` has no classes, or with
    `unet_only` is no unconditional pipeline.
    """
    folder = Path(model)
    if folder.is_dir():
        require_no_revision(model, revision)
        name = folder.resolve().name
        return _checked(PipelineFolder(folder, name, None, _read_index(folder, name)))
    if not hub.is_repo_id(model):
        raise UserError(f"{model} is neither a folder here nor the id of a model on the Hub.")
    small_files = [MODEL_INDEX, "config.json", *((CONDITIONAL_LABELS,) if conditional else ())]
    snapshot = download.download_snapshot(
        model, revision=revision, allow_patterns=small_files, cache_dir=cache_dir
    )
    index = _read_index(snapshot.folder, model)
    if unet_only:  # before gigabytes of another kind are downloaded
        require_unet(model, index)
    if conditional:
        require_classes(snapshot.folder, model, [CONDITIONAL_LABELS])
    snapshot = download.download_snapshot(
        model,
        revision=snapshot.commit,
        allow_patterns=[
            *_download_patterns(index),
            *(() if conditional is False else CONDITIONAL_FILES),
        ],
        cache_dir=cache_dir,
    )
    return _checked(PipelineFolder(snapshot.folder, model, snapshot.commit, index))


def require_unet(name: str, index: ModelIndex) -> None:
    """Raise UserError unless a pipeline draws with a UNet2DModel alone."""
    supported = (*SUPPORTED_PIPELINES, *CUSTOM_LOOP_PIPELINES)
    if index.class_name not in supported or index.components.get("unet") not in UNETS:
        raise UserError(
            f"{name} is a {index.class_name} that this command cannot sample or train: except for "
            "--prompt of sample.py, models are unconditional pipelines with a UNet2DModel on "
            f"pixels ({', '.join(supported)})."
        )


def require_classes(folder: Path, name: str, files: Sequence[str]) -> None:
    """Raise UserError unless these files of the UNet with classes are there."""
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{name} has no classes: there is no {missing[0]}. Leave out --class_label."
        )


def require_plain_pipeline(folder: Path, name: str) -> None:
    """Raise UserError unless the folder holds a UNet2DModel and a scheduler of diffusers, and
    nothing in its JSON leads diffusers elsewhere.

    model_index.json may name modules of its own and paths; neither is ever followed.
    """
    try:
        is_plain = ModelIndex.from_json(
            read_json(folder / MODEL_INDEX, source=f"{name}: {MODEL_INDEX}")
        ).is_plain
    except ValueError:
        is_plain = False
    if not is_plain:
        raise UserError(
            f"{name}: {MODEL_INDEX} names other parts than a UNet2DModel and a scheduler of "
            "diffusers, which this command neither loads nor sends."
        )
    empty_unet(read_unet_config(folder / UNET_CONFIG, name), f"{name}: {UNET_CONFIG}")
    read_scheduler_config(folder / SCHEDULER_CONFIG, name)


def read_scheduler_config(path: Path, name: str) -> dict[str, Any]:
    """Return the checked settings of the scheduler of a pipeline; `name` is for errors."""
    source = f"{name}: {SCHEDULER_CONFIG}"
    return parse_scheduler_config(read_json(path, source=source), source)


def require_no_revision(model: str, revision: str | None) -> None:
    """Raise UsageError for a revision of a local folder."""
    if revision is not None:
        raise UsageError(f"A revision belongs to models on the Hub; {model} is a folder here.")


def _read_index(folder: Path, name: str) -> ModelIndex:
    """Read model_index.json; raise UserError unless all its components are known to diffusers."""
    if not (folder / MODEL_INDEX).is_file():
        hint = (
            "For a training run that was cut short, run train.py again with the same command to "
            "finish it."
        )
        if paths := list(checkpoints(folder).values()):
            hint = f"It has checkpoints: give {paths[-1]}, or finish the run."
        raise UserError(f"{name} is no diffusers pipeline: it has no {MODEL_INDEX}. {hint}")
    try:
        return ModelIndex.from_json(read_json(folder / MODEL_INDEX))
    except ValueError as error:
        if not str(error):
            raise UserError(
                f"{name} has a {MODEL_INDEX} that this command cannot sample: it names no pipeline."
            ) from None
        raise _own_code_error(name, f"{error} in {MODEL_INDEX}") from None


def _own_code_error(name: str, what: str) -> UserError:
    return UserError(
        f"{name} wants code of its own ({what}), which this command cannot sample: it never runs "
        "code of a repository."
    )


def _download_patterns(index: ModelIndex) -> list[str]:
    """Return patterns of the files to download: no pickles, no code, no half-precision variants."""
    weights = [f"{stem}{part}.safetensors" for stem in WEIGHTS for part in ("", "-?????-of-?????")]
    patterns = ["*.json", "*.txt", "*.model", *weights]
    flat_layout = ["config.json", Path(SCHEDULER_CONFIG).name, Path(UNET_WEIGHTS).name]
    return [
        MODEL_INDEX,
        EVALUATION,
        SAMPLER_TABLE,
        *flat_layout,
        *(f"{component}/{pattern}" for component in index.components for pattern in patterns),
    ]


def _checked(pipeline: PipelineFolder) -> PipelineFolder:
    """Raise UserError unless the JSON files of the components lead nowhere else.

    diffusers takes a text in the place of a config for the name of another repository, the index of
    weights in several files names these files, and the Auto classes of transformers ask on the
    terminal whether to run the code that "auto_map" names.
    """
    for component, (_, class_name) in pipeline.index.components.items():
        for path in sorted((pipeline.folder / component).glob("*.json")):
            value = read_json(path, COMPONENT_JSON_LIMIT)
            if path.name.endswith(".safetensors.index.json"):
                parse_json(ShardIndex, value, f"{pipeline.name}: {component}/{path.name}")
            if class_name.startswith("Auto") and "auto_map" in value:
                raise _own_code_error(pipeline.name, f"auto_map in {component}/{path.name}")
    return pipeline
