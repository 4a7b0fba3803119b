"""Samplers against each other: the same seeds, the same real images, entry after entry of the menu.

Each entry is on disk as soon as it is measured, so a command that was killed goes on with the one
that it was at. Entries are compared only where everything but the sampler is the same; a menu that
was measured otherwise is refused, not mixed.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from ddpm import run_folder
from ddpm.diffusion import schedulers
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError
from ddpm.evaluation import evaluator, metrics, plots, report
from ddpm.evaluation.evaluator import Drawn, Evaluator
from ddpm.sampling import generate, pipeline, sampler_table
from ddpm.sampling.sampler_table import MeasuredModel, SamplerResult, SamplerTable

STEPS = (5, 10, 20, 50)
NAMES = ("ddim", "dpmsolver++", "unipc")
SAME = ("num_images", "seeds", "features", "reference", "batch_size", "device")
"""What must be the same for two entries to be compared."""


@dataclass(frozen=True)
class Candidate:
    """A sampler to be measured, with its steps."""

    name: str
    scheduler: SamplingScheduler

    @property
    def steps(self) -> int:
        return self.scheduler.num_inference_steps


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
    choices = exam.config.sampler_choices
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
        scheduler = schedulers.build_sampling_scheduler(name, exam.artifact.scheduler_config, asked)
        found.setdefault((name, scheduler.num_inference_steps), Candidate(name, scheduler))
    return sorted(found.values(), key=lambda each: each.steps)


def compare_samplers(exam: Evaluator, folder: Path) -> SamplerTable:
    """Measure every candidate that the menu in `folder` lacks, and write each into it as it is
    done. Call on every process.

    UsageError for a menu that was measured with other images, features or data.
    """
    candidates, table = list_candidates(exam), _empty_table(exam)
    is_main, say = exam.accelerator.is_main_process, exam.accelerator.print
    path = folder / run_folder.SAMPLER_TABLE
    table = broadcast_object_list([_resume(path, table) if is_main else None])[0]
    done = {(entry.scheduler, entry.num_inference_steps) for entry in table.entries}
    left = [each for each in candidates if (each.name, each.steps) not in done]
    if done:
        say(f"Already in {path}: {len(done)}. To go: {len(left)}.")
    if left:
        real = evaluator.split_features(exam, exam.trained)
        _warm_up(exam, left[0])
    for number, candidate in enumerate(left, 1):
        say(f"{candidate.name}, {candidate.steps} steps: {number} of {len(left)}", flush=True)
        table = replace(table, entries=(*table.entries, _measure(exam, candidate, real)))
        if is_main:
            table.write(path)
    if is_main:
        plot_path = folder / run_folder.EVALUATION_DIR / run_folder.TRADE_OFF
        plots.save(plots.plot_sampler_table(table), plot_path)
    exam.accelerator.wait_for_everyone()
    return table


def format_sampler_table(table: SamplerTable) -> str:
    """The table for people, the least time first."""
    frechet, kernel = ("FID", "KID") if "fid" in table.best.metrics else ("Frechet", "kernel")
    lines = [
        f"{'sampler':16}{'steps':>6}{frechet:>10}{kernel:>10}  (spread){'precision':>11}"
        f"{'recall':>8}{'ms an image':>13}"
    ]
    for entry in table.by_time:
        values = list(entry.metrics.values())
        remark = " ".join(table.qualities(entry))
        if not remark and not table.is_significantly_worse(entry):
            remark = "as good as the best"
        lines.append(
            f"{entry.scheduler:16}{entry.num_inference_steps:>6}{values[0]:>10.4g}"
            f"{values[1]:>10.3g}{values[2]:>10.2g}{values[3]:>11.3f}{values[4]:>8.3f}"
            f"{1000 * entry.seconds_per_image:>13.3g}  {remark}".rstrip()
        )
    return "\n".join(lines)


def next_step(exam: Evaluator, folder: Path) -> str:
    """Where the menu is, and what can be done with it."""
    path, model = folder / run_folder.SAMPLER_TABLE, exam.config.model
    if folder.resolve() == Path(model).resolve():
        return f"Measured: {path}\nNext: python sample.py {model} --quality good"
    return f"Measured: {path}; sample.py --quality reads it in the model's own folder."


def _empty_table(exam: Evaluator) -> SamplerTable:
    """A table without entries: what holds for all of them."""
    context = report.evaluation_context(exam)
    del context["sampler"]
    return SamplerTable(
        **{**context, "model": MeasuredModel(**context["model"], weights=_weights(exam))},
        batch_size=exam.config.batch_size,
        device=context["environment"]["device"],
    )


def _weights(exam: Evaluator) -> str:
    """What the menu is known by where it is read: a commit of the Hub cannot name itself."""
    folder = Path(exam.config.model)
    if (folder / run_folder.CHECKPOINT_STATE).is_file():
        return exam.artifact.version
    if not folder.is_dir():
        folder = pipeline.find_pipeline(exam.config.model, exam.artifact.version).folder
    return sampler_table.unet_weights_sha256(folder)


def _resume(path: Path, table: SamplerTable) -> SamplerTable:
    """`table` with the entries that are there already; none of other weights, which it replaces."""
    if not path.is_file():
        return table
    existing = sampler_table.read_sampler_table_file(path)
    if existing.model.weights != table.model.weights:
        return table
    for name in SAME:
        was, now = getattr(existing, name), getattr(table, name)
        if was != now:
            raise UsageError(
                f"{path} was measured with other {name.replace('_', ' ')}: {was}, now "
                f"{now}. Delete it, or give another --output_dir."
            )
    return replace(table, entries=existing.entries)


def _warm_up(exam: Evaluator, candidate: Candidate) -> None:
    """Draw a batch that nobody looks at: what is made once for a size of batch is not timed."""
    seeds = range(min(exam.config.batch_size, exam.config.num_images))
    few_steps = replace(candidate.scheduler, num_inference_steps=min(2, candidate.steps))
    for _ in generate.generate_images(exam.artifact.unet, few_steps, seeds, len(seeds)):
        pass


def _measure(exam: Evaluator, candidate: Candidate, real: torch.Tensor) -> SamplerResult:
    """The same result on all processes. Seconds are a process's, the mean of all."""
    clock = Stopwatch(exam.config.batch_size)
    drawn = evaluator.generated_features(
        exam, candidate.scheduler, exam.config.num_images, clock.through
    )
    spent = torch.tensor(clock.seconds_per_image, device=exam.accelerator.device)
    seconds = float(exam.accelerator.reduce(spent, reduction="mean"))
    return SamplerResult(
        scheduler=candidate.name,
        num_inference_steps=candidate.steps,
        seconds_per_image=float(f"{seconds:.4g}"),
        metrics=metrics.metrics_to_dict(metrics.distances(drawn, real), exam.features.is_inception),
        leaving_out=tuple(metrics.jackknife_distances(drawn, real)),
    )
