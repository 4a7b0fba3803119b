"""The facts of a run: record.json, and state.json of a checkpoint, each as one typed dataclass."""

import dataclasses
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ddpm import __version__
from ddpm.file_io import read_json, write_json
from ddpm.run_folder import CHECKPOINT_STATE, RECORD
from ddpm.typed_json import parse_json

PACKAGES = ("diffusers", "torch", "accelerate", "datasets", "huggingface_hub", "safetensors")
"""Packages whose versions are recorded."""
PERMISSIVE_LICENSES = (
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0", "isc"),
    *("ncsa", "pddl", "postgresql", "unlicense", "wtfpl", "zlib"),
)
"""Licenses, by their identifiers on the Hub, that ask for no more than to keep a notice."""


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """The training data: where it is from, and the counts of the data report."""

    name: str
    on_hub: bool = False
    revision: str | None = None
    config_name: str | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
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
    classes: dict[str, int] = field(default_factory=dict)
    """Number of images of each class, in the order of the ids; of a stream, among `probed`."""
    unlabeled: int = 0
    """Number of images without a label."""
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
    """Fraction of an image that cropping cuts off."""
    alpha: int = 0
    exif_rotated: int = 0
    icc_profiles: int = 0
    animated: int = 0
    extra_bands: int = 0
    """Number of TIFFs with bands that are not used."""
    enlarged: int = 0
    unreadable: int = 0
    unreadable_first: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of files in the folder that are no rows, by the reason."""
    left_out_first: dict[str, list[str]] = field(default_factory=dict)
    """The names of the first of them. Not published."""
    exact_duplicates: int = 0
    exact_first: list[str] = field(default_factory=list)
    near_duplicates: int = 0
    near_first: list[str] = field(default_factory=list)
    near_compared: int = 0

    @property
    def colors(self) -> str:
        """What the model draws: gray, RGB or RGBA."""
        return {1: "gray", 4: "RGBA"}.get(self.channels, "RGB")


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The network."""

    parameters: int
    channels: int | None = None


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model that a run was fine-tuned from."""

    name: str
    version: str
    """Its commit on the Hub, or the sha256 of a folder's weights."""
    on_hub: bool = False
    resolution: list[int]
    """Height and width of its images."""
    license: str | list[str] | None = None
    """What its card says, as identifiers of the Hub; None if it says nothing."""
    license_name: str | None = None
    license_link: str | None = None
    """What the card of a model with the license "other" says about it."""

    def __post_init__(self) -> None:
        if len(self.resolution) != 2:
            raise ValueError("resolution must be a height and a width.")

    @property
    def license_note(self) -> str:
        """A sentence on its license."""
        if self.license is None:
            return "It states no license: what models made from it allow is for its author to say."
        names = self.license if isinstance(self.license, list) else [self.license]
        names = ", ".join(self.license_name or name if name == "other" else name for name in names)
        if self.license in PERMISSIVE_LICENSES:
            return f"Its license is {names}."
        return f"Its license is {names}, with conditions that may hold for models made from it too."


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
            versions={"ddpm": __version__} | {name: metadata.version(name) for name in PACKAGES},
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
    trackio: str | None = None
    """Address of the Space, or the server, that has the trackio run."""
    trackio_run: str | None = None
    """Name of the trackio run, unique in its project; not published."""
    demo: str | None = None
    """Name of the Space that push.py made to draw with the model."""
    exported_ema: ExportedEMA | None = None
    base_model: BaseModel | None = None


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
    """Position of each lane of a streamed dataset, None for one that is decoded once."""
    skipped: int = 0
    """Steps that fp16's gradient scaler has skipped."""
    base_model: BaseModel | None = None
    """What the run was fine-tuned from."""

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
