"""Measured guidance scales of one model: the distance to the data, and the label accuracy, of each.

`evaluate.py --guidance_scales` writes them into evaluation.json, push.py publishes it, and
`sample.py --quality` uses the scale above 0 with the lowest distance. Files on the Hub are
untrusted: the same strict checks apply to every file that is read.
"""

from dataclasses import dataclass
from pathlib import Path

from ddpm.config.values import MAX_GUIDANCE_SCALE
from ddpm.file_io import read_json
from ddpm.run_folder import EVALUATION
from ddpm.sampling.guidance import DEFAULT_GUIDANCE_SCALE
from ddpm.sampling.sampler_results import (
    MAX_ENTRIES,
    SIGNIFICANT_ERRORS,
    distance_name,
    jackknife_standard_error,
    require_measured,
    unet_weights_sha256,
)
from ddpm.typed_json import parse_json

LABEL_ACCURACY = "label_accuracy"
"""Metric: the fraction of the images whose label a classifier finds."""


@dataclass(frozen=True, kw_only=True)
class GuidanceResult:
    """What was measured at one scale; the rest as in `SamplerResult`. ValueError for values that
    cannot be."""

    guidance_scale: float
    metrics: dict[str, float]
    leaving_out: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale <= MAX_GUIDANCE_SCALE:
            raise ValueError(f"guidance_scale is not in 0..{MAX_GUIDANCE_SCALE}")
        require_measured(self.metrics, self.leaving_out)

    @property
    def distance(self) -> float:
        """The distance between generated and real images; 0 is best."""
        return self.metrics[distance_name(self.metrics)]


@dataclass(frozen=True, kw_only=True)
class GuidanceCurve:
    """Scales, measured on images of the same seeds. ValueError for values that cannot be."""

    num_images: int
    """Images generated at each scale."""
    seeds: list[int]
    """First and last seed of the images."""
    scheduler: str
    num_inference_steps: int
    entries: tuple[GuidanceResult, ...]
    """By ascending scale."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.entries) <= MAX_ENTRIES:
            raise ValueError(f"{len(self.entries)} entries; give 1 to {MAX_ENTRIES}")
        if len(self.seeds) != 2:
            raise ValueError(f"seeds is {self.seeds}; it must be the first and the last one")
        names = {distance_name(entry.metrics) for entry in self.entries}
        if len(names) > 1 or len({len(entry.leaving_out) for entry in self.entries}) > 1:
            raise ValueError("the entries have different distances or groups of images")

    @property
    def distance_name(self) -> str:
        """The name of the metric that the scales are compared by."""
        return distance_name(self.entries[0].metrics)

    @property
    def best(self) -> GuidanceResult:
        """The scale with the lowest distance; 0, which draws no class, only if it is alone."""
        with_class = [entry for entry in self.entries if entry.guidance_scale > 0]
        return min(with_class or self.entries, key=lambda entry: entry.distance)

    @property
    def best_scale(self) -> float:
        """The scale to draw a class with."""
        return self.best.guidance_scale or DEFAULT_GUIDANCE_SCALE

    def standard_error(self, entry: GuidanceResult) -> float:
        """The standard error of the difference of a distance to the lowest."""
        return jackknife_standard_error(entry.leaving_out, self.best.leaving_out)

    def verdict(self, entry: GuidanceResult) -> str:
        """Say whether the distance is higher than the lowest by more than chance explains."""
        if entry.guidance_scale == 0:
            return "without a class"
        if entry is self.best:
            return "best"
        difference = entry.distance - self.best.distance
        is_worse = difference > SIGNIFICANT_ERRORS * self.standard_error(entry)
        return "" if is_worse else "as good as the best"


@dataclass(frozen=True, kw_only=True)
class _Model:
    version: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """The entries of evaluation.json that are read here."""

    model: _Model | None = None
    guidance: GuidanceCurve | None = None


def read_guidance_curve(folder: Path) -> GuidanceCurve | None:
    """Read the measured scales from evaluation.json in `folder`.

    None without any, and if they are of other weights than those in the folder. UserError for a
    file that cannot be read as such.
    """
    path = folder / EVALUATION
    if not path.is_file():
        return None
    measured = parse_json(_Measured, read_json(path), str(path))
    if measured.guidance is None or measured.model is None:
        return None
    is_same = measured.model.version == unet_weights_sha256(folder)
    return measured.guidance if is_same else None


def read_guidance_scale(folder: Path) -> float | None:
    """Return the measured scale to draw a class with; None and errors as above."""
    curve = read_guidance_curve(folder)
    return curve and curve.best_scale
