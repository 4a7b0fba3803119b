"""Stage what may be published: copy an allow-list into an empty folder and check every file.

A run folder may come from anywhere. Checkpoints, logs and other files are not on the list, so they
are never published. Links and pickles are refused. JSON about the run keeps the entries that are
known here, and train_config.json the settings that describe the model.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ddpm import file_io, run_folder, run_record
from ddpm.config.base import leads_outside, read_settings, setting_fields
from ddpm.config.push import PushConfig
from ddpm.config.train import TrainConfig
from ddpm.errors import TOKEN, UserError, foreign_errors
from ddpm.evaluation import plots, results
from ddpm.publishing import model_card
from ddpm.sampling import proof, sampler_results, unet_files

README = "README.md"

# The files that are published: these, the proof images, and nothing else.
COPIED_FILES = (
    *run_folder.PIPELINE_FILES,  # model_index.json, unet/ and scheduler/; weights as safetensors
    *run_folder.CONDITIONAL_FILES,  # the UNet with its classes
    run_folder.TRAIN_CONFIG,  # known settings, without those of a machine
    run_folder.RECORD,
    run_folder.METRICS,
    run_folder.EVALUATION,
    run_folder.SAMPLER_TABLE,
    *run_folder.EVALUATION_PLOTS,  # evaluation/nearest.png, ...
)
GENERATED_FILES = (
    README,  # the model card
    model_card.SAMPLE_GRID,  # the newest of samples/step-*.png
    model_card.LOSS_PLOT,  # from metrics.jsonl
    run_folder.PROOF,  # copied, or generated for a pipeline without one
)
PROOF_IMAGE = re.compile(rf"{run_folder.PROOF_IMAGES}/(seed|label)-\d+\.png")

SAMPLER_FILES = {
    run_folder.SAMPLER_TABLE,
    f"{run_folder.EVALUATION_DIR}/{run_folder.TRADE_OFF}",
}
"""Files that describe the measured samplers."""
EVALUATION_FILES = {
    run_folder.EVALUATION,
    *(
        f"{run_folder.EVALUATION_DIR}/{name}"
        for name in (
            run_folder.NEAREST,
            run_folder.LOSS_BY_BAND,
            run_folder.EMA_LENGTHS,
            run_folder.GUIDANCE,
        )
    ),
}
"""Files that describe one measurement of the weights."""
DESCRIBING_PLACES = (
    *("dataset_name", "train_data_dir", "model_config_name_or_path"),
    "pretrained_model_name_or_path",
)
"""Settings that name a place and say something about the model."""
SECRET = re.compile(rf"{TOKEN.pattern}|://[\w.~%!$&*+,;=-]*:[\w.~%!$&*+,;=-]+@".encode(), re.ASCII)
"""A token, or an address with a password."""
MAX_HEADER_BYTES = 10**8
"""Longest header that safetensors itself reads."""


def is_published_name(name: str) -> bool:
    """Return whether a file of this name in a repository may come from a push."""
    return name in (*COPIED_FILES, *GENERATED_FILES) or bool(PROOF_IMAGE.fullmatch(name))


def stage_files(folder: Path, staging: Path, repo_id: str, config: PushConfig) -> dict[str, Path]:
    """Copy what is published from a run folder into the empty folder `staging`.

    Return {name in the repository: staged file}. Proof images are generated when training left
    none. Raise UserError for a folder without a complete pipeline, for links, pickles and a
    model_index.json that names code outside diffusers, and for a key or a password in a file.
    """
    run_folder.require_pipeline(folder)
    _require_no_pickles(folder)
    staging.mkdir(parents=True, exist_ok=True)
    for name in COPIED_FILES:
        if os.path.lexists(folder / name):
            _copy(folder, name, staging / name)
    record = run_record.read_record(folder)
    _write_known_entries(staging / run_folder.RECORD, replace(record, trackio_run=None))
    if config.space is not None:
        run_record.write_record(staging, demo=config.space_id(repo_id))
    _rewrite_metrics(staging / run_folder.METRICS)
    _stage_measurements(folder, staging)
    _remove_local_settings(staging / run_folder.TRAIN_CONFIG)
    _remove_file_names(staging / run_folder.RECORD)
    grids = sorted((folder / run_folder.SAMPLES).glob("step-*.png"))
    if grids:
        grid = grids[-1].relative_to(folder).as_posix()
        _copy(folder, grid, staging / model_card.SAMPLE_GRID)
    plots.save(plots.plot_loss(run_folder.read_losses(staging)), staging / model_card.LOSS_PLOT)
    _stage_proof(folder, staging, is_finished=record.finished)
    card = model_card.render_card(staging, repo_id, config.license, config.revision)
    (staging / README).write_text(card, encoding="utf-8")
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    files = {path.relative_to(staging).as_posix(): path for path in paths}
    _require_no_secret(files)
    return files


def _write_known_entries(path: Path, content: Any) -> None:
    """Rewrite a JSON file, if it is there, with the fields of the dataclass that it was read as."""
    if path.exists():
        known = {name: value for name, value in asdict(content).items() if value is not None}
        file_io.write_json(path, known)


def _stage_measurements(folder: Path, staging: Path) -> None:
    """Rewrite what was measured of these weights; remove what was measured of others."""
    left_out: set[str] = set()
    table = sampler_results.read_sampler_table(folder)
    if table is None:
        left_out |= SAMPLER_FILES
    else:
        _write_known_entries(staging / run_folder.SAMPLER_TABLE, table)
    evaluation = results.read_evaluation(folder)
    weights_sha256 = file_io.file_sha256(folder / run_folder.UNET_WEIGHTS)
    if evaluation and evaluation.model and evaluation.model.version != weights_sha256:
        print(
            f"{folder / run_folder.EVALUATION} is of other weights and is left out: evaluate.py "
            "measures these."
        )
        left_out |= EVALUATION_FILES
    elif evaluation:
        _write_known_entries(staging / run_folder.EVALUATION, evaluation)
        left_out |= {
            f"{run_folder.EVALUATION_DIR}/{name}"
            for name, entry in (
                (run_folder.LOSS_BY_BAND, evaluation.loss_by_band),
                (run_folder.EMA_LENGTHS, evaluation.ema_lengths),
                (run_folder.GUIDANCE, evaluation.guidance),
            )
            if entry is None
        }
    for name in left_out:
        (staging / name).unlink(missing_ok=True)


def _remove_local_settings(path: Path) -> None:
    """Rewrite a train_config.json, if there is one, with the settings that describe the model.

    Other names, and settings that must come from flags, are left out. Of data and a model outside
    the working directory the last part of the path stays, which says what they are.
    """
    if not path.exists():
        return
    settings = read_settings(TrainConfig, path, unknown="ignore")
    for name, item in setting_fields(TrainConfig).items():
        if name not in settings or not item.metadata:
            continue
        elif name not in DESCRIBING_PLACES:
            del settings[name]
        elif leads_outside(settings[name]):
            last = re.split(r"[/\\:]", settings[name].rstrip("/\\"))[-1]
            settings[name] = None if leads_outside(last) else last
    file_io.write_json(path, settings)


def _remove_file_names(path: Path) -> None:
    """Rewrite a record.json, if there is one, without the names of files that were no data."""
    record = file_io.read_json(path) if path.exists() else {}
    dataset = record.get("dataset")
    if isinstance(dataset, dict) and dataset.pop("left_out_first", None):
        file_io.write_json(path, record)


def _stage_proof(folder: Path, staging: Path, is_finished: bool) -> None:
    """Copy the proof that training left, or generate one.

    A proof of other files than these means damage in a finished run. In a run that goes on it
    belongs to an older model, and is generated again.
    """
    existing = proof.read_proof(folder, str(folder))
    if existing is not None and existing.files == proof.file_hashes(staging):
        for name in proof.proof_file_names(existing):
            _copy(folder, name, staging / name)
        _write_known_entries(staging / run_folder.PROOF, existing)
    elif existing is not None and is_finished:
        raise UserError(
            f"The pipeline in {folder} is not the one that {run_folder.PROOF} was made for: a file "
            f"was changed or damaged since. If you changed it yourself, delete {run_folder.PROOF} "
            "there and push again."
        )
    else:
        proof.write_proof_from_folder(staging, str(folder))


def _copy(folder: Path, name: str, destination: Path) -> None:
    """Copy one file of the run folder. Raise UserError for a link, a folder, or a broken image."""
    source = folder / name
    require_no_link(source, folder)
    if not source.is_file():
        raise UserError(f"{source} is not a file. Remove it.")
    # Of the others, background.py makes second names itself.
    if name == run_folder.METRICS and source.stat().st_nlink > 1:
        raise UserError(f"{source} is a file elsewhere too (a hard link): put a copy there.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
    if source.suffix == ".png":
        with (
            foreign_errors(f"{source} is no image", "Remove it."),
            Image.open(destination, formats=["PNG"]) as image,
        ):
            image.verify()


def require_no_link(path: Path, folder: Path) -> None:
    """Raise UserError if `path`, or a folder above it within the run folder, is a link."""
    inside = [p for p in (path, *path.parents) if p.is_relative_to(folder) and p != folder]
    if any(map(Path.is_symlink, inside)) or not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link, so what it holds may change: put the file there.")


def _require_no_pickles(folder: Path) -> None:
    """Check the folders of the pipeline; a run's checkpoints are elsewhere and never published."""
    for name in ("", "unet", "scheduler", run_folder.CONDITIONAL):
        for path in sorted((folder / name).glob("*")):
            if path.suffix.lower() in unet_files.PICKLE_SUFFIXES:
                raise UserError(
                    f"{path} looks like pickled data, which can run code where it is loaded. Only "
                    "safetensors are published: convert it or remove it."
                )


def _rewrite_metrics(path: Path) -> None:
    """Rewrite a metrics.jsonl, if there is one, without a last line that is cut short.

    Raise UserError unless each other line is a JSON object of numbers.
    """
    if not path.exists():
        return
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or any(type(v) not in (int, float) for v in entry.values()):
            raise UserError(
                f"{path.name}: line {number} is not a JSON object of numbers, as train.py writes "
                "them. Remove the line or the file."
            )
        entries.append(entry)
    file_io.write_bytes(path, "".join(f"{json.dumps(entry)}\n" for entry in entries).encode())


def _require_no_secret(files: dict[str, Path]) -> None:
    # The card last, because what it repeats is in another file.
    for name, path in sorted(files.items(), key=lambda item: item[0] == README):
        if any(SECRET.search(content) for content in _searched_contents(path)):
            raise UserError(
                f"{name} holds what looks like a token, a key or a password, so nothing is sent. "
                "Remove it there; if it is one, revoke it where it was made."
            )


def _searched_contents(path: Path) -> Iterator[bytes]:
    """Yield what may hold a text: the header of weights; a whole file; what a PNG compresses."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            yield file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES))
            return
        yield file.read()
    if path.suffix == ".png":
        with (
            foreign_errors(f"{path.name} is no image", "Remove it."),
            Image.open(path, formats=["PNG"]) as image,
        ):
            image.load()  # text may follow the pixels
            yield repr(image.info).encode(errors="replace")
