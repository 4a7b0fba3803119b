"""Fine-tuning: a model of anyone, from which training goes on, and the settings that it decides.

A resumed run reads its newest checkpoint in the place of the model that it began with, so that
neither a new commit of that model nor its removal changes a run.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from ddpm import download, run_folder
from ddpm.card import read_card, split_card
from ddpm.config.base import flatten, nest, setting_fields
from ddpm.config.train import TrainConfig
from ddpm.data.dataset import BatchSource
from ddpm.data.dataset_card import title_and_license
from ddpm.diffusion.class_labels import EMBEDDING, fold_label, has_classes, null_label
from ddpm.diffusion.schedulers import build_sampling_scheduler
from ddpm.diffusion.unet import SETTINGS, empty_unet, image_size, require_divisible
from ddpm.errors import UsageError, UserError, printable
from ddpm.run_record import BaseModel, read_checkpoint_state, read_record
from ddpm.sampling import pipeline, pipeline_folder
from ddpm.training.checkpoint import complete_checkpoints
from ddpm.typed_json import parse_value


@dataclass(frozen=True)
class Pretrained:
    """A model to fine-tune: on the CPU, with the scheduler of its noise and what is recorded."""

    model: pipeline.DiffusionModel
    scheduler: DDPMScheduler
    record: BaseModel

    @property
    def channels(self) -> int:
        return self.model.unet.config.in_channels

    def settings(self) -> dict[str, Any]:
        """Return the settings of train.py that the model decides, without the resolution.

        UserError for a noise schedule that is none of train.py's choices.
        """
        scheduler, fields = self.scheduler.config, setting_fields(TrainConfig)
        settings = {
            "ddpm_num_steps": scheduler.num_train_timesteps,
            "ddpm_beta_schedule": scheduler.beta_schedule,
            "prediction_type": scheduler.prediction_type,
            "rescale_betas_zero_snr": scheduler.rescale_betas_zero_snr,
        }
        if self.channels != 1:  # gray images are trained on as RGB
            settings["channels"] = self.channels
        for name, value in settings.items():
            parse_value(fields[name].type, value, f"{self.record.name}: {name}")
        return settings

    def build_unet(self, config: TrainConfig, data: BatchSource) -> UNet2DModel:
        """Return the UNet for the images and classes of `data`, with the weights of the model.

        It predicts what the model does: for a class that the model has by the same name what it
        does for this class, for any other what it does without a class. UserError for images of
        other channels and for a resolution that its levels cannot halve.
        """
        unet, resolution = self.model.unet, config.data.resolution
        if data.channels != self.channels:
            raise UserError(
                f"{self.record.name} draws gray images, and those of the data have color: give "
                "--channels 1 to train on them in gray, or another model."
            )
        require_divisible(resolution, unet.config.block_out_channels)
        rows = class_rows(self.model, data.class_names)
        plain = fold_label(unet, null_label(unet)) if has_classes(unet) else unet
        weights = plain.state_dict() | ({} if rows is None else {EMBEDDING: rows})
        settings = {name: value for name, value in plain.config.items() if name in SETTINGS}
        settings |= {
            "sample_size": resolution,
            "dropout": config.model.dropout or plain.config.dropout,
            "num_class_embeds": None if rows is None else len(rows),
        }
        built = empty_unet(settings, self.record.name)
        # Copies, because those of a file may lie at addresses that are slower, or round differently
        built.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
        return built

    def describe(self, data: BatchSource) -> list[str]:
        """Return lines on the model, and on what becomes of its classes."""
        height, width = self.record.resolution
        lines = [
            f"Fine-tuning {self.record.name}, version {self.record.version[:12]}, of images of "
            f"{width}x{height}. {self.record.license_note}"
        ]
        known, names = self.model.class_names or (), data.class_names or ()
        if names:
            new = [printable(name) for name in names if name not in known]
            examples = f" ({', '.join(new[:5])}{', ...' * (len(new) > 5)})" if new else ""
            lines.append(
                f"Classes: {len(names) - len(new)} begin as the class of that name in the "
                f"pretrained model, {len(new)} as its images without a class{examples}."
            )
        elif known:
            lines.append("The classes of the pretrained model are left out: the data has none.")
        return lines


def load_pretrained(config: TrainConfig) -> Pretrained | None:
    """Return the model that a run is fine-tuned from, None for a run from nothing.

    Call on every process. For a run with a checkpoint that is the checkpoint. Files of the Hub are
    checked against its hashes, and nothing but JSON and safetensors is read. UserError for anything
    but an unconditional pipeline with a UNet2DModel on pixels and the noise of DDPM.
    """
    name = config.model.pretrained_model_name_or_path
    if name is None:
        return None
    if (checkpoint := _own_checkpoint(config)) is not None:
        model = pipeline.load_model(str(checkpoint), conditional=None)
        record = read_checkpoint_state(checkpoint).base_model
    else:
        model = pipeline.load_model(name, config.model.pretrained_revision, conditional=None)
        record = None
    if model.kind not in pipeline_folder.SUPPORTED_PIPELINES:
        raise UserError(
            f"{model.name} is a {model.kind}, whose noise is not that of DDPM, so train.py cannot "
            f"go on from it. Give one of {', '.join(pipeline_folder.SUPPORTED_PIPELINES)}."
        )
    scheduler = build_sampling_scheduler("ddpm", model.scheduler_config, None).scheduler
    return Pretrained(model, scheduler, record or _describe(model, name))


def inherit_settings(
    config: TrainConfig, pretrained: Pretrained, explicit: set[str]
) -> TrainConfig:
    """Return the config with the settings of the pretrained model.

    `explicit` are the names of those that the user gave: of these the resolution is kept, and
    UsageError names any other that differs.
    """
    flat, inherited = flatten(config), pretrained.settings()
    decided = {**inherited, "channels": pretrained.channels}
    contradictions = [
        f"--{name} is {flat[name]}, and the model has {value}"
        for name, value in decided.items()
        if name in explicit and flat[name] not in (value, None)
    ]
    if contradictions:
        raise UsageError(
            f"{'; '.join(contradictions)}. The pretrained model {pretrained.record.name} decides "
            "these settings: leave them out."
        )
    if "resolution" not in explicit:
        inherited["resolution"] = image_size(pretrained.model.unet)
    return nest(TrainConfig, flat | inherited)


def class_rows(
    model: pipeline.DiffusionModel, class_names: list[str] | None
) -> torch.Tensor | None:
    """Return the class embedding [K + 1, D] for `class_names` and the null class; None without any.

    The row of the null class is folded into the other weights, so rows are differences to it: 0 for
    the null class and for classes that the model does not have.
    """
    if class_names is None:
        return None
    width = model.unet.time_embedding.linear_2.out_features
    rows = torch.zeros(len(class_names) + 1, width)
    for index, name in enumerate(class_names):
        if name in (model.class_names or ()):
            known = model.unet.class_embedding.weight.detach()
            rows[index] = known[model.class_names.index(name)] - known[null_label(model.unet)]
    return rows


def _own_checkpoint(config: TrainConfig) -> Path | None:
    """Return the newest checkpoint of the run in output_dir, if that began with the same model."""
    output_dir = Path(config.output_dir)
    path, folders = output_dir / run_folder.TRAIN_CONFIG, complete_checkpoints(output_dir)
    if config.overwrite_output_dir or not folders or not path.is_file():
        return None
    return folders[-1] if TrainConfig.from_json(path).model == config.model else None


def _describe(model: pipeline.DiffusionModel, name: str) -> BaseModel:
    """Return what is recorded of a model that was loaded by `name`."""
    on_hub, folder = not Path(name).is_dir(), Path(name)
    if (folder / run_folder.CHECKPOINT_STATE).is_file():
        folder = folder.resolve().parent
    facts: dict[str, Any] = {}
    with suppress(UserError):  # of a card that cannot be read the license is unknown
        if on_hub:
            folder = download.download_snapshot(
                name, revision=model.version, allow_patterns=["README.md"]
            ).folder
        elif (base := read_record(folder).base_model) is not None:
            facts = {key: getattr(base, key) for key in ("license", "license_name", "license_link")}
        if (folder / "README.md").is_file():
            metadata = split_card(read_card(folder / "README.md", name), name)[0]
            if license := title_and_license(metadata)["license"]:
                texts = {key: metadata.get(key) for key in ("license_name", "license_link")}
                texts = {key: text for key, text in texts.items() if isinstance(text, str)}
                facts = {"license": None if license == "unknown" else license, **texts}
    return BaseModel(
        name=model.name,
        version=model.version,
        on_hub=on_hub,
        resolution=list(image_size(model.unet)),
        **facts,
    )
