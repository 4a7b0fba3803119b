"""Serve a test Hub until Ctrl+C.

python -m tests.hub [--root DIR] [--port 8765] [--user me]
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
import threading

from tests.hub import Hub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument("--root", help="folder to keep everything in (default: a temporary one)")
    parser.add_argument("--port", type=int, default=8765, help="0 takes any free port")
    parser.add_argument("--user", default="me", help="name of the user the token belongs to")
    arguments = parser.parse_args()
    hub = Hub(arguments.root, port=arguments.port)
    try:
        hub.start()
    except OSError as error:
        parser.error(f"cannot serve on port {arguments.port} ({error}); choose another --port")
    with tempfile.TemporaryDirectory(prefix="test-hub-home-") as hf_home:
        print(f"# A test Hub with everything in {hub.root}. Paste into another shell:")
        for name, value in hub.env(hub.add_user(arguments.user), hf_home).items():
            print(f"export {name}={shlex.quote(value)}")
        print(f"# Requests so far: curl {hub.url}/-/requests   Ctrl+C stops.", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
    hub.stop()


if __name__ == "__main__":
    main()
