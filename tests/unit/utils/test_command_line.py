"""How a command ends: one line for a user error, and the exit code that shells expect."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
import typer

from deepseek_v3.utils.command_line import run_app
from deepseek_v3.utils.errors import UserError
from deepseek_v3.utils.interrupts import STOP_SIGNALS


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def interrupted() -> None:
    raise KeyboardInterrupt


def interrupted_in_a_library() -> None:
    try:
        interrupted()
    finally:
        raise RuntimeError("unexpected pos 64 vs 0")


def interrupted_and_reported() -> None:
    try:
        interrupted()
    except KeyboardInterrupt:
        raise UserError("cannot be written") from None


def by_typer() -> None:
    app = typer.Typer()
    app.command()(interrupted)
    app([])


def by_an_older_typer() -> None:
    try:
        interrupted()
    except KeyboardInterrupt:
        raise SystemExit(1) from None


@pytest.mark.parametrize(
    "app", [interrupted, interrupted_in_a_library, interrupted_and_reported, by_typer, by_an_older_typer]
)
def test_ctrl_c_exits_with_130_even_as_another_error(
    app: Callable[[], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(SystemExit) as end:
        run_app(app)
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "")
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    signal.raise_signal(signal.SIGINT)  # once more, while the interpreter ends
    assert codes == [130]


def test_a_late_signal_does_not_change_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    app = typer.Typer()
    app.command()(lambda: None)
    with pytest.raises(SystemExit) as end:
        run_app(lambda: app([]))
    assert end.value.code == 0
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    for number in STOP_SIGNALS:
        signal.raise_signal(number)
    assert codes == [0, 0, 0, 0]


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with pytest.raises(SystemExit):
        run_app(interrupted)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_user_error_is_printed_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("run.yaml: cannot be read")

    with pytest.raises(SystemExit) as end:
        run_app(fail)
    assert end.value.code == 1
    assert capsys.readouterr() == ("", "error: run.yaml: cannot be read\n")


def test_a_defect_shows_its_traceback() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_app(fail)


def test_failed_output_does_not_change_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:  # noqa: PTH123 -- a descriptor
        monkeypatch.setattr(sys, "stdout", stream)
        run_app(lambda: stream.write("a line that waits in the buffer"))
        stream.write("more, as the interpreter may write it")
        stream.flush()
