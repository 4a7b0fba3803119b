"""The folder of generated images, and making one of them again from its own PNG.

    samples/
      seed-00000.png ...              one image each, with its metadata as text
      label-003-seed-00000.png ...    the same of a class (--class_label)
      grid.png                        the first images side by side
      samples.npz  samples.parquet    all images in one file (--npz, --parquet)

The PNG text names all that an image was made from: complete images with the same text are kept, and
`sample.py --like` makes an image again. Several processes divide the seeds by their rank and write
into the same folder; the first one waits for the others and writes the files with all images.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_type_hints

import torch
from PIL import Image

from ddpm import hub
from ddpm.config.sample import SampleConfig
from ddpm.data.decode import MAX_PIXELS
from ddpm.data.transforms import to_pixels
from ddpm.diffusion.schedulers import SCHEDULERS
from ddpm.errors import UserError
from ddpm.sampling import image_io
from ddpm.sampling.guidance import ImageKey, LabeledSeed, seed_of
from ddpm.typed_json import parse_text

GRID = "grid.png"
GRID_LIMIT = 256
"""Largest number of images in a grid; fewer if they have more than decode.MAX_PIXELS together."""
GRID_ROWS, GRID_COLUMNS = 32, 16
"""Largest number of classes in a grid, and of images of each."""
STRIP_COLUMNS, GIF_FRAMES = 10, 60
"""Largest number of steps shown of a trajectory."""
TOLERANCE = 2
"""Levels of 255 by which an image made again may differ: float sums in another order."""
BARRIER_TIMEOUT = timedelta(days=7)
"""A process may draw this much longer than another; the launcher ends all when one fails."""
LIKE_FIELDS = (
    "seed",
    "num_inference_steps",
    "dtype",
    "num_resamples",
    "prompt",
    "negative_prompt",
    "class_label",
    "guidance_scale",
    "guidance_interval",
    "height",
    "width",
    "strength",
)
"""Settings that --like takes from a PNG as they are: no path, address or name of a class."""
LIKE_LIMITS = {"num_inference_steps": 10**4, "num_resamples": 1000, "height": 8192, "width": 8192}
"""Largest values of settings that cost time and memory."""

GeneratedImages = Iterator[tuple[ImageKey, torch.Tensor]]
"""Pairs (seed, [C, H, W] uint8)."""
TrajectoryStep = tuple[int, torch.Tensor, torch.Tensor]
"""(timestep, x_t, predicted x_0); both [1, C, H, W] float32 in [-1, 1]."""


@dataclass(frozen=True)
class OutputFolder:
    """The images of `seeds` in `folder`. `metadata` is what they were made from except the seed
    and the class.

    File names hold `stem` and ids of classes, never their names. Process `rank` of `world_size`
    makes every world_size-th image.
    """

    folder: Path
    metadata: dict[str, str]
    seeds: Sequence[ImageKey]
    stem: str = "seed"
    rank: int = 0
    world_size: int = 1
    class_names: Sequence[str] | None = None

    def path(self, seed: ImageKey) -> Path:
        """Return the path of the image of a seed."""
        return self.folder / f"{self._stem(seed)}-{seed_of(seed):05d}.png"

    def text(self, seed: ImageKey) -> dict[str, str]:
        """Return the text of the PNG of a seed."""
        text = {**self.metadata, "seed": str(seed_of(seed))}
        if isinstance(seed, LabeledSeed):
            text |= class_text(seed.label, self.class_names)
        return text

    def _stem(self, seed: ImageKey) -> str:
        return f"label-{seed.label:03d}-{self.stem}" if isinstance(seed, LabeledSeed) else self.stem

    @property
    def local_seeds(self) -> Sequence[ImageKey]:
        """The seeds of this process, whatever images exist already."""
        return self.seeds[self.rank :: self.world_size]

    def missing_seeds(self, again: bool = False) -> list[ImageKey]:
        """Create the folder and return the seeds that this process has to draw.

        Complete images with the same metadata are kept, unless `again`. UserError for a file in the
        place of an image that this command did not write; it is never replaced.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        require_own_png(self.folder / GRID)
        texts = {seed: require_own_png(self.path(seed)) for seed in self.local_seeds}
        return [seed for seed, text in texts.items() if again or text != self.text(seed)]

    def save(self, images: Iterable[tuple[ImageKey, torch.Tensor]]) -> Iterator[ImageKey]:
        """Write (seed, image) pairs as they come and yield the seeds."""
        for seed, image in images:
            image_io.save_png(image, self.path(seed), self.text(seed))
            yield seed

    def require_complete(self) -> None:
        """UserError unless the images of the other processes are there too."""
        others = set(self.seeds) - set(self.local_seeds)
        missing = sum(
            not self.path(seed).exists()
            or image_io.read_png_text(self.path(seed)) != self.text(seed)
            for seed in others
        )
        if missing:
            raise UserError(
                f"{missing} images of other processes are not in {self.folder}. All processes must "
                "see the same folder. Complete images are kept: run the same command again."
            )

    def write_collections(self, npz: bool, parquet: bool) -> list[Path]:
        """Write the grid, and all images as one file where asked for. Return the paths."""
        paths = [self.path(seed) for seed in self.seeds]
        seeds = [seed_of(seed) for seed in self.seeds]
        labels = [seed.label for seed in self.seeds if isinstance(seed, LabeledSeed)]
        written = [self.folder / GRID]
        image_io.save_png(self._make_grid(labels), written[0], self.text(self.seeds[0]))
        if npz:
            written.append(self.folder / "samples.npz")
            image_io.save_npz(paths, seeds, written[-1], labels)
        if parquet:
            written.append(self.folder / "samples.parquet")
            image_io.save_parquet(paths, seeds, written[-1], labels, self.class_names)
        return written

    def _make_grid(self, labels: Sequence[int]) -> Image.Image:
        """Arrange the first images in a square, or those of several classes with a row a class."""
        seeds, columns, row_names = self.seeds, None, None
        size = image_io.read_png(self.path(seeds[0]))[0].numel()
        limit = min(GRID_LIMIT, max(1, MAX_PIXELS // size))
        if len(set(labels)) > 1:  # all classes, by their ids, with as many images each
            per_class = len(seeds) // len(self.class_names)
            rows = min(len(self.class_names), GRID_ROWS, limit)
            columns = min(per_class, GRID_COLUMNS, limit // rows)
            seeds = [seeds[row * per_class + k] for row in range(rows) for k in range(columns)]
            row_names = image_io.names_in_ascii(self.class_names[:rows])
        images = [image_io.read_png(self.path(seed)) for seed in seeds[:limit]]
        return image_io.make_grid(images, columns, row_names)

    def write_gif(self) -> Path:
        """Write the images as the frames of an animation."""
        path = self.folder / f"{self._stem(self.seeds[0])}.gif"
        images = (image_io.read_png(self.path(seed)) for seed in self.seeds)
        image_io.save_gif([image_io.make_grid([image]) for image in images], path)
        return path

    def write_trajectory(
        self, seed: ImageKey, steps: Sequence[TrajectoryStep], image: torch.Tensor
    ) -> None:
        """Write the steps of one image as ...-trajectory.png and .gif, both ending with the image.

        The PNG shows x_t above the predicted x_0, the GIF shows x_t to the left of it.
        """
        stem = self.path(seed).with_suffix("")
        noisy = [*(to_pixels(x_t)[0] for _, x_t, _ in steps), image]
        original = [*(to_pixels(x_0)[0] for _, _, x_0 in steps), image]
        rows = [image_io.evenly_spaced(row, STRIP_COLUMNS) for row in (noisy, original)]
        image_io.save_png(
            image_io.make_grid(rows[0] + rows[1], columns=len(rows[0])),
            stem.with_name(f"{stem.name}-trajectory.png"),
            {"timesteps": f"{steps[0][0]} to {steps[-1][0]}"},
        )
        pairs = image_io.evenly_spaced(list(zip(noisy, original, strict=True)), GIF_FRAMES)
        frames = [image_io.make_grid(pair, columns=2) for pair in pairs]
        image_io.save_gif(frames, stem.with_name(f"{stem.name}-trajectory.gif"))


def class_text(label: int, class_names: Sequence[str]) -> dict[str, str]:
    """Return the text of a PNG on its class: the id, and the name for people."""
    return {"class_label": str(label), "class_name": class_names[label]}


def require_own_png(path: Path) -> dict[str, str]:
    """Return the text of a PNG of ours, {} if there is no file. UserError for any other file."""
    if not path.exists():
        return {}
    text = image_io.read_png_text(path)
    if "num_inference_steps" not in text:
        raise UserError(
            f"{path} was not made by this command, so it is not replaced. "
            "Give another --output_dir."
        )
    return text


# Several processes


def join_processes() -> tuple[int, int]:
    """Join the process group of a launcher. Return rank and world size; (0, 1) without a launcher.

    Processes exchange files alone, so gloo serves every device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from accelerate import PartialState

    state = PartialState(cpu=True, timeout=BARRIER_TIMEOUT)
    return state.process_index, state.num_processes


def wait_for_everyone() -> None:
    """Wait until every process has written its images. UserError if one has ended before."""
    if not torch.distributed.is_initialized():
        return
    from accelerate import PartialState

    try:
        PartialState().wait_for_everyone()
    except RuntimeError:
        raise UserError(
            "Another process ended before its images were complete. Complete images are kept: run "
            "the same command again."
        ) from None


# An image made again (--like)


def config_from_image(config: SampleConfig, given: Collection[str]) -> SampleConfig:
    """Return `config` with the settings of the PNG that --like names.

    `given` are the names of the flags on the command line; those win. A PNG may come from a
    stranger: only checked values of LIKE_FIELDS, a known scheduler, and an id on the Hub with its
    commit are used. UserError for a PNG without metadata or that these settings cannot make again.
    """
    path = Path(config.like or "")
    if not path.is_file():
        raise UserError(f"--like {path}: there is no such file.")
    text = image_io.read_png_text(path)
    if not {"model", "version", "seed", "num_inference_steps"} <= text.keys():
        raise UserError(
            f"--like {path}: its text does not say what it was made from. Only PNGs of sample.py "
            "have it."
        )
    if "interpolate" in text or "noise_level" in text:
        raise UserError(
            f"--like {path}: it lies between two seeds or restores an image. Use --interpolate or "
            "--image to make it again."
        )
    hints = get_type_hints(SampleConfig)
    settings: dict[str, Any] = {"num_images": 1}
    for name in [name for name in LIKE_FIELDS if name in text and name not in given]:
        value = parse_text(hints[name], text[name], f"--like {path}: {name}")
        if name in LIKE_LIMITS and value > LIKE_LIMITS[name]:
            raise UserError(
                f"--like {path}: {name} is {value}; a PNG may ask for {LIKE_LIMITS[name]} at most. "
                f"Give --{name} if you want that."
            )
        settings[name] = value
    if text.get("scheduler") in SCHEDULERS:
        settings["scheduler"] = text["scheduler"]
    if config.model is None:
        model, version = text["model"], text["version"]
        if not (re.fullmatch("[0-9a-f]{40}", version) and hub.is_repo_id(model)):
            raise UserError(
                f"--like {path}: it was made with a model in a folder called {model!r}. Name the "
                "folder too."
            )
        settings |= {"model": model, "revision": version}
    return replace(config, **{k: v for k, v in settings.items() if k not in given})


def require_same_model(like: Path, metadata: dict[str, str]) -> None:
    """UserError unless `like` was made with the model, --image and --mask of `metadata`."""
    text = image_io.read_png_text(like)
    for name in ("version", "image_sha256", "mask_sha256"):
        was, now = text.get(name), metadata.get(name)
        if was != now:
            what = "model" if name == "version" else f"--{name.removesuffix('_sha256')}"
            raise UserError(
                f"{like} was made with another {what} ({name} {was!r}, here {now!r}). Name the "
                "right one."
            )


def reproduce_image(
    like: Path,
    images: OutputFolder,
    generate: Callable[[Sequence[ImageKey]], GeneratedImages],
) -> str:
    """Generate the image `like`, the first of `images`, and return a sentence that it is the same.

    The image is written to the output folder, unless that would replace `like` itself. UserError
    for another model, and for pixels that differ by more than rounding explains.
    """
    require_same_model(like, images.metadata)
    seed = images.seeds[0]
    path = images.path(seed)
    is_itself = path.exists() and path.samefile(like)
    if not is_itself:
        images.missing_seeds()
    ((_, image),) = generate([seed])
    if not is_itself:
        list(images.save([(seed, image)]))
    return compare_images(like, image, "The image drawn again" if is_itself else str(path))


def compare_images(like: Path, image: torch.Tensor, name: str) -> str:
    """Return a sentence on how close `image` is to the file `like`. UserError if it is not."""
    expected = image_io.read_png(like)
    if expected.shape != image.shape:
        raise UserError(f"{name} has another size than {like}.")
    differences = (expected.int() - image.int()).abs()
    if not differences.any():
        return f"{name} has exactly the pixels of {like}."
    largest = int(differences.max())
    sentence = (
        f"{name} differs from {like} in {int((differences > 0).sum()):,} of "
        f"{differences.numel():,} values, by {largest} of 255 at most."
    )
    if largest > TOLERANCE:
        raise UserError(
            f"{sentence} Other versions, another device, or another --batch_size with a model that "
            "was hardly trained can do that; the PNG's text says what it was made with."
        )
    return sentence
