"""Checkpoints: the training state, written under a temporary name and renamed once complete.

    checkpoint-500/
      model.safetensors     raw weights        } accelerator.save_state, on every rank; with FSDP
      optimizer.bin         AdamW's moments    } pytorch_model_fsdp_0/, optimizer_0/: a file of each
      scaler.pt             only with fp16     }
      ema.safetensors       averaged weights
      tracks.safetensors    only with --post_hoc_ema: the power-function EMAs
      state.json            run_folder.CheckpointState, written last

There is no random state: data/order.py makes randomness a function of the step. A folder of this
name without state.json is incomplete or not ours: it is skipped, named and never deleted. One with
a damaged state.json stops the run before its first step.
"""

import itertools
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddpm import file_io, run_folder, run_record
from ddpm.accelerator import from_main, is_sharded
from ddpm.diffusion.ema import EMA
from ddpm.diffusion.power_ema import PowerEMA
from ddpm.errors import UserError, foreign_errors
from ddpm.rank_failure import is_lost_connection
from ddpm.run_record import CheckpointState

EMA_WEIGHTS = "ema.safetensors"
ADVICE = "Move it away to resume from the one before it, or give another --resume_from_checkpoint."


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after optimizer step `step`."""
    return output_dir / f"checkpoint-{step}"


def save_checkpoint(
    accelerator: Accelerator,
    ema: EMA | None,
    state: CheckpointState,
    output_dir: Path,
    limit: int | None,
    power_ema: PowerEMA | None = None,
) -> Path:
    """Write checkpoint-N, then delete all but the newest `limit`. Call on every process.

    A kill at any moment leaves the earlier checkpoints and perhaps a hidden partial folder. Raises
    UserError, which names the last good checkpoint, if the disk is full.
    """
    folder = checkpoint_folder(output_dir, state.step)
    partial = output_dir / f".{folder.name}.partial"
    main = accelerator.is_main_process
    if from_main(accelerator, main and read_state(folder) is not None):
        return folder
    if main:
        for leftover in output_dir.glob(".checkpoint-*.partial"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    try:
        if main or is_sharded(accelerator):  # the others have nothing of their own to save
            accelerator.save_state(str(partial))
        for random_state in partial.glob("random_states_*.pkl"):
            random_state.unlink(missing_ok=True)
        average = ema.state() if ema is not None else None
        if power_ema is not None:
            power_ema.save(partial / run_folder.POWER_EMA, state.step, main)
        if main:
            if average is not None:
                save_file(average, partial / EMA_WEIGHTS)
            file_io.write_json(partial / run_folder.CHECKPOINT_STATE, asdict(state))
        accelerator.wait_for_everyone()
        if main:
            install_checkpoint(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_lost_connection(error):
            raise
        reason = file_io.write_failure_reason(error, output_dir)
        shutil.rmtree(partial, ignore_errors=True)
        kept = "There is no earlier one."
        if complete := complete_checkpoints(output_dir):
            kept = f"The last good one is {complete[-1]}, untouched."
        raise UserError(
            f"{folder} could not be written ({reason}). {kept} "
            "Free some space, then run the same command again."
        ) from error
    if main and limit is not None:
        for old in complete_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(
    accelerator: Accelerator, ema: EMA | None, folder: Path, power_ema: PowerEMA | None = None
) -> CheckpointState:
    """Load a complete checkpoint into the prepared model and optimizer, and the averages.

    Call on every process. Raises UserError for a damaged file. A `power_ema` that the checkpoint
    does not have starts here, with a note.
    """
    state = read_state(folder)
    assert state is not None, folder
    is_sharded = any(folder.glob(f"{FSDP_MODEL_NAME}*"))
    if is_sharded != (accelerator.distributed_type == DistributedType.FSDP):
        how = "with" if is_sharded else "without"
        raise UserError(
            f"{folder} was saved {how} FSDP, which has files of its own: launch with an accelerate "
            f"config {how} fsdp_config."
        )
    with foreign_errors(f"{folder} cannot be loaded", ADVICE):
        accelerator.load_state(str(folder))
        if ema is not None:
            ema.load(load_file(folder / EMA_WEIGHTS))
        if power_ema is not None:
            power_ema.resume(folder, state.step, accelerator.print)
    return state


def find_checkpoint(name: str, output_dir: Path) -> Path | None:
    """Return the folder to resume from, None for `latest` if there is none yet.

    `name` is `latest`, the name of a checkpoint in `output_dir`, or any path to one. Raises
    UserError if it is missing or incomplete.
    """
    if name == "latest":
        return latest_checkpoint(output_dir)
    for folder in (Path(name), output_dir / name):
        if read_state(folder) is not None:
            return folder
    names = [folder.name for folder in complete_checkpoints(output_dir)]
    raise UserError(
        f"--resume_from_checkpoint {name} is no complete checkpoint; {output_dir} has "
        f"{', '.join(names) or 'none'}."
    )


def latest_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint; folders without state.json are skipped with a note.

    Raise UserError for a damaged state.json: a run that began again would end where it is.
    """
    for folder in reversed(run_folder.checkpoints(output_dir).values()):
        if (folder / run_folder.CHECKPOINT_STATE).exists():
            try:
                run_record.read_checkpoint_state(folder)
            except UserError as error:
                raise UserError(f"{error} {ADVICE}") from None
            return folder
        print(f"{folder} is not a complete checkpoint of this project: skipped.")
    return None


def read_state(folder: Path) -> CheckpointState | None:
    """Return the state.json of a checkpoint, None for a folder that has no valid one."""
    try:
        return run_record.read_checkpoint_state(folder)
    except UserError:
        return None


def require_same_run(saved: CheckpointState, current: CheckpointState, folder: Path) -> None:
    """Raise UserError for a checkpoint of another model, other data or other micro-batches."""
    if saved.micro_batches != current.micro_batches:
        raise UserError(
            f"{folder} was made with {saved.micro_batches} micro-batches a step (processes x "
            f"--gradient_accumulation_steps), now there are {current.micro_batches}. With another "
            f"number of processes, change the accumulation so that the product stays "
            f"{saved.micro_batches}."
        )
    if saved.stream is not None and "place" in saved.stream and saved.micro_batches > 1:
        raise UserError(
            f"{folder} is in the middle of a stream that an earlier version read in another "
            f"order: all {saved.micro_batches} micro-batches of a step from one sequence. End that "
            "run with the version that began it, or start again in another --output_dir."
        )
    if saved.pixels_sha256 != current.pixels_sha256:
        raise UserError(
            f"{folder} was trained on other pixels or labels than the dataset has now: the dataset "
            "has changed (of a stream, any new commit counts), or Pillow, which decodes it. Of a "
            "dataset on the Hub, --dataset_revision with the commit that record.json names goes on "
            "with the old data; else start again in another --output_dir."
        )
    if saved.num_parameters != current.num_parameters:
        raise UserError(
            f"{folder} holds another model ({saved.num_parameters:,} parameters, now "
            f"{current.num_parameters:,}). If no setting was changed, an earlier version chose it "
            "for this resolution: start again in another --output_dir."
        )


def install_checkpoint(partial: Path, folder: Path) -> None:
    """Give a complete checkpoint its name, once all of it is on disk."""
    file_io.fsync_tree(partial)
    _move_away(folder)
    os.replace(partial, folder)
    file_io.fsync_dir(folder.parent)


def _move_away(folder: Path) -> None:
    """Rename what has the name of a new checkpoint and is no complete one."""
    if os.path.lexists(folder):
        names = (folder.with_name(f"{folder.name}-replaced-{n}") for n in itertools.count(1))
        os.replace(folder, next(path for path in names if not os.path.lexists(path)))


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders of the complete checkpoints, in ascending order of their steps."""
    folders = run_folder.checkpoints(output_dir).values()
    return [folder for folder in folders if read_state(folder) is not None]
