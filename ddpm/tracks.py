"""Two more averages of the weights, from which any EMA length can be built after training.

    OUTPUT_DIR/ema/step-000960.safetensors           both averages after a step, float32
    OUTPUT_DIR/checkpoint-1000/tracks.safetensors    the same, to go on from

Snapshots lie beside the checkpoints, so that pruning those takes nothing away. Which steps have one
is a function of the step alone: the newest twelve at the shortest interval, six at twice that
before them, then one at every four; the interval doubles as the run grows. So there are at most
`MOST`, dense where short averages need them. What they are for: profiles.py and lengths.py.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpm import profiles, runfolder
from ddpm.ema import put, whole
from ddpm.errors import UserError

SIGMA_RELS = (0.05, 0.10)
"""Lengths of the two averages, those of the paper."""
SHORTEST, FINEST, WINDOW = 4, 64, 12
"""Steps between snapshots at the start; how many such intervals a run has at most; how many of the
newest of them keep their snapshots."""
MOST = 28
"""Most snapshots of one run."""


class Tracks:
    """Power-function averages of a model's trainable parameters, float32: {sigma_rel: {name: ...}}.

    `began` is the optimizer step after which they began; what came before is not in them.
    """

    def __init__(self, module: torch.nn.Module):
        self._weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._gammas = {sigma_rel: profiles.gamma_of(sigma_rel) for sigma_rel in SIGMA_RELS}
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
            share = 1.0 - profiles.decay(step, self._gammas[sigma_rel])
            torch._foreach_lerp_(list(average.values()), weights, share)

    def state(self) -> dict[str, torch.Tensor]:
        """Both in full, by "sigma_rel/name". Call on every process: a sharded model is gathered."""
        return {
            f"{sigma_rel}/{name}": whole(value)
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
                put(value, file.get_tensor(name))
            self.began = int(file.metadata()["began"])

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Begin with the weights as they are after `step`."""
        for average in self.averages.values():
            torch._foreach_copy_(list(average.values()), list(self._weights.values()))
        self.began = step

    def resume(self, checkpoint: Path, step: int, say: Callable[[str], None]) -> None:
        """Go on from a checkpoint of `step`, or begin there when it is of a run without them."""
        if (checkpoint / runfolder.TRACKS).is_file():
            self.load(checkpoint / runfolder.TRACKS)
        else:
            self.begin(step)
            say(f"{checkpoint} has no {runfolder.TRACKS}: the averages that EMA lengths are built "
                f"from begin at step {step:,}.")  # fmt: skip

    def snapshot(self, output_dir: Path, step: int, main: bool) -> None:
        """Write the snapshot of `step`, whole or not at all, and thin out the older ones.

        Call on every process. UserError for a disk that cannot take it.
        """
        path = output_dir / runfolder.EMA_SNAPSHOTS / f"step-{step:06d}.safetensors"
        partial = path.with_name(f".{path.name}.partial")
        try:
            if main:
                path.parent.mkdir(exist_ok=True)
            self.save(partial, step, main)
            if main:
                runfolder.put_in_place(partial, path)
        except (OSError, SafetensorError) as error:
            reason = runfolder.why_not_written(error, output_dir)
            partial.unlink(missing_ok=True)
            raise UserError(
                f"{path} could not be written ({reason}). The checkpoints are untouched. Make "
                "room, then run the same command again; --no_post_hoc_ema goes on without."
            ) from error
        if main:
            for older, found in snapshots(output_dir).items():
                if not stays(older, step):
                    found.unlink()

    def announcement(self) -> str:
        """What they cost on disk, in a sentence."""
        values = sum(value.numel() for value in self.averages[SIGMA_RELS[0]].values())
        each = 4 * len(SIGMA_RELS) * values / 2**20
        return (
            f"--post_hoc_ema: at most {MOST} snapshots of {each:,.3g} MiB in "
            f"{runfolder.EMA_SNAPSHOTS}/ ({MOST * each:,.0f} MiB), and one more in each checkpoint."
        )


def interval(step: int) -> int:
    """Steps between the newest snapshots of a run that is at `step`."""
    found = SHORTEST
    while step > FINEST * found:
        found *= 2
    return found


def due(step: int) -> bool:
    """Whether `step` has a snapshot; the last step of a run has one anyway."""
    return step % interval(step) == 0


def stays(step: int, now: int) -> bool:
    """Whether the snapshot of `step` is kept once the one of `now` is written.

    What is kept at one step was kept at each before it, so a run that was stopped and resumed ends
    with the snapshots of one that was not.
    """
    every, age = interval(now), now - step
    recent = age < WINDOW * every and step % every == 0
    middle = age < 2 * WINDOW * every and step % (2 * every) == 0
    return age == 0 or recent or middle or step % (4 * every) == 0


def snapshots(output_dir: Path) -> dict[int, Path]:
    """The snapshots of a run, by their step, in rising order."""
    folder = output_dir / runfolder.EMA_SNAPSHOTS
    named = ((re.fullmatch(r"step-(\d+)\.safetensors", p.name), p) for p in folder.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def forget_after(output_dir: Path, step: int) -> None:
    """Delete the snapshots beyond `step`, which a run that goes on from there makes again."""
    for later, path in snapshots(output_dir).items():
        if later > step:
            path.unlink()
