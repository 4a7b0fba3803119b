"""The settings of train.py: a frozen dataclass for each concern, with a sentence under each field.

Names are those of diffusers' examples, so that a command line written for them means the same here.
Checks of one section are in its `__post_init__`, checks across sections in that of TrainConfig;
all raise UsageError.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ddpm.config.base import (
    FLAG_ONLY,
    MIN_IMAGES,
    PLACE,
    as_flag,
    from_flags,
    nest,
    read_settings,
    require,
    require_at_least_one,
    require_fraction,
    require_no_file,
    require_not_negative,
    require_positive,
    require_revision,
)
from ddpm.config.data import DataConfig
from ddpm.config.values import Loggers, WaitPolicy, logger_names
from ddpm.errors import UsageError

SENDS = from_flags(lambda logger: not {"wandb", "trackio"}.isdisjoint(logger_names(logger)))
"""Metadata of the trackers, which can send the run elsewhere."""
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_TIMESTEPS = 100_000
"""Most timesteps of a model that is loaded here."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The UNet2DModel."""

    model_config_name_or_path: str | None = field(default=None, metadata=PLACE)
    """UNet2DModel config on the Hub or in a folder, instead of the preset for the resolution
    (docs/presets.md lists them). Only the architecture is used, not the weights."""
    pretrained_model_name_or_path: str | None = field(default=None, metadata=PLACE)
    """Model to fine-tune, on the Hub, in a run folder or a checkpoint: its weights, architecture,
    noise schedule and prediction type are used, and its resolution unless another is given
    (docs/fine-tuning.md)."""
    pretrained_revision: str | None = None
    """Branch, tag or commit of that model on the Hub; None is the newest on main."""
    dropout: float = 0.0
    """Dropout in the residual blocks; 0.1 helps on small datasets with many epochs."""

    def __post_init__(self) -> None:
        require_fraction(self, "dropout")
        require_revision(self, "pretrained_revision")
        if self.pretrained_model_name_or_path and self.model_config_name_or_path:
            raise UsageError(
                "Give --pretrained_model_name_or_path or --model_config_name_or_path, not both: a "
                "pretrained model has its own architecture."
            )
        if self.pretrained_revision and not self.pretrained_model_name_or_path:
            raise UsageError(
                "--pretrained_revision has no effect without --pretrained_model_name_or_path."
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noise, the prediction target, and the weight of the loss."""

    ddpm_num_steps: int = 1000
    """Number of timesteps T of the diffusion."""
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule: one of those that every sampler of diffusers accepts."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the UNet predicts: the noise, the velocity, or the clean image."""
    rescale_betas_zero_snr: bool = False
    """Rescale the schedule so that timestep T is pure noise (arXiv 2305.08891, algorithm 1); not
    with epsilon, from which nothing about the image can be learned there."""
    snr_gamma: float | None = None
    """Min-SNR weighting (arXiv 2303.09556), usually 5.0; None weights all timesteps equally."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the timesteps in training. logit_normal trains more at medium noise, where
    the shape of an image is decided: the logarithm of the noise level, sqrt((1 - abar) / abar), is
    normal (arXiv 2206.00364)."""
    logit_mean: float = -0.4
    """Mean of that logarithm; higher for larger images, whose shape is decided at more noise."""
    logit_std: float = 0.9
    """Standard deviation of that logarithm."""
    class_dropout_prob: float = 0.1
    """Probability that an image is trained on without its label, for class_conditional: the same
    UNet then learns both terms of classifier-free guidance (arXiv 2207.12598)."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "ddpm_num_steps")
        require_fraction(self, "class_dropout_prob")
        most = f"give at most {MAX_TIMESTEPS:,}"
        require(self, lambda steps: steps <= MAX_TIMESTEPS, most, "ddpm_num_steps")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise UsageError(
                f"--snr_gamma is {self.snr_gamma}; give a number above 0, or leave it out."
            )
        require_positive(self, "logit_std")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UsageError(
                "--rescale_betas_zero_snr makes timestep T pure noise, where predicting the noise "
                "says nothing about the image: use --prediction_type v_prediction or sample."
            )

    @property
    def logit_normal(self) -> tuple[float, float] | None:
        """Mean and standard deviation of logit_normal timesteps, None for uniform ones."""
        is_uniform = self.timestep_sampling == "uniform"
        return None if is_uniform else (self.logit_mean, self.logit_std)


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Length, batches, learning rate, optimizer and precision."""

    train_batch_size: int = 16
    """Images in one micro-batch of one process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one process in one optimizer step."""
    num_epochs: int = 100
    """Passes over the data, unless max_train_steps is given."""
    max_train_steps: int | None = None
    """Total number of optimizer steps; None is num_epochs passes."""
    budget: str | None = None
    """Time from launch to exit, resumed parts included (45s, 90m, 2h), instead of num_epochs: the
    number of steps follows from the speed, and the learning rate schedule ends on time."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "piecewise_constant",
    ] = "cosine"
    """Learning rate schedule over the optimizer steps, after the warm-up."""
    lr_warmup_steps: int = 500
    """Optimizer steps in which the learning rate rises from 0."""
    lr_num_cycles: int = 1
    """Number of restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Exponent of polynomial."""
    lr_step_rules: str | None = None
    """Rules of piecewise_constant: factor:step pairs and a last factor, as in
    1:1000,0.1:2000,0.01."""
    adam_beta1: float = 0.95
    """AdamW's decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """AdamW's decay of the mean of squared gradients."""
    adam_weight_decay: float = 1e-6
    """AdamW's decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's term against division by zero."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradients; larger ones are scaled down to it."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the model's forward pass; None is that of `accelerate launch`. Noise, targets,
    loss, weights and EMA stay float32."""
    gradient_checkpointing: bool = False
    """Keep fewer activations and compute them again in the backward pass: less memory, slower, the
    same losses."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the UNet, in place. auto compiles on a GPU when the run is long enough to gain
    from it; the log states the decision and its reason."""
    seed: int = 0
    """Seed of the weights, the order of the data, the noise and the crops."""

    def __post_init__(self) -> None:
        require_at_least_one(
            self,
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_epochs",
            "max_train_steps",
            "lr_num_cycles",
        )
        require_not_negative(
            self,
            "learning_rate",
            "lr_warmup_steps",
            "lr_power",
            "seed",
            "adam_epsilon",
            "adam_weight_decay",
        )
        require(self, lambda b: 0 <= b < 1, "give 0 to below 1", "adam_beta1", "adam_beta2")
        require_positive(self, "max_grad_norm")
        if self.lr_scheduler == "polynomial" and self.learning_rate <= 1e-7:
            raise UsageError(
                "--lr_scheduler polynomial ends at 1e-7: give a higher --learning_rate."
            )
        self._check_step_rules()
        _ = self.budget_seconds  # raises

    def _check_step_rules(self) -> None:
        rules = self.lr_step_rules
        if (self.lr_scheduler == "piecewise_constant") != (rules is not None):
            raise UsageError("--lr_scheduler piecewise_constant and --lr_step_rules go together.")
        number = r"\d+(\.\d+)?([eE]-?\d+)?"
        if rules is not None and not re.fullmatch(rf"({number}:\d+,)*{number}", rules):
            raise UsageError(
                f"--lr_step_rules {rules}: give factor:step pairs and a last factor, such as "
                "1:1000,0.1:2000,0.01 (the peak rate to step 1000, a tenth to 2000, then a "
                "hundredth)."
            )

    @property
    def budget_seconds(self) -> float | None:
        """`budget` in seconds."""
        if self.budget is None:
            return None
        parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", self.budget)
        seconds = sum(float(number) * SECONDS[unit] for number, unit in parts)
        text = "".join(number + unit for number, unit in parts)
        if text != self.budget or not 0 < seconds < math.inf:
            raise UsageError(f"--budget {self.budget}: give a time such as 45s, 90m, 2h or 1h30m.")
        return seconds


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """The moving average of the weights, from which previews and the pipeline are made."""

    use_ema: bool = True
    """Average the weights; otherwise the raw ones are exported."""
    ema_inv_gamma: float = 1.0
    """Inverse factor of the warm-up, decay = 1 - (1 + step / inv_gamma) ** -power."""
    ema_power: float = 0.75
    """Exponent of the warm-up."""
    ema_max_decay: float = 0.9999
    """Largest decay that the warm-up reaches."""
    post_hoc_ema: bool = False
    """Keep two power-function averages and snapshots of them in output_dir/ema, from which
    evaluate.py --ema_lengths builds averages of any length after training (arXiv 2312.02696): 8
    more bytes per weight in memory, at most 28 times that on disk."""

    def __post_init__(self) -> None:
        require_positive(self, "ema_inv_gamma")
        require_not_negative(self, "ema_power")
        require_fraction(self, "ema_max_decay")


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """The grids of images that are generated during training."""

    save_images_epochs: int = 10
    """Epochs between two grids, with another one at the end; 0 is never."""
    eval_batch_size: int = 16
    """Images in the grid, over all processes."""
    ddpm_num_inference_steps: int = 25
    """Denoising steps of a preview."""

    def __post_init__(self) -> None:
        require_not_negative(self, "save_images_epochs")
        require_at_least_one(self, "eval_batch_size", "ddpm_num_inference_steps")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured during training, on held-out and generated images. It changes no weight."""

    eval_steps: int = 0
    """Optimizer steps between two measurements, with another at the end, of the loss on held-out
    images (the test or validation split, or --held_out) by noise level, for raw and averaged
    weights; 0 is never."""
    eval_images: int = 0
    """Number of images to generate each time for their Frechet distance to the training images: at
    least 16, 1000 for a meaningful distance; 0 is none. Denoised in --ddpm_num_inference_steps."""
    features: str | None = field(default=None, metadata=FLAG_ONLY)
    """Feature network for --eval_images, as in evaluate.py; None is the one in the
    dataset's folder (features.safetensors, as in data/digits and data/emoji), else Inception."""
    keep_best: bool = False
    """Keep the best pipeline so far in OUTPUT_DIR/best, by the Frechet distance of --eval_images,
    else by the held-out loss of the exported weights."""

    def __post_init__(self) -> None:
        require_not_negative(self, "eval_steps", "eval_images")
        if 0 < self.eval_images < MIN_IMAGES:
            raise UsageError(
                f"--eval_images is {self.eval_images}: a distance of fewer than {MIN_IMAGES} "
                "images means nothing; give more, or 0."
            )
        for name in ("eval_images", "keep_best"):
            if getattr(self, name) and not self.eval_steps:
                raise UsageError(f"--{name} has no effect without --eval_steps: give the interval.")
        if self.features is not None and not self.eval_images:
            raise UsageError(
                "--features has no effect without --eval_images: give the number of images."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved during training."""

    checkpointing_steps: int = 500
    """Optimizer steps between two checkpoints of the training state; another one is saved at the
    end."""
    checkpoints_total_limit: int | None = None
    """Number of complete checkpoints to keep, the newest ones; None keeps all."""
    resume_from_checkpoint: str = field(default="latest", metadata=PLACE)
    """Checkpoint to resume from: `latest`, the path or name of a checkpoint folder, or
    hub://you/name-training-state for one on the Hub (see hub_checkpoints)."""
    save_model_epochs: int = 10
    """Epochs between two exports of the pipeline, with another at the end; 0 is only at the end."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "checkpointing_steps", "checkpoints_total_limit")
        require_not_negative(self, "save_model_epochs")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Logging. metrics.jsonl is always written."""

    logger: Loggers = field(default="none", metadata=SENDS)
    """Send scalars and grids to one or several of wandb, tensorboard and trackio. W&B is offline
    without a key; trackio is on this machine unless TRACKIO_SPACE_ID names a Space."""
    logging_dir: str = field(default="logs", metadata=PLACE)
    """Folder in output_dir for the files of W&B and TensorBoard."""
    logging_steps: int = 10
    """Optimizer steps between two entries of the metrics."""
    project_name: str = field(default="ddpm", metadata=PLACE)
    """Project of the W&B or trackio run."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "logging_steps")
        names = logger_names(self.logger) or ("none",)
        if "none" in names and len(names) > 1:
            raise UsageError(f"--logger {as_flag(names)}: leave out none, or the others.")
        object.__setattr__(self, "logger", names if len(names) > 1 else names[0])

    @property
    def loggers(self) -> tuple[str, ...]:
        """The trackers of the run."""
        return () if self.logger == "none" else logger_names(self.logger)


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Publishing the result, as push.py does."""

    push_to_hub: bool = field(default=False, metadata=FLAG_ONLY)
    """Publish the pipeline whenever it is exported, in the background, and at the end with proof.
    Write access is checked before the first step."""
    hub_model_id: str | None = field(default=None, metadata=FLAG_ONLY)
    """Repository (you/name); None is your name and the folder's."""
    hub_private_repo: bool = field(default=False, metadata=FLAG_ONLY)
    """Create the repository private."""
    hub_checkpoints: bool = field(default=False, metadata=FLAG_ONLY)
    """Keep the newest checkpoint in a private repository of its own, name-training-state, from
    which --resume_from_checkpoint hub://you/name-training-state resumes on any machine."""
    trust_checkpoint: bool = field(default=False, metadata=FLAG_ONLY)
    """Resume from a training state on the Hub that is not yours."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All of train.py's settings."""

    output_dir: str = field(default="ddpm-model-64", metadata=PLACE)
    """The run folder. At the end it is a DDPMPipeline that diffusers loads, with the record of the
    run."""
    overwrite_output_dir: bool = field(default=False, metadata=FLAG_ONLY)
    """Delete an earlier run in output_dir and start again, instead of resuming."""
    cpu_wait_policy: WaitPolicy = "auto"
    """How CPU threads wait for each other: spin (active), sleep (passive), or sleep while other
    work needs the cores (auto). On Linux only; OMP_WAIT_POLICY and GOMP_SPINCOUNT win."""
    ddp_timeout: int = 1800
    """Seconds after which processes that wait for another one end with an error that names it."""
    dry_run: bool = False
    """Print settings, data, size, speed and the expected time, and stop; writes no run."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        require_no_file("output_dir", self.output_dir)
        require_at_least_one(self, "ddp_timeout")
        week = 7 * SECONDS["d"]
        if self.ddp_timeout > week:
            raise UsageError(f"--ddp_timeout is {self.ddp_timeout} s; at most {week} s, a week.")
        steps, num_steps = self.preview.ddpm_num_inference_steps, self.diffusion.ddpm_num_steps
        if steps > num_steps:
            raise UsageError(
                f"--ddpm_num_inference_steps is {steps}, more than the {num_steps} timesteps of "
                "the diffusion (--ddpm_num_steps)."
            )
        if self.data.channels == 4 and self.data.background != "white":
            raise UsageError(
                f"--background {self.data.background} would fill transparent pixels, which "
                "--channels 4 trains as they are: leave one out."
            )
        dropout = self.diffusion.class_dropout_prob
        if dropout != DiffusionConfig.class_dropout_prob and not self.data.has_labels:
            raise UsageError(
                f"--class_dropout_prob {dropout:g} has no effect without classes: leave it out, or "
                "give --class_conditional or --label_column."
            )

    @classmethod
    def from_json(cls, path: Path) -> "TrainConfig":
        """Return the settings in a train_config.json or recipe; other fields have their defaults.

        Raise UserError for a file that cannot be read, UsageError for settings that cannot work.
        """
        return nest(cls, read_settings(cls, path))
