"""Samplers against each other: the same seeds, the same real images, entry after entry of the menu.

Each entry is on disk as soon as it is measured, so a command that was killed goes on with the one
that it was at. Entries are compared only where everything but the sampler is the same; a menu that
was measured otherwise is refused, not mixed.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ddpm import (
    evaluation,
    generation,
    menu,
    metrics,
    pipeline,
    runfolder,
    samplers,
    tradeoff,
)
from ddpm import exam as exams
from ddpm.checks import sampler_choices
from ddpm.errors import UsageError
from ddpm.exam import Drawn, Exam
from ddpm.menu import Menu
from ddpm.samplers import Sampler

STEPS = (5, 10, 20, 50)
NAMES = ("ddim", "dpmsolver++", "unipc")
SAME = ("num_images", "seeds", "features", "reference", "batch_size", "device")
"""What must be the same for two entries to be compared."""


@dataclass(frozen=True)
class Candidate:
    """A sampler to be measured, with its steps."""

    name: str
    sampler: Sampler
    steps: int


class Stopwatch:
    """Times the drawing of images, batch by batch, without what is done with them in between."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.waits: list[float] = []

    def through(self, drawn: Drawn) -> Drawn:
        """The images as they come; how long each is waited for is noted."""
        while True:
            began = time.perf_counter()
            image = next(drawn, None)
            if image is None:
                return
            self.waits.append(time.perf_counter() - began)
            yield image

    @property
    def seconds_per_image(self) -> float:
        """Of the quickest batch: whatever else the machine does can only add to it. A batch that is
        not full counts where there is no other."""
        whole = len(self.waits) // self.batch_size * self.batch_size or len(self.waits)
        waits, size = self.waits[:whole], min(self.batch_size, len(self.waits))
        return min(sum(waits[start : start + size]) for start in range(0, whole, size)) / size


def candidates(exam: Exam) -> list[Candidate]:
    """The samplers of --samplers, or the usual ones, the fewest steps first.

    UsageError for more steps than the chain has, and for one that does not know the chain.
    """
    chain = int(exam.artifact.scheduler_config.get("num_train_timesteps", 1000))
    choices = sampler_choices(exam.config.samplers or ())
    for name, steps in choices:
        if steps is not None and steps > chain:
            raise UsageError(f"--samplers {name}:{steps}: this model was trained with {chain} "
                             f"steps, so give a number from 1 to {chain}.")  # fmt: skip
    if not choices:
        choices = [(name, steps) for steps in STEPS for name in NAMES if steps <= chain]
        choices.append(("ddpm", None))
    found: dict[tuple[str, int], Candidate] = {}
    for name, asked in choices:
        sampler, steps = samplers.build_sampler(name, exam.artifact.scheduler_config, asked)
        found.setdefault((name, steps), Candidate(name, sampler, steps))
    return sorted(found.values(), key=lambda each: each.steps)


def score(exam: Exam, folder: Path) -> Menu:
    """Measure every candidate that the menu in `folder` lacks, and write each into it as it is
    done. Call on every process.

    UsageError for a menu that was measured with other images, features or data.
    """
    asked, facts = candidates(exam), _facts(exam)
    first, say = exam.accelerator.is_main_process, exam.accelerator.print
    known = broadcast_object_list([_begin(folder, facts) if first else None])[0]
    done = {(each["scheduler"], each["num_inference_steps"]) for each in known}
    left = [each for each in asked if (each.name, each.steps) not in done]
    if done:
        say(f"Already in {folder / runfolder.SAMPLERS}: {len(done)}. To go: {len(left)}.")
    if left:
        real = exams.real_features(exam, exam.trained)
        _warm_up(exam, left[0])
    for number, each in enumerate(left, 1):
        say(f"{each.name}, {each.steps} steps: {number} of {len(left)}", flush=True)
        known.append(_measure(exam, each, real))
        if first:
            runfolder.write_json(folder / runfolder.SAMPLERS, {**facts, "entries": known})
    made = menu.parse({**facts, "entries": known})
    if first:
        tradeoff.save(made, folder / runfolder.EVALUATION_PICTURES / runfolder.TRADE_OFF)
    exam.accelerator.wait_for_everyone()
    return made


def table(made: Menu) -> str:
    """The menu for people, the least time first."""
    rows = menu.rows(made)
    frechet, kernel = ("FID", "KID") if "fid" in rows[0]["metrics"] else ("Frechet", "kernel")
    lines = [f"{'sampler':16}{'steps':>6}{frechet:>10}{kernel:>10}  (spread){'precision':>11}"
             f"{'recall':>8}{'ms an image':>13}"]  # fmt: skip
    for row in rows:
        values = list(row["metrics"].values())
        words = " ".join(row["qualities"]) or ("" if row["is_worse"] else "as good as the best")
        lines.append(
            f"{row['scheduler']:16}{row['num_inference_steps']:>6}{values[0]:>10.4g}"
            f"{values[1]:>10.3g}{values[2]:>10.2g}{values[3]:>11.3f}{values[4]:>8.3f}"
            f"{1000 * row['seconds']:>13.3g}  {words}".rstrip()
        )
    return "\n".join(lines)


def advice(exam: Exam, folder: Path) -> str:
    """Where the menu is, and what can be done with it."""
    path, model = folder / runfolder.SAMPLERS, exam.config.model
    if folder.resolve() == Path(model).resolve():
        return f"Measured: {path}\nNext: python sample.py {model} --quality good"
    return f"Measured: {path}; sample.py --quality reads it in the model's own folder."


def _facts(exam: Exam) -> dict[str, Any]:
    """What holds for all entries."""
    facts = evaluation.entries_of_model(exam)
    del facts["sampler"]
    facts["model"]["weights"] = _weights(exam)
    return {**facts, "batch_size": exam.config.batch_size, "device": facts["environment"]["device"]}


def _weights(exam: Exam) -> str:
    """What the menu is known by where it is read: a commit of the Hub cannot name itself."""
    folder = Path(exam.config.model)
    if (folder / runfolder.CHECKPOINT_STATE).is_file():
        return exam.artifact.version
    if not folder.is_dir():
        folder = pipeline.find(exam.config.model, exam.artifact.version).folder
    return menu.weights_of(folder)


def _begin(folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries that are there already; none of other weights, which the new menu replaces."""
    path = folder / runfolder.SAMPLERS
    if not path.is_file():
        return []
    there = menu.read_file(path).facts
    if there["model"]["weights"] != facts["model"]["weights"]:
        return []
    for name in SAME:
        was, now = there.get(name), facts[name]
        if was != now:
            raise UsageError(f"{path} was measured with other {name.replace('_', ' ')}: {was}, now "
                             f"{now}. Delete it, or give another --output_dir.")  # fmt: skip
    return there["entries"]


def _warm_up(exam: Exam, candidate: Candidate) -> None:
    """Draw a batch that nobody looks at: what is made once for a size of batch is not timed."""
    seeds = range(min(exam.config.batch_size, exam.config.num_images))
    for _ in generation.generate(exam.artifact.unet, candidate.sampler, min(2, candidate.steps),
                                 seeds, len(seeds)):  # fmt: skip
        pass


def _measure(exam: Exam, candidate: Candidate, real: torch.Tensor) -> dict[str, Any]:
    """An entry of the file, the same on all processes. Seconds are a process's, the mean of all."""
    clock = Stopwatch(exam.config.batch_size)
    drawn = exams.drawn_features(exam, candidate.sampler, candidate.steps, exam.config.num_images,
                                 clock.through)  # fmt: skip
    spent = torch.tensor(clock.seconds_per_image, device=exam.accelerator.device)
    seconds = float(exam.accelerator.reduce(spent, reduction="mean"))
    found = metrics.distances(drawn, real)
    return {
        "scheduler": candidate.name,
        "num_inference_steps": candidate.steps,
        "seconds_per_image": float(f"{seconds:.4g}"),
        "metrics": metrics.as_entries(found, exam.features.is_inception),
        "leaving_out": metrics.leaving_out(drawn, real),
    }
