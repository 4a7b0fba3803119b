"""Features of the real images: looked at once, and never out of date."""

from pathlib import Path

import pytest
import torch

from ddpm.accelerator import make_accelerator
from ddpm.config.train import DataConfig
from ddpm.data import dataset
from ddpm.evaluation.features import FeatureExtractor, dataset_features, map_over_processes

DIGITS = Path(__file__).parents[2] / "data" / "digits"


class Mean(torch.nn.Module):
    """Mean and largest value of each image; counts the images that it sees."""

    seen = 0

    def forward(self, pixels):
        self.seen += len(pixels)
        flat = pixels.float().flatten(1)
        return torch.stack([flat.mean(1), flat.amax(1)], dim=1)


@pytest.fixture
def looked(tmp_path):
    """looked(data settings) -> (features, how many images the network saw for them)."""
    accelerator = make_accelerator(None)

    def look(version="1", size=16, **settings):
        data = DataConfig(
            dataset_name=str(DIGITS),
            split="train[:40]",
            resolution=8,
            cache_dir=str(tmp_path),
            **settings,
        )
        network = Mean()
        features = FeatureExtractor(network, "mean", version, torch.device("cpu"))
        real = dataset.load_images(data, False)
        return dataset_features(accelerator, features, real, size, None), network.seen

    return look


def test_real_images_are_looked_at_once(looked):
    first, seen = looked()
    assert seen == 40 and first.shape == (40, 2)
    again, seen = looked()
    assert seen == 0 and torch.equal(first, again)


def test_other_images_or_another_network_are_looked_at_anew(looked):
    looked()
    assert looked(version="2")[1] == 40
    few, seen = looked(held_out=0.5)
    assert seen == 20 and len(few) == 20
    assert looked()[1] == 0


def test_a_damaged_file_is_made_anew(looked, tmp_path):
    whole, _ = looked()
    (file,) = (tmp_path / "ddpm-features").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    again, seen = looked()
    assert seen == 40 and torch.equal(whole, again)
    assert looked()[1] == 0


def test_processes_share_in_equal_parts():
    """What four processes would make, put together by hand: every number once, in order."""

    class Fake:
        num_processes, is_main_process, device = 4, False, torch.device("cpu")

        def __init__(self, rank, parts):
            self.process_index, self.parts = rank, parts

        def gather(self, own):
            self.parts[self.process_index] = own
            return torch.cat([self.parts.get(rank, torch.full_like(own, -1)) for rank in range(4)])

    parts = {}
    for rank in range(4):
        made = []

        def batches(mine, made=made):
            made.append(len(mine))
            for start in range(0, len(mine), 2):
                yield torch.tensor(mine[start : start + 2], dtype=torch.float32)[:, None]

        found = map_over_processes(Fake(rank, parts), 10, batches, None)
        assert made == [3]
    assert found.flatten().tolist() == list(range(10))
