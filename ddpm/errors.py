"""Errors that users can fix, and how a script prints them and exits."""

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
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


class UserError(Exception):
    """An error that the user can fix. The message says what happened, on what, and what to do next.

    `exit_code` is 2 for a wrong command line or setting, 1 otherwise.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(UserError):
    """A UserError about the command line or the settings: exit code 2."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=2)


class Interrupted(Exception):
    """A signal stopped the run after it was saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def run(main: Callable[[], None]) -> None:
    """Call a script's `main` and exit the process with its exit code.

    The first process of each machine prints a UserError without a traceback, and likewise an
    OSError of a full disk or of a path that cannot be written. Other errors are bugs and keep their
    traceback.
    """
    if not sys.stderr.isatty():
        # Without a terminal, no progress bars: the libraries read these at import.
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    prints = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        main()
    except UserError as error:
        if prints:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as stop:
        if prints:
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        # The reader of the output has exited (`| head`). Python flushes stdout at exit, which would
        # raise again, so stdout becomes /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in DISK_ERRNOS:
            raise
        if prints:
            where = f"{error.filename}: " if error.filename else ""
            advice = "Choose another folder, or fix this, then run the command again."
            print(f"error: {where}{error.strerror}. {advice}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
