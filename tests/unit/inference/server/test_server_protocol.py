"""The server's answers over HTTP, against the engine that writes the same texts, and its refusals."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_v3.inference.chat_template import ChatTemplate
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.inference.server.request_bodies import ChatBody, CompletionBody
from helpers.servers import CONTEXT, RunningServer, chat_tokenizer, running_server, tiny_model

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 3}
AS_SAMPLED = SamplingConfig(0.9, 0.95, 50, 1.1, 3, 12, min_p=0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(tiny_model(), chat_tokenizer())


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The objects of a stream, which ends with [DONE]."""
    response = client.post(f"/v1/{path}", json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    *found, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def refusal(
    client: httpx.Client, path: str = "completions", **body: Any
) -> tuple[int, str | None, str | None, str]:
    """Status, field, code and message of a refused request."""
    headers = {"Content-Type": "application/json"}
    response = client.post(f"/v1/{path}", content=json.dumps(body), headers=headers)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return response.status_code, error["param"], error["code"], error["message"]


def test_a_completion_is_the_text_of_the_generator(client: httpx.Client, generator: Generator) -> None:
    [wanted] = generator.generate(["the cat"], AS_SAMPLED)
    found = post(client, "completions", model="tiny", prompt="the cat", max_tokens=12, **SAMPLED)
    assert found["choices"] == [{"index": 0, "text": wanted.text, "logprobs": None, "finish_reason": "length"}]
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}
    assert (found["object"], found["model"]) == ("text_completion", "tiny")
    parts = events(client, "completions", prompt="the cat", max_tokens=12, **SAMPLED)
    assert "".join(part["choices"][0]["text"] for part in parts) == wanted.text
    assert [part["choices"][0]["finish_reason"] for part in parts[-2:]] == [None, "length"]
    assert len({part["id"] for part in parts}) == 1


def test_prompts_and_choices_are_numbered_as_by_generate(client: httpx.Client, generator: Generator) -> None:
    """The answers of several prompts with one choice each are those of a file of prompts."""
    prompts = ["the cat", "ü", "", "\n"]
    wanted = [each.text for each in generator.generate(prompts, AS_SAMPLED)]
    found = post(client, "completions", prompt=prompts, max_tokens=12, **SAMPLED)
    assert [choice["text"] for choice in found["choices"]] == wanted
    two = post(client, "completions", prompt=["the cat"], n=2, max_tokens=12, **SAMPLED)
    assert [choice["index"] for choice in two["choices"]] == [0, 1]
    assert two["choices"][0]["text"] == wanted[0] != two["choices"][1]["text"]
    assert two["usage"] == {"prompt_tokens": 2, "completion_tokens": 24, "total_tokens": 26}
    parts = events(client, "completions", prompt="the cat", n=2, max_tokens=12, **SAMPLED)
    for index in (0, 1):
        choices = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in choices) == two["choices"][index]["text"]


def test_prompts_may_be_ids(client: httpx.Client, generator: Generator) -> None:
    ids = [chat_tokenizer().encode("the cat"), [5, 6, 7]]
    greedy = SamplingConfig(0, max_new_tokens=5)
    wanted = [each.text for each in generator.continue_tokens(ids, greedy)]
    found = post(client, "completions", prompt=ids, max_tokens=5, temperature=0)
    assert [choice["text"] for choice in found["choices"]] == wanted
    assert (
        post(client, "completions", prompt=ids[1], max_tokens=5, temperature=0)["choices"][0]["text"] == wanted[1]
    )


def test_a_chat_continues_its_template(client: httpx.Client, generator: Generator) -> None:
    ids = ChatTemplate(chat_tokenizer()).prompt(MESSAGES)
    [wanted] = generator.continue_tokens([ids], SamplingConfig(0, max_new_tokens=9))
    body = {"messages": MESSAGES, "max_completion_tokens": 9, "temperature": 0}
    found = post(client, "chat/completions", **body)
    message = {"role": "assistant", "content": wanted.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    assert found["choices"] == [choice]
    assert found["usage"]["prompt_tokens"] == len(ids)
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": " cat"}]
    same = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    assert post(client, "chat/completions", **{**body, "messages": same})["choices"] == [choice]
    first, *rest = events(client, "chat/completions", **body, stream_options={"include_usage": True})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["object"] == "chat.completion.chunk"
    *deltas, last = rest
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in deltas) == wanted.text
    assert deltas[-1]["choices"][0]["finish_reason"] == "length"
    assert (last["choices"], last["usage"]) == ([], found["usage"])


def test_a_chat_may_fill_the_context(client: httpx.Client) -> None:
    found = post(client, "chat/completions", messages=MESSAGES, temperature=0)
    assert found["usage"]["total_tokens"] == CONTEXT
    assert found["choices"][0]["finish_reason"] == "length"


def test_a_completion_has_sixteen_tokens_by_default(client: httpx.Client) -> None:
    assert post(client, "completions", prompt="a", temperature=0)["usage"]["completion_tokens"] == 16


def test_stop_strings_end_the_text_before_them(client: httpx.Client, generator: Generator) -> None:
    [whole] = generator.generate(["the cat"], SamplingConfig(0, max_new_tokens=20))
    stop = whole.text[6:8]
    before = whole.text[: whole.text.index(stop)]
    for stops in (stop, ["zzzz", stop]):
        body = {"prompt": "the cat", "max_tokens": 20, "temperature": 0, "stop": stops}
        choice = post(client, "completions", **body)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (before, "stop")
        assert "".join(part["choices"][0]["text"] for part in events(client, "completions", **body)) == before


def test_echo_repeats_the_prompt(client: httpx.Client) -> None:
    body = {"prompt": ["the cat", "ü"], "max_tokens": 4, "temperature": 0}
    plain = [choice["text"] for choice in post(client, "completions", **body)["choices"]]
    echoed = [choice["text"] for choice in post(client, "completions", **body, echo=True)["choices"]]
    assert echoed == [prompt + text for prompt, text in zip(body["prompt"], plain, strict=True)]
    parts = events(client, "completions", **{**body, "prompt": "ü"}, echo=True)
    assert "".join(part["choices"][0]["text"] for part in parts) == echoed[1]
    assert refusal(client, prompt="a", echo=True, logprobs=1)[0] == 400


def test_log_probabilities_are_those_of_the_generator(client: httpx.Client, generator: Generator) -> None:
    [wanted] = generator.generate(["the cat"], SamplingConfig(0, max_new_tokens=6, logprobs=2))
    assert wanted.logprobs is not None
    body = {"prompt": "the cat", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    found = post(client, "completions", **body)["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [each.logprob for each in wanted.logprobs]
    assert [[*each.values()] for each in found["top_logprobs"]] == [
        [value for _, value in each.top] for each in wanted.logprobs
    ]
    shown = [chat_tokenizer().decode([id_]) for id_ in wanted.tokens]
    assert all(one == two or one.startswith("bytes:\\x") for one, two in zip(found["tokens"], shown, strict=True))
    assert found["text_offset"] == [len("".join(shown[:place])) for place in range(6)]
    parts = [part["choices"][0]["logprobs"] for part in events(client, "completions", **body)]
    assert {key: [each for part in parts for each in part[key]] for key in found} == found


def test_log_probabilities_of_a_chat_have_bytes(client: httpx.Client, generator: Generator) -> None:
    ids = ChatTemplate(chat_tokenizer()).prompt(MESSAGES)
    [wanted] = generator.continue_tokens([ids], SamplingConfig(0, max_new_tokens=9, logprobs=3))
    assert wanted.logprobs is not None
    body = {"messages": MESSAGES, "max_tokens": 9, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    content = post(client, "chat/completions", **body)["choices"][0]["logprobs"]["content"]
    assert [each["logprob"] for each in content] == [each.logprob for each in wanted.logprobs]
    assert bytes(byte for each in content for byte in each["bytes"]).decode(errors="replace") == wanted.text
    assert [len(each["top_logprobs"]) for each in content] == [3] * 9
    assert all(each["top_logprobs"][0]["bytes"] == each["bytes"] for each in content)
    parts = events(client, "chat/completions", **body)
    assert [
        each for part in parts for each in (part["choices"][0]["logprobs"] or {"content": []})["content"]
    ] == content
    plain = post(client, "chat/completions", **{**body, "top_logprobs": None})["choices"][0]["logprobs"]["content"]
    assert [each["top_logprobs"] for each in plain] == [[]] * 9


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None},
        {"user": "me", "metadata": {"a": "b"}, "top_k": -1, "stop": None, "stream_options": None, "unknown": None},
    ],
)
def test_fields_that_change_nothing_are_taken(client: httpx.Client, fields: dict[str, Any]) -> None:
    body = {"prompt": "the", "temperature": 0}
    assert (
        post(client, "completions", **body, **fields)["choices"] == post(client, "completions", **body)["choices"]
    )


REFUSED = {
    "unknown": ({"foo": 1}, "foo", "unknown_parameter", "is unknown or not supported"),
    "unsupported": ({"frequency_penalty": 0.5}, "frequency_penalty", "unknown_parameter", "not supported"),
    "nested": ({"stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter", "is unknown"),
    "temperature": ({"temperature": -1}, "temperature", "invalid_value", "expected 0, or from 1e-6"),
    "text for a number": ({"temperature": "hot"}, "temperature", "invalid_value", "valid number"),
    "top_p": ({"top_p": 0}, "top_p", "invalid_value", "above 0 and at most 1"),
    "n": ({"n": 0}, "n", "invalid_value", "greater than or equal to 1"),
    "empty stop": ({"stop": ""}, "stop", "invalid_value", "at least 1 character"),
    "number for a flag": ({"stream": 1}, "stream", "invalid_value", "valid boolean"),
    "logprobs": ({"logprobs": 21}, "logprobs", "invalid_value", "less than or equal to 20"),
    "context": ({"max_tokens": CONTEXT}, None, "context_length_exceeded", "has 1 token and the answer up to 512"),
    "no prompt": ({"prompt": None}, "prompt", "invalid_value", "Field required"),
    "no prompts": ({"prompt": []}, "prompt", "invalid_value", "expected a text or ids"),
    "unknown id": ({"prompt": [5, 10**6]}, "prompt", "invalid_value", "ids from 0 to 302"),
    "no id": ({"prompt": [[5], []]}, "prompt", "invalid_value", "one or more ids"),
    "too many": ({"prompt": ["a"] * 200, "n": 2}, "n", "invalid_value", "400 completions are asked for"),
    "surrogate": ({"prompt": "\ud800"}, "prompt", "invalid_value", "lone surrogate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_parameter_is_named(client: httpx.Client, name: str) -> None:
    fields, param, code, message = REFUSED[name]
    found = refusal(client, **{"prompt": "a", **fields})
    assert found[:3] == (400, param, code)
    assert message in found[3]


def test_a_long_prompt_is_refused_with_its_length(client: httpx.Client) -> None:
    status, _, code, message = refusal(client, prompt=[5] * CONTEXT, max_tokens=1)
    assert (status, code) == (400, "context_length_exceeded")
    assert f"the prompt has {CONTEXT} tokens" in message
    status, _, code, _ = refusal(client, "chat/completions", messages=[{"role": "user", "content": "ab " * 999}])
    assert (status, code) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role: Input should be 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content: "),
        ({"tools": [{"type": "function"}]}, "tools: is unknown or not supported"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "expected one of the two"),
        ({"top_logprobs": 1}, "top_logprobs needs logprobs"),
        ({"prompt": "a"}, "prompt: is unknown or not supported"),
    ],
)
def test_a_wrong_chat_is_refused(client: httpx.Client, fields: dict[str, Any], message: str) -> None:
    status, _, _, found = refusal(client, "chat/completions", **{"messages": MESSAGES, **fields})
    assert status == 400
    assert message in found


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"\xff",
        b"[" * 100_000,
        b'{"n": ' + b"1" * 5000 + b"}",
        b'{"prompt": "a", "top_p": NaN}',
    ],
    ids=["empty", "cut", "list", "number", "not UTF-8", "deep", "digits", "NaN"],
)
def test_a_body_that_is_no_object_is_refused(client: httpx.Client, body: bytes) -> None:
    response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


LEAVES = (
    st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from([0.5, -1.5, 10**30, "", "a", "\x00", "text"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner)
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_body_makes_the_server_fail(client: httpx.Client, data: st.DataObject) -> None:
    """Any values in the fields that exist, and in one that does not, are answered or refused by name."""
    path, kind = data.draw(st.sampled_from([("completions", CompletionBody), ("chat/completions", ChatBody)]))
    fields = data.draw(st.lists(st.sampled_from([*kind.model_fields, "frequency_penalty", "x"]), unique=True))
    given_fields = {field: data.draw(VALUES) for field in fields}
    right = {"prompt": "a"} if kind is CompletionBody else {"messages": MESSAGES}
    body = {**(right if data.draw(st.booleans()) else {}), "max_tokens": 2, **given_fields}
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


def test_other_models_paths_and_methods_are_unknown(client: httpx.Client) -> None:
    assert refusal(client, model="gpt-4", prompt="a")[:3] == (404, "model", "model_not_found")
    for method, path, status in [
        ("GET", "/v1/models/gpt-4", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/", 405),
        ("GET", "/health/", 404),
    ]:
        response = client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_the_model_is_listed(client: httpx.Client) -> None:
    [card] = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/tiny").json() == card
    assert (card["id"], card["max_model_len"], card["has_chat_template"]) == ("tiny", CONTEXT, True)


def test_without_a_template_a_chat_is_refused() -> None:
    with running_server(with_template=False) as server, server.client() as client:
        status, _, code, message = refusal(client, "chat/completions", messages=MESSAGES)
        assert (status, code) == (400, "no_chat_template")
        assert "use /v1/completions" in message
        assert not client.get("/v1/models").json()["data"][0]["has_chat_template"]


def test_a_template_that_refuses_messages_is_told(server: RunningServer, client: httpx.Client) -> None:
    model = server.service.model
    strict = ChatTemplate(model.tokenizer, "{{ raise_exception('roles must alternate') }}")
    server.service.model = replace(model, template=strict)
    try:
        status, _, _, message = refusal(client, "chat/completions", messages=MESSAGES)
    finally:
        server.service.model = model
    assert (status, message) == (400, "the chat template refuses the messages: roles must alternate")
    assert server.service.num_open == 0


def test_the_schema_describes_the_bodies(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics"} <= schema[
        "paths"
    ].keys()
    assert "min_p" in schema["components"]["schemas"]["CompletionBody"]["properties"]
    assert "422" not in json.dumps(schema["paths"])
