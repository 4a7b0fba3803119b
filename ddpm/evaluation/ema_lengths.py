"""EMA lengths after training: which ones a run's snapshots give, built, and put into its pipeline.

    OUTPUT_DIR/ema/before/       the pipeline, its proof, record.json and newest grid:
                                 what `export` replaced: `cp -r OUTPUT_DIR/ema/before/. OUTPUT_DIR`
                                 puts it back

Training's own state is left alone: a run that goes on exports its own average again.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import SafetensorError, safe_open

from ddpm import run_folder
from ddpm.config.commands import EvaluateConfig
from ddpm.config.train import PreviewConfig
from ddpm.diffusion import power_ema, schedulers
from ddpm.diffusion.power_ema import PosthocFit, Profile
from ddpm.errors import UsageError, UserError
from ddpm.sampling import generate, image_io, pipeline, proof

MOST_ERROR = 0.1
"""Error of a fit (profiles.Fit) above which a length is refused."""
MOST_UNSEEN = 1e-3
"""Share of an average that may come from before it began, in a run that was resumed without."""


@dataclass(frozen=True)
class PosthocEMA:
    """The averages that a run has kept: where each one lies. `step` is the last one's."""

    files: dict[Profile, Path]

    @property
    def step(self) -> int:
        return max(profile.step for profile in self.files)

    def fit(self, sigma_rel: float) -> PosthocFit:
        """The average of that length after the last step, as a sum of those that were kept."""
        return power_ema.solve_posthoc_weights(list(self.files), Profile(self.step, sigma_rel))

    def require(self, sigma_rels: Sequence[float]) -> None:
        """UserError when one of the lengths cannot be built, with those that can."""
        wrong = [each for each in sigma_rels if self.fit(each).error > MOST_ERROR]
        if wrong:
            grid = [step / 200 for step in range(1, 57)]
            found = [each for each in grid if self.fit(each).error <= MOST_ERROR]
            raise UserError(
                f"--ema_lengths {', '.join(map(str, wrong))}: the {len(self.files)} averages of "
                f"this run cannot be added up to that, to {MOST_ERROR:.0%}. Give lengths from "
                f"{min(found)} to {max(found)}."
            )

    def build(self, sigma_rel: float) -> dict[str, torch.Tensor]:
        """The weights averaged over that length, float32, on the CPU; one that was kept, as it is.

        Added up in float64: the sum may hold large weights of both signs.
        """
        total: dict[str, torch.Tensor] = {}
        given = self.fit(sigma_rel).weights
        for (profile, path), weight in zip(self.files.items(), given, strict=True):
            if weight:
                with safe_open(path, "pt") as file:
                    for key in file.keys():  # noqa: SIM118 (a file, not a dict)
                        length, _, name = key.partition("/")
                        if float(length) == profile.sigma_rel:
                            value = weight * file.get_tensor(key).double()
                            total[name] = total[name] + value if name in total else value
        return {name: value.float() for name, value in total.items()}


def open_posthoc_ema(folder: Path) -> PosthocEMA:
    """The averages of a run folder: its snapshots, and those in its checkpoints.

    UserError for a folder without any, and for files that cannot be read.
    """
    files = {
        step: path / run_folder.POWER_EMA for step, path in run_folder.checkpoints(folder).items()
    }
    files |= power_ema.list_snapshots(folder)
    found: dict[Profile, Path] = {}
    for step, path in sorted(files.items()):
        if not path.is_file():
            continue
        try:
            with safe_open(path, "pt") as file:
                began = int(file.metadata()["began"])
                lengths = {float(key.partition("/")[0]) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}). Move it away; the others may be enough."
            ) from None
        for length in sorted(lengths):
            if (began / step) ** (power_ema.sigma_rel_to_gamma(length) + 1) <= MOST_UNSEEN:
                found[Profile(step, length)] = path
    if not found:
        younger = " long enough ago" if any(path.is_file() for path in files.values()) else ""
        raise UserError(
            f"{folder} holds no averages that began{younger} to build EMA lengths from: train with "
            "--post_hoc_ema. A run that goes on can begin with it too."
        )
    return PosthocEMA(found)


def require_posthoc_run(config: EvaluateConfig) -> PosthocEMA:
    """The averages for --ema_lengths, before anything is drawn. UsageError for what is no run."""
    assert config.ema_lengths is not None
    folder = Path(config.model)
    if not folder.is_dir() or (folder / run_folder.CHECKPOINT_STATE).is_file():
        raise UsageError(
            f"--ema_lengths needs a run folder with its snapshots; {config.model} is none."
        )
    basis = open_posthoc_ema(folder)
    basis.require(config.sigma_rels)
    return basis


def export_weights(
    folder: Path,
    weights: dict[str, torch.Tensor],
    entry: dict[str, Any] | None,
    device: torch.device | str = "cpu",
) -> None:
    """Put `weights` into the pipeline of a run folder, with a proof and a grid of their own.

    Call on one process; `device` draws the grid. `entry` goes to the record with the hash of the
    weights; None for training's own average. What was there goes to ema/before, unless it was put
    there by this function itself. Cut off at any moment, each file is the old one or the new one,
    and no proof is there that is not the pipeline's. UserError while training holds the folder, and
    for a full disk.
    """
    with run_folder.run_lock(folder):
        # From the folder's own files: a model that was loaded notes in its config from where
        unet = UNet2DModel.from_config(run_folder.read_json(folder / run_folder.UNET_CONFIG))
        unet.load_state_dict(weights)
        scheduler = DDPMScheduler.from_config(
            run_folder.read_json(folder / run_folder.SCHEDULER_CONFIG)
        )
        place = folder / run_folder.UNET_WEIGHTS
        cut_off = run_folder.export_was_interrupted(folder)
        if (
            run_folder.read_exported_ema(folder, pipeline.file_sha256(place)) is None
            and not cut_off
        ):
            _keep(folder)
        (folder / run_folder.PROOF).unlink(missing_ok=True)
        pipeline.export_pipeline(unet, scheduler, folder)
        if entry is not None:
            entry = {**entry, "sha256": pipeline.file_sha256(place)}
        run_folder.write_record(folder, exported_ema=entry)
        proof.write_proof(folder, unet, scheduler)
        torch.nn.Module.to(unet, device)
        _draw_grid(folder, unet.eval(), scheduler)


def _keep(folder: Path) -> None:
    """Copy what `export` replaces to ema/before, whole or not at all."""
    before = _before(folder)
    partial = before.with_name(f".{before.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    names = [*run_folder.PIPELINE_FILES, run_folder.PROOF, run_folder.RECORD]
    names += [f"{run_folder.PROOF_IMAGES}/{p.name}" for p in folder.glob("proof/*.png")]
    names += [f"{run_folder.SAMPLES}/{grid.name}" for grid in _grids(folder)[-1:]]
    try:
        for name in names:
            if (folder / name).is_file():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, partial / name)
        run_folder.fsync_tree(partial)
    except OSError as error:
        reason = run_folder.write_failure_reason(error, folder)
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{before} could not be written ({reason}), so the pipeline was left as it "
            "is. Make room, then run the same command again."
        ) from error
    shutil.rmtree(before, ignore_errors=True)
    os.replace(partial, before)
    run_folder.fsync_dir(before.parent)


def _draw_grid(folder: Path, unet: UNet2DModel, scheduler: DDPMScheduler) -> None:
    """The newest preview grid again, from the weights that are now in the pipeline."""
    grids, settings = _grids(folder), PreviewConfig()
    if not grids:
        return
    path = folder / run_folder.TRAIN_CONFIG
    run = run_folder.read_json(path) if path.is_file() else {}
    count = run.get("eval_batch_size", settings.eval_batch_size)
    steps = run.get("ddpm_num_inference_steps", settings.ddpm_num_inference_steps)
    sampling_scheduler = schedulers.build_sampling_scheduler(
        schedulers.DEFAULT_SCHEDULER, scheduler.config, steps
    )
    drawn = [
        image
        for _, image in generate.generate_images(unet, sampling_scheduler, range(count), count)
    ]
    image_io.save_png(image_io.make_grid(drawn), grids[-1], image_io.read_png_text(grids[-1]))


def _before(folder: Path) -> Path:
    return folder / run_folder.REPLACED_PIPELINE


def _grids(folder: Path) -> list[Path]:
    return sorted((folder / run_folder.SAMPLES).glob("step-*.png"))
