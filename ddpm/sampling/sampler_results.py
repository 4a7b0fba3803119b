"""Measured samplers of one model: how good the images of each are, and how long they take.

`evaluate.py --samplers` writes it into the model's folder as samplers.json, push.py publishes it,
and `sample.py --quality` chooses from it. Files on the Hub are untrusted: the same strict checks
apply to every file that is read and to every table that is written. The samplers themselves are in
ddpm/diffusion/schedulers.py.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from ddpm.config.sample import Quality
from ddpm.config.values import Scheduler
from ddpm.errors import UserError
from ddpm.file_io import file_sha256, read_json, write_json
from ddpm.run_folder import SAMPLER_TABLE, UNET_WEIGHTS
from ddpm.typed_json import parse_json

DISTANCES = ("fid", "frechet_distance")
"""Names of the metric that samplers are compared by; results have one of them."""
SIGNIFICANT_ERRORS = 2.0
"""A difference of more standard errors than this is significant; by chance about 5 of 100 are."""
MAX_STEPS = 100_000
"""More steps than any noise schedule has."""
MAX_ENTRIES = 256
"""More entries, and more groups of images, than a table has."""
MAX_VALUE = 1e100
"""Larger than any measured number, while its square is still a finite float."""
FAST_STEPS = 10
"""Most steps of a sampler that counts as fast."""


@dataclass(frozen=True, kw_only=True)
class SamplerResult:
    """What was measured of one sampler. ValueError for values that cannot be."""

    scheduler: Scheduler
    num_inference_steps: int
    seconds_per_image: float
    metrics: dict[str, float]
    """The names and values of evaluation.json; one of them is in DISTANCES."""
    leaving_out: tuple[float, ...]
    """The distance without each of G groups of images: [G], the same groups for all samplers."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_inference_steps <= MAX_STEPS:
            raise ValueError(f"num_inference_steps is not in 1..{MAX_STEPS}")
        if not 0 < self.seconds_per_image < MAX_VALUE:
            raise ValueError(f"seconds_per_image is {self.seconds_per_image}")
        require_measured(self.metrics, self.leaving_out)

    @property
    def distance_name(self) -> str:
        """The name of the metric that samplers are compared by."""
        return distance_name(self.metrics)

    @property
    def distance(self) -> float:
        """The distance between generated and real images; 0 is best."""
        return self.metrics[self.distance_name]

    def __str__(self) -> str:
        return f"{self.scheduler}, {self.num_inference_steps} steps"


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """The model of a sampler table. `weights` is the sha256 of its UNet's weights; the version of a
    model on the Hub, a commit, cannot be known before the table is committed."""

    name: str | None = None
    version: str | None = None
    weights: str


@dataclass(frozen=True, kw_only=True)
class SamplerTable:
    """samplers.json. All entries were measured with the same settings, which the other fields name.

    A field that the file lacks is None. ValueError for values that cannot be.
    """

    num_images: int
    """Images generated with each sampler."""
    model: MeasuredModel
    seeds: list[int] | None = None
    """First and last seed of the images."""
    features: dict[str, Any] | None = None
    reference: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    evaluated_at: str | None = None
    guidance_scale: float | None = None
    """The guidance to the classes of a model that has them."""
    batch_size: int | None = None
    device: str | None = None
    entries: tuple[SamplerResult, ...] = ()
    """In the order in which they were measured."""

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}")
        if len(self.entries) > MAX_ENTRIES:
            raise ValueError(f"more than {MAX_ENTRIES} entries")
        if len({len(entry.leaving_out) for entry in self.entries}) > 1:
            raise ValueError("the entries have different groups of images")

    def write(self, path: Path) -> None:
        """Write samplers.json; a reader sees the old file or the new one."""
        write_json(path, asdict(self))

    @cached_property
    def best(self) -> SamplerResult:
        """The sampler with the lowest distance."""
        return min(self.entries, key=lambda entry: entry.distance)

    @property
    def good(self) -> SamplerResult:
        """The quickest sampler that is not significantly worse than the best."""
        candidates = [entry for entry in self.entries if not self.is_significantly_worse(entry)]
        return min(candidates, key=lambda entry: entry.seconds_per_image)

    @property
    def fast(self) -> SamplerResult:
        """The lowest distance in at most FAST_STEPS steps.

        `good` if it is that short, so that fast is never slower; the quickest of all if no sampler
        is that short.
        """
        short = [entry for entry in self.entries if entry.num_inference_steps <= FAST_STEPS]
        if not short:
            return min(self.entries, key=lambda entry: entry.seconds_per_image)
        return self.good if self.good in short else min(short, key=lambda entry: entry.distance)

    @property
    def by_time(self) -> list[SamplerResult]:
        """The entries, the quickest first."""
        return sorted(self.entries, key=lambda entry: entry.seconds_per_image)

    def choose(self, quality: Quality) -> SamplerResult:
        """Return the entry that a value of --quality stands for."""
        return {"best": self.best, "good": self.good, "fast": self.fast}[quality]

    def qualities(self, entry: SamplerResult) -> list[str]:
        """Return the values of --quality that choose this entry."""
        return [quality for quality in get_args(Quality) if self.choose(quality) is entry]

    def is_significantly_worse(self, entry: SamplerResult) -> bool:
        """Whether the distance is higher than the best by more than chance explains."""
        error = jackknife_standard_error(entry.leaving_out, self.best.leaving_out)
        return entry.distance - self.best.distance > SIGNIFICANT_ERRORS * error

    def explain_choice(self, quality: Quality) -> str:
        """Say in one line what a value of --quality chooses, and why."""
        chosen, best = self.choose(quality), self.best
        if chosen is best:
            reason = "the lowest distance of all"
        elif not self.is_significantly_worse(chosen):
            ratio = best.seconds_per_image / chosen.seconds_per_image
            reason = (
                f"not significantly worse than the best ({best}: {best.distance:.3g}), which takes "
                f"{ratio:.3g} times as long"
            )
        elif chosen.num_inference_steps <= FAST_STEPS:
            reason = (
                f"the lowest in {FAST_STEPS} steps or fewer (the best, {best}: {best.distance:.3g})"
            )
        else:
            reason = f"the quickest of all (the best, {best}: {best.distance:.3g})"
        return (
            f"--quality {quality}: {chosen}, a distance of {chosen.distance:.3g}, {reason}; "
            f"measured with {self.num_images:,} images each."
        )


def require_measured(metrics: dict[str, float], leaving_out: Sequence[float]) -> None:
    """Raise ValueError unless there is a distance, also without each group, and all are bounded."""
    if not all(abs(number) < MAX_VALUE for number in (*metrics.values(), *leaving_out)):
        raise ValueError(f"a number is not below {MAX_VALUE}")
    if metrics.keys().isdisjoint(DISTANCES):
        raise ValueError(f"no metric of {', '.join(DISTANCES)}")
    if not 2 <= len(leaving_out) <= MAX_ENTRIES:
        raise ValueError(f"{len(leaving_out)} groups of images; give 2 to {MAX_ENTRIES}")


def distance_name(metrics: dict[str, float]) -> str:
    """Return the name of the metric that results are compared by."""
    return next(name for name in DISTANCES if name in metrics)


def jackknife_standard_error(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the standard error of the difference of two distances over the draw of the seeds.

    `one` and `other` are the distances without each of G groups of images. The difference is taken
    without each group and varies (G - 1) times too little: Efron and Stein 1981, "The jackknife
    estimate of variance". Both sets come from the same seeds, so common noise cancels.
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in differences))


def read_sampler_table(folder: Path) -> SamplerTable | None:
    """Read the table of the model in `folder`; None without one, or if it is of other weights.

    UserError for a file that is no sampler table.
    """
    if not (folder / SAMPLER_TABLE).is_file():
        return None
    table = read_sampler_table_file(folder / SAMPLER_TABLE)
    return table if table.model.weights == unet_weights_sha256(folder) else None


def read_sampler_table_file(path: Path) -> SamplerTable:
    """Read a samplers.json of any model. UserError for a file that is no sampler table."""
    try:
        table = parse_json(SamplerTable, read_json(path), str(path))
        if not table.entries:
            raise UserError(f"{path} has no entries.")
    except UserError as error:
        raise UserError(
            f"{error} It is not a table that evaluate.py --samplers wrote: run that again, or move "
            "the file away."
        ) from None
    return table


def unet_weights_sha256(folder: Path) -> str:
    """Return the sha256 of the UNet's weights in a pipeline folder.

    Weights are in unet/ or, in the flat layout, in the folder itself. For weights in several files
    it is the sha256 over the hashes of all.
    """
    name = Path(UNET_WEIGHTS)
    places = (folder / name.parent, folder)
    for path in (place / name.name for place in places):
        if path.is_file():
            return file_sha256(path)
    pattern = f"{name.stem}-*-of-*{name.suffix}"
    hashes = [file_sha256(path) for place in places for path in sorted(place.glob(pattern))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
