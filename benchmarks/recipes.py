"""What quality.py tries: a recipe joins words by +, as in `batch64+lr3e-3+muon@0.02`.

A word is a setting of train.py, another UNet, or a change that train.py does not offer, made here
by replacing functions of its step while a model is trained. A number may follow it after an @.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D

from ddpm.config.train import OptimizationConfig
from ddpm.data import dataset
from ddpm.diffusion import objective
from ddpm.diffusion.unet import preset_config
from ddpm.file_io import write_json
from ddpm.training import loop, step

FLAGS = {
    "batch": "--train_batch_size={}",
    "lr": "--learning_rate={}",
    "warmup": "--lr_warmup_steps={}",
    "ema-power": "--ema_power={}",
    "dropout": "--dropout={}",
    "epsilon": "--prediction_type=epsilon",
    "no-snr": "--snr_gamma=None",
    "uniform": "--timestep_sampling=uniform",
    "logit-normal": "--timestep_sampling=logit_normal",
    "logit-mean": "--logit_mean={}",
    "logit-std": "--logit_std={}",
}
"""Settings of train.py, as in `batch@64`."""
UNETS: dict[str, dict[str, Any]] = {
    "groups-8": {"norm_num_groups": 8},
    "groups-4": {"norm_num_groups": 4},
    "no-middle": {"mid_block_type": None},
    "deep": {"layers_per_block": 2},
    "attention": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
}
"""Changes to the UNet; `channels@32,64` gives its levels other channels."""
NUM_BANDS = 20


@contextmanager
def recipe(name: str, folder: Path, unet: dict[str, Any] | None = None) -> Iterator[list[str]]:
    """Yield the flags of a recipe; its changes are made inside the block. KeyError for a word that
    is not known. `unet` is the config that its UNet starts from, the preset of 8 pixels without;
    what it becomes is written to `folder`."""
    flags: list[str] = []
    config = {"_class_name": "UNet2DModel", **(unet or preset_config(8, 1))}
    own_unet = unet is not None
    with ExitStack() as stack:
        for word in filter(None, name.split("+")):
            key, _, number = word.partition("@")
            if key in FLAGS:
                flags.append(FLAGS[key].format(number))
            elif key in UNETS or key == "channels":
                own_unet = True
                config |= UNETS[key] if key in UNETS else channels(*map(int, number.split(",")))
            elif key != "default":
                CHANGES[key](stack, *map(float, filter(None, number.split(","))))
        if own_unet:
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_json(folder / name / "config.json", config)
            flags.append(f"--model_config_name_or_path={folder / name}")
        yield flags


def channels(*per_level: int) -> dict[str, Any]:
    """Return the settings of a UNet with these channels in its levels."""
    return {
        "block_out_channels": per_level,
        "norm_num_groups": min(32, *per_level),
        "attention_head_dim": min(32, per_level[-1]),
    }


class Muon(torch.optim.Optimizer):
    """Muon for weights of two and more dimensions, AdamW for the others.

    The momentum of each matrix (a convolution is [out, in x height x width]) is made orthogonal:
    https://kellerjordan.github.io/posts/muon/. `muon_lr` follows the schedule of `config`.
    """

    def __init__(self, unet: UNet2DModel, config: OptimizationConfig, muon_lr: float):
        parameters = list(unet.parameters())
        matrices = [weight for weight in parameters if weight.ndim >= 2]
        others = [weight for weight in parameters if weight.ndim < 2]
        groups = [
            {"params": matrices, "factor": muon_lr / config.learning_rate},
            {"params": others, "factor": 1.0},
        ]
        super().__init__(groups, {"lr": config.learning_rate})
        self.momentum = 0.95
        self.betas, self.eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        matrices, others = self.param_groups
        by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for weight in matrices["params"]:
            mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
            mean.lerp_(weight.grad, 1 - self.momentum)
            update = weight.grad.lerp(mean, self.momentum).flatten(1)  # Nesterov
            by_shape.setdefault(update.shape, []).append((weight, update))
        for (rows, columns), pairs in by_shape.items():
            updates = orthogonalize(torch.stack([update for _, update in pairs]))
            rate = matrices["lr"] * matrices["factor"] * max(1.0, rows / columns) ** 0.5
            for (weight, _), update in zip(pairs, updates, strict=True):
                weight.sub_(update.view_as(weight), alpha=rate)
        for weight in others["params"]:
            self._adam(weight, others["lr"])

    def _adam(self, weight: torch.Tensor, lr: float) -> None:
        state, (beta1, beta2) = self.state[weight], self.betas
        if not state:
            state.update(step=0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        state["step"] += 1
        state["mean"].lerp_(weight.grad, 1 - beta1)
        state["square"].lerp_(weight.grad.square(), 1 - beta2)
        mean = state["mean"] / (1 - beta1 ** state["step"])
        square = state["square"] / (1 - beta2 ** state["step"])
        weight.sub_(mean / (square.sqrt() + self.eps), alpha=lr)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, R, C] with singular values near 1, by five Newton-Schulz steps."""
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    is_wide = x.shape[1] <= x.shape[2]
    x = x if is_wide else x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if is_wide else x.mT


def use_muon(stack: ExitStack, muon_lr: float) -> None:
    stack.enter_context(patch.object(step, "build_optimizer", partial(Muon, muon_lr=muon_lr)))


def stratify_timesteps(stack: ExitStack) -> None:
    """One timestep in each of B equally likely parts of their distribution, in random order."""

    def sample(shape, alphas_cumprod, generator, logit_normal):
        device, num_timesteps = alphas_cumprod.device, len(alphas_cumprod)
        noise = torch.randn(shape, generator=generator, device=device)
        offsets = torch.rand(shape[0], generator=generator, device=device)
        parts = torch.randperm(shape[0], generator=generator, device=device)
        quantiles = (parts + offsets) / shape[0]
        if logit_normal is None:
            return noise, (quantiles * num_timesteps).long()
        mean, std = logit_normal
        wanted = mean + std * torch.special.ndtri(quantiles)
        timesteps = torch.searchsorted(-0.5 * alphas_cumprod.logit(), wanted)
        return noise, timesteps.clamp(max=num_timesteps - 1)

    stack.enter_context(patch.object(step, "sample_noise_and_timesteps", sample))


def weigh_by_error(stack: ExitStack) -> None:
    """Weights 1 / E[error] of each noise level, by running means in 20 bands: what a learned
    uncertainty (arXiv 2312.02696) tends to."""
    means, last = torch.ones(NUM_BANDS), {}

    def sample(*arguments):
        noise, last["timesteps"] = objective.sample_noise_and_timesteps(*arguments)
        return noise, last["timesteps"]

    def loss(prediction, target, weights):
        errors = (prediction.float() - target).square().flatten(1).mean(1)
        bands = last["timesteps"] * NUM_BANDS // 1000
        for band, error in zip(bands.tolist(), errors.tolist(), strict=True):
            means[band].lerp_(torch.tensor(error), 0.02)
        return 0.3 * (errors / means[bands]).mean()

    stack.enter_context(patch.object(step, "sample_noise_and_timesteps", sample))
    stack.enter_context(patch.object(step, "diffusion_loss", loss))


def sample_by_error(stack: ExitStack) -> None:
    """Draw bands of timesteps by the root of their mean squared error, and weigh the errors so that
    their mean stays that of uniform timesteps (arXiv 2102.09672, section 3.3)."""
    squares, last = torch.ones(NUM_BANDS), {}

    def sample(shape, alphas_cumprod, generator, _):
        noise = torch.randn(shape, generator=generator)
        roots = squares.sqrt() + 0.01 * squares.sqrt().mean()
        bands = torch.multinomial(roots, shape[0], replacement=True, generator=generator)
        last.update(bands=bands, weights=roots.mean() / roots[bands])
        within = torch.rand(shape[0], generator=generator)
        return noise, ((bands + within) / NUM_BANDS * len(alphas_cumprod)).long()

    def loss(prediction, target, weights):
        errors = (prediction.float() - target).square().flatten(1).mean(1) * weights
        for band, error in zip(last["bands"].tolist(), errors.tolist(), strict=True):
            squares[band].lerp_(torch.tensor(error**2), 0.02)
        return (errors * last["weights"]).mean()

    stack.enter_context(patch.object(step, "sample_noise_and_timesteps", sample))
    stack.enter_context(patch.object(step, "diffusion_loss", loss))


def grow_batches(stack: ExitStack, smallest: float) -> None:
    """Batches that grow from `smallest` to the batch size over the run, by the same factor in equal
    parts of it. The images that quality.py counts are those of full batches."""
    rate, rows, done = loop.learning_rate, dataset.ImageDataset.rows, {"part": 0.0}

    def note_part(config: OptimizationConfig, step: int, total: int) -> float:
        done["part"] = step / total
        return rate(config, step, total)

    def first_rows(data: dataset.ImageDataset, start: int, count: int) -> list[int]:
        size = smallest * (count / smallest) ** done["part"]
        return rows(data, start, count)[: round(size)]

    stack.enter_context(patch.object(loop, "learning_rate", note_part))
    stack.enter_context(patch.object(dataset.ImageDataset, "rows", first_rows))


def compile_blocks(stack: ExitStack) -> None:
    """Compile each residual block of the UNet by itself."""
    build_unet = step.build_unet

    def build(*arguments, **keywords):
        unet = build_unet(*arguments, **keywords)
        for module in unet.modules():
            if isinstance(module, ResnetBlock2D):
                module.compile(dynamic=False)
        return unet

    stack.enter_context(patch.object(step, "build_unet", build))


def decay_late(stack: ExitStack, part: float = 0.4) -> None:
    """A constant rate after the warm-up, then linear to 0 over the last part of the run."""

    def rate(config: OptimizationConfig, done: int, total: int) -> float:
        warmup = min(1.0, done / max(1, config.lr_warmup_steps))
        return config.learning_rate * min(warmup, (total - done) / max(1, part * total))

    stack.enter_context(patch.object(loop, "learning_rate", rate))


def zero_outputs(stack: ExitStack) -> None:
    """Zero the last convolution of the UNet and of each of its residual blocks at the start."""
    build_unet = step.build_unet

    def build(*arguments, **keywords):
        unet = build_unet(*arguments, **keywords)
        torch.nn.init.zeros_(unet.conv_out.weight)
        for module in unet.modules():
            if isinstance(module, ResnetBlock2D):
                torch.nn.init.zeros_(module.conv2.weight)
        return unet

    stack.enter_context(patch.object(step, "build_unet", build))


CHANGES: dict[str, Callable[..., None]] = {
    "muon": use_muon,
    "stratified": stratify_timesteps,
    "error-weights": weigh_by_error,
    "error-sampling": sample_by_error,
    "grow": grow_batches,
    "compile-blocks": compile_blocks,
    "late-decay": decay_late,
    "zero-outputs": zero_outputs,
}
"""Changes to a step, with the numbers after the @."""
