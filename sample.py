"""Draw images with a published model, or one in a folder; every image has its own seed.

    python sample.py MODEL [--num_images 16] [--seed 0] [--scheduler ddpm] [--revision COMMIT]
    python sample.py MODEL --trajectory | --interpolate 3 7
    python sample.py MODEL --image FILE [--noise_level 0.5 | --mask FILE]
    python sample.py MODEL --prompt "an apple in the outer space"
    python sample.py MODEL --quality good     by the sampler that was measured to be worth its time
    python sample.py MODEL --verify           does it draw here what was drawn where it was made?
    python sample.py --like samples/seed-00003.png
    accelerate launch --num_processes 2 sample.py MODEL --num_images 50000 --parquet

MODEL is an id on the Hub, a folder with a pipeline, or a checkpoint of a run folder. Image k comes
from seed --seed + k. docs/sampling.md says what each option does.
"""

import os
import sys
from pathlib import Path

from ddpm import errors
from ddpm.commandline import parse_sample
from ddpm.commands import SampleConfig


def main() -> None:
    config = parse_sample(sys.argv[1:])
    if config.verify:
        verify(config)
        return

    # Heavy imports wait until the command line is known to be good.
    from ddpm import gallery, painting

    if config.like:
        config = parse_sample([*gallery.flags_like(config), *sys.argv[1:]])
    if config.quality:
        config, why = painting.choose_sampler(config)
        say(why)
    if config.image and config.prompt is None and config.mask is None:
        restore(config)
        return

    # Who draws, and what is there already
    painter = painting.open_painter(config)
    rank, world = gallery.place()
    if config.like:
        if rank == 0:
            say(f"{painter}.")
            say(gallery.make_again(config, painter.origin, painter.draw))
        return
    numbers = range(config.num_images) if config.interpolate else range(
        config.seed, config.seed + config.num_images
    )  # fmt: skip
    images = gallery.Gallery(Path(config.output_dir), painter.origin, numbers,
                             "between" if config.interpolate else "seed", rank, world)  # fmt: skip
    left = gallery.missing(images, again=config.trajectory)
    say(painter.remark)
    say(f"{painter}: {config.num_images} image{'s' * (config.num_images != 1)}.")

    # Draw what is missing
    draw(painter, images, left)
    if rank > 0:
        return
    gallery.wait_for_others(images)
    made = gallery.finish(images, config.npz, config.parquet)
    if config.interpolate:
        made.append(gallery.animate(images))

    kept = len(images.share) - len(left)
    there = f", {kept} were there already" if kept else ""
    on = " and on" if len(numbers) > 1 else ""
    drew = f"Drew {len(left)} image{'s' * (len(left) != 1)}{there}"
    say(f"{drew}: {images.path(numbers[0])}{on}; all together: {', '.join(map(str, made))}")


def draw(painter, images, left: list[int]) -> None:
    """Draw the images that are left, with a bar on a terminal."""
    from tqdm.auto import tqdm

    from ddpm import gallery

    drawn = gallery.save(images, painter.draw(left))
    hidden = None if images.rank == 0 else True
    for _ in tqdm(drawn, total=len(left), unit=" images", disable=hidden):
        pass


def restore(config: SampleConfig) -> None:
    """--image: add noise to a picture, take it away again, say how far off the result is."""
    from ddpm import painting

    studio = painting.open_studio(config)
    restored = painting.restore_picture(studio, config)
    say(painting.errors_of(studio, config, restored))
    say(f"noisy.png, prediction.png and restored.png are of level {restored[0].level:.2f}; every "
        f"level: {Path(config.output_dir) / 'strip.png'}")  # fmt: skip


def say(words: str) -> None:
    """Print, unless there is nothing to say or this is not the first process."""
    if words and os.environ.get("RANK", "0") == "0":
        print(words)


def verify(config: SampleConfig) -> None:
    """--verify: draw the model's proof images here, and say how far their pixels are off."""
    from ddpm import proof

    verdict = proof.verify(config.model, config.revision)
    rounding = "" if verdict.difference == 0 else f" (rounding explains {proof.TOLERANCE})"
    print(
        f"{verdict.name} at {verdict.version[:12]}: {verdict.num_images} proof images drawn "
        f"again on the CPU; largest difference of a pixel {verdict.difference} of 255{rounding}."
    )


if __name__ == "__main__":
    errors.run(main)
