"""Classifier-free guidance: the prediction for a class, moved away from that without one.

With the predictions e(x_t, c) for class c and e(x_t) for the null class, guidance of scale w uses

    e(x_t) + w (e(x_t, c) - e(x_t))                                   (arXiv 2207.12598, eq. 6)

which is e(x_t, c) at w = 1 and e(x_t) at w = 0. In that paper's notation the scale is w = 1 + w'.
As targets of all prediction types are linear in x_t and e, it does not matter which one is guided.
The result is replaced by the prediction for its x_0 clipped to the range of pixels. Guidance may be
limited to an interval of noise levels (arXiv 2404.07724), outside of which the prediction is that
for the class.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel

from ddpm.config.sample import ALL_CLASSES
from ddpm.diffusion.class_labels import has_classes, null_label
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError

DEFAULT_GUIDANCE_SCALE = 2.0

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The prediction [B, C, H, W] float32 for x_t [B, C, H, W] float32 at a timestep []."""


class LabeledSeed(NamedTuple):
    """A seed and a class: it stands for the seed where images of several classes share seeds."""

    label: int
    seed: int


ImageKey = int | LabeledSeed


def seed_of(image: ImageKey) -> int:
    """Return the seed of an image."""
    return image.seed if isinstance(image, LabeledSeed) else image


@dataclass(frozen=True)
class ClassGuidance:
    """The class of each image, and how strongly images are guided to it.

    `label_of` gives the class of the image of a seed, from 0 to K; K is the null class. `interval`
    is that of noise levels t / T in which the guidance `scale` applies.
    """

    label_of: Callable[[Any], int]
    scale: float = DEFAULT_GUIDANCE_SCALE
    interval: tuple[float, float] = (0.0, 1.0)


def parse_class_label(class_label: str | int, class_names: Sequence[str], name: str) -> list[int]:
    """Return the ids of the classes that --class_label asks for: all of them, or that of one.

    A text is first compared with the names, then read as an id. UsageError if there is no such
    class; `name` is that of the model.
    """
    if class_label == ALL_CLASSES:
        return list(range(len(class_names)))
    if class_label in class_names:
        return [class_names.index(class_label)]
    is_id = re.fullmatch("[0-9]{1,9}", str(class_label), re.ASCII)
    if is_id and int(class_label) < len(class_names):
        return [int(class_label)]
    by_lower = {class_name.lower(): class_name for class_name in class_names}
    close = difflib.get_close_matches(str(class_label).lower(), by_lower, n=1)
    hint = f" Did you mean {by_lower[close[0]]}?" if close else ""
    raise UsageError(
        f"--class_label {class_label}: {name} has no such class. It has {len(class_names)}, with "
        f"the ids 0 to {len(class_names) - 1}, from {class_names[0]} to {class_names[-1]}.{hint}"
    )


def predictor(
    unet: UNet2DModel,
    scheduler: SamplingScheduler,
    seeds: Sequence[ImageKey],
    guidance: ClassGuidance | None = None,
) -> Predict:
    """Return the model's prediction for a batch of the images of `seeds`.

    The UNet computes in its own dtype. Without guidance, one with classes predicts for the null
    class. Scales 0 and 1 take one forward pass a step, others one of twice the batch.
    """
    if not has_classes(unet):
        return lambda noisy, timestep: _forward(unet, noisy, timestep, None)
    null = torch.full((len(seeds),), null_label(unet), device=unet.device)
    if guidance is None:
        return lambda noisy, timestep: _forward(unet, noisy, timestep, null)
    labels = torch.tensor([guidance.label_of(seed) for seed in seeds], device=unet.device)
    low, high = (len(scheduler.alphas_cumprod) * level for level in guidance.interval)

    def predict(noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scale = guidance.scale if low <= float(timestep) <= high else 1.0
        if scale in (0.0, 1.0):
            return _forward(unet, noisy, timestep, labels if scale else null)
        both = _forward(unet, torch.cat((noisy, noisy)), timestep, torch.cat((labels, null)))
        for_class, for_none = both.chunk(2)
        guided = for_none + scale * (for_class - for_none)
        return scheduler.clip_prediction(guided, noisy, timestep)

    return predict


def _forward(
    unet: UNet2DModel, noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    options = {} if labels is None else {"class_labels": labels}
    return unet(noisy.to(unet.dtype), timestep, **options).sample.float()
