"""How a script ends: message, exit code, and no traceback but for a bug."""

import errno
import io
import os
import re
import subprocess
import sys

import pytest
from filelock import FileLock

from ddpm import errors
from ddpm.errors import Interrupted, PrintableStream, UsageError, UserError, printable
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


HOSTILE = {
    "line": "a.png\nerror: run this",
    "return": "a\rerror: run this",
    "title": "\x1b]0;title\x07",
    "clipboard": "\x1b]52;c;ZWNobw==\x1b\\",
    "C1": "\x9b2J",
    "right to left": "gnp.\u202eexe.a",
    "isolate": "\u2066a\u2069",
    "zero width": "a\u200bb",
    "line separator": "a\u2028b",
    "surrogate": "a\udce9",
    "backspace": "a\b\b",
    "tag": "a\U000e0041",
}
"""Texts as file names, columns and titles may hold them."""


@pytest.mark.parametrize("kind", HOSTILE)
def test_printable_text_is_one_line_without_effect(kind):
    text = printable(HOSTILE[kind])
    assert text.isprintable() and printable(text) == text
    plain = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in HOSTILE[kind]]
    assert text == "".join(plain) != HOSTILE[kind]
    assert str(UserError(HOSTILE[kind])) == str(Interrupted(HOSTILE[kind], 1)) == text


def test_printable_text_keeps_what_people_write():
    for text in ("", "Straße 7, 手寫數字 🐦", "C:\\new\\table", "a 'b' \"c\" <d>", "x" * 4000):
        assert printable(text) == text
    assert len(printable("x" * 10**6)) < 4100


@pytest.mark.parametrize("login", ["alice:secret", "secret", ":secret", "a:sec@ret"])
def test_logins_in_addresses_are_not_printed(login):
    text = printable(f"cannot reach 'https://{login}@hub.example/a', try https://b.org/@c.")
    assert text == "cannot reach 'https://***@hub.example/a', try https://b.org/@c."


def write_through(text: str) -> str:
    target = io.StringIO()
    PrintableStream(target).write(text)
    return target.getvalue()


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "line"])
def test_a_library_cannot_print_what_acts_on_the_terminal(kind):
    assert write_through(f"Skipped {HOSTILE[kind]}.\n") == f"Skipped {printable(HOSTILE[kind])}.\n"


def test_layout_colors_and_progress_bars_are_printed_as_they_are():
    bar = ("\r 10%|#   | 1/10", "\n\n\x1b[A\x1b[A", "\r      \r", "\x1b[2K")
    for text in ("a\n\tb\n\n", "\x1b[1;31mred\x1b[0m\n", "", "\n", *bar):
        assert write_through(text) == text
    assert write_through("name\x1b[A\rforged") == r"name\x1b[A\rforged"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", r"Stra\xdfe \u624b \U0001f426.png"),
        ("cp1252", r"Straße \u624b \U0001f426.png"),
        ("utf-8", "Straße 手 🐦.png"),
        ("utf-16", "Straße 手 🐦.png"),
    ],
)
def test_a_console_prints_what_its_encoding_has_and_escapes_the_rest(encoding, expected):
    target = io.BytesIO()
    stream = PrintableStream(io.TextIOWrapper(target, encoding=encoding, newline=""))
    print("Straße 手 🐦.png", file=stream, flush=True)
    assert target.getvalue().decode(encoding) == f"{expected}\n"


def test_a_script_prints_any_name_on_a_console_of_ascii():
    script = "from ddpm.errors import run\nrun(lambda: print('手.png'))"
    process = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (process.stdout, process.stderr) == (b"\\u624b.png\n", b"")


def test_all_output_of_a_script_is_printable():
    """Of prints, of the logs and warnings of libraries, and of the traceback of a bug."""
    script = (
        "import logging, warnings\n"
        "from ddpm.errors import run\n"
        "def main():\n"
        "    bad = 'https://a:secret@b.org ' + chr(27) + ']0;t' + chr(7)\n"
        "    print(bad)\n"
        "    logging.warning(bad)\n"
        "    warnings.warn(bad)\n"
        "    raise ValueError(bad)\n"
        "run(main)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
    output = process.stdout + process.stderr
    assert output.count(rb"https://***@b.org \x1b]0;t\x07") == 4
    assert b"\x1b" not in output and b"https://a:" not in output and b"Traceback" in output


def test_interrupted_run_prints_why_and_exits_with_its_code(capsys):
    assert exit_code_of(Interrupted("Saved at step 3.", exit_code=143)) == 143
    assert capsys.readouterr().err == "Saved at step 3.\n"


def test_full_disk_is_one_line_with_the_file(capsys):
    error = OSError(errno.ENOSPC, "No space left on device", "run/unet")
    assert exit_code_of(error) == 1
    assert capsys.readouterr().err.startswith("error: run/unet: No space left on device. Choose")
    with pytest.raises(OSError, match="odd"):
        errors.run(lambda: (_ for _ in ()).throw(OSError("odd")))


def test_name_that_is_too_long_is_one_line(capsys):
    def main() -> None:
        os.stat("x" * 5000)

    with pytest.raises(SystemExit):
        errors.run(main)
    assert capsys.readouterr().err.endswith(
        "x: File name too long. Choose another folder (--output_dir; for caches HF_HOME or "
        "--cache_dir), or fix this, then run the command again.\n"
    )


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_locks_that_a_file_system_lacks_are_one_line(tmp_path, no_locks, capsys, number):
    def main() -> None:
        with FileLock(tmp_path / "a.lock"):
            raise AssertionError("locked")

    no_locks(number)
    with pytest.raises(SystemExit):
        errors.run(main)
    line = f"error: {os.strerror(number)}. This file system lacks .*locks: .*HF_HOME.*--cache_dir"
    assert re.match(line, capsys.readouterr().err)


def test_error_of_a_library_is_one_sentence():
    """Whatever its type and text; UserErrors pass unchanged."""
    for error in (EOFError(), KeyError("x\ny"), MemoryError()):
        with (
            pytest.raises(
                UserError, match=r"^It cannot be read \(\S+\)\. Move it away\.$"
            ) as raised,
            errors.foreign_errors("It cannot be read", "Move it away."),
        ):
            raise error
        assert "\n" not in str(raised.value)
    reason = RuntimeError("Error(s) in loading UNet2DModel:\n\tsize mismatch for conv_in.\n\tmore")
    assert errors.first_line(reason) == (
        "Error(s) in loading UNet2DModel: size mismatch for conv_in."
    )
    with pytest.raises(UsageError, match="^mine$"), errors.foreign_errors("It"):
        raise UsageError("mine")


def test_control_c_exits_130():
    assert exit_code_of(KeyboardInterrupt()) == 130


@pytest.mark.parametrize(
    "address",
    [
        "",
        "huggingface.co",
        "localhost:8080",
        "ftp://huggingface.co",
        "https://",
        "https://me:s3cr3t@",
        "https://me:s3cr3t/x@hub.example",
        "https://me:12/s3cr3t@hub.example",
        "https://me:s3cr3t@x@hub.example",
        "https://[me:s3cr3t@hub.example",
        "https://me:s3#cr3t@hub.example",
        "https://me:s3?cr3t@hub.example",
        "https://hub.example:s3cr3t",
        "https://hub example/s3cr3t",
    ],
)
def test_an_address_of_the_hub_that_is_none_is_one_sentence(address, monkeypatch, capsys):
    """huggingface_hub fails on it at its import, or prints the password."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(SystemExit) as end:
        errors.run(lambda: pytest.fail("started"))
    output = capsys.readouterr().err
    assert end.value.code == 2 and output.startswith("error: HF_ENDPOINT is no address")
    assert output.count("\n") == 1 and "cr3t" not in output


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co",
        "https://hf-mirror.example/",
        "http://127.0.0.1:54321",
        "http://[::1]:8080/hub",
        "https://me:s%2F'!x@hub.example/hf",
    ],
)
def test_addresses_of_the_hub_are_used(address, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert errors.run(lambda: None) is None


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
