"""Who am I, and may I write there: asked before anything is made or sent.

The token itself is huggingface_hub's business, as in the room hub.
"""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import get_token, validate_repo_id

from ddpm import hub
from ddpm.errors import UsageError, UserError


@dataclass(frozen=True)
class Account:
    """Who the token belongs to: `name`, and the organisations with the role held in each.

    `writes_to`: the only owners and repositories that a fine-grained token may write to; None for
    a token that may write wherever its owner may.
    """

    name: str
    organisations: dict[str, str | None]
    can_write: bool
    writes_to: frozenset[str] | None = None


def whoami() -> Account:
    """Who the token belongs to. UserError when there is none or the Hub does not know it."""
    if get_token() is None:
        raise UserError(f"The Hub needs to know you before it takes a model. {hub.LOG_IN}.")
    with hub.told("Your account"):
        try:
            answer = hub.call(HfApi().whoami)
        except Exception as error:
            if hub.status_of(error) == 401:
                raise UserError(
                    f"The Hub does not accept the token that is set here (401). {hub.LOG_IN} anew."
                ) from error
            raise
    token = answer.get("auth", {}).get("accessToken", {}) or {}
    organisations = {org["name"]: org.get("roleInOrg") for org in answer.get("orgs", [])}
    return Account(
        answer["name"],
        organisations,
        can_write=token.get("role") != "read",
        writes_to=_fine_grained(token),
    )


def require_write(
    repo_id: str | None, default_name: str, *, private: bool = False, create_pr: bool = False
) -> str:
    """The full id of the model repository to write to, after asking whether that is allowed.

    Nothing is created or sent. UserError for: no token, a wrong or read-only one, a malformed id,
    somebody else's namespace, a name that a dataset or Space of the same owner has, and with
    `private` a repository that is public. With `create_pr` it must exist, whoever owns it.
    """
    me = whoami()
    repo_id = repo_id or default_name
    if "/" not in repo_id:
        repo_id = f"{me.name}/{repo_id}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).partition(" Use `repo_type`")[0]
        raise UsageError(f"{repo_id!r} is no repository id: {reason}") from None
    settings = f"{hub.endpoint()}/settings/tokens"
    if not me.can_write:
        raise UserError(
            f"The token of {me.name} may only read. Make one that may write at {settings}, then "
            "log in with it (`hf auth login` or HF_TOKEN)."
        )
    with hub.told(f"The repository {repo_id}"):
        info = model_info(repo_id)
        if info is None:
            for kind in ("dataset", "space"):
                if hub.call(HfApi().repo_exists, repo_id, repo_type=kind):
                    raise UserError(f"{repo_id} is a {kind} already. Choose another name.")
    if create_pr:
        if info is None:
            raise UserError(f"{repo_id} does not exist, so nothing can be proposed to it. Check "
                            "the name, or leave --create_pr out.")  # fmt: skip
        return repo_id
    _require_owner(me, repo_id, settings)
    if info is not None:
        if private and not info.private:
            raise UserError(
                f"{repo_id} exists and is public, which --private does not change. Nothing was "
                "sent. Make it private on its page, or give another name."
            )
        with hub.told(f"The repository {repo_id}"):
            hub.call(HfApi().auth_check, repo_id, write=True)
    return repo_id


def model_info(repo_id: str) -> ModelInfo | None:
    """The model repository as this account sees it; None when it sees none."""
    try:
        return hub.call(HfApi().model_info, repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _require_owner(me: Account, repo_id: str, settings: str) -> None:
    owner, name = repo_id.split("/")
    if owner != me.name and me.organisations.get(owner, "no member") in ("no member", "read"):
        raise UserError(
            f"{me.name} may not write to {owner}. "
            f"Use {me.name}/{name}, or ask an admin of {owner} for a writing role."
        )
    if me.writes_to is not None and not {owner, repo_id} & me.writes_to:
        raise UserError(
            f"The fine-grained token of {me.name} may not write to {owner}. Give it the right to "
            f"write to repositories of {owner} at {settings}, or use another token."
        )


def _fine_grained(token: dict[str, Any]) -> frozenset[str] | None:
    """Owners and repositories that a fine-grained token may write to; None for other tokens."""
    rights = token.get("fineGrained")
    if token.get("role") != "fineGrained" or not isinstance(rights, dict):
        return None
    return frozenset(
        str(scope.get("entity", {}).get("name"))
        for scope in rights.get("scoped", [])
        if "repo.write" in scope.get("permissions", [])
    )
