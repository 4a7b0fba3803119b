"""Open a dataset.

A Hub id, a local folder with the same layout, and single parquet, arrow and tar (webdataset) files
are loaded by `datasets`, streamed or not; a folder or a zip file of images is listed by
image_folder.py.
"""

import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from ddpm import download, hub
from ddpm.config.data import DataConfig
from ddpm.data import image_folder, splits
from ddpm.data.dataset_card import read_metadata, title_and_license
from ddpm.data.file_kind import kind_of
from ddpm.data.image_column import find_image_column, undecoded
from ddpm.data.image_folder import ImageListing
from ddpm.data.labels import ClassLabels, find_labels, label_feature
from ddpm.data.open_errors import TAR_ENDINGS, data_errors, what_to_do
from ddpm.data.report import MAX_EXAMPLES
from ddpm.device import hide_packages
from ddpm.errors import UserError
from ddpm.run_record import DatasetRecord

FILE_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys(TAR_ENDINGS, "webdataset"),
}
"""The builder of `datasets` that reads a single file, by its ending."""
Rows = tuple[datasets.Dataset | datasets.IterableDataset, dict[str, int]]
"""The rows of a config's split, and the number of rows of each split as far as it is known."""


@dataclass(frozen=True)
class Source:
    """An open split with one column of undecoded images, and perhaps one of labels.

    A row is {column: cell} as `decode.decode_row` reads it. `facts` say where it is from,
    `split_sizes` the number of rows of each split, as far as it is known.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    facts: DatasetRecord
    split_sizes: dict[str, int]
    labels: ClassLabels | None = None
    """Only if the config asks for labels."""

    @property
    def column(self) -> str:
        assert self.facts.image_column is not None
        return self.facts.image_column

    @property
    def hub_id(self) -> str | None:
        """The id of a dataset on the Hub, None for the user's own data."""
        return self.facts.name if self.facts.on_hub else None

    def label_id(self, row: dict[str, Any]) -> int | None:
        """Return the label of a row; None without labels."""
        return self.labels and self.labels.id_of(row.get(self.labels.column))

    def label_ids(self) -> list[int] | None:
        """Return the labels of all rows, which are no stream; None without labels."""
        if self.labels is None:
            return None
        column = self.labels.column
        if column not in self.dataset.features:
            return [self.labels.id_of(None)] * len(self.dataset)
        batches = self.dataset.select_columns(column).iter(batch_size=1000)
        return [self.labels.id_of(cell) for batch in batches for cell in batch[column]]


def open_source(config: DataConfig, class_names: list[str] | None = None) -> Source:
    """Return the split of a config, at a pinned revision of the Hub.

    `class_names` are those of the labels, in the order of their ids; None takes those of the data.
    UserError for a dataset that is missing, not accessible, broken or empty, and for one without a
    single image column, or without classes if the config asks for labels.
    """
    name = config.dataset_name or config.train_data_dir
    assert name, "the config names no data"
    on_hub, path, options = False, name, {}
    if config.dataset_name is None:
        if not Path(name).is_dir():
            raise UserError(f"--train_data_dir {name} is not a folder.")
    elif Path(name).is_file():
        endings = (*FILE_BUILDERS, ".zip")
        ending = next((end for end in endings if name.lower().endswith(end)), None)
        if ending is None:
            with open(name, "rb") as file:
                kind = kind_of(file)
            raise UserError(
                f"--dataset_name {name} is not a {', '.join(FILE_BUILDERS)} or .zip file"
                f"{f' but {kind}' if kind else ''}. Image files belong in a folder: "
                "--train_data_dir."
            )
        path, options["data_files"] = FILE_BUILDERS.get(ending, name), name
    elif Path(name).is_dir():
        options["name"] = config.dataset_config_name
    elif not hub.is_repo_id(name):
        raise UserError(f"--dataset_name {name} is neither a folder here nor an id on the Hub.")
    else:
        on_hub, options["name"] = True, config.dataset_config_name
    description = _describe(name, config) if on_hub else f"The dataset {name}"
    with hub.hub_errors(description):
        if on_hub:
            options["revision"] = _resolve_revision(name, config.dataset_revision)
        metadata = read_metadata(name, on_hub, options.get("revision"))
        listing = None if on_hub else _list_images(config, metadata)
        if listing is not None:
            (dataset, sizes), commit = _open_listing(listing, config, str(description)), None
        else:
            (dataset, sizes), commit = _load(path, options, config, description, on_hub)
        metadata = read_metadata(name, on_hub, commit)  # again: a damaged one was downloaded again
    left_out = {} if listing is None else listing.left_out
    num_rows = _num_rows(dataset, config.split)
    with data_errors(description):
        column, labels = find_image_column(dataset, config.image_column, name), None
        if config.has_labels:
            wanted = config.label_column
            labels = find_labels(dataset, wanted, column, name, num_rows, on_hub, class_names)
        if labels is not None and labels.column in dataset.features:
            dataset = dataset.select_columns([column, labels.column])
        else:
            dataset = dataset.select_columns(column)
        feature = undecoded(dataset.features[column])
        if feature != dataset.features[column]:
            dataset = dataset.cast_column(column, feature)
    facts = DatasetRecord(
        name=name if on_hub else os.path.basename(os.path.abspath(name)),
        on_hub=on_hub,
        revision=commit,
        config_name=config.dataset_config_name,
        split=config.split,
        image_column=column,
        label_column=labels and labels.column,
        rows=num_rows,
        left_out={reason: len(names) for reason, names in left_out.items()},
        left_out_first={reason: names[:MAX_EXAMPLES] for reason, names in left_out.items()},
        **title_and_license(metadata),
    )
    return Source(dataset, facts, sizes, labels)


def take_rows(source: Source, count: int) -> Source:
    """Return the first rows of a stream, at most `count`, as a dataset in memory."""
    with data_errors(f"The dataset {source.facts.name}"):
        rows, features = list(source.dataset.take(count)), source.dataset.features
        columns = {column: [row[column] for row in rows] for column in features}
        dataset = datasets.Dataset.from_dict(columns, features=features)
    return replace(source, dataset=dataset, facts=replace(source.facts, rows=len(rows)))


def find_held_out_split(config: DataConfig, trained: Collection[str] = ()) -> str | None:
    """Return the first of HELD_OUT_SPLITS that the dataset has and that was not trained on.

    `trained` are expressions next to that of the config. Only the names of the splits are loaded;
    None if there is no such split or no list of names.
    """
    name = config.dataset_name or config.train_data_dir
    assert name, "the config names no data"
    if Path(name).is_file() or (Path(name) / "state.json").exists():
        return None
    description, names = _describe(name, config), []
    with hub.hub_errors(description):
        try:
            names = _split_names(config, name)
        except UserError:
            raise
        except Exception as error:  # the builders of datasets raise many types
            if hub.describe_error(error, description):
                raise
    trained = {config.split, *trained}
    return next(
        (
            split
            for split in splits.HELD_OUT_SPLITS
            if split in names and not any(splits.overlap(one, split, {}) for one in trained)
        ),
        None,
    )


def _split_names(config: DataConfig, name: str) -> list[str]:
    """Return the names of the splits of a folder or of a dataset on the Hub."""
    if (Path(name) / "dataset_dict.json").exists():
        return list(datasets.load_from_disk(name))
    on_hub = config.dataset_name is not None and not Path(name).is_dir()
    revision = _resolve_revision(name, config.dataset_revision) if on_hub else None
    metadata = read_metadata(name, on_hub, revision)
    listing = None if on_hub else _list_images(config, metadata)
    if listing is not None:
        return [split for split, rows in listing.splits.items() if rows]
    if on_hub and (snapshot := _offline_snapshot(name, revision)):
        name, revision = str(snapshot), None
    return datasets.get_dataset_split_names(name, config.dataset_config_name, revision=revision)


def _describe(name: str, config: DataConfig) -> hub.Repository:
    return hub.Repository(name, "dataset", config.dataset_revision)


def _load(
    path: str,
    options: dict[str, Any],
    config: DataConfig,
    description: str | hub.Repository,
    on_hub: bool,
) -> tuple[Rows, str | None]:
    """Return what `Rows` are, and the commit of a Hub dataset."""
    with (
        data_errors(description, "cannot be opened"),
        what_to_do(config, description, on_hub),
    ):
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            return _load_saved(path, config, str(description)), None
        if on_hub:
            builder, commit = _open_hub_builder(path, options, config, description)
        else:
            try:
                builder = _open_builder(path, options, config)
            except datasets.exceptions.DataFilesNotFoundError as error:
                left_out = image_folder.list_images(path).left_out
                raise _no_images(str(description), config, left_out) from error
            commit = None
        if not config.streaming:
            sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
            _require_rows(splits.resolve(config.split, sizes), config, str(description))
            return (builder.as_dataset(split=config.split), sizes), commit
        if splits.is_sliced(config.split):
            raise UserError(
                f"--split {config.split} with --streaming is for folders of images and of "
                "save_to_disk: name whole splits, such as train, or leave --streaming out."
            )
        return (builder.as_streaming_dataset(split=config.split), {}), commit


def _open_builder(
    path: str, options: dict[str, Any], config: DataConfig
) -> datasets.DatasetBuilder:
    # It imports scipy where it finds it, for dataset scripts, which it no longer runs.
    with hide_packages("scipy"):
        builder = datasets.load_dataset_builder(path, cache_dir=config.cache_dir, **options)
    if not config.streaming:
        builder.download_and_prepare()
    elif hasattr(builder.config, "decode_num_threads"):
        # Otherwise `datasets` itself opens the image files of a streamed folder on the Hub.
        builder.config.decode_num_threads = 0
    return builder


def _open_hub_builder(
    repo_id: str, options: dict[str, Any], config: DataConfig, description: hub.Repository
) -> tuple[datasets.DatasetBuilder, str]:
    """Open a Hub dataset at its revision, from files that have the Hub's hashes; return its commit.

    Every file in the cache is compared, whoever downloaded it. Damaged ones are downloaded again,
    and what `datasets` made of them is made again. A stream is read past the cache, unchecked.
    """
    revision, builder, failure = options["revision"], None, None
    if snapshot := _offline_snapshot(repo_id, revision):
        _, damaged = download.verify_files(snapshot, repo_id, "dataset")
        if damaged:
            download.download_again(snapshot, damaged, str(description), repo_id, "dataset")
        return _open_builder(str(snapshot), {"name": options["name"]}, config), snapshot.name
    try:
        builder = _open_builder(repo_id, options, config)
    except Exception as error:  # a damaged file can lead to any
        if revision is None or hub.describe_error(error, description):
            raise
        failure = error
    folder = download.dataset_folder(repo_id, revision if builder is None else builder.hash)
    damaged = []
    if folder.is_dir() and not config.streaming:
        _, damaged = download.verify_files(folder, repo_id, "dataset")
    if damaged:
        if builder is not None:
            shutil.rmtree(builder.cache_dir, ignore_errors=True)
        download.download_again(folder, damaged, str(description), repo_id, "dataset")
        builder = _open_builder(repo_id, options, config)
    elif failure is not None:
        raise failure
    assert builder is not None
    if revision not in (None, builder.hash):  # `datasets` falls back on whatever is in its cache
        raise UserError(
            f"{description} cannot be opened at revision {revision}; the cache has its commit "
            f"{builder.hash}, which --dataset_revision {builder.hash} opens."
        )
    return builder, builder.hash


def _offline_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """Return the folder that `hf download` left, from which a dataset is opened when offline."""
    return download.complete_snapshot(repo_id, revision, "dataset") if hub.is_offline() else None


def _list_images(config: DataConfig, metadata: dict[str, Any]) -> ImageListing | None:
    """Return the images of a local folder or zip file, None for a dataset in files of its own."""
    name = config.dataset_name or config.train_data_dir
    assert name, "the config names no data"
    is_file = Path(name).is_file()
    if config.dataset_name is None or (is_file and Path(name).suffix.lower() == ".zip"):
        return image_folder.list_images(name, _folder_labels(config))
    if is_file or config.dataset_config_name or metadata.get("configs"):
        return None
    listing = image_folder.list_images(name, _folder_labels(config))
    return listing if any(listing.splits.values()) and not listing.has_tables else None


def _folder_labels(config: DataConfig) -> str | None:
    """Return the column of labels in a folder of images; None without labels."""
    return (config.label_column or image_folder.CLASS_COLUMN) if config.has_labels else None


def _open_listing(listing: ImageListing, config: DataConfig, description: str) -> Rows:
    """Return the rows of a config's split, and the number of rows of each split."""
    sizes = {split: len(rows) for split, rows in listing.splits.items()}
    if not any(sizes.values()):
        raise _no_images(description, config, listing.left_out)
    with data_errors(description, "cannot be opened"):
        parts = splits.resolve(config.split, sizes)
    rows = [row for part in parts for row in listing.splits[part.split][part.start : part.stop]]
    _require_rows(rows, config, description)
    label_column = _folder_labels(config)
    if any(label_column in row for row in rows):
        rows = [{label_column: None, **row} for row in rows]  # of splits, one may have no labels
    features = datasets.Features({column: datasets.Image(decode=False) for column in rows[0]})
    if label_column in features:
        with data_errors(description, f"has labels in {label_column} that make no column"):
            features[label_column] = label_feature([row[label_column] for row in rows])
    if config.streaming:
        arguments = {"rows": tuple(rows)}  # of a list, each row would be a shard
        return datasets.IterableDataset.from_generator(_yield_rows, features, arguments), sizes
    dataset = datasets.Dataset.from_list(rows, features=features)
    # With the times of the files, so that the pixels of changed files are decoded again.
    fingerprint = image_folder.fingerprint(rows, label_column)
    return datasets.Dataset(dataset.data, dataset.info, fingerprint=fingerprint), sizes


def _yield_rows(rows: tuple[image_folder.Row, ...]) -> Iterator[image_folder.Row]:
    yield from rows


def _load_saved(path: str, config: DataConfig, description: str) -> Rows:
    """Open a folder that was written by save_to_disk, with several splits or as one, train."""
    saved = datasets.load_from_disk(path)
    if isinstance(saved, datasets.Dataset):
        own_name = str(saved.split)
        saved = {own_name if config.split.startswith(own_name) else "train": saved}
    sizes = {split: len(dataset) for split, dataset in saved.items()}
    parts = [
        saved[part.split]
        if part.stop - part.start == sizes[part.split]
        else saved[part.split].select(range(part.start, part.stop))
        for part in splits.resolve(config.split, sizes)
    ]
    _require_rows(parts, config, description)
    dataset = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if not config.streaming:
        return dataset, sizes
    stream = dataset.to_iterable_dataset(num_shards=max(1, min(len(dataset), 16)))
    split_info = datasets.SplitInfo(config.split, num_examples=len(dataset))
    stream.info.splits = datasets.SplitDict({config.split: split_info})
    return stream, sizes


def _num_rows(dataset: datasets.Dataset | datasets.IterableDataset, split: str) -> int | None:
    """Return the number of rows; None for a stream that does not state it."""
    if isinstance(dataset, datasets.Dataset):
        return len(dataset)
    split_info = (dataset.info.splits or {}).get(split)
    count = split_info.num_examples if split_info is not None else None
    return count if isinstance(count, int) and 0 < count < 2**63 else None


def _require_rows(rows: list[Any], config: DataConfig, description: str) -> None:
    if not rows:
        raise UserError(
            f"{description} has no rows in its split {config.split!r}. Choose another --split."
        )


def _no_images(description: str, config: DataConfig, left_out: image_folder.LeftOut) -> UserError:
    if config.dataset_name is None:
        description = f"The folder {config.train_data_dir}"
    hint = " For parquet or tar files in it, give it as --dataset_name."
    files = "; ".join(
        f"{names[0]}{f' and {len(names) - 1:,} more' * (len(names) > 1)} ({reason})"
        for reason, names in left_out.items()
    )
    return UserError(
        f"{description} contains no image files.{hint * (config.dataset_name is None)}"
        f"{f' Left out: {files}.' if files else ''}"
    )


def _resolve_revision(repo_id: str, revision: str | None) -> str | None:
    """Return the commit of a revision; the revision itself without a network."""
    if hub.is_offline():
        return revision
    return hub.find_commit(repo_id, revision, "dataset")
