"""The evaluator: a model, loaded to be measured, and the real images that it is compared with.

Generated images are made from their seeds and rounded to the uint8 of a PNG, as by sample.py. Real
images are prepared as in training: decoded once, resized with antialiasing, cropped (the crop is a
function of the row), without flips. Each process handles every world-size-th image; the results are
gathered on all processes.

Notation: N images, D features, K bands of timesteps.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from safetensors.torch import load_file

from ddpm import run_folder, run_record
from ddpm.config.base import MIN_IMAGES
from ddpm.config.data import DATASET_FIELDS
from ddpm.config.evaluate import EvaluateConfig
from ddpm.data import dataset
from ddpm.data.dataset import ImageDataset
from ddpm.data.transforms import to_model
from ddpm.diffusion import schedulers
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.download import download_snapshot
from ddpm.errors import UsageError, UserError, printable
from ddpm.evaluation import features, timestep_loss
from ddpm.evaluation.class_proportions import label_sequence
from ddpm.evaluation.features import FeatureExtractor
from ddpm.hub import is_repo_id
from ddpm.run_record import DatasetRecord
from ddpm.sampling import generate, pipeline, pipeline_folder
from ddpm.sampling.guidance import ClassGuidance
from ddpm.sampling.pipeline import DiffusionModel

GeneratedImages = Iterator[tuple[int, torch.Tensor]]
"""Pairs of a seed and its image, [C, H, W] uint8."""


@dataclass(frozen=True)
class Evaluator:
    """A model with its scheduler on this process's device, and what it is compared with.

    `trained` and `held_out` are the real images; `held_out` is None if there are none. `guidance`
    gives the classes of the images of a model that has them, in the proportions of its data, and
    `has_classifier` says whether the extractor has logits of these classes.
    """

    accelerator: Accelerator
    config: EvaluateConfig
    model: DiffusionModel
    scheduler: SamplingScheduler
    extractor: FeatureExtractor
    trained: ImageDataset
    held_out: ImageDataset | None
    guidance: ClassGuidance | None = None
    has_classifier: bool = False

    def __str__(self) -> str:
        first, count = self.config.seed, self.config.num_images
        sampler = f"{self.scheduler_name}, {self.scheduler.num_inference_steps} steps"
        if self.config.samplers is not None:
            sampler = "each sampler in turn"
        if self.guidance is not None:
            sampler += f", {len(self.model.class_names)} classes, guidance {self.guidance.scale:g}"
        data = self.trained.facts
        at_revision = f" at {data.revision[:12]}" if data.revision else ""
        return printable(
            f"{self.model.name} at {self.model.version[:12]}: {count:,} images of seeds {first} to "
            f"{first + count - 1}, {sampler}, against {len(self.trained):,} of "
            f"{data.name}{at_revision}, by {self.extractor.name}."
        )

    @property
    def scheduler_name(self) -> str:
        return self.config.scheduler or schedulers.DEFAULT_SCHEDULER

    def with_weights(self, state_dict: dict[str, torch.Tensor]) -> "Evaluator":
        """Return an evaluator of the same model with other weights."""
        unet = copy.deepcopy(self.model.unet)
        unet.load_state_dict(state_dict)
        return replace(self, model=replace(self.model, unet=unet))

    @property
    def labels(self) -> torch.Tensor:
        """The classes of the generated images, [N] int64, of a model that has them."""
        seeds = range(self.config.seed, self.config.seed + self.config.num_images)
        return torch.tensor([self.guidance.label_of(seed) for seed in seeds])

    def with_guidance_scale(self, scale: float) -> "Evaluator":
        """Return an evaluator of the same model with other guidance."""
        return replace(self, guidance=replace(self.guidance, scale=scale))

    def generated_features(
        self, wrap: Callable[[GeneratedImages], GeneratedImages] = iter
    ) -> torch.Tensor:
        """Generate the images of seeds --seed, --seed + 1, ... and return their features [N, D].

        Call on every process; all return the same. The images pass through `wrap` on their way from
        the model to the feature extractor.
        """
        return self.generate_and_classify(wrap)[0]

    def generate_and_classify(
        self, wrap: Callable[[GeneratedImages], GeneratedImages] = iter
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `generated_features`, and the classes that a classifier finds, [N] int64."""
        batch_size = self.config.batch_size

        def extract(indices: Sequence[int]) -> Iterator[torch.Tensor]:
            seeds = [self.config.seed + index for index in indices]
            images = wrap(
                generate.generate_images(
                    self.model.unet, self.scheduler, seeds, batch_size, guidance=self.guidance
                )
            )
            while batch := [image for _, image in itertools.islice(images, batch_size)]:
                vectors, predicted = self._extract_and_classify(torch.stack(batch))
                yield torch.cat((vectors, predicted[:, None]), dim=1)

        rows = features.map_over_processes(
            self.accelerator, self.config.num_images, extract, "Generating"
        )
        return rows[:, :-1], rows[:, -1].long() if self.has_classifier else None

    def _extract_and_classify(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features [B, D] of images, and their classes [B] float32; -1 is not known."""
        vectors, logits = self.extractor.extract_with_logits(images)
        if not self.has_classifier:
            return vectors, torch.full((len(images),), -1.0)
        return vectors, logits.argmax(1).float()

    def classify(self, images: ImageDataset, rows: Sequence[int]) -> torch.Tensor:
        """Return the classes [N] of rows of a split by the classifier. Call on every process."""
        size = self.config.batch_size

        def classify(indices: Sequence[int]) -> Iterator[torch.Tensor]:
            for start in range(0, len(indices), size):
                batch = [rows[index] for index in indices[start : start + size]]
                pixels = torch.stack([features.dataset_image(images, row) for row in batch])
                yield self._extract_and_classify(pixels)[1][:, None]

        return features.map_over_processes(self.accelerator, len(rows), classify, None)[:, 0].long()

    def dataset_features(self, images: ImageDataset) -> torch.Tensor:
        """Return the features [N, D] of a split, row by row. Call on every process."""
        return features.dataset_features(
            self.accelerator, self.extractor, images, self.config.batch_size, "Extracting features"
        )

    def timestep_losses(
        self, unet: UNet2DModel, images: ImageDataset, rows: Sequence[int]
    ) -> torch.Tensor:
        """Return the losses [N, K] of rows of a split in each band. Call on every process."""
        size = self.config.batch_size

        def denoise(indices: Sequence[int]) -> Iterator[torch.Tensor]:
            for start in range(0, len(indices), size):
                batch = [rows[index] for index in indices[start : start + size]]
                pixels = torch.stack([features.dataset_image(images, row) for row in batch])
                labels = timestep_loss.labels_for(unet, images, batch)
                yield timestep_loss.loss_by_timestep(
                    unet, self.scheduler, to_model(pixels), batch, labels
                )

        return features.map_over_processes(self.accelerator, len(rows), denoise, "Denoising")

    def load_raw_unet(self) -> UNet2DModel | None:
        """Load the weights before averaging that belong to the exported ones.

        They are in the checkpoint whose average was exported, or whose step a post-hoc average was
        built for. None if there is none: for a model on the Hub, and for a run without averages.
        """
        folder = Path(self.config.model)
        if not (folder / run_folder.CHECKPOINT_STATE).is_file():
            folder = next(reversed(run_folder.checkpoints(folder).values()), folder)
        ema_path, raw_path = folder / run_folder.EMA_WEIGHTS, folder / run_folder.RAW_WEIGHTS
        if not ema_path.is_file() or not raw_path.is_file():
            return None
        exported, ema = self.model.unet.state_dict(), load_file(ema_path)
        is_ema = ema.keys() == exported.keys() and all(
            torch.equal(value, exported[name].cpu()) for name, value in ema.items()
        )
        exported_ema = run_record.read_exported_ema(folder.parent, self.model.version)
        if not is_ema and (
            exported_ema is None or folder.name != f"checkpoint-{exported_ema.step}"
        ):
            return None
        return self.with_weights(load_file(raw_path)).model.unet


def open_evaluator(accelerator: Accelerator, config: EvaluateConfig) -> Evaluator:
    """Load the model, the feature extractor and the data. UserError for what cannot be measured."""
    model = pipeline.load_model(config.model, config.revision, conditional=None)
    if model.kind in pipeline_folder.CUSTOM_LOOP_PIPELINES:
        raise UsageError(f"{model.name} is a {model.kind}, which evaluate.py cannot sample.")
    if model.class_names is None and (config.guidance_scale is not None or config.scales):
        raise UsageError(
            f"{model.name} has no classes: leave out --guidance_scale and --guidance_scales."
        )
    if model.class_names is None and config.data.has_labels:
        accelerator.print(f"{model.name} has no classes: nothing is measured by the labels.")
    scheduler = schedulers.build_sampling_scheduler(
        config.scheduler or schedulers.DEFAULT_SCHEDULER,
        model.scheduler_config,
        config.num_inference_steps,
    )
    data = replace(
        config.data,
        resolution=generate.image_size(model.unet),
        channels=model.unet.config.in_channels,
        streaming=False,
    )
    extractor = features.load_feature_extractor(
        config.features, data.dataset_name, accelerator.device
    )
    extractor = replace(extractor, background=data.background)
    torch.nn.Module.to(model.unet, accelerator.device)
    show_progress = accelerator.is_main_process
    class_names = None if model.class_names is None else list(model.class_names)
    trained = dataset.load_images(
        data, show_progress, seed=config.held_out_seed, class_names=class_names
    )
    _require_same_held_out_rows(config, trained.facts)
    recorded = _recorded_data(config, trained.facts)
    splits = [recorded.split] if recorded is not None and recorded.split else []
    held_out = dataset.load_held_out(
        data, trained, show_progress, len(trained), config.eval_split, splits
    )
    fewest = _fewest_images(accelerator)
    if held_out is not None and config.eval_split is None and len(held_out) < fewest:
        accelerator.print(
            f"The held-out split {held_out.facts.split} has {len(held_out)} images and is left "
            f"out: no distance means anything with fewer than {fewest}."
        )
        held_out = None
    evaluator = Evaluator(accelerator, config, model, scheduler, extractor, trained, held_out)
    _require_enough_images(evaluator)
    return evaluator if model.class_names is None else _with_classes(evaluator)


def _with_classes(evaluator: Evaluator) -> Evaluator:
    """Return the evaluator of a model with classes, with their proportions and its classifier."""
    config, class_names = evaluator.config, evaluator.model.class_names
    records = (run_record.read_record(_run_folder(config)).dataset, evaluator.trained.facts)
    scale = 1.0 if config.guidance_scale is None else config.guidance_scale
    pixels = torch.stack([features.dataset_image(evaluator.trained, row) for row in (0, 1)])
    logits = evaluator.extractor.extract_with_logits(pixels)[1]
    has_classifier = logits is not None and logits.shape[1] == len(class_names)
    if logits is not None and not has_classifier:
        evaluator.accelerator.print(
            f"{evaluator.extractor.name} has {logits.shape[1]} logits, the model "
            f"{len(class_names)} classes: label accuracy is not measured."
        )
    if evaluator.trained.labels is None:
        evaluator.accelerator.print(
            "The classes of the real images are not read: --class_conditional or --label_column "
            "does, for distances by class."
        )
    guidance = ClassGuidance(label_sequence(class_names, *records), scale)
    return replace(evaluator, guidance=guidance, has_classifier=has_classifier)


def _fewest_images(accelerator: Accelerator) -> int:
    """Return the fewest images that distances are measured of."""
    return max(MIN_IMAGES, accelerator.num_processes)


def _require_enough_images(evaluator: Evaluator) -> None:
    counts = {
        evaluator.trained.facts.name: len(evaluator.trained),
        "--num_images": evaluator.config.num_images,
    }
    if evaluator.held_out is not None:
        counts["the held-out split"] = len(evaluator.held_out)
    fewest = _fewest_images(evaluator.accelerator)
    for name, count in counts.items():
        if count < fewest:
            raise UserError(
                f"{name}: {count} images; no distance means anything with fewer than {fewest}."
            )


def complete_config(config: EvaluateConfig, given: Set[str]) -> EvaluateConfig:
    """Complete the settings with those of the run that trained the model.

    Default < the run's train_config.json < flag. Data on the Hub are those of the commit in the
    run's record, unless --dataset_revision is given. `given`: names of the flags on the command
    line. UsageError if the data are unknown, or a model on the Hub names data of this machine.
    """
    asked = config.data.dataset_revision
    path = _run_folder(config) / run_folder.TRAIN_CONFIG
    on_hub = not Path(config.model).is_dir()
    if path.is_file():
        config = config.with_settings_of_run(path, given, on_hub=on_hub)
    name = config.data.dataset_name
    if on_hub and name and not given & DATASET_FIELDS:
        _require_dataset_on_hub(config.model, name)
    if config.data.dataset_name is None and config.data.train_data_dir is None:
        raise UsageError(
            f"{config.model} does not say what it was trained on: add --dataset_name "
            "or --train_data_dir."
        )
    recorded = run_record.read_record(path.parent).dataset
    same = recorded and recorded.on_hub and recorded.name == config.data.dataset_name
    if asked is None and same and recorded.revision is not None:
        data = replace(config.data, dataset_revision=recorded.revision)
        config = replace(config, data=data)
    return config


def _require_dataset_on_hub(model: str, name: str) -> None:
    """Raise UsageError unless a dataset that a model on the Hub names would be read from there."""
    if not is_repo_id(name) or Path(name).exists():
        raise UsageError(
            f"{model} was trained on {name!r:.80}, which is no id on the Hub or names a file or "
            "folder here. If you have these images, add --dataset_name or --train_data_dir."
        )


def _run_folder(config: EvaluateConfig) -> Path:
    """Return the folder with the config and the record of the run that trained the model."""
    folder = Path(config.model)
    if (folder / run_folder.CHECKPOINT_STATE).is_file():
        return folder.resolve().parent
    if folder.is_dir():
        return folder
    names = [run_folder.TRAIN_CONFIG, run_folder.RECORD, run_folder.MODEL_INDEX]
    return download_snapshot(config.model, revision=config.revision, allow_patterns=names).folder


def _require_same_held_out_rows(config: EvaluateConfig, facts: DatasetRecord) -> None:
    """UserError if --held_out would choose from other pixels: the model may have seen them."""
    recorded = _recorded_data(config, facts) if config.data.held_out else None
    if recorded is not None and (recorded.held_out, recorded.pixels_sha256) != (
        facts.held_out,
        facts.pixels_sha256,
    ):
        raise UserError(
            f"{facts.name} is not what {config.model} was trained on: --held_out would "
            "choose other images than those that it has not seen. Pin the data with "
            "--dataset_revision, or give --held_out 0."
        )


def _recorded_data(config: EvaluateConfig, facts: DatasetRecord) -> DatasetRecord | None:
    """Return what the run recorded of its data; None for other data, and without a record."""
    recorded = run_record.read_record(_run_folder(config)).dataset
    if recorded is not None and (
        recorded.name == facts.name or recorded.pixels_sha256 == facts.pixels_sha256
    ):
        return recorded
    return None


def require_output_dir(config: EvaluateConfig) -> Path:
    """Return the folder for evaluation.json.

    UsageError for a checkpoint, which is private to its run, and if the evaluation of a model on
    the Hub would go into the folder of another model.
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
    output_dir = Path(run_folder.default_repo_name(folder))
    model_files = (run_folder.TRAIN_CONFIG, run_folder.RECORD, run_folder.MODEL_INDEX)
    if any((output_dir / name).exists() for name in model_files):
        raise UsageError(
            f"{output_dir} is a model here, and need not be that of {config.model}: say "
            "with --output_dir where the evaluation goes."
        )
    return output_dir
