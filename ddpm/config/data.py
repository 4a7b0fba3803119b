"""The settings of the data, in train.py and evaluate.py, with a sentence under each field."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ddpm.config.base import (
    PLACE,
    as_flag,
    require,
    require_at_least_one,
    require_fraction,
    require_not_negative,
    require_revision,
)
from ddpm.config.values import Resolution, parse_color, parse_numbers, size_of
from ddpm.errors import UsageError

MAX_RESOLUTION = 2048
DATASET_FIELDS = {"dataset_name", "train_data_dir"}
DATASET_DEPENDENT_FIELDS = {
    "dataset_config_name",
    "dataset_revision",
    "split",
    "image_column",
    "class_conditional",
    "label_column",
    "value_range",
    "held_out",
}
"""Settings that mean something only for the dataset that they were given with."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, and how they become pixels of one size."""

    dataset_name: str | None = field(default=None, metadata=PLACE)
    """Dataset on the Hub (owner/name), a local folder laid out like one or made by save_to_disk, or
    a .parquet, .arrow, .tar (webdataset) or .zip file. With neither this nor train_data_dir,
    train.py trains recipes/digits.json."""
    train_data_dir: str | None = field(default=None, metadata=PLACE)
    """Local folder of image files, whatever their names and depth; instead of dataset_name."""
    resolution: Resolution = 64
    """Size of the training images in pixels: one number for squares, HEIGHT,WIDTH for rectangles,
    such as 48,80 (a list of two in a JSON file)."""
    dataset_config_name: str | None = None
    """Configuration of the dataset; None is its only or default one."""
    dataset_revision: str | None = None
    """Branch, tag or commit of the dataset on the Hub; None is the newest on main."""
    split: str = "train"
    """Split to train on, a slice of it or a sum: train, train[:80%], train+test."""
    held_out: float = 0.0
    """Fraction of the split that is never trained on, so that the loss can be measured on it, from
    0 to below 1: for data without a test or validation split. The seed decides which rows."""
    image_column: str | None = None
    """Column of the images; None is the one of type Image, whatever its name."""
    class_conditional: bool = False
    """Train a model that generates the classes of the dataset: its one column of type ClassLabel,
    or the class folders of train_data_dir."""
    label_column: str | None = None
    """Column of the labels, of type ClassLabel, integers or texts, which is to be trained on; with
    it, class_conditional need not be given."""
    resize_mode: Literal["crop", "pad", "stretch"] = "crop"
    """How images of another aspect ratio come to that of the resolution: crop, pad with the
    background, or stretch."""
    center_crop: bool = False
    """Crop the center of images of another aspect ratio; otherwise a random part each time."""
    random_flip: bool = False
    """Flip images left to right with probability 1/2, each time an image is used."""
    random_vertical_flip: bool = False
    """Flip images upside down with probability 1/2, each time an image is used."""
    random_rotate90: bool = False
    """Turn images by 0, 90, 180 or 270 degrees, each time an image is used. They must be square."""
    random_shift: int = 0
    """Move images by up to this many pixels up or down and left or right, each time an image is
    used; the pixels at the border are repeated. 0 moves none."""
    background: str = "white"
    """Color behind transparent pixels: a name or #rrggbb. For a model of 4 channels, the one that
    evaluate.py measures its images on."""
    max_bad_images: float = 0.01
    """Fraction of the rows that may be unreadable, from 0 to 1; they are skipped and reported."""
    channels: Literal[1, 3, 4] | None = None
    """Train gray (1), color (3), or color and transparency (4); None trains gray when no image of
    the data has any color, and color otherwise."""
    value_range: str | None = None
    """LOW,HIGH: the values of black and white in images deeper than 8 bits; None is 0,65535 for
    integers and 0,1 for floats. An image with values outside is unreadable."""
    streaming: bool = False
    """Read the images from their source in each epoch, for data larger than the disk
    (docs/data.md lists the limits), instead of decoding them once into the cache."""
    shuffle_buffer_size: int = 1000
    """Rows of a stream that are shuffled together, in blocks of all its lanes (docs/data.md)."""
    rows_per_epoch: int | None = None
    """Rows of a stream that count as an epoch; None is the number that the dataset states."""
    cache_dir: str | None = field(default=None, metadata=PLACE)
    """Cache folder of `datasets`; None is HF_DATASETS_CACHE."""

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_data_dir:
            raise UsageError("Give --dataset_name or --train_data_dir, not both.")
        require(self, lambda size: min(size_of(size)) >= 1, "it must be at least 1", "resolution")
        require_at_least_one(self, "shuffle_buffer_size", "rows_per_epoch")
        require_fraction(self, "max_bad_images")
        require_revision(self, "dataset_revision")
        if max(self.size) > MAX_RESOLUTION:
            raise UsageError(
                f"--resolution is {as_flag(self.resolution)}; a UNet on pixels goes up to "
                f"{MAX_RESOLUTION}, and is slow from 256. Give a smaller one."
            )
        if len({*self.size}) == 1:  # 48,48 is 48
            object.__setattr__(self, "resolution", self.size[0])
        require_not_negative(self, "random_shift")
        if self.random_shift >= min(self.size):
            raise UsageError(
                f"--random_shift is {self.random_shift}; it must be below the shorter side of the "
                f"images, {min(self.size)} pixels."
            )
        if self.random_rotate90 and self.size[0] != self.size[1]:
            raise UsageError(
                f"--random_rotate90 turns squares, and --resolution is {as_flag(self.resolution)}: "
                "leave one out."
            )
        if self.center_crop and self.resize_mode != "crop":
            raise UsageError(
                f"--center_crop has no effect with --resize_mode {self.resize_mode}: leave one out."
            )
        if not 0 <= self.held_out < 1:
            raise UsageError(f"--held_out is {self.held_out}; give a fraction from 0 to below 1.")
        if self.held_out and self.streaming:
            raise UsageError(
                "--held_out chooses among all rows, which --streaming does not know: leave it out. "
                "A test or validation split is found, and can be streamed too."
            )
        if self.rows_per_epoch is not None and not self.streaming:
            raise UsageError(
                "--rows_per_epoch is for --streaming: otherwise all rows are an epoch."
            )
        if self.background != "white":
            parse_color(self.background)
        _ = self.value_limits  # raises

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of `resolution`."""
        return size_of(self.resolution)

    @property
    def has_labels(self) -> bool:
        """Whether the labels of the images are read and trained on."""
        return self.class_conditional or self.label_column is not None

    @property
    def value_limits(self) -> tuple[float, float] | None:
        """`value_range` as the two numbers."""
        if self.value_range is None:
            return None
        limits = parse_numbers(self.value_range)
        if len(limits) == 2 and -math.inf < limits[0] < limits[1] < math.inf:
            return limits
        raise UsageError(
            f"--value_range {self.value_range} is not a range. Give the values of black and white, "
            "as in 0,4095."
        )
