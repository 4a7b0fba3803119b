"""The images that others are compared with: their features, looked at once and kept.

    ddpm-features/<key>.safetensors    [N, D] float32, beside the decoded pixels

The key is a function of the pixels and of the network, so a file never goes out of date. Training
with --eval_images and evaluate.py read the same ones.

Legend: N images, D features.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from ddpm import order, runfolder
from ddpm.features import Features
from ddpm.images import ImageSet

LAYOUT = 1
"""Raise when the meaning of a kept file changes: old ones are then left alone."""
NAME = "features"


def real_image(real: ImageSet, row: int) -> torch.Tensor:
    """A row as training sees it, its crop a function of the row: [C, R, R] uint8 on the CPU."""
    return real.batch([row], order.generator(0, "pixels", 0, row), random_flip=False)[0].cpu()


def real_features(
    accelerator: Accelerator, network: Features, real: ImageSet, batch_size: int, words: str | None
) -> torch.Tensor:
    """Features [N, D] of all of `real`, row by row, the same on all processes: call on each.

    Looked at now, by all processes, only where the file of an earlier look is missing. `words` are
    what the progress bar says; None shows none.
    """
    path = real.cache.with_name("ddpm-features") / f"{_key(network, real)}.safetensors"
    kept = _read(path, len(real))
    if not _everywhere(accelerator, kept is not None):

        def batches(mine: Sequence[int]) -> Iterator[torch.Tensor]:
            for start in range(0, len(mine), batch_size):
                pixels = [real_image(real, row) for row in mine[start : start + batch_size]]
                yield network.of(torch.stack(pixels))

        kept = shared(accelerator, len(real), batches, words)
        if accelerator.is_local_main_process:
            runfolder.write_bytes(path, save({NAME: kept.contiguous()}))
    assert kept is not None
    return kept


def shared(
    accelerator: Accelerator,
    count: int,
    batches: Callable[[Sequence[int]], Iterator[torch.Tensor]],
    words: str | None,
) -> torch.Tensor:
    """Rows of numbers of images 0 .. count - 1, of which each process makes every world-th.

    `batches` gives those of the numbers that it is handed. All processes make equally many, the
    last ones perhaps once more: a sharded model needs the others in each of its calls.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    mine = [number % count for number in range(rank, -(-count // world) * world, world)]
    hidden = None if accelerator.is_main_process and words else True
    found = []
    with tqdm(total=len(mine), desc=words, unit=" images", disable=hidden, leave=False) as bar:
        for batch in batches(mine):
            found.append(batch)
            bar.update(len(batch))
    own = torch.cat(found)
    if world == 1:
        return own
    every = accelerator.gather(own.to(accelerator.device)).cpu().view(world, *own.shape)
    return every.transpose(0, 1).reshape(-1, own.shape[1])[:count]


def _key(network: Features, real: ImageSet) -> str:
    what = {"layout": LAYOUT, "images": real.content, "network": network.version,
            "name": network.name, "device": network.device.type}  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path, count: int) -> torch.Tensor | None:
    """What is kept in a file; None where there is none, or none that can be used."""
    try:
        found = load_file(path)[NAME] if os.path.exists(path) else None
    except (OSError, KeyError, SafetensorError):
        return None
    return found if found is not None and found.ndim == 2 and len(found) == count else None


def _everywhere(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so on every process: machines may have caches of their own."""
    return bool(accelerator.gather(torch.tensor([int(here)], device=accelerator.device)).all())
