"""`dsv3 serve` as a command: its process from start to signal, OpenAI's own client, and mistakes in one line."""

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from deepseek_v3.inference.server.command import KEY_VARIABLE, read_key, serve
from deepseek_v3.utils.command_line import run_app
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.optional import OPTIONAL_LIBRARIES
from helpers import fork_server
from helpers.jobs import HANGS, write_output_to
from helpers.runs import dsv3, message_of
from helpers.servers import PATIENCE, running_server, save_tiny_model

KEY = "correct-horse"
QUICK = ["--device", "cpu", "--port", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("serve"))


def run_serve(folder: Path, printed: Path) -> None:
    """Runs the command in this process, which has been forked."""
    write_output_to(printed)
    os.environ[KEY_VARIABLE] = KEY
    app = typer.Typer()
    app.command()(serve)
    run_app(lambda: app(["--checkpoint", str(folder), *QUICK, "--stop-seconds", "20"]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_the_command_prints_works_until_a_signal(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The curl line is run as it stands, and a second request is open when the signal comes."""
    if shutil.which("curl") is None:
        pytest.skip("curl, whose line the command prints, is not installed")
    printed = tmp_path / "output.txt"
    process = fork_server.CONTEXT.Process(target=run_serve, args=(folder, printed), daemon=True)
    process.start()
    end = time.monotonic() + HANGS
    while process.is_alive() and not (printed.exists() and "  curl " in printed.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    output = printed.read_text(encoding="utf-8")
    [address] = re.findall(r"Next:\n  open (http://127\.0\.0\.1:\d+)/ in a browser\n  curl ", output)
    [line] = re.findall(r"^  (curl .*)$", output, re.MULTILINE)
    assert KEY not in output
    environment = {**os.environ, KEY_VARIABLE: KEY}
    answer = subprocess.run(["sh", "-c", line], env=environment, capture_output=True, text=True, timeout=HANGS)
    assert answer.stdout.endswith("data: [DONE]\n\n"), (line, answer)
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": "a", "max_tokens": 500, "temperature": 0, "stream": True}
    with httpx.stream(
        "POST", f"{address}/v1/completions", json=body, headers=headers, timeout=PATIENCE
    ) as response:
        os.kill(process.pid or 0, number)
        assert response.read().endswith(b"data: [DONE]\n\n")
    process.join(HANGS)
    output = printed.read_text(encoding="utf-8")
    assert process.exitcode == 0, output
    assert f"{number.name}: open answers may take 20 s; once more to stop at once" in output
    assert output.endswith("[Server] stopped in order\n")


def test_mistakes_end_in_one_line(folder: Path, tmp_path: Path) -> None:
    def refusal(*words: object, checkpoint: Path = folder) -> str:
        return message_of(dsv3("serve", "--checkpoint", checkpoint, *QUICK, *words))

    with closing(socket.create_server(("127.0.0.1", 0))) as used:
        port = used.getsockname()[1]
        assert f"--port {port}: Address already in use; choose another port" in refusal("--port", port)
    assert "--host nowhere.invalid" in refusal("--host", "nowhere.invalid")
    small = refusal("--cache-tokens", 100)
    assert "--cache-tokens gives room for 128 tokens in the cache, fewer than one text of 512 needs" in small
    assert "--context 128" in small
    assert "--context 513: expected at most the model's" in refusal("--context", 513)
    assert "there is no such file" in refusal(checkpoint=tmp_path / "nothing")
    assert "two" in refusal("--api-key", "a", "--api-key-file", folder / "config.json")
    (tmp_path / "t.jinja").write_text("{% for")
    assert "the chat template is not valid" in refusal("--chat-template", tmp_path / "t.jinja")
    bare = save_tiny_model(tmp_path)
    (bare / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(checkpoint=bare)


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_v3.inference.server.command.is_installed", lambda name: name != "uvicorn")
    message = message_of(dsv3("serve", "--checkpoint", folder, *QUICK))
    assert message == "dsv3 serve needs uvicorn; run `pip install 'deepseek_v3[serve]'`"
    assert {OPTIONAL_LIBRARIES[name] for name in ("fastapi", "starlette", "uvicorn")} == {"serve"}


def test_the_key_comes_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(" from-file \n")
    file.chmod(stat.S_IRUSR)
    assert read_key(None, None) is None
    monkeypatch.setenv(KEY_VARIABLE, "from-variable")
    assert read_key(None, None) == "from-variable"
    assert read_key(None, file) == "from-file"
    assert read_key("from-option", None) == "from-option"
    for bad in ("", "two words", "ü"):
        with pytest.raises(ConfigError, match="the API key is empty or holds other than"):
            read_key(bad, None)


@pytest.fixture(scope="module")
def openai_client() -> Iterator[Any]:
    """OpenAI's own client, of a server that asks for a key."""
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    with (
        running_server(key=KEY) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


def test_openai_s_client_gets_the_text_of_generate(openai_client: Any, folder: Path) -> None:
    """The same greedy text as `dsv3 generate`, whole and streamed, with all that the client reads."""
    result = dsv3(
        *("generate", "--checkpoint", folder, "--prompt", "the cat", "--temperature", "0"),
        *("--max-new-tokens", "12", "--device", "cpu"),
    )
    wanted = result.stdout.removesuffix("\n")
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 12, "temperature": 0}
    whole = openai_client.completions.create(**body)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (wanted, "length")
    stream = openai_client.completions.create(**body, stream=True, stream_options={"include_usage": True})
    *parts, last = list(stream)
    assert "".join(part.choices[0].text for part in parts) == wanted
    assert last.usage == whole.usage


def test_openai_s_client_talks(openai_client: Any) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "temperature": 0}
    more = {"max_completion_tokens": 8, "logprobs": True, "top_logprobs": 2, "n": 2, "extra_body": {"min_p": 0.1}}
    whole = openai_client.chat.completions.create(**body, **more)
    texts = [choice.message.content for choice in whole.choices]
    assert texts[0] == texts[1]
    assert len(whole.choices[0].logprobs.content) == 8
    stream = openai_client.chat.completions.create(**body, **more, stream=True)
    streamed = ["", ""]
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_openai_s_client_knows_the_errors(openai_client: Any) -> None:
    import openai

    body = {"model": "tiny", "prompt": "a"}
    assert [model.id for model in openai_client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="foo: is unknown or not supported") as refused:
        openai_client.completions.create(**body, extra_body={"foo": 1})
    assert (refused.value.param, refused.value.code) == ("foo", "unknown_parameter")
    with pytest.raises(openai.NotFoundError, match="model gpt-4 is not served here"):
        openai_client.completions.create(**{**body, "model": "gpt-4"})
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        openai_client.with_options(api_key="wrong").completions.create(**body)
    with pytest.raises(openai.BadRequestError, match="expected at most 512"):
        openai_client.completions.create(**body, max_tokens=512)
