"""A small Hugging Face Hub for tests: real HTTP on 127.0.0.1, for unmodified clients.

    python -m tests.hub          # by hand: prints what to paste into another shell

It keeps models, datasets and spaces with their commits, branches, tags and pull requests on disk,
knows users, tokens and private repositories, checks what is uploaded, and fails on demand. It
does not speak Xet: clients run with HF_HUB_DISABLE_XET=1, which `Hub.env` sets.

    hub.py          what tests use            server.py       sockets, log, faults' effects
    faults.py       what can go wrong         wire.py         requests, answers, routes
    api.py          people, info, trees       changes.py      commits, branches, pull requests
    transfers.py    downloads, LFS            cards.py        README metadata
    store.py        rights, all repositories  repository.py   one repository on disk
    accounts.py     users and tokens          objects.py      git's ids
"""

from tests.hub.faults import Fault
from tests.hub.hub import Hub
from tests.hub.repository import Change, Commit, Repository
from tests.hub.server import RequestRecord
from tests.hub.wire import HubError

__all__ = ["Change", "Commit", "Fault", "Hub", "HubError", "Repository", "RequestRecord"]
