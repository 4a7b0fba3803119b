"""Load any model and generate image k from seed k with it.

A `Sampler` hides the kind of model: an unconditional one with a scheduler of our table, one with a
sampling loop of its own in diffusers, or a text-to-image pipeline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DModel

from ddpm.config.sample import SampleConfig
from ddpm.device import compile_failure_reason, prepare_device
from ddpm.diffusion import schedulers
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError, UserError, foreign_errors, printable
from ddpm.file_io import file_sha256
from ddpm.run_folder import CHECKPOINT_STATE, SAMPLER_TABLE
from ddpm.sampling import generate, inpaint, pipeline, pipeline_folder, text_to_image
from ddpm.sampling.guidance import (
    DEFAULT_GUIDANCE_SCALE,
    ClassGuidance,
    ImageKey,
    LabeledSeed,
    parse_class_label,
)
from ddpm.sampling.guidance_results import read_guidance_scale
from ddpm.sampling.outputs import GeneratedImages, OutputFolder, TrajectoryStep, class_text
from ddpm.sampling.pipeline import DiffusionModel
from ddpm.sampling.sampler_results import read_sampler_table

MAX_CLASS_IMAGES = 10**6
"""Most images of classes in one command: their keys are kept in memory."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sampler:
    """`generate(seeds)` yields (seed, [C, H, W] uint8).

    `metadata` is the text of the PNGs, all that an image is made from except its seed and class.
    `note` says which settings were chosen or replaced, if any. `labels` are the ids of the classes
    to draw, `class_names` the names of all.
    """

    metadata: dict[str, str]
    device: torch.device
    generate: Callable[[Sequence[ImageKey]], GeneratedImages]
    note: str = ""
    labels: Sequence[int] = ()
    class_names: tuple[str, ...] | None = None

    def __str__(self) -> str:
        text = self.metadata
        classes = ""
        if self.labels:
            what = f"class {self.class_names[self.labels[0]]} (id {self.labels[0]})"
            if len(self.labels) > 1:
                what = f"{len(self.labels)} classes"
            classes = f", {what}, guidance {text['guidance_scale']}"
        return printable(
            f"{text['model']} at {text['version'][:12]}, {text['scheduler']}, "
            f"{text['num_inference_steps']} steps{classes}, on {self.device}"
        )


@dataclass(frozen=True)
class LoadedModel:
    """A UNet on its device, the scheduler and the guidance for it; the rest as in Sampler."""

    unet: UNet2DModel
    scheduler: SamplingScheduler
    metadata: dict[str, str]
    note: str
    labels: Sequence[int] = ()
    class_names: tuple[str, ...] | None = None
    guidance: ClassGuidance | None = None


def load_sampler(config: SampleConfig) -> Sampler:
    """Load the model. UserError for one that cannot be loaded, UsageError for settings that do not
    fit it."""
    device = prepare_device(config.device, config.cpu_wait_policy)
    if config.prompt is not None:
        return _load_text_to_image(config, device)
    choice = _choose_scheduler(config)
    artifact = _load_artifact(config, choice)
    if artifact.kind in pipeline_folder.CUSTOM_LOOP_PIPELINES:
        return _load_custom_loop(artifact, config, device)
    model = _prepare(artifact, choice, config, device)
    draw = _generate_function(model, config)
    metadata = model.metadata
    if config.interpolate:
        first, last = config.interpolate
        metadata = {**metadata, "interpolate": f"{first} to {last} in {config.num_images}"}
    if config.mask is not None:
        metadata = {
            **metadata,
            "image_sha256": file_sha256(Path(config.image)),
            "mask_sha256": file_sha256(Path(config.mask)),
            "num_resamples": str(config.num_resamples),
        }
    return Sampler(metadata, device, draw, model.note, model.labels, model.class_names)


def image_seeds(config: SampleConfig, labels: Sequence[int]) -> Sequence[ImageKey]:
    """Return the seeds of all images, of each class the same. UsageError if there are too many."""
    first = 0 if config.interpolate else config.seed
    seeds = range(first, first + config.num_images)
    if len(labels) * len(seeds) > MAX_CLASS_IMAGES:
        raise UsageError(
            f"--num_images {config.num_images} of {len(labels)} classes: give at most "
            f"{MAX_CLASS_IMAGES // len(labels):,}, and draw more with --seed."
        )
    return [LabeledSeed(label, seed) for label in labels for seed in seeds] if labels else seeds


def load_unconditional(config: SampleConfig) -> LoadedModel:
    """Load an unconditional model for restoring --image. UsageError for another kind of noise."""
    choice = _choose_scheduler(config)
    artifact = _load_artifact(config, choice)
    if artifact.kind in pipeline_folder.CUSTOM_LOOP_PIPELINES:
        raise UsageError(
            f"--image: {artifact.name} is a {artifact.kind}, whose noise this command cannot add."
        )
    model = _prepare(
        artifact, choice, config, prepare_device(config.device, config.cpu_wait_policy)
    )
    if not model.labels:
        return model
    text = class_text(model.labels[0], model.class_names)
    return replace(model, metadata={**model.metadata, **text})


@dataclass(frozen=True)
class _SchedulerChoice:
    """Scheduler, steps and revision by the flags or by --quality, and guidance by the latter.

    None is the default.
    """

    scheduler: str | None
    num_inference_steps: int | None
    revision: str | None
    reason: str = ""
    guidance_scale: float | None = None


def _choose_scheduler(config: SampleConfig) -> _SchedulerChoice:
    """Choose by the sampler table for --quality. UserError for a model without one.

    The revision is then the commit of the table, so that table and weights are of one model.
    """
    if config.quality is None:
        return _SchedulerChoice(config.scheduler, config.num_inference_steps, config.revision)
    is_checkpoint = (Path(config.model) / CHECKPOINT_STATE).is_file()
    found = None if is_checkpoint else pipeline_folder.find_pipeline(config.model, config.revision)
    table = read_sampler_table(found.folder) if found else None
    if table is None:
        hint = "Its author can measure them with `evaluate.py --samplers` and push the table"
        if Path(config.model).is_dir():
            hint = f"`evaluate.py {config.model} --samplers` measures them"
        raise UserError(
            f"--quality {config.quality}: the samplers of {config.model} were not measured (no "
            f"{SAMPLER_TABLE}, or one of other weights). {hint}; or give --scheduler and "
            "--num_inference_steps."
        )
    scale = None if config.class_label is None else read_guidance_scale(found.folder)
    entry = table.choose(config.quality)
    return _SchedulerChoice(
        entry.scheduler,
        entry.num_inference_steps,
        found.version,
        table.explain_choice(config.quality),
        scale,
    )


def _load_artifact(config: SampleConfig, choice: _SchedulerChoice) -> DiffusionModel:
    is_conditional = config.class_label is not None
    return pipeline.load_model(config.model, choice.revision, conditional=is_conditional)


def _class_guidance(
    config: SampleConfig, choice: _SchedulerChoice, labels: Sequence[int]
) -> ClassGuidance:
    scales = (config.guidance_scale, choice.guidance_scale, DEFAULT_GUIDANCE_SCALE)
    return ClassGuidance(
        lambda seed: seed.label if isinstance(seed, LabeledSeed) else labels[0],
        next(scale for scale in scales if scale is not None),
        config.guidance_levels,
    )


def _prepare(
    artifact: DiffusionModel,
    choice: _SchedulerChoice,
    config: SampleConfig,
    device: torch.device,
) -> LoadedModel:
    """Move the UNet to its device and dtype, and build the scheduler."""
    labels, guidance = (), None
    if config.class_label is not None:
        labels = parse_class_label(config.class_label, artifact.class_names, artifact.name)
        guidance = _class_guidance(config, choice, labels)
    name = choice.scheduler or schedulers.DEFAULT_SCHEDULER
    if choice.scheduler is None and (config.interpolate or config.image):
        name = schedulers.DETERMINISTIC_SCHEDULER
    if config.mask is not None:
        inpaint.require_inpainting_scheduler(name)
    scheduler = schedulers.build_sampling_scheduler(
        name, artifact.scheduler_config, choice.num_inference_steps
    )
    # torch's own `to`: that of diffusers warns of modules kept in float32 even if there are none.
    torch.nn.Module.to(artifact.unet, device, DTYPES[config.dtype])
    _compile_if_asked(artifact.unet, config, device)
    steps, notes = scheduler.num_inference_steps, [choice.reason] if choice.reason else []
    if choice.num_inference_steps not in (None, steps):
        notes.append(
            f"{name} with {choice.num_inference_steps} steps would leave noise in the images of "
            f"this model: {steps} steps are used."
        )
    settings = {"scheduler": name, "num_inference_steps": str(steps)}
    if guidance is not None:
        settings["guidance_scale"] = str(guidance.scale)
        settings["guidance_interval"] = ",".join(map(str, guidance.interval))
    metadata = _metadata(config, artifact.name, artifact.version, settings)
    note = " ".join(notes)
    names = artifact.class_names
    return LoadedModel(artifact.unet, scheduler, metadata, note, labels, names, guidance)


def _generate_function(
    model: LoadedModel, config: SampleConfig
) -> Callable[[Sequence[ImageKey]], GeneratedImages]:
    """Return the way to generate that the settings ask for, as a function of the seeds."""
    unet, scheduler, guidance = model.unet, model.scheduler, model.guidance
    batch_size = config.batch_size or generate.default_batch_size(unet)
    if config.interpolate:
        return lambda indices: generate.interpolate_seeds(
            unet, scheduler, config.interpolate, config.num_images, indices, batch_size, guidance
        )
    if config.mask is not None:
        original = inpaint.read_model_image(config, unet)
        mask = inpaint.read_mask(config, unet)
        return lambda seeds: generate.run_in_batches(
            seeds,
            batch_size,
            lambda batch: inpaint.inpaint(
                unet, scheduler, original, mask, config.num_resamples, batch, guidance
            ),
        )
    if config.trajectory:
        return lambda seeds: _generate_with_trajectories(model, config, seeds)
    return lambda seeds: generate.generate_images(
        unet, scheduler, seeds, batch_size, guidance=guidance
    )


def _generate_with_trajectories(
    model: LoadedModel, config: SampleConfig, seeds: Sequence[ImageKey]
) -> GeneratedImages:
    """Generate one image at a time and write the steps of each."""
    folder = OutputFolder(Path(config.output_dir), {}, seeds)
    steps: list[TrajectoryStep] = []
    for seed, image in generate.generate_images(
        model.unet, model.scheduler, seeds, 1, lambda *step: steps.append(step), model.guidance
    ):
        folder.write_trajectory(seed, steps, image)
        steps.clear()
        yield seed, image


def _load_custom_loop(
    artifact: DiffusionModel, config: SampleConfig, device: torch.device
) -> Sampler:
    """A model with another kind of noise, sampled by its own pipeline in diffusers.

    One image at a time, since the steps of these pipelines depend on the whole batch.
    """
    for name in ("scheduler", "quality", "interpolate", "image"):
        if getattr(config, name) is not None:
            raise UsageError(
                f"--{name}: {artifact.name} is a {artifact.kind}, which has a sampling loop of its "
                "own. Leave it out."
            )
    if config.trajectory or config.dtype != "fp32":
        raise UsageError(
            f"{artifact.name} is a {artifact.kind}: it works in fp32 and without --trajectory only."
        )
    pipe = _build_custom_loop(artifact).to(device)
    pipe.set_progress_bar_config(disable=True)
    _compile_if_asked(artifact.unet, config, device)
    steps = config.num_inference_steps or text_to_image.default_num_inference_steps(pipe)

    def generate_batch(seeds: list[int]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seeds[0])
        array = pipe(generator=generator, num_inference_steps=steps, output_type="np").images
        return list(torch.from_numpy((array * 255).round().astype("uint8")).permute(0, 3, 1, 2))

    settings = {"scheduler": type(pipe.scheduler).__name__, "num_inference_steps": str(steps)}
    return Sampler(
        _metadata(config, artifact.name, artifact.version, settings),
        device,
        lambda seeds: generate.run_in_batches(seeds, 1, generate_batch),
    )


def _build_custom_loop(artifact: DiffusionModel) -> DiffusionPipeline:
    """Build the pipeline that model_index.json names, with a scheduler of diffusers."""
    scheduler_config = artifact.scheduler_config
    pipeline_class = getattr(diffusers, artifact.kind, None)
    if pipeline_class is None:
        raise UserError(
            f"{artifact.name} is a {artifact.kind}, which diffusers {diffusers.__version__} no "
            "longer has."
        )
    scheduler_class = getattr(diffusers, scheduler_config["_class_name"])
    if scheduler_class.__name__ != artifact.kind.replace("Pipeline", "Scheduler"):
        raise UserError(
            f"{artifact.name} is a {artifact.kind} with a {scheduler_class.__name__}, which do not "
            "belong together."
        )
    with foreign_errors(f"{artifact.name} cannot be loaded"):
        return pipeline_class(artifact.unet, scheduler_class.from_config(scheduler_config))


def _load_text_to_image(config: SampleConfig, device: torch.device) -> Sampler:
    """Load a text-to-image pipeline."""
    found = pipeline_folder.find_pipeline(config.model, config.revision)
    pipe = text_to_image.load_text_to_image(found, config, DTYPES[config.dtype]).to(device)
    _compile_if_asked(getattr(pipe, "unet", None) or pipe.transformer, config, device)
    settings = text_to_image.image_metadata(pipe, config)
    if config.image:
        settings["image_sha256"] = file_sha256(Path(config.image))
    return Sampler(
        _metadata(config, found.name, found.version or pipeline.weights_sha256(found), settings),
        device,
        lambda seeds: text_to_image.generate_from_prompt(pipe, config, seeds),
    )


def _compile_if_asked(network: torch.nn.Module, config: SampleConfig, device: torch.device) -> None:
    if not config.compile:
        return
    if reason := compile_failure_reason(device.type):
        raise UserError(f"--compile: {reason} Leave it out.")
    network.compile()


def _metadata(
    config: SampleConfig, model: str, version: str, settings: dict[str, str]
) -> dict[str, str]:
    """Return the text of PNGs: model, settings and software."""
    if config.quality:
        settings = {**settings, "quality": config.quality}
    return {
        "model": model,
        "version": version,
        **settings,
        "dtype": config.dtype,
        "software": f"diffusers {diffusers.__version__}, torch {torch.__version__}",
    }
