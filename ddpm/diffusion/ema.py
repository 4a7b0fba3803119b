"""The moving average of the weights: what previews show and what is exported.

The decay warms up as a power function of the step, as in diffusers' EMAModel: early averages forget
the random start quickly. Averages are float32 and kept up to date by fused tensor lists.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from ddpm.config.train import EMAConfig


class EMA:
    """Averages of a model's trainable parameters: `average` maps each name to a float32 tensor."""

    def __init__(self, module: torch.nn.Module, config: EMAConfig):
        self.config = config
        self._weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone().float() for n, p in self._weights.items()}

    def decay(self, step: int) -> float:
        """Weight of the old average in the update after optimizer step `step` = 1, 2, ...

        min(max_decay, 1 - (1 + (step - 1) / inv_gamma) ** -power), 0 at the first step.
        """
        warming = 1.0 - (1.0 + (step - 1) / self.config.ema_inv_gamma) ** -self.config.ema_power
        return min(max(warming, 0.0), self.config.ema_max_decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold the weights after optimizer step `step` into the average."""
        weights = [weight.detach().float() for weight in self._weights.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1.0 - self.decay(step))

    def state(self) -> dict[str, torch.Tensor]:
        """The averages in full, to be saved. Call on every process: a sharded model is gathered."""
        return {name: full_tensor(value) for name, value in self.average.items()}

    @torch.no_grad()
    def load(self, average: dict[str, torch.Tensor]) -> None:
        """Take over averages that `state` gave; KeyError when they belong to another model."""
        if average.keys() != self.average.keys():
            raise KeyError("the averages belong to another model")
        for name, value in average.items():
            copy_to_shard(self.average[name], value)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The module with averaged weights; put back as it was at the end, also after an error.

        In place, since a sharded or compiled module keeps hold of its tensors.
        """
        with torch.no_grad():
            raw = {name: weight.detach().clone() for name, weight in self._weights.items()}
        try:
            self._set(self.average)
            yield
        finally:
            self._set(raw)

    @torch.no_grad()
    def _set(self, values: dict[str, torch.Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP has cut over the processes, put together; any other as it is.

    Call on every process. (A DTensor is known by its method: importing the class takes 0.7 s.)
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_to_shard(own: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor into one that FSDP may have cut over the processes. Call on every one."""
    if hasattr(own, "placements"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, own.device_mesh, own.placements)
    own.copy_(value)


@contextmanager
def eval_weights(module: torch.nn.Module, ema: EMA | None) -> Iterator[None]:
    """The module as it is shown to others: averaged if there is an average, in eval mode.

    A compiled one runs plainly here: other modes and batch sizes would each be compiled anew.
    """
    was_training = module.training
    module.eval()
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            ema.swapped_in() if ema is not None else nullcontext(),
        ):
            yield
    finally:
        module.train(was_training)
