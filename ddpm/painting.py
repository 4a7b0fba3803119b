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

from ddpm import (
    devices,
    gallery,
    generation,
    menu,
    pictures,
    pipeline,
    prompting,
    restoring,
    samplers,
)
from ddpm.commands import SampleConfig
from ddpm.errors import UsageError, UserError
from ddpm.gallery import Gallery
from ddpm.pipeline import Artifact
from ddpm.restoring import Restored
from ddpm.runfolder import CHECKPOINT_STATE, SAMPLERS
from ddpm.samplers import Sampler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STRIP_COLUMNS, GIF_FRAMES = 10, 60
Drawn = Iterator[tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class Painter:
    """`draw(seeds)` yields (seed, [C, H, W] uint8); `origin` is what the images are made from but
    the seed, as text; `remark` says what was changed of what was asked for."""

    origin: dict[str, str]
    device: torch.device
    draw: Callable[[Sequence[int]], Drawn]
    remark: str = ""

    def __str__(self) -> str:
        made = self.origin
        return (f"{made['model']} at {made['version'][:12]}, {made['scheduler']}, "
                f"{made['num_inference_steps']} steps, on {self.device}")  # fmt: skip


@dataclass(frozen=True)
class Studio:
    """An unconditional model on its device, with its sampler."""

    artifact: Artifact
    sampler: Sampler
    steps: int
    device: torch.device
    origin: dict[str, str]


def choose_sampler(config: SampleConfig) -> tuple[SampleConfig, str]:
    """The settings with the sampler and the steps that --quality stands for, and why these.

    The model's commit is settled by this: menu and weights are of one revision. UserError for a
    model without a menu.
    """
    assert config.model and config.quality, "nothing to choose for"
    found = None
    if not (Path(config.model) / CHECKPOINT_STATE).is_file():
        found = pipeline.find(config.model, config.revision)
    offered = menu.read(found.folder) if found else None
    if offered is None:
        here = Path(config.model).is_dir()
        measured = f"`evaluate.py {config.model} --samplers` measures one" if here else (
            "Who published it can measure one, `evaluate.py --samplers`, and push it")  # fmt: skip
        raise UserError(
            f"--quality {config.quality}: {config.model} has no menu of samplers ({SAMPLERS}), or "
            f"one of other weights. {measured}; or give --scheduler and --num_inference_steps."
        )
    chosen = offered.choose(config.quality)
    settled = replace(config, scheduler=chosen.scheduler, revision=found.version,
                      num_inference_steps=chosen.num_inference_steps)  # fmt: skip
    return settled, menu.remark(offered, config.quality)


def open_painter(config: SampleConfig) -> Painter:
    """Load the model and make ready. UserError for what cannot be loaded or does not fit."""
    device = devices.prepare_device(config.device)
    if config.prompt is not None:
        return _from_words(config, device)
    artifact = pipeline.load(config.model, config.revision)
    if artifact.kind in pipeline.OWN_LOOP:
        return _own_loop(artifact, config, device)
    studio = _furnish(artifact, config, device)
    painter = Painter(studio.origin, device, _drawing(studio, config), _respaced(studio, config))
    if config.interpolate:
        first, last = config.interpolate
        between = f"{first} to {last} in {config.num_images}"
        painter = replace(painter, origin={**studio.origin, "interpolate": between})
    if config.mask is not None:
        made = {"image_sha256": _sha256(config.image), "mask_sha256": _sha256(config.mask),
                "num_resamples": str(config.num_resamples)}  # fmt: skip
        painter = replace(painter, origin={**studio.origin, **made})
    return painter


def open_studio(config: SampleConfig) -> Studio:
    """The unconditional model itself, for restoring a picture."""
    device = devices.prepare_device(config.device)
    artifact = pipeline.load(config.model, config.revision)
    if artifact.kind in pipeline.OWN_LOOP:
        raise UsageError(f"--image: {artifact.name} is a {artifact.kind}, whose noise this command "
                         "cannot add.")  # fmt: skip
    return _furnish(artifact, config, device)


def restore_picture(studio: Studio, config: SampleConfig) -> list[Restored]:
    """Write noisy, prediction, restored and strip .png; what became of the picture at each level.

    The level asked for is the first of the list.
    """
    original = _given(studio, config)
    wanted = config.noise_level or 0.5
    levels = dict.fromkeys(max(1, round(level * studio.steps)) / studio.steps
                           for level in (wanted, *restoring.STRIP_LEVELS))  # fmt: skip
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("noisy", "prediction", "restored", "strip"):
        gallery.require_ours(folder / f"{name}.png")
    all_of_them = [
        restoring.restore(studio.artifact.unet, studio.sampler, studio.steps,
                          pictures.to_model(original), level, config.seed)
        for level in levels
    ]  # fmt: skip
    text = {**studio.origin, "seed": str(config.seed), "image_sha256": _sha256(config.image)}
    done = all_of_them[0]
    for name, image in (("noisy", done.noisy), ("prediction", done.prediction),
                        ("restored", done.restored)):  # fmt: skip
        made = {**text, "noise_level": str(done.level)}
        pictures.save_png(image, folder / f"{name}.png", made)
    cells = [image for each in sorted(all_of_them, key=lambda each: each.level)
             for image in (original, each.noisy, each.prediction, each.restored)]  # fmt: skip
    pictures.save_png(pictures.grid(cells, columns=4), folder / "strip.png", text)
    return all_of_them


def errors_of(studio: Studio, config: SampleConfig, restored: list[Restored]) -> str:
    """A table of how far each picture is from the original, level by level."""
    original = _given(studio, config)
    lines = ["level  timestep    noisy  prediction  restored   (RMS difference, of 255)"]
    for each in sorted(restored, key=lambda each: each.level):
        values = [restoring.difference(image, original)
                  for image in (each.noisy, each.prediction, each.restored)]  # fmt: skip
        lines.append(f"{each.level:5.2f}  {each.timestep:8d} {values[0]:8.1f} {values[1]:11.1f} "
                     f"{values[2]:9.1f}")  # fmt: skip
    return "\n".join(lines)


def show_trajectory(
    seen: list[tuple[int, torch.Tensor, torch.Tensor]], image: torch.Tensor, stem: Path
) -> None:
    """Write STEM-trajectory.png, x_t above the predicted x0, and .gif, x_t beside it.

    `seen` is what a Watcher of one image was called with, `image` [C, H, W] uint8 its end.
    """
    ways = [[*(pictures.to_pixels(step[which])[0] for step in seen), image] for which in (1, 2)]
    strip = [frame for way in ways for frame in pictures.spread(way, STRIP_COLUMNS)]
    columns = len(strip) // 2
    pictures.save_png(pictures.grid(strip, columns), stem.with_name(f"{stem.name}-trajectory.png"),
                      {"timesteps": f"{seen[0][0]} to {seen[-1][0]}"})  # fmt: skip
    pairs = pictures.spread(list(zip(*ways, strict=True)), GIF_FRAMES)
    pictures.save_gif([pictures.grid(pair, 2) for pair in pairs],
                      stem.with_name(f"{stem.name}-trajectory.gif"))  # fmt: skip


def _furnish(artifact: Artifact, config: SampleConfig, device: torch.device) -> Studio:
    name = config.scheduler or _usual_sampler(config)
    if config.mask is not None:
        restoring.require_repainting(name)
    sampler, steps = samplers.build_sampler(
        name, artifact.scheduler_config, config.num_inference_steps
    )
    # torch's own `to`: diffusers' warns of parts to be kept in float32 even where there are none.
    torch.nn.Module.to(artifact.unet, device, DTYPES[config.dtype])
    if config.compile:
        _compile(artifact.unet, device)
    made = {"scheduler": name, "num_inference_steps": str(steps)}
    return Studio(artifact, sampler, steps, device,
                  _origin(artifact.name, artifact.version, config, made))  # fmt: skip


def _compile(network: torch.nn.Module, device: torch.device) -> None:
    if reason := devices.cannot_compile(device.type):
        raise UserError(f"--compile: {reason} Leave it out.")
    network.compile()


def _usual_sampler(config: SampleConfig) -> str:
    return samplers.DETERMINISTIC if config.interpolate or config.image else samplers.DEFAULT


def _drawing(studio: Studio, config: SampleConfig) -> Callable[[Sequence[int]], Drawn]:
    """How the images are drawn that the settings ask for."""
    unet, sampler, steps = studio.artifact.unet, studio.sampler, studio.steps
    if config.interpolate:
        return lambda parts: generation.interpolate(
            unet, sampler, steps, config.interpolate, config.num_images, parts, config.batch_size
        )
    if config.mask is not None:
        original = pictures.to_model(_given(studio, config))
        hole = _hole(studio, config)
        return lambda seeds: generation.in_batches(
            seeds, config.batch_size,
            lambda few: restoring.inpaint(unet, sampler, steps, original, hole,
                                          config.num_resamples, few),
        )  # fmt: skip
    if config.trajectory:
        return lambda seeds: _watched(studio, config, seeds)
    return lambda seeds: generation.generate(unet, sampler, steps, seeds, config.batch_size)


def _watched(studio: Studio, config: SampleConfig, seeds: Sequence[int]) -> Drawn:
    """Draw one by one, and write the way of each."""
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    where = Gallery(Path(config.output_dir), {}, seeds)
    for seed, image in generation.generate(
        studio.artifact.unet, studio.sampler, studio.steps, seeds, 1,
        lambda *step: seen.append(step),
    ):  # fmt: skip
        show_trajectory(seen, image, where.path(seed).with_suffix(""))
        seen.clear()
        yield seed, image


def _own_loop(artifact: Artifact, config: SampleConfig, device: torch.device) -> Painter:
    """A model with another kind of noise, by diffusers' own pipeline for it, an image at a time:
    its steps look at the whole batch."""
    for name in ("scheduler", "interpolate", "image"):
        if getattr(config, name) is not None:
            raise UsageError(f"--{name}: {artifact.name} is a {artifact.kind}, which draws by a "
                             "loop of its own. Leave it out.")  # fmt: skip
    if config.trajectory or config.dtype != "fp32":
        raise UsageError(f"{artifact.name} is a {artifact.kind}: it is drawn in fp32 and without "
                         "--trajectory.")  # fmt: skip
    kind = getattr(diffusers, artifact.kind, None)
    scheduler = getattr(diffusers, str(artifact.scheduler_config.get("_class_name")), None)
    if kind is None or scheduler is None:
        raise UserError(f"{artifact.name} is a {artifact.kind}, which diffusers "
                        f"{diffusers.__version__} no longer has.")  # fmt: skip
    pipe = kind(artifact.unet.to(device), scheduler.from_config(artifact.scheduler_config))
    pipe.set_progress_bar_config(disable=True)
    if config.compile:
        _compile(artifact.unet, device)
    steps = config.num_inference_steps or prompting.default_steps(pipe)

    def draw(seeds: list[int]) -> list[torch.Tensor]:
        array = pipe(generator=torch.Generator().manual_seed(seeds[0]), num_inference_steps=steps,
                     output_type="np").images  # fmt: skip
        return list(torch.from_numpy((array * 255).round().astype("uint8")).permute(0, 3, 1, 2))

    made = {"scheduler": scheduler.__name__, "num_inference_steps": str(steps)}
    origin = _origin(artifact.name, artifact.version, config, made)
    return Painter(origin, device, lambda seeds: generation.in_batches(seeds, 1, draw))


def _from_words(config: SampleConfig, device: torch.device) -> Painter:
    found = pipeline.find(config.model, config.revision)
    pipe = prompting.load(found, config, DTYPES[config.dtype]).to(device)
    if config.compile:
        _compile(getattr(pipe, "unet", None) or pipe.transformer, device)
    made = prompting.facts(pipe, config)
    if config.image:
        made["image_sha256"] = _sha256(config.image)
    origin = _origin(found.name, found.version or pipeline.folder_version(found), config, made)
    return Painter(origin, device, lambda seeds: prompting.generate(pipe, config, seeds))


def _origin(name: str, commit: str, config: SampleConfig, made: dict[str, str]) -> dict[str, str]:
    software = f"diffusers {version('diffusers')}, torch {torch.__version__}"
    if config.quality:
        made = {**made, "quality": config.quality}
    return {"model": name, "version": commit, **made, "dtype": config.dtype, "software": software}


def _respaced(studio: Studio, config: SampleConfig) -> str:
    asked = config.num_inference_steps
    if asked in (None, studio.steps):
        return ""
    return (f"{studio.origin['scheduler']} with {asked} steps would spoil the images of this "
            f"model: {studio.steps} steps are taken.")  # fmt: skip


def _given(studio: Studio, config: SampleConfig) -> torch.Tensor:
    """--image at the size and with the channels of the model: [C, H, W] uint8."""
    unet = studio.artifact.unet
    picture = pictures.read_picture(Path(config.image), unet.config.in_channels, config.background)
    return pictures.fit(picture, *generation.sides(unet))


def _hole(studio: Studio, config: SampleConfig) -> torch.Tensor:
    """--mask as [1, H, W] in {0, 1}: 1 is painted anew. UsageError for one that cannot be used."""
    mask = pictures.read_picture(Path(config.mask), 1, "black")
    size = pictures.read_picture(Path(config.image), 1).shape
    if mask.shape != size:
        raise UsageError(
            f"--mask {config.mask} is {mask.shape[2]}x{mask.shape[1]}, --image {config.image} "
            f"{size[2]}x{size[1]}: they must be of one size."
        )
    hole = (pictures.fit(mask, *generation.sides(studio.artifact.unet)) >= 128).float()
    if not hole.any():
        raise UsageError(f"--mask {config.mask} has no white: nothing would be painted anew.")
    return hole


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
