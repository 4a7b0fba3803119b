"""Which EMA length draws best: candidates of one run, drawn from the same seeds and compared.

The lowest of several distances is partly luck. So each is held against the pipeline's own with the
standard error of the difference (menu.standard_error), as samplers are.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ddpm import run_folder
from ddpm.data import order
from ddpm.errors import UserError
from ddpm.evaluation import ema_lengths, evaluator, metrics, plots, report
from ddpm.evaluation.ema_lengths import PosthocEMA
from ddpm.evaluation.evaluator import Evaluator
from ddpm.evaluation.report import ExtractedFeatures
from ddpm.sampling.pipeline import file_sha256
from ddpm.sampling.sampler_table import SIGNIFICANT_ERRORS, jackknife_standard_error

PIPELINE, TRAINED, RAW = "the pipeline", "training's average", "raw weights"


@dataclass(frozen=True)
class EMAResult:
    """A candidate with what was measured. `drawn`: its features [N, D]; `leaving_out`: its Frechet
    distance without each group of images; `losses`: held out, by band, or None."""

    name: str
    sigma_rel: float | None
    fit_error: float | None
    weights: dict[str, torch.Tensor]
    drawn: torch.Tensor
    frechet: float
    kernel: tuple[float, float]
    leaving_out: tuple[float, ...]
    losses: list[float] | None

    @property
    def may_win(self) -> bool:
        """Raw weights stand there to compare with."""
        return self.name != RAW


@dataclass(frozen=True)
class EMAComparison:
    """All rows; the first is the pipeline as it was found. `cut_off` is its folder where an export
    of another length into it was stopped before its end."""

    rows: tuple[EMAResult, ...]
    basis: PosthocEMA
    cut_off: Path | None = None

    @property
    def pipeline(self) -> EMAResult:
        return self.rows[0]

    @property
    def best(self) -> EMAResult:
        """The lowest distance among the averages."""
        return min((row for row in self.rows if row.may_win), key=lambda row: row.frechet)

    @property
    def to_export(self) -> EMAResult:
        """The best; where an export of it was cut off, the same weights by the name of their
        length, so that it is done to the end. UserError where no length here has these weights."""
        best = self.best
        if best is not self.pipeline or self.cut_off is None:
            return best
        for row in self.rows[1:]:
            if row.may_win and all(torch.equal(row.weights[n], w) for n, w in best.weights.items()):
                return row
        raise UserError(
            f"An earlier --export_best was cut off in {self.cut_off}. Give the same --ema_lengths "
            "to finish it, or put back what was there: "
            f"cp -r {self.cut_off / run_folder.REPLACED_PIPELINE}/. {self.cut_off}"
        )


def is_significant(one: EMAResult, other: EMAResult) -> bool:
    """Whether two distances differ by more than the draw of the seeds explains."""
    error = jackknife_standard_error(one.leaving_out, other.leaving_out)
    return abs(one.frechet - other.frechet) > SIGNIFICANT_ERRORS * error


def run_comparison(
    exam: Evaluator, looked: ExtractedFeatures, basis: PosthocEMA, folder: Path
) -> tuple[Evaluator, ExtractedFeatures, dict[str, Any]]:
    """Measure --ema_lengths, say and draw what was found, export the best if that was asked for.

    The exam and what was drawn of the pipeline as it is afterwards, and the entry of
    evaluation.json (`folder` is where that goes). Call on every process.
    """
    contest, say = compare_ema_lengths(exam, looked, basis), exam.accelerator.print
    save_plot(contest, exam, folder)
    say(format_comparison(contest))
    found = comparison_to_dict(contest, exam)
    if exam.config.export_best:
        exam, looked = export_best(exam, looked, contest)
        say(format_export(contest, Path(exam.config.model)))
    return exam, looked, found


def compare_ema_lengths(
    exam: Evaluator, looked: ExtractedFeatures, basis: PosthocEMA
) -> EMAComparison:
    """Measure --ema_lengths, the pipeline and the raw weights. Call on every process."""
    assert exam.config.ema_lengths is not None
    rows = [_row(exam, looked, PIPELINE, exam.artifact.unet.state_dict, looked.drawn)]
    rows += [_row(exam, looked, name, make) for name, make in _references(exam).items()]
    for sigma_rel in exam.config.sigma_rels:
        row = _row(exam, looked, f"{sigma_rel:g}", partial(basis.build, sigma_rel))
        rows.append(replace(row, sigma_rel=sigma_rel, fit_error=basis.fit(sigma_rel).error))
    folder = Path(exam.config.model)
    cut_off = folder if run_folder.export_was_interrupted(folder) else None
    return EMAComparison(tuple(rows), basis, cut_off)


def _references(exam: Evaluator) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    """Training's own average where the pipeline holds another one, and the raw weights."""
    folder, found = Path(exam.config.model), {}
    entry = run_folder.read_exported_ema(folder, exam.artifact.version)
    average = folder / f"checkpoint-{entry.step}" / "ema.safetensors" if entry else None
    if average is not None and average.is_file():
        found[TRAINED] = lambda: load_file(average)
    raw = evaluator.load_raw_unet(exam)
    if raw is not None:
        found[RAW] = raw.state_dict
    return found


def _row(
    exam: Evaluator,
    looked: ExtractedFeatures,
    name: str,
    make: Callable[[], dict[str, torch.Tensor]],
    drawn: torch.Tensor | None = None,
) -> EMAResult:
    """Measure some weights; `drawn` are the features of their images where those are known."""
    weights = make()
    own = with_weights(exam, weights)
    if drawn is None:
        exam.accelerator.print(f"Drawing with {name} ...", flush=True)
        drawn = evaluator.generated_features(own, exam.scheduler, exam.config.num_images)
    return EMAResult(
        name=name,
        sigma_rel=None,
        fit_error=None,
        weights={key: value.cpu() for key, value in weights.items()},
        drawn=drawn,
        frechet=metrics.frechet_distance(drawn, looked.trained),
        kernel=metrics.kernel_distance(drawn, looked.trained),
        leaving_out=tuple(metrics.jackknife_distances(drawn, looked.trained)),
        losses=_held_out_losses(own),
    )


def with_weights(exam: Evaluator, weights: dict[str, torch.Tensor]) -> Evaluator:
    """The same exam of other weights."""
    unet = copy.deepcopy(exam.artifact.unet)
    unet.load_state_dict(weights)
    return replace(exam, artifact=replace(exam.artifact, unet=unet))


def _held_out_losses(exam: Evaluator) -> list[float] | None:
    """By band, on the images that evaluation.noise_levels takes; None without held-out images."""
    if exam.held_out is None:
        return None
    count = min(report.MAX_LOSS_IMAGES, len(exam.held_out), len(exam.trained))
    rows = order.row_indices(0, len(exam.held_out), 0, count)
    return evaluator.split_losses(exam, exam.artifact.unet, exam.held_out, rows).mean(0).tolist()


def export_best(
    exam: Evaluator, looked: ExtractedFeatures, contest: EMAComparison
) -> tuple[Evaluator, ExtractedFeatures]:
    """Make the best average the run folder's pipeline: the exam of that one. Call on every process.

    Nothing is done where the pipeline is the best already. UserError as in lengths.export.
    """
    best, folder = contest.to_export, Path(exam.config.model)
    if best is contest.pipeline:
        return exam, looked
    changed = with_weights(exam, best.weights)
    entry = None
    if best.sigma_rel is not None:
        entry = {
            "sigma_rel": best.sigma_rel,
            "fit_error": best.fit_error,
            "step": contest.basis.step,
        }
    if exam.accelerator.is_main_process:
        ema_lengths.export_weights(folder, best.weights, entry, exam.accelerator.device)
    exam.accelerator.wait_for_everyone()
    version = file_sha256(folder / run_folder.UNET_WEIGHTS)
    changed = replace(changed, artifact=replace(changed.artifact, version=version))
    return changed, replace(looked, drawn=best.drawn)


def comparison_to_dict(contest: EMAComparison, exam: Evaluator) -> dict[str, Any]:
    """What evaluation.json holds; differences are to the pipeline as it was found."""
    names = (
        ("fid", "kid") if exam.features.is_inception else ("frechet_distance", "kernel_distance")
    )
    frechet, kernel = names
    first, rows = contest.pipeline, []
    for row in contest.rows:
        found = {
            "name": row.name,
            "sigma_rel": row.sigma_rel,
            "fit_error": row.fit_error,
            frechet: row.frechet,
            kernel: row.kernel[0],
            f"{kernel}_spread": row.kernel[1],
            "held_out_loss_by_band": row.losses,
        }
        if row is not first:
            found |= {
                "difference": row.frechet - first.frechet,
                "standard_error": jackknife_standard_error(row.leaving_out, first.leaving_out),
            }
        rows.append({key: value for key, value in found.items() if value is not None})
    kept = sorted({profile.sigma_rel for profile in contest.basis.files})
    return {
        "step": contest.basis.step,
        "averages": len(contest.basis.files),
        "kept": kept,
        "rows": rows,
        "best": contest.best.name,
    }


def save_plot(contest: EMAComparison, exam: Evaluator, folder: Path) -> None:
    """evaluation/ema-lengths.png, on the first process; nothing with fewer than two lengths."""
    points = [
        (
            row.sigma_rel,
            row.frechet,
            jackknife_standard_error(row.leaving_out, contest.pipeline.leaving_out),
        )
        for row in contest.rows
        if row.sigma_rel is not None
    ]
    lines = {row.name: row.frechet for row in contest.rows if row.sigma_rel is None}
    name = "FID" if exam.features.is_inception else "Frechet distance"
    if exam.accelerator.is_main_process:
        path = folder / run_folder.EVALUATION_DIR / run_folder.EMA_LENGTHS
        plots.save(plots.plot_ema_lengths(points, lines, name), path)


def format_comparison(contest: EMAComparison) -> str:
    """The candidates for people, and in words what the best one is worth."""
    lines = [
        f"{'EMA length':22}{'error of fit':>13}{'distance':>10}{'kernel':>10}"
        f"{'difference':>12} (standard error){'held-out loss':>15}"
    ]
    for row in contest.rows:
        fit = "" if row.fit_error is None else f"{row.fit_error:.2%}"
        apart = f"{'':>12}{'':17}"
        if row is not contest.pipeline:
            error = jackknife_standard_error(row.leaving_out, contest.pipeline.leaving_out)
            apart = f"{row.frechet - contest.pipeline.frechet:>+12.3g} {f'({error:.2g})':<16}"
        loss = "" if row.losses is None else f"{sum(row.losses) / len(row.losses):.4f}"
        lines.append(
            f"{row.name:22}{fit:>13}{row.frechet:>10.4g}{row.kernel[0]:>10.3g}"
            f"{apart}{loss:>15}".rstrip()
        )
    return "\n".join([*lines, format_verdict(contest)])


def format_verdict(contest: EMAComparison) -> str:
    """Whether another length is better than the pipeline, in a sentence or two."""
    best, first = contest.best, contest.pipeline
    if best is first:
        return "No length is better than the pipeline's own average."
    compared = (
        f"{_called(best)}: {best.frechet:.3g} against {first.frechet:.3g}, standard error "
        f"{jackknife_standard_error(best.leaving_out, first.leaving_out):.2g}"
    )
    if is_significant(best, first):
        return f"Best is {compared}."
    return (
        f"NOT TOLD APART from the pipeline: lowest is {compared}. Other seeds may turn that round: "
        "--seed draws others, --num_images more."
    )


def format_export(contest: EMAComparison, folder: Path) -> str:
    """What export_best did, in words."""
    best = contest.to_export
    if best is contest.pipeline:
        return "Nothing was exported: the pipeline is the best already."
    before = folder / run_folder.REPLACED_PIPELINE
    back = f" What it was is in {before}." if before.is_dir() else ""
    noise = (
        ""
        if is_significant(best, contest.pipeline)
        else (" NOTE that it cannot be told apart from what was there.")
    )
    return f"{folder} now holds {_called(best)}.{back}{noise}"


def _called(row: EMAResult) -> str:
    return f"EMA length {row.name}" if row.sigma_rel is not None else row.name
