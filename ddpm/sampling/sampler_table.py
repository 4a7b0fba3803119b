"""The menu of samplers: what each one's images of a model are worth, and how long they take.

evaluate.py --samplers writes it into the model's folder as samplers.json, push.py publishes it,
sample.py --quality chooses from it:

    {"model": {"name", "version", "weights"}, "num_images", "seeds", "features", "reference", ...,
     "entries": [{"scheduler": "ddim", "num_inference_steps": 10, "seconds_per_image": 0.0041,
                  "metrics": {"frechet_distance": 4.2, ...}, "leaving_out": [4.1, ..., 4.3]}, ...]}

Files of the Hub come from strangers: entries that cannot be a choice are refused, never passed on.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from huggingface_hub.utils.sha import sha_fileobj

from ddpm.config.commands import Quality, Scheduler
from ddpm.errors import UserError
from ddpm.run_folder import SAMPLER_TABLE, UNET_WEIGHTS, read_json

DISTANCES = ("fid", "frechet_distance")
"""Under either name the distance that entries are compared by."""
SIGNIFICANT_ERRORS = 2.0
"""Standard errors of a difference from which it is more than noise: chance alone does that in about
5 of 100 comparisons."""
MAX_STEPS, MAX_VALUE = 100_000, 1e100
"""No chain has more steps; no measured number is that large, and its square is still one."""
FAST_STEPS = 10
"""Most steps of a sampler that is called fast."""


@dataclass(frozen=True)
class SamplerResult:
    """A sampler with its steps. `distance`: of its images to the real ones, 0 is best; `seconds` to
    draw one image; `leaving_out`: the distance again without each of G groups of images, [G], the
    same groups of seeds for all entries."""

    scheduler: str
    num_inference_steps: int
    distance: float
    seconds: float
    leaving_out: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.scheduler}, {self.num_inference_steps} steps"


@dataclass(frozen=True)
class SamplerTable:
    """All entries, in the order in which they were measured. `facts` are the file as it is."""

    entries: tuple[SamplerResult, ...]
    facts: dict[str, Any]

    @property
    def best(self) -> SamplerResult:
        """The lowest distance."""
        return min(self.entries, key=lambda entry: entry.distance)

    @property
    def good(self) -> SamplerResult:
        """The least time among the entries that cannot be told from the best."""
        best = self.best
        close = [entry for entry in self.entries if not is_significantly_worse(entry, best)]
        return min(close, key=lambda entry: entry.seconds)

    @property
    def fast(self) -> SamplerResult:
        """The lowest distance at 10 steps or fewer; `good` where that is as short, and the least
        time of all where nothing is."""
        short = [entry for entry in self.entries if entry.num_inference_steps <= FAST_STEPS]
        if not short:
            return min(self.entries, key=lambda entry: entry.seconds)
        return self.good if self.good in short else min(short, key=lambda entry: entry.distance)

    def choose(self, quality: Quality) -> SamplerResult:
        """The entry that a word stands for."""
        return {"best": self.best, "good": self.good, "fast": self.fast}[quality]


def jackknife_standard_error(one: SamplerResult, other: SamplerResult) -> float:
    """Of the difference of two distances, by which the draw of the seeds moves it.

    The jackknife over groups: the difference is taken again without each of G groups of images, and
    varies (G - 1) times too little (Efron and Stein 1981, The jackknife estimate of variance). Both
    entries are drawn from the same seeds, so what is common to them cancels.
    """
    pairs = zip(one.leaving_out, other.leaving_out, strict=True)
    differences = [mine - theirs for mine, theirs in pairs]
    count = len(differences)
    mean = sum(differences) / count
    return math.sqrt((count - 1) / count * sum((each - mean) ** 2 for each in differences))


def is_significantly_worse(entry: SamplerResult, best: SamplerResult) -> bool:
    """Whether a distance is higher than the best by more than noise."""
    return entry.distance - best.distance > SIGNIFICANT_ERRORS * jackknife_standard_error(
        entry, best
    )


def explain_choice(menu: SamplerTable, quality: Quality) -> str:
    """What was chosen and why, in one line."""
    chosen, best = menu.choose(quality), menu.best
    if chosen is best:
        why = "the lowest distance of all"
    elif not is_significantly_worse(chosen, best):
        why = (
            f"not to be told from the best ({best}: {best.distance:.3g}), which takes "
            f"{best.seconds / chosen.seconds:.3g} times as long"
        )
    elif chosen.num_inference_steps <= FAST_STEPS:
        why = f"the lowest of {FAST_STEPS} steps or fewer (the best, {best}: {best.distance:.3g})"
    else:
        why = f"the least time of all (the best, {best}: {best.distance:.3g})"
    return (
        f"--quality {quality}: {chosen}, a distance of {chosen.distance:.3g}, {why}; by "
        f"{menu.facts['num_images']:,} images each."
    )


def read_sampler_table(folder: Path) -> SamplerTable | None:
    """The menu of the model in `folder`; None without one, or where it is that of other weights.

    UserError for a file that is no menu.
    """
    if not (folder / SAMPLER_TABLE).is_file():
        return None
    found = read_sampler_table_file(folder / SAMPLER_TABLE)
    return found if found.facts["model"]["weights"] == unet_weights_sha256(folder) else None


def read_sampler_table_file(path: Path) -> SamplerTable:
    """A menu of whatever model. UserError for a file that is none."""
    facts = read_json(path)
    try:
        return parse_sampler_table(facts)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(
            f"{path} is not as evaluate.py --samplers writes it: run that again, or "
            "move the file away."
        ) from None


def parse_sampler_table(facts: dict[str, Any]) -> SamplerTable:
    """The menu that a file says. ValueError, TypeError or KeyError for what cannot be one."""
    found = SamplerTable(tuple(_entry(each) for each in facts["entries"]), facts)
    if len({len(each.leaving_out) for each in found.entries}) != 1:
        raise ValueError("no entries, or entries of different groups")
    count = facts["num_images"]
    if type(count) is not int or count < 1 or not isinstance(facts["model"]["weights"], str):
        raise ValueError("it does not say what was measured")
    return found


def unet_weights_sha256(folder: Path) -> str:
    """sha256 of the UNet's weights of a pipeline's folder, of today's layout or the flat one; where
    they lie in several files, over those of each."""
    name = Path(UNET_WEIGHTS)
    places = (folder / name.parent, folder)
    paths = next((place / name.name for place in places if (place / name.name).is_file()), None)
    parts = (
        [paths]
        if paths
        else [
            path
            for place in places
            for path in sorted(place.glob(f"{name.stem}-*-of-*{name.suffix}"))
        ]
    )
    found = []
    for path in parts:
        with open(path, "rb") as file:
            found.append(sha_fileobj(file).hex())
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def distance_name(metrics: dict[str, Any]) -> str:
    """Which of the metrics is the distance that entries are compared by. ValueError without one."""
    found = [name for name in DISTANCES if name in metrics]
    if not found:
        raise ValueError(f"none of {', '.join(DISTANCES)}")
    return found[0]


def table_rows(menu: SamplerTable) -> list[dict[str, Any]]:
    """The menu as a table, an entry each, the least time first: what it is, the words that it is
    chosen by, and whether it is worse than the best."""
    words = {name: menu.choose(name) for name in get_args(Quality)}
    listed = zip(menu.entries, menu.facts["entries"], strict=True)
    return [
        {
            "scheduler": entry.scheduler,
            "num_inference_steps": entry.num_inference_steps,
            "distance_name": distance_name(known["metrics"]),
            "distance": entry.distance,
            "metrics": known["metrics"],
            "seconds": entry.seconds,
            "qualities": [name for name, chosen in words.items() if chosen is entry],
            "is_worse": is_significantly_worse(entry, menu.best),
        }
        for entry, known in sorted(listed, key=lambda pair: pair[0].seconds)
    ]


def _entry(value: dict[str, Any]) -> SamplerResult:
    """An entry of the file. ValueError, TypeError or KeyError for what cannot be one."""
    steps, distance = (
        value["num_inference_steps"],
        value["metrics"][distance_name(value["metrics"])],
    )
    seconds, leaving_out = value["seconds_per_image"], value["leaving_out"]
    numbers: Sequence[Any] = [distance, seconds, *leaving_out]
    if (
        value["scheduler"] not in get_args(Scheduler)
        or type(steps) is not int
        or not (1 <= steps <= MAX_STEPS)
    ):
        raise ValueError(f"{value['scheduler']} in {steps} steps")
    if not all(map(_is_number, numbers)) or not seconds > 0 or len(leaving_out) < 2:
        raise ValueError(str(numbers))
    return SamplerResult(value["scheduler"], steps, distance, seconds, tuple(leaving_out))


def _is_number(value: Any) -> bool:
    """Whether it is one that can be reckoned with: its square is a number too."""
    return type(value) in (int, float) and abs(value) < MAX_VALUE
