"""Decoded once: the cache, batches, bad rows, two processes at once, a kill halfway."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.config.train import DataConfig
from ddpm.data import dataset, decode, order
from ddpm.errors import UsageError, UserError
from tests.files import encoded, gray, noise, write_parquet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def parquet(tmp_path):
    """Write a folder that load_dataset opens, from bytes of images: parquet(files, column=...)."""

    def write(files: list[bytes | None], column: str = "image", split: str = "train") -> str:
        return str(write_parquet(tmp_path / f"data/{split}.parquet", files, column).parent)

    return write


def load(name: str, device: torch.device | None = None, seed: int = 0, **settings):
    config = DataConfig(**{"dataset_name": name, "resolution": 4, **settings})
    return dataset.load_images(config, False, device, seed)


def values(found: dataset.ImageDataset) -> list[int]:
    """The first pixel of every row."""
    return [int(found.pixels(row)[0, 0, 0]) for row in range(len(found))]


def wide() -> bytes:
    """4 rows, 12 columns; the value of a pixel is its column."""
    return encoded(np.tile(np.arange(12, dtype=np.uint8), (4, 1)))


def batch(found: dataset.ImageDataset, rows: list[int], seed: int = 0, flip: bool = True):
    return found.batch(rows, torch.Generator().manual_seed(seed), flip)


# From rows to pixels


def test_rows_are_read_in_order_with_their_facts(parquet):
    found, facts = load(parquet(gray(1, 2, 3), column="scan"))
    assert values(found) == [1, 2, 3]
    assert found.channels == 1
    assert (facts["rows"], facts["images"], facts["image_column"]) == (3, 3, "scan")
    assert (facts["name"], facts["revision"], facts["on_hub"]) == ("data", None, False)
    assert json.loads(json.dumps(facts)) == facts


def test_gray_data_trains_one_channel_and_one_colour_makes_it_three(parquet):
    stored_as_rgb = encoded(np.full((4, 4), 9, np.uint8), "RGB")
    deep = encoded(np.full((4, 4), 257, np.uint16))
    found, facts = load(parquet([*gray(1), stored_as_rgb, deep]))
    assert found.channels == facts["channels"] == 1
    assert values(found) == [1, 9, 1]
    assert facts["modes"] == {"L": 1, "RGB": 1, "I;16": 1}
    colour = np.full((4, 4, 3), (0, 0, 1), np.uint8)
    found, facts = load(parquet([*gray(7), encoded(colour), stored_as_rgb]))
    assert found.channels == facts["channels"] == 3
    assert found.pixels(0).tolist() == [[[7] * 4] * 4] * 3
    assert found.pixels(1)[:, 0, 0].tolist() == [0, 0, 1]
    assert found.pixels(2).tolist() == [[[9] * 4] * 4] * 3


def test_channels_are_as_asked(parquet):
    name = parquet([*gray(7), encoded(np.full((4, 4, 3), (255, 0, 0), np.uint8))])
    found, facts = load(name, channels=1)
    assert (found.channels, values(found)) == (1, [7, 76])
    assert facts["channels_why"] == "--channels"
    found, _ = load(parquet(gray(7)), channels=3)
    assert found.pixels(0).tolist() == [[[7] * 4] * 4] * 3


def test_pixels_are_known_by_their_hash(parquet):
    """What a checkpoint compares: the stored bytes, whichever way they came."""
    import hashlib

    def sha(files, **settings):
        return load(parquet(files), **settings)[1]["pixels_sha256"]

    plain = hashlib.sha256(b"\1" * 16 + b"\2" * 16).hexdigest()
    assert sha(gray(1, 2)) == plain
    assert sha(gray(1, 2), channels=3) == hashlib.sha256(b"\1" * 48 + b"\2" * 48).hexdigest()
    coloured = np.full((4, 4, 3), (0, 0, 9), np.uint8)
    mixed = b"\1" * 48 + coloured.transpose(2, 0, 1).tobytes()
    assert sha([*gray(1), encoded(coloured)]) == hashlib.sha256(mixed).hexdigest()


def test_settings_that_mean_nothing_are_refused(parquet):
    with pytest.raises(UsageError, match="--background wite is no colour"):
        load(parquet(gray(1)), background="wite")
    with pytest.raises(UsageError, match="--value_range 5 is no range"):
        load(parquet(gray(1)), value_range="5")


def test_settings_reach_the_pixels(parquet):
    name = parquet([encoded(np.zeros((4, 4, 4), np.uint8))])
    assert load(name)[0].pixels(0)[:, 0, 0].tolist() == [255]
    assert load(name, background="#010203")[0].pixels(0)[:, 0, 0].tolist() == [1, 2, 3]
    name = parquet([encoded(np.full((4, 4), 819, np.uint16))])
    assert values(load(name, value_range="0,4095")[0]) == [51]
    assert load(parquet([wide()]), resize_mode="pad")[0].shapes.tolist() == [[4, 4]]


# Batches


def test_crops_and_flips_depend_only_on_the_generator(parquet):
    found, _ = load(parquet([wide()] * 8))
    rows = list(range(8))
    first = batch(found, rows)
    torch.rand(3)
    assert torch.equal(batch(found, rows), first)
    assert not torch.equal(batch(found, rows, seed=1), first)
    halves = torch.cat([batch(found, rows[:4]), batch(found, rows[:4])])
    assert torch.equal(halves[:4], halves[4:])


@pytest.mark.parametrize("square", [True, False])
def test_flip_mirrors_about_half_and_nothing_else(parquet, square):
    found, _ = load(parquet([wide()]), center_crop=square)
    plain, flipped = (batch(found, [0] * 400, flip=flip) for flip in (False, True))
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    same = (flipped == plain).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250


def test_square_rows_come_as_asked_and_the_cache_is_not_touched_by_changing_them(parquet):
    found, _ = load(parquet(gray(1, 2, 3)))
    made = batch(found, [2, 0, 2], flip=False)
    assert made[:, 0, 0, 0].tolist() == [3, 1, 3]
    made.fill_(99)
    assert values(found) == [1, 2, 3]


@pytest.mark.parametrize("in_memory", [True, False])
def test_mapped_file_gives_the_same_as_a_copy_in_memory(parquet, monkeypatch, in_memory):
    monkeypatch.setattr(dataset, "_free", lambda device: 2**40 if in_memory else 0)
    mapped = []
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *a, **k: mapped.append(1) or memmap(*a, **k))
    found, _ = load(parquet([wide(), *gray(5, 6)]))
    assert bool(mapped) is not in_memory
    expected = decode.decode_row(
        {"bytes": wide()}, decode.DecodeConfig.of(DataConfig(resolution=4))
    )[0]
    assert found.pixels(0).tolist() == expected.tolist()
    assert values(found) == [0, 5, 6]
    found.pixels(1).fill_(99)  # nobody does this; the file must not change all the same
    assert values(load(parquet([wide(), *gray(5, 6)]))[0]) == [0, 5, 6]


def test_accelerator_gets_the_same_pixels_by_one_gather(parquet):
    """The way of an accelerator, taken on the CPU: the same draws give the same pixels."""
    files = [wide(), encoded(noise(9, 4)), encoded(noise(6, 5)), *gray(7)]
    found, _ = load(parquet(files))
    rows, draws = [3, 0, 1, 2, 0], torch.rand(5, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found._gathered(rows, draws), batch(found, rows, seed=3, flip=False))


def test_small_data_lives_on_the_device_and_large_data_does_not(parquet, monkeypatch):
    """`meta` stands for an accelerator: it has no memory, so only the placing can be seen."""
    name, device = parquet(gray(1, 2)), torch.device("meta")
    for free, place in ((320, "cpu"), (330, "meta")):  # 32 bytes, of which a tenth may be taken
        monkeypatch.setattr(dataset, "_free", lambda asked, free=free: free)
        assert load(name, device)[0].device.type == place


def test_rows_are_those_of_the_order(parquet):
    found, _ = load(parquet(gray(*range(10))), seed=5)
    assert found.rows(7, 8) == order.row_indices(5, 10, 7, 8)
    assert found.state(7) is None


# Bad rows


def test_unreadable_images_are_counted_named_and_skipped(parquet):
    cut = encoded(noise(64, 64))[:-500]
    name = parquet([*gray(1), b"no image at all", *gray(2), cut, None, *gray(3)])
    found, facts = load(name, max_bad_images=0.5)
    assert values(found) == [1, 2, 3]
    assert (facts["rows"], facts["images"], facts["unreadable"]) == (6, 3, 3)
    assert facts["unreadable_first"] == [
        "row 1: not a readable image",
        "row 3: image file is truncated",
        "row 4: no image in this row",
    ]
    assert load(name, max_bad_images=0.5)[1] == facts  # the same from the cache


def test_more_unreadable_images_than_allowed_are_refused(parquet):
    name = parquet([*gray(*range(8)), b"bad", b"bad"])
    assert len(load(name, max_bad_images=0.2)[0]) == 8
    for limit in (0.19, 0.01, 0.0):
        reason = f"2 of 10 images cannot be read, more than --max_bad_images {limit:g} allows. The"
        with pytest.raises(UserError, match=f"{reason} first: row 8: not a readable image; row 9"):
            load(name, max_bad_images=limit)


@pytest.mark.parametrize("limit", [0.01, 1.0])
def test_nothing_readable_is_refused_whatever_is_allowed(parquet, limit):
    with pytest.raises(UserError, match="None of the 2 images can be read. The first: row 0"):
        load(parquet([b"bad", b"worse"]), max_bad_images=limit)


# The cache


@pytest.fixture
def refuse_to_decode(monkeypatch):
    def refuse(*args):
        raise AssertionError("decoded again")

    return lambda: monkeypatch.setattr(dataset, "_decode_all", refuse)


def test_second_time_reads_the_cache(parquet, refuse_to_decode):
    name = parquet(gray(1, 2))
    first, _ = load(name)
    refuse_to_decode()
    second, _ = load(name)
    assert all(torch.equal(first.pixels(row), second.pixels(row)) for row in range(2))
    load(name, random_flip=True, max_bad_images=1.0)  # settings that change no stored pixel


@pytest.mark.parametrize(
    "changed",
    [
        {"resolution": 8},
        {"center_crop": True},
        {"background": "black"},
        {"channels": 3},
        {"resize_mode": "pad"},
        {"value_range": "0,9"},
    ],
)
def test_what_changes_the_pixels_decodes_anew(parquet, refuse_to_decode, changed):
    name = parquet(gray(1))
    load(name)
    refuse_to_decode()
    with pytest.raises(AssertionError, match="decoded again"):
        load(name, **changed)


def test_changed_data_decodes_anew(parquet, tmp_path):
    assert values(load(parquet(gray(1)))[0]) == [1]
    assert values(load(parquet(gray(2)))[0]) == [2]
    (tmp_path / "files").mkdir()
    for value in (3, 4):
        (tmp_path / "files/a.png").write_bytes(gray(value)[0])
        config = DataConfig(train_data_dir=str(tmp_path / "files"), resolution=4)
        assert values(dataset.load_images(config, False)[0]) == [value]


@pytest.mark.parametrize("damage", ["pixels.bin", "index.json", "both"])
def test_damaged_cache_is_made_anew(parquet, tmp_path, damage):
    name, cache = parquet(gray(1, 2, 3)), str(tmp_path / "cache")
    load(name, cache_dir=cache)
    for file in Path(cache, "ddpm-pixels").glob("*/*"):
        if damage in (file.name, "both"):
            os.truncate(file, file.stat().st_size // 2)
    assert values(load(name, cache_dir=cache)[0]) == [1, 2, 3]


def test_more_images_than_are_decoded_ahead_stay_in_order(parquet):
    found, _ = load(parquet([encoded(np.full((4, 4), n % 251, np.uint8)) for n in range(600)]))
    assert values(found) == [n % 251 for n in range(600)]


def test_disk_without_room_is_told_before_decoding(parquet, monkeypatch):
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 31}))
    with pytest.raises(
        UserError, match="2 images of 4x4 need at least 0.0 GiB in .*another --cach"
    ):
        load(parquet(gray(1, 2)))


SLOWLY = """
import sys, time
from ddpm.config.train import DataConfig
from ddpm.data import dataset, decode
read = decode.decode_row
def slowly(*args):
    time.sleep(0.02)
    return read(*args)
decode.decode_row = slowly
print("started", flush=True)
found, facts = dataset.load_images(
    DataConfig(dataset_name=sys.argv[1], resolution=4, cache_dir=sys.argv[2]), False)
print(facts["pixels_sha256"], [int(found.pixels(row)[0, 0, 0]) for row in range(len(found))])
"""


def slow_load(name: str, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SLOWLY, name, str(cache)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_processes_at_once_decode_once_and_agree(parquet, tmp_path):
    name, cache = parquet(gray(*range(100))), tmp_path / "cache"
    both = [slow_load(name, cache) for _ in range(2)]
    (first, error), (second, _) = (process.communicate(timeout=120) for process in both)
    assert first == second, error
    assert first.endswith(f"{list(range(100))}\n")
    made = sorted(path.suffix for path in (cache / "ddpm-pixels").iterdir())
    assert made == ["", ".lock"]


def test_kill_halfway_leaves_nothing_in_the_way(parquet, tmp_path):
    """SIGKILL while pixels are being written; the next run starts anew and is right."""
    name, cache = parquet(gray(*range(200))), tmp_path / "cache"
    process = slow_load(name, cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob("ddpm-pixels/*.partial/pixels.bin")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(cache.glob("ddpm-pixels/*/index.json"))
    found, _ = load(name, cache_dir=str(cache))
    assert values(found) == list(range(200))
    assert not list(cache.glob("ddpm-pixels/*.partial"))
