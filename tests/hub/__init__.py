"""A small Hugging Face Hub for tests: real HTTP on 127.0.0.1, for unmodified clients.

    python -m tests.hub          # serve one: prints settings for another shell

It keeps models, datasets and spaces with their commits, branches, tags and pull requests on disk,
knows users, tokens and private repositories, checks uploads, and fails on demand. Large files come
and go by Xet, or by git-LFS and plain links to clients with HF_HUB_DISABLE_XET=1.

    hub.py          the interface for tests   server.py       sockets, log, effects of faults
    faults.py       injected faults           wire.py         requests, responses, routes
    api.py          users, info, trees        changes.py      commits, branches, pull requests
    transfers.py    downloads, LFS            cards.py        README metadata
    store.py        permissions, repositories  repository.py   one repository on disk
    accounts.py     users and tokens          objects.py      git ids
    xet.py          uploads and downloads by Xet
"""

from tests.hub.faults import LARGE_DOWNLOADS, LARGE_UPLOADS, Fault
from tests.hub.hub import Hub
from tests.hub.repository import Change, Commit, Repository
from tests.hub.server import RequestRecord
from tests.hub.wire import HubError

__all__ = [
    "LARGE_DOWNLOADS",
    "LARGE_UPLOADS",
    "Change",
    "Commit",
    "Fault",
    "Hub",
    "HubError",
    "Repository",
    "RequestRecord",
]
