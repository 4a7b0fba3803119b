"""Open a dataset and find its image column.

A Hub id, a local folder with the same layout, a folder of image files, and single parquet, arrow,
tar (webdataset) and zip files are all loaded by `datasets`, streamed or not.
"""

import glob
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import DatasetCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ddpm import hub
from ddpm.config.train import DataConfig
from ddpm.errors import DISK_ERRNOS, UserError
from ddpm.run_record import DatasetRecord

FILE_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".zip": "imagefolder",
}
"""The builder of `datasets` that reads a single file, by its suffix."""

HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
"""Names of splits that were not trained on, in order of preference."""
SPLIT_WORDS = ("train", "val", "dev", "test", "eval")
"""Parts of file and folder names that `datasets` reads as the name of a split."""


@dataclass(frozen=True)
class Source:
    """An open split with one column of undecoded images.

    A row is {column: {"bytes": ..., "path": ...}}, or {column: None}. `facts` say where it is from.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    facts: DatasetRecord

    @property
    def column(self) -> str:
        assert self.facts.image_column is not None
        return self.facts.image_column


def open_source(config: DataConfig) -> Source:
    """Return the split of a config, at a pinned revision of the Hub.

    UserError for a dataset that is missing, not accessible, broken or empty, and for one without a
    single image column.
    """
    name = config.dataset_name or config.train_data_dir
    assert name, "the config names no data"
    description = f"The dataset {name}"
    on_hub, options = False, {}
    if config.dataset_name is None:
        if not Path(name).is_dir():
            raise UserError(f"--train_data_dir {name} is not a folder.")
        path, options = "imagefolder", _folder_options(name, config.split)
    elif Path(name).is_file():
        if Path(name).suffix.lower() not in FILE_BUILDERS:
            raise UserError(
                f"--dataset_name {name} is not a {', '.join(FILE_BUILDERS)} file. Image files "
                "belong in a folder: --train_data_dir."
            )
        path, options["data_files"] = FILE_BUILDERS[Path(name).suffix.lower()], name
    elif Path(name).is_dir():
        path, options["name"] = name, config.dataset_config_name
    elif not hub.is_repo_id(name):
        raise UserError(f"--dataset_name {name} is neither a folder here nor an id on the Hub.")
    else:
        on_hub, path = True, name
        with hub.hub_errors(description, revision=config.dataset_revision):
            options["revision"] = _resolve_revision(name, config.dataset_revision)
        options["name"] = config.dataset_config_name
    dataset, commit = _load(path, options, config, description, on_hub)
    num_rows = _num_rows(dataset, config.split)
    if num_rows == 0:
        raise _no_rows(description, config)
    column = find_image_column(dataset, config.image_column, name)
    dataset = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
    facts = DatasetRecord(
        name=name if on_hub else Path(name).name,
        on_hub=on_hub,
        revision=commit,
        config_name=config.dataset_config_name,
        split=config.split,
        image_column=column,
        rows=num_rows,
        **_card_facts(name, on_hub, commit),
    )
    return Source(dataset, facts)


def take_rows(source: Source, count: int) -> Source:
    """Return the first rows of a stream, at most `count`, as a dataset in memory."""
    with hub.hub_errors(f"The dataset {source.facts.name}"):
        rows = [row[source.column] for row in source.dataset.take(count)]
    features = datasets.Features({source.column: datasets.Image(decode=False)})
    dataset = datasets.Dataset.from_dict({source.column: rows}, features=features)
    return Source(dataset, replace(source.facts, rows=len(rows)))


def find_held_out_split(config: DataConfig) -> str | None:
    """Return the first of HELD_OUT_SPLITS that the dataset has, other than the split of the config.

    Only the names of the splits are loaded; None if there is no such split or no list of names.
    """
    name = config.dataset_name or config.train_data_dir
    assert name, "the config names no data"
    if (Path(name) / "dataset_dict.json").exists():
        names = list(datasets.load_from_disk(name))
    elif Path(name).is_file() or (Path(name) / "state.json").exists():
        return None
    else:
        folder = config.dataset_name is None
        where = ("imagefolder", {"data_dir": name}) if folder else (name, {})
        with hub.hub_errors(f"The dataset {name}", revision=config.dataset_revision):
            try:
                names = datasets.get_dataset_split_names(
                    where[0],
                    config.dataset_config_name,
                    revision=config.dataset_revision,
                    **where[1],
                )
            except (ValueError, datasets.exceptions.DatasetsError):
                return None
    return next(
        (split for split in HELD_OUT_SPLITS if split in names and split != config.split), None
    )


def find_image_column(
    dataset: datasets.Dataset | datasets.IterableDataset, wanted: str | None, name: str
) -> str:
    """Return `wanted`, or the only column of type Image. UserError lists the columns."""
    columns = {c: _type_name(feature) for c, feature in (dataset.features or {}).items()}
    if not columns:  # some streams know the types of their columns only from their rows
        first = next(iter(dataset), {})
        columns = {column: type(cell).__name__ for column, cell in first.items()}
    listed = ", ".join(f"{column} ({type_name})" for column, type_name in columns.items())
    image_columns = [column for column, type_name in columns.items() if type_name == "Image"]
    if wanted in image_columns:
        return wanted
    if wanted is not None:
        raise UserError(
            f"--image_column {wanted}: the dataset {name} has no image column of that name. "
            f"Its columns: {listed}.{_cast_hint(dataset, columns, wanted)}"
        )
    if len(image_columns) == 1:
        return image_columns[0]
    if image_columns:
        raise UserError(
            f"The dataset {name} has several image columns: {', '.join(image_columns)}. "
            "Choose one with --image_column."
        )
    raise UserError(
        f"The dataset {name} has no column of type Image. Its columns: {listed}."
        f"{_cast_hint(dataset, columns, None)}"
    )


def root_cause(error: BaseException) -> str:
    """Return one line about an error, of its cause where `datasets` wrapped it in another."""
    while isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().split("\n")[0].rstrip(".!")
    return text or type(error).__name__


def _load(
    path: str, options: dict[str, Any], config: DataConfig, description: str, on_hub: bool
) -> tuple[datasets.Dataset | datasets.IterableDataset, str | None]:
    """Return the split of a config, and the commit of a Hub dataset."""
    with hub.hub_errors(description, revision=config.dataset_revision):
        try:
            if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
                return _load_saved(path, config), None
            if on_hub:
                builder = _open_hub_builder(path, options, config, description)
            else:
                builder = _open_builder(path, options, config)
            commit = builder.hash if on_hub else None
            if config.streaming:
                return builder.as_streaming_dataset(split=config.split), commit
            return builder.as_dataset(split=config.split), commit
        except UserError:
            raise
        except Exception as error:  # the builders of datasets raise many types
            if hub.describe_error(error, description):
                raise
            if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
                raise
            if "corresponds to no data" in str(error):
                raise _no_rows(description, config) from error
            raise UserError(f"{description} cannot be opened: {root_cause(error)}.") from error


def _open_builder(
    path: str, options: dict[str, Any], config: DataConfig
) -> datasets.DatasetBuilder:
    builder = datasets.load_dataset_builder(path, cache_dir=config.cache_dir, **options)
    if not config.streaming:
        builder.download_and_prepare()
    return builder


def _open_hub_builder(
    repo_id: str, options: dict[str, Any], config: DataConfig, description: str
) -> datasets.DatasetBuilder:
    """Open a Hub dataset at its revision, from files that have the Hub's hashes.

    Every file in the cache is compared, whoever downloaded it. Damaged ones are downloaded again,
    and what `datasets` made of them is made again. A stream is read past the cache, unchecked.
    """
    revision, builder, failure = options["revision"], None, None
    try:
        builder = _open_builder(repo_id, options, config)
    except Exception as error:  # a damaged file can lead to any
        if hub.describe_error(error, description):
            raise
        failure = error
    folder = hub.dataset_folder(repo_id, revision if builder is None else builder.hash)
    damaged = []
    if folder.is_dir() and not config.streaming:
        _, damaged = hub.verify_files(folder, repo_id, "dataset")
    if damaged:
        if builder is not None:
            shutil.rmtree(builder.cache_dir, ignore_errors=True)
        hub.download_again(folder, damaged, description, repo_id, "dataset")
        builder = _open_builder(repo_id, options, config)
    elif failure is not None:
        raise failure
    assert builder is not None
    if revision not in (None, builder.hash):  # `datasets` falls back on whatever is in its cache
        raise UserError(
            f"{description} cannot be opened at revision {revision}; the cache has its commit "
            f"{builder.hash}."
        )
    return builder


def _folder_options(folder: str, split: str) -> dict[str, Any]:
    """Return the options with which `datasets` finds the files of an image folder.

    To find splits by their names, it lists the folder some seventy times, which takes 6 s for 3,000
    files; naming the files directly takes 1 s. One listing here checks that no name can be a split.
    """
    if split == "train":
        paths = os.walk(folder)
        names = (name for _, folders, files in paths for name in (*folders, *files))
        if not any(word in name.lower() for name in names for word in SPLIT_WORDS):
            return {"data_files": {"train": os.path.join(glob.escape(folder), "**")}}
    return {"data_dir": folder}


def _load_saved(path: str, config: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    """Open a folder that was written by save_to_disk, with one split or several."""
    dataset = datasets.load_from_disk(path)
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise ValueError(f'Unknown split "{config.split}". Should be one of {list(dataset)}')
        dataset = dataset[config.split]
    if not config.streaming:
        return dataset
    stream = dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), 16)))
    split_info = datasets.SplitInfo(config.split, num_examples=len(dataset))
    stream.info.splits = datasets.SplitDict({config.split: split_info})
    return stream


def _num_rows(dataset: datasets.Dataset | datasets.IterableDataset, split: str) -> int | None:
    """Return the number of rows; None for a stream that does not state it."""
    if isinstance(dataset, datasets.Dataset):
        return len(dataset)
    split_info = (dataset.info.splits or {}).get(split)
    return split_info.num_examples or None if split_info is not None else None


def _no_rows(description: str, config: DataConfig) -> UserError:
    if config.dataset_name is None and config.split == "train":
        return UserError(
            f"The folder {config.train_data_dir} contains no image files. For parquet or tar files "
            "in it, give it as --dataset_name."
        )
    return UserError(
        f"{description} has no rows in its split {config.split!r}. Choose another --split."
    )


def _cast_hint(
    dataset: datasets.Dataset | datasets.IterableDataset,
    columns: dict[str, str],
    wanted: str | None,
) -> str:
    """Return advice for a dataset with a column of bytes, paths or URLs, else an empty string."""
    types = ("string", "large_string", "binary", "large_binary", "str", "bytes")
    candidates = [c for c, name in columns.items() if name in types and wanted in (None, c)]
    if not candidates:
        return ""
    first = next(iter(dataset), {})
    for column in candidates:
        if str(first.get(column)).startswith(("http://", "https://")):
            return (
                f" {column} contains URLs, not images: download them into a folder first, and "
                "give it as --train_data_dir."
            )
    return (
        f" If a column contains the bytes or the paths of image files, cast it and save: "
        f"dataset.cast_column({candidates[0]!r}, datasets.Image()).save_to_disk(FOLDER), then "
        "--dataset_name FOLDER."
    )


def _type_name(feature: Any) -> str:
    if isinstance(feature, datasets.Image):
        return "Image"
    return getattr(feature, "dtype", None) or type(feature).__name__


def _resolve_revision(repo_id: str, revision: str | None) -> str | None:
    """Return the commit of a revision; the revision itself without a network."""
    if hub.is_offline():
        return revision
    return hub.call(hub.HfApi().dataset_info, repo_id, revision=revision).sha


def _card_facts(name: str, on_hub: bool, revision: str | None) -> dict[str, Any]:
    """Return title and license of the dataset card; empty if there is no card."""
    try:
        if on_hub:
            path = hf_hub_download(name, "README.md", repo_type="dataset", revision=revision)
        else:
            path = Path(name) / "README.md"
        data = DatasetCard.load(path).data
    except (OSError, ValueError, EntryNotFoundError):
        return {}
    return {
        key: value if isinstance(value, list) and key == "license" else str(value)
        for key, value in (("title", data.get("pretty_name")), ("license", data.get("license")))
        if value
    }
