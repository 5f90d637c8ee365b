"""`dsv3 chat` with piped lines and at a terminal: answers, commands, the context's limit, and Ctrl-C."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deepseek_v3.cli import app
from deepseek_v3.inference import chat_session
from deepseek_v3.inference.chat import encode_plainly
from deepseek_v3.inference.chat_session import ChatSession
from deepseek_v3.inference.chat_template import ChatTemplate
from deepseek_v3.inference.conversation import Conversation
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.utils.errors import GenerationError, UserError
from helpers.servers import CONTEXT, chat_tokenizer, save_tiny_model, tiny_model

GREEDY = SamplingConfig(0, max_new_tokens=7)
OPTIONS = ["--device", "cpu", "--max-new-tokens", "7", "--temperature", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(tiny_model(), chat_tokenizer())


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(chat_tokenizer())


def run(folder: Path, lines: str | bytes, *options: object) -> Result:
    words = ["chat", "--checkpoint", str(folder), *OPTIONS, *map(str, options)]
    return CliRunner().invoke(app, words, input=lines)


def talk(generator: Generator, template: ChatTemplate, texts: list[str], system: str | None = None) -> list[str]:
    """The answers to some messages, one after the other."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        answers.append(generator.continue_tokens([template.prompt(messages)], GREEDY)[0].text)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_piped_lines_are_answered(folder: Path, generator: Generator, template: ChatTemplate) -> None:
    result = run(folder, "the cat\n\n//the mat\r\nü", "--system", "be brief")
    assert result.exit_code == 0, result.output
    wanted = talk(generator, template, ["the cat", "/the mat", "ü"], "be brief")
    assert result.stdout == "".join(f"{answer}\n" for answer in wanted)
    assert f"Next:\n  dsv3 serve --checkpoint {folder} --device cpu\n" in result.stderr
    assert "The answer was cut after 7 tokens." in result.stderr


def test_commands_change_the_conversation(folder: Path, generator: Generator, template: ChatTemplate) -> None:
    lines = [
        "the cat",
        "/reset",
        "the cat",
        "/system be brief",
        "/reset",
        "the cat",
        "/system",
        "/reset",
        "the cat",
    ]
    result = run(folder, "\n".join([*lines, "/help", "/what", "/exit", "never read"]))
    [plain], [brief] = talk(generator, template, ["the cat"]), talk(generator, template, ["the cat"], "be brief")
    assert result.stdout == "".join(f"{answer}\n" for answer in (plain, plain, brief, plain))
    assert "/system TEXT" in result.stderr
    assert "/what is no command" in result.stderr


def test_without_a_template_there_is_plain_text(folder: Path, generator: Generator, tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path, with_template=False)
    refused = run(plain, "the cat")
    assert isinstance(refused.exception, UserError)
    assert "has no chat template, so it only continues text; add --plain" in str(refused.exception)
    first = generator.generate(["the cat"], GREEDY)[0].text
    second = generator.generate([f"the cat{first}\nü"], GREEDY)[0].text
    result = run(plain, "the cat\n/system x\nü", "--plain")
    assert result.stdout == f"{first}\n{second}\n"
    assert "Plain text has no system message." in result.stderr
    assert isinstance(run(plain, "", "--plain", "--system", "x").exception, UserError)


def test_a_template_may_come_from_a_file(generator: Generator, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, with_template=False)
    (tmp_path / "t.jinja").write_text("{{ messages[-1].content }}ü")
    result = run(folder, "the cat", "--chat-template", tmp_path / "t.jinja")
    ids = chat_tokenizer().encode("the catü")
    assert result.stdout == generator.continue_tokens([ids], GREEDY)[0].text + "\n"
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    assert "t.jinja" in str(run(folder, "", "--chat-template", tmp_path / "t.jinja").exception)


def test_input_that_is_not_utf8_is_named(folder: Path) -> None:
    result = run(folder, b"the cat\n\xff\n")
    assert isinstance(result.exception, UserError)
    assert "standard input:2: is not UTF-8" in str(result.exception)


def test_oldest_turns_leave_a_full_context(template: ChatTemplate) -> None:
    conversation = Conversation(template.prompt, context=60, reserved=20)
    conversation.system = "ab"
    dropped = []
    for number in range(5):
        ids, num_dropped = conversation.ask(str(number) * 10)
        dropped.append(num_dropped)
        assert len(ids) + 20 <= 60
        assert conversation.room(ids) >= 20
        assert chat_tokenizer().decode(ids).startswith("<|begin|>ab<|User|>")
        conversation.answer("ok")
    assert dropped == [0, 0, 1, 1, 1]
    with pytest.raises(GenerationError, match="prompt of 65 tokens, expected at most 40"):
        conversation.ask("?" * 60)
    assert "4444444444" in chat_tokenizer().decode(conversation.ask("hm")[0])


def test_a_long_message_is_refused_and_the_chat_goes_on(
    folder: Path, generator: Generator, template: ChatTemplate
) -> None:
    result = run(folder, "?" * 600 + "\nthe cat")
    assert result.stdout == talk(generator, template, ["the cat"])[0] + "\n"
    assert f"expected at most {CONTEXT - 7} of the context of {CONTEXT}" in result.stderr
    full = run(folder, "\n".join(["?" * 200] * 3))
    assert "The context is full: the oldest 1 turn left the conversation." in full.stderr


class Terminal:
    """Stands in for standard input and output that are a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a session at a terminal shows on standard output."""
    texts: list[str] = []
    monkeypatch.setattr(chat_session.sys, "stdin", Terminal())
    monkeypatch.setattr(chat_session.typer, "echo", lambda text="", **_: texts.append(text))
    return texts


def session(
    monkeypatch: pytest.MonkeyPatch, generator: Generator, conversation: Conversation, typed: list[str | type]
) -> ChatSession:
    """A session at a terminal at which these lines are typed, or these errors raised."""
    events: Iterator[str | type] = iter([*typed, EOFError])

    def read(_: str) -> str:
        event = next(events)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("builtins.input", read)
    found = ChatSession(generator, conversation, GREEDY, has_template=True)
    found._is_terminal = True
    return found


def test_ctrl_c_stops_the_answer_alone(
    monkeypatch: pytest.MonkeyPatch,
    shown: list[str],
    generator: Generator,
    template: ChatTemplate,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pools, new_pool = [], generator.kv_cache.new_pool
    monkeypatch.setattr(generator.kv_cache, "new_pool", lambda size: pools.append(new_pool(size)) or pools[-1])
    conversation = Conversation(template.prompt, CONTEXT, 7)
    found = session(monkeypatch, generator, conversation, [KeyboardInterrupt, "the cat", "the mat"])
    show, interrupted = found._show, []

    def show_or_interrupt(text: str) -> None:
        show(text)
        if not interrupted and text.strip():
            interrupted.append(text)
            raise KeyboardInterrupt

    monkeypatch.setattr(found, "_show", show_or_interrupt)
    found.run()
    [(_, first), *_] = [(each["role"], each["content"]) for each in conversation._messages[1:]]
    assert [first] == interrupted
    assert [pool.num_free for pool in pools] == [pool.num_pages for pool in pools]
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": first}]
    ids = template.prompt([*messages, {"role": "user", "content": "the mat"}])
    assert conversation._messages[-1]["content"] == generator.continue_tokens([ids], GREEDY)[0].text
    notes = capsys.readouterr().err
    assert "/exit or Ctrl-D ends the chat." in notes
    assert "Stopped." in notes


def test_a_terminal_is_not_controlled_by_an_answer(
    monkeypatch: pytest.MonkeyPatch, shown: list[str], generator: Generator, template: ChatTemplate
) -> None:
    found = session(monkeypatch, generator, Conversation(template.prompt, CONTEXT, 7), [])
    found._show("a\x1b[31m\n\tb\x07\x9b")
    assert shown == ["a\u241b[31m\n\tb\u2407\ufffd"]


def test_lines_of_plain_text_begin_lines(generator: Generator) -> None:
    messages = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d\n"), ("user", "e")]
    ids = encode_plainly(generator, [{"role": role, "content": text} for role, text in messages])
    assert chat_tokenizer().decode(ids) == "ab\ncd\ne"
