"""Class labels: dropped in training, and folded into the weights of a UNet without classes.

A UNet2DModel with classes adds the row `class_embedding(label)` to the time embedding, of which
`linear_2` is the last operation. Adding the row of one label to the bias of `linear_2` therefore
gives the same function of (x_t, t) without a class embedding, which any DDPMPipeline can use:

    emb(t) + row = (W h(t) + b) + row = W h(t) + (b + row)

K classes have the ids 0 to K - 1; the null class, for images without a label, has the id K.
B: batch.
"""

import torch
from diffusers import UNet2DModel

EMBEDDING = "class_embedding.weight"
"""Name of the class embedding in the state dict, [K + 1, width of the time embedding]."""
FOLDED_BIAS = "time_embedding.linear_2.bias"


def null_label(unet: UNet2DModel) -> int:
    """Return the id K of the null class of a UNet with K classes."""
    return unet.config.num_class_embeds - 1


def has_classes(unet: UNet2DModel) -> bool:
    """Return whether the UNet has a class embedding."""
    return unet.config.num_class_embeds is not None


def drop_labels(
    labels: torch.Tensor, null_label: int, probability: float, generator: torch.Generator
) -> torch.Tensor:
    """Return labels [B] int64, each replaced by the null class with `probability`.

    So that one UNet learns both predictions of classifier-free guidance (arXiv 2207.12598,
    algorithm 1). `generator` is on the CPU, as the labels are.
    """
    is_dropped = torch.rand(len(labels), generator=generator) < probability
    return torch.where(is_dropped, null_label, labels)


def fold_label(unet: UNet2DModel, label: int) -> UNet2DModel:
    """Return a UNet2DModel without classes that predicts what `unet` does for `label`.

    Up to the rounding of one sum; in eval mode, on the same device.
    """
    weights = unet.state_dict()
    row = weights.pop(EMBEDDING)[label]
    weights[FOLDED_BIAS] = weights[FOLDED_BIAS] + row
    with torch.device("meta"):
        folded = UNet2DModel.from_config(unet.config, num_class_embeds=None)
    folded.load_state_dict(weights, assign=True)
    return folded.eval()
