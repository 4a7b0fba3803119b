"""Power-function averages of the weights, from which an EMA of any length is built after training.

    OUTPUT_DIR/ema/step-000960.safetensors           two averages after a step, float32
    OUTPUT_DIR/checkpoint-1000/tracks.safetensors    the same, to resume from

Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (arXiv 2312.02696,
section 3 and appendix C). The average with exponent gamma after step t is

    (gamma + 1) / t^(gamma + 1) * integral from 0 to t of tau^gamma theta(tau) dtau      (eq. 121)

so it scales with the run: early weights are forgotten as the run grows. Its length is given as
sigma_rel, the standard deviation of that weighting over tau in units of t: 0.10 is about the last
tenth. The formulas are pure functions in float64; t is in optimizer steps.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpm import file_io, run_folder
from ddpm.diffusion.ema import copy_to_shard, full_tensor
from ddpm.errors import UserError

SIGMA_RELS = (0.05, 0.10)
"""Lengths of the two averages that are kept, those of the paper."""
MIN_INTERVAL = 4
"""Steps between snapshots at the start of a run."""
MAX_INTERVALS = 64
"""Most intervals between snapshots in a run; the interval doubles as the run grows."""
WINDOW = 12
"""How many of the newest intervals keep a snapshot at each step; see `is_snapshot_kept`."""
MAX_SNAPSHOTS = 28
"""Most snapshots of a run."""


@dataclass(frozen=True)
class Profile:
    """The weighting over training steps of the average of length `sigma_rel` after `step` >= 1."""

    step: int
    sigma_rel: float


@dataclass(frozen=True)
class PosthocFit:
    """A profile as a weighted sum of given ones; `weights` has one for each, and they sum to 1.

    `error` is the root mean square of the residual relative to that of the profile: 0 is exact, 1
    is as bad as nothing.
    """

    weights: tuple[float, ...]
    error: float


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Return the exponent of an average of length `sigma_rel` in (0, 0.28]; 0.289 is the mean.

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2 (eq. 126).
    """
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def gamma_to_sigma_rel(gamma: float) -> float:
    """Return the length of an average with exponent `gamma` (eq. 123)."""
    return float(np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)))


def power_ema_decay(step: int, gamma: float) -> float:
    """Return the weight of the old average in the update after optimizer step 1, 2, ... (eq. 127).

    With (1 - 1/t)^(gamma + 1), step k gets exactly the integral of the profile from k - 1 to k.
    """
    return (1.0 - 1.0 / step) ** (gamma + 1.0)


def inner_products(one: Sequence[Profile], other: Sequence[Profile]) -> np.ndarray:
    """Return integrals over tau of products of two lists of profiles: [len(one), len(other)].

    Eq. 151: with steps s <= t of exponents a and b,
    (a + 1)(b + 1) / (a + b + 1) * (s / t)^b / t.
    """
    steps, gammas = _steps_and_gammas(one)
    other_steps, other_gammas = _steps_and_gammas(other)
    steps, gammas = steps[:, None], gammas[:, None]
    later_gammas = np.where(steps < other_steps, other_gammas, gammas)
    later_steps = np.maximum(steps, other_steps)
    overlap = (np.minimum(steps, other_steps) / later_steps) ** later_gammas
    factors = (gammas + 1) * (other_gammas + 1) / (gammas + other_gammas + 1)
    return factors * overlap / later_steps


def solve_posthoc_weights(given: Sequence[Profile], target: Profile) -> PosthocFit:
    """Return the least-squares fit of `given` profiles to `target` (algorithm 3), scaled to sum 1.

    A target that is among the given ones is that one alone, exactly.
    """
    if target in given:
        return PosthocFit(tuple(float(profile == target) for profile in given), 0.0)
    products, targets = inner_products(given, given), inner_products(given, [target])[:, 0]
    # Solve for unit vectors: the norms of the profiles differ by the length of the run.
    scale = 1 / np.sqrt(np.diag(products))
    solution = np.linalg.lstsq(products * scale[:, None] * scale, targets * scale, rcond=1e-13)[0]
    weights = solution * scale
    weights = weights / weights.sum()
    norm = inner_products([target], [target])[0, 0]
    residual = norm - 2 * weights @ targets + weights @ products @ weights
    return PosthocFit(tuple(weights.tolist()), float(np.sqrt(max(residual, 0.0) / norm)))


def _steps_and_gammas(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([profile.step for profile in profiles], dtype=np.float64)
    return steps, np.array([sigma_rel_to_gamma(profile.sigma_rel) for profile in profiles])


class PowerEMA:
    """Power-function averages of a model's trainable parameters, float32: {sigma_rel: {name: ...}}.

    `began` is the optimizer step after which they began; they hold nothing from before.
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
        """Add the weights after optimizer step `step` = 1, 2, ... to both averages."""
        weights = [weight.detach().float() for weight in self._weights.values()]
        for sigma_rel, average in self.averages.items():
            decay = power_ema_decay(step, self._gammas[sigma_rel])
            torch._foreach_lerp_(list(average.values()), weights, 1.0 - decay)

    def state(self) -> dict[str, torch.Tensor]:
        """Return both unsharded averages by "sigma_rel/name". Call on every process."""
        return {name: full_tensor(value) for name, value in self._named().items()}

    def save(self, path: Path, step: int, main: bool) -> None:
        """Write both averages after `step` on the main process. Call on every process."""
        tensors = self.state()
        if main:
            save_file(tensors, path, {"step": str(step), "began": str(self.began)})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Load what `save` wrote. Raise KeyError if it belongs to another model."""
        averages = self._named()
        with safe_open(path, "pt") as file:
            if set(file.keys()) != averages.keys():
                raise KeyError("the averages belong to another model")
            for name, value in averages.items():
                copy_to_shard(value, file.get_tensor(name))
            self.began = int(file.metadata()["began"])

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Begin with the weights as they are after `step`."""
        for average in self.averages.values():
            torch._foreach_copy_(list(average.values()), list(self._weights.values()))
        self.began = step

    def resume(self, checkpoint: Path, step: int, report: Callable[[str], None]) -> None:
        """Load the averages of a checkpoint of `step`, or report that it has none and begin."""
        path = checkpoint / run_folder.POWER_EMA
        if path.is_file():
            self.load(path)
            return
        self.begin(step)
        report(
            f"{checkpoint} has no {path.name}: the averages that EMA lengths are built from begin "
            f"at step {step:,}."
        )

    def snapshot(self, output_dir: Path, step: int, main: bool) -> None:
        """Write the snapshot of `step` atomically, and delete older ones that are not kept.

        Call on every process. Raise UserError if the disk cannot take it.
        """
        path = output_dir / run_folder.EMA_SNAPSHOTS / f"step-{step:06d}.safetensors"
        partial = path.with_name(f".{path.name}.partial")
        try:
            if main:
                path.parent.mkdir(exist_ok=True)
            self.save(partial, step, main)
            if main:
                file_io.fsync_and_rename(partial, path)
        except (OSError, SafetensorError) as error:
            reason = file_io.write_failure_reason(error, output_dir)
            partial.unlink(missing_ok=True)
            raise UserError(
                f"{path} could not be written ({reason}). The checkpoints are untouched. Free "
                "some space, then run the same command again; --no_post_hoc_ema goes on without."
            ) from error
        if main:
            for older_step, older_path in list_snapshots(output_dir).items():
                if not is_snapshot_kept(older_step, step):
                    older_path.unlink()

    def announcement(self) -> str:
        """Return a sentence on the disk space that the snapshots need."""
        mebibytes = sum(4 * value.numel() for value in self._named().values()) / 2**20
        return (
            f"--post_hoc_ema: at most {MAX_SNAPSHOTS} snapshots of {mebibytes:,.3g} MiB in "
            f"{run_folder.EMA_SNAPSHOTS}/ ({MAX_SNAPSHOTS * mebibytes:,.0f} MiB), and one more in "
            "each checkpoint."
        )

    def _named(self) -> dict[str, torch.Tensor]:
        return {
            f"{sigma_rel}/{name}": value
            for sigma_rel, average in self.averages.items()
            for name, value in average.items()
        }


def snapshot_interval(step: int) -> int:
    """Return the number of steps between the newest snapshots of a run that is at `step`."""
    interval = MIN_INTERVAL
    while step > MAX_INTERVALS * interval:
        interval *= 2
    return interval


def snapshot_due(step: int) -> bool:
    """Return whether `step` has a snapshot; the last step of a run always has one."""
    return step % snapshot_interval(step) == 0


def is_snapshot_kept(step: int, current_step: int) -> bool:
    """Return whether the snapshot of `step` is kept once that of `current_step` is written.

    The newest 12 are one interval apart, the 6 before them two, all others four: dense where short
    averages need them. A function of the steps alone, and whatever is kept at one step was kept at
    each step before it, so a resumed run ends with the snapshots of an uninterrupted one.
    """
    interval, age = snapshot_interval(current_step), current_step - step
    is_recent = age < WINDOW * interval and step % interval == 0
    is_middle = age < 2 * WINDOW * interval and step % (2 * interval) == 0
    return age == 0 or is_recent or is_middle or step % (4 * interval) == 0


def list_snapshots(output_dir: Path) -> dict[int, Path]:
    """Return the snapshots of a run by their step, in ascending order."""
    paths = (output_dir / run_folder.EMA_SNAPSHOTS).glob("step-*")
    matches = ((re.fullmatch(r"step-(\d+)\.safetensors", path.name), path) for path in paths)
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def delete_snapshots_after(output_dir: Path, step: int) -> None:
    """Delete the snapshots after `step`, which a run that resumes from there writes again."""
    for snapshot_step, path in list_snapshots(output_dir).items():
        if snapshot_step > step:
            path.unlink()


MAX_FIT_ERROR = 0.1
"""Largest error of a fit (`PosthocFit`) with which an average is built."""
MAX_UNSEEN = 1e-3
"""Largest fraction of an average that may come from before it began."""


@dataclass(frozen=True)
class PosthocEMA:
    """The averages that a run has kept, from which averages of other lengths are built.

    `files` maps each average to the safetensors file that holds it.
    """

    files: dict[Profile, Path]

    @property
    def step(self) -> int:
        """The last step that has averages, for which others are built."""
        return max(profile.step for profile in self.files)

    def fit(self, sigma_rel: float) -> PosthocFit:
        """Return the average of length `sigma_rel` after the last step as a sum of kept ones."""
        return solve_posthoc_weights(list(self.files), Profile(self.step, sigma_rel))

    def require(self, sigma_rels: Sequence[float]) -> None:
        """UserError if one of the lengths cannot be built; it names those that can."""
        impossible = [length for length in sigma_rels if self.fit(length).error > MAX_FIT_ERROR]
        if impossible:
            grid = [number / 200 for number in range(1, 57)]  # 0.005 to 0.28
            possible = [length for length in grid if self.fit(length).error <= MAX_FIT_ERROR]
            raise UserError(
                f"--ema_lengths {', '.join(map(str, impossible))}: the {len(self.files)} averages "
                f"of this run cannot be added up to that, to {MAX_FIT_ERROR:.0%}. Give lengths "
                f"from {min(possible)} to {max(possible)}."
            )

    def build(self, sigma_rel: float) -> dict[str, torch.Tensor]:
        """Return the weights averaged over `sigma_rel`, float32 on the CPU.

        A length that was kept is returned as it is. Others are added up in float64, because the sum
        may have large weights of both signs.
        """
        total: dict[str, torch.Tensor] = {}
        weights = self.fit(sigma_rel).weights
        for (profile, path), weight in zip(self.files.items(), weights, strict=True):
            if weight:
                with safe_open(path, "pt") as file:
                    for key in file.keys():  # noqa: SIM118 (a file, not a dict)
                        length, _, name = key.partition("/")
                        if float(length) == profile.sigma_rel:
                            value = weight * file.get_tensor(key).double()
                            total[name] = total[name] + value if name in total else value
        return {name: value.float() for name, value in total.items()}


def open_posthoc_ema(output_dir: Path) -> PosthocEMA:
    """Find the averages in the snapshots and the checkpoints of a run.

    UserError for a run without any, and for files that cannot be read.
    """
    paths = {
        step: folder / run_folder.POWER_EMA
        for step, folder in run_folder.checkpoints(output_dir).items()
    }
    paths |= list_snapshots(output_dir)
    paths = {step: path for step, path in sorted(paths.items()) if path.is_file()}
    files: dict[Profile, Path] = {}
    for step, path in paths.items():
        try:
            with safe_open(path, "pt") as file:
                began = int(file.metadata()["began"])
                lengths = {float(key.partition("/")[0]) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}). Move it away; the others may be enough."
            ) from None
        for length in sorted(lengths):
            # The integral of the profile from 0 to `began`
            if (began / step) ** (sigma_rel_to_gamma(length) + 1) <= MAX_UNSEEN:
                files[Profile(step, length)] = path
    if not files:
        raise UserError(
            f"{output_dir} holds no averages that began{' long enough ago' if paths else ''} to "
            "build EMA lengths from: train with --post_hoc_ema. A run that goes on can begin with "
            "it too."
        )
    return PosthocEMA(files)
