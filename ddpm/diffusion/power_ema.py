"""Power-function averages of weights: what each weighs, and one as a sum of others.

After Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models
(arXiv 2312.02696, section 3 and appendix C). The average of exponent gamma after step t is

    (gamma + 1) / t^(gamma + 1) * integral from 0 to t of tau^gamma theta(tau) dtau      (eq. 121)

so it scales with the run: early weights are forgotten as the run grows. People give its length as
sigma_rel, the standard deviation of that weighting over tau in units of t: 0.10 is "about the last
tenth". Pure functions in float64; t is in optimizer steps.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpm import run_folder
from ddpm.diffusion.ema import copy_to_shard, full_tensor
from ddpm.errors import UserError


@dataclass(frozen=True)
class Profile:
    """The power-function average of length `sigma_rel` after optimizer step `step`, 1 or later."""

    step: int
    sigma_rel: float


@dataclass(frozen=True)
class PosthocFit:
    """A wanted profile as a sum of given ones: a weight for each, which together are 1.

    `error`: what is left over, relative to the wanted one, both as root mean squares over the
    steps: 0 is exact, 1 is nothing of it.
    """

    weights: tuple[float, ...]
    error: float


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent of an average of length `sigma_rel`, above 0 to 0.28 (0.289 is the plain mean).

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2 (eq. 126).
    """
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def gamma_to_sigma_rel(gamma: float) -> float:
    """The length of an average of exponent `gamma` (eq. 123)."""
    return float(np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)))


def power_ema_decay(step: int, gamma: float) -> float:
    """Weight of the old average in the update after optimizer step `step` = 1, 2, ... (eq. 127).

    (1 - 1/t)^(gamma + 1): so step k ends with exactly the integral of the profile from k - 1 to k.
    """
    return (1.0 - 1.0 / step) ** (gamma + 1.0)


def inner_products(one: Sequence[Profile], other: Sequence[Profile]) -> np.ndarray:
    """Integrals over tau of the products of two lists of profiles: [len(one), len(other)].

    Eq. 151: with s the shorter and t the longer of two steps, of exponents a and b:
    (a + 1)(b + 1) / (a + b + 1) * (s / t)^b / t.
    """
    steps, gammas = _columns(one)
    others, exponents = _columns(other)
    steps, gammas = steps[:, None], gammas[:, None]
    later = np.where(steps < others, exponents, gammas)
    longest = np.maximum(steps, others)
    overlap = (np.minimum(steps, others) / longest) ** later
    return (gammas + 1) * (exponents + 1) / (gammas + exponents + 1) * overlap / longest


def solve_posthoc_weights(given: Sequence[Profile], wanted: Profile) -> PosthocFit:
    """The sum of `given` profiles that comes nearest to `wanted` (algorithm 3), scaled to 1.

    A profile that is among the given is that one alone, to the bit.
    """
    if wanted in given:
        return PosthocFit(tuple(float(each == wanted) for each in given), 0.0)
    products, targets = inner_products(given, given), inner_products(given, [wanted])[:, 0]
    # Each profile as a unit vector: they differ by the length of the run
    unit = 1 / np.sqrt(np.diag(products))
    solved = np.linalg.lstsq(products * unit[:, None] * unit, targets * unit, rcond=1e-13)[0]
    weights = solved * unit
    weights = weights / weights.sum()
    size = inner_products([wanted], [wanted])[0, 0]
    left = size - 2 * weights @ targets + weights @ products @ weights
    return PosthocFit(tuple(weights.tolist()), float(np.sqrt(max(left, 0.0) / size)))


def _columns(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([each.step for each in profiles], dtype=np.float64)
    return steps, np.array([sigma_rel_to_gamma(each.sigma_rel) for each in profiles])


# Two more averages of the weights, from which any EMA length can be built after training.
#
#     OUTPUT_DIR/ema/step-000960.safetensors           both averages after a step, float32
#     OUTPUT_DIR/checkpoint-1000/tracks.safetensors    the same, to go on from
#
# Snapshots lie beside the checkpoints, so that pruning those takes nothing away. Which steps have one
# is a function of the step alone: the newest twelve at the shortest interval, six at twice that
# before them, then one at every four; the interval doubles as the run grows. So there are at most
# `MOST`, dense where short averages need them. What they are for: profiles.py and lengths.py.

SIGMA_RELS = (0.05, 0.10)
"""Lengths of the two averages, those of the paper."""
SHORTEST, FINEST, WINDOW = 4, 64, 12
"""Steps between snapshots at the start; how many such intervals a run has at most; how many of the
newest of them keep their snapshots."""
MAX_SNAPSHOTS = 28
"""Most snapshots of one run."""


class PowerEMA:
    """Power-function averages of a model's trainable parameters, float32: {sigma_rel: {name: ...}}.

    `began` is the optimizer step after which they began; what came before is not in them.
    """

    def __init__(self, module: torch.nn.Module):
        self._weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._gammas = {sigma_rel: sigma_rel_to_gamma(sigma_rel) for sigma_rel in SIGMA_RELS}
        self.averages = {
            sigma_rel: {n: p.detach().clone().float() for n, p in self._weights.items()}
            for sigma_rel in SIGMA_RELS
        }
        self.began = 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold the weights after optimizer step `step` = 1, 2, ... into both averages."""
        weights = [weight.detach().float() for weight in self._weights.values()]
        for sigma_rel, average in self.averages.items():
            share = 1.0 - power_ema_decay(step, self._gammas[sigma_rel])
            torch._foreach_lerp_(list(average.values()), weights, share)

    def state(self) -> dict[str, torch.Tensor]:
        """Both in full, by "sigma_rel/name". Call on every process: a sharded model is gathered."""
        return {
            f"{sigma_rel}/{name}": full_tensor(value)
            for sigma_rel, average in self.averages.items()
            for name, value in average.items()
        }

    def save(self, path: Path, step: int, main: bool) -> None:
        """Write both after `step` on the `main` process. Call on every one."""
        tensors = self.state()
        if main:
            save_file(tensors, path, {"step": str(step), "began": str(self.began)})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Take over what `save` wrote; KeyError when it belongs to another model."""
        with safe_open(path, "pt") as file:
            own = {f"{s}/{n}": value for s, a in self.averages.items() for n, value in a.items()}
            if set(file.keys()) != own.keys():
                raise KeyError("the averages belong to another model")
            for name, value in own.items():
                copy_to_shard(value, file.get_tensor(name))
            self.began = int(file.metadata()["began"])

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Begin with the weights as they are after `step`."""
        for average in self.averages.values():
            torch._foreach_copy_(list(average.values()), list(self._weights.values()))
        self.began = step

    def resume(self, checkpoint: Path, step: int, say: Callable[[str], None]) -> None:
        """Go on from a checkpoint of `step`, or begin there when it is of a run without them."""
        if (checkpoint / run_folder.POWER_EMA).is_file():
            self.load(checkpoint / run_folder.POWER_EMA)
        else:
            self.begin(step)
            say(
                f"{checkpoint} has no {run_folder.POWER_EMA}: the averages that EMA lengths are built "
                f"from begin at step {step:,}."
            )

    def snapshot(self, output_dir: Path, step: int, main: bool) -> None:
        """Write the snapshot of `step`, whole or not at all, and thin out the older ones.

        Call on every process. UserError for a disk that cannot take it.
        """
        path = output_dir / run_folder.EMA_SNAPSHOTS / f"step-{step:06d}.safetensors"
        partial = path.with_name(f".{path.name}.partial")
        try:
            if main:
                path.parent.mkdir(exist_ok=True)
            self.save(partial, step, main)
            if main:
                run_folder.fsync_and_rename(partial, path)
        except (OSError, SafetensorError) as error:
            reason = run_folder.write_failure_reason(error, output_dir)
            partial.unlink(missing_ok=True)
            raise UserError(
                f"{path} could not be written ({reason}). The checkpoints are untouched. Make "
                "room, then run the same command again; --no_post_hoc_ema goes on without."
            ) from error
        if main:
            for older, found in list_snapshots(output_dir).items():
                if not is_snapshot_kept(older, step):
                    found.unlink()

    def announcement(self) -> str:
        """What they cost on disk, in a sentence."""
        values = sum(value.numel() for value in self.averages[SIGMA_RELS[0]].values())
        each = 4 * len(SIGMA_RELS) * values / 2**20
        return (
            f"--post_hoc_ema: at most {MAX_SNAPSHOTS} snapshots of {each:,.3g} MiB in "
            f"{run_folder.EMA_SNAPSHOTS}/ ({MAX_SNAPSHOTS * each:,.0f} MiB), and one more in each checkpoint."
        )


def snapshot_interval(step: int) -> int:
    """Steps between the newest snapshots of a run that is at `step`."""
    found = SHORTEST
    while step > FINEST * found:
        found *= 2
    return found


def snapshot_due(step: int) -> bool:
    """Whether `step` has a snapshot; the last step of a run has one anyway."""
    return step % snapshot_interval(step) == 0


def is_snapshot_kept(step: int, now: int) -> bool:
    """Whether the snapshot of `step` is kept once the one of `now` is written.

    What is kept at one step was kept at each before it, so a run that was stopped and resumed ends
    with the snapshots of one that was not.
    """
    every, age = snapshot_interval(now), now - step
    recent = age < WINDOW * every and step % every == 0
    middle = age < 2 * WINDOW * every and step % (2 * every) == 0
    return age == 0 or recent or middle or step % (4 * every) == 0


def list_snapshots(output_dir: Path) -> dict[int, Path]:
    """The snapshots of a run, by their step, in rising order."""
    folder = output_dir / run_folder.EMA_SNAPSHOTS
    named = ((re.fullmatch(r"step-(\d+)\.safetensors", p.name), p) for p in folder.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def delete_snapshots_after(output_dir: Path, step: int) -> None:
    """Delete the snapshots beyond `step`, which a run that goes on from there makes again."""
    for later, path in list_snapshots(output_dir).items():
        if later > step:
            path.unlink()
