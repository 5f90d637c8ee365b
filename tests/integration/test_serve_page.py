"""The server's page in a real browser, which is skipped where there is none; its files without one."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_v3.inference.chat_template import ChatTemplate
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from helpers.servers import PATIENCE, HeldEngine, RunningServer, chat_tokenizer, running_server, tiny_model

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEY = "correct-horse"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and Chromium")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is found")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as found:
        yield found


@pytest.fixture
def page(browser: Any, server: RunningServer) -> Iterator[Any]:
    """The page, opened. It must neither ask another host nor break its Content-Security-Policy."""
    yield from opened(browser, server)


def opened(browser: Any, server: RunningServer) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.set_default_timeout(PATIENCE * 1000)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(server.url) else problems.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#about:not(:has-text('connecting'))")
    yield page
    page.close()
    assert [problem for problem in problems if "the server responded with a status of" not in problem] == []


def set_greedy(page: Any, max_tokens: int) -> None:
    page.fill("#temperature", "0")
    page.fill("#max_tokens", str(max_tokens))


def answers(page: Any) -> list[str]:
    return page.eval_on_selector_all(".message pre span:last-child", "spans => spans.map(span => span.textContent)")


def test_the_page_asks_nothing_of_other_hosts() -> None:
    folder = Path(__file__).parents[2] / "src/deepseek_v3/inference/server/page"
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert texts.keys() == {"index.html", "page.css", "page.js"}
    for text in texts.values():
        assert not re.search(r"https?://|//[a-z]+\.|@import|innerHTML|\beval\b|\son\w+=|\sstyle=", text)


def test_a_chat_streams_and_is_continued(page: Any) -> None:
    set_greedy(page, 9)
    assert page.text_content("#about") == "512 tokens of context · takes messages and text"
    generator, template = Generator(tiny_model(), chat_tokenizer()), ChatTemplate(chat_tokenizer())
    messages, sampling = [], SamplingConfig(0, max_new_tokens=9)
    for text in ("the cat", "<b>on</b> the mat"):
        page.fill("#prompt", text)
        page.click("#send")
        page.wait_for_selector("#status:has-text('ended: length')")
        messages.append({"role": "user", "content": text})
        [wanted] = generator.continue_tokens([template.prompt(messages)], sampling)
        messages.append({"role": "assistant", "content": wanted.text})
        assert answers(page)[-1] == wanted.text
    assert page.text_content("#status").startswith("9 tokens in ")
    assert page.input_value("#prompt") == ""
    page.click("#clear")
    assert answers(page) == []


def test_text_is_continued_and_stop_ends_it(page: Any, server: RunningServer) -> None:
    page.click("#mode-text")
    set_greedy(page, 500)
    page.fill("#prompt", "the cat")
    engine = HeldEngine(server.service)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#stop:enabled")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:enabled")
    assert page.text_content("#status") == "ended: you stopped it"
    engine.free()
    set_greedy(page, 7)
    page.click("#send")
    page.wait_for_selector("#status:has-text('ended: length')")
    [wanted] = Generator(tiny_model(), chat_tokenizer()).generate(["the cat"], SamplingConfig(0, max_new_tokens=7))
    assert answers(page)[-1] == wanted.text


def test_a_refusal_is_shown_and_the_message_kept(page: Any) -> None:
    page.fill("#max_tokens", "5000")
    page.fill("#prompt", "the cat")
    page.click("#send")
    page.wait_for_selector("#error:visible")
    assert "expected at most 512 with its answer" in page.text_content("#error")
    assert answers(page) == []
    assert page.input_value("#prompt") == "the cat"


def test_the_page_asks_for_a_key(browser: Any) -> None:
    with running_server(key=KEY, with_template=False) as server:
        for page in opened(browser, server):
            assert page.text_content("#about") == "This server asks for an API key."
            page.fill("#key", KEY)
            page.keyboard.press("Tab")
            page.wait_for_selector("#model:has-text('tiny')")
            assert "continues text: it has no chat template" in page.text_content("#about")
            assert not page.is_visible("#modes")
            set_greedy(page, 5)
            page.fill("#prompt", "the cat")
            page.click("#send")
            page.wait_for_selector("#status:has-text('5 tokens in')")
