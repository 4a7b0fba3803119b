"""From the settings of sample.py to somebody who paints: image k from seed k, whatever the model.

A Painter hides which kind of model draws: an unconditional one by the sampler asked for, one with a
loop of its own, or a text-to-image pipeline.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch

from ddpm.config.commands import SampleConfig
from ddpm.data import transforms
from ddpm.device import compile_failure_reason, prepare_device
from ddpm.diffusion import schedulers
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError, UserError
from ddpm.run_folder import CHECKPOINT_STATE, SAMPLER_TABLE
from ddpm.sampling import (
    generate,
    image_io,
    inpaint,
    outputs,
    pipeline,
    sampler_table,
    text_to_image,
)
from ddpm.sampling.inpaint import RestoredImage
from ddpm.sampling.outputs import OutputFolder
from ddpm.sampling.pipeline import UnconditionalModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STRIP_COLUMNS, GIF_FRAMES = 10, 60
Drawn = Iterator[tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class Sampler:
    """`draw(seeds)` yields (seed, [C, H, W] uint8); `origin` is what the images are made from but
    the seed, as text; `remark` says what was changed of what was asked for."""

    origin: dict[str, str]
    device: torch.device
    draw: Callable[[Sequence[int]], Drawn]
    remark: str = ""

    def __str__(self) -> str:
        made = self.origin
        return (
            f"{made['model']} at {made['version'][:12]}, {made['scheduler']}, "
            f"{made['num_inference_steps']} steps, on {self.device}"
        )


@dataclass(frozen=True)
class LoadedModel:
    """An unconditional model on its device, with its sampler."""

    artifact: UnconditionalModel
    scheduler: SamplingScheduler
    device: torch.device
    origin: dict[str, str]


def choose_scheduler(config: SampleConfig) -> tuple[SampleConfig, str]:
    """The settings with the sampler and the steps that --quality stands for, and why these.

    The model's commit is settled by this: menu and weights are of one revision. UserError for a
    model without a menu.
    """
    assert config.model and config.quality, "nothing to choose for"
    found = None
    if not (Path(config.model) / CHECKPOINT_STATE).is_file():
        found = pipeline.find_pipeline(config.model, config.revision)
    offered = sampler_table.read_sampler_table(found.folder) if found else None
    if offered is None:
        here = Path(config.model).is_dir()
        measured = (
            f"`evaluate.py {config.model} --samplers` measures one"
            if here
            else ("Who published it can measure one, `evaluate.py --samplers`, and push it")
        )
        raise UserError(
            f"--quality {config.quality}: {config.model} has no menu of samplers ({SAMPLER_TABLE}), or "
            f"one of other weights. {measured}; or give --scheduler and --num_inference_steps."
        )
    chosen = offered.choose(config.quality)
    settled = replace(
        config,
        scheduler=chosen.scheduler,
        revision=found.version,
        num_inference_steps=chosen.num_inference_steps,
    )
    return settled, offered.explain_choice(config.quality)


def open_sampler(config: SampleConfig) -> Sampler:
    """Load the model and make ready. UserError for what cannot be loaded or does not fit."""
    device = prepare_device(config.device)
    if config.prompt is not None:
        return _from_words(config, device)
    artifact = pipeline.load_model(config.model, config.revision)
    if artifact.kind in pipeline.CUSTOM_LOOP_PIPELINES:
        return _own_loop(artifact, config, device)
    studio = _furnish(artifact, config, device)
    painter = Sampler(studio.origin, device, _drawing(studio, config), _respaced(studio, config))
    if config.interpolate:
        first, last = config.interpolate
        between = f"{first} to {last} in {config.num_images}"
        painter = replace(painter, origin={**studio.origin, "interpolate": between})
    if config.mask is not None:
        made = {
            "image_sha256": _sha256(config.image),
            "mask_sha256": _sha256(config.mask),
            "num_resamples": str(config.num_resamples),
        }
        painter = replace(painter, origin={**studio.origin, **made})
    return painter


def open_model(config: SampleConfig) -> LoadedModel:
    """The unconditional model itself, for restoring a picture."""
    device = prepare_device(config.device)
    artifact = pipeline.load_model(config.model, config.revision)
    if artifact.kind in pipeline.CUSTOM_LOOP_PIPELINES:
        raise UsageError(
            f"--image: {artifact.name} is a {artifact.kind}, whose noise this command cannot add."
        )
    return _furnish(artifact, config, device)


def restore_to_files(studio: LoadedModel, config: SampleConfig) -> list[RestoredImage]:
    """Write noisy, prediction, restored and strip .png; what became of the picture at each level.

    The level asked for is the first of the list.
    """
    original = _given(studio, config)
    wanted, steps = config.noise_level or 0.5, studio.scheduler.num_inference_steps
    levels = dict.fromkeys(
        max(1, round(level * steps)) / steps for level in (wanted, *inpaint.STRIP_LEVELS)
    )
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("noisy", "prediction", "restored", "strip"):
        outputs.require_own_png(folder / f"{name}.png")
    all_of_them = [
        inpaint.restore_image(
            studio.artifact.unet,
            studio.scheduler,
            transforms.to_model(original),
            level,
            config.seed,
        )
        for level in levels
    ]
    text = {**studio.origin, "seed": str(config.seed), "image_sha256": _sha256(config.image)}
    done = all_of_them[0]
    for name, image in (
        ("noisy", done.noisy),
        ("prediction", done.prediction),
        ("restored", done.restored),
    ):
        made = {**text, "noise_level": str(done.level)}
        image_io.save_png(image, folder / f"{name}.png", made)
    cells = [
        image
        for each in sorted(all_of_them, key=lambda each: each.level)
        for image in (original, each.noisy, each.prediction, each.restored)
    ]
    image_io.save_png(image_io.make_grid(cells, columns=4), folder / "strip.png", text)
    return all_of_them


def format_errors(studio: LoadedModel, config: SampleConfig, restored: list[RestoredImage]) -> str:
    """A table of how far each picture is from the original, level by level."""
    original = _given(studio, config)
    lines = ["level  timestep    noisy  prediction  restored   (RMS difference, of 255)"]
    for each in sorted(restored, key=lambda each: each.level):
        values = [
            inpaint.rms_difference(image, original)
            for image in (each.noisy, each.prediction, each.restored)
        ]
        lines.append(
            f"{each.level:5.2f}  {each.timestep:8d} {values[0]:8.1f} {values[1]:11.1f} "
            f"{values[2]:9.1f}"
        )
    return "\n".join(lines)


def save_trajectory(
    seen: list[tuple[int, torch.Tensor, torch.Tensor]], image: torch.Tensor, stem: Path
) -> None:
    """Write STEM-trajectory.png, x_t above the predicted x0, and .gif, x_t beside it.

    `seen` is what a Watcher of one image was called with, `image` [C, H, W] uint8 its end.
    """
    ways = [[*(transforms.to_pixels(step[which])[0] for step in seen), image] for which in (1, 2)]
    strip = [frame for way in ways for frame in image_io.evenly_spaced(way, STRIP_COLUMNS)]
    columns = len(strip) // 2
    image_io.save_png(
        image_io.make_grid(strip, columns),
        stem.with_name(f"{stem.name}-trajectory.png"),
        {"timesteps": f"{seen[0][0]} to {seen[-1][0]}"},
    )
    pairs = image_io.evenly_spaced(list(zip(*ways, strict=True)), GIF_FRAMES)
    image_io.save_gif(
        [image_io.make_grid(pair, 2) for pair in pairs],
        stem.with_name(f"{stem.name}-trajectory.gif"),
    )


def _furnish(
    artifact: UnconditionalModel, config: SampleConfig, device: torch.device
) -> LoadedModel:
    name = config.scheduler or _usual_sampler(config)
    if config.mask is not None:
        inpaint.require_inpainting_scheduler(name)
    scheduler = schedulers.build_sampling_scheduler(
        name, artifact.scheduler_config, config.num_inference_steps
    )
    # torch's own `to`: diffusers' warns of parts to be kept in float32 even where there are none.
    torch.nn.Module.to(artifact.unet, device, DTYPES[config.dtype])
    if config.compile:
        _compile(artifact.unet, device)
    made = {"scheduler": name, "num_inference_steps": str(scheduler.num_inference_steps)}
    return LoadedModel(
        artifact, scheduler, device, _origin(artifact.name, artifact.version, config, made)
    )


def _compile(network: torch.nn.Module, device: torch.device) -> None:
    if reason := compile_failure_reason(device.type):
        raise UserError(f"--compile: {reason} Leave it out.")
    network.compile()


def _usual_sampler(config: SampleConfig) -> str:
    return (
        schedulers.DETERMINISTIC_SCHEDULER
        if config.interpolate or config.image
        else schedulers.DEFAULT_SCHEDULER
    )


def _drawing(studio: LoadedModel, config: SampleConfig) -> Callable[[Sequence[int]], Drawn]:
    """How the images are drawn that the settings ask for."""
    unet, scheduler = studio.artifact.unet, studio.scheduler
    if config.interpolate:
        return lambda parts: generate.interpolate_seeds(
            unet, scheduler, config.interpolate, config.num_images, parts, config.batch_size
        )
    if config.mask is not None:
        original = transforms.to_model(_given(studio, config))
        hole = _hole(studio, config)
        return lambda seeds: generate.run_in_batches(
            seeds,
            config.batch_size,
            lambda few: inpaint.inpaint(unet, scheduler, original, hole, config.num_resamples, few),
        )
    if config.trajectory:
        return lambda seeds: _watched(studio, config, seeds)
    return lambda seeds: generate.generate_images(unet, scheduler, seeds, config.batch_size)


def _watched(studio: LoadedModel, config: SampleConfig, seeds: Sequence[int]) -> Drawn:
    """Draw one by one, and write the way of each."""
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    where = OutputFolder(Path(config.output_dir), {}, seeds)
    for seed, image in generate.generate_images(
        studio.artifact.unet,
        studio.scheduler,
        seeds,
        1,
        lambda *step: seen.append(step),
    ):
        save_trajectory(seen, image, where.path(seed).with_suffix(""))
        seen.clear()
        yield seed, image


def _own_loop(artifact: UnconditionalModel, config: SampleConfig, device: torch.device) -> Sampler:
    """A model with another kind of noise, by diffusers' own pipeline for it, an image at a time:
    its steps look at the whole batch."""
    for name in ("scheduler", "interpolate", "image"):
        if getattr(config, name) is not None:
            raise UsageError(
                f"--{name}: {artifact.name} is a {artifact.kind}, which draws by a "
                "loop of its own. Leave it out."
            )
    if config.trajectory or config.dtype != "fp32":
        raise UsageError(
            f"{artifact.name} is a {artifact.kind}: it is drawn in fp32 and without --trajectory."
        )
    kind = getattr(diffusers, artifact.kind, None)
    scheduler = getattr(diffusers, str(artifact.scheduler_config.get("_class_name")), None)
    if kind is None or scheduler is None:
        raise UserError(
            f"{artifact.name} is a {artifact.kind}, which diffusers "
            f"{diffusers.__version__} no longer has."
        )
    pipe = kind(artifact.unet.to(device), scheduler.from_config(artifact.scheduler_config))
    pipe.set_progress_bar_config(disable=True)
    if config.compile:
        _compile(artifact.unet, device)
    steps = config.num_inference_steps or text_to_image.default_num_inference_steps(pipe)

    def draw(seeds: list[int]) -> list[torch.Tensor]:
        array = pipe(
            generator=torch.Generator().manual_seed(seeds[0]),
            num_inference_steps=steps,
            output_type="np",
        ).images
        return list(torch.from_numpy((array * 255).round().astype("uint8")).permute(0, 3, 1, 2))

    made = {"scheduler": scheduler.__name__, "num_inference_steps": str(steps)}
    origin = _origin(artifact.name, artifact.version, config, made)
    return Sampler(origin, device, lambda seeds: generate.run_in_batches(seeds, 1, draw))


def _from_words(config: SampleConfig, device: torch.device) -> Sampler:
    found = pipeline.find_pipeline(config.model, config.revision)
    pipe = text_to_image.load_text_to_image(found, config, DTYPES[config.dtype]).to(device)
    if config.compile:
        _compile(getattr(pipe, "unet", None) or pipe.transformer, device)
    made = text_to_image.image_metadata(pipe, config)
    if config.image:
        made["image_sha256"] = _sha256(config.image)
    origin = _origin(found.name, found.version or pipeline.weights_sha256(found), config, made)
    return Sampler(
        origin, device, lambda seeds: text_to_image.generate_from_prompt(pipe, config, seeds)
    )


def _origin(name: str, commit: str, config: SampleConfig, made: dict[str, str]) -> dict[str, str]:
    software = f"diffusers {version('diffusers')}, torch {torch.__version__}"
    if config.quality:
        made = {**made, "quality": config.quality}
    return {"model": name, "version": commit, **made, "dtype": config.dtype, "software": software}


def _respaced(studio: LoadedModel, config: SampleConfig) -> str:
    asked, steps = config.num_inference_steps, studio.scheduler.num_inference_steps
    if asked in (None, steps):
        return ""
    return (
        f"{studio.origin['scheduler']} with {asked} steps would spoil the images of this "
        f"model: {steps} steps are taken."
    )


def _given(studio: LoadedModel, config: SampleConfig) -> torch.Tensor:
    """--image at the size and with the channels of the model: [C, H, W] uint8."""
    unet = studio.artifact.unet
    picture = image_io.read_image(Path(config.image), unet.config.in_channels, config.background)
    return image_io.resize_and_crop(picture, *generate.image_size(unet))


def _hole(studio: LoadedModel, config: SampleConfig) -> torch.Tensor:
    """--mask as [1, H, W] in {0, 1}: 1 is painted anew. UsageError for one that cannot be used."""
    mask = image_io.read_image(Path(config.mask), 1, "black")
    size = image_io.read_image(Path(config.image), 1).shape
    if mask.shape != size:
        raise UsageError(
            f"--mask {config.mask} is {mask.shape[2]}x{mask.shape[1]}, --image {config.image} "
            f"{size[2]}x{size[1]}: they must be of one size."
        )
    hole = (
        image_io.resize_and_crop(mask, *generate.image_size(studio.artifact.unet)) >= 128
    ).float()
    if not hole.any():
        raise UsageError(f"--mask {config.mask} has no white: nothing would be painted anew.")
    return hole


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
