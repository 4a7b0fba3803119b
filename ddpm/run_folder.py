"""The run folder: the names of its files, its lock, its checkpoints, and its deletion.

    OUTPUT_DIR/                  a plain DDPMPipeline folder, as diffusers loads it
      model_index.json  unet/  scheduler/      EMA weights, safetensors
      conditional/               only with class labels: the UNet with its classes, and their names
      train_config.json          the resolved config; `train.py --config` does the run again
      record.json                data, steps, seconds, hardware, versions, losses
      metrics.jsonl              one JSON object for each logged step
      samples/step-000500.png    preview grids, always the same seeds
      proof.json  proof/         images of fixed seeds that every copy of the model must reproduce
      evaluation.json            measurements of the finished model
      evaluation/                their plots
      samplers.json              the table of samplers that sample.py --quality chooses from
      best/                      the best pipeline so far, with best.json (--keep_best)
      checkpoint-500/            training state for resuming, never published
      ema/step-000960.safetensors    averages for EMAs of any length (--post_hoc_ema)
      ema/before/                files that `evaluate.py --export_best` replaced
      logs/                      the trackers' folders
      published.json             repo id, commit, sha256 of each file, the proof

This module does not import torch.
"""

import errno
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ddpm.errors import LACKING_ERRNOS, UserError

# The pipeline
MODEL_INDEX = "model_index.json"
UNET_CONFIG = "unet/config.json"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
PIPELINE_FILES = (MODEL_INDEX, UNET_CONFIG, UNET_WEIGHTS, SCHEDULER_CONFIG)
CONDITIONAL = "conditional"
CONDITIONAL_CONFIG = f"{CONDITIONAL}/config.json"
CONDITIONAL_WEIGHTS = f"{CONDITIONAL}/diffusion_pytorch_model.safetensors"
CONDITIONAL_LABELS = f"{CONDITIONAL}/labels.json"
CONDITIONAL_FILES = (CONDITIONAL_CONFIG, CONDITIONAL_WEIGHTS, CONDITIONAL_LABELS)
PROOF = "proof.json"
PROOF_IMAGES = "proof"

# The run
TRAIN_CONFIG = "train_config.json"
RECORD = "record.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples"
LOGS = "logs"
LOCK = ".run.lock"
NO_LOCKS = (*LACKING_ERRNOS, errno.EINVAL, errno.EACCES, errno.EPERM, errno.EROFS)
"""What a file system answers that has no locks, or on which nothing can be written."""
PUBLISHED = "published.json"
BEST = "best"
BEST_JSON = "best.json"

# Inside a checkpoint
CHECKPOINT_STATE = "state.json"
EMA_WEIGHTS, RAW_WEIGHTS = "ema.safetensors", "model.safetensors"
POWER_EMA = "tracks.safetensors"

# Evaluation; the plots are in EVALUATION_DIR
EVALUATION = "evaluation.json"
SAMPLER_TABLE = "samplers.json"
EVALUATION_DIR = "evaluation"
NEAREST = "nearest.png"
LOSS_BY_BAND = "loss-by-band.png"
HELD_OUT_LOSS = "held-out-loss.png"
TRADE_OFF = "trade-off.png"
EMA_LENGTHS = "ema-lengths.png"
GUIDANCE = "guidance.png"
EVALUATION_PLOTS = tuple(
    f"{EVALUATION_DIR}/{name}"
    for name in (NEAREST, LOSS_BY_BAND, HELD_OUT_LOSS, TRADE_OFF, EMA_LENGTHS, GUIDANCE)
)

METRICS_LINE_LIMIT = 2**16
"""Longest line of metrics.jsonl in bytes; a longer one is no entry of ours."""

# Post-hoc EMA
EMA_SNAPSHOTS = "ema"
REPLACED_PIPELINE = "ema/before"


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of metrics.jsonl, in the order of the file: numbers by their names.

    Lines that are no JSON object with an integer "step", such as one cut short, are left out, and
    so are values that are no numbers.
    """
    if not (output_dir / METRICS).is_file():
        return []
    with open(output_dir / METRICS, "rb") as file:
        lines = iter(lambda: file.readline(METRICS_LINE_LIMIT), b"")
        entries = [entry for line in lines if (entry := parse_metrics_line(line)) is not None]
    return entries


def parse_metrics_line(line: bytes) -> dict[str, Any] | None:
    """Return the numbers of a line of metrics.jsonl; None for a line without a "step"."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict):
        return None
    entry = {
        name: value
        for name, value in entry.items()
        if type(value) is float or (type(value) is int and abs(value) < 2**63)
    }
    return entry if type(entry.get("step")) is int else None


def read_losses(output_dir: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of the entries of metrics.jsonl that have a loss, by rising step.

    Losses that are not finite or not positive are left out; of one step the last entry counts.
    """
    losses = {
        entry["step"]: entry["loss"]
        for entry in read_metrics(output_dir)
        if type(entry.get("loss")) in (int, float) and 0 < entry["loss"] < math.inf
    }
    return sorted(losses.items())


def default_repo_name(output_dir: Path) -> str:
    """Return the folder's name as the name of a repository: only letters, digits, - _ and .

    The best pipeline of a run is named after the run.
    """
    folder = output_dir.resolve()
    name = f"{folder.parent.name}-best" if (folder / BEST_JSON).is_file() else folder.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    return re.sub(r"-{2,}|\.{2,}", "-", name).strip("-.") or "model"


def require_pipeline(folder: Path) -> None:
    """Raise UserError unless `folder` holds every file of a DDPMPipeline."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the --output_dir of a training run.")
    missing = [name for name in model_files(folder) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} holds no finished pipeline ({', '.join(missing)} missing). "
            "Let train.py finish, or run it again with the same command to go on."
        )


def model_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files of a pipeline, and of its UNet with classes if it has one."""
    return PIPELINE_FILES + (CONDITIONAL_FILES if has_classes(folder) else ())


def has_classes(folder: Path) -> bool:
    """Return whether a pipeline has a UNet with classes, perhaps an incomplete one."""
    return any((folder / name).is_file() for name in CONDITIONAL_FILES)


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Lock `output_dir` for one run. Raise UserError when a running process has locked it."""
    message = f"Another run is writing into {output_dir}. Wait for it, stop it, or give another "
    with hold_lock(output_dir / LOCK, f"{message}--output_dir."):
        yield


@contextmanager
def hold_lock(path: Path, message: str) -> Iterator[None]:
    """Lock a file. Raise UserError with `message` when a running process has locked it.

    The system releases the lock when the process ends, even if it is killed. On a file system
    without locks, or where nothing can be written, nothing is locked.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(message) from None
    except NotImplementedError:  # how filelock reports ENOSYS
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """Return the folders checkpoint-N by their step N, in ascending order."""
    paths = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    }
    return dict(sorted(paths.items()))


def export_was_interrupted(output_dir: Path) -> bool:
    """Return whether evaluate.py --export_best was stopped between the weights and the proof."""
    return not (output_dir / PROOF).is_file() and (output_dir / REPLACED_PIPELINE).is_dir()


def delete_run(output_dir: Path) -> None:
    """Delete the files of a run in `output_dir` and nothing else.

    Logs in another folder than the default one are kept.
    """
    facts = (TRAIN_CONFIG, RECORD, METRICS, PUBLISHED, PROOF, EVALUATION, SAMPLER_TABLE)
    for name in (*PIPELINE_FILES, *CONDITIONAL_FILES, *facts, *EVALUATION_PLOTS):
        (output_dir / name).unlink(missing_ok=True)
    for name in ("unet", "scheduler", CONDITIONAL, EVALUATION_DIR):
        folder = output_dir / name
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    complete = [p for p in checkpoints(output_dir).values() if (p / CHECKPOINT_STATE).exists()]
    if (output_dir / BEST / BEST_JSON).exists():
        complete.append(output_dir / BEST)
    for folder in (
        *complete,
        *output_dir.glob(".*.partial"),
        output_dir / LOGS,
        output_dir / PROOF_IMAGES,
        output_dir / REPLACED_PIPELINE,
        *output_dir.glob(f"{EMA_SNAPSHOTS}/.*.partial"),
    ):
        shutil.rmtree(folder, ignore_errors=True)
    for snapshot in output_dir.glob(f"{EMA_SNAPSHOTS}/*step-*.safetensors*"):
        snapshot.unlink()
    with suppress(OSError):  # it holds files of others, or does not exist
        (output_dir / EMA_SNAPSHOTS).rmdir()
    for grid in output_dir.glob(f"{SAMPLES}/step-*.png"):
        grid.unlink()
