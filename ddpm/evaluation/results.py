"""What evaluate.py measures, as it is kept in evaluation.json.

push.py and the model card read the file with `read_evaluation`; it may also be written by hand.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpm.errors import UserError
from ddpm.file_io import read_json, write_json
from ddpm.run_folder import EVALUATION
from ddpm.sampling.guidance_results import GuidanceCurve
from ddpm.typed_json import parse_json, parse_value


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """`version`: sha256 of the weights in a folder, commit of a model on the Hub."""

    name: str | None = None
    version: str | None = None


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    scheduler: str
    num_inference_steps: int


@dataclass(frozen=True, kw_only=True)
class TimestepLosses:
    """Mean squared errors of `num_images` images of each split, in K bands of timesteps.

    `bands`: first and last timestep of each band. `held_out` and `trained` hold K losses of each
    name: "model" for the exported weights, "raw" for those before averaging, where they are known.
    """

    num_images: int
    bands: list[list[int]]
    held_out: dict[str, list[float]]
    trained: dict[str, list[float]]
    held_out_by_class: dict[str, float] | None = None
    """Mean loss over all bands of held-out images of each class that has enough of them."""


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """What was measured of one class, `num_images` generated images."""

    name: str
    num_images: int
    metrics: dict[str, float]
    """"label_accuracy" with a classifier; with enough images the Frechet and the kernel distance to
    the training images of the class."""
    copies: int
    """How many are as near to any training image as "memorised" counts."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The content of evaluation.json. None is what was not measured, and absent from the file."""

    dataset: str | None = None
    """Name of the real images' dataset, if it is not the one in the run's record."""
    metrics: dict[str, float]
    """`metrics.metrics_to_dict`, "memorised" of `memorization.Memorization`, and "label_accuracy",
    the fraction of the images that a classifier finds to be of the class that was asked for."""
    num_images: int | None = None
    """Number of generated images."""
    model: ModelVersion | None = None
    seeds: list[int] | None = None
    """First and last seed of the generated images."""
    sampler: SamplerSettings | None = None
    guidance_scale: float | None = None
    """The guidance to the classes of a model that has them."""
    features: dict[str, str] | None = None
    """"name" and "version" of the feature extractor, and for RGBA images the "background" that it
    sees them on."""
    reference: dict[str, Any] | None = None
    """The real images: "name", "config_name", "revision", "split", "images", "pixels_sha256"."""
    environment: dict[str, Any] | None = None
    """`run_record.Environment`."""
    evaluated_at: str | None = None
    """UTC, ISO 8601."""
    kernel_subset_size: int | None = None
    """Images in each subset of the kernel distance."""
    num_features: int | None = None
    drawing_images_per_s: float | None = None
    held_out: dict[str, Any] | None = None
    """Metrics of the held-out images: what a perfect model would reach with as many images."""
    as_many_as_held_out: dict[str, Any] | None = None
    """Metrics of as many generated images as there are held-out images."""
    memorisation: dict[str, Any] | None = None
    """The rest of `memorization.Memorization`, and "compared_with"."""
    loss_by_band: TimestepLosses | None = None
    ema_lengths: dict[str, Any] | None = None
    """`compare_ema.EMAComparison.to_dict`."""
    guidance: GuidanceCurve | None = None
    classes: list[ClassResult] | None = None
    """The classes with generated images, by their ids."""

    def __post_init__(self) -> None:
        if self.seeds is not None and len(self.seeds) != 2:
            raise ValueError(f"seeds is {self.seeds}; it must be the first and the last one")

    def write(self, path: Path) -> None:
        write_json(path, {name: v for name, v in asdict(self).items() if v is not None})


def read_evaluation(folder: Path) -> Evaluation | None:
    """Read evaluation.json of a run folder; None if nothing was measured.

    Metrics that are not finite numbers are left out. UserError for a file without metrics and for
    an entry of a wrong type.
    """
    path = folder / EVALUATION
    if not path.exists():
        return None
    entries = read_json(path)
    if not isinstance(entries.get("metrics"), dict):
        raise UserError(
            f'{path} has no "metrics" as evaluate.py writes them. Run evaluate.py again, or move '
            "the file away to publish without it."
        )
    metrics = {}
    for name, value in entries["metrics"].items():
        with suppress(UserError):
            metrics[name] = parse_value(float, value, name)
    return parse_json(Evaluation, {**entries, "metrics": metrics}, str(path))
