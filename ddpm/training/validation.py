"""How good the model is, on the way: --eval_steps, --eval_images, --keep_best.

Held-out images are denoised by the raw and by the averaged weights, with the same noise each time
(bands.py); drawn ones are compared with the training images in feature space. Every process takes
its share. All of it is a function of the weights: nothing of the training loop's randomness is
touched, and a run that was stopped and goes on writes the same lines of metrics.jsonl.

Legend: N images, K bands, D features.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from tqdm.auto import tqdm

from ddpm import run_folder
from ddpm.config.base import MIN_IMAGES
from ddpm.config.train import TrainConfig
from ddpm.data import order
from ddpm.data.dataset import load_held_out
from ddpm.data.transforms import to_model
from ddpm.diffusion import schedulers
from ddpm.diffusion.ema import EMA, eval_weights
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import features, metrics, plots, timestep_loss
from ddpm.evaluation.features import (
    FeatureExtractor,
    dataset_features,
    dataset_image,
    map_over_processes,
)
from ddpm.sampling import generate
from ddpm.training import diagnostics
from ddpm.training.step import TrainState, export_model
from ddpm.training.tracking import Tracker

MAX_LOSS_IMAGES = 64
"""Held-out images whose loss is measured, each in all bands."""


@dataclass
class Validator:
    """What an evaluation needs; one that is not `is_on` does nothing.

    `held_out` are the images whose loss is measured, [N, C, R, R] uint8, None without, `rows` their
    numbers, which their noise belongs to (as in evaluate.py, which measures more of them).
    `network` and `reference` [M, D] belong to --eval_images. `skipped` counts the steps that fp16
    skipped in the whole run, `series` holds the evaluations so far, on the main process.
    """

    parts: TrainState
    held_out: torch.Tensor | None = None
    rows: list[int] = field(default_factory=list)
    network: FeatureExtractor | None = None
    reference: torch.Tensor | None = None
    skipped: int = 0
    series: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, parts: TrainState) -> "Validator":
        """Find the images and the feature network. Call on every process, before the first step.

        UserError for what cannot be measured: no held-out images, no feature network, too few.
        """
        config, watch = parts.config, cls(parts)
        if not watch.is_on:
            return watch
        if config.evaluation.eval_images:
            watch._open_features(config)
        loud = parts.accelerator.is_local_main_process
        found = load_held_out(config.data, parts.data, loud, MAX_LOSS_IMAGES)
        if found is not None:
            watch.rows = order.row_indices(0, len(found), 0, min(MAX_LOSS_IMAGES, len(found)))
            watch.held_out = torch.stack([dataset_image(found, row) for row in watch.rows])
        elif watch.network is None:
            raise UsageError(
                f"{parts.data.facts.name} has no test or validation split for the losses of "
                "--eval_steps: keep some images out of training with --held_out 0.05, or leave "
                "--eval_steps out."
            )
        return watch

    def _open_features(self, config: TrainConfig) -> None:
        parts, accelerator = self.parts, self.parts.accelerator
        if config.data.streaming:
            raise UsageError(
                "--eval_images compares with all training images, which --streaming does not keep: "
                "leave it out, and let evaluate.py decode them after the run."
            )
        features.require_torch_fidelity()
        file, dataset = config.evaluation.features, config.data.dataset_name
        self.network = features.load_feature_extractor(file, dataset, accelerator.device)
        fewest = max(MIN_IMAGES, accelerator.num_processes)
        if len(parts.data) < fewest:
            raise UserError(
                f"{parts.data.facts.name}: {len(parts.data)} images; no distance "
                f"means anything with fewer than {fewest}."
            )
        size = config.optimization.train_batch_size
        self.reference = dataset_features(accelerator, self.network, parts.data, size, "Looking")

    @property
    def is_on(self) -> bool:
        return self.parts.config.evaluation.eval_steps > 0

    @property
    def measure(self) -> str:
        """Name of the value that the best pipeline is chosen by, the smaller the better."""
        if self.network is None:
            return "eval_loss"
        return "eval_fid" if self.network.is_inception else "eval_frechet_distance"

    @property
    def ruler(self) -> dict[str, Any]:
        """What must be the same for two values to be comparable."""
        ruler: dict[str, Any] = {"measure": self.measure}
        if self.network is not None:
            config = self.parts.config
            ruler |= {
                "num_images": config.evaluation.eval_images,
                "features": self.network.version,
                "num_inference_steps": config.preview.ddpm_num_inference_steps,
            }
        return ruler

    def begin(self, step: int, skipped: int) -> None:
        """Take up the run at `step`: its evaluations so far, and the best pipeline that it kept."""
        self.skipped = skipped
        output_dir = Path(self.parts.config.output_dir)
        if not self.parts.accelerator.is_main_process:
            return
        finish_interrupted_swap(output_dir)
        if not self.is_on:
            return
        self.series = _read(output_dir, step)
        if self.parts.config.evaluation.keep_best:
            note = require_same_measure(output_dir, self.ruler, step)
            if note:
                print(note)

    def chores(self) -> dict[str, float]:
        """The evaluation at the end as a chore of the budget, in steps, while unmeasured."""
        if not self.is_on:
            return {}
        config = self.parts.config
        looks = 0 if self.held_out is None else len(self.held_out) * timestep_loss.NUM_BANDS * 2
        looks += config.evaluation.eval_images * config.preview.ddpm_num_inference_steps
        share = looks / self.parts.accelerator.num_processes / config.optimization.train_batch_size
        return {"evaluation": share / 3 / config.optimization.gradient_accumulation_steps}

    def evaluate(self, step: int, last_step: int | None, tracker: Tracker) -> None:
        """Measure the weights after `step`, tell the tracker and the console, keep the best.

        Call on every process. `last_step` is the run's, None where only time ends it.
        """
        parts, accelerator = self.parts, self.parts.accelerator
        plan = parts.plan
        values: dict[str, float] = {
            "epoch": round(step * plan.images_per_step / plan.num_images, 4),
            **(self._losses() if self.held_out is not None else {}),
            **(self._distance() if self.network is not None else {}),
        }
        if self.skipped:
            values["skipped_steps"] = self.skipped
        tracker.scalars(step, values)
        if accelerator.is_main_process:
            self.series.append({"step": step, **values})
            decay = parts.ema.decay if parts.ema is not None else None
            self._draw()
            for line in [
                _line(step, values),
                *diagnostics.new_warnings(self.series, decay, last_step),
            ]:
                tqdm.write(line)
        if parts.config.evaluation.keep_best and self._is_better(values[self.measure]):
            facts = {"step": step, **self.ruler, "value": values[self.measure]}
            images_seen = step * plan.images_per_step
            training = {"steps": step, "images_seen": images_seen, "epochs": values["epoch"]}
            keep_best(parts, facts, training)

    def _draw(self) -> None:
        """The held-out losses so far as a picture, as soon as there are two."""
        chain = self.parts.config.diffusion.ddpm_num_steps
        folder = Path(self.parts.config.output_dir) / run_folder.EVALUATION_DIR
        figure = plots.plot_held_out_loss(self.series, chain)
        plots.save(figure, folder / run_folder.HELD_OUT_LOSS)

    def _losses(self) -> dict[str, float]:
        """Held-out loss of the exported weights and of the raw ones, in all and by band."""
        parts, found = self.parts, {}
        weights: dict[str, EMA | None] = {"eval_loss": parts.ema}
        if parts.ema is not None:
            weights["eval_loss_raw"] = None
        for name, average in weights.items():
            with eval_weights(parts.bare_unet, average):
                each = map_over_processes(
                    parts.accelerator, len(self.held_out), self._denoised, None
                )
            by_band = each.double().mean(0).tolist()
            found[name] = sum(by_band) / len(by_band)
            found |= {f"{name}_band_{band}": value for band, value in enumerate(by_band)}
        return found

    def _denoised(self, mine: Sequence[int]) -> Iterator[torch.Tensor]:
        """Losses [B, K] of some of the held-out images."""
        size = self.parts.config.optimization.train_batch_size
        scheduler = self._scheduler()
        for start in range(0, len(mine), size):
            chosen = list(mine[start : start + size])
            pixels, rows = to_model(self.held_out[chosen]), [self.rows[n] for n in chosen]
            yield timestep_loss.loss_by_timestep(self.parts.bare_unet, scheduler, pixels, rows)

    def _distance(self) -> dict[str, float]:
        """Frechet distance of images of the exported weights, told to all by the main process."""
        parts, accelerator = self.parts, self.parts.accelerator
        with eval_weights(parts.bare_unet, parts.ema):
            drawn = map_over_processes(
                accelerator, parts.config.evaluation.eval_images, self._drawn, None
            )
        value = 0.0
        if accelerator.is_main_process:
            value = metrics.frechet_distance(drawn, self.reference)
        return {self.measure: float(self._agreed(value))}

    def _drawn(self, mine: Sequence[int]) -> Iterator[torch.Tensor]:
        """Features [B, D] of the images of some seeds."""
        size = self.parts.config.optimization.train_batch_size
        scheduler = self._scheduler()
        for start in range(0, len(mine), size):
            seeds = mine[start : start + size]
            drawn = generate.generate_images(self.parts.bare_unet, scheduler, seeds, size)
            yield self.network.of(torch.stack([image for _, image in drawn]))

    def _scheduler(self) -> SamplingScheduler:
        steps = self.parts.config.preview.ddpm_num_inference_steps
        return schedulers.build_sampling_scheduler(
            schedulers.DEFAULT_SCHEDULER, self.parts.scheduler.config, steps
        )

    def _is_better(self, value: float) -> bool:
        """What the main process finds in the run folder, the same on all."""
        here = self.parts.accelerator.is_main_process
        output_dir = Path(self.parts.config.output_dir)
        return bool(self._agreed(float(here and is_better(output_dir, value))))

    def _agreed(self, value: float) -> float:
        # As text in bytes: not every accelerator has float64, and no digit may be lost.
        content = torch.tensor(list(f"{value!r:<32}".encode()), dtype=torch.uint8)
        told = broadcast(content.to(self.parts.accelerator.device))
        return float(bytes(told.tolist()))


def _read(output_dir: Path, step: int) -> list[dict[str, Any]]:
    """The evaluations of metrics.jsonl up to `step`, in rising order."""
    return [
        entry
        for entry in run_folder.read_metrics(output_dir)
        if entry["step"] <= step and any(name.startswith("eval_") for name in entry)
    ]


def _line(step: int, values: dict[str, float]) -> str:
    """The evaluation in a line for people."""
    told = {
        "held-out loss": "eval_loss",
        "raw weights": "eval_loss_raw",
        "FID": "eval_fid",
        "Frechet distance": "eval_frechet_distance",
    }
    said = [f"{words} {values[name]:.4g}" for words, name in told.items() if name in values]
    return f"step {step:,}: {', '.join(said)}"


# The best pipeline so far, in a folder that is whole at every moment at which it is there.
#
#     best/
#       model_index.json  unet/  scheduler/    a DDPMPipeline, as in the run folder
#       best.json                              step, measure and value that it was chosen by
#       train_config.json  record.json         for evaluate.py and push.py: where it comes from
#
# A better one is written beside and synced; then the old one is renamed away and the new one put in
# its place. A kill between these two renames leaves no best/ until the same command runs again.

PARTIAL, BEFORE = ".best.partial", ".best-before.partial"


def finish_interrupted_swap(output_dir: Path) -> None:
    """Finish what a kill cut short, and tidy up: on the main process, before the first step."""
    best, partial, before = (output_dir / n for n in (run_folder.BEST, PARTIAL, BEFORE))
    if before.is_dir() and not best.exists():  # moved away only for a new one that was whole
        os.replace(partial if (partial / run_folder.BEST_JSON).is_file() else before, best)
        run_folder.fsync_dir(output_dir)
    for leftover in (partial, before):
        shutil.rmtree(leftover, ignore_errors=True)


def read_best(output_dir: Path) -> dict[str, Any] | None:
    """best.json of a run; None where nothing was kept yet. UserError for a folder without one."""
    folder = output_dir / run_folder.BEST
    if not folder.exists():
        return None
    if not (folder / run_folder.BEST_JSON).is_file():
        raise UserError(f"{folder} is not a pipeline that --keep_best kept: move it away first.")
    return run_folder.read_json(folder / run_folder.BEST_JSON)


def require_same_measure(output_dir: Path, ruler: dict[str, Any], step: int) -> str:
    """What to say of a best pipeline that an earlier part of the run kept, if anything.

    `ruler` is what values are measured by now, `step` where the run goes on. UserError for one that
    was chosen by something else: their values cannot be compared.
    """
    found = read_best(output_dir)
    if found is None:
        return ""
    if {name: found.get(name) for name in ruler} != ruler:
        was, now = (
            ", ".join(f"{k} {v}" for k, v in d.items())
            for d in ({k: found.get(k) for k in ruler}, ruler)
        )
        raise UserError(
            f"{output_dir / run_folder.BEST} was chosen by {was}; now it would be by {now}. Move it "
            "away to begin anew, or give the settings that it was chosen with."
        )
    if found["step"] > step:
        return (
            f"Note: {output_dir / run_folder.BEST} is of step {found['step']:,}, after the one that "
            "this run goes on from; it stays until a better one comes."
        )
    return ""


def is_better(output_dir: Path, value: float) -> bool:
    """Whether a value, the smaller the better, is below that of the pipeline that is kept."""
    found = read_best(output_dir)
    return found is None or value < found["value"]


def keep_best(parts: TrainState, facts: dict[str, Any], training: dict[str, Any]) -> None:
    """Put the weights as they would be exported now into best/. Call on every process.

    `facts` go to best.json, `training` into its record. UserError for a disk that is full: the one
    that was kept before is then untouched.
    """
    output_dir = Path(parts.config.output_dir)
    main = parts.accelerator.is_main_process
    best, partial, before = (output_dir / n for n in (run_folder.BEST, PARTIAL, BEFORE))
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    export_model(parts, partial)
    if not main:
        return
    shutil.copyfile(output_dir / run_folder.RECORD, partial / run_folder.RECORD)
    run_folder.write_record(partial, training=training, finished=True)
    settings = run_folder.read_json(output_dir / run_folder.TRAIN_CONFIG)
    run_folder.write_json(partial / run_folder.TRAIN_CONFIG, settings)
    run_folder.write_json(partial / run_folder.BEST_JSON, facts)
    run_folder.fsync_tree(partial)
    if best.exists():
        os.replace(best, before)
    os.replace(partial, best)
    run_folder.fsync_dir(output_dir)
    shutil.rmtree(before, ignore_errors=True)
