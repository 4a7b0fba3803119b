"""Make data/digits from scikit-learn's copy of UCI's handwritten digits.

    pip install -r requirements-dev.txt && python data/make_digits.py

The 1,797 images become a `datasets` repository folder: PNGs in parquet, one file a split, with
image and label features, and a dataset card. `load_dataset("./data/digits")` reads it like a
repository on the Hub.
"""

import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FOLDER = Path(__file__).parent / "digits"
FEATURES = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in range(10)])})
CARD = """---
license: cc-by-4.0
pretty_name: Optical Recognition of Handwritten Digits (8x8)
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
---

# Optical Recognition of Handwritten Digits (8x8)

{total:,} handwritten digits as 8x8 grayscale images: {train:,} to train on, {test:,} held out,
every digit in the same proportion in both.

| column | type | what |
|---|---|---|
| `image` | 8x8 PNG, mode L | black paper, white ink |
| `label` | 0 to 9 | which digit |

**Source.** E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine
Learning Repository, 1998, https://doi.org/10.24432/C50P49, license
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). Taken from the copy in scikit-learn
(`sklearn.datasets.load_digits`), which holds the source's test part: digits of 13 writers.

**Changes.** The source counts ink in 4x4 blocks, 0 to 16; here 16 is 255, in 8-bit gray. The
split is ours: stratified, seed 0. `data/make_digits.py` makes all of it.

**Features.** `features.safetensors` is a small classifier of these digits, trained on the training
split by `data/make_features.py`. It reads 359 of the 360 held-out digits right; its last
hidden layer is the space in which drawn digits are compared with real ones.
"""


def main() -> None:
    digits = load_digits()
    gray = np.rint(digits.images * 255 / 16).astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(gray)), test_size=0.2, stratify=digits.target, random_state=0
    )
    (FOLDER / "data").mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        columns = {
            "image": [{"bytes": png(gray[row]), "path": None} for row in rows],
            "label": [int(digits.target[row]) for row in rows],
        }
        path = FOLDER / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(columns, features=FEATURES).to_parquet(path)
    card = CARD.format(total=len(gray), train=len(train), test=len(test))
    (FOLDER / "README.md").write_text(card, encoding="utf-8")


def png(pixels: np.ndarray) -> bytes:
    """Return [H, W] uint8 as the bytes of a PNG file."""
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
