"""Which bytes ship: stage an allow-list, make one commit, pull it back, prove it.

Nothing is called published until the very revision was downloaded into an empty cache, every file
has the sha256 of the one staged, stock diffusers loads it, and it draws the same pixels.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMPipeline
from huggingface_hub import CommitOperationAdd, HfApi

from ddpm import card, generation, hub, pipeline, runfolder, samplers
from ddpm.config import PushConfig
from ddpm.errors import UserError

GRID = "samples.png"
SHIPS_AS_IS = (*runfolder.PIPELINE_FILES, runfolder.RECORD, runfolder.METRICS)
PROOF_SEEDS = (0, 1)
PROOF_STEPS = 10


@dataclass(frozen=True)
class Published:
    """What is on the Hub now; `is_new` is False when that revision held all of it before."""

    repo_id: str
    commit: str
    is_new: bool
    num_files: int


def stage(folder: Path, staging: Path, repo_id: str, config: PushConfig) -> dict[str, Path]:
    """Copy what ships from a run folder into an empty one: {name in the repository: staged file}.

    Checkpoints, logs and whatever else lies in the run folder are not on the list, so they cannot
    ship. UserError for a run that is not finished, and for a link in the place of a file.
    """
    runfolder.require_pipeline(folder)
    grids = sorted((folder / runfolder.SAMPLES).glob("step-*.png"))
    sources = {name: folder / name for name in SHIPS_AS_IS if (folder / name).exists()}
    if grids:
        sources[GRID] = grids[-1]
    for name, source in sources.items():
        if source.is_symlink() or not source.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{source} is a link, so what it holds may change: put the file there.")
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, staging / name)
    settings = card.published_settings(folder)
    if settings is not None:
        runfolder.write_json(staging / runfolder.TRAIN_CONFIG, settings)
        sources[runfolder.TRAIN_CONFIG] = staging / runfolder.TRAIN_CONFIG
    text = card.render(folder, repo_id, config.license, GRID if grids else None)
    (staging / "README.md").write_text(text, encoding="utf-8")
    return {name: staging / name for name in sorted([*sources, "README.md"])}


def publish(folder: Path, repo_id: str, config: PushConfig) -> Published:
    """Make the model repository hold `folder`'s pipeline, and prove that it does.

    `repo_id` must be one that may be written to (hub.require_write). Raises UserError with what is
    and what is not on the Hub.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-push-") as scratch:
        staging = Path(scratch) / "staged"
        staging.mkdir()
        files = stage(folder, staging, repo_id, config)
        expected = draw_proof(staging, str(folder))
        api, thing = HfApi(), f"The repository {repo_id}"
        with hub.told(thing, revision=config.revision):
            hub.call(api.create_repo, repo_id, private=config.private, exist_ok=True)
            if config.revision:
                hub.call(api.create_branch, repo_id, branch=config.revision, exist_ok=True)
            info = hub.call(api.repo_info, repo_id, revision=config.revision)
            if config.private and not info.private:
                raise UserError(
                    f"{repo_id} exists and is public, which --private does not change. Nothing was "
                    "sent. Make it private on its page, or give another name."
                )
            head = info.sha
            _keep_their_words(files["README.md"], repo_id, head, config.license)
            commit = _commit(api, repo_id, files, head, config)
        hashes = {name: pipeline.sha256_of(path) for name, path in files.items()}
        prove(repo_id, commit, hashes, expected, Path(scratch) / "cache")
    facts = {
        "repo_id": repo_id,
        "endpoint": hub.endpoint(),
        "commit": commit,
        "published_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sha256": hashes,
        "proof": {"seeds": PROOF_SEEDS, "scheduler": "ddim", "num_inference_steps": PROOF_STEPS},
    }
    runfolder.write_json(folder / runfolder.PUBLISHED, facts)
    return Published(repo_id, commit, commit != head, len(files))


def draw_proof(folder: Path, name: str) -> torch.Tensor:
    """The proof images of a pipeline folder, loaded by stock diffusers: [2, C, H, W] uint8.

    `name` is what a UserError about it calls the pipeline.
    """
    try:
        stock = DDPMPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0].replace(f"{folder}/", "")
        raise UserError(f"diffusers cannot load the pipeline in {name}: {reason}") from error
    sampler, steps = samplers.build_sampler(
        "ddim", stock.scheduler.config, min(PROOF_STEPS, stock.scheduler.config.num_train_timesteps)
    )
    drawn = generation.generate(stock.unet.eval(), sampler, steps, PROOF_SEEDS, len(PROOF_SEEDS))
    return torch.stack([image for _, image in drawn])


def prove(
    repo_id: str, commit: str, hashes: dict[str, str], expected: torch.Tensor, cache: Path
) -> None:
    """Download a commit into the empty `cache`; UserError unless it is what was staged.

    `hashes` maps each file to its sha256; `expected` are the proof images of the staged files.
    """
    snapshot = hub.fetch(repo_id, revision=commit, cache_dir=str(cache))
    wrong = [
        name
        for name, wanted in hashes.items()
        if not (snapshot.folder / name).is_file()
        or pipeline.sha256_of(snapshot.folder / name) != wanted
    ]
    doubt = f"{repo_id} is on the Hub as commit {commit}, but do not use it: "
    if wrong:
        raise UserError(
            f"{doubt}{', '.join(wrong)} there is not what was sent. Run the same command again; if "
            "somebody else pushes to it, agree on who does."
        )
    difference = (draw_proof(snapshot.folder, repo_id).int() - expected.int()).abs().max().item()
    if difference:
        raise UserError(
            f"{doubt}loaded from there it draws other images (largest difference of a pixel "
            f"{difference} of 255). Run the same command again."
        )


def _commit(api: HfApi, repo_id: str, files: dict[str, Path], head: str, config: PushConfig) -> str:
    """One commit on top of `head`, or `head` itself when it holds all of it already."""
    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    try:
        info = api.create_commit(
            repo_id,
            operations,
            commit_message=config.commit_message,
            revision=config.revision,
            parent_commit=head,
        )
        return info.oid
    except Exception as error:
        if hub.status_of(error) in (409, 412):
            raise
        # The answer may be lost when the commit is made: ask what is there. The proof, which
        # compares every file, tells whether it is ours.
        now = hub.call(api.repo_info, repo_id, revision=config.revision).sha
        if now == head:
            raise
        return now


def _keep_their_words(readme: Path, repo_id: str, head: str, license: str | None) -> None:
    """Carry over what people wrote into the README that is on the Hub."""
    if not hub.call(HfApi().file_exists, repo_id, "README.md", revision=head):
        return
    with tempfile.TemporaryDirectory() as scratch:
        name = hub.call(
            HfApi().hf_hub_download, repo_id, "README.md", revision=head, cache_dir=scratch
        )
        existing = Path(name).read_text(encoding="utf-8")
    merged = card.merge(existing, readme.read_text(encoding="utf-8"), license)
    readme.write_text(merged, encoding="utf-8")
