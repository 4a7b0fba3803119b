"""An exam: a model made ready to be measured, and all images as features.

Images go the way that they go when the model is used: drawn from their seeds, rounded to the uint8
of a PNG. Real ones go the way of training: decoded once, resized with antialiasing, the same crops
(one a row, from a generator of the row), without flips. Each process takes every world-th image;
the features are gathered on all.

Legend: N images, D features.
"""

import copy
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from safetensors.torch import load_file

from ddpm import run_folder
from ddpm.config.base import MIN_IMAGES
from ddpm.config.commands import EvaluateConfig
from ddpm.data import dataset
from ddpm.data.dataset import ImageDataset
from ddpm.data.transforms import to_model
from ddpm.diffusion import schedulers
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import timestep_loss
from ddpm.evaluation.features import (
    FeatureExtractor,
    dataset_features,
    load_feature_extractor,
    map_over_processes,
)
from ddpm.evaluation.features import dataset_image as dataset_image
from ddpm.hub import download_snapshot
from ddpm.sampling import generate, pipeline
from ddpm.sampling.pipeline import UnconditionalModel

Drawn = Iterator[tuple[int, torch.Tensor]]
"""(seed, [C, H, W] uint8) of one image after another."""


@dataclass(frozen=True)
class Evaluator:
    """A model with its sampler, on this process's device, and what it is measured against.

    `held_out` is None for a dataset of one split.
    """

    accelerator: Accelerator
    config: EvaluateConfig
    artifact: UnconditionalModel
    scheduler: SamplingScheduler
    features: FeatureExtractor
    trained: ImageDataset
    held_out: ImageDataset | None

    def __str__(self) -> str:
        last = self.config.seed + self.config.num_images - 1
        return (
            f"{self.artifact.name} at {self.artifact.version[:12]}: {self.config.num_images:,} "
            f"images of seeds {self.config.seed} to {last}, {self._how}, "
            f"against {len(self.trained):,} of {self.trained.facts.name}{self._at}, by "
            f"{self.features.name}."
        )

    @property
    def _at(self) -> str:
        revision = self.trained.facts.revision
        return f" at {revision[:12]}" if revision else ""

    @property
    def _how(self) -> str:
        if self.config.samplers is not None:
            return "each sampler in turn"
        return f"{self.scheduler_name}, {self.scheduler.num_inference_steps} steps"

    @property
    def scheduler_name(self) -> str:
        """Name of the scheduler in the table."""
        return self.config.scheduler or schedulers.DEFAULT_SCHEDULER


def complete_config(config: EvaluateConfig, given: Set[str]) -> EvaluateConfig:
    """The settings with those of the run that made the model, where it left them.

    Default < the run's train_config.json < flag; data of the Hub are those of the commit that the
    run recorded, unless --dataset_revision says otherwise. `given` are the names of the flags on
    the command line. UsageError when nobody names the data.
    """
    asked = config.data.dataset_revision
    path = _settings_folder(config) / run_folder.TRAIN_CONFIG
    config = config.with_settings_of_run(path, given) if path.is_file() else config
    if config.data.dataset_name is None and config.data.train_data_dir is None:
        raise UsageError(
            f"{config.model} does not say what it was trained on: add --dataset_name "
            "or --train_data_dir."
        )
    recorded = run_folder.read_record(path.parent).dataset
    same = recorded and recorded.on_hub and recorded.name == config.data.dataset_name
    if asked is None and same and recorded.revision is not None:
        data = replace(config.data, dataset_revision=recorded.revision)
        config = replace(config, data=data)
    return config


def _settings_folder(config: EvaluateConfig) -> Path:
    """Where the settings and the record of the run lie that made the model, if anywhere."""
    folder = Path(config.model)
    if (folder / run_folder.CHECKPOINT_STATE).is_file():
        return folder.resolve().parent
    if folder.is_dir():
        return folder
    wanted = [run_folder.TRAIN_CONFIG, run_folder.RECORD, run_folder.MODEL_INDEX]
    return download_snapshot(config.model, revision=config.revision, allow_patterns=wanted).folder


def _require_same_rows(config: EvaluateConfig, facts: run_folder.DatasetRecord) -> None:
    """UserError when a share was held out of other pixels: some of it may have been trained on."""
    if not config.data.held_out:
        return
    was = run_folder.read_record(_settings_folder(config)).dataset
    if was is None or was.name != facts.name:
        return
    if (was.held_out, was.pixels_sha256) != (facts.held_out, facts.pixels_sha256):
        raise UserError(
            f"{facts.name} is not what {config.model} was trained on: --held_out would choose "
            "other images than those that it has not seen. Pin the data with --dataset_revision, "
            "or give --held_out 0."
        )


def require_output_dir(config: EvaluateConfig) -> Path:
    """The folder of evaluation.json.

    UsageError for a checkpoint, which is private to its run, and where a model of the Hub would be
    measured into another model's folder.
    """
    if config.output_dir is not None:
        return Path(config.output_dir)
    folder = Path(config.model)
    if (folder / run_folder.CHECKPOINT_STATE).is_file():
        raise UsageError(
            f"{folder} is a checkpoint: say with --output_dir where its evaluation goes."
        )
    if folder.is_dir():
        return folder
    place = Path(run_folder.default_repo_name(folder))
    strangers = (run_folder.TRAIN_CONFIG, run_folder.RECORD, run_folder.MODEL_INDEX)
    if any((place / name).exists() for name in strangers):
        raise UsageError(
            f"{place} is a model here, and need not be that of {config.model}: say "
            "with --output_dir where the evaluation goes."
        )
    return place


def open_evaluator(accelerator: Accelerator, config: EvaluateConfig) -> Evaluator:
    """Load the model, the feature network and the data. UserError for what cannot be measured."""
    artifact = pipeline.load_model(config.model, config.revision)
    if artifact.kind in pipeline.CUSTOM_LOOP_PIPELINES:
        raise UsageError(f"{artifact.name} is a {artifact.kind}, which evaluate.py cannot draw.")
    scheduler = schedulers.build_sampling_scheduler(
        config.scheduler or schedulers.DEFAULT_SCHEDULER,
        artifact.scheduler_config,
        config.num_inference_steps,
    )
    height, width = generate.image_size(artifact.unet)
    if height != width:
        raise UserError(
            f"{artifact.name} draws {height}x{width} pixels; training images are "
            "squares, so there is nothing to compare them with."
        )
    data = replace(
        config.data, resolution=height, channels=artifact.unet.config.in_channels, streaming=False
    )
    network = load_feature_extractor(config.features, data.dataset_name, accelerator.device)
    torch.nn.Module.to(artifact.unet, accelerator.device)
    loud = accelerator.is_main_process
    trained = dataset.load_images(data, loud, seed=config.held_out_seed)
    _require_same_rows(config, trained.facts)
    held_out = dataset.load_held_out(data, trained, loud, len(trained), config.eval_split)
    exam = Evaluator(accelerator, config, artifact, scheduler, network, trained, held_out)
    counts = {trained.facts.name: len(trained), "--num_images": config.num_images}
    if held_out is not None:
        counts["the held-out split"] = len(held_out)
    fewest = max(MIN_IMAGES, accelerator.num_processes)
    for what, count in counts.items():
        if count < fewest:
            raise UserError(
                f"{what}: {count} images; no distance means anything with fewer than {fewest}."
            )
    return exam


def generated_features(
    exam: Evaluator,
    scheduler: SamplingScheduler,
    num_images: int,
    through: Callable[[Drawn], Drawn] = iter,
) -> torch.Tensor:
    """Features [N, D] of the images of seeds --seed, --seed + 1, ..., the same on all processes.

    The images come `through` a function on their way from the model to the feature network.
    """
    first, size = exam.config.seed, exam.config.batch_size

    def batches(mine: Sequence[int]) -> Iterator[torch.Tensor]:
        seeds = [first + number for number in mine]
        drawn = generate.generate_images(exam.artifact.unet, scheduler, seeds, size)
        together: list[torch.Tensor] = []
        for _, image in through(drawn):
            together.append(image)
            if len(together) == size:
                yield exam.features.of(torch.stack(together))
                together = []
        if together:
            yield exam.features.of(torch.stack(together))

    return _shared(exam, num_images, batches, "Drawing")


def split_features(exam: Evaluator, real: ImageDataset) -> torch.Tensor:
    """Features [N, D] of a split, row by row, the same on all processes."""
    size = exam.config.batch_size
    return dataset_features(exam.accelerator, exam.features, real, size, "Looking")


def split_losses(
    exam: Evaluator, unet: UNet2DModel, real: ImageDataset, rows: Sequence[int]
) -> torch.Tensor:
    """Losses [N, K] by band of rows of a split (bands.losses), the same on all processes."""
    size = exam.config.batch_size

    def batches(mine: Sequence[int]) -> Iterator[torch.Tensor]:
        for start in range(0, len(mine), size):
            chosen = [rows[number] for number in mine[start : start + size]]
            pixels = torch.stack([dataset_image(real, row) for row in chosen])
            yield timestep_loss.loss_by_timestep(unet, exam.scheduler, to_model(pixels), chosen)

    return _shared(exam, len(rows), batches, "Denoising")


def load_raw_unet(exam: Evaluator) -> UNet2DModel | None:
    """The weights before averaging, from the checkpoint whose average was exported, or of whose
    step another one was (lengths.export).

    None where there is none: for a model of the Hub, and for a run without an average.
    """
    folder = Path(exam.config.model)
    if not (folder / run_folder.CHECKPOINT_STATE).is_file():
        folder = next(reversed(run_folder.checkpoints(folder).values()), folder)
    average, raw = folder / "ema.safetensors", folder / "model.safetensors"
    if not average.is_file() or not raw.is_file():
        return None
    exported = exam.artifact.unet.state_dict()
    averaged = load_file(average)
    same = averaged.keys() == exported.keys() and all(
        torch.equal(value, exported[name].cpu()) for name, value in averaged.items()
    )
    rebuilt = run_folder.read_exported_ema(folder.parent, exam.artifact.version)
    if not same and (rebuilt is None or folder.name != f"checkpoint-{rebuilt.step}"):
        return None
    unet = copy.deepcopy(exam.artifact.unet)
    unet.load_state_dict(load_file(raw))
    return unet


def _shared(
    exam: Evaluator,
    count: int,
    batches: Callable[[Sequence[int]], Iterator[torch.Tensor]],
    words: str,
) -> torch.Tensor:
    return map_over_processes(exam.accelerator, count, batches, words)
