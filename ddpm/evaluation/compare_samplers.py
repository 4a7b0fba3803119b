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

from ddpm import run_folder
from ddpm.config.checks import parse_sampler_choices
from ddpm.diffusion import schedulers
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError
from ddpm.evaluation import evaluator, metrics, plots, report
from ddpm.evaluation.evaluator import Drawn, Evaluator
from ddpm.sampling import generate, pipeline, sampler_table
from ddpm.sampling.sampler_table import SamplerTable

STEPS = (5, 10, 20, 50)
NAMES = ("ddim", "dpmsolver++", "unipc")
SAME = ("num_images", "seeds", "features", "reference", "batch_size", "device")
"""What must be the same for two entries to be compared."""


@dataclass(frozen=True)
class Candidate:
    """A sampler to be measured, with its steps."""

    name: str
    sampler: SamplingScheduler
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


def list_candidates(exam: Evaluator) -> list[Candidate]:
    """The samplers of --samplers, or the usual ones, the fewest steps first.

    UsageError for more steps than the chain has, and for one that does not know the chain.
    """
    chain = int(exam.artifact.scheduler_config.get("num_train_timesteps", 1000))
    choices = parse_sampler_choices(exam.config.samplers or ())
    for name, steps in choices:
        if steps is not None and steps > chain:
            raise UsageError(
                f"--samplers {name}:{steps}: this model was trained with {chain} "
                f"steps, so give a number from 1 to {chain}."
            )
    if not choices:
        choices = [(name, steps) for steps in STEPS for name in NAMES if steps <= chain]
        choices.append(("ddpm", None))
    found: dict[tuple[str, int], Candidate] = {}
    for name, asked in choices:
        sampler, steps = schedulers.build_sampling_scheduler(
            name, exam.artifact.scheduler_config, asked
        )
        found.setdefault((name, steps), Candidate(name, sampler, steps))
    return sorted(found.values(), key=lambda each: each.steps)


def compare_samplers(exam: Evaluator, folder: Path) -> SamplerTable:
    """Measure every candidate that the menu in `folder` lacks, and write each into it as it is
    done. Call on every process.

    UsageError for a menu that was measured with other images, features or data.
    """
    asked, facts = list_candidates(exam), _facts(exam)
    first, say = exam.accelerator.is_main_process, exam.accelerator.print
    known = broadcast_object_list([_begin(folder, facts) if first else None])[0]
    done = {(each["scheduler"], each["num_inference_steps"]) for each in known}
    left = [each for each in asked if (each.name, each.steps) not in done]
    if done:
        say(f"Already in {folder / run_folder.SAMPLER_TABLE}: {len(done)}. To go: {len(left)}.")
    if left:
        real = evaluator.split_features(exam, exam.trained)
        _warm_up(exam, left[0])
    for number, each in enumerate(left, 1):
        say(f"{each.name}, {each.steps} steps: {number} of {len(left)}", flush=True)
        known.append(_measure(exam, each, real))
        if first:
            run_folder.write_json(folder / run_folder.SAMPLER_TABLE, {**facts, "entries": known})
    made = sampler_table.parse_sampler_table({**facts, "entries": known})
    if first:
        path = folder / run_folder.EVALUATION_DIR / run_folder.TRADE_OFF
        plots.save(plots.plot_sampler_table(made), path)
    exam.accelerator.wait_for_everyone()
    return made


def format_sampler_table(made: SamplerTable) -> str:
    """The menu for people, the least time first."""
    rows = sampler_table.table_rows(made)
    frechet, kernel = ("FID", "KID") if "fid" in rows[0]["metrics"] else ("Frechet", "kernel")
    lines = [
        f"{'sampler':16}{'steps':>6}{frechet:>10}{kernel:>10}  (spread){'precision':>11}"
        f"{'recall':>8}{'ms an image':>13}"
    ]
    for row in rows:
        values = list(row["metrics"].values())
        words = " ".join(row["qualities"]) or ("" if row["is_worse"] else "as good as the best")
        lines.append(
            f"{row['scheduler']:16}{row['num_inference_steps']:>6}{values[0]:>10.4g}"
            f"{values[1]:>10.3g}{values[2]:>10.2g}{values[3]:>11.3f}{values[4]:>8.3f}"
            f"{1000 * row['seconds']:>13.3g}  {words}".rstrip()
        )
    return "\n".join(lines)


def next_step(exam: Evaluator, folder: Path) -> str:
    """Where the menu is, and what can be done with it."""
    path, model = folder / run_folder.SAMPLER_TABLE, exam.config.model
    if folder.resolve() == Path(model).resolve():
        return f"Measured: {path}\nNext: python sample.py {model} --quality good"
    return f"Measured: {path}; sample.py --quality reads it in the model's own folder."


def _facts(exam: Evaluator) -> dict[str, Any]:
    """What holds for all entries."""
    facts = report.evaluation_context(exam)
    del facts["sampler"]
    facts["model"]["weights"] = _weights(exam)
    return {**facts, "batch_size": exam.config.batch_size, "device": facts["environment"]["device"]}


def _weights(exam: Evaluator) -> str:
    """What the menu is known by where it is read: a commit of the Hub cannot name itself."""
    folder = Path(exam.config.model)
    if (folder / run_folder.CHECKPOINT_STATE).is_file():
        return exam.artifact.version
    if not folder.is_dir():
        folder = pipeline.find_pipeline(exam.config.model, exam.artifact.version).folder
    return sampler_table.unet_weights_sha256(folder)


def _begin(folder: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries that are there already; none of other weights, which the new menu replaces."""
    path = folder / run_folder.SAMPLER_TABLE
    if not path.is_file():
        return []
    there = sampler_table.read_sampler_table_file(path).facts
    if there["model"]["weights"] != facts["model"]["weights"]:
        return []
    for name in SAME:
        was, now = there.get(name), facts[name]
        if was != now:
            raise UsageError(
                f"{path} was measured with other {name.replace('_', ' ')}: {was}, now "
                f"{now}. Delete it, or give another --output_dir."
            )
    return there["entries"]


def _warm_up(exam: Evaluator, candidate: Candidate) -> None:
    """Draw a batch that nobody looks at: what is made once for a size of batch is not timed."""
    seeds = range(min(exam.config.batch_size, exam.config.num_images))
    for _ in generate.generate_images(
        exam.artifact.unet, candidate.sampler, min(2, candidate.steps), seeds, len(seeds)
    ):
        pass


def _measure(exam: Evaluator, candidate: Candidate, real: torch.Tensor) -> dict[str, Any]:
    """An entry of the file, the same on all processes. Seconds are a process's, the mean of all."""
    clock = Stopwatch(exam.config.batch_size)
    drawn = evaluator.generated_features(
        exam, candidate.sampler, candidate.steps, exam.config.num_images, clock.through
    )
    spent = torch.tensor(clock.seconds_per_image, device=exam.accelerator.device)
    seconds = float(exam.accelerator.reduce(spent, reduction="mean"))
    found = metrics.distances(drawn, real)
    return {
        "scheduler": candidate.name,
        "num_inference_steps": candidate.steps,
        "seconds_per_image": float(f"{seconds:.4g}"),
        "metrics": metrics.metrics_to_dict(found, exam.features.is_inception),
        "leaving_out": metrics.jackknife_distances(drawn, real),
    }
