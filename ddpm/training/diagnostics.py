"""What is off in a run, in plain sentences: pure functions of the evaluations so far.

A series is the evaluations' lines of metrics.jsonl, the newest last: each has "step", "epoch" and
"eval_loss" (of the weights that are exported), with an average also "eval_loss_raw", and under fp16
"skipped_steps", how many the run has skipped so far. What is true of a series and was not true one
evaluation earlier is said; so each thing is said once, also in a run that was stopped and goes on.
"""

from collections.abc import Callable, Sequence
from typing import Any

LAG = 0.05
"""The average lags when the raw weights' loss is lower by this share, until it is so by half."""
RISE = 0.02
"""Held-out loss rises when it is above its least by this share, twice in a row ..."""
MANY_EPOCHS = 5
"""... which means something after so many epochs."""
SKIPPED, FEWEST_SKIPPED = 0.02, 5
"""Share of the steps since the evaluation before that were skipped, and how many they must be: the
gradient scaler finds its level by a few."""
FALL, PATIENCE = 0.005, 4
"""The loss no longer falls when so many evaluations did not bring it down by this share."""
FURTHEST = 10
"""How many times the steps so far, and 100,000 more, the average is reckoned ahead."""

Series = Sequence[dict[str, Any]]


def new_warnings(
    series: Series, decay: Callable[[int], float] | None, last_step: int | None
) -> list[str]:
    """The sentences that have begun to be true with the newest evaluation.

    `decay` is EMA.decay, None without an average; `last_step` the run's, None where only time ends
    it.
    """
    before = _true(series[:-1], decay, last_step)
    now = _true(series, decay, last_step)
    return [sentence for name, sentence in now.items() if name not in before]


def ema_usable_step(step: int, decay: Callable[[int], float]) -> int | None:
    """The step at which the average has come to where the weights of `step` are; None: very late.

    The mean age of the weights in the average, A(n) = decay(n) (A(n - 1) + 1), says which step it
    stands for, n - A(n).
    """
    age, n = 0.0, 0
    while n - age < step:
        n += 1
        if n > FURTHEST * step + 100_000:
            return None
        age = decay(n) * (age + 1)
    return n


def _true(
    series: Series, decay: Callable[[int], float] | None, last_step: int | None
) -> dict[str, str]:
    losses = [line for line in series if "eval_loss" in line]
    found = {
        "lags": _lags(losses, decay, last_step) if decay else None,
        "rises": _rises(losses),
        "skips": _skips(series),
    }
    if not found["rises"]:
        found["stalls"] = _stalls(losses)
    return {name: sentence for name, sentence in found.items() if sentence}


def _lags(losses: Series, decay: Callable[[int], float], last_step: int | None) -> str | None:
    lags = False
    for line in losses:
        share = 1 - line.get("eval_loss_raw", line["eval_loss"]) / line["eval_loss"]
        lags = share > (LAG / 2 if lags else LAG)
    if not lags:
        return None
    step, average, raw = (losses[-1][name] for name in ("step", "eval_loss", "eval_loss_raw"))
    usable = ema_usable_step(step, decay)
    when = "only much later" if usable is None else f"at about step {_rounded(usable)}"
    late = usable is None or (last_step is not None and usable > last_step)
    hint = " That is after the end of this run: lower --ema_max_decay or --ema_power." * late
    return (
        f"The average lags: held-out loss {average:.4f}, of the raw weights {raw:.4f}. Usable "
        f"{when}; the raw weights are better now.{hint}"
    )


def _rises(losses: Series) -> str | None:
    if len(losses) < 3 or losses[-1]["epoch"] < MANY_EPOCHS:
        return None
    least = min(losses[:-2], key=lambda line: line["eval_loss"])
    limit = (1 + RISE) * least["eval_loss"]
    if min(line["eval_loss"] for line in losses[-2:]) <= limit:
        return None
    share = losses[-1]["eval_loss"] / least["eval_loss"] - 1
    return (
        f"{losses[-1]['epoch']:.0f} epochs, and the loss on held-out images has risen by "
        f"{share:.0%} since step {least['step']:,}: expect copies of training images. More images, "
        "--random_flip or --dropout 0.1 help; so does stopping there (--keep_best)."
    )


def _skips(series: Series) -> str | None:
    skipped, steps = _of_last(series, "skipped_steps"), _of_last(series, "step")
    if skipped < FEWEST_SKIPPED or skipped < SKIPPED * (steps + skipped):
        return None
    return (
        f"{skipped / (steps + skipped):.0%} of the last {steps + skipped:,} steps were not finite "
        "and were skipped (fp16): --mixed_precision bf16 does not overflow, and a smaller "
        "--learning_rate may do."
    )


def _stalls(losses: Series) -> str | None:
    if len(losses) <= PATIENCE:
        return None
    before, after = losses[:-PATIENCE], losses[-PATIENCE:]
    least = min(before, key=lambda line: line["eval_loss"])
    if min(line["eval_loss"] for line in after) < (1 - FALL) * least["eval_loss"]:
        return None
    return (
        f"The loss on held-out images no longer falls: it has been at {least['eval_loss']:.4f} "
        f"since step {least['step']:,}. Pictures can still become better (--eval_images measures "
        "them); a smaller --learning_rate may lower it."
    )


def _of_last(series: Series, name: str) -> int:
    """How much a count has grown with the newest evaluation."""
    counts = [0, 0, *(line.get(name, 0) for line in series)]
    return counts[-1] - counts[-2]


def _rounded(step: int) -> str:
    """Two digits of a step: an estimate says no more."""
    size = 10 ** max(0, len(str(step)) - 2)
    return f"{round(step / size) * size:,}"
