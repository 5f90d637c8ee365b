"""A conversation in the terminal: reads messages and commands, and shows the answers."""

from __future__ import annotations

import sys
from collections.abc import Generator as Stream
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace

import typer
from rich.console import Console

from deepseek_v3.inference.conversation import Conversation
from deepseek_v3.inference.generator import Completion, Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.utils.errors import GenerationError, UserError
from deepseek_v3.utils.text import pluralize, printable

_COMMANDS = """\
/reset         forget what was said
/system TEXT   set the system message; without TEXT, remove it
/help          show this
/exit          end, as Ctrl-D does
Ctrl-C stops an answer. Write a message that begins with / with two of them."""

# Characters that would control the terminal, and the signs that Unicode has for them.
_SIGNS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_SIGNS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class ChatSession:
    """Talks with a user.

    On a terminal it asks for each message, and shows characters that would control the terminal as signs. Otherwise
    standard output holds the answers alone, each ended by a line break; notes go to standard error. `has_template`:
    whether messages are messages, and not lines of one text.
    """

    def __init__(
        self, generator: Generator, conversation: Conversation, sampling: SamplingConfig, has_template: bool
    ) -> None:
        self._generator, self._conversation, self._sampling = generator, conversation, sampling
        self._has_template = has_template
        self._is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._notes = Console(stderr=True, highlight=False)
        self._num_asked = 0

    def run(self) -> None:
        """Talks until the input ends, or until /exit."""
        if self._is_terminal:
            what = "Write a message" if self._has_template else "Write a text, which the model continues"
            self._note(f"{what}. /help lists the commands.")
        for line in self._typed_lines() if self._is_terminal else _piped_lines():
            if line == "/exit":
                return
            if line.startswith("/") and not line.startswith("//"):
                self._obey(line)
            elif line.strip():
                self._answer(line[1:] if line.startswith("//") else line)

    def _typed_lines(self) -> Iterator[str]:
        """What is typed at the prompt, until Ctrl-D."""
        with suppress(ImportError):  # editing and history, where the system has them
            import readline  # noqa: F401
        while True:
            try:
                yield input("\n> ")
            except EOFError:
                typer.echo()
                return
            except KeyboardInterrupt:
                self._note("\n/exit or Ctrl-D ends the chat.")

    def _obey(self, line: str) -> None:
        command, _, text = line.partition(" ")
        if command == "/help":
            self._note(_COMMANDS)
        elif command == "/reset":
            self._conversation.reset()
            self._note("Everything that was said is forgotten.")
        elif command == "/system" and self._has_template:
            self._conversation.system = text.strip() or None
            self._note("The system message is set." if text.strip() else "There is no system message now.")
        elif command == "/system":
            self._note("Plain text has no system message.")
        else:
            self._note(f"{command} is no command; /help lists them, and // begins a message with /.")

    def _answer(self, text: str) -> None:
        """Asks the model, and shows its answer. Ctrl-C at a terminal ends the answer, and what was shown counts."""
        try:
            ids, num_dropped = self._conversation.ask(text)
        except GenerationError as error:
            self._note(str(error))
            return
        if num_dropped:
            self._note(f"The context is full: the oldest {pluralize(num_dropped, 'turn')} left the conversation.")
        room = min(self._sampling.max_new_tokens, self._conversation.room(ids))
        sampling = replace(self._sampling, seed=self._sampling.seed + self._num_asked, max_new_tokens=room)
        self._num_asked += 1
        shown: list[str] = []
        with closing(self._generator.stream_tokens(ids, sampling)) as stream:
            try:
                self._show_all(stream, shown)
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                self._show("\n")
                self._note("Stopped.")
        self._conversation.answer("".join(shown))

    def _show_all(self, stream: Stream[str, None, Completion], shown: list[str]) -> None:
        """Shows an answer while it is generated, and adds its parts to `shown`."""
        while True:
            try:
                part = next(stream)
            except StopIteration as end:
                self._show("\n")
                if end.value.finish_reason in ("length", "context"):
                    self._note(f"The answer was cut after {pluralize(len(end.value.tokens), 'token')}.")
                return
            shown.append(part)
            self._show(part)

    def _show(self, text: str) -> None:
        typer.echo(printable(text.translate(_SIGNS) if self._is_terminal else text), nl=False)

    def _note(self, text: str) -> None:
        """Shows what is no answer."""
        self._notes.print(text, style="dim", markup=False, soft_wrap=True)


def _piped_lines() -> Iterator[str]:
    """The lines of standard input, which is not a terminal. Raises UserError if one is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input:{number}: is not UTF-8 at byte {error.start}; convert it") from None
