"""Accounts of the Hub, and whether one may write to a repository. Nothing is created or sent."""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, ModelInfo, SpaceInfo
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import get_token, validate_repo_id

from ddpm.errors import UsageError, UserError
from ddpm.hub import LOGIN_HINT, call, endpoint, http_status, hub_errors


@dataclass(frozen=True)
class Account:
    """The owner of the token: `name`, and the organizations with the role in each.

    `writes_to` holds the owners and repositories that a fine-grained token may write to; None for a
    token with all rights of its owner.
    """

    name: str
    organizations: dict[str, str | None]
    can_write: bool
    writes_to: frozenset[str] | None = None


def whoami() -> Account:
    """Return the owner of the token. UserError when there is none or the Hub does not accept it."""
    if get_token() is None:
        raise UserError(f"The Hub needs an account for this. {LOGIN_HINT}.")
    with hub_errors("Your account"):
        try:
            answer = call(HfApi().whoami)
        except Exception as error:
            if http_status(error) == 401:
                raise UserError(
                    f"The Hub does not accept the token that is set here (401). {LOGIN_HINT} again."
                ) from error
            raise
    token = answer.get("auth", {}).get("accessToken") or {}
    return Account(
        answer["name"],
        {org["name"]: org.get("roleInOrg") for org in answer.get("orgs", [])},
        can_write=token.get("role") != "read",
        writes_to=_fine_grained_scope(token),
    )


def _fine_grained_scope(token: dict[str, Any]) -> frozenset[str] | None:
    """Return the owners and repositories of a fine-grained token; None for other tokens."""
    rights = token.get("fineGrained")
    if token.get("role") != "fineGrained" or not isinstance(rights, dict):
        return None
    return frozenset(
        str(scope.get("entity", {}).get("name"))
        for scope in rights.get("scoped", [])
        if "repo.write" in scope.get("permissions", [])
    )


def require_write_access(
    repo_id: str | None,
    default_name: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    repo_type: str = "model",
) -> str:
    """Return the full id of the repository to write to, once that is known to be allowed.

    Nothing is created or sent. Raise UserError for: no token, a wrong or read-only one, a malformed
    id, no write access, a name that a repository of another type has, and with `private` a public
    repository. With `create_pr` it must exist, whoever owns it.
    """
    account = whoami()
    repo_id = repo_id or default_name
    if "/" not in repo_id:
        repo_id = f"{account.name}/{repo_id}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).partition(" Use `repo_type`")[0]
        raise UsageError(f"{repo_id!r} is not a repository id: {reason}") from None
    settings = f"{endpoint()}/settings/tokens"
    if not account.can_write:
        raise UserError(
            f"The token of {account.name} may only read. Create one that may write at {settings}, "
            "then log in with it (`hf auth login` or HF_TOKEN)."
        )
    with hub_errors(f"The repository {repo_id}"):
        info = find_repo_info(repo_id, repo_type)
        if create_pr and info is None:
            raise UserError(
                f"{repo_id} does not exist, so nothing can be proposed to it. Check the name, or "
                "leave --create_pr out."
            )
        if not create_pr and not _may_write(account, repo_id, repo_type, info is not None):
            owner, name = repo_id.split("/")
            other = f", or the name {account.name}/{name}" if owner != account.name else ""
            raise UserError(
                f"{account.name} may not write to {repo_id} with this token. Use one with that "
                f"right ({settings}){other}."
            )
    if private and info is not None and not info.private:
        raise UserError(
            f"{repo_id} exists and is public, which --private does not change. Nothing was sent. "
            "Make it private on its page, or give another name."
        )
    return repo_id


def _may_write(account: Account, repo_id: str, repo_type: str, exists: bool) -> bool:
    """Return whether the token may write to a repository, or create it.

    Raise UserError when a new one would have the name of one of another type.
    """
    if exists:
        try:
            call(HfApi().auth_check, repo_id, repo_type=repo_type, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code != 403:
                raise
            return False
        return True
    for kind in ("model", "dataset", "space"):
        if kind != repo_type and call(HfApi().repo_exists, repo_id, repo_type=kind):
            raise UserError(f"{repo_id} is a {kind} already. Choose another name.")
    owner = repo_id.split("/")[0]
    is_owner = owner == account.name or account.organizations.get(owner, "read") != "read"
    return is_owner and (account.writes_to is None or bool({owner, repo_id} & account.writes_to))


def find_repo_info(repo_id: str, repo_type: str = "model") -> ModelInfo | SpaceInfo | None:
    """Return a repository as this account sees it; None when it does not see any."""
    try:
        return call(HfApi().repo_info, repo_id, repo_type=repo_type)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
