"""The metadata of a dataset: bounds, and where its files may be."""

import json
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
from huggingface_hub import HfApi

from ddpm import card
from ddpm.config.data import DataConfig
from ddpm.data.dataset_card import read_metadata
from ddpm.data.source import find_held_out_split, open_source
from ddpm.errors import UserError
from tests.data.opened import opened
from tests.files import gray, write_parquet


def write_card(folder: Path, text: str, file: str = "README.md") -> str:
    """A folder with one parquet file and these metadata."""
    write_parquet(folder / "data.parquet", gray(1, 2))
    (folder / file).write_text(f"---\n{text}\n---\n" if file == "README.md" else text)
    return str(folder)


def with_data_files(entry: str) -> str:
    return f"configs:\n- config_name: default\n  {entry}\n"


ELSEWHERE = [
    "data_files: /home/alice/secret/*.png",
    "data_files: ['data.parquet', 'hf://datasets/alice/private/**']",
    "data_files: [{split: train, path: 'http://127.0.0.1:1/a.parquet'}]",
    "data_files: [{split: train, path: ['file:///etc/*']}]",
    "data_files: '../../private/a.parquet'",
    "data_files: 'data/..\\..\\a.parquet'",
    "data_files: 'zip://*.png::/home/alice/a.zip'",
    "data_files: '*.png::/home/alice/a.zip'",
    "data_files: 'data:text/plain,a'",
    "data_dir: /home/alice",
    "data_dir: hf://datasets/alice/private",
]


@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_hub_dataset_may_not_take_data_files_from_elsewhere(alice, tmp_path, monkeypatch, file):
    """Before `datasets` looks at any of these places, streamed or not."""
    api, repo_id = HfApi(), f"alice/{file.strip('.')}"
    api.create_repo(repo_id, repo_type="dataset")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: pytest.fail("opened"))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **k: pytest.fail("opened"))
    for entry in ELSEWHERE:
        write_card(tmp_path, with_data_files(entry), file)
        api.upload_folder(folder_path=tmp_path, repo_id=repo_id, repo_type="dataset")
        for function in (open_source, find_held_out_split):
            config = DataConfig(dataset_name=repo_id)
            with pytest.raises(UserError, match="takes data files from elsewhere: .*into a folder"):
                function(config)


def test_files_that_a_commit_lacks_are_asked_for_once(alice, hub, tmp_path):
    api, repo_id = HfApi(), "alice/bare"
    api.create_repo(repo_id, repo_type="dataset")
    write_parquet(tmp_path / "data.parquet", gray(1, 2))
    commit = api.upload_folder(folder_path=tmp_path, repo_id=repo_id, repo_type="dataset").oid
    assert read_metadata(repo_id, True, commit) == {}
    asked = len(hub.requests)
    assert asked and read_metadata(repo_id, True, commit) == {}
    assert len(hub.requests) == asked
    write_card(tmp_path, "license: mit")
    commit = api.upload_folder(folder_path=tmp_path, repo_id=repo_id, repo_type="dataset").oid
    assert read_metadata(repo_id, True, commit) == {"license": "mit"}


def test_own_folder_may_name_local_files_but_no_other_machine(tmp_path):
    write_parquet(tmp_path / "there/own.parquet", gray(7))
    folder = tmp_path / "here"
    for entry in (f"data_files: {tmp_path}/there/*.parquet", "data_files: ../there/own.parquet"):
        assert opened(dataset_name=write_card(folder, with_data_files(entry)))[1] == [7]
    for entry in ("data_files: hf://datasets/alice/private/**", "data_files: http://a/b.parquet"):
        with pytest.raises(UserError, match="takes data files from elsewhere"):
            opened(dataset_name=write_card(folder, with_data_files(entry)))


LAUGHS = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
LAUGHS += "dataset_info:\n  features: *i\n"


@pytest.mark.parametrize(
    "text, title, license",
    [
        ("pretty_name: 2024-01-01\nlicense: [2024-01-01, mit, {a: 1}]", "2024-01-01", True),
        ("pretty_name: .nan\nlicense: [.nan]", "nan", True),
        ("pretty_name: [a]\nlicense: {a: 1}", None, False),
        ("pretty_name: {a: 1}\nlicense: []", None, False),
        ("pretty_name: 5\nlicense: mit", "5", True),
        (f"pretty_name: 0x{'f' * 5000}\nlicense: 1:2:3", None, True),
    ],
)
def test_odd_title_and_license_are_texts_or_absent(tmp_path, text, title, license):
    """A record and the hash of a stream contain them as JSON."""
    name = write_card(tmp_path, text)
    for streaming in (False, True):
        facts = opened(streaming, dataset_name=name)[0].facts
        assert facts.title == title
        assert bool(facts.license) is license
        assert len(json.dumps(asdict(facts), allow_nan=False)) < 2000


def test_metadata_that_cannot_be_read_are_refused_in_one_sentence(tmp_path):
    for text in (
        "a: [",
        "- a",
        "a: " + "[" * 1000,
        "a: !!bool x",
        "configs: 5",
        "configs:\n- 5",
        "\x00",
    ):
        with pytest.raises(UserError, match="cannot be (opened: |read )[^\n]*$"):
            opened(dataset_name=write_card(tmp_path, text))
    long = "a: " + "a" * card.METADATA_LIMIT
    for text, reason in (
        (long, "longer than 262,144 characters"),
        (LAUGHS, "aliases stand for too"),
    ):
        for streaming in (False, True):
            with pytest.raises(UserError, match=f"The README.md of the dataset .* {reason}"):
                opened(streaming, dataset_name=write_card(tmp_path, text))


@pytest.mark.parametrize("count", ["-5", ".nan", "1.5e300", "many", "[1]", "99999999999999999999"])
def test_stated_length_of_a_stream_is_a_number_or_unknown(tmp_path, count):
    card = f"dataset_info:\n  splits:\n  - name: train\n    num_examples: {count}"
    assert opened(True, dataset_name=write_card(tmp_path, card))[0].facts.rows is None
