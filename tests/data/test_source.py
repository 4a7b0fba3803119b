"""Opening a dataset: every kind of source, the image column, and errors."""

import contextlib
import io
import json
import os
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import datasets
import fsspec
import huggingface_hub
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from huggingface_hub import HfApi
from pyarrow import parquet

from ddpm import card
from ddpm import hub as hub_client
from ddpm.config.train import DataConfig
from ddpm.data import decode
from ddpm.data.source import Source, find_held_out_split, find_image_column, open_source
from ddpm.errors import UserError
from tests.files import encoded, gray, noise, with_path, write_parquet
from tests.hub import Fault

VALUES = (10, 20, 30)


def value_of(row: dict, hub_id: str | None = None) -> int:
    """The gray value of an undecoded row of `gray` images."""
    config = decode.DecodeConfig.of(DataConfig(resolution=4))
    return int(decode.decode_row(row, config, hub_id)[0][0, 0, 0])


def opened(streaming: bool = False, **settings) -> tuple[Source, list[int]]:
    """A source, and the gray values of its rows in order."""
    source = open_source(DataConfig(streaming=streaming, **settings))
    return source, [value_of(row[source.column], source.hub_id) for row in source.dataset]


# Kinds of sources: each gives (settings, name of the column)


def parquet_folder(folder: Path):
    write_parquet(folder / "train-00000-of-00001.parquet", gray(*VALUES), column="scan")
    return {"dataset_name": str(folder)}, "scan"


def parquet_file(folder: Path):
    return {"dataset_name": str(write_parquet(folder / "a.parquet", gray(*VALUES)))}, "image"


def image_folder(folder: Path):
    for value, file in zip(VALUES, gray(*VALUES), strict=True):
        (folder / f"{value}.png").write_bytes(file)
    return {"train_data_dir": str(folder)}, "image"


def folder_of_classes(folder: Path):
    for value, file in zip(VALUES, gray(*VALUES), strict=True):
        (folder / f"class-{value}").mkdir()
        (folder / f"class-{value}" / "a.png").write_bytes(file)
    return {"train_data_dir": str(folder)}, "image"


def webdataset(folder: Path):
    with tarfile.open(folder / "shard-000.tar", "w") as archive:
        for value, file in zip(VALUES, gray(*VALUES), strict=True):
            member = tarfile.TarInfo(f"{value}.png")
            member.size = len(file)
            archive.addfile(member, io.BytesIO(file))
    return {"dataset_name": str(folder / "shard-000.tar")}, "png"


def webdataset_folder(folder: Path):
    webdataset(folder)
    return {"dataset_name": str(folder)}, "png"


def zip_file(folder: Path):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for value, file in zip(VALUES, gray(*VALUES), strict=True):
            archive.writestr(f"some where/{value}.png", file)
    return {"dataset_name": str(folder / "a.zip")}, "image"


def zip_in_a_folder(folder: Path):
    zip_file(folder)
    return {"train_data_dir": str(folder)}, "image"


def three_images() -> Dataset:
    rows = {"image": [with_path(file) for file in gray(*VALUES)]}
    return Dataset.from_dict(rows, features=Features({"image": datasets.Image()}))


def saved_to_disk(folder: Path):
    three_images().save_to_disk(folder / "saved")
    return {"dataset_name": str(folder / "saved")}, "image"


def saved_with_splits(folder: Path):
    datasets.DatasetDict(train=three_images(), test=three_images().select([0])).save_to_disk(
        folder / "saved"
    )
    return {"dataset_name": str(folder / "saved")}, "image"


SOURCES = [
    parquet_folder,
    parquet_file,
    image_folder,
    folder_of_classes,
    webdataset,
    webdataset_folder,
    zip_file,
    zip_in_a_folder,
    saved_to_disk,
    saved_with_splits,
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_source_is_opened(make, streaming, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    settings, column = make(folder)
    source, values = opened(streaming, **settings)
    assert sorted(values) == list(VALUES)
    assert source.column == source.facts.image_column == column
    assert source.facts.on_hub is False
    assert source.facts.revision is None
    if not streaming:
        assert source.facts.rows == 3


def test_dataset_on_the_hub_is_pinned_to_its_commit(alice, tmp_path):
    """Private, at an old revision, streamed or not."""
    api = HfApi()
    api.create_repo("alice/pinned", repo_type="dataset", private=True)
    commits = []
    for values in ((1, 2), (3, 4, 5)):
        file = write_parquet(tmp_path / "a.parquet", gray(*values), column="img")
        commit = api.upload_file(
            path_or_fileobj=file,
            path_in_repo="data/train-00000-of-00001.parquet",
            repo_id="alice/pinned",
            repo_type="dataset",
        )
        commits.append(commit.oid)
    for streaming in (False, True):
        source, values = opened(streaming, dataset_name="alice/pinned")
        assert values == [3, 4, 5]
        assert (source.facts.revision, source.facts.on_hub) == (commits[1], True)
        source, values = opened(streaming, dataset_name="alice/pinned", dataset_revision=commits[0])
        assert values == [1, 2]
        assert source.facts.revision == commits[0]


def damage(path: Path) -> None:
    """Change one byte of a file in the cache; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.resolve().write_bytes(content)


def hub_dataset(hub, tmp_path, kind: str) -> tuple[str, list[bytes]]:
    """A dataset on the Hub, as parquet or as a zip: its id and its image files."""
    repo_id = f"alice/{tmp_path.name}"
    files = [encoded(noise(32, 32, seed=seed)) for seed in range(9)]
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        write_parquet(path, files)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for number, file in enumerate(files):
                archive.writestr(f"{number}.png", file)
    repo = hub.create_repo("dataset", repo_id)
    repo.write({f"data/{path.name}": path.read_bytes(), "README.md": b"---\nlicense: mit\n---\n"})
    return repo_id, files


def files_of(source: Source) -> list[bytes]:
    """The image files of a source, which a zip keeps and a parquet file contains."""
    contents = []
    for row in source.dataset:
        content, path = row["image"]["bytes"], row["image"]["path"]
        with fsspec.open(path) if content is None else io.BytesIO(content) as file:
            contents.append(file.read())
    return contents


@pytest.mark.parametrize("kind", ["parquet", "zip"])
def test_damaged_files_of_a_hub_dataset_are_downloaded_again(hub, tmp_path, kind):
    """Also the files that other programs left in the cache, and what they made of them."""
    repo_id, files = hub_dataset(hub, tmp_path, kind)
    hub.inject(Fault("corrupt", path="/cdn/"))
    with contextlib.suppress(Exception):
        datasets.load_dataset(repo_id)
    for _ in range(2):
        source = open_source(DataConfig(dataset_name=repo_id))
        assert files_of(source) == files
        assert source.facts.license == "mit"
        folder = hub_client.dataset_folder(repo_id, source.facts.revision)
        for name in (f"data/train.{kind}", "README.md"):
            damage(folder / name)
    hub.inject(Fault("corrupt", path="/cdn/", times=None))
    with pytest.raises(UserError, match=f"differ from the Hub's hashes .data/train.{kind}, twice"):
        open_source(DataConfig(dataset_name=repo_id))


def test_offline_a_hub_dataset_is_checked_too(hub, tmp_path, monkeypatch):
    """Its commit is known, and no other commit takes the place of the one asked for."""
    repo_id, files = hub_dataset(hub, tmp_path, "parquet")
    online = open_source(DataConfig(dataset_name=repo_id))
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    for revision in (None, online.facts.revision):
        source = open_source(DataConfig(dataset_name=repo_id, dataset_revision=revision))
        assert files_of(source) == files and source.facts == online.facts
    with pytest.raises(UserError, match="at revision v2; the cache has its commit"):
        open_source(DataConfig(dataset_name=repo_id, dataset_revision="v2"))
    damage(hub_client.dataset_folder(repo_id, source.facts.revision) / "data/train.parquet")
    with pytest.raises(UserError, match="damaged in the cache .data/train.parquet"):
        open_source(DataConfig(dataset_name=repo_id))


def test_offline_a_dataset_that_cannot_be_opened_is_one_sentence(hub, tmp_path, monkeypatch):
    """Without a revision it is not known which commit in the cache may be damaged."""
    repo_id, _ = hub_dataset(hub, tmp_path, "parquet")
    open_source(DataConfig(dataset_name=repo_id))
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: {}["its cache"])
    with pytest.raises(UserError, match="cannot be opened: .its cache.\\.$"):
        open_source(DataConfig(dataset_name=repo_id))


def test_older_commit_does_not_replace_one_that_cannot_be_read(hub, tmp_path):
    """`datasets` falls back on its cache and only logs that; the record would name that commit."""
    repo_id, _ = hub_dataset(hub, tmp_path, "parquet")
    open_source(DataConfig(dataset_name=repo_id))
    commit = hub.repo("dataset", repo_id).write({"README.md": b"---\nconfigs: 5\n---\n"})
    with pytest.raises(UserError, match=f"cannot be opened at revision {commit}"):
        open_source(DataConfig(dataset_name=repo_id))


def test_private_dataset_without_a_token_is_refused(alice, monkeypatch):
    HfApi().create_repo("alice/secret", repo_type="dataset", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="The dataset alice/secret does not exist on .*, or is pri"):
        opened(dataset_name="alice/secret")


def test_missing_split_lists_the_existing_ones(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", gray(1, 2))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", gray(9))
    assert opened(dataset_name=str(tmp_path), split="test")[1] == [9]
    for streaming in (False, True):
        with pytest.raises(UserError, match=f"The dataset {tmp_path} cannot be opened") as error:
            opened(streaming, dataset_name=str(tmp_path), split="validation")
        for name in ("validation", "train", "test"):
            assert name in str(error.value)


def test_folders_named_for_splits_are_splits(tmp_path):
    for split, value in (("train", 1), ("test", 2)):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(gray(value)[0])
    assert opened(train_data_dir=str(tmp_path))[1] == [1]
    assert opened(train_data_dir=str(tmp_path), split="test")[1] == [2]


@pytest.mark.parametrize("name", ["brackets [1]", "star * and ?", "plain"])
def test_any_folder_name_is_read(name, tmp_path):
    (tmp_path / name / "deep/er").mkdir(parents=True)
    (tmp_path / name / "a.png").write_bytes(gray(1)[0])
    (tmp_path / name / "deep/er/b.png").write_bytes(gray(2)[0])
    assert sorted(opened(train_data_dir=str(tmp_path / name))[1]) == [1, 2]


def test_missing_split_of_a_saved_dataset_lists_the_existing_ones(tmp_path):
    settings, _ = saved_with_splits(tmp_path)
    with pytest.raises(UserError, match=r'split "dev". Should be one of \[.train., .test.\]'):
        opened(**settings, split="dev")


def test_empty_split_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [])
    with pytest.raises(UserError, match="has no rows in its split 'train'. Choose another --split"):
        opened(dataset_name=str(tmp_path))


def test_missing_configuration_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", gray(1))
    with pytest.raises(UserError, match="cannot be opened.*other"):
        opened(dataset_name=str(tmp_path), dataset_config_name="other")


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be opened"):
        opened(dataset_name=str(tmp_path))
    for name in ("notes.txt", "train.parquet"):
        with pytest.raises(UserError, match="contains no image files. For parquet or tar files"):
            opened(train_data_dir=str(tmp_path))
        (tmp_path / name).write_bytes(b"")


def test_missing_folder_is_refused():
    with pytest.raises(UserError, match="--train_data_dir /absent/photos is not a folder"):
        opened(train_data_dir="/absent/photos")
    with pytest.raises(UserError, match="/absent/photos is neither a folder here nor an id"):
        opened(dataset_name="/absent/photos")


def test_full_disk_is_not_blamed_on_the_dataset(tmp_path, monkeypatch):
    """errors.run handles it and says what to do about the disk."""
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset_builder", full)
    with pytest.raises(OSError, match="No space left"):
        opened(dataset_name=str(tmp_path))


# The metadata of a dataset


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


# The column


def dataset_of(**kinds) -> Dataset:
    return Dataset.from_dict({name: [] for name in kinds}, features=Features(kinds))


@pytest.mark.parametrize("name", ["image", "img", "picture of it", "label"])
def test_column_is_found_by_its_type(name):
    rows = dataset_of(**{"image_id": Value("string"), name: datasets.Image()})
    assert find_image_column(rows, None, "d") == name
    assert find_image_column(rows, name, "d") == name


def test_several_image_columns_need_a_choice():
    rows = dataset_of(front=datasets.Image(), back=datasets.Image(), id=Value("int64"))
    with pytest.raises(UserError, match="several image columns: front, back. Choose one with"):
        find_image_column(rows, None, "owner/name")
    assert find_image_column(rows, "back", "owner/name") == "back"


def test_missing_image_column_lists_the_columns():
    rows = dataset_of(text=Value("float32"), many=Sequence(Value("int64")), c=ClassLabel(2))
    with pytest.raises(UserError, match="owner/name has no column of type Image") as error:
        find_image_column(rows, None, "owner/name")
    assert "text (float32)" in str(error.value)
    assert "cast" not in str(error.value)


@pytest.mark.parametrize("cells", [[b"\x89PNG"], ["a.png"]])
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_bytes_and_paths_are_explained(cells, streaming):
    rows = Dataset.from_dict({"file": cells, "id": [1]})
    rows = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(UserError, match=r"dataset\.cast_column\('file', datasets\.Image\(\)\)"):
        find_image_column(rows, None, "d")
    with pytest.raises(UserError, match=r"--image_column file.*cast_column\('file'"):
        find_image_column(rows, "file", "d")


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_are_not_opened(tmp_path, streaming):
    """`datasets` decodes whatever images a row has, so a row is never read as a whole."""
    os.mkfifo(tmp_path / "pipe.png")
    kinds = {"text": Value("string"), "pages": {"front": datasets.Image()}}
    image = {"bytes": None, "path": str(tmp_path / "pipe.png")}
    cells = {"text": ["a"], "pages": [{"front": image}]}
    rows = Dataset.from_dict(cells, features=Features(kinds))
    rows = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(UserError, match="no column of type Image.*cast_column"):
        find_image_column(rows, None, "d")


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CELLS = {
    # what pandas, polars, dask and pyarrow write for images without the type of `datasets`
    "struct": (STRUCT, lambda file: {"bytes": file, "path": "a.png"}),
    "struct without a path": (pa.struct([("bytes", pa.large_binary())]), lambda f: {"bytes": f}),
    "bytes": (pa.binary(), lambda file: file),
    "large bytes": (pa.large_binary(), lambda file: file),
    "list of one struct": (pa.list_(STRUCT), lambda file: [{"bytes": file, "path": None}]),
    "large list of one struct": (pa.large_list(STRUCT), lambda file: [{"bytes": file}]),
    "list of bytes": (pa.list_(pa.binary()), lambda file: [file]),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_image_files_without_the_type_image_are_read(kind, streaming, tmp_path):
    cell_type, cell = CELLS[kind]
    cells = pa.array([cell(file) for file in gray(*VALUES)], cell_type)
    digests = pa.array([b"\x00\x01"] * 3, pa.binary())
    table = pa.table({"id": [1, 2, 3], "md5": digests, "scan": cells})
    parquet.write_table(table, tmp_path / "a.parquet")
    config = {"dataset_name": str(tmp_path / "a.parquet")}
    for wanted in (None, "scan"):
        source, values = opened(streaming, **config, image_column=wanted)
        assert (source.column, values) == ("scan", list(VALUES))
    with pytest.raises(UserError, match="--image_column md5: the dataset .* has no image column"):
        opened(streaming, **config, image_column="md5")


def test_lists_of_images_are_read_where_they_have_one(tmp_path):
    first, second, third = (with_path(file) for file in gray(*VALUES))
    rows = {"images": [[first], [second, third], []]}
    features = Features({"images": datasets.List(datasets.Image())})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        source = open_source(
            DataConfig(dataset_name=str(tmp_path / "a.parquet"), streaming=streaming)
        )
        cells = [row["images"] for row in source.dataset]
        assert value_of(cells[0]) == VALUES[0]
        for cell in cells[1:]:
            with pytest.raises(decode.DecodeError, match=f"{len(cell)} images in one row"):
                value_of(cell)


def test_columns_of_urls_are_explained():
    rows = Dataset.from_dict({"url": ["https://example.org/a.png"], "id": [1]})
    with pytest.raises(UserError, match="url contains URLs, not images: download them into a"):
        find_image_column(rows, None, "d")


@pytest.mark.parametrize("wanted", ["absent", "text"])
def test_wrong_column_lists_the_columns(wanted):
    rows = dataset_of(text=Value("string"), image=datasets.Image())
    with pytest.raises(UserError, match=f"--image_column {wanted}: the dataset d has no") as error:
        find_image_column(rows, wanted, "d")
    assert "Its columns: text (string), image (Image)." in str(error.value)
