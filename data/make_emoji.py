"""Make data/emoji from the Twemoji graphics in the npm package emoji-datasource-twitter.

    npm pack emoji-datasource-twitter@16.0.0 && tar xzf emoji-datasource-twitter-16.0.0.tgz
    pip install -r requirements-dev.txt && python data/make_emoji.py --package package

Each row is an emoji, reduced with its transparency: PNGs in parquet with a dataset card, a
`datasets` repository folder like data/digits. Without --package it is downloaded with npm. `--size
64 --output emoji-64` writes the graphics in their full size.
"""

import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import tyro
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PillowImage
from sklearn.model_selection import train_test_split

PACKAGE = "emoji-datasource-twitter@16.0.0"
SMALL = "faces-hearts-flags"
CARD = """---
license: cc-by-4.0
pretty_name: Twemoji graphics ({size}x{size})
task_categories:
- unconditional-image-generation
- image-classification
size_categories:
- 1K<n<10K
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: test
    path: data/test-*.parquet
- config_name: {small}
  data_files:
  - split: train
    path: data/train-00000-of-00002.parquet
  - split: test
    path: data/test-00000-of-00002.parquet
---

# Twemoji graphics ({size}x{size})

{total:,} emoji as {size}x{size} pictures with transparency: {train:,} to train on, {test:,} held
out, every category in the same proportion in both. The configuration `{small}` is a part
of it: smileys, hearts, faces of animals and flags, {small_train:,} to train on and {small_test:,}
held out.

| column | type | what |
|---|---|---|
| `image` | {size}x{size} PNG, mode RGBA | the graphic; what is not drawn is transparent |
| `label` | 0 to {last} | its category: {names} |
| `name` | text | Unicode's name |
| `unified` | text | its code points |

**Source.** [Twemoji](https://github.com/jdecked/twemoji), copyright Twitter, Inc and other
contributors, graphics licensed [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). Taken at
64x64 from the npm package `{package}`
([iamcal/emoji-data](https://github.com/iamcal/emoji-data), MIT), which names the emoji.

**Changes.** Resized to {size}x{size} (area average of premultiplied colours). Only emoji drawn by
Twemoji; variants of skin colour are left out, since they would be half of the rows. The split is
ours: stratified, seed 0. `data/make_emoji.py` makes all of it.

**Features.** `data/emoji/features.safetensors` is a small classifier of these emoji at 16x16 over
white, trained on the training split by `data/make_features.py`. It finds the category of 133 of
the 192 held-out emoji; its last hidden layer is the space in which generated emoji are compared
with real ones.
"""


def main(
    package: Path | None = None, size: int = 32, output: Path = Path(__file__).parent / "emoji"
) -> None:
    """Write the dataset folder OUTPUT with images of `size` x `size` pixels, at most 64."""
    with tempfile.TemporaryDirectory() as scratch:
        package = package or download(Path(scratch))
        emoji = drawn_by_twemoji(json.loads((package / "emoji.json").read_text(encoding="utf-8")))
        images = [png(package / "img" / "twitter" / "64" / row["image"], size) for row in emoji]
    names = sorted({row["category"] for row in emoji})
    labels = [names.index(row["category"]) for row in emoji]
    train, test = train_test_split(
        range(len(emoji)), test_size=0.1, stratify=labels, random_state=0
    )
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=names),
            "name": Value("string"),
            "unified": Value("string"),
        }
    )
    (output / "data").mkdir(parents=True, exist_ok=True)
    sizes = {}
    for split, rows in (("train", train), ("test", test)):
        chosen = [row for row in rows if is_simple(emoji[row])]
        others = [row for row in rows if not is_simple(emoji[row])]
        sizes[split] = len(chosen)
        for number, part in enumerate((chosen, others)):
            columns = {
                "image": [{"bytes": images[row], "path": None} for row in part],
                "label": [labels[row] for row in part],
                "name": [emoji[row]["name"] for row in part],
                "unified": [emoji[row]["unified"] for row in part],
            }
            path = output / "data" / f"{split}-{number:05d}-of-00002.parquet"
            Dataset.from_dict(columns, features=features).to_parquet(path)
    card = CARD.format(
        size=size,
        total=len(emoji),
        train=len(train),
        test=len(test),
        last=len(names) - 1,
        names=", ".join(names),
        package=PACKAGE,
        small=SMALL,
        small_train=sizes["train"],
        small_test=sizes["test"],
    )
    (output / "README.md").write_text(card, encoding="utf-8")


def download(folder: Path) -> Path:
    """Download the package with npm and return its folder, unpacked in `folder`."""
    process = subprocess.run(
        ["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, stdout=subprocess.PIPE
    )
    with tarfile.open(folder / process.stdout.decode().split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def drawn_by_twemoji(emoji: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of emoji.json that have an image of Twemoji, in Unicode order."""
    return sorted((row for row in emoji if row["has_img_twitter"]), key=lambda r: r["sort_order"])


def is_simple(row: dict[str, Any]) -> bool:
    """Return whether an emoji belongs to SMALL: kinds with similar images, learned soonest."""
    animal = row["category"] == "Animals & Nature" and row["name"].endswith("FACE")
    return animal or row["category"] in ("Smileys & Emotion", "Flags")


def png(path: Path, size: int) -> bytes:
    """Reduce a graphic to `size` x `size` with its transparency; return the bytes of a PNG file."""
    with PillowImage.open(path) as image:
        # Pillow premultiplies RGBA before it resizes, so transparent pixels add no color.
        small = image.convert("RGBA").resize((size, size), PillowImage.Resampling.BOX)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    tyro.cli(main)
