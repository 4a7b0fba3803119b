"""What survives a crash: the training state, written beside, renamed when whole, found again.

    checkpoint-500/
      model.safetensors     raw weights        } accelerator.save_state, on every rank
      optimizer.bin         AdamW's moments    }
      scaler.pt             only with fp16     }
      ema.safetensors       averaged weights
      tracks.safetensors    only with --post_hoc_ema: the averages of tracks.py
      state.json            step, what the run was, seconds so far; written last

No random state is kept: order.py makes randomness a function of the step. A folder of this name
without a readable state.json is not ours or not whole: it is ignored, named and never deleted.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddpm import run_folder
from ddpm.diffusion.ema import EMA
from ddpm.diffusion.power_ema import PowerEMA
from ddpm.errors import UserError

STATE = run_folder.CHECKPOINT_STATE
EMA_WEIGHTS = "ema.safetensors"


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says of itself: optimizer steps done, and which run they belong to.

    `micro_batches` is processes x accumulation, `pixels_sha256` the hash of the decoded images:
    both decide what every step sees, so a resume must have the same. `seconds` is time in steps,
    `spent` all the time since the launch that counts for --budget, over all parts of the run,
    `stream` where a streamed dataset goes on (None for one that is decoded once), `skipped` how
    many steps fp16's gradient scaler skipped so far.
    """

    step: int
    micro_batches: int
    pixels_sha256: str
    seconds: float
    num_parameters: int
    spent: float = 0.0
    stream: dict[str, Any] | None = None
    skipped: int = 0


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after optimizer step `step` lies."""
    return output_dir / f"checkpoint-{step}"


def save_checkpoint(
    accelerator: Accelerator,
    ema: EMA | None,
    state: CheckpointState,
    output_dir: Path,
    limit: int | None,
    tracks: PowerEMA | None = None,
) -> None:
    """Write checkpoint-N and then prune to the newest `limit`. Must be called on every rank.

    A kill at any moment leaves the earlier checkpoints and perhaps a hidden partial folder. A full
    disk is a UserError that names the last good checkpoint.
    """
    name = f"checkpoint-{state.step}"
    partial = output_dir / f".{name}.partial"
    if read_state(output_dir / name) is not None:
        return
    if accelerator.is_main_process:
        for leftover in output_dir.glob(".checkpoint-*.partial"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        for random_state in partial.glob("random_states_*.pkl"):
            random_state.unlink(missing_ok=True)
        average = ema.state() if ema is not None else None
        if tracks is not None:
            tracks.save(partial / run_folder.POWER_EMA, state.step, accelerator.is_main_process)
        if accelerator.is_main_process:
            if average is not None:
                save_file(average, partial / EMA_WEIGHTS)
            run_folder.write_json(partial / STATE, asdict(state))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            run_folder.fsync_tree(partial)
            os.replace(partial, output_dir / name)
            run_folder.fsync_dir(output_dir)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = run_folder.write_failure_reason(error, output_dir)
        shutil.rmtree(partial, ignore_errors=True)
        last = latest_checkpoint(output_dir)
        kept = f"The last good one is {last}, untouched." if last else "There is no earlier one."
        raise UserError(
            f"{output_dir / name} could not be written ({reason}). {kept} "
            "Make room, then run the same command again."
        ) from error
    if accelerator.is_main_process and limit is not None:
        complete = [p for p in run_folder.checkpoints(output_dir).values() if read_state(p)]
        for old in complete[:-limit]:
            shutil.rmtree(old)


def load_checkpoint(
    accelerator: Accelerator, ema: EMA | None, folder: Path, tracks: PowerEMA | None = None
) -> CheckpointState:
    """Put a checkpoint into the prepared model and optimizer, and the EMA. Call on every rank.

    `tracks` begin anew, and say so, when it has none.
    """
    state = read_state(folder)
    assert state is not None, folder
    try:
        accelerator.load_state(str(folder))
        if ema is not None:
            ema.load(load_file(folder / EMA_WEIGHTS))
        if tracks is not None:
            tracks.resume(folder, state.step, accelerator.print)
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"{folder} cannot be loaded ({str(error).splitlines()[0]}). Move it away to go on from "
            "the one before it, or give another --resume_from_checkpoint."
        ) from error
    return state


def find_checkpoint(wanted: str, output_dir: Path) -> Path | None:
    """The folder to go on from; None when nothing was asked for by name and there is none yet.

    `wanted` is `latest`, the name of a checkpoint in `output_dir`, or any path to one. UserError
    when one was named that is not there or not whole.
    """
    if wanted == "latest":
        return latest_checkpoint(output_dir)
    for folder in (Path(wanted), output_dir / wanted):
        if read_state(folder) is not None:
            return folder
    complete = [p.name for p in run_folder.checkpoints(output_dir).values() if read_state(p)]
    listed = f"{output_dir} has {', '.join(complete)}" if complete else f"{output_dir} has none"
    raise UserError(f"--resume_from_checkpoint {wanted} is no complete checkpoint; {listed}.")


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint; incomplete folders of that name are passed over."""
    for folder in reversed(run_folder.checkpoints(output_dir).values()):
        if read_state(folder) is not None:
            return folder
        print(f"{folder} is not a complete checkpoint of this project: passed over.")
    return None


def read_state(folder: Path) -> CheckpointState | None:
    """What a checkpoint says of itself; None when the folder is not one, or not whole."""
    try:
        return CheckpointState(**run_folder.read_json(folder / STATE))
    except (UserError, TypeError):
        return None


def require_same_run(found: CheckpointState, now: CheckpointState, folder: Path) -> None:
    """UserError when a checkpoint's steps saw other data, or another number of micro-batches."""
    if found.micro_batches != now.micro_batches:
        raise UserError(
            f"{folder} was made with {found.micro_batches} micro-batches a step (processes x "
            f"--gradient_accumulation_steps), now there are {now.micro_batches}. With another "
            f"number of processes, change the accumulation so that the product stays "
            f"{found.micro_batches}."
        )
    if found.pixels_sha256 != now.pixels_sha256:
        raise UserError(
            f"{folder} was trained on other pixels than are there now: the dataset has changed, or "
            "Pillow, which decodes it. Pin the old data with --dataset_revision, or start anew in "
            "another --output_dir."
        )
    if found.num_parameters != now.num_parameters:
        raise UserError(
            f"{folder} holds another model ({found.num_parameters:,} parameters, now "
            f"{now.num_parameters:,})."
        )
