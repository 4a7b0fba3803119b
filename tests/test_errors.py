"""How a script ends: message, exit code, and no traceback but for a bug."""

import errno
import subprocess
import sys

import pytest

from ddpm import errors
from ddpm.errors import Interrupted, UsageError, UserError
from tests.conftest import ROOT


def exit_code_of(error: BaseException) -> int:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        errors.run(main)
    return end.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("The disk is full."), 1),
        (UserError("The disk is full.", exit_code=7), 7),
        (UsageError("--seed is wrong."), 2),
    ],
)
def test_user_error_is_one_line_and_an_exit_code(error, code, capsys):
    assert exit_code_of(error) == code
    output = capsys.readouterr()
    assert output.err == f"error: {error}\n"
    assert output.out == ""


def test_interrupted_run_prints_why_and_exits_with_its_code(capsys):
    assert exit_code_of(Interrupted("Saved at step 3.", exit_code=143)) == 143
    assert capsys.readouterr().err == "Saved at step 3.\n"


def test_full_disk_is_one_line_with_the_file(capsys):
    error = OSError(errno.ENOSPC, "No space left on device", "run/unet")
    assert exit_code_of(error) == 1
    assert capsys.readouterr().err.startswith("error: run/unet: No space left on device. Choose")
    with pytest.raises(OSError, match="odd"):
        errors.run(lambda: (_ for _ in ()).throw(OSError("odd")))


def test_control_c_exits_130():
    assert exit_code_of(KeyboardInterrupt()) == 130


def test_bug_keeps_its_traceback():
    def main() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        errors.run(main)


def test_success_returns():
    assert errors.run(lambda: None) is None


@pytest.mark.parametrize("error", [UserError("x"), Interrupted("x", exit_code=130)])
def test_only_the_first_process_of_a_machine_prints(error, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code_of(error) == error.exit_code
    assert capsys.readouterr().err == ""


def test_closed_pipe_prints_no_traceback():
    """`sample.py --help | head`: no traceback, also none of Python itself at the end."""
    script = (
        "from ddpm.errors import run\n"
        "def main():\n"
        "    for _ in range(10**6): print('words', flush=True)\n"
        "run(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"words\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()
