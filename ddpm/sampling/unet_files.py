"""The files of a UNet2DModel in a pipeline of anyone: settings, safetensors, names of classes.

Nothing is loaded before its settings are checked, and weights only from safetensors. `name` is that
of the model, for errors.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from ddpm.diffusion.class_labels import fold_label, null_label
from ddpm.diffusion.unet import empty_unet, parse_unet_config
from ddpm.errors import UserError, foreign_errors, printable
from ddpm.file_io import read_json
from ddpm.run_folder import (
    CONDITIONAL,
    CONDITIONAL_CONFIG,
    CONDITIONAL_LABELS,
    REPLACED_PIPELINE,
    UNET_CONFIG,
    UNET_WEIGHTS,
)
from ddpm.typed_json import parse_json, parse_value

WEIGHTS = ("diffusion_pytorch_model", "model")
"""Names of weights, without .safetensors, in diffusers and in transformers."""
PICKLE_SUFFIXES = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")


@dataclass(frozen=True)
class ShardIndex:
    """Which file next to it holds each weight, for weights in several files."""

    weight_map: dict[str, str]

    def __post_init__(self) -> None:
        for name in self.weight_map.values():
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r:.60} is no name of a safetensors file next to it")


def load_unet(folder: Path, name: str, num_classes: int | None = None) -> UNet2DModel:
    """Load the UNet of a pipeline from its settings and safetensors, in one file or in shards."""
    settings = read_unet_config(folder / "config.json", name, num_classes)
    unet = empty_unet(settings, f"{name}: {folder.name}/config.json")
    index = folder / f"{Path(UNET_WEIGHTS).name}.index.json"
    files = [Path(UNET_WEIGHTS).name]
    if index.is_file():
        shards = parse_json(ShardIndex, read_json(index), f"{name}: {index.name}")
        files = sorted(set(shards.weight_map.values()))
    weights: dict[str, torch.Tensor] = {}
    with foreign_errors(f"{name} cannot be loaded"):
        for file in files:
            weights |= load_file(folder / file)
        unet._fix_state_dict_keys_on_load(weights)  # attention layers of the first diffusers
        weights = {key: value.float() for key, value in weights.items()}
        missing = unet.load_state_dict(weights, strict=False, assign=True).missing_keys
        if missing:
            raise ValueError(f"{missing[0]} is missing")
    require_finite(unet, name)
    return unet


def read_unet_config(path: Path, name: str, num_classes: int | None = None) -> dict[str, Any]:
    """Return the checked settings of the UNet of a pipeline, or of its UNet with `num_classes`.

    `name` is for errors.
    """
    source = f"{name}: {UNET_CONFIG if num_classes is None else CONDITIONAL_CONFIG}"
    settings = parse_unet_config(read_json(path, source=source), source, num_classes)
    channels = [settings.get(key, 3) for key in ("in_channels", "out_channels")]
    if channels not in ([1, 1], [3, 3], [4, 4]):
        raise UserError(
            f"{name} turns {channels[0]} channels into {channels[1]}: this command "
            "draws gray, RGB or RGBA pixels, as many channels as go in."
        )
    if settings.get("sample_size") is None:
        raise UserError(f"{name} does not say how large its images are (sample_size in its UNet).")
    return settings


def read_labels(path: Path, name: str) -> tuple[str, ...]:
    """Return the names of the classes in labels.json, by their ids; `name` is for errors.

    They are printable and differ: the id follows a name that several classes have, as in
    "crane (134)".
    """
    source = f"{name}: {CONDITIONAL_LABELS}"
    labels = parse_value(dict[str, str], read_json(path, source=source), source)
    ids = [str(number) for number in range(len(labels))]
    if not labels or labels.keys() != {*ids}:
        raise UserError(f"{source} does not number its classes 0, 1, 2 ...")
    names = [printable(labels[number]) for number in ids]
    counts = Counter(names)
    names = [name if counts[name] == 1 else f"{name} ({k})" for k, name in enumerate(names)]
    if len(set(names)) < len(names):
        raise UserError(f"{source} gives several classes one name.")
    return tuple(names)


def require_safetensors(folder: Path, name: str) -> None:
    """Raise UserError unless the weights in `folder` are safetensors, in one file or in shards."""
    if any(any(folder.glob(f"{stem}*.safetensors")) for stem in WEIGHTS):
        return
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = [path.name for path in paths if path.suffix.lower() in PICKLE_SUFFIXES]
    content = f"only {pickles[0]}" if pickles else "no safetensors"
    raise UserError(
        f"{name} has {content} in {folder.name}/. Only safetensors are loaded: pickled weights can "
        "run code. Ask its author to convert them (save_pretrained does)."
    )


def require_finite(unet: UNet2DModel, name: str) -> None:
    """Raise UserError for weights that are NaN or infinite."""
    weights = unet.state_dict().values()
    # A sum is finite only if each of its terms is; that of large terms may not be.
    sums = torch.stack([weight.sum(dtype=torch.float32) for weight in weights])
    if not sums.isfinite().all() and not all(weight.isfinite().all() for weight in weights):
        raise UserError(f"{name} has weights that are not finite numbers, so it draws nothing.")


def require_same_unet(unet: UNet2DModel, conditional: UNet2DModel, name: str) -> None:
    """Raise UserError unless `unet` is `conditional` with its null class folded in."""
    weights = unet.state_dict()
    folded = fold_label(conditional, null_label(conditional)).state_dict()
    if weights.keys() != folded.keys() or not all(
        weight.shape == folded[key].shape and torch.allclose(weight, folded[key], atol=1e-6)
        for key, weight in weights.items()
    ):
        raise UserError(
            f"{name}: the UNet in {CONDITIONAL}/ is not that of the pipeline with classes: one of "
            "them was replaced. In a run folder of your own, give the same train.py command again, "
            f"or copy {REPLACED_PIPELINE}/ back if there is one; otherwise ask its author to "
            "export both again."
        )
