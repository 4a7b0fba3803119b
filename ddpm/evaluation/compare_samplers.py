"""Compare samplers of one model: the same seeds and the same real images for each.

Each result is on disk as soon as it is measured, so an interrupted command continues with the
sampler that it was at. Results are compared only if everything but the sampler is the same; a table
that was measured with other settings is refused, not mixed.
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
from ddpm.evaluation import metrics, plots, report
from ddpm.evaluation.evaluator import Evaluator, GeneratedImages
from ddpm.sampling import generate, pipeline_folder, sampler_results
from ddpm.sampling.sampler_results import MeasuredModel, SamplerResult, SamplerTable

DEFAULT_STEPS = (5, 10, 20, 50)
DEFAULT_NAMES = ("ddim", "dpmsolver++", "unipc")
SAME = ("num_images", "seeds", "guidance_scale", "features", "reference", "batch_size", "device")
"""Fields of the table that must be equal for two results to be compared."""


@dataclass(frozen=True)
class Candidate:
    """A sampler to be measured."""

    name: str
    scheduler: SamplingScheduler

    @property
    def steps(self) -> int:
        return self.scheduler.num_inference_steps


class Stopwatch:
    """Times the generation of images batch by batch, without what is done with them in between."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.waits: list[float] = []
        """Seconds until each image came."""

    def measure(self, images: GeneratedImages) -> GeneratedImages:
        """Yield the images, and note how long each takes."""
        while True:
            start = time.perf_counter()
            image = next(images, None)
            if image is None:
                return
            self.waits.append(time.perf_counter() - start)
            yield image

    @property
    def seconds_per_image(self) -> float:
        """Seconds per image of the quickest batch, since other work on the machine only adds time.

        A batch that is not full counts only if there is no other.
        """
        size = min(self.batch_size, len(self.waits))
        full_batches = range(0, len(self.waits) // size * size, size)
        return min(sum(self.waits[start : start + size]) for start in full_batches) / size


def list_candidates(evaluator: Evaluator) -> list[Candidate]:
    """Return the samplers of --samplers, or the default ones, the fewest steps first.

    UsageError for more steps than the model was trained with, and for a sampler that does not
    support its noise schedule.
    """
    scheduler_config = evaluator.model.scheduler_config
    num_timesteps = int(scheduler_config.get("num_train_timesteps", 1000))
    choices = evaluator.config.sampler_choices
    for name, steps in choices:
        if steps is not None and steps > num_timesteps:
            raise UsageError(
                f"--samplers {name}:{steps}: this model was trained with {num_timesteps} "
                f"steps, so give a number from 1 to {num_timesteps}."
            )
    if not choices:
        choices = [
            (name, steps)
            for steps in DEFAULT_STEPS
            for name in DEFAULT_NAMES
            if steps <= num_timesteps
        ]
        choices.append(("ddpm", None))
    candidates: dict[tuple[str, int], Candidate] = {}
    for name, steps in choices:
        scheduler = schedulers.build_sampling_scheduler(name, scheduler_config, steps)
        candidate = Candidate(name, scheduler)
        candidates.setdefault((name, candidate.steps), candidate)
    return sorted(candidates.values(), key=lambda candidate: candidate.steps)


def compare_samplers(evaluator: Evaluator, folder: Path) -> SamplerTable:
    """Measure the samplers that the table in `folder` lacks, and write the table after each one.

    Call on every process. UsageError for a table of other images, features or data.
    """
    candidates, table = list_candidates(evaluator), _empty_table(evaluator)
    is_main, say = evaluator.accelerator.is_main_process, evaluator.accelerator.print
    path = folder / run_folder.SAMPLER_TABLE
    table = broadcast_object_list([_resume(path, table) if is_main else None])[0]
    done = {(entry.scheduler, entry.num_inference_steps) for entry in table.entries}
    left = [candidate for candidate in candidates if (candidate.name, candidate.steps) not in done]
    if done:
        say(f"Already in {path}: {len(done)}. To go: {len(left)}.")
    if left:
        real = evaluator.dataset_features(evaluator.trained)
        _warm_up(evaluator, left[0])
    for number, candidate in enumerate(left, 1):
        say(f"{candidate.name}, {candidate.steps} steps: {number} of {len(left)}", flush=True)
        table = replace(table, entries=(*table.entries, _measure(evaluator, candidate, real)))
        if is_main:
            table.write(path)
    if is_main:
        plot_path = folder / run_folder.EVALUATION_DIR / run_folder.TRADE_OFF
        plots.save(plots.plot_sampler_table(table), plot_path)
    evaluator.accelerator.wait_for_everyone()
    return table


def format_sampler_table(table: SamplerTable) -> str:
    """Return the table as text, the quickest sampler first."""
    is_inception = "fid" in table.best.metrics
    frechet, kernel = metrics.distance_names(is_inception)
    titles = ("FID", "KID") if is_inception else ("Frechet", "kernel")
    lines = [
        f"{'sampler':16}{'steps':>6}{titles[0]:>10}{titles[1]:>10}  (spread){'precision':>11}"
        f"{'recall':>8}{'ms an image':>13}"
    ]
    for entry in table.by_time:
        values = entry.metrics
        label = " ".join(table.qualities(entry))
        if not label and not table.is_significantly_worse(entry):
            label = "as good as the best"
        lines.append(
            f"{entry.scheduler:16}{entry.num_inference_steps:>6}{values[frechet]:>10.4g}"
            f"{values[kernel]:>10.3g}{values[f'{kernel}_spread']:>10.2g}"
            f"{values['precision']:>11.3f}{values['recall']:>8.3f}"
            f"{1000 * entry.seconds_per_image:>13.3g}  {label}".rstrip()
        )
    return "\n".join(lines)


def next_step(evaluator: Evaluator, folder: Path) -> str:
    """Return where the table is, and the command that uses it."""
    path, model = folder / run_folder.SAMPLER_TABLE, evaluator.config.model
    if folder.resolve() == Path(model).resolve():
        return f"Measured: {path}\nNext: python sample.py {model} --quality good"
    return f"Measured: {path}; sample.py --quality reads it in the model's own folder."


def _empty_table(evaluator: Evaluator) -> SamplerTable:
    """Return a table without entries: the facts that all of them have in common."""
    context = report.evaluation_context(evaluator)
    model = MeasuredModel(
        name=evaluator.model.name,
        version=evaluator.model.version,
        weights=_weights_sha256(evaluator),
    )
    return SamplerTable(
        **{**context, "model": model},
        batch_size=evaluator.config.batch_size,
        device=context["environment"]["device"],
    )


def _weights_sha256(evaluator: Evaluator) -> str:
    """Return the hash by which sample.py recognizes the model that the table belongs to."""
    folder = Path(evaluator.config.model)
    if (folder / run_folder.CHECKPOINT_STATE).is_file():
        return evaluator.model.version
    if not folder.is_dir():
        folder = pipeline_folder.find_pipeline(
            evaluator.config.model, evaluator.model.version
        ).folder
    return sampler_results.unet_weights_sha256(folder)


def _resume(path: Path, table: SamplerTable) -> SamplerTable:
    """Return `table` with the entries in the file, unless they are of other weights."""
    if not path.is_file():
        return table
    existing = sampler_results.read_sampler_table_file(path)
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


def _warm_up(evaluator: Evaluator, candidate: Candidate) -> None:
    """Generate a batch in two steps: what is set up once for a batch size must not be timed."""
    steps = min(2, candidate.steps)
    scheduler = replace(candidate.scheduler, num_inference_steps=steps)
    seeds = range(min(evaluator.config.batch_size, evaluator.config.num_images))
    for _ in generate.generate_images(
        evaluator.model.unet, scheduler, seeds, len(seeds), guidance=evaluator.guidance
    ):
        pass


def _measure(evaluator: Evaluator, candidate: Candidate, real: torch.Tensor) -> SamplerResult:
    """Measure one sampler. Call on every process; the seconds are the mean of all processes."""
    stopwatch = Stopwatch(evaluator.config.batch_size)
    generated = replace(evaluator, scheduler=candidate.scheduler).generated_features(
        stopwatch.measure
    )
    seconds = torch.tensor(stopwatch.seconds_per_image, device=evaluator.accelerator.device)
    seconds = float(evaluator.accelerator.reduce(seconds, reduction="mean"))
    distances = metrics.distances(generated, real)
    return SamplerResult(
        scheduler=candidate.name,
        num_inference_steps=candidate.steps,
        seconds_per_image=float(f"{seconds:.4g}"),
        metrics=metrics.metrics_to_dict(distances, evaluator.extractor.is_inception),
        leaving_out=tuple(metrics.jackknife_distances(generated, real)),
    )
