"""Publish a demo Space: an app of Gradio that draws with one proved revision of a model.

    you/name-demo
      app.py  requirements.txt    the files in ddpm/publishing/space/, the same for every model
      README.md                   the settings of the Space
      space.json                  the model, its revision, and the files as they were sent

What the model holds, such as the names of its classes, is data that the app reads: no text of it
becomes code. A file that is not as it was sent was changed by a person, and is kept.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils.sha import git_hash

from ddpm import file_io, hub
from ddpm.errors import UserError
from ddpm.publishing import publish
from ddpm.typed_json import parse_json

APP_FOLDER = Path(__file__).parent / "space"
APP, REQUIREMENTS, README, SETTINGS = "app.py", "requirements.txt", "README.md", "space.json"
GRADIO_VERSION = "6.31.0"
"""The release that the app was tried with; the Hub installs it."""
NEW_SPACE = {".gitattributes", README}
"""Files that the Hub puts into a new Space."""
MESSAGE = "Publish a demo of {}"


@dataclass(frozen=True)
class SpaceSettings:
    """The model, its revision, and the git blob id of each other file as it was sent."""

    model: str
    revision: str
    sent: dict[str, str]


@dataclass(frozen=True)
class SpaceResult:
    """The commit that holds a demo.

    `is_private` is the model, `kept` are the files that people changed in the Space.
    """

    space_id: str
    commit: str
    is_new: bool
    is_private: bool
    kept: list[str]

    def __str__(self) -> str:
        address = f"{hub.endpoint()}/spaces/{self.space_id}"
        lines = [
            f"Published a demo in one commit: {address}"
            if self.is_new
            else f"{address} holds the same demo already: no new commit."
        ]
        lines += [
            f"{name} was changed there and is kept; delete it there to get that of this push."
            for name in self.kept
        ]
        if self.is_private:
            lines.append(
                "The model is private: in the settings of the Space, add a token that may read it "
                "as the secret HF_TOKEN."
            )
        return "\n".join(lines)


def stage_space(staging: Path, space_id: str, repo_id: str, commit: str) -> dict[str, Path]:
    """Write the files of a Space into the empty folder `staging`: {name: path}."""
    staging.mkdir(parents=True, exist_ok=True)
    metadata = {
        "title": space_id.split("/")[-1],
        "emoji": "🎲",
        "colorFrom": "gray",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "app_file": APP,
        "models": [repo_id],
    }
    readme = (
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n"
        f"Draws images with [{repo_id}](https://huggingface.co/{repo_id}).\n\n"
        f"`{SETTINGS}` names the revision of the model. On your machine:\n"
        f"`pip install -r {REQUIREMENTS} && python {APP}`\n"
    )
    contents = {name: (APP_FOLDER / name).read_bytes() for name in (APP, REQUIREMENTS)}
    contents[README] = readme.encode()
    for name, content in contents.items():
        (staging / name).write_bytes(content)
    sent = {name: git_hash(content) for name, content in contents.items()}
    file_io.write_json(staging / SETTINGS, asdict(SpaceSettings(repo_id, commit, sent)))
    return {name: staging / name for name in (*contents, SETTINGS)}


def publish_space(space_id: str, repo_id: str, commit: str) -> SpaceResult:
    """Make the Space draw with `commit` of a model, in one commit, and verify what is there then.

    `space_id` must be writable (access.require_write_access). A new Space is private if the model
    is. Raise UserError that says what is on the Hub; the same call again continues from there.
    """
    progress = publish.Progress(space_id)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return _publish_space(space_id, repo_id, commit, Path(scratch), progress)
    except UserError as error:
        raise UserError(f"{error} {progress}", error.exit_code) from error


def _publish_space(
    space_id: str, repo_id: str, commit: str, scratch: Path, progress: publish.Progress
) -> SpaceResult:
    api = HfApi()
    files = stage_space(scratch / "staged", space_id, repo_id, commit)
    with hub.hub_errors(hub.Repository(space_id, "space", kind="Space")):
        is_private = bool(hub.call(api.model_info, repo_id).private)
        hub.call(
            api.create_repo,
            space_id,
            repo_type="space",
            space_sdk="gradio",
            private=is_private,
            exist_ok=True,
        )
        progress.state = publish.UNTOUCHED
        head = hub.find_commit(space_id, repo_type="space")
        kept = _keep_changed_files(api, space_id, head, files, scratch)
        hashes = {name: file_io.file_sha256(path) for name, path in files.items()}
        _, is_same = publish.diff_with_repo(
            api, space_id, head, files, hashes, lambda name: False, repo_type="space"
        )
        new_head = head
        if not is_same:
            new_head, _ = publish.create_commit(
                api,
                space_id,
                files,
                [],
                head,
                MESSAGE.format(repo_id),
                progress,
                repo_type="space",
            )
    progress.state = f"{{0}} holds this demo as commit {new_head}, but it is not compared yet."
    publish.verify_commit(space_id, new_head, hashes, scratch / "cache", repo_type="space")
    return SpaceResult(space_id, new_head, not is_same, is_private, kept)


def _keep_changed_files(
    api: HfApi, space_id: str, head: str, files: dict[str, Path], scratch: Path
) -> list[str]:
    """Take files that people changed in the Space out of `files`, and return their names.

    UserError for a Space that was not made by a push.
    """
    listing = publish.list_files(api, space_id, head, repo_type="space")
    present = {name: file.blob_id for name, file in listing.items()}
    if SETTINGS not in present:
        if present.keys() <= NEW_SPACE:
            return []
        raise UserError(
            f"{space_id} is a Space with files of its own ({min(present.keys() - NEW_SPACE)}), "
            "which are not replaced. Give another name: --space you/name-demo."
        )
    path = publish.download_file(space_id, SETTINGS, head, scratch, repo_type="space")
    source = f"{SETTINGS} of {space_id}"
    before = parse_json(SpaceSettings, file_io.read_json(path, source=source), source).sent
    now = parse_json(SpaceSettings, file_io.read_json(files[SETTINGS]), SETTINGS)
    kept = [
        name
        for name in now.sent
        if name in present and present[name] not in (before.get(name), now.sent[name])
    ]
    for name in kept:
        del files[name]
    sent = now.sent | {name: before[name] for name in kept if name in before}
    file_io.write_json(files[SETTINGS], asdict(SpaceSettings(now.model, now.revision, sent)))
    return kept
