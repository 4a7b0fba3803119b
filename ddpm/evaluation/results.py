"""What evaluate.py measures, as it is kept in evaluation.json."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TimestepLosses:
    """Mean squared errors of `num_images` images of each split, in K bands of timesteps.

    `bands`: first and last timestep of each band. `held_out` and `trained` hold K losses of each
    name: "model" for the exported weights, "raw" for those before averaging, where they are known.
    """

    num_images: int
    bands: list[tuple[int, int]]
    held_out: dict[str, list[float]]
    trained: dict[str, list[float]]
