"""Measure the model during training: --eval_steps, --eval_images, --keep_best.

Held-out images are denoised by the raw and by the averaged weights, with the same noise each time
(evaluation/timestep_loss.py); generated images are compared with the training images in feature
space. The processes share the work. Everything is a function of the weights: the randomness of the
loop is untouched, and a run that was stopped and resumed writes the same lines of metrics.jsonl.

    best/                                    with --keep_best: a complete folder whenever it exists
      model_index.json  unet/  scheduler/    a DDPMPipeline, as in the run folder
      best.json                              step, and the metric and value it was chosen by
      train_config.json  record.json         for evaluate.py and push.py

Legend: N images, K bands, D features.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ddpm import file_io, run_folder, run_record
from ddpm.config.base import MIN_IMAGES
from ddpm.data import order
from ddpm.data.dataset import load_held_out
from ddpm.data.transforms import to_model
from ddpm.diffusion import schedulers
from ddpm.diffusion.ema import eval_weights
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import features, metrics, plots, timestep_loss
from ddpm.evaluation.class_proportions import label_sequence
from ddpm.evaluation.features import (
    FeatureExtractor,
    dataset_features,
    dataset_image,
    map_over_processes,
)
from ddpm.sampling import generate
from ddpm.sampling.guidance import ClassGuidance
from ddpm.training import diagnostics
from ddpm.training.step import TrainState, export_model
from ddpm.training.tracking import Tracker
from ddpm.typed_json import parse_json

MAX_LOSS_IMAGES = 64
"""Held-out images whose loss is measured, each in all bands."""


@dataclass(frozen=True, kw_only=True)
class BestPipeline:
    """best.json: the kept pipeline's step, and the metric that it was chosen by, with its value.

    `num_images`, `features` (a version) and `num_inference_steps` belong to a Frechet distance.
    """

    step: int
    value: float
    measure: str
    num_images: int | None = None
    features: str | None = None
    num_inference_steps: int | None = None

    @property
    def metric(self) -> dict[str, Any]:
        """What must be the same for two values to be comparable."""
        return {k: v for k, v in asdict(self).items() if k not in ("step", "value") and v}


@dataclass
class Validator:
    """Measures the model at intervals; does nothing unless `is_on`.

    `held_out` are the images whose loss is measured, [N, C, R, R] uint8, `labels` [N] their classes
    for a model with classes, `rows` their numbers in the split, which seed their noise, as in
    evaluate.py. `extractor` and `reference` [M, D], the features of the training images, belong to
    --eval_images. `series` holds the evaluations so far.
    """

    state: TrainState
    held_out: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    rows: list[int] = field(default_factory=list)
    extractor: FeatureExtractor | None = None
    reference: torch.Tensor | None = None
    series: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, state: TrainState) -> "Validator":
        """Load the images and the feature extractor. Call on every process, before the first step.

        Raises UserError if there is nothing to measure: no held-out images, no extractor, or too
        few images.
        """
        validator = cls(state)
        if not validator.is_on:
            return validator
        if state.config.evaluation.eval_images:
            validator._load_features()
        verbose = state.accelerator.is_local_main_process
        images = load_held_out(state.config.data, state.data, verbose, MAX_LOSS_IMAGES)
        if images is not None:
            count = min(MAX_LOSS_IMAGES, len(images))
            validator.rows = order.row_indices(0, len(images), 0, count)
            validator.held_out = torch.stack([dataset_image(images, row) for row in validator.rows])
            validator.labels = timestep_loss.labels_for(state.bare_unet, images, validator.rows)
        elif validator.extractor is None:
            raise UsageError(
                f"{state.data.facts.name} has no test or validation split besides what is trained "
                "on, for the losses of --eval_steps: keep some images out of training with "
                "--held_out 0.05, or leave --eval_steps out."
            )
        return validator

    def _load_features(self) -> None:
        state, accelerator, config = self.state, self.state.accelerator, self.state.config
        if config.data.streaming:
            raise UsageError(
                "--eval_images compares with all training images, which --streaming does not keep: "
                "leave it out, and let evaluate.py decode them after the run."
            )
        features.require_torch_fidelity()
        self.extractor = features.load_feature_extractor(
            config.evaluation.features, config.data.dataset_name, accelerator.device
        )
        minimum = max(MIN_IMAGES, accelerator.num_processes)
        if len(state.data) < minimum:
            raise UserError(
                f"{state.data.facts.name}: {len(state.data)} images; no distance "
                f"means anything with fewer than {minimum}."
            )
        self.reference = dataset_features(
            accelerator, self.extractor, state.data, self._batch_size, "Reference features"
        )

    @property
    def is_on(self) -> bool:
        return self.state.config.evaluation.eval_steps > 0

    @property
    def _batch_size(self) -> int:
        return self.state.config.optimization.train_batch_size

    @property
    def metric_key(self) -> str:
        """Name of the value that the best pipeline is chosen by, the smaller the better."""
        if self.extractor is None:
            return "eval_loss"
        return "eval_fid" if self.extractor.is_inception else "eval_frechet_distance"

    def _candidate(self, step: int, value: float) -> BestPipeline:
        """Return what best.json would hold for the weights of `step`."""
        candidate = BestPipeline(step=step, value=value, measure=self.metric_key)
        if self.extractor is None:
            return candidate
        return replace(
            candidate,
            num_images=self.state.config.evaluation.eval_images,
            features=self.extractor.version,
            num_inference_steps=self.state.config.preview.ddpm_num_inference_steps,
        )

    def resume(self, step: int) -> None:
        """Read the evaluations up to `step`; check the best pipeline that the run has kept.

        Call on every process, before the first step.
        """
        output_dir = Path(self.state.config.output_dir)
        if not self.state.accelerator.is_main_process:
            return
        finish_interrupted_swap(output_dir)
        if not self.is_on:
            return
        self.series = [
            entry
            for entry in run_folder.read_metrics(output_dir)
            if entry["step"] <= step and any(name.startswith("eval_") for name in entry)
        ]
        if self.state.config.evaluation.keep_best:
            note = require_same_metric(output_dir, self._candidate(step, 0.0))
            if note:
                print(note)

    def final_work(self) -> dict[str, float]:
        """Return the time of the evaluation at the end, in steps, for the time budget."""
        if not self.is_on:
            return {}
        config = self.state.config
        passes = config.evaluation.eval_images * config.preview.ddpm_num_inference_steps
        if self.held_out is not None:
            passes += 2 * len(self.held_out) * timestep_loss.NUM_BANDS
        batches = passes / self.state.accelerator.num_processes / self._batch_size
        return {"evaluation": batches / 3 / config.optimization.gradient_accumulation_steps}

    def evaluate(self, step: int, last_step: int | None, skipped: int, tracker: Tracker) -> None:
        """Measure the weights after `step`, log and print the result, and keep the best.

        Call on every process. `last_step` is the run's, None if only time ends it; `skipped` counts
        the steps that fp16 skipped in the run.
        """
        state, main = self.state, self.state.accelerator.is_main_process
        output_dir = Path(state.config.output_dir)
        values: dict[str, float] = {"epoch": state.schedule.epoch(step)}
        if self.held_out is not None:
            values |= self._held_out_losses()
        if self.extractor is not None:
            values |= self._frechet_distance()
        if skipped:
            values["skipped_steps"] = skipped
        tracker.log(step, values)
        if main:
            self.series.append({"step": step, **values})
            figure = plots.plot_held_out_loss(self.series, state.config.diffusion.ddpm_num_steps)
            plots.save(figure, output_dir / run_folder.EVALUATION_DIR / run_folder.HELD_OUT_LOSS)
            decay = state.ema.decay if state.ema is not None else None
            warnings = diagnostics.new_warnings(self.series, decay, last_step)
            tqdm.write("\n".join([_format_evaluation(step, values), *warnings]))
        if state.config.evaluation.keep_best:
            candidate = None
            if main and is_better(output_dir, values[self.metric_key]):
                candidate = self._candidate(step, values[self.metric_key])
            (candidate,) = broadcast_object_list([candidate])
            if candidate is not None:
                keep_best(state, candidate)

    def _held_out_losses(self) -> dict[str, float]:
        """Return the losses of the exported and of the raw weights: the mean, and of each band."""
        state, values = self.state, {}
        averages = {"eval_loss": state.ema}
        if state.ema is not None:
            averages["eval_loss_raw"] = None
        for name, average in averages.items():
            with eval_weights(state.bare_unet, average):
                losses = map_over_processes(
                    state.accelerator, len(self.held_out), self._losses_of, None
                )
            by_band = losses.double().mean(0).tolist()
            values[name] = sum(by_band) / len(by_band)
            values |= {f"{name}_band_{band}": value for band, value in enumerate(by_band)}
        return values

    def _losses_of(self, indices: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield losses [B, K] of batches of held-out images."""
        scheduler = self._scheduler()
        for batch in self._batches(indices):
            images, rows = to_model(self.held_out[batch]), [self.rows[n] for n in batch]
            labels = None if self.labels is None else self.labels[batch]
            yield timestep_loss.loss_by_timestep(
                self.state.bare_unet, scheduler, images, rows, labels
            )

    def _frechet_distance(self) -> dict[str, float]:
        """Return the distance of generated images to the training images, on the main process."""
        state = self.state
        with eval_weights(state.bare_unet, state.ema):
            generated = map_over_processes(
                state.accelerator, state.config.evaluation.eval_images, self._features_of, None
            )
        if not state.accelerator.is_main_process:
            return {}
        return {self.metric_key: float(metrics.frechet_distance(generated, self.reference))}

    def _features_of(self, seeds: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield features [B, D] of batches of images generated from seeds.

        Classes are those of evaluate.py: in the proportions of the data, without guidance.
        """
        scheduler, data, guidance = self._scheduler(), self.state.data, None
        if data.class_names is not None:
            guidance = ClassGuidance(label_sequence(data.class_names, data.facts), 1.0)
        for batch in self._batches(seeds):
            images = generate.generate_images(
                self.state.bare_unet, scheduler, batch, self._batch_size, guidance=guidance
            )
            yield self.extractor.extract(torch.stack([image for _, image in images]))

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        for start in range(0, len(numbers), self._batch_size):
            yield list(numbers[start : start + self._batch_size])

    def _scheduler(self) -> SamplingScheduler:
        return schedulers.build_sampling_scheduler(
            schedulers.DEFAULT_SCHEDULER,
            self.state.scheduler.config,
            self.state.config.preview.ddpm_num_inference_steps,
        )


def _format_evaluation(step: int, values: dict[str, float]) -> str:
    labels = {
        "eval_loss": "held-out loss",
        "eval_loss_raw": "raw weights",
        "eval_fid": "FID",
        "eval_frechet_distance": "Frechet distance",
    }
    parts = [f"{label} {values[name]:.4g}" for name, label in labels.items() if name in values]
    return f"step {step:,}: {', '.join(parts)}"


PARTIAL, REPLACED = ".best.partial", ".best-before.partial"
"""A better pipeline is written to the first; the old one is renamed to the second, and the new one
to best/. After a kill between these renames there is no best/ until the run is resumed."""


def finish_interrupted_swap(output_dir: Path) -> None:
    """Finish the renames that a kill interrupted, and delete leftovers. Main process only."""
    best, partial, replaced = (output_dir / n for n in (run_folder.BEST, PARTIAL, REPLACED))
    if replaced.is_dir() and not best.exists():  # renamed only once the new one is complete
        is_complete = (partial / run_folder.BEST_JSON).is_file()
        os.replace(partial if is_complete else replaced, best)
        file_io.fsync_dir(output_dir)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)


def read_best(output_dir: Path) -> BestPipeline | None:
    """Return best.json of a run, None if nothing is kept yet.

    Raises UserError for a folder best/ without a valid one.
    """
    folder = output_dir / run_folder.BEST
    path = folder / run_folder.BEST_JSON
    if not folder.exists():
        return None
    if not path.is_file():
        raise UserError(f"{folder} is not a pipeline that --keep_best kept: move it away first.")
    return parse_json(BestPipeline, file_io.read_json(path), str(path))


def require_same_metric(output_dir: Path, candidate: BestPipeline) -> str:
    """Raise UserError if the kept pipeline was chosen by another metric than a new one would be.

    Returns a note, "" if there is none, on a kept pipeline that is newer than the candidate's step,
    where the run resumes.
    """
    best = read_best(output_dir)
    if best is None:
        return ""
    folder = output_dir / run_folder.BEST
    if best.metric != candidate.metric:
        was, now = (
            ", ".join(f"{name} {value}" for name, value in metric.items())
            for metric in (best.metric, candidate.metric)
        )
        raise UserError(
            f"{folder} was chosen by {was}; now it would be by {now}. Move it away to begin again, "
            "or give the settings that it was chosen with."
        )
    if best.step > candidate.step:
        return (
            f"Note: {folder} is of step {best.step:,}, after the one that this run resumes from; "
            "it stays until a better one comes."
        )
    return ""


def is_better(output_dir: Path, value: float) -> bool:
    """Return whether a value, the smaller the better, is below that of the kept pipeline."""
    best = read_best(output_dir)
    return best is None or value < best.value


def keep_best(state: TrainState, candidate: BestPipeline) -> None:
    """Replace best/ by the weights as they would be exported now. Call on every process.

    On a full disk it raises UserError, and the pipeline that was kept before is untouched.
    """
    output_dir = Path(state.config.output_dir)
    main = state.accelerator.is_main_process
    best, partial, replaced = (output_dir / n for n in (run_folder.BEST, PARTIAL, REPLACED))
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    export_model(state, partial)
    if not main:
        return
    training = run_record.TrainingRecord(
        steps=candidate.step,
        images_seen=candidate.step * state.schedule.images_per_step,
        epochs=state.schedule.epoch(candidate.step),
    )
    for name in (run_folder.RECORD, run_folder.TRAIN_CONFIG):
        shutil.copyfile(output_dir / name, partial / name)
    run_record.write_record(partial, training=training, finished=True)
    kept = {"step": candidate.step, **candidate.metric, "value": candidate.value}
    file_io.write_json(partial / run_folder.BEST_JSON, kept)
    file_io.fsync_tree(partial)
    if best.exists():
        os.replace(best, replaced)
    os.replace(partial, best)
    file_io.fsync_dir(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
