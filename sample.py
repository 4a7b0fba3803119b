"""Draw images with a published model, or one in a folder; every image has its own seed.

    python sample.py MODEL [--num_images 16] [--seed 0] [--scheduler ddim] [--revision COMMIT]
    python sample.py MODEL --verify          does it draw here what it drew where it was trained?
    python sample.py --help

MODEL is an id on the Hub or a folder with a pipeline. Image k comes from seed --seed + k.
"""

import sys
from pathlib import Path

from ddpm import errors
from ddpm.commandline import parse_sample
from ddpm.config import SampleConfig
from ddpm.errors import UserError


def main() -> None:
    config = parse_sample(sys.argv[1:])
    if config.verify:
        verify(config)
        return

    # Heavy imports wait until the command line is known to be good.
    from importlib.metadata import version

    import torch
    from tqdm.auto import tqdm

    from ddpm import pipeline

    device = pipeline.choose_device(config.device)
    artifact = pipeline.load(config.model, config.revision)
    sampler, steps = pipeline.build_sampler(
        config.scheduler, artifact.scheduler_config, config.num_inference_steps
    )
    print(f"{artifact.name} at {artifact.version[:12]}: {config.num_images} images with "
          f"{config.scheduler}, {steps} steps, on {device}.")  # fmt: skip

    # What is there already: images of the same origin are kept, files that are not ours are not
    # touched.
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    origin = {
        "model": artifact.name,
        "version": artifact.version,
        "scheduler": config.scheduler,
        "num_inference_steps": str(steps),
        "software": f"diffusers {version('diffusers')}, torch {torch.__version__}",
    }
    seeds = range(config.seed, config.seed + config.num_images)
    paths = {seed: folder / f"seed-{seed:05d}.png" for seed in seeds}
    texts = {seed: pipeline.read_png_text(path) for seed, path in paths.items() if path.exists()}
    sheet_path = folder / "grid.png"
    if sheet_path.exists():
        texts[-1] = pipeline.read_png_text(sheet_path)
    strangers = [seed for seed, text in texts.items() if "num_inference_steps" not in text]
    if strangers:
        name = "grid.png" if strangers[0] < 0 else paths[strangers[0]].name
        raise UserError(f"{folder / name} was not made by this command, so it is not replaced. "
                        "Give another --output_dir.")  # fmt: skip
    missing = [seed for seed in seeds if texts.get(seed) != {**origin, "seed": str(seed)}]

    # Draw what is missing
    unet = artifact.unet.to(device)
    drawn = pipeline.generate(unet, sampler, steps, missing, config.batch_size)
    for seed, image in tqdm(drawn, total=len(missing), unit=" images", disable=None):
        pipeline.save_png(image, paths[seed], {**origin, "seed": str(seed)})
    images = [pipeline.read_png(path) for path in list(paths.values())[: pipeline.GRID_LIMIT]]
    pipeline.save_png(pipeline.grid(images), sheet_path, {**origin, "seed": str(config.seed)})

    kept = f", {len(seeds) - len(missing)} were there already" if len(missing) < len(seeds) else ""
    print(f"Drew {len(missing)} images{kept}: {paths[seeds[0]]} and on; all together: {sheet_path}")


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
