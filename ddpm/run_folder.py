"""The run folder: names of its files, atomic writes, and the record of a run.

    OUTPUT_DIR/                  a plain DDPMPipeline folder, as diffusers loads it
      model_index.json  unet/  scheduler/      EMA weights, safetensors
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

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ddpm.errors import UserError
from ddpm.typed_json import parse_json

# The pipeline
MODEL_INDEX = "model_index.json"
UNET_CONFIG = "unet/config.json"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
PIPELINE_FILES = (MODEL_INDEX, UNET_CONFIG, UNET_WEIGHTS, SCHEDULER_CONFIG)
PROOF = "proof.json"
PROOF_IMAGES = "proof"

# The run
TRAIN_CONFIG = "train_config.json"
RECORD = "record.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples"
LOGS = "logs"
LOCK = ".run.lock"
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
EVALUATION_PLOTS = tuple(
    f"{EVALUATION_DIR}/{name}"
    for name in (NEAREST, LOSS_BY_BAND, HELD_OUT_LOSS, TRADE_OFF, EMA_LENGTHS)
)

# Post-hoc EMA
EMA_SNAPSHOTS = "ema"
REPLACED_PIPELINE = "ema/before"

PACKAGES = ("diffusers", "torch", "accelerate", "datasets", "huggingface_hub", "safetensors")
"""Packages whose versions are recorded."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old or the new content, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
    fsync_and_rename(partial, path)


def fsync_and_rename(partial: Path, path: Path) -> None:
    """Rename a written file to `path` once its content is on disk."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write indented UTF-8 JSON atomically. Raise ValueError for NaN and infinity."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raise UserError for a file that is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from None


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Return the entries of metrics.jsonl, in the order of the file.

    Lines that are no JSON object with an integer "step", such as one cut short, are left out.
    """
    path, entries = output_dir / METRICS, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                entries.append(entry)
    return entries


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


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def write_failure_reason(error: BaseException, folder: Path) -> str:
    """Return a few words on why a file could not be written into `folder`.

    torch and safetensors wrap the system's error or lose it; a disk with less than a page free is
    full. Call this before anything is deleted.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    if shutil.disk_usage(folder).free < 4096:
        return "No space left on device"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def fsync_dir(folder: Path) -> None:
    """Flush the entries of a folder, so that renames survive a power cut (POSIX only)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, then the folders, before the folder is renamed."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        fsync_dir(path)


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """The training data: where it is from, and the counts of the data report."""

    name: str
    on_hub: bool = False
    revision: str | None = None
    config_name: str | None = None
    split: str | None = None
    image_column: str | None = None
    rows: int | None = None
    """None for a stream of unknown length."""
    title: str | None = None
    license: str | list[Any] | None = None
    images: int | None = None
    """Number of images to train on."""
    channels: int | None = None
    channels_why: str | None = None
    pixels_sha256: str | None = None
    """Hash of the decoded pixels; of a stream, of its first images and its settings."""
    held_out: dict[str, Any] | None = None
    """Fraction ("share"), seed and number of images of --held_out."""
    probed: int | None = None
    """Number of images of a stream that the report covers; None if it covers all."""
    resize_mode: str | None = None
    modes: dict[str, int] = field(default_factory=dict)
    """Number of images of each Pillow mode."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Number of images of the most common sizes, "WIDTHxHEIGHT"."""
    distinct_sizes: int = 0
    bit_depths: dict[str, int] = field(default_factory=dict)
    """Number of images of each number of bits in a channel."""
    value_ranges: dict[str, list[float]] = field(default_factory=dict)
    """Lowest and highest value of each mode with more than 8 bits in a channel."""
    crop_loses_mean: float = 0.0
    crop_loses_most: float = 0.0
    """Fraction of an image that cropping to a square cuts off."""
    alpha: int = 0
    exif_rotated: int = 0
    icc_profiles: int = 0
    animated: int = 0
    enlarged: int = 0
    unreadable: int = 0
    unreadable_first: list[str] = field(default_factory=list)
    exact_duplicates: int = 0
    exact_first: list[str] = field(default_factory=list)
    near_duplicates: int = 0
    near_first: list[str] = field(default_factory=list)
    near_compared: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The network."""

    parameters: int
    channels: int | None = None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Hardware and software of a run."""

    device: str
    cpu_cores: int | None = None
    num_processes: int
    mixed_precision: str
    python: str
    versions: dict[str, str]
    git_commit: str | None = None

    @classmethod
    def current(
        cls, gpu_name: str | None, num_processes: int, mixed_precision: str
    ) -> "Environment":
        """Return the environment of this process. `gpu_name` is None for a run on the CPU."""
        return cls(
            device=gpu_name or cpu_name(),
            cpu_cores=os.cpu_count(),
            num_processes=num_processes,
            mixed_precision=mixed_precision,
            python=platform.python_version(),
            versions={name: metadata.version(name) for name in PACKAGES},
            git_commit=git_commit(),
        )


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What training did. Entries other than `steps` are None while a run goes on."""

    steps: int
    images_seen: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    images_per_s: float | None = None
    peak_memory_mib: int | None = None
    final_loss: float | None = None
    finished_at: str | None = None
    """UTC, ISO 8601."""


@dataclass(frozen=True, kw_only=True)
class ExportedEMA:
    """The post-hoc average that replaces training's own EMA in the pipeline."""

    sigma_rel: float
    step: int
    sha256: str
    """Hash of the weights file, so that the entry does not outlive these weights."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """record.json: the facts of a run. Unknown facts are absent from the file and None here."""

    finished: bool = False
    dataset: DatasetRecord | None = None
    model: ModelRecord | None = None
    environment: Environment | None = None
    training: TrainingRecord | None = None
    wandb: str | None = None
    """Address of the W&B run."""
    wandb_run_id: str | None = None
    exported_ema: ExportedEMA | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """state.json of a checkpoint: the optimizer steps done, and the run that they belong to.

    `micro_batches`, `pixels_sha256` and `num_parameters` decide what every step sees, so they must
    stay the same in a resumed run.
    """

    step: int
    micro_batches: int
    """Processes x accumulation."""
    pixels_sha256: str
    """Hash of the decoded images."""
    seconds: float
    """Time spent in steps, over all parts of the run."""
    num_parameters: int
    spent: float = 0.0
    """Time since the launch that counts for --budget, over all parts of the run."""
    stream: dict[str, Any] | None = None
    """Position of a streamed dataset, None for one that is decoded once."""
    skipped: int = 0
    """Steps that fp16's gradient scaler has skipped."""

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError("step must not be negative.")


def read_checkpoint_state(checkpoint: Path) -> CheckpointState:
    """Return the state.json of a checkpoint folder. UserError if it is missing or not valid."""
    path = checkpoint / CHECKPOINT_STATE
    return parse_json(CheckpointState, read_json(path), str(path))


def read_record(output_dir: Path) -> Record:
    """Return the record of a run; an empty one for a pipeline folder that was made elsewhere.

    Entries that this version does not know are ignored. Raise UserError for one of a wrong type.
    """
    path = output_dir / RECORD
    return parse_json(Record, read_json(path), str(path)) if path.exists() else Record()


def write_record(output_dir: Path, **facts: Any) -> None:
    """Replace entries of record.json, which are named like the fields of `Record`.

    A value is JSON or a dataclass; None removes the entry. Other entries are kept as they are.
    """
    path = output_dir / RECORD
    entries = read_json(path) if path.exists() else {}
    for name, value in facts.items():
        entries[name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    entries = {name: value for name, value in entries.items() if value is not None}
    parse_json(Record, entries, str(path))
    write_json(path, entries)


def read_exported_ema(output_dir: Path, weights_sha256: str) -> ExportedEMA | None:
    """Return the recorded post-hoc average if the pipeline's weights are that average.

    None means that the pipeline holds training's own EMA.
    """
    exported = read_record(output_dir).exported_ema
    return exported if exported is not None and exported.sha256 == weights_sha256 else None


def git_commit() -> str | None:
    """Return the commit of this code; None outside a git repository."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def cpu_name() -> str:
    """Return the model name of the processor on Linux, elsewhere what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


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
    missing = [name for name in PIPELINE_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} holds no finished pipeline ({', '.join(missing)} missing). "
            "Let train.py finish, or run it again with the same command to go on."
        )


@contextmanager
def run_lock(output_dir: Path) -> Iterator[None]:
    """Lock `output_dir` for one run. Raise UserError when a running process has locked it.

    The system releases the lock when the process ends, even if it is killed.
    """
    lock = FileLock(output_dir / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another run is writing into {output_dir}. Wait for it, stop it, or give another "
            "--output_dir."
        ) from None
    except (NotImplementedError, OSError):  # a file system without locks
        yield
        return
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
    for name in (*PIPELINE_FILES, *facts, *EVALUATION_PLOTS):
        (output_dir / name).unlink(missing_ok=True)
    for name in ("unet", "scheduler", EVALUATION_DIR):
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
