"""Compare lengths of the EMA after training, and export the best one into the run's pipeline.

Each candidate is measured on images of the same seeds. The lowest of several distances is partly
luck, so each difference to the pipeline's own weights has a standard error
(`sampler_results.jackknife_standard_error`), as for samplers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ddpm import file_io, run_folder, run_record
from ddpm.config.evaluate import EvaluateConfig
from ddpm.diffusion import power_ema
from ddpm.diffusion.power_ema import PosthocEMA
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import export_ema, metrics, plots, report
from ddpm.evaluation.evaluator import Evaluator
from ddpm.evaluation.report import ExtractedFeatures
from ddpm.sampling.sampler_results import SIGNIFICANT_ERRORS, jackknife_standard_error

PIPELINE, TRAINED, RAW = "the pipeline", "training's average", "raw weights"
"""Names of the candidates that are no post-hoc average."""

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class EMAResult:
    """What was measured of one candidate. `generated`, `predicted`: as in `ExtractedFeatures`;
    `leaving_out`: its Frechet distance without each group of images; `losses`: on held-out images
    in each band, None without held-out images."""

    name: str
    sigma_rel: float | None = None
    fit_error: float | None = None
    weights: StateDict
    generated: torch.Tensor
    predicted: torch.Tensor | None = None
    frechet: float
    kernel: tuple[float, float]
    leaving_out: list[float]
    losses: list[float] | None

    @property
    def title(self) -> str:
        return f"EMA length {self.name}" if self.sigma_rel is not None else self.name


@dataclass(frozen=True)
class EMAComparison:
    """All candidates; the first is the pipeline as it was before the comparison.

    `interrupted`: the run folder, if an earlier export into it was interrupted.
    """

    rows: list[EMAResult]
    posthoc_ema: PosthocEMA
    interrupted: Path | None = None

    @property
    def pipeline(self) -> EMAResult:
        return self.rows[0]

    @property
    def best(self) -> EMAResult:
        """The lowest distance; raw weights are only there for comparison."""
        return min((row for row in self.rows if row.name != RAW), key=lambda row: row.frechet)

    @property
    def to_export(self) -> EMAResult:
        """The best candidate.

        If an export of it was interrupted, the pipeline holds its weights already: then the length
        with these weights, so that the export is completed. UserError if no length has them.
        """
        best = self.best
        if best is not self.pipeline or self.interrupted is None:
            return best
        for row in self.rows[1:]:
            if row.name != RAW and _are_equal(row.weights, best.weights):
                return row
        raise UserError(
            f"An earlier --export_best was cut off in {self.interrupted}. Give the same "
            "--ema_lengths to finish it, or put back what was there: cp -r "
            f"{self.interrupted / run_folder.REPLACED_PIPELINE}/. {self.interrupted}"
        )

    def difference(self, row: EMAResult) -> tuple[float, float]:
        """Return the difference of a distance to that of the pipeline, and its standard error."""
        error = jackknife_standard_error(row.leaving_out, self.pipeline.leaving_out)
        return row.frechet - self.pipeline.frechet, error

    def is_significant(self, row: EMAResult) -> bool:
        """Whether a candidate differs from the pipeline by more than chance explains."""
        difference, error = self.difference(row)
        return abs(difference) > SIGNIFICANT_ERRORS * error


def require_posthoc_ema(config: EvaluateConfig) -> PosthocEMA:
    """Open the averages for --ema_lengths, before anything is generated.

    UsageError for what is no run folder, UserError for lengths that cannot be built.
    """
    folder = Path(config.model)
    if not folder.is_dir() or (folder / run_folder.CHECKPOINT_STATE).is_file():
        raise UsageError(
            f"--ema_lengths needs a run folder with its snapshots; {config.model} is none."
        )
    posthoc_ema = power_ema.open_posthoc_ema(folder)
    posthoc_ema.require(config.sigma_rels)
    return posthoc_ema


def run_comparison(
    evaluator: Evaluator, extracted: ExtractedFeatures, posthoc_ema: PosthocEMA, folder: Path
) -> tuple[Evaluator, ExtractedFeatures, dict[str, Any]]:
    """Measure --ema_lengths, print and plot the comparison into `folder`, export the best if asked.

    Return the evaluator and the features of the pipeline as it is afterwards, and the entry for
    evaluation.json. Call on every process.
    """
    comparison = compare_ema_lengths(evaluator, extracted, posthoc_ema)
    if evaluator.accelerator.is_main_process:
        path = folder / run_folder.EVALUATION_DIR / run_folder.EMA_LENGTHS
        plots.save(_plot(comparison, evaluator.extractor.is_inception), path)
    evaluator.accelerator.print(format_comparison(comparison))
    entry = comparison_to_dict(comparison, evaluator.extractor.is_inception)
    if evaluator.config.export_best:
        evaluator, extracted = export_best(evaluator, extracted, comparison)
        evaluator.accelerator.print(format_export(comparison, Path(evaluator.config.model)))
    return evaluator, extracted, entry


def compare_ema_lengths(
    evaluator: Evaluator, extracted: ExtractedFeatures, posthoc_ema: PosthocEMA
) -> EMAComparison:
    """Measure --ema_lengths, the pipeline and the raw weights. Call on every process."""
    current = evaluator.model.unet.state_dict
    known = (extracted.generated, extracted.predicted)
    rows = [_measure(evaluator, extracted, PIPELINE, current, known)]
    for name, load in _references(evaluator).items():
        rows.append(_measure(evaluator, extracted, name, load))
    for sigma_rel in evaluator.config.sigma_rels:
        build = partial(posthoc_ema.build, sigma_rel)
        row = _measure(evaluator, extracted, f"{sigma_rel:g}", build)
        fit_error = posthoc_ema.fit(sigma_rel).error
        rows.append(replace(row, sigma_rel=sigma_rel, fit_error=fit_error))
    folder = Path(evaluator.config.model)
    interrupted = folder if run_folder.export_was_interrupted(folder) else None
    return EMAComparison(rows, posthoc_ema, interrupted)


def _references(evaluator: Evaluator) -> dict[str, Callable[[], StateDict]]:
    """Training's own average, if the pipeline holds another one, and the raw weights."""
    folder, references = Path(evaluator.config.model), {}
    exported = run_record.read_exported_ema(folder, evaluator.model.version)
    if exported is not None:
        path = folder / f"checkpoint-{exported.step}" / run_folder.EMA_WEIGHTS
        if path.is_file():
            references[TRAINED] = partial(load_file, path)
    raw_unet = evaluator.load_raw_unet()
    if raw_unet is not None:
        references[RAW] = raw_unet.state_dict
    return references


def _measure(
    evaluator: Evaluator,
    extracted: ExtractedFeatures,
    name: str,
    load: Callable[[], StateDict],
    known: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> EMAResult:
    """Measure the weights that `load` returns; `known`: what `generate_and_classify` returned."""
    weights = load()
    evaluator = evaluator.with_weights(weights)
    if known is None:
        evaluator.accelerator.print(f"Generating with {name} ...", flush=True)
        known = evaluator.generate_and_classify()
    generated, predicted = known
    losses = None
    if evaluator.held_out is not None:
        losses = report.split_losses(evaluator, evaluator.model.unet, "held_out")
    return EMAResult(
        name=name,
        weights={key: value.cpu() for key, value in weights.items()},
        generated=generated,
        predicted=predicted,
        frechet=metrics.frechet_distance(generated, extracted.trained),
        kernel=metrics.kernel_distance(generated, extracted.trained),
        leaving_out=metrics.jackknife_distances(generated, extracted.trained),
        losses=losses,
    )


def _are_equal(one: StateDict, other: StateDict) -> bool:
    return all(torch.equal(one[name], value) for name, value in other.items())


def comparison_to_dict(comparison: EMAComparison, is_inception: bool) -> dict[str, Any]:
    """Return the entry of evaluation.json; differences are to the pipeline before the export."""
    frechet, kernel = metrics.distance_names(is_inception)
    rows = []
    for row in comparison.rows:
        entry = {
            "name": row.name,
            "sigma_rel": row.sigma_rel,
            "fit_error": row.fit_error,
            frechet: row.frechet,
            kernel: row.kernel[0],
            f"{kernel}_spread": row.kernel[1],
            "held_out_loss_by_band": row.losses,
        }
        if row is not comparison.pipeline:
            entry["difference"], entry["standard_error"] = comparison.difference(row)
        rows.append({key: value for key, value in entry.items() if value is not None})
    profiles = comparison.posthoc_ema.files
    return {
        "step": comparison.posthoc_ema.step,
        "averages": len(profiles),
        "kept": sorted({profile.sigma_rel for profile in profiles}),
        "rows": rows,
        "best": comparison.best.name,
    }


def _plot(comparison: EMAComparison, is_inception: bool) -> Any:
    points = [
        (row.sigma_rel, row.frechet, comparison.difference(row)[1])
        for row in comparison.rows
        if row.sigma_rel is not None
    ]
    levels = {row.name: row.frechet for row in comparison.rows if row.sigma_rel is None}
    title = plots.DISTANCE_TITLES[metrics.distance_names(is_inception)[0]]
    return plots.plot_ema_lengths(points, levels, title)


def format_comparison(comparison: EMAComparison) -> str:
    """Return the candidates as a table, and a sentence on the best one."""
    lines = [
        f"{'EMA length':22}{'error of fit':>13}{'distance':>10}{'kernel':>10}"
        f"{'difference':>12} (standard error){'held-out loss':>15}"
    ]
    for row in comparison.rows:
        fit = "" if row.fit_error is None else f"{row.fit_error:.2%}"
        difference = f"{'':>12}{'':17}"
        if row is not comparison.pipeline:
            value, error = comparison.difference(row)
            difference = f"{value:>+12.3g} {f'({error:.2g})':<16}"
        loss = "" if row.losses is None else f"{sum(row.losses) / len(row.losses):.4f}"
        lines.append(
            f"{row.name:22}{fit:>13}{row.frechet:>10.4g}{row.kernel[0]:>10.3g}"
            f"{difference}{loss:>15}".rstrip()
        )
    return "\n".join([*lines, format_verdict(comparison)])


def format_verdict(comparison: EMAComparison) -> str:
    """Return whether another length is better than the pipeline."""
    best, current = comparison.best, comparison.pipeline
    if best is current:
        return "No length is better than the pipeline's own average."
    values = (
        f"{best.title}: {best.frechet:.3g} against {current.frechet:.3g}, standard error "
        f"{comparison.difference(best)[1]:.2g}"
    )
    if comparison.is_significant(best):
        return f"Best is {values}."
    return (
        f"NOT SIGNIFICANT: the lowest is {values}. Other seeds may reverse that: --seed chooses "
        "others, --num_images more."
    )


def format_export(comparison: EMAComparison, folder: Path) -> str:
    """Return what `export_best` did."""
    best, before = comparison.to_export, folder / run_folder.REPLACED_PIPELINE
    if best is comparison.pipeline:
        return "Nothing was exported: the pipeline is the best already."
    replaced = f" What it replaced is in {before}." if before.is_dir() else ""
    warning = ""
    if not comparison.is_significant(best):
        warning = " NOTE: the difference to what it replaced is not significant."
    return f"{folder} now holds {best.title}.{replaced}{warning}"


def export_best(
    evaluator: Evaluator, extracted: ExtractedFeatures, comparison: EMAComparison
) -> tuple[Evaluator, ExtractedFeatures]:
    """Export the best average into the run folder, unless it is there already.

    Return the evaluator and the features of the exported weights. Call on every process. UserError
    as in `export_ema.export_weights`.
    """
    best, folder = comparison.to_export, Path(evaluator.config.model)
    if best is comparison.pipeline:
        return evaluator, extracted
    entry = None
    if best.sigma_rel is not None:
        step = comparison.posthoc_ema.step
        entry = {"sigma_rel": best.sigma_rel, "fit_error": best.fit_error, "step": step}
    if evaluator.accelerator.is_main_process:
        export_ema.export_weights(folder, best.weights, entry, evaluator.accelerator.device)
    evaluator.accelerator.wait_for_everyone()
    evaluator = evaluator.with_weights(best.weights)
    version = file_io.file_sha256(folder / run_folder.UNET_WEIGHTS)
    model = replace(evaluator.model, version=version)
    extracted = replace(extracted, generated=best.generated, predicted=best.predicted)
    return replace(evaluator, model=model), extracted
