"""ImageStream: the same rows on any number of processes, and exact resumes."""

import json
import shutil
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from ddpm.accelerator import make_accelerator
from ddpm.config.data import DataConfig
from ddpm.config.parser import parse_train
from ddpm.data import dataset, report, shard_reader, transforms
from ddpm.data.decode import decode_row
from ddpm.data.order import Lanes
from ddpm.data.stream import ImageStream
from ddpm.errors import UserError
from ddpm.publishing.background import Publisher
from ddpm.training import loop
from tests.files import encoded, gray, photo, write_parquet
from tests.hub import Fault

ROWS = 60


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards of twenty gray images; the value of an image is its number, 0 to 59."""
    for shard in range(3):
        values = range(shard * 20, shard * 20 + 20)
        write_parquet(tmp_path / f"data/train-{shard:05d}-of-00003.parquet", gray(*values))
    return tmp_path / "data"


def opened(
    folder: Path | str, seed: int = 0, lanes: Lanes | None = None, **settings
) -> ImageStream:
    config = {
        "dataset_name": str(folder),
        "resolution": 4,
        "streaming": True,
        "shuffle_buffer_size": 16,
        "rows_per_epoch": ROWS,
        **settings,
    }
    stream = dataset.load_images(DataConfig(**config), False, None, seed, lanes=lanes)
    assert isinstance(stream, ImageStream)
    return stream


def read(stream: ImageStream, first: int, count: int) -> list[int]:
    """The values at positions [first, first + count), in one batch."""
    pixels = stream.batch(stream.rows(first, count), torch.Generator()).images
    assert pixels.shape == (count, stream.channels, 4, 4)
    return pixels[:, 0, 0, 0].tolist()


def test_every_epoch_has_every_row_once_in_a_new_order(folder):
    stream = opened(folder)
    epochs = [
        sum((read(stream, e * ROWS + b, 10) for b in range(0, ROWS, 10)), []) for e in range(3)
    ]
    for values in epochs:
        assert sorted(values) == list(range(ROWS))
    assert len({tuple(values) for values in epochs}) == 3


def test_shards_and_rows_are_mixed(folder):
    values = read(opened(folder), 0, 16)
    assert len({value // 20 for value in values}) == 3
    assert values != sorted(values)


def test_shards_have_another_order_in_each_epoch(folder, monkeypatch):
    """With one open shard, a block of twenty rows is a shard."""
    monkeypatch.setattr(shard_reader, "OPEN_SHARDS", 1)
    monkeypatch.setattr(shard_reader, "MIN_OPEN_SHARDS", 1)
    stream = opened(folder, shuffle_buffer_size=20)
    shards = [value // 20 for value in read(stream, 0, 6 * ROWS)[::20]]
    orders = [tuple(shards[epoch * 3 : epoch * 3 + 3]) for epoch in range(6)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(set(orders)) > 2


def test_order_depends_on_the_seed_alone(folder):
    assert read(opened(folder), 0, 70) == read(opened(folder), 0, 70)
    assert read(opened(folder), 0, 70) != read(opened(folder, seed=1), 0, 70)


class Readers:
    """The streams of several processes, in this one; each step has `num_lanes` micro-batches of 5.

    The report is that of the first process, as if it had been broadcast.
    """

    def __init__(self, folder: Path | str, num_lanes: int, processes: int, **settings):
        self.num_lanes, self.streams = num_lanes, []
        for process in range(processes):
            lanes = Lanes.of(process, processes, num_lanes // processes, 5)
            with pytest.MonkeyPatch.context() as patch:
                if self.streams:
                    facts = self.streams[0].facts
                    patch.setattr(ImageStream, "_on_first_process", lambda *_, facts=facts: facts)
                self.streams.append(opened(folder, lanes=lanes, **settings))

    def step(self, step: int) -> list[list[int]]:
        """The values of each micro-batch of a step."""
        first = step * self.num_lanes * 5
        return [
            read(self.streams[m % len(self.streams)], first + m * 5, 5)
            for m in range(self.num_lanes)
        ]

    def state(self, step: int) -> dict:
        """The places of all lanes after this number of steps, as a checkpoint has them."""
        parts = [stream.state(step * self.num_lanes * 5) for stream in self.streams]
        return json.loads(json.dumps({k: v for part in parts for k, v in part.items()}))

    def restore(self, state: dict, step: int) -> None:
        for stream in self.streams:
            stream.restore(state, step * self.num_lanes * 5)


@pytest.mark.parametrize("num_lanes, processes", [(3, 3), (6, 2)])
def test_lanes_have_every_row_once_on_any_number_of_processes(folder, num_lanes, processes):
    """With six lanes, two share each of the three shards."""
    steps = ROWS // num_lanes // 5
    one = Readers(folder, num_lanes, 1)
    expected = [one.step(step) for step in range(3 * steps)]
    for epoch in range(3):
        batches = sum(expected[epoch * steps : (epoch + 1) * steps], [])
        assert sorted(sum(batches, [])) == list(range(ROWS))
    many = Readers(folder, num_lanes, processes)
    assert [many.step(step) for step in range(3 * steps)] == expected


def test_a_lane_reads_its_own_shards(folder):
    stream = opened(folder, lanes=Lanes(2, [1], 5))
    read(stream, 5, 5)
    (blocks,) = stream._blocks.values()
    assert blocks.reader.shards == range(1, 3, 2)
    values = sum((read(stream, first, 5) for first in range(5, 205, 10)), [])
    assert {value // 20 for value in values} == {1}


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_lanes_resume_on_another_number_of_processes(folder, step):
    """The second resume is from the state of the first, before it has read anything."""
    before = Readers(folder, 6, 2, shuffle_buffer_size=40)
    for number in range(step):
        before.step(number)
    state = before.state(step)
    assert len(state) == 6 and len(json.dumps(state)) < 6 * 2000
    expected = [before.step(step + number) for number in range(5)]
    three, one = (Readers(folder, 6, n, shuffle_buffer_size=40) for n in (3, 1))
    three.restore(state, step)
    one.restore(three.state(step), step)
    for after in (three, one):
        assert [after.step(step + number) for number in range(5)] == expected


def test_one_lane_has_the_order_of_earlier_versions(folder):
    """What they read, and their state at position 30."""
    stream = opened(folder)
    digest = "6c9595834a654accd40cb6ff3dd174e0e32305fe85351d9983d4172c2d002f1a"
    assert stream.facts.pixels_sha256 == digest
    assert read(stream, 0, 10) == [40, 45, 23, 44, 3, 43, 2, 20, 41, 24]
    assert read(stream, 60, 10) == [40, 1, 24, 42, 22, 41, 5, 44, 23, 20]
    whole = {"shard_idx": 0, "shard_example_idx": 20, "type": "ArrowExamplesIterable"}

    def open_at(shard: int, rows: int) -> list:
        rebatched = {
            "examples_iterable": whole,
            "previous_state": {**whole, "shard_example_idx": 0},
            "batch_idx": rows,
            "num_chunks_since_previous_state": rows,
            "cropped_chunk_length": 0,
            "type": "RebatchedArrowExamplesIterable",
        }
        return [shard, {"examples_iterable": rebatched, "epoch": 0}]

    shards = [open_at(2, 6), open_at(0, 5), open_at(1, 5)]
    place = {"epoch": 0, "next": 3, "turn": 1, "open": shards}
    stream.restore({"first": 16, "block": 1, "place": place}, 30)
    assert read(stream, 30, 10) == [50, 6, 15, 54, 13, 33, 14, 32, 34, 51]


@pytest.mark.parametrize(
    "num_shards, num_lanes, words",
    [
        (8, 4, []),
        (1, 1, []),
        (2, 8, ["has fewer shards (files), 2, than a step has micro-batches, 8. Up to 4"]),
        (9, 8, ["seen 2 times as often"]),
        (3, 4, ["Up to 2", "seen 2 times as often"]),
        (7, 2, ["seen 1.33 times as often"]),
    ],
)
def test_lanes_that_are_not_even_are_said(num_shards, num_lanes, words):
    notes = shard_reader.lane_notes(num_shards, num_lanes)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


def test_lanes_without_rows_are_refused(tmp_path):
    write_parquet(tmp_path / "data/train.parquet", gray(1, 2))
    stream = opened(tmp_path / "data", lanes=Lanes(4, [3], 1))
    with pytest.raises(UserError, match="fewer rows than the micro-batches of a step that share"):
        read(stream, 3, 1)


def fill_hub(hub, name: str, shards: int, rows: int) -> int:
    """Make a dataset of gray images that take 10 kB each, and return its bytes."""
    content = {}
    for shard in range(shards):
        noise = np.random.default_rng(shard)
        images = [
            file + noise.bytes(10_000) for file in gray(*range(shard * rows, (shard + 1) * rows))
        ]
        write_parquet(Path(hub.root, "upload.parquet"), images)
        content[f"data/train-{shard:05d}.parquet"] = Path(hub.root, "upload.parquet").read_bytes()
    hub.create_repo("dataset", name).write(content)
    return sum(map(len, content.values()))


FOOTER = 2**16
"""Bytes at the end of a parquet file that pyarrow reads first."""


@pytest.mark.parametrize("num_lanes, processes", [(1, 1), (2, 2), (4, 4)])
def test_an_epoch_is_read_from_the_hub_once(hub, num_lanes, processes):
    name = f"alice/lanes-{num_lanes}-{processes}"
    size = fill_hub(hub, name, 4, 20)
    hub.clear_requests()
    readers, steps = Readers(name, num_lanes, processes), 80 // num_lanes // 5
    values = [readers.step(step) for step in range(steps - 1)]  # the last one is read ahead
    sent = sum(r.sent for r in hub.requests if r.path.endswith(".parquet"))
    assert sent <= size + FOOTER * (4 + processes)
    values += [readers.step(steps - 1)]
    assert sorted(sum(sum(values, []), [])) == list(range(80))


def test_a_stream_goes_on_after_a_failure_of_the_hub(hub, monkeypatch):
    """A lost connection is tried again; what fails for longer ends in an error, and the next read
    has the rows that were due."""
    fill_hub(hub, "alice/failing", 12, 10)
    settings = {"rows_per_epoch": 120, "shuffle_buffer_size": 20}
    stream = opened("alice/failing", **settings)
    expected = [read(stream, first, 10) for first in range(0, 120, 10)]
    sleeps = []
    monkeypatch.setattr(time, "sleep", sleeps.append)
    hub.inject(Fault("drop", path="^/cdn/", times=2))
    stream = opened("alice/failing", **settings)
    values = [read(stream, first, 10) for first in range(0, 40, 10)]
    assert sleeps
    hub.inject(Fault("status", path="^/cdn/", times=None))
    with pytest.raises(UserError, match=r"alice/failing: the Hub has a problem \(500\)"):
        for first in range(40, 120, 10):
            values.append(read(stream, first, 10))
    hub.clear_faults()
    assert 4 <= len(values) < 12
    values += [read(stream, first, 10) for first in range(len(values) * 10, 120, 10)]
    assert values == expected


@pytest.mark.parametrize("position", [0, 16, 33, 61, 180])
def test_resume_is_exact_from_any_position(folder, position):
    """The state goes through JSON, as in a checkpoint."""
    first = opened(folder)
    for start in range(0, position, 5):
        read(first, start, min(5, position - start))
    state = json.loads(json.dumps(first.state(position)))
    expected = read(first, position, 50)
    resumed = opened(folder)
    resumed.restore(state, position)
    assert read(resumed, position, 50) == expected
    without_state = opened(folder)
    without_state.restore(None, position)  # reads everything before again
    assert read(without_state, position, 50) == expected


def test_resume_does_not_read_the_rows_before(folder, monkeypatch):
    first = opened(folder)
    read(first, 0, 45)
    state = first.state(48)
    resumed = opened(folder)
    resumed.restore(state, 48)
    calls = []
    reader = resumed._blocks[0].reader
    rows = reader.rows
    monkeypatch.setattr(reader, "rows", lambda n: calls.append(n) or rows(n))
    read(resumed, 48, 4)
    assert len(calls) == 1  # one block


def test_going_back_reads_the_same_rows(folder):
    """As for a step that fp16 repeats."""
    stream = opened(folder)
    expected = [read(stream, first, 10) for first in range(0, 120, 10)]
    assert read(stream, 110, 10) == expected[11]
    assert read(stream, 30, 10) == expected[3]
    assert read(stream, 0, 10) == expected[0]
    assert read(stream, 110, 10) == expected[11]


def test_batch_may_be_longer_than_blocks_and_epochs(folder):
    stream = opened(folder, shuffle_buffer_size=7)
    values = read(stream, 0, 2 * ROWS)
    assert sorted(values) == sorted([*range(ROWS)] * 2)


def test_buffer_as_large_as_the_data_shuffles_all(folder):
    values = read(opened(folder, shuffle_buffer_size=10_000), 0, ROWS)
    assert sorted(values) == list(range(ROWS))
    late = [index for index, value in enumerate(values) if value % 20 >= 17]
    assert min(late) < 15  # rows from the shards' ends come early


def test_folder_of_files_is_streamed(tmp_path):
    for value, file in enumerate(gray(*range(12))):
        (tmp_path / f"{value:02d}.png").write_bytes(file)
    config = DataConfig(
        train_data_dir=str(tmp_path), resolution=4, streaming=True, rows_per_epoch=12
    )
    stream = dataset.load_images(config, show_progress=False)
    assert sorted(read(stream, 0, 12)) == list(range(12))
    assert (stream.facts.images, stream.facts.probed, len(stream)) == (12, 12, 12)
    (line,) = (line for line in report.format_report(stream.facts) if line.startswith("Data: "))
    assert "rows of unknown number, streamed; the first 12 were checked." in line


def test_unknown_length_needs_rows_per_epoch(folder, tmp_path):
    for value, file in enumerate(gray(1, 2)):
        (tmp_path / f"{value}.png").write_bytes(file)
    config = DataConfig(train_data_dir=str(tmp_path), resolution=4, streaming=True)
    with pytest.raises(UserError, match="does not say how many rows it streams. Give --rows_per_"):
        dataset.load_images(config, show_progress=False)


def test_no_row_is_lost_when_another_thread_closes_the_client(folder, monkeypatch):
    """Before the first rows of a shard, and in the middle of one."""
    whole, chunks = read(opened(folder), 0, 2 * ROWS), []

    def closed_at_times(rows, count):
        chunks.append(count)
        if len(chunks) % 3 == 1:
            next(rows)
            raise RuntimeError("Cannot send a request, as the client has been closed.")
        return islice(rows, count)

    monkeypatch.setattr(shard_reader, "islice", closed_at_times)
    assert read(opened(folder), 0, 2 * ROWS) == whole and len(chunks) > 30
    monkeypatch.setattr(shard_reader, "MAX_REOPENED", 0)
    chunks.clear()
    with pytest.raises(UserError, match="could not be reached, or the connection broke"):
        opened(folder)


def test_rows_of_the_report_are_decoded_once(tmp_path, monkeypatch):
    """Of a color stream, its gray rows twice: they get three channels only afterwards."""
    files = [*gray(*range(8)), *[encoded(photo(4, seed)) for seed in range(8)]]
    write_parquet(tmp_path / "data/train.parquet", files)
    decoded = []

    def count_decoding(*args):
        decoded.append(args)
        return decode_row(*args)

    monkeypatch.setattr("ddpm.data.stream.decode_row", count_decoding)
    stream = opened(tmp_path / "data", rows_per_epoch=16)
    assert len(decoded) == 16
    first = stream.batch(stream.rows(0, 16), torch.Generator()).images
    stream.state(32)  # waits for the next batch, which is decoded ahead
    assert len(decoded) == 16 + 8 + 16
    stream.restore({"0": {"first": 0, "block": 0, "place": shard_reader.START}}, 0)
    again = stream.batch(stream.rows(0, 16), torch.Generator()).images
    assert torch.equal(first, again) and len(first.unique(dim=0)) == 16
    monkeypatch.setattr("ddpm.data.stream.PROBE_BYTES", 4 * 4 * 3)
    stream = opened(tmp_path / "data", rows_per_epoch=16)
    assert torch.equal(stream.batch(stream.rows(0, 16), torch.Generator()).images, first)


def test_channels_are_those_of_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm.data.stream.PROBE_ROWS", 4)
    color = encoded(photo(4))
    write_parquet(tmp_path / "data/train.parquet", [*gray(1, 2, 3, 4), *[color] * 4])
    stream = opened(tmp_path / "data", shuffle_buffer_size=4, rows_per_epoch=8)
    assert stream.channels == 1
    read(stream, 0, 8)
    stream = opened(tmp_path / "data", shuffle_buffer_size=4, rows_per_epoch=8, channels=3)
    assert stream.channels == 3
    read(stream, 0, 8)
    write_parquet(tmp_path / "data/train.parquet", [color, *gray(1)])
    assert opened(tmp_path / "data").channels == 3


def test_crops_and_augmentations_come_from_the_generator(tmp_path):
    write_parquet(tmp_path / "data/train.parquet", [encoded(photo(9).resize((16, 4)))] * 8)
    stream = opened(tmp_path / "data")

    def batch(seed: int, augmentation: DataConfig | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return stream.batch(stream.rows(0, 8), generator, augmentation).images

    assert torch.equal(batch(0), batch(0))
    assert not torch.equal(batch(0), batch(1))
    augmentation = DataConfig(random_flip=True, random_rotate90=True, random_shift=1)
    draws = transforms.draw_transforms(8, torch.Generator().manual_seed(0))
    augmented = batch(0, augmentation)
    assert torch.equal(augmented, transforms.augment(batch(0), draws, augmentation))
    assert not torch.equal(augmented, batch(0))


def test_unreadable_images_are_replaced_the_same_on_every_process(tmp_path, capsys):
    files = [*gray(*range(10)), b"bad", *gray(*range(20, 30)), b"bad"]
    write_parquet(tmp_path / "data/train.parquet", files)
    one, other = (opened(tmp_path / "data", max_bad_images=0.5) for _ in range(2))
    values = read(one, 0, 22)
    assert values == read(other, 0, 11) + read(other, 11, 11)
    assert one.num_unreadable == 2
    assert set(values) == {*range(10), *range(20, 30)}
    assert "Skipped at position" in capsys.readouterr().err
    assert one.facts.unreadable >= 1


def test_too_many_unreadable_images_end_the_run(tmp_path):
    files = [*gray(*range(20)), *[b"bad"] * 20]
    write_parquet(tmp_path / "data/train.parquet", files)
    stream = opened(tmp_path / "data", max_bad_images=0.01)
    with pytest.raises(
        UserError, match="of the .* images read since the start cannot be read, mor"
    ):
        for first in range(0, 40, 4):
            read(stream, first, 4)


def test_data_without_a_readable_image_is_refused(tmp_path):
    write_parquet(tmp_path / "data/train.parquet", [b"bad", None])
    with pytest.raises(
        UserError, match="None of the first 2 images of data can be read. The first"
    ):
        opened(tmp_path / "data")


def test_rectangles_are_streamed(folder):
    images = opened(folder, resolution=(4, 8))
    batch = images.batch(images.rows(0, 5), torch.Generator().manual_seed(0), DataConfig())
    assert batch.images.shape == (5, images.channels, 4, 8) == (5, 1, *images.size)


def test_hash_changes_with_data_and_settings(folder, tmp_path):
    def stream_hash(**settings):
        return opened(folder, **settings).facts.pixels_sha256

    assert stream_hash() == stream_hash()
    others = [
        {"resolution": 8},
        {"resolution": (4, 8)},
        {"shuffle_buffer_size": 15},
        {"center_crop": True},
        {"channels": 3},
        {"background": "black"},
    ]
    assert len({stream_hash(), *(stream_hash(**settings) for settings in others)}) == 7
    before = stream_hash()
    write_parquet(folder / "train-00000-of-00003.parquet", gray(*range(1, 21)))
    assert stream_hash() != before


def test_saved_dataset_is_streamed_and_has_a_length(tmp_path):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    rows = {"image": [{"bytes": file, "path": None} for file in gray(*range(40))]}
    saved = Dataset.from_dict(rows, features=Features({"image": ImageFeature()}))
    saved.save_to_disk(tmp_path / "saved")
    stream = opened(tmp_path / "saved", rows_per_epoch=None)
    assert len(stream) == 40
    assert sorted(read(stream, 0, 40)) == list(range(40))


def test_resumed_training_on_a_stream_gives_the_same_weights(pictures, tiny_unet, tmp_path):
    """Four steps equal two, a checkpoint, and two more, to the bit."""

    def train() -> bytes:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = parse_train(
            [
                f"--train_data_dir={pictures}",
                f"--model_config_name_or_path={tiny_unet}",
                f"--output_dir={tmp_path / 'run'}",
                "--resolution=8",
                "--random_flip",
                "--random_shift=1",
                "--streaming",
                "--shuffle_buffer_size=4",
                "--rows_per_epoch=10",
                "--train_batch_size=3",
                "--gradient_accumulation_steps=2",
                "--max_train_steps=4",
                "--checkpointing_steps=2",
                "--save_images_epochs=0",
                "--learning_rate=1e-2",
                "--lr_warmup_steps=0",
                "--ddpm_num_inference_steps=2",
            ]
        )
        accelerator = make_accelerator("no")
        loop.train(accelerator, config, Publisher(Path(config.output_dir), config.hub))
        return (tmp_path / "run/checkpoint-4/model.safetensors").read_bytes()

    weights = train()
    state = json.loads((tmp_path / "run/checkpoint-2/state.json").read_text())
    # The block of position 2 x 3 of each lane; 10 images, half of them in each
    assert {lane: place["first"] for lane, place in state["stream"].items()} == {"0": 5, "1": 5}
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    assert train() == weights


@pytest.mark.slow
def test_two_processes_read_a_stream_once(hub, script, tmp_path, tiny_unet):
    """They read the dataset once in an epoch, and one process goes on where they stopped."""
    size = fill_hub(hub, "alice/pair", 4, 20)
    flags = [
        "train.py",
        "--dataset_name=alice/pair",
        f"--model_config_name_or_path={tiny_unet}",
        *("--resolution=8", "--streaming", "--rows_per_epoch=80", "--shuffle_buffer_size=20"),
        *("--train_batch_size=5", "--checkpointing_steps=4", "--eval_images=0"),
        *("--save_images_epochs=0", "--ddpm_num_inference_steps=2", "--mixed_precision=no"),
        "--logging_steps=1",
    ]
    launch = ["--config_file", "accelerate_config.yaml", "--main_process_port=0"]
    two, one = tmp_path / "two", tmp_path / "one"
    hub.clear_requests()
    done = script(
        *[*launch, "--num_processes=2", *flags, f"--output_dir={two}", "--max_train_steps=7"],
        launch=True,
    )
    assert done.returncode == 0, done.stderr
    sent = sum(r.sent for r in hub.requests if r.path.endswith(".parquet"))
    assert sent <= size + FOOTER * (4 + 2)
    shutil.copytree(two / "checkpoint-4", one / "checkpoint-4")
    for name in ("train_config.json", "unet"):
        source, target = two / name, one / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    alone = [*flags, f"--output_dir={one}", "--gradient_accumulation_steps=2"]
    done = script(*alone, "--max_train_steps=7")
    assert done.returncode == 0 and "Resuming from" in done.stdout, done.stderr
    losses = [
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (two, one)
    ]
    assert losses[0][4:] == pytest.approx(losses[1], rel=1e-4)
    done = script(*alone, "--max_train_steps=8", "--gradient_accumulation_steps=3")
    assert done.returncode == 1 and "was made with 2 micro-batches a step" in done.stderr
