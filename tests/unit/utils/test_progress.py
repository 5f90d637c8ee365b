"""Progress on a terminal and in the log."""

import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout

import pytest

from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.progress import ProgressDisplay

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTerminal]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    project = logging.getLogger("deepseek_v3")
    handlers, level = list(project.handlers), project.level
    configure_logging()
    yield FakeTerminal()
    project.handlers[:] = handlers
    project.setLevel(level)


def test_log_lines_are_printed_above_the_progress(terminal: FakeTerminal) -> None:
    with redirect_stdout(terminal), ProgressDisplay(transient=False) as display:
        line = display.line("step 50/200", total=200, done=50)
        line.update("step 100/200", 100, "loss 3.2451 12,346 tokens/s")
        get_logger("Trainer").info("Step 100/200")
    screen = terminal.getvalue()
    assert "step 100/200" in screen
    assert "loss 3.2451 12,346 tokens/s" in screen
    assert " left" in screen
    assert "[Trainer] Step 100/200\n" in screen


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_progress_restores_the_terminal_after_an_error(error: type[BaseException], terminal: FakeTerminal) -> None:
    def train() -> None:
        with ProgressDisplay() as display:
            display.line("step 0/10", 10).update("step 1/10", 1, "")
            assert sys.stdout is not terminal
            raise error

    with redirect_stdout(terminal):
        with pytest.raises(error):
            train()
        assert sys.stdout is terminal
        assert terminal.getvalue().rfind(SHOW_CURSOR) > terminal.getvalue().rfind(HIDE_CURSOR) >= 0
        with ProgressDisplay():  # the console is free for the next display
            pass


def test_progress_draws_nothing_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay() as display, display.task("reading", 10, "tasks", logging.getLogger("unheard")) as task:
        task.advance(5)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("total", "unit", "amounts", "expected"),
    [
        (5_000_000, "bytes", [(2_500_000, 0), (2_500_000, 0)], r"reading: 5\.0 MB in \d+\.\d s, [\d,.]+ MB/s"),
        (3, "tasks", [(1, 0)] * 3, r"reading: 3 tasks in \d+\.\d s, [\d,]+ tasks/s"),
        (None, "tokens", [(900, 1), (600, 2)], r"reading: 3 documents, 1,500 tokens in \d+\.\d s, [\d,]+ tokens/s"),
        (0, "tasks", [], None),
    ],
)
def test_a_finished_task_leaves_a_log_line(
    total: int | None, unit: str, amounts: list[tuple[int, int]], expected: str | None, caplog
) -> None:
    log = get_logger("Preprocess")
    with caplog.at_level(logging.INFO, "deepseek_v3"), ProgressDisplay() as display:
        with display.task("reading", total, unit, log) as task:
            for amount, documents in amounts:
                task.advance(amount, documents)
        with pytest.raises(ValueError, match="halfway"), display.task("failing", 10, "tasks", log):
            raise ValueError("halfway")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (expected is not None)
    assert expected is None or re.fullmatch(expected, messages[0]), messages
