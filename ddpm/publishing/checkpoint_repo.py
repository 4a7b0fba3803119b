"""Move a training state between machines, through a private repository of its own.

    user/name-training-state         always private; one commit, so that it does not grow
      model.safetensors  optimizer.bin  state.json                    the newest checkpoint
      ema.safetensors  scaler.pt  tracks.safetensors                  where it has them
      metrics.jsonl                                                   the run's log so far

It is never a branch of the model's repository: that one may be public, and stays a loadable
pipeline. Weights are safetensors. The optimizer's state is torch's own format; it is read with
weights_only, and only from a repository of one's own or with --trust_checkpoint.
"""

import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import get_token

from ddpm import download, file_io, hub, run_folder, run_record
from ddpm.errors import UsageError, UserError, foreign_errors
from ddpm.publishing import access, publish

SCHEME = "hub://"
REQUIRED_FILES = ("model.safetensors", "optimizer.bin", run_folder.CHECKPOINT_STATE)
TORCH_FILES = ("optimizer.bin", "scaler.pt")
CHECKPOINT_FILES = (*REQUIRED_FILES, "ema.safetensors", "scaler.pt", run_folder.POWER_EMA)
"""All files of a checkpoint that are uploaded and downloaded."""


def checkpoint_repo_id(repo_id: str) -> str:
    """Return the name of the repository for the training state of a model."""
    return f"{repo_id}-training-state"


def is_hub_address(text: str) -> bool:
    """Return whether --resume_from_checkpoint names a repository: hub://user/name."""
    return text.startswith(SCHEME)


def require_private(repo_id: str) -> None:
    """Raise UserError unless a training state may be sent to `repo_id`. Creates nothing."""
    access.require_write_access(repo_id, repo_id.split("/")[-1])
    info = access.find_repo_info(repo_id)
    if info is not None and not info.private:
        raise UserError(_public_message(repo_id))


def upload_checkpoint(checkpoint: Path, repo_id: str) -> str:
    """Make the private repository hold this checkpoint as its only commit; return the commit's id.

    `checkpoint` is complete and must not change meanwhile; a metrics.jsonl in it is uploaded too.
    At any moment the repository holds all of the earlier checkpoint or all of this one.
    """
    names = sorted(path.name for path in checkpoint.iterdir())
    unknown = [n for n in names if not _is_ours(n) or not (checkpoint / n).is_file()]
    if unknown or not set(REQUIRED_FILES) <= set(names):
        raise UserError(
            f"{checkpoint} cannot be uploaded ({', '.join(unknown) or 'files are missing'}): the "
            "Hub takes complete checkpoints that are not sharded. Leave --hub_checkpoints out."
        )
    files = {name: checkpoint / name for name in names}
    hashes = {name: file_io.file_sha256(path) for name, path in files.items()}
    step, api = run_record.read_checkpoint_state(checkpoint).step, HfApi()
    title = f"Step {step:,}"
    with hub.hub_errors(f"The training state {repo_id}"):
        hub.call(api.create_repo, repo_id, private=True, exist_ok=True)
        info = hub.call(api.repo_info, repo_id)
        if not info.private:
            raise UserError(_public_message(repo_id))
        stale, is_same = publish.diff_with_repo(api, repo_id, info.sha, files, hashes, _is_ours)
        if is_same:
            return info.sha
        with tempfile.TemporaryDirectory() as scratch:
            state = run_folder.CHECKPOINT_STATE
            path = publish.download_file(repo_id, state, info.sha, Path(scratch))
            present = run_record.read_checkpoint_state(path.parent).step if path else 0
        publish.require_no_later_step(repo_id, present, step)
        progress = publish.Progress(repo_id)
        publish.create_commit(api, repo_id, files, stale, info.sha, title, progress)
        hub.call(api.super_squash_history, repo_id, commit_message=title)
        # Squashing removes old commits, but their large files still count against the quota.
        lfs_files = hub.call(lambda: list(api.list_lfs_files(repo_id)))
        unused = [file for file in lfs_files if file.file_oid not in hashes.values()]
        hub.call(api.permanently_delete_lfs_files, repo_id, unused)
        return hub.find_commit(repo_id)


def download_checkpoint(address: str, output_dir: Path, *, trust: bool = False) -> Path:
    """Download hub://user/name as `output_dir`/checkpoint-N, check it, and return that folder.

    Call on one process of a machine and let the others wait. metrics.jsonl comes along where
    `output_dir` has none. `trust` (--trust_checkpoint) allows repositories of other people. Raise
    UserError for those without it, for a repository without a checkpoint, and for one whose files
    would run code.
    """
    repo_id = address.removeprefix(SCHEME)
    if not hub.is_repo_id(repo_id) or "/" not in repo_id:
        raise UsageError(f"{address} is no address of a training state: give hub://user/name.")
    if not trust:
        _require_own(repo_id)
    output_dir.mkdir(parents=True, exist_ok=True)
    scratch = output_dir / ".fetched.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        snapshot = download.download_snapshot(
            repo_id,
            allow_patterns=[*CHECKPOINT_FILES, run_folder.METRICS],
            cache_dir=str(scratch / "cache"),
            kind="training state",
        )
        names = [name for name in CHECKPOINT_FILES if (snapshot.folder / name).is_file()]
        missing = set(REQUIRED_FILES) - set(names)
        if missing:
            raise UserError(
                f"{repo_id} holds no checkpoint ({', '.join(sorted(missing))} missing)."
            )
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        for name in names:
            shutil.copyfile(snapshot.folder / name, checkpoint / name)
        _require_tensors_only(checkpoint, repo_id)
        return _install(checkpoint, snapshot.folder / run_folder.METRICS, output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _install(checkpoint: Path, metrics: Path, output_dir: Path) -> Path:
    """Move a checked checkpoint into `output_dir` in one step; return its folder."""
    step = run_record.read_checkpoint_state(checkpoint).step
    folder = output_dir / f"checkpoint-{step}"
    if folder.exists():
        is_same = all(
            (folder / path.name).is_file()
            and file_io.file_sha256(folder / path.name) == file_io.file_sha256(path)
            for path in checkpoint.iterdir()
        )
        if not is_same:
            raise UserError(
                f"{folder} is there already and is another checkpoint. Go on from it by its name, "
                "or give another --output_dir."
            )
        return folder
    file_io.fsync_tree(checkpoint)
    os.replace(checkpoint, folder)
    file_io.fsync_dir(output_dir)
    if metrics.is_file() and not (output_dir / run_folder.METRICS).exists():
        file_io.write_bytes(output_dir / run_folder.METRICS, metrics.read_bytes())
    return folder


def _require_own(repo_id: str) -> None:
    """Raise UserError unless the repository belongs to the account that is logged in."""
    owner = repo_id.split("/")[0]
    account = access.whoami().name if get_token() is not None else None
    if owner != account:
        raise UserError(
            f"{repo_id} belongs to {owner}, not to {account or 'an account known here'}, and a "
            "checkpoint can hold more than weights. Add --trust_checkpoint if you trust who made "
            f"it{'' if account else f', or l{hub.LOGIN_HINT[1:]}'}."
        )


def _require_tensors_only(checkpoint: Path, repo_id: str) -> None:
    """Raise UserError if a file of torch's own format holds more than tensors and numbers."""
    import torch

    for name in TORCH_FILES:
        if (checkpoint / name).is_file():
            sentence = f"{name} of {repo_id} holds more than tensors, or is damaged"
            with foreign_errors(f"{sentence}, so it was not loaded"):
                torch.load(checkpoint / name, map_location="cpu", weights_only=True)


def _is_ours(name: str) -> bool:
    return name in (*CHECKPOINT_FILES, run_folder.METRICS)


def _public_message(repo_id: str) -> str:
    return (
        f"{repo_id} is public, and a training state is never sent to a public repository. Make it "
        "private on its page, or leave --hub_checkpoints out."
    )
