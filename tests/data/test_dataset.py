"""ImageDataset and its cache: batches, unreadable rows, two processes, a killed process."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from ddpm.config.data import DataConfig
from ddpm.data import dataset, decode, order, pixel_cache, transforms
from ddpm.data.source import Source
from ddpm.errors import UsageError, UserError
from ddpm.run_record import DatasetRecord
from tests.files import encoded, gray, noise, write_parquet


@pytest.fixture
def parquet(tmp_path):
    """Write a folder that load_dataset opens, from bytes of images: parquet(files, column=...)."""

    def write(files: list[bytes | None], column: str = "image", split: str = "train") -> str:
        return str(write_parquet(tmp_path / f"data/{split}.parquet", files, column).parent)

    return write


def load(name: str, device: torch.device | None = None, seed: int = 0, **settings):
    config = DataConfig(**{"dataset_name": name, "resolution": 4, **settings})
    return dataset.load_images(config, False, device, seed)


def values(images: dataset.ImageDataset) -> list[int]:
    """The first pixel of every row."""
    return [int(images.pixels(row)[0, 0, 0]) for row in range(len(images))]


def wide_image() -> bytes:
    """4 rows, 12 columns; the value of a pixel is its column."""
    return encoded(np.tile(np.arange(12, dtype=np.uint8), (4, 1)))


def batch(images: dataset.ImageDataset, rows: list[int], seed: int = 0, flip: bool = True):
    augmentation = DataConfig(random_flip=flip)
    return images.batch(rows, torch.Generator().manual_seed(seed), augmentation).images


# From rows to pixels


def test_rows_keep_their_order(parquet):
    images = load(parquet(gray(1, 2, 3), column="scan"))
    facts = images.facts
    assert values(images) == [1, 2, 3]
    assert images.channels == 1
    assert (facts.rows, facts.images, facts.image_column) == (3, 3, "scan")
    assert (facts.name, facts.revision, facts.on_hub) == ("data", None, False)
    assert json.loads(json.dumps(asdict(facts))) == asdict(facts)


def test_gray_data_trains_one_channel_and_one_color_makes_it_three(parquet):
    stored_as_rgb = encoded(np.full((4, 4), 9, np.uint8), "RGB")
    deep = encoded(np.full((4, 4), 257, np.uint16))
    images = load(parquet([*gray(1), stored_as_rgb, deep]))
    facts = images.facts
    assert images.channels == facts.channels == 1
    assert values(images) == [1, 9, 1]
    assert facts.modes == {"L": 1, "RGB": 1, "I;16": 1}
    color = np.full((4, 4, 3), (0, 0, 1), np.uint8)
    images = load(parquet([*gray(7), encoded(color), stored_as_rgb]))
    facts = images.facts
    assert images.channels == facts.channels == 3
    assert images.pixels(0).tolist() == [[[7] * 4] * 4] * 3
    assert images.pixels(1)[:, 0, 0].tolist() == [0, 0, 1]
    assert images.pixels(2).tolist() == [[[9] * 4] * 4] * 3


def test_channels_are_configurable(parquet):
    name = parquet([*gray(7), encoded(np.full((4, 4, 3), (255, 0, 0), np.uint8))])
    images = load(name, channels=1)
    facts = images.facts
    assert (images.channels, values(images)) == (1, [7, 76])
    assert facts.channels_why == "set by --channels or the pretrained model"
    images = load(parquet(gray(7)), channels=3)
    assert images.pixels(0).tolist() == [[[7] * 4] * 4] * 3


def test_pixel_hash_is_that_of_the_stored_bytes(parquet):
    """A checkpoint compares it."""
    import hashlib

    def sha(files, **settings):
        return load(parquet(files), **settings).facts.pixels_sha256

    plain = hashlib.sha256(b"\1" * 16 + b"\2" * 16).hexdigest()
    assert sha(gray(1, 2)) == plain
    assert sha(gray(1, 2), channels=3) == hashlib.sha256(b"\1" * 48 + b"\2" * 48).hexdigest()
    colored = np.full((4, 4, 3), (0, 0, 9), np.uint8)
    mixed = b"\1" * 48 + colored.transpose(2, 0, 1).tobytes()
    assert sha([*gray(1), encoded(colored)]) == hashlib.sha256(mixed).hexdigest()


def test_invalid_settings_are_refused(parquet):
    with pytest.raises(UsageError, match="--background wite is not a color"):
        load(parquet(gray(1)), background="wite")
    with pytest.raises(UsageError, match="--value_range 5 is not a range"):
        load(parquet(gray(1)), value_range="5")


def test_settings_reach_the_pixels(parquet):
    name = parquet([encoded(np.zeros((4, 4, 4), np.uint8))])
    assert load(name).pixels(0)[:, 0, 0].tolist() == [255]
    assert load(name, background="#010203").pixels(0)[:, 0, 0].tolist() == [1, 2, 3]
    name = parquet([encoded(np.full((4, 4), 819, np.uint16))])
    assert values(load(name, value_range="0,4095")) == [51]
    assert load(parquet([wide_image()]), resize_mode="pad").shapes.tolist() == [[4, 4]]


# Batches


def test_crops_and_flips_depend_only_on_the_generator(parquet):
    images = load(parquet([wide_image()] * 8))
    rows = list(range(8))
    first = batch(images, rows)
    torch.rand(3)
    assert torch.equal(batch(images, rows), first)
    assert not torch.equal(batch(images, rows, seed=1), first)
    halves = torch.cat([batch(images, rows[:4]), batch(images, rows[:4])])
    assert torch.equal(halves[:4], halves[4:])


@pytest.mark.parametrize("square", [True, False])
def test_flip_mirrors_about_half_of_the_images(parquet, square):
    images = load(parquet([wide_image()]), center_crop=square)
    plain, flipped = (batch(images, [0] * 400, flip=flip) for flip in (False, True))
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    same = (flipped == plain).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250


def test_all_augmentations_reach_a_batch(parquet):
    augmentation = DataConfig(
        random_flip=True, random_vertical_flip=True, random_rotate90=True, random_shift=1
    )
    images = load(parquet([wide_image()]), center_crop=True)
    pixels = images.batch([0] * 400, torch.Generator().manual_seed(0), augmentation).images
    draws = transforms.draw_transforms(400, torch.Generator().manual_seed(0))
    plain = images.pixels(0).expand(400, -1, -1, -1)
    assert torch.equal(pixels, transforms.augment(plain, draws, augmentation))
    assert len(pixels.unique(dim=0)) == 12  # a gradient, or one shifted each way, turned four times


def test_batch_is_a_copy_of_the_selected_rows(parquet):
    images = load(parquet(gray(1, 2, 3)))
    pixels = batch(images, [2, 0, 2], flip=False)
    assert pixels[:, 0, 0, 0].tolist() == [3, 1, 3]
    pixels.fill_(99)
    assert values(images) == [1, 2, 3]


@pytest.mark.parametrize("in_memory", [True, False])
def test_mapped_file_equals_a_copy_in_memory(parquet, monkeypatch, in_memory):
    monkeypatch.setattr(dataset, "_free_memory", lambda device: 2**40 if in_memory else 0)
    mapped = []
    mmap = dataset.mmap.mmap
    monkeypatch.setattr(dataset.mmap, "mmap", lambda *a, **k: mapped.append(1) or mmap(*a, **k))
    images = load(parquet([wide_image(), *gray(5, 6)]))
    assert bool(mapped) is not in_memory
    expected = decode.decode_row(
        {"bytes": wide_image()}, decode.DecodeConfig.of(DataConfig(resolution=4)), None
    )[0]
    assert images.pixels(0).tolist() == expected.tolist()
    assert values(images) == [0, 5, 6]
    images.pixels(1).fill_(99)  # the file must not change
    assert values(load(parquet([wide_image(), *gray(5, 6)]))) == [0, 5, 6]


def test_more_pixels_than_memory_are_mapped(tmp_path):
    """117 GiB in a file with holes, more than Linux maps as writable memory here."""
    rows, path = 40_000, tmp_path / "key" / "pixels.bin"
    path.parent.mkdir()
    path.touch()
    os.truncate(path, rows * 3 * 1024 * 1024)
    shapes = np.full((rows, 2), 1024, np.int32)
    facts = {"name": "data", "on_hub": False, "split": "train", "image_column": "image"}
    cached = pixel_cache.CachedPixels(path, 3, shapes, DatasetRecord(**facts), None, None)
    images = dataset.ImageDataset(cached, 1024)
    pixels = images.batch([0, rows - 1], torch.Generator()).images
    assert pixels.shape == (2, 3, 1024, 1024) and not pixels.any()


def test_gather_on_an_accelerator_gives_the_same_pixels(parquet):
    """gather_crops, which accelerators use, on the CPU: the same draws give the same pixels."""
    files = [wide_image(), encoded(noise(9, 4)), encoded(noise(6, 5)), *gray(7)]
    images = load(parquet(files))
    rows, draws = [3, 0, 1, 2, 0], torch.rand(5, 3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(images._gather(rows, draws), batch(images, rows, seed=3, flip=False))


def test_rectangles_are_height_by_width(parquet):
    """Images of the size itself are not cropped; of others the draws choose the part."""
    files = [wide_image(), encoded(noise(9, 8)), encoded(noise(6, 5)), *gray(7)]
    images = load(parquet(files), resolution=(4, 8))
    rows, draws = [3, 0, 1, 2, 0], torch.rand(5, 3, generator=torch.Generator().manual_seed(3))
    crops = batch(images, rows, seed=3, flip=False)
    assert images.size == (4, 8) and crops.shape == (5, 1, 4, 8)
    assert torch.equal(images._gather(rows, draws), crops)
    whole = load(parquet(files), resolution=(4, 8), resize_mode="stretch")
    assert torch.equal(batch(whole, [2], flip=False)[0], whole.pixels(2))
    assert whole.pixels(2).shape == (1, 4, 8)
    assert whole.fingerprint != load(parquet(files), resolution=(8, 4)).fingerprint


def test_small_data_is_stored_on_the_accelerator(parquet, monkeypatch):
    """The device `meta` stands for an accelerator: only the placement can be tested."""
    name, device = parquet(gray(1, 2)), torch.device("meta")
    for free, expected in ((320, "cpu"), (330, "meta")):  # 32 bytes; a tenth of the free memory
        monkeypatch.setattr(dataset, "_free_memory", lambda device, free=free: free)
        assert load(name, device).device.type == expected


def test_rows_follow_the_order(parquet):
    images = load(parquet(gray(*range(10))), seed=5)
    assert images.rows(7, 8) == order.row_indices(5, 10, 7, 8)
    assert images.state(7) is None


# Unreadable rows


def test_unreadable_images_are_counted_named_and_skipped(parquet):
    cut = encoded(noise(64, 64))[:-500]
    name = parquet([*gray(1), b"no image at all", *gray(2), cut, None, *gray(3)])
    images = load(name, max_bad_images=0.5)
    facts = images.facts
    assert values(images) == [1, 2, 3]
    assert (facts.rows, facts.images, facts.unreadable) == (6, 3, 3)
    assert facts.unreadable_first == [
        "row 1: not a readable image",
        "row 3: image file is truncated",
        "row 4: no image in this row",
    ]
    assert load(name, max_bad_images=0.5).facts == facts  # the same from the cache


def test_too_many_unreadable_images_are_refused(parquet):
    name = parquet([*gray(*range(8)), b"bad", b"bad"])
    assert len(load(name, max_bad_images=0.2)) == 8
    for limit in (0.19, 0.01, 0.0):
        reason = f"2 of 10 images cannot be read, more than --max_bad_images {limit:g} allows. The"
        with pytest.raises(UserError, match=f"{reason} first: row 8: not a readable image; row 9"):
            load(name, max_bad_images=limit)


@pytest.mark.parametrize("limit", [0.01, 1.0])
def test_data_without_a_readable_image_is_refused(parquet, limit):
    with pytest.raises(UserError, match="None of the 2 images can be read. The first: row 0"):
        load(parquet([b"bad", b"worse"]), max_bad_images=limit)


# The cache


@pytest.fixture
def refuse_to_decode(monkeypatch):
    def refuse(*args):
        raise AssertionError("decoded again")

    return lambda: monkeypatch.setattr(pixel_cache, "_decode_all", refuse)


def test_second_load_reads_the_cache(parquet, refuse_to_decode):
    name = parquet(gray(1, 2))
    first_images = load(name)
    refuse_to_decode()
    second_images = load(name)
    assert all(torch.equal(first_images.pixels(row), second_images.pixels(row)) for row in range(2))
    # settings that change no stored pixel
    load(name, random_flip=True, random_rotate90=True, random_shift=1, max_bad_images=1.0)


@pytest.mark.parametrize(
    "changed",
    [
        {"resolution": 8},
        {"resolution": (4, 8)},
        {"center_crop": True},
        {"background": "black"},
        {"channels": 3},
        {"resize_mode": "pad"},
        {"value_range": "0,9"},
    ],
)
def test_settings_that_change_pixels_decode_again(parquet, refuse_to_decode, changed):
    name = parquet(gray(1))
    load(name)
    refuse_to_decode()
    with pytest.raises(AssertionError, match="decoded again"):
        load(name, **changed)


def test_changed_data_is_decoded_again(parquet, tmp_path):
    assert values(load(parquet(gray(1)))) == [1]
    assert values(load(parquet(gray(2)))) == [2]
    (tmp_path / "files").mkdir()
    for value in (3, 4):
        (tmp_path / "files/a.png").write_bytes(gray(value)[0])
        config = DataConfig(train_data_dir=str(tmp_path / "files"), resolution=4)
        assert values(dataset.load_images(config, False)) == [value]


def flip_a_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def swap_two_rows(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[16:32] + content[:16] + content[32:])


def change_index(key: str, value) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        index = json.loads(path.read_text())
        index[key] = {**index[key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    "name, damage",
    [
        ("pixels.bin", lambda path: os.truncate(path, 7)),
        ("pixels.bin", lambda path: flip_a_bit(path, 0)),
        ("pixels.bin", lambda path: flip_a_bit(path, -1)),
        ("pixels.bin", swap_two_rows),
        ("pixels.bin", Path.unlink),
        ("index.json", lambda path: os.truncate(path, 7)),
        ("index.json", lambda path: path.write_text("5")),
        ("index.json", lambda path: path.write_text("[" * 10**5)),
        ("rows.npy", lambda path: np.save(path, np.int32([[2, 8], [4, 4], [4, 4]]))),
        ("rows.npy", Path.unlink),
        ("index.json", change_index("report", {"pixels_sha256": "0" * 64})),
        ("index.json", change_index("report", {"images": "many"})),
        ("index.json", change_index("checksum", None)),
        ("index.json", Path.unlink),
    ],
)
def test_damaged_cache_is_decoded_again(parquet, tmp_path, capsys, name, damage):
    """Whatever has changed in it, also where all sizes are right: the recorded hash stays true."""
    folder, cache = parquet(gray(1, 2, 3)), str(tmp_path / "cache")
    facts = load(folder, cache_dir=cache).facts
    assert "damaged" not in capsys.readouterr().err
    damage(next(Path(cache, "ddpm-pixels").glob(f"*/{name}")))
    images = load(folder, cache_dir=cache)
    assert (values(images), images.facts) == ([1, 2, 3], facts)
    assert "are damaged: decoding again" in capsys.readouterr().err
    load(folder, cache_dir=cache)
    assert "damaged" not in capsys.readouterr().err


def test_disk_that_changes_what_is_written_is_named(parquet, tmp_path, monkeypatch):
    decode_all = pixel_cache._decode_all

    def damaging(source, config, folder, show_progress):
        decode_all(source, config, folder, show_progress)
        flip_a_bit(folder / "pixels.bin", 0)

    monkeypatch.setattr(pixel_cache, "_decode_all", damaging)
    with pytest.raises(UserError, match="The disk does not keep what is written to .*--cache_dir"):
        load(parquet(gray(1)), cache_dir=str(tmp_path))


def test_many_images_stay_in_order(parquet):
    images = load(parquet([encoded(np.full((4, 4), n % 251, np.uint8)) for n in range(600)]))
    assert values(images) == [n % 251 for n in range(600)]


def test_full_disk_is_refused_before_decoding(parquet, monkeypatch):
    monkeypatch.setattr(
        pixel_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 31})
    )
    with pytest.raises(
        UserError, match="2 images of 4x4 need at least 0.0 GiB in .*another --cach"
    ):
        load(parquet(gray(1, 2)))


def slow_load(name: str, cache: Path, results: multiprocessing.Queue) -> None:
    """Load with 20 ms for each row and return the hash and the first pixels in `results`."""

    def slow_decode_row(*args):
        time.sleep(0.02)
        return decode.decode_row(*args)

    pixel_cache.decode_row = slow_decode_row
    images = load(name, cache_dir=str(cache))
    results.put((images.facts.pixels_sha256, values(images)))


def start(count: int, *args) -> tuple[list[multiprocessing.Process], multiprocessing.Queue]:
    """Start processes that call `slow_load`. Forked: importing datasets would take most time."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=slow_load, args=(*args, results)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes, results


def test_two_processes_decode_once_and_agree(parquet, tmp_path):
    name, cache = parquet(gray(*range(100))), tmp_path / "cache"
    processes, results = start(2, name, cache)
    first, second = (results.get(timeout=60) for _ in processes)
    assert first == second
    assert first[1] == list(range(100))
    suffixes = sorted(path.suffix for path in (cache / "ddpm-pixels").iterdir())
    assert suffixes == ["", ".lock"]
    for process in processes:
        process.join()
        assert process.exitcode == 0


@pytest.fixture
def source():
    """65 rows in memory, of which the last is RGB, the others gray, and some unreadable."""
    color = encoded(np.dstack([np.full((4, 4), value, np.uint8) for value in (1, 2, 3)]))
    files = [None if row % 9 == 4 else gray(row)[0] for row in range(64)] + [color]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    cells = [content and {"bytes": content, "path": None} for content in files]
    rows = datasets.Dataset.from_dict({"image": cells}, features=features)
    facts = {"name": "data", "on_hub": False, "split": "train", "image_column": "image"}
    return Source(rows, DatasetRecord(**facts, rows=65), {})


@pytest.mark.parametrize(
    "name, damage, kept",
    [
        (None, None, 64),
        ("rows.jsonl", lambda path: os.truncate(path, path.stat().st_size - 1), 63),
        ("rows.jsonl", lambda path: path.write_bytes(path.read_bytes()[:-30] + bytes(30)), 63),
        ("rows.jsonl", Path.unlink, 0),
        ("pixels.bin", lambda path: os.truncate(path, path.stat().st_size - 1), 63),
        ("pixels.bin", lambda path: flip_a_bit(path, 16 * 30), 34),
        ("pixels.bin", Path.unlink, 0),
    ],
)
def test_interrupted_decoding_goes_on(source, tmp_path, monkeypatch, name, damage, kept):
    """After a kill, or a power cut that lost a part of what was written."""
    config = decode.DecodeConfig.of(DataConfig(resolution=4))
    expected = pixel_cache.decode_once(source, config, tmp_path / "other", False)
    decoded, interrupts_at = [], source.dataset[64]["image"]

    def decode_row(value, *settings):
        decoded.append(value)
        if value == interrupts_at:
            raise KeyboardInterrupt
        return decode.decode_row(value, *settings)

    monkeypatch.setattr(pixel_cache, "decode_row", decode_row)
    with pytest.raises(KeyboardInterrupt):
        pixel_cache.decode_once(source, config, tmp_path / "cache", False)
    decoded.clear()
    interrupts_at = "nowhere"
    (partial,) = tmp_path.glob("cache/*.partial")
    if name is not None:
        damage(partial / name)
    cached = pixel_cache.decode_once(source, config, tmp_path / "cache", False)
    assert len(decoded) == 65 - kept
    assert cached.facts == expected.facts and np.array_equal(cached.shapes, expected.shapes)
    assert cached.path.read_bytes() == expected.path.read_bytes()
    assert not partial.exists()


def test_progress_is_said_where_no_terminal_shows_a_bar():
    line = pixel_cache._progress_line(start=1000, count=4000, total=10_000, seconds=60)
    assert line == "Decoded 4,000 of 10,000 images: 50 images/s, 02:00 left."


def test_load_after_a_killed_process_is_right(parquet, tmp_path):
    """SIGKILL while pixels are written; the next run decodes again and is right."""
    name, cache = parquet(gray(*range(200))), tmp_path / "cache"
    (process,), _ = start(1, name, cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob("ddpm-pixels/*.partial/pixels.bin")):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list(cache.glob("ddpm-pixels/*/index.json"))
    images = load(name, cache_dir=str(cache))
    assert values(images) == list(range(200))
    assert not list(cache.glob("ddpm-pixels/*.partial"))
