"""What may leave this machine: an allow-list copied into an empty folder, each file looked at.

    README.md  record.json  train_config.json  metrics.jsonl  evaluation.json  samplers.json
    model_index.json  unet/  scheduler/        the pipeline, safetensors
    proof.json  proof/seed-00000.png           the proof images
    samples.png  loss.png                      the newest grid, the loss curve
    evaluation/nearest.png ...                 pictures of what was measured

Checkpoints, logs and whatever else lies in the run folder are not on the list, so they cannot ship.
A run folder may come from anywhere: pickles, links and paths in it are refused, never followed.
"""

import re
import shutil
from pathlib import Path

from PIL import Image

from ddpm import run_folder
from ddpm.config.commands import PushConfig
from ddpm.errors import UserError
from ddpm.evaluation import plots
from ddpm.publishing import model_card
from ddpm.sampling import proof, sampler_table
from ddpm.sampling.pipeline import PICKLE_SUFFIXES

GRID = "samples.png"
LOSS_PLOT = "loss.png"
README = "README.md"
COPIED_FILES = (
    *run_folder.PIPELINE_FILES,
    run_folder.RECORD,
    run_folder.METRICS,
    run_folder.EVALUATION,
    run_folder.SAMPLER_TABLE,
)
OF_EVALUATION = (run_folder.NEAREST, run_folder.LOSS_BY_BAND, run_folder.EMA_LENGTHS)
"""Pictures that belong to evaluation.json."""
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


def stage_files(folder: Path, staging: Path, repo_id: str, config: PushConfig) -> dict[str, Path]:
    """Copy what ships from a run folder into an empty one: {name in the repository: staged file}.

    Proof images are drawn when training left none. UserError for a run that is not finished, for
    links, pickles and modules of its own, and for a token in a text.
    """
    run_folder.require_pipeline(folder)
    _require_no_pickles(folder)
    staging.mkdir(parents=True, exist_ok=True)
    names = [name for name in COPIED_FILES if (folder / name).exists()]
    pictures = list(run_folder.EVALUATION_PLOTS)
    if sampler_table.read_sampler_table(folder) is None:  # a menu of other weights would mislead
        names = [name for name in names if name != run_folder.SAMPLER_TABLE]
        pictures = [name for name in pictures if Path(name).name != run_folder.TRADE_OFF]
    if model_card.is_evaluation_stale(folder):
        print(
            f"{folder / run_folder.EVALUATION} is of other weights and stays behind: evaluate.py "
            "measures these."
        )
        names = [name for name in names if name != run_folder.EVALUATION]
        pictures = [name for name in pictures if Path(name).name not in OF_EVALUATION]
    for name in names:
        _copy(folder, name, staging / name)
    names += _stage_pictures(folder, staging, pictures)
    settings = model_card.published_config(folder)
    if settings is not None:
        run_folder.write_json(staging / run_folder.TRAIN_CONFIG, settings)
        names.append(run_folder.TRAIN_CONFIG)
    names += _stage_proof(folder, staging)
    text = model_card.render_card(
        folder,
        repo_id,
        config.license,
        GRID if GRID in names else None,
        curve=LOSS_PLOT if LOSS_PLOT in names else None,
        pictures=[name for name in run_folder.EVALUATION_PLOTS if name in names],
        revision=config.revision,
    )
    (staging / README).write_text(text, encoding="utf-8")
    files = {name: staging / name for name in sorted([*names, README])}
    _require_no_token(files)
    return files


def is_published_name(name: str) -> bool:
    """Whether a file of this name in a repository may be one of ours."""
    ours = (
        *COPIED_FILES,
        run_folder.TRAIN_CONFIG,
        GRID,
        LOSS_PLOT,
        run_folder.PROOF,
        *run_folder.EVALUATION_PLOTS,
    )
    return name in ours or bool(re.fullmatch(rf"{run_folder.PROOF_IMAGES}/seed-\d+\.png", name))


def _stage_pictures(folder: Path, staging: Path, pictures: list[str]) -> list[str]:
    """The newest grid, the loss curve, those of the evaluation, as far as there are any: their
    names. UserError for one that is no picture."""
    made = []
    grids = sorted((folder / run_folder.SAMPLES).glob("step-*.png"))
    newest = {GRID: grids[-1].relative_to(folder).as_posix()} if grids else {}
    for name, source in {**newest, **{name: name for name in pictures}}.items():
        if not (folder / source).exists() and not (folder / source).is_symlink():
            continue
        _copy(folder, source, staging / name)
        try:
            with Image.open(staging / name) as image:
                image.verify()
        except (OSError, SyntaxError) as error:
            raise UserError(f"{folder / source} is no picture ({error}). Remove it.") from None
        made.append(name)
    if plots.save(plots.plot_loss(run_folder.read_losses(staging)), staging / LOSS_PLOT):
        made.append(LOSS_PLOT)
    return made


def _stage_proof(folder: Path, staging: Path) -> list[str]:
    """The proof that training left, or one made now; the names of its files.

    A proof of other files than these is a sign of damage in a finished run. In one that goes on it
    is an older model's, and is made anew.
    """
    made = proof.read_proof(folder, str(folder))
    if made is not None and made.files == proof.file_hashes(staging):
        for name in proof.proof_file_names(made):
            _copy(folder, name, staging / name)
        return proof.proof_file_names(made)
    if made is not None and run_folder.read_record(folder).finished:
        raise UserError(
            f"The pipeline in {folder} is not the one that {run_folder.PROOF} was made for: a file "
            f"was changed or damaged since. If you changed it yourself, delete {run_folder.PROOF} "
            "there and push again."
        )
    return proof.proof_file_names(proof.write_proof_from_folder(staging, str(folder)))


def _copy(folder: Path, name: str, destination: Path) -> None:
    """Copy one file of the run folder, which neither it nor a folder above it may leave."""
    source = folder / name
    links = [path for path in (source, *source.parents) if path.is_relative_to(folder)]
    linked = any(path.is_symlink() for path in links if path != folder)
    if linked or not source.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{source} is a link, so what it holds may change: put the file there.")
    if not source.is_file():
        raise UserError(f"{source} is not a file. Remove it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)


def _require_no_pickles(folder: Path) -> None:
    """Beside the pipeline's own files; a run's checkpoints are elsewhere, and never ship."""
    for place in (folder, folder / "unet", folder / "scheduler"):
        for path in sorted(place.iterdir()):
            if path.suffix.lower() in PICKLE_SUFFIXES:
                raise UserError(
                    f"{path} looks like pickled data, which can run code where it is loaded. Only "
                    "safetensors are published: convert it or remove it."
                )


def _require_no_token(files: dict[str, Path]) -> None:
    # The card last: what it repeats stands in another file.
    for name, path in sorted(files.items(), key=lambda item: item[0] == README):
        if path.suffix in (".json", ".jsonl", ".md") and TOKEN.search(path.read_bytes()):
            raise UserError(
                f"{name} holds what looks like a token of the Hub, so nothing is sent. Remove it "
                "there; if it is one, revoke it on your account's page."
            )
