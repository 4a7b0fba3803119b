"""The JSON of a run folder, as a stranger or a damaged disk may have written it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm import run_folder, run_record
from ddpm.errors import UserError
from ddpm.evaluation import results
from ddpm.file_io import read_json, write_json
from ddpm.publishing import model_card
from ddpm.sampling import proof, sampler_results
from ddpm.training import tracking, validation
from tests.hostile import CONTENTS, FAST, JSON, NUMBERS, SLOW, watched

EVALUATION = {
    "metrics": {"fid": 1.0, "memorised": 0.1},
    "num_images": 10,
    "model": {"name": "a", "version": None},
    "seeds": [0, 9],
    "sampler": {"scheduler": "ddim", "num_inference_steps": 10},
    "loss_by_band": {"num_images": 1, "bands": [[0, 9]], "held_out": {}, "trained": {}},
}
SAMPLER = {
    "scheduler": "ddim",
    "num_inference_steps": 10,
    "seconds_per_image": 0.1,
    "metrics": {"fid": 1.0},
    "leaving_out": [1.0, 2.0],
}
BEST = {"step": 2, "measure": "eval_loss", "value": 0.5, "num_inference_steps": 10}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with every JSON file that the commands read."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("hostile") / "run"
    folder.mkdir()
    tiny.write_run_folder(folder)
    write_json(folder / run_folder.EVALUATION, EVALUATION)
    weights = sampler_results.unet_weights_sha256(folder)
    table = {"num_images": 10, "model": {"weights": weights}, "entries": [SAMPLER] * 2}
    write_json(folder / run_folder.SAMPLER_TABLE, table)
    (folder / run_folder.BEST).mkdir()
    write_json(folder / run_folder.BEST / run_folder.BEST_JSON, BEST)
    write_json(folder / "checkpoint-2" / run_folder.CHECKPOINT_STATE, STATE)
    return folder


STATE = {
    "step": 2,
    "micro_batches": 1,
    "pixels_sha256": "0",
    "seconds": 1.0,
    "num_parameters": 1,
}


def read_metrics(folder: Path) -> None:
    run_folder.read_metrics(folder)
    run_folder.read_losses(folder)
    tracking._truncate_after(folder / run_folder.METRICS, 2**40)


def render_card(folder: Path) -> None:
    model_card.render_card(folder, "a/b", None)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "record": (run_folder.RECORD, render_card),
    "evaluation": (run_folder.EVALUATION, render_card),
    "samplers": (run_folder.SAMPLER_TABLE, render_card),
    "train_config": (run_folder.TRAIN_CONFIG, render_card),
    "proof": (run_folder.PROOF, lambda folder: proof.read_proof(folder, "it")),
    "best": (f"{run_folder.BEST}/{run_folder.BEST_JSON}", validation.read_best),
    "state": (
        f"checkpoint-2/{run_folder.CHECKPOINT_STATE}",
        lambda folder: run_record.read_checkpoint_state(folder / "checkpoint-2"),
    ),
    "metrics": (run_folder.METRICS, read_metrics),
}
"""Name of each file, and what reads it and uses what it read."""


@pytest.mark.parametrize("kind", READERS)
def test_whole_files_are_read(run, kind):
    READERS[kind][1](run)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        *(("proof", content) for content in ("[]", '"text"', "7", "null", "", "[" * 100_000)),
        *((kind, "{") for kind in sorted(READERS.keys() - {"metrics"})),
        *((kind, "[]") for kind in ("record", "evaluation", "samplers", "train_config", "state")),
    ],
    ids=lambda text: text[:9],
)
def test_another_kind_of_value_is_one_sentence(run, kind, content):
    name, read = READERS[kind]
    before = (run / name).read_bytes()
    (run / name).write_text(content)
    try:
        with watched(run), pytest.raises(UserError, match=f"{name} (must be|cannot be read as)"):
            read(run)
    finally:
        (run / name).write_bytes(before)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "null",
        '{"loss": 1}',
        '{"step": "6"}',
        '{"step": [6]}',
        '{"step": ' + "9" * 400 + "}",
        "[" * 100_000,
        '{"step": 6, "x": "' + "x" * 2**17,
        b"\xff\xfe\x00",
    ],
    ids=lambda line: repr(line[:20]),
)
def test_lines_that_are_no_metrics_are_left_out(tmp_path, line):
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / run_folder.METRICS
    path.write_bytes(b'{"step": 1, "loss": 0.5, "note": "text", "list": []}\n' + line + b"\n")
    assert run_folder.read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]
    tracking._truncate_after(path, 3)
    assert run_folder.read_losses(tmp_path) == [(1, 0.5)]


def test_metrics_that_are_no_numbers_are_left_out(tmp_path):
    metrics = {"fid": 1, "a": 10**400, "b": float("nan"), "c": "1", "d": None, "e": True}
    (tmp_path / run_folder.EVALUATION).write_text(json.dumps({"metrics": metrics}))
    assert results.read_evaluation(tmp_path).metrics == {"fid": 1.0}


def test_large_sampler_table_is_refused(tmp_path):
    """Comparing the entries takes time that grows with the square of their number."""
    table = {"num_images": 10, "model": {"weights": "x"}, "entries": [SAMPLER] * 300}
    write_json(tmp_path / "samplers.json", table)
    with pytest.raises(UserError, match="more than 256 entries"):
        sampler_results.read_sampler_table_file(tmp_path / "samplers.json")


def test_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path):
    (tmp_path / ".a.json.partial").symlink_to(tmp_path / "outside")
    write_json(tmp_path / "a.json", {"a": 1})
    assert not (tmp_path / "outside").exists()
    assert read_json(tmp_path / "a.json") == {"a": 1}


# Fuzz


@st.composite
def changes(draw) -> tuple[str, bytes | Callable[[dict], dict]]:
    """A reader, and bytes for its file or a function that changes some values of it."""
    kind = draw(st.sampled_from(sorted(READERS)))
    if draw(st.booleans()) and draw(st.booleans()):
        return kind, draw(CONTENTS)
    seed = draw(st.randoms(use_true_random=False))
    values = draw(st.lists(JSON | NUMBERS, min_size=1, max_size=3))
    return kind, lambda whole: _replace_some(whole, values, seed)


def _replace_some(whole: dict, values: list, random) -> dict:
    """Replace some values, at any depth, of a JSON object."""
    whole = json.loads(json.dumps(whole))
    for value in values:
        place = whole
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = random.choice(list(keys)) if keys else None
            if key is None:
                break
            if isinstance(place[key], (dict, list)) and place[key] and random.random() < 0.6:
                place = place[key]
                continue
            place[key] = value
            break
    return whole


def check(run: Path, change: tuple[str, bytes | Callable[[dict], dict]]) -> None:
    kind, content = change
    name, read = READERS[kind]
    before = (run / name).read_bytes()
    if not isinstance(content, bytes):
        whole = json.loads(before.splitlines()[0] if kind == "metrics" else before)
        content = json.dumps(content(whole)).encode() + b"\n"
    (run / name).write_bytes(content)
    try:
        with watched(run):
            read(run)
    finally:
        (run / name).write_bytes(before)


@FAST
@given(change=changes())
def test_any_json_is_read_or_refused(run, change):
    check(run, change)


@pytest.mark.slow
@SLOW
@given(change=changes())
def test_much_json_is_read_or_refused(run, change):
    check(run, change)
