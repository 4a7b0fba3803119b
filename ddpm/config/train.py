"""Every knob of training, once: frozen dataclasses by room, a sentence under each field.

Names are those of diffusers' examples, so that a command line written for them means the same here.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they become squares of pixels."""

    dataset_name: str | None = None
    """Dataset on the Hub (owner/name), a local folder laid out like one or made by save_to_disk, or
    a .parquet, .arrow, .tar (webdataset) or .zip file. With neither this nor train_data_dir,
    train.py trains recipes/digits.json."""
    train_data_dir: str | None = None
    """Local folder of image files, read as an `imagefolder`; instead of dataset_name."""
    resolution: int = 64
    """Height and width of the training images, in pixels."""
    dataset_config_name: str | None = None
    """Which configuration of the dataset; None takes its only or default one."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the dataset on the Hub; None takes the newest on main."""
    split: str = "train"
    """Which split to train on."""
    held_out: float = 0.0
    """Share of the split that is never trained on, so that the loss can be measured on it, from 0
    to below 1: for data without a test or validation split. The seed decides which rows."""
    image_column: str | None = None
    """Column that holds the images; None finds the one of type Image, whatever its name."""
    resize_mode: Literal["crop", "pad", "stretch"] = "crop"
    """How images that are not square become so: cut off what is over, pad with the background, or
    stretch."""
    center_crop: bool = False
    """Cut the middle square of images that are not square; otherwise a random one each time."""
    random_flip: bool = False
    """Mirror half of the images left to right, anew each time they are seen."""
    background: str = "white"
    """What shows through transparent pixels: a colour name or #rrggbb."""
    max_bad_images: float = 0.01
    """Share of the rows that may be unreadable (they are skipped and reported), from 0 to 1."""
    channels: Literal[1, 3] | None = None
    """Train gray (1) or colour (3); None trains gray when no image of the data has any colour."""
    value_range: str | None = None
    """LOW,HIGH: the values of black and white in images deeper than 8 bits; None is 0,65535 for
    integers and 0,1 for floats. Values outside make an image unreadable."""
    streaming: bool = False
    """Read the images from where they are in each epoch, for data larger than the disk
    (docs/data.md tells the limits), instead of decoding them once into the cache."""
    shuffle_buffer_size: int = 1000
    """Rows of a stream that are held in memory and shuffled together."""
    rows_per_epoch: int | None = None
    """Rows of a stream that count as an epoch; None takes what the dataset says of itself."""
    cache_dir: str | None = None
    """Where datasets keeps what it downloads; None is HF_DATASETS_CACHE."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The UNet2DModel."""

    model_config_name_or_path: str | None = None
    """UNet2DModel config on the Hub or in a folder, to use instead of the preset that belongs to
    the resolution (docs/presets.md lists them). Takes the architecture only, not the weights."""
    dropout: float = 0.0
    """Dropout in the residual blocks; 0.1 helps on small datasets that are seen many times."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noise, what the model predicts, and how its error is weighted."""

    ddpm_num_steps: int = 1000
    """Length T of the noising chain."""
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """How the noise grows along the chain. Only schedules that every sampler of diffusers loads."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the UNet predicts: the noise, the velocity, or the clean image."""
    rescale_betas_zero_snr: bool = False
    """End the chain in pure noise (arXiv 2305.08891, algorithm 1); not with epsilon, which says
    nothing of the image there."""
    snr_gamma: float | None = None
    """Min-SNR weighting (arXiv 2303.09556), usually 5.0; None weighs all timesteps alike."""


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """How long, in which batches, and with which optimizer."""

    train_batch_size: int = 16
    """Images of one process in one micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one process in one optimizer step."""
    num_epochs: int = 100
    """Passes over the data, if max_train_steps does not say otherwise."""
    max_train_steps: int | None = None
    """Optimizer steps in all; None is num_epochs passes."""
    budget: str | None = None
    """Time for the whole run from launch to exit, over all its parts (45s, 90m, 2h): the number of
    steps follows from the speed, and the learning rate ends on time. Instead of num_epochs."""
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
    """Course of the learning rate over the optimizer steps, after the warm-up."""
    lr_warmup_steps: int = 500
    """Optimizer steps over which the learning rate rises from 0."""
    lr_num_cycles: int = 1
    """Number of restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Exponent of polynomial."""
    lr_step_rules: str | None = None
    """Of piecewise_constant: factor:step pairs and a last factor, such as 1:1000,0.1:2000,0.01."""
    adam_beta1: float = 0.95
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_weight_decay: float = 1e-6
    """AdamW's decoupled weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's guard against division by zero."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm when theirs is larger."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the model's forward pass; None takes what `accelerate launch` was told. Noise,
    targets, loss, weights and EMA stay float32."""
    gradient_checkpointing: bool = False
    """Keep fewer activations and compute them again in the backward pass: less memory, slower; the
    same losses."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the UNet, in place. auto: on a GPU when the run is long enough to pay for it;
    the log says what was decided and why."""
    seed: int = 0
    """Seed of the weights, the order of the data, the noise and the crops."""


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """The moving average of the weights that previews, the pipeline and the Hub get."""

    use_ema: bool = True
    """Average the weights; without it the raw ones are exported."""
    ema_inv_gamma: float = 1.0
    """Inverse factor of the warm-up, decay = 1 - (1 + step / inv_gamma) ** -power."""
    ema_power: float = 0.75
    """Exponent of the warm-up."""
    ema_max_decay: float = 0.9999
    """Largest decay the warm-up may reach."""
    post_hoc_ema: bool = False
    """Keep two more averages and snapshots of them in output_dir/ema, from which evaluate.py
    --ema_lengths builds averages of any length after training: 8 more bytes a weight in memory, at
    most 28 times that on disk."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """The grids that are drawn on the way."""

    save_images_epochs: int = 10
    """Draw a grid every so many epochs, and at the end; 0 draws none."""
    eval_batch_size: int = 16
    """Images in the grid, over all processes."""
    ddpm_num_inference_steps: int = 25
    """Denoising steps of a preview."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured on the way, of held-out images and of drawn ones. It changes no weight."""

    eval_steps: int = 0
    """Measure every so many optimizer steps, and at the end: the loss on held-out images (the test
    or validation split, or --held_out) by noise level, raw and averaged weights; 0 is never."""
    eval_images: int = 0
    """Also draw so many images each time and take their Frechet distance to the training images;
    at least 16, 1000 to mean much, 0 draws none. Denoised in --ddpm_num_inference_steps."""
    features: str | None = None
    """File of the network whose features --eval_images compares, as in evaluate.py; None is the one
    that the dataset's folder brings (features.safetensors), else Inception."""
    keep_best: bool = False
    """Keep the best pipeline so far in OUTPUT_DIR/best, by the Frechet distance of --eval_images,
    else by the held-out loss of the exported weights."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept on the way."""

    checkpointing_steps: int = 500
    """Save the training state every so many optimizer steps, and at the end."""
    checkpoints_total_limit: int | None = None
    """Complete checkpoints to keep, the newest ones; None keeps all."""
    resume_from_checkpoint: str = "latest"
    """`latest`, the path or name of a checkpoint folder to go on from, or hub://you/name-training-state
    for one on the Hub (see hub_checkpoints)."""
    save_model_epochs: int = 10
    """Export the pipeline every so many epochs, and at the end; 0 only at the end."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Who is told. metrics.jsonl is always written."""

    logger: Literal["none", "wandb", "tensorboard"] = "none"
    """Send scalars and grids to Weights & Biases or TensorBoard; W&B is offline without a key."""
    logging_dir: str = "logs"
    """Folder in output_dir for the files of the tracker."""
    logging_steps: int = 10
    """Write metrics every so many optimizer steps."""
    project_name: str = "ddpm"
    """Project of the W&B run."""


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Publishing the result, as push.py would."""

    push_to_hub: bool = False
    """Publish the pipeline whenever it is exported, in the background, and at the end with proof;
    the right to do so is asked for before the first step."""
    hub_model_id: str | None = None
    """Where to (you/name); None is your name and the folder's."""
    hub_private_repo: bool = False
    """Create the repository private."""
    hub_checkpoints: bool = False
    """Keep the newest checkpoint in a private repository of its own, name-training-state, from
    which --resume_from_checkpoint hub://you/name-training-state goes on on any machine."""
    trust_checkpoint: bool = False
    """Go on from a training state on the Hub that is not yours."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All of train.py's settings."""

    output_dir: str = "ddpm-model-64"
    """The run folder: ends as a DDPMPipeline that diffusers loads, with the record beside it."""
    overwrite_output_dir: bool = False
    """Delete what an earlier run left in output_dir and start anew, instead of resuming."""
    dry_run: bool = False
    """Print settings, data, size, speed and how long it would take, and stop; writes no run."""
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


def flatten(config: Any) -> dict[str, Any]:
    """A config as one flat dict in the order of its fields: what train_config.json holds."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {item.name: value})
    return flat


def dump(config: Any) -> str:
    """A config as the JSON that `--config` reads back to the same config."""
    return json.dumps(flatten(config), indent=2)
