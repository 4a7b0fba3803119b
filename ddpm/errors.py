"""How people are told what went wrong: one sentence, no traceback, an exit code that is not 0."""

import errno
import os
import sys
from collections.abc import Callable

DISK_ERRNOS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)


class UserError(Exception):
    """Something a person can put right. The message says what, on which thing, and what to do next.

    `exit_code` is 2 for a wrong command line or setting, 1 for everything else.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(UserError):
    """A UserError about the command line or the settings: exit code 2."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=2)


class Interrupted(Exception):
    """The run was asked to stop and has saved itself; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def run(main: Callable[[], None]) -> None:
    """Call a script's `main` and leave the process with its exit code.

    A UserError is printed without a traceback, by one process of each machine, and so is a folder
    that is full, is a file, or may not be written. Anything else is a fault of ours and keeps its
    traceback.
    """
    if not sys.stderr.isatty():
        # The Hub's clients draw bars into log files unless they are told before they are imported.
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        main()
    except UserError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as stop:
        if speaks:
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        # Whoever read our output has left (`| head`); Python would complain of it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        if speaks:
            where = f"{error.filename}: " if error.filename else ""
            advice = "Choose another folder, or put this right, then run the command again."
            print(f"error: {where}{error.strerror}. {advice}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
