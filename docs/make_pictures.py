"""Make the README's picture from a finished digits run.

    accelerate launch train.py && python docs/make_pictures.py ddpm-digits

Left to right, preview grids of the run, from the same 16 seeds: after 36 steps, 108, 396 and the
last, each under its number of steps.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

STEPS = (36, 108, 396)
GAP, LABEL_HEIGHT = 16, 26


def main() -> None:
    run = Path(sys.argv[1])
    grids = sorted((run / "samples").glob("step-*.png"))
    chosen = [run / "samples" / f"step-{step:06d}.png" for step in STEPS] + [grids[-1]]
    pictures = [Image.open(path) for path in chosen]
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    strip = Image.new("L", (width, LABEL_HEIGHT + pictures[0].height), 255)
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(16)
    left = 0
    for path, picture in zip(chosen, pictures, strict=True):
        label = f"after {int(path.stem.removeprefix('step-')):,} steps"
        draw.text((left + picture.width // 2, 4), label, 0, font=font, anchor="ma")
        strip.paste(picture, (left, LABEL_HEIGHT))
        left += picture.width + GAP
    path = Path(__file__).parent / "images" / "digits.png"
    path.parent.mkdir(exist_ok=True)
    strip.save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    main()
