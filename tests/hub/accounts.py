"""Users, organizations, tokens and their permissions, stored in `users.json` (tokens as hashes)."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.hub.objects import write_atomically
from tests.hub.wire import HubError

Role = Literal["read", "write", "fineGrained"]


@dataclass(frozen=True)
class Login:
    """A user as seen through one token.

    role: of the token. A fine-grained one writes only in the namespaces of `writes_to`.
    orgs: organization -> the user's role there; "read" members cannot write.
    """

    user: str
    role: Role
    orgs: Mapping[str, str]
    writes_to: tuple[str, ...]

    def belongs_to(self, namespace: str) -> bool:
        return namespace == self.user or namespace in self.orgs

    def may_write(self, namespace: str) -> bool:
        if not self.belongs_to(namespace) or self.orgs.get(namespace) == "read":
            return False
        return self.role == "write" or (self.role == "fineGrained" and namespace in self.writes_to)

    def whoami(self) -> dict[str, Any]:
        access_token: dict[str, Any] = {"displayName": "test", "role": self.role}
        if self.role == "fineGrained":
            access_token["fineGrained"] = {
                "canReadGatedRepos": True,
                "global": [],
                "scoped": [
                    {
                        "entity": {"type": "user" if name == self.user else "org", "name": name},
                        "permissions": ["repo.content.read", "repo.write"],
                    }
                    for name in self.writes_to
                ],
            }
        return {
            "type": "user",
            "id": hashlib.md5(self.user.encode()).hexdigest()[:24],
            "name": self.user,
            "fullname": self.user,
            "email": f"{self.user}@example.com",
            "emailVerified": True,
            "isPro": False,
            "orgs": [
                {"type": "org", "name": name, "fullname": name, "roleInOrg": role}
                for name, role in self.orgs.items()
            ],
            "auth": {"type": "access_token", "accessToken": access_token},
        }


class Accounts:
    """All users of one Hub."""

    def __init__(self, root: Path) -> None:
        self._path = root / "users.json"
        self._lock = threading.Lock()
        self._state: dict[str, dict[str, Any]] = {"users": {}, "tokens": {}}
        if self._path.exists():
            self._state = json.loads(self._path.read_text())

    def add(
        self,
        name: str,
        role: Role,
        orgs: Iterable[str] | Mapping[str, str],
        writes_to: Iterable[str],
        token: str | None,
    ) -> str:
        """Add a user, or another token of a user, and return the token."""
        token = token or "hf_" + secrets.token_hex(17)
        org_roles = dict(orgs) if isinstance(orgs, Mapping) else dict.fromkeys(orgs, "write")
        with self._lock:
            self._state["users"].setdefault(name, {}).update(org_roles)
            self._state["tokens"][_digest(token)] = {
                "user": name,
                "role": role,
                "writes_to": list(writes_to),
            }
            write_atomically(self._path, json.dumps(self._state, indent=1).encode())
        return token

    def login(self, authorization: str | None) -> Login | None:
        """Return the user of an Authorization header, or None; 401 for an unknown token."""
        if authorization is None:
            return None
        scheme, _, token = authorization.partition(" ")
        with self._lock:
            record = self._state["tokens"].get(_digest(token.strip()))
            if scheme.lower() != "bearer" or record is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            orgs = dict(self._state["users"][record["user"]])
        return Login(record["user"], record["role"], orgs, tuple(record["writes_to"]))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
