"""How a script ends: message, exit code, traceback or none."""

import subprocess
import sys

import pytest

from ddpm import errors
from ddpm.errors import Interrupted, UsageError, UserError
from tests.conftest import ROOT


def end_with(error: BaseException) -> int:
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
    assert end_with(error) == code
    said = capsys.readouterr()
    assert said.err == f"error: {error}\n"
    assert said.out == ""


def test_interrupted_run_says_so_and_exits_with_its_code(capsys):
    assert end_with(Interrupted("Saved at step 3.", exit_code=143)) == 143
    assert capsys.readouterr().err == "Saved at step 3.\n"


def test_control_c_exits_130():
    assert end_with(KeyboardInterrupt()) == 130


def test_a_fault_of_ours_keeps_its_traceback():
    def main() -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        errors.run(main)


def test_success_returns():
    assert errors.run(lambda: None) is None


@pytest.mark.parametrize("error", [UserError("x"), Interrupted("x", exit_code=130)])
def test_one_process_of_a_machine_speaks(error, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert end_with(error) == error.exit_code
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_is_no_fault():
    """`sample.py --help | head`: no traceback, neither ours nor Python's own at the end."""
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
