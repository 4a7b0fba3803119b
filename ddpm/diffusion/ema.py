"""The exponential moving average (EMA) of the weights, which previews and the export use.

The decay warms up as a power function of the step, as in diffusers' EMAModel, so early averages
soon forget the random initialization. Averages are float32, updated by fused operations on lists.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from ddpm.config.train import EMAConfig


class EMA:
    """Average of a model's trainable parameters: `average` maps each name to a float32 tensor."""

    def __init__(self, module: torch.nn.Module, config: EMAConfig):
        self.config = config
        self._weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone().float() for n, p in self._weights.items()}

    def decay(self, step: int) -> float:
        """Return the weight of the old average in the update after optimizer step 1, 2, ...

        min(max_decay, 1 - (1 + (step - 1) / inv_gamma) ** -power): 0 at the first step.
        """
        warmup = 1.0 - (1.0 + (step - 1) / self.config.ema_inv_gamma) ** -self.config.ema_power
        return min(max(warmup, 0.0), self.config.ema_max_decay)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after optimizer step `step` to the average."""
        weights = [weight.detach().float() for weight in self._weights.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1.0 - self.decay(step))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the unsharded average, to save it. Call on every process."""
        return {name: full_tensor(value) for name, value in self.average.items()}

    @torch.no_grad()
    def load(self, average: dict[str, torch.Tensor]) -> None:
        """Load what `state` returned. Raise KeyError if it belongs to another model."""
        if average.keys() != self.average.keys():
            raise KeyError("the averages belong to another model")
        for name, value in average.items():
            copy_to_shard(self.average[name], value)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the module the averaged weights; restore its own at the end, also after an error.

        Weights are copied in place, since a sharded or compiled module refers to its tensors.
        """
        with torch.no_grad():
            raw = {name: weight.detach().clone() for name, weight in self._weights.items()}
        try:
            self._copy_to_module(self.average)
            yield
        finally:
            self._copy_to_module(raw)

    @torch.no_grad()
    def _copy_to_module(self, values: dict[str, torch.Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(values[name])


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that FSDP has sharded; return any other as it is. Call on every process.

    A DTensor is recognized by its method, because importing the class takes 0.7 s.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copy_to_shard(destination: torch.Tensor, value: torch.Tensor) -> None:
    """Copy an unsharded tensor into one that FSDP may have sharded. Call on every process."""
    if hasattr(destination, "placements"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, destination.device_mesh, destination.placements)
    destination.copy_(value)


@contextmanager
def eval_weights(module: torch.nn.Module, ema: EMA | None) -> Iterator[None]:
    """Put the module into eval mode with averaged weights, if there is an EMA; restore both.

    A compiled module runs eagerly here: another mode or batch size would be compiled again.
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
