"""The folder of drawn images: where image k lies, what is there already, who draws what is missing.

    samples/
      seed-00000.png ...        an image each, with its origin as text
      grid.png                  the first of them on one sheet
      samples.npz  samples.parquet     all of them in one file, when asked for

Several processes share the seeds by their number alone and meet in the folder: the first one waits
there for the images of the others. No process group is needed.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

from ddpm.config.commands import SampleConfig
from ddpm.diffusion.schedulers import SCHEDULERS as SCHEDULERS
from ddpm.errors import UserError
from ddpm.sampling import image_io
from ddpm.typed_json import parse_text

GRID = "grid.png"
GRID_LIMIT = 256
"""Most images on one sheet."""
ROUNDING = 2
"""Levels of 255 by which an image made again may differ: sums in another order."""
SETTINGS_OF_IMAGE = {
    "seed",
    "scheduler",
    "num_inference_steps",
    "dtype",
    "prompt",
    "negative_prompt",
    "guidance_scale",
    "height",
    "width",
    "strength",
    "num_resamples",
}
"""Settings that --like reads from the text of a PNG."""
PATIENCE = 3600.0
"""Seconds without a new image of another process after which the first one gives up."""


@dataclass(frozen=True)
class OutputFolder:
    """Images of `seeds` in `folder`; `origin` is all that they were made from but the seed.

    `stem` begins their names. `rank` of `world` processes draws every world-th of them.
    """

    folder: Path
    origin: dict[str, str]
    seeds: Sequence[int]
    stem: str = "seed"
    rank: int = 0
    world: int = 1

    def path(self, seed: int) -> Path:
        """Where the image of a seed lies."""
        return self.folder / f"{self.stem}-{seed:05d}.png"

    def text(self, seed: int) -> dict[str, str]:
        """The text of its PNG."""
        return {**self.origin, "seed": str(seed)}

    @property
    def share(self) -> Sequence[int]:
        """The seeds of this process; a function of its rank alone, not of what is there."""
        return self.seeds[self.rank :: self.world]


def rank_and_world_size() -> tuple[int, int]:
    """(rank, number of processes) as a launcher says, (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def with_settings_of_image(config: SampleConfig, given: Set[str]) -> SampleConfig:
    """Return the settings that draw the image of --like again, read from its text.

    `given` are the names of the flags on the command line, which win. Raise UserError for a file
    without these settings, or one that was made from more than they can say.
    """
    path = Path(config.like or "")
    if not path.is_file():
        raise UserError(f"--like {path}: there is no such file.")
    text = image_io.read_png_text(path)
    if not {"model", "version", "seed", "num_inference_steps"} <= text.keys():
        raise UserError(
            f"--like {path}: it does not say what it was made from. Only PNGs of sample.py do."
        )
    if "interpolate" in text or "noise_level" in text:
        raise UserError(
            f"--like {path}: it lies between two seeds or restores an image, which "
            "--interpolate or --image makes again."
        )
    values: dict[str, Any] = {"num_images": 1}
    hints = get_type_hints(SampleConfig)
    for name in SETTINGS_OF_IMAGE & text.keys():
        if name != "scheduler" or text[name] in SCHEDULERS:  # else the pipeline's own
            values[name] = parse_text(hints[name], text[name], f"--like {path}: {name}")
    if config.model is None:
        if not re.fullmatch("[0-9a-f]{40}", text["version"]) or text["model"].startswith("-"):
            raise UserError(
                f"--like {path}: it was made with a model in a folder called "
                f"{text['model']}. Name the folder too."
            )
        values |= {"model": text["model"], "revision": text["version"]}
    return replace(config, **{name: v for name, v in values.items() if name not in given})


def require_same_model(like: str, origin: dict[str, str]) -> None:
    """UserError when the model at hand is not the one that made the image."""
    text = image_io.read_png_text(Path(like))
    for name in ("version", "image_sha256", "mask_sha256"):
        if text.get(name) != origin.get(name):
            what = "model" if name == "version" else f"--{name.removesuffix('_sha256')}"
            raise UserError(
                f"{like} was made with another {what} ({name} {text.get(name)}, here "
                f"{origin.get(name)}). Name the right one."
            )


def reproduce_image(
    config: SampleConfig,
    origin: dict[str, str],
    draw: Callable[[list[int]], Iterable[tuple[int, torch.Tensor]]],
) -> str:
    """Draw the image of --like anew, and say in words that it is the same; no sheet is touched.

    It is put into the output folder, unless the image itself lies in its place. UserError for
    another model, and when the pixels differ by more than rounding explains.
    """
    like = Path(config.like or "")
    require_same_model(str(like), origin)
    again = OutputFolder(Path(config.output_dir), origin, [config.seed])
    path = again.path(config.seed)
    is_itself = path.exists() and path.samefile(like)
    if not is_itself:
        missing_seeds(again)
    ((_, image),) = draw([config.seed])
    if not is_itself:
        image_io.save_png(image, path, again.text(config.seed))
    return compare_images(str(like), image, "The image drawn again" if is_itself else str(path))


def compare_images(like: str, image: torch.Tensor, name: str) -> str:
    """In words, that an image made again is like another. UserError when it is not."""
    one = image_io.read_png(Path(like))
    if one.shape != image.shape:
        raise UserError(f"{name} is of another size than {like}.")
    apart = (one.int() - image.int()).abs()
    if not apart.any():
        return f"{name} has the very pixels of {like}."
    words = (
        f"{name} differs from {like} in {int((apart > 0).sum()):,} of {apart.numel():,} "
        f"values, by {int(apart.max())} of 255 at most."
    )
    if apart.max() > ROUNDING:
        raise UserError(
            f"{words} Other versions, another device, or another --batch_size with a model that "
            "was hardly trained can do that; the PNG's text says what it was made with."
        )
    return words


def missing_seeds(gallery: OutputFolder, again: bool = False) -> list[int]:
    """The seeds of this process's share that are still to be drawn.

    Complete images of the same origin are kept, unless they are to be made `again`. UserError for a
    file in the place of one that this command did not make: it is not replaced.
    """
    gallery.folder.mkdir(parents=True, exist_ok=True)
    require_own_png(gallery.folder / GRID)
    left = []
    for seed in gallery.share:
        path = gallery.path(seed)
        if require_own_png(path) != gallery.text(seed) or again:
            left.append(seed)
    return left


def require_own_png(path: Path) -> dict[str, str]:
    """The text of a PNG of ours, empty where there is no file. UserError for anybody else's."""
    if not path.exists():
        return {}
    text = image_io.read_png_text(path)
    if "num_inference_steps" not in text:
        raise UserError(
            f"{path} was not made by this command, so it is not replaced. "
            "Give another --output_dir."
        )
    return text


def save_images(gallery: OutputFolder, drawn: Iterable[tuple[int, torch.Tensor]]) -> Iterator[int]:
    """Write images as they come and yield their seeds."""
    for seed, image in drawn:
        image_io.save_png(image, gallery.path(seed), gallery.text(seed))
        yield seed


def wait_for_other_processes(gallery: OutputFolder) -> None:
    """Wait until the images of every process are there, whole and of this origin.

    UserError when none has come for a long time: a process has died.
    """
    left = [seed for seed in gallery.seeds if seed not in set(gallery.share)]
    patience_ends = time.monotonic() + PATIENCE
    while True:
        still = [seed for seed in left if not _is_there(gallery, seed)]
        if not still:
            return
        if len(still) < len(left):
            left, patience_ends = still, time.monotonic() + PATIENCE
        if time.monotonic() > patience_ends:
            raise UserError(
                f"{len(still)} images of other processes did not come. What is there "
                "is kept: run the same command again."
            )
        time.sleep(0.2)


def write_collections(gallery: OutputFolder, npz: bool, parquet: bool) -> list[Path]:
    """Write the sheet of the first images, and all of them in one file each where asked for."""
    paths = [gallery.path(seed) for seed in gallery.seeds]
    first = [image_io.read_png(path) for path in paths[:GRID_LIMIT]]
    made = [gallery.folder / GRID]
    image_io.save_png(image_io.make_grid(first), made[0], gallery.text(gallery.seeds[0]))
    for wanted, name, write in (
        (npz, "samples.npz", image_io.save_npz),
        (parquet, "samples.parquet", image_io.save_parquet),
    ):
        if wanted:
            write(paths, gallery.seeds, gallery.folder / name)
            made.append(gallery.folder / name)
    return made


def write_gif(gallery: OutputFolder) -> Path:
    """Write the images as the frames of a GIF."""
    path = gallery.folder / f"{gallery.stem}.gif"
    frames = [image_io.make_grid([image_io.read_png(gallery.path(seed))]) for seed in gallery.seeds]
    image_io.save_gif(frames, path)
    return path


def _is_there(gallery: OutputFolder, seed: int) -> bool:
    path = gallery.path(seed)
    return path.exists() and image_io.read_png_text(path) == gallery.text(seed)
