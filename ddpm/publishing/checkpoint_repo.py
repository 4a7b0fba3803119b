"""How a training state moves to another machine: through a private repository of its own.

    user/name-training-state         always private; one commit, so that it does not grow
      model.safetensors  ema.safetensors  optimizer.bin  state.json   one checkpoint, which may have
      scaler.pt  tracks.safetensors                                   these too
      metrics.jsonl                  the run's log so far

It is never a branch of the model's repository: that may be public, and stays a loadable pipeline
and nothing else. Weights are safetensors; the optimizer's state is torch's own format, which is
read with weights_only and from one's own repository, or on an explicit word.
"""

import os
import shutil
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub import HfApi
from huggingface_hub.utils import get_token

from ddpm import hub, run_folder
from ddpm.errors import UsageError, UserError
from ddpm.publishing import publish
from ddpm.sampling import pipeline

SCHEME = "hub://"
STATE = run_folder.CHECKPOINT_STATE
NEEDED = ("model.safetensors", "optimizer.bin", STATE)
TENSORS = ("optimizer.bin", "scaler.pt")
FILES = (*NEEDED, "ema.safetensors", "scaler.pt", run_folder.POWER_EMA)
"""All that a checkpoint may hold when it travels."""


def checkpoint_repo_id(repo_id: str) -> str:
    """The repository beside a model's for its training state."""
    return f"{repo_id}-training-state"


def is_hub_address(text: str) -> bool:
    """Whether --resume_from_checkpoint names a repository: hub://user/name."""
    return text.startswith(SCHEME)


def require_private(repo_id: str) -> str:
    """`repo_id`, if a training state may be sent there. Makes nothing; UserError otherwise."""
    hub.require_write_access(repo_id, repo_id.split("/")[-1])
    info = hub.find_model_info(repo_id)
    if info is not None and not info.private:
        raise UserError(_public(repo_id))
    return repo_id


def upload_checkpoint(checkpoint: Path, repo_id: str) -> str:
    """Make the private repository hold this one checkpoint, as its only commit: the commit's id.

    `checkpoint` is complete and stays as it is until this returns; a metrics.jsonl in it goes
    along. At any moment the repository holds the earlier checkpoint or this one, whole.
    """
    names = sorted(path.name for path in checkpoint.iterdir())
    strange = [n for n in names if not _is_ours(n) or not (checkpoint / n).is_file()]
    if strange or not set(NEEDED) <= set(names):
        raise UserError(
            f"{checkpoint} is not a checkpoint that can travel ({', '.join(strange) or 'not whole'}"
            "): sharded ones stay where they are. Leave --hub_checkpoints out."
        )
    files = {name: checkpoint / name for name in names}
    hashes = {name: pipeline.file_sha256(path) for name, path in files.items()}
    step, api = _step_of(checkpoint), HfApi()
    with hub.hub_errors(f"The training state {repo_id}"):
        hub.call(api.create_repo, repo_id, private=True, exist_ok=True)
        info = hub.call(api.repo_info, repo_id)
        if not info.private:
            raise UserError(_public(repo_id))
        stale, same = publish.diff_with_repo(api, repo_id, info.sha, files, hashes, _is_ours)
        if same:
            return info.sha
        publish.create_commit(
            api, repo_id, files, stale, info.sha, f"Step {step:,}", publish.Progress(repo_id)
        )
        hub.call(api.super_squash_history, repo_id, commit_message=f"Step {step:,}")
        # A squash forgets old commits, but their large files go on taking room.
        old = [
            f
            for f in hub.call(lambda: list(api.list_lfs_files(repo_id)))
            if f.file_oid not in hashes.values()
        ]
        hub.call(api.permanently_delete_lfs_files, repo_id, old)
        return hub.call(api.repo_info, repo_id).sha


def download_checkpoint(address: str, into: Path, *, trust: bool = False) -> Path:
    """Download hub://user/name into `into`/checkpoint-N, checked, and give that folder.

    Call on one process of a machine and let the others wait. metrics.jsonl comes along where `into`
    has none. `trust` (--trust_checkpoint) allows repositories of others. UserError for those
    without it, for a repository that holds no checkpoint, and for one that would run code.
    """
    repo_id = address.removeprefix(SCHEME)
    if not hub.is_repo_id(repo_id) or "/" not in repo_id:
        raise UsageError(f"{address} is no address of a training state: give hub://user/name.")
    _require_trust(repo_id, trust)
    into.mkdir(parents=True, exist_ok=True)
    scratch = into / ".fetched.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        wanted = [*FILES, run_folder.METRICS]
        snapshot = hub.download_snapshot(
            repo_id, allow_patterns=wanted, cache_dir=str(scratch / "cache"), kind="training state"
        )
        missing = [name for name in NEEDED if not (snapshot.folder / name).is_file()]
        if missing:
            raise UserError(f"{repo_id} holds no checkpoint ({', '.join(missing)} missing).")
        whole = scratch / "checkpoint"
        whole.mkdir()
        for name in FILES:
            if (snapshot.folder / name).is_file():
                shutil.copyfile(snapshot.folder / name, whole / name)
        _require_tensors_only(whole, repo_id)
        return _put(whole, snapshot.folder, into)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put(whole: Path, snapshot: Path, into: Path) -> Path:
    """Move a checked checkpoint to its place, which it takes all at once."""
    folder = into / f"checkpoint-{_step_of(whole)}"
    if folder.exists():
        same = all(
            (folder / path.name).is_file()
            and pipeline.file_sha256(folder / path.name) == pipeline.file_sha256(path)
            for path in whole.iterdir()
        )
        if not same:
            raise UserError(
                f"{folder} is there already and is another checkpoint. Go on from it by its name, "
                "or give another --output_dir."
            )
        return folder
    run_folder.fsync_tree(whole)
    os.replace(whole, folder)
    run_folder.fsync_dir(into)
    if (snapshot / run_folder.METRICS).is_file() and not (into / run_folder.METRICS).exists():
        run_folder.write_bytes(
            into / run_folder.METRICS, (snapshot / run_folder.METRICS).read_bytes()
        )
    return folder


def _require_trust(repo_id: str, trust: bool) -> None:
    owner = repo_id.split("/")[0]
    if trust:
        return
    me = hub.whoami().name if get_token() is not None else None
    if owner != me:
        raise UserError(
            f"{repo_id} belongs to {owner}, not to {me or 'an account known here'}, and a "
            "checkpoint can hold more than weights. Add --trust_checkpoint if you trust who made "
            f"it{'' if me else f', or l{hub.LOGIN_HINT[1:]}'}."
        )


def _require_tensors_only(checkpoint: Path, repo_id: str) -> None:
    """UserError unless torch's own files need no unpickling of anything but tensors and numbers."""
    import torch

    for name in TENSORS:
        path = checkpoint / name
        if not path.is_file():
            continue
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise UserError(
                f"{name} of {repo_id} holds more than tensors, or is damaged, so it was not loaded "
                f"({str(error).strip().splitlines()[0]})."
            ) from error


def _step_of(checkpoint: Path) -> int:
    state = run_folder.read_json(checkpoint / STATE)
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int or step < 0:
        raise UserError(f"{checkpoint / STATE} names no step, so it is not a checkpoint of ours.")
    return step


def _is_ours(name: str) -> bool:
    return name in (*FILES, run_folder.METRICS)


def _public(repo_id: str) -> str:
    return (
        f"{repo_id} is public, and a training state is never sent to a public repository. Make it "
        "private on its page, or leave --hub_checkpoints out."
    )
