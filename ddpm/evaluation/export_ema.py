"""Export other weights into the pipeline of a finished run, such as an average of another length.

    OUTPUT_DIR/ema/before/      what the export replaced: the pipeline, its proof, record.json and
                                the newest grid; `cp -r OUTPUT_DIR/ema/before/. OUTPUT_DIR` restores

Training's own state is left alone: a run that continues exports its own average again.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from ddpm import file_io, run_folder, run_record
from ddpm.config.train import PreviewConfig
from ddpm.errors import UserError
from ddpm.sampling import image_io, pipeline, pipeline_folder, proof, unet_files
from ddpm.sampling.preview import generate_preview
from ddpm.typed_json import parse_json


def export_weights(
    folder: Path,
    weights: dict[str, torch.Tensor],
    entry: dict[str, Any] | None,
    device: torch.device | str = "cpu",
) -> None:
    """Put `weights` into the pipeline of a run folder, with a new proof and a new grid.

    Call on one process; `device` generates the grid. `entry` is recorded with the hash of the
    weights; None for training's own average. What training exported is kept in ema/before. If
    interrupted at any moment, each file is the old one or the new one, and a proof that exists is
    the pipeline's. UserError while training writes into the folder, and for a full disk.
    """
    with run_folder.run_lock(folder):
        # From the folder's own files: loaded models add their origin to their config
        pipeline_folder.require_plain_pipeline(folder, str(folder))
        class_names, config = None, folder / run_folder.UNET_CONFIG
        if run_folder.has_classes(folder):
            labels = folder / run_folder.CONDITIONAL_LABELS
            class_names = unet_files.read_labels(labels, str(folder))
            config = folder / run_folder.CONDITIONAL_CONFIG
        unet = UNet2DModel.from_config(file_io.read_json(config))
        unet.load_state_dict(weights)
        scheduler = DDPMScheduler.from_config(
            file_io.read_json(folder / run_folder.SCHEDULER_CONFIG)
        )
        weights_path = folder / run_folder.UNET_WEIGHTS
        exported = run_record.read_exported_ema(folder, file_io.file_sha256(weights_path))
        if exported is None and not run_folder.export_was_interrupted(folder):
            _keep_replaced(folder)
        (folder / run_folder.PROOF).unlink(missing_ok=True)
        pipeline.export_pipeline(unet, scheduler, folder, class_names)
        if entry is not None:
            entry = {**entry, "sha256": file_io.file_sha256(weights_path)}
        run_record.write_record(folder, exported_ema=entry)
        proof.write_proof(folder, unet, scheduler)
        torch.nn.Module.to(unet, device)
        _generate_grid(folder, unet.eval(), scheduler, class_names)


def _keep_replaced(folder: Path) -> None:
    """Copy what the export replaces to ema/before, completely or not at all."""
    before = folder / run_folder.REPLACED_PIPELINE
    partial_copy = before.with_name(f".{before.name}.partial")
    shutil.rmtree(partial_copy, ignore_errors=True)
    paths = [folder / name for name in (*run_folder.model_files(folder), run_folder.RECORD)]
    paths += [folder / run_folder.PROOF, *folder.glob("proof/*.png"), *_grids(folder)[-1:]]
    try:
        for path in filter(Path.is_file, paths):
            copy = partial_copy / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        file_io.fsync_tree(partial_copy)
    except OSError as error:
        reason = file_io.write_failure_reason(error, folder)
        shutil.rmtree(partial_copy, ignore_errors=True)
        raise UserError(
            f"{before} could not be written ({reason}), so the pipeline was left as it "
            "is. Free some space, then run the same command again."
        ) from error
    shutil.rmtree(before, ignore_errors=True)
    os.replace(partial_copy, before)
    file_io.fsync_dir(before.parent)


def _generate_grid(
    folder: Path, unet: UNet2DModel, scheduler: DDPMScheduler, class_names: Sequence[str] | None
) -> None:
    """Generate the newest preview grid again, with the weights that are now in the pipeline."""
    grids = _grids(folder)
    if not grids:
        return
    path = folder / run_folder.TRAIN_CONFIG
    config = file_io.read_json(path) if path.is_file() else {}
    preview = parse_json(PreviewConfig, config, str(path))
    count, steps = preview.eval_batch_size, preview.ddpm_num_inference_steps
    grid = generate_preview(unet, scheduler.config, count, steps, class_names)
    image_io.save_png(grid, grids[-1], image_io.read_png_text(grids[-1]))


def _grids(folder: Path) -> list[Path]:
    return sorted((folder / run_folder.SAMPLES).glob("step-*.png"))
