"""The moving average of the weights: what previews show and what is exported.

The decay warms up as a power function of the step, as in diffusers' EMAModel: early averages forget
the random start quickly. Averages are float32 and kept up to date by fused tensor lists.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from ddpm.config import EMAConfig


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

    def load(self, average: dict[str, torch.Tensor]) -> None:
        """Take over averages that were saved; KeyError when they belong to another model."""
        if average.keys() != self.average.keys():
            raise KeyError("the averages belong to another model")
        for name, value in average.items():
            self.average[name].copy_(value)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The module with averaged weights; put back as it was at the end, also after an error."""
        raw = {name: weight.data for name, weight in self._weights.items()}
        try:
            for name, weight in self._weights.items():
                weight.data = self.average[name].to(weight.dtype)
            yield
        finally:
            for name, weight in self._weights.items():
                weight.data = raw[name]


@contextmanager
def evaluating(module: torch.nn.Module, ema: EMA | None) -> Iterator[None]:
    """The module as it is shown to others: averaged if there is an average, in eval mode."""
    was_training = module.training
    module.eval()
    try:
        with ema.swapped_in() if ema is not None else nullcontext():
            yield
    finally:
        module.train(was_training)
