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

from ddpm import card, curve, menu, proof, runfolder
from ddpm.commands import PushConfig
from ddpm.errors import UserError

GRID = "samples.png"
CURVE = "loss.png"
README = "README.md"
SHIPS_AS_IS = (
    *runfolder.PIPELINE_FILES,
    runfolder.RECORD,
    runfolder.METRICS,
    runfolder.EVALUATION,
    runfolder.SAMPLERS,
)
OF_EVALUATION = (runfolder.NEAREST, runfolder.LOSS_BY_BAND, runfolder.EMA_LENGTHS)
"""Pictures that belong to evaluation.json."""
PICKLED = (".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


def stage(folder: Path, staging: Path, repo_id: str, config: PushConfig) -> dict[str, Path]:
    """Copy what ships from a run folder into an empty one: {name in the repository: staged file}.

    Proof images are drawn when training left none. UserError for a run that is not finished, for
    links, pickles and modules of its own, and for a token in a text.
    """
    runfolder.require_pipeline(folder)
    _require_no_pickles(folder)
    staging.mkdir(parents=True, exist_ok=True)
    names = [name for name in SHIPS_AS_IS if (folder / name).exists()]
    pictures = list(runfolder.PICTURES)
    if menu.read(folder) is None:  # a menu of other weights would mislead
        names = [name for name in names if name != runfolder.SAMPLERS]
        pictures = [name for name in pictures if Path(name).name != runfolder.TRADE_OFF]
    if card.is_of_other_weights(folder):
        print(f"{folder / runfolder.EVALUATION} is of other weights and stays behind: evaluate.py "
              "measures these.")  # fmt: skip
        names = [name for name in names if name != runfolder.EVALUATION]
        pictures = [name for name in pictures if Path(name).name not in OF_EVALUATION]
    for name in names:
        _copy(folder, name, staging / name)
    names += _stage_pictures(folder, staging, pictures)
    settings = card.published_settings(folder)
    if settings is not None:
        runfolder.write_json(staging / runfolder.TRAIN_CONFIG, settings)
        names.append(runfolder.TRAIN_CONFIG)
    names += _stage_proof(folder, staging)
    text = card.render(
        folder,
        repo_id,
        config.license,
        GRID if GRID in names else None,
        curve=CURVE if CURVE in names else None,
        pictures=[name for name in runfolder.PICTURES if name in names],
        revision=config.revision,
    )
    (staging / README).write_text(text, encoding="utf-8")
    files = {name: staging / name for name in sorted([*names, README])}
    _require_no_token(files)
    return files


def may_ship(name: str) -> bool:
    """Whether a file of this name in a repository may be one of ours."""
    ours = (*SHIPS_AS_IS, runfolder.TRAIN_CONFIG, GRID, CURVE, runfolder.PROOF, *runfolder.PICTURES)
    return name in ours or bool(re.fullmatch(rf"{runfolder.PROOF_IMAGES}/seed-\d+\.png", name))


def _stage_pictures(folder: Path, staging: Path, pictures: list[str]) -> list[str]:
    """The newest grid, the loss curve, those of the evaluation, as far as there are any: their
    names. UserError for one that is no picture."""
    made = []
    grids = sorted((folder / runfolder.SAMPLES).glob("step-*.png"))
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
    if curve.draw(curve.read_losses(staging / runfolder.METRICS), staging / CURVE):
        made.append(CURVE)
    return made


def _stage_proof(folder: Path, staging: Path) -> list[str]:
    """The proof that training left, or one made now; the names of its files.

    A proof of other files than these is a sign of damage in a finished run. In one that goes on it
    is an older model's, and is made anew.
    """
    made = proof.read_proof(folder, str(folder))
    if made is not None and made.files == proof.file_hashes(staging):
        for name in proof.file_names(made):
            _copy(folder, name, staging / name)
        return proof.file_names(made)
    if made is not None and runfolder.read_record(folder).get("finished"):
        raise UserError(
            f"The pipeline in {folder} is not the one that {runfolder.PROOF} was made for: a file "
            f"was changed or damaged since. If you changed it yourself, delete {runfolder.PROOF} "
            "there and push again."
        )
    return proof.file_names(proof.make_proof(staging, str(folder)))


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
            if path.suffix.lower() in PICKLED:
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
