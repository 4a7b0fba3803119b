"""Warnings about a run, as pure functions of its evaluations so far.

A series is the evaluations' lines of metrics.jsonl, the newest last: each has "step", "epoch" and
"eval_loss" (of the exported weights), with an EMA also "eval_loss_raw", and under fp16
"skipped_steps", the number skipped in the whole run. A warning is given when it applies to the
series but not to the series without its last line: so once, also if the run is resumed.
"""

from collections.abc import Callable, Sequence
from typing import Any

LAG_FRACTION = 0.05
"""The EMA lags if the raw weights' loss is lower by this fraction, until it is by half of that."""
RISE_FRACTION, MIN_EPOCHS = 0.02, 5
"""The held-out loss rises if it is above its minimum by this fraction twice in a row, after this
many epochs or more."""
SKIPPED_FRACTION, MIN_SKIPPED = 0.02, 5
"""Skipped steps since the evaluation before that are too many: a fraction of the steps, and a
number, since the gradient scaler needs a few to find its scale."""
FALL_FRACTION, PATIENCE = 0.005, 4
"""The loss stalls if this many evaluations did not lower it by this fraction."""

Series = Sequence[dict[str, Any]]


def new_warnings(
    series: Series, decay: Callable[[int], float] | None, last_step: int | None
) -> list[str]:
    """Return the warnings that apply since the newest evaluation.

    `decay` is EMA.decay, None without an EMA; `last_step` is the run's, None if only time ends it.
    """
    before = _warnings(series[:-1], decay, last_step)
    now = _warnings(series, decay, last_step)
    return [text for name, text in now.items() if name not in before]


def ema_usable_step(step: int, decay: Callable[[int], float]) -> int | None:
    """Return the step at which the EMA stands for the weights of `step`, None if that is far off.

    The mean age of the weights in the EMA, A(n) = decay(n) (A(n - 1) + 1), gives the step that it
    stands for, n - A(n).
    """
    age, n = 0.0, 0
    while n - age < step:
        n += 1
        if n > 10 * step + 100_000:
            return None
        age = decay(n) * (age + 1)
    return n


def _warnings(
    series: Series, decay: Callable[[int], float] | None, last_step: int | None
) -> dict[str, str]:
    """Return the warnings that apply to a series, by a name for each kind."""
    losses = [entry for entry in series if entry.get("eval_loss", 0) > 0]
    rise = _loss_rises(losses)
    texts = {
        "lag": _ema_lags(losses, decay, last_step) if decay else None,
        "rise": rise,
        "skips": _steps_are_skipped(series),
        "stall": None if rise else _loss_stalls(losses),
    }
    return {name: text for name, text in texts.items() if text}


def _ema_lags(losses: Series, decay: Callable[[int], float], last_step: int | None) -> str | None:
    lags = False
    for entry in losses:
        gap = 1 - entry.get("eval_loss_raw", entry["eval_loss"]) / entry["eval_loss"]
        lags = gap > (LAG_FRACTION / 2 if lags else LAG_FRACTION)
    if not lags:
        return None
    step, loss, raw_loss = (losses[-1][name] for name in ("step", "eval_loss", "eval_loss_raw"))
    usable = ema_usable_step(step, decay)
    when = "only much later" if usable is None else f"at about step {_two_digits(usable):,}"
    hint = ""
    if usable is None or (last_step is not None and usable > last_step):
        hint = " That is after the end of this run: lower --ema_max_decay or --ema_power."
    return (
        f"The average lags: held-out loss {loss:.4f}, of the raw weights {raw_loss:.4f}. Usable "
        f"{when}; the raw weights are better now.{hint}"
    )


def _loss_rises(losses: Series) -> str | None:
    if len(losses) < 3 or losses[-1]["epoch"] < MIN_EPOCHS:
        return None
    best = min(losses[:-2], key=lambda entry: entry["eval_loss"])
    limit = (1 + RISE_FRACTION) * best["eval_loss"]
    if min(entry["eval_loss"] for entry in losses[-2:]) <= limit:
        return None
    rise = losses[-1]["eval_loss"] / best["eval_loss"] - 1
    return (
        f"{losses[-1]['epoch']:.0f} epochs, and the loss on held-out images has risen by "
        f"{rise:.0%} since step {best['step']:,}: expect copies of training images. More images, "
        "--random_flip (also --random_vertical_flip, --random_rotate90, --random_shift), --dropout "
        "0.1 or --pretrained_model_name_or_path help; so does stopping there (--keep_best)."
    )


def _steps_are_skipped(series: Series) -> str | None:
    skipped, steps = _increase(series, "skipped_steps"), _increase(series, "step")
    if skipped < MIN_SKIPPED or skipped < SKIPPED_FRACTION * (steps + skipped):
        return None
    return (
        f"{skipped / (steps + skipped):.0%} of the last {steps + skipped:,} steps were not finite "
        "and were skipped (fp16): --mixed_precision bf16 does not overflow, and a smaller "
        "--learning_rate may help."
    )


def _loss_stalls(losses: Series) -> str | None:
    if len(losses) <= PATIENCE:
        return None
    best = min(losses[:-PATIENCE], key=lambda entry: entry["eval_loss"])
    limit = (1 - FALL_FRACTION) * best["eval_loss"]
    if min(entry["eval_loss"] for entry in losses[-PATIENCE:]) < limit:
        return None
    return (
        f"The loss on held-out images no longer falls: it has been at {best['eval_loss']:.4f} "
        f"since step {best['step']:,}. Images can still become better (--eval_images measures "
        "them); a smaller --learning_rate may lower it."
    )


def _increase(series: Series, name: str) -> int:
    """Return by how much a count has grown with the newest evaluation."""
    counts = [0, 0, *(entry.get(name, 0) for entry in series)]
    return counts[-1] - counts[-2]


def _two_digits(step: int) -> int:
    """Return an estimated step, rounded to two digits."""
    return round(step, 2 - len(str(step)))
