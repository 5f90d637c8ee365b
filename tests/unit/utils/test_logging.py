"""Log lines: their form, their destination, and outputs that fail."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator

import pytest

from deepseek_v3.utils.logging import configure_logging, get_console, get_logger


@pytest.fixture(autouse=True)
def logging_left_as_found() -> Iterator[None]:
    project = logging.getLogger("deepseek_v3")
    handlers, level = list(project.handlers), project.level
    yield
    project.handlers[:] = handlers
    project.setLevel(level)


def test_a_line_is_the_component_and_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    get_logger("Trainer").info("Step 100/42036 | Loss: 3.2451 | LR: %.2e", 1.8e-4)
    captured = capsys.readouterr()
    assert captured.out == "[Trainer] Step 100/42036 | Loss: 3.2451 | LR: 1.80e-04\n"
    assert captured.err == ""


def test_warnings_and_errors_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    get_logger("Checkpoint").warning("passed over x.pt")
    get_logger("Checkpoint").error("no space")
    assert capsys.readouterr().out == "[Checkpoint] warning: passed over x.pt\n[Checkpoint] error: no space\n"


def test_markup_in_messages_is_not_interpreted(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    message = "[bold]:rocket: " + "long " * 100 + "/[red]path[/red]"
    get_logger("Data").info(message)
    assert capsys.readouterr().out == f"[Data] {message}\n"


def test_lines_can_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(stderr=True)
    get_logger("Inference").info("loaded")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "[Inference] loaded\n")


def test_configuring_again_replaces_the_first_setting(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(stderr=True)
    configure_logging(logging.WARNING)
    get_logger("Trainer").info("hidden")
    get_logger("Trainer").warning("shown")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("[Trainer] warning: shown\n", "")


def test_exceptions_are_logged_with_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    try:
        raise ValueError("odd number")
    except ValueError:
        get_logger("Data").exception("stage failed")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[Data] error: stage failed"
    assert lines[-1] == "ValueError: odd number"


def test_a_line_that_cannot_be_printed_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    get_logger("Data").info("café")
    assert "UnicodeEncodeError" in capsys.readouterr().err


def test_records_reach_the_handlers_of_a_host_program(caplog: pytest.LogCaptureFixture) -> None:
    configure_logging()
    get_logger("Trainer").info("seen")
    assert caplog.messages == ["seen"]


def test_a_live_display_shares_the_console_of_the_log() -> None:
    configure_logging(stderr=True)
    assert get_console() is get_console()
    assert get_console().stderr


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_closed_output_pipe_does_not_end_the_program(
    unbuffered: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `| head`, which closes the pipe."""
    configure_logging()
    reader, writer = os.pipe()
    os.close(reader)
    raw = io.FileIO(writer, "w")
    output = raw if unbuffered else io.BufferedWriter(raw)
    with io.TextIOWrapper(output, write_through=unbuffered) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        for step in range(3):
            get_logger("Trainer").info("Step %d", step)
        get_console().print("a table")
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    told = capsys.readouterr().err
    assert told == "[Logging] warning: standard output cannot be written: Broken pipe; the program continues\n"


def test_a_full_disk_is_reported_once_and_when_it_is_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging()
    with open("/dev/full", "w") as full, monkeypatch.context() as broken:  # noqa: PTH123
        broken.setattr(sys, "stdout", full)
        get_logger("Trainer").info("Step 1")
        get_logger("Trainer").info("Step 2")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    get_logger("Trainer").info("Step 3")
    captured = capsys.readouterr()
    assert captured.out == "[Trainer] Step 3\n"
    assert captured.err.splitlines() == [
        "[Logging] warning: standard output cannot be written: No space left on device; the program continues",
        "[Logging] warning: standard output can be written again",
    ]


@pytest.mark.parametrize("stderr", [False, True])
def test_a_program_without_standard_output_goes_on(stderr: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    configure_logging(stderr=stderr)
    monkeypatch.setattr(sys, "stderr" if stderr else "stdout", None)
    get_logger("Trainer").info("Step 1")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr" if stderr else "stdout", closed)
    get_logger("Trainer").info("Step 2")
