"""The settings of push.py, with a sentence under each field."""

import re
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from ddpm.config.base import REVISION
from ddpm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """All of push.py's settings."""

    output_dir: Positional[Annotated[str, tyro.conf.arg(metavar="OUTPUT_DIR")]]
    """The run folder of train.py."""
    repo_id: Positional[Annotated[str | None, tyro.conf.arg(metavar="REPO_ID")]] = None
    """you/name; None is your name and the folder's."""
    private: bool = False
    """Create the repository private. A public one is refused: change that on its page."""
    revision: str | None = None
    """Branch to commit to, created when missing; None is main."""
    tag: str | None = None
    """Tag for the commit, created once it is proved; an existing tag of another commit is
    refused."""
    create_pr: bool = False
    """Open a pull request instead of committing to main. Needs no write access."""
    commit_message: str = "Publish DDPM pipeline"
    """Title of the commit."""
    license: str | None = None
    """License of the model for the card (an identifier of the Hub such as apache-2.0)."""
    space: tuple[str, ...] | None = None
    """Also publish a demo of the model, a Gradio Space, as you/name; without a name it is that of
    the model and -demo."""
    dry_run: bool = False
    """Print the files that would be sent, and the card, and stop. Needs no account."""

    def __post_init__(self) -> None:
        for flag, name in (("--revision", self.revision), ("--tag", self.tag)):
            if name is not None and not is_ref_name(name):
                raise UsageError(
                    f"{flag} {name!r} is no name for a branch or tag: use letters, digits "
                    "and - _ . as in v1.0."
                )
        if self.create_pr and (self.revision or self.tag):
            other = "--revision" if self.revision else "--tag"
            raise UsageError(
                f"--create_pr proposes a commit to main, so {other} does not go with it. Leave one "
                "of the two out."
            )
        if self.space is not None and len(self.space) > 1:
            raise UsageError(f"--space {' '.join(self.space)}: give one name, or none.")
        if self.space is not None and self.create_pr:
            raise UsageError(
                "--space shows what main holds, and --create_pr only proposes it. Leave one of the "
                "two out, and give --space once the proposal is merged."
            )
        if not self.commit_message.strip():
            raise UsageError("--commit_message is empty: give the commit a title, or leave it out.")

    def space_id(self, repo_id: str) -> str:
        """Return the name of the Space of --space for the demo of a model."""
        return self.space[0] if self.space else f"{repo_id}-demo"


def is_ref_name(name: str) -> bool:
    """Return whether git accepts `name` for a branch or tag, and it does not look like a commit."""
    wrong = name.endswith((".", ".lock")) or name.startswith("refs/")
    return bool(REVISION.fullmatch(name)) and not wrong and not re.fullmatch(r"[0-9a-f]{40}", name)
