import json
import os
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from deepseek_v3.config.loading import config_from_dict
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference import generate as command
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.interop.load_model import load_model
from deepseek_v3.model.pretrained import model_entries
from deepseek_v3.utils.checkpointing.directory import load_checkpoint, save_checkpoint
from deepseek_v3.utils.errors import GenerationError, UserError
from helpers.models import small_config, small_model

SAMPLING = SamplingConfig(temperature=0, max_new_tokens=6)
OPTIONS = ["--temperature", "0", "--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with random weights, alone in its folder."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["the cat sat on the mat\n", "return the cat\n"] * 3, vocab_size=280)
    sizes = {"max_position_embeddings": 32, "num_nextn_predict_layers": 1}
    model = small_config(vocab_size=tokenizer.vocab_size, **sizes)
    training = {
        "total_tokens": 1000,
        "sequence_length": 16,
        "global_batch_size": 1,
        "optimizer": {"learning_rate": 0.001},
    }
    sections = {
        "model": model.model_dump(),
        "training": training,
        "data": {"path": "x"},
        "logging": {"directory": "x"},
    }
    config = config_from_dict(sections, "test")
    state = model_entries(small_model(config.model).state_dict(), config, tokenizer)
    path = tmp_path_factory.mktemp("checkpoints") / "checkpoint_step_7.pt"
    save_checkpoint(path, {**state, "step": 7, "tokens": 112})
    return path


@pytest.fixture(scope="module")
def engine(checkpoint):
    saved = load_model(checkpoint, torch.device("cpu"))
    return Generator(saved.model, saved.tokenizer)


def run(checkpoint, *arguments):
    app = typer.Typer()
    app.command("generate")(command.generate)
    return CliRunner().invoke(app, ["--checkpoint", str(checkpoint), *OPTIONS, *map(str, arguments)])


def refusal(checkpoint, *arguments):
    """The message of the error that ends the command."""
    result = run(checkpoint, *arguments)
    assert isinstance(result.exception, UserError), result.exception
    assert result.stdout == ""
    return str(result.exception)


def test_a_checkpoint_whose_tokenizer_is_none_is_named(checkpoint, tmp_path):
    path = tmp_path / "checkpoint_step_7.pt"
    save_checkpoint(path, {**load_checkpoint(checkpoint), "tokenizer": "{}"})
    message = refusal(path, "--prompt", "a")
    assert message.startswith(f"{path}: its tokenizer: is not a tokenizer of the tokenizers library")


@pytest.mark.parametrize("speculate", [1, 2])
def test_drafts_change_no_greedy_text_and_are_counted(checkpoint, engine, speculate):
    result = run(checkpoint, "--prompt", "the cat", "--speculate", speculate)
    [completion] = engine.generate(["the cat"], SAMPLING)
    assert result.exit_code == 0, result.output
    assert result.stdout == completion.text + "\n"
    assert re.search(r"by length; \d\.\d\d tokens per step, \d+%( and \d+%)? of drafts accepted\n", result.stderr)


def test_without_the_cache_nothing_is_drafted(checkpoint):
    message = refusal(checkpoint, "--prompt", "a", "--no-cache", "--speculate", 1)
    assert message == "found --no-cache and --speculate 1, expected one of the two"


def test_a_prompt_is_continued_as_by_the_engine(checkpoint, engine):
    result = run(checkpoint, "--prompt", "the cat")
    [completion] = engine.generate(["the cat"], SAMPLING)
    assert result.exit_code == 0, result.output
    assert result.stdout == completion.text + "\n"
    assert "[Cache] latent cache in float32: 288 bytes per token; " in result.stderr
    assert "\n6 tokens in " in result.stderr
    assert " tokens/s; ended 1 by length\nNext:\n  dsv3 eval --checkpoint " in result.stderr


@pytest.mark.parametrize(("new_tokens", "longest"), [(12, None), (14, 17), (99, 32)])
def test_texts_longer_than_any_trained_on_are_named(checkpoint, caplog, new_tokens, longest):
    """The model was trained on sequences of 16 tokens and has positions for 32; the prompt has 3 tokens."""
    tokenizer = load_model(checkpoint, torch.device("cpu")).tokenizer
    prompt = tokenizer.decode([10, 11, 12])
    assert len(tokenizer.encode(prompt)) == 3
    result = run(checkpoint, "--prompt", prompt, "--max-new-tokens", new_tokens)
    assert result.exit_code == 0, result.output
    expected = f"may reach {longest} tokens, and the model was trained on sequences of 16"
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [expected in line for line in warnings] == ([] if longest is None else [True])
    assert "may reach" not in result.stdout


def test_every_option_reaches_the_engine(checkpoint, engine):
    arguments = "--temperature 1.5 --top-p 0.9 --top-k 40 --repetition-penalty 1.2 --seed 3 --max-new-tokens 9"
    arguments += " --min-p 0.01 --precision fp32"
    result = run(checkpoint, "--prompt", "the", *arguments.split(), "--stop", "t", "--stop", "e", "--no-cache")
    sampling = SamplingConfig(1.5, 0.9, 40, 1.2, 3, 9, ("t", "e"), min_p=0.01)
    assert result.stdout == engine.generate(["the"], sampling)[0].text + "\n"


def test_no_cache_recomputes(checkpoint, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a cache was made")

    monkeypatch.setattr("deepseek_v3.inference.kv_cache.PagePool", refuse)
    assert run(checkpoint, "--prompt", "the", "--no-cache").exit_code == 0
    assert run(checkpoint, "--prompt", "the").exit_code == 1


def test_the_format_of_the_cache_can_be_chosen(checkpoint):
    result = run(checkpoint, "--prompt", "the", "--kv", "bf16")
    assert result.exit_code == 0, result.output
    assert "latent cache in bfloat16: 144 bytes per token; " in result.stderr
    assert "kv_lora_rank = 16, expected a multiple of 128" in refusal(checkpoint, "--prompt", "a", "--kv", "fp8")
    assert "found --no-cache and --kv" in refusal(checkpoint, "--prompt", "a", "--kv", "bf16", "--no-cache")


def test_a_terminal_shows_the_prompt_in_front(checkpoint, engine, monkeypatch):
    monkeypatch.setattr(command.sys, "stdout", FakeTerminal())
    generator, shown = engine, []
    monkeypatch.setattr(command.typer, "secho", lambda text, **style: shown.append((text, style)))
    monkeypatch.setattr(command.typer, "echo", lambda text="", **_: shown.append(text))
    command._stream(generator, "the cat", SAMPLING, use_cache=True)
    assert shown[0] == ("the cat", {"dim": True, "nl": False})
    assert "".join(shown[1:]) == engine.generate(["the cat"], SAMPLING)[0].text


class FakeTerminal:
    def isatty(self):
        return True


def test_the_newest_good_checkpoint_of_a_folder_is_taken(checkpoint, tmp_path):
    (tmp_path / "checkpoint_step_7.pt").write_bytes(checkpoint.read_bytes())
    (tmp_path / "checkpoint_step_9.pt").write_bytes(checkpoint.read_bytes()[:-100])
    assert run(tmp_path, "--prompt", "the").stdout == run(checkpoint, "--prompt", "the").stdout


PROMPTS = ["the cat", "mat", " sat on"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "\ufeffthe cat\r\n\n  \nmat\n sat on"),
        ("prompts.jsonl", "".join(json.dumps({"prompt": prompt, "id": 1}) + "\n\n" for prompt in PROMPTS)),
    ],
)
def test_a_file_of_prompts(checkpoint, engine, tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    output = tmp_path / "new" / "out.jsonl"
    result = run(checkpoint, "--prompts-file", tmp_path / name, "--output", output)
    assert result.exit_code == 0, result.output
    completions = engine.generate(PROMPTS, SAMPLING)
    assert result.stdout == "".join(f"{prompt}{c.text}\n\n" for prompt, c in zip(PROMPTS, completions, strict=True))
    records = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert records == [
        {"prompt": c.prompt, "text": c.text, "tokens": list(c.tokens), "finish_reason": c.finish_reason}
        for c in completions
    ]


def test_log_probabilities_are_written_beside_the_tokens(checkpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    assert run(checkpoint, "--prompt", "the", "--logprobs", "2", "--output", output).exit_code == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    for token, found in zip(record["tokens"], record["logprobs"], strict=True):
        assert [token, found["logprob"]] == found["top"][0]  # the text is greedy
        assert len(found["top"]) == 2
    assert "found --logprobs without --output" in refusal(checkpoint, "--prompt", "a", "--logprobs", "2")


def test_a_prompt_may_be_empty(checkpoint, engine, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": ""}\n')
    text = engine.generate([""], SAMPLING)[0].text
    assert run(checkpoint, "--prompt", "").stdout == f"{text}\n"
    assert run(checkpoint, "--prompts-file", tmp_path / "p.jsonl").stdout == f"{text}\n\n"


def test_one_of_prompt_and_prompts_file_is_needed(checkpoint, tmp_path):
    assert "found neither of --prompt" in refusal(checkpoint)
    assert "found both of --prompt" in refusal(checkpoint, "--prompt", "a", "--prompts-file", tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.txt", b"caf\xe9\n", "not UTF-8 at byte 3"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "p.jsonl:2: is not JSON"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl:1: is not JSON"),
        ("p.jsonl", b'{"text": "a"}\n', 'p.jsonl:1: holds {"text": "a"}, expected {"prompt": "text"}'),
        ("p.jsonl", b'\n{"prompt": 3}\n', 'p.jsonl:2: holds {"prompt": 3}, expected'),
        ("p.jsonl", b'"prompt"\n', 'p.jsonl:1: holds "prompt", expected'),
        ("p.jsonl", b'{"prompt": "\\ud800"}\n', "surrogate"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(checkpoint, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refusal(checkpoint, "--prompts-file", tmp_path / name)


def test_a_missing_file_of_prompts_is_refused(checkpoint, tmp_path):
    assert "cannot be read: No such file" in refusal(checkpoint, "--prompts-file", tmp_path / "p.txt")


def test_what_is_no_file_of_prompts_is_refused_at_once(checkpoint, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "long").write_bytes(b"a" * 101)
    monkeypatch.setattr(command, "_MOST_PROMPT_BYTES", 100)
    for file, reason in {
        "/dev/zero": "is a device, expected a file of prompts",
        str(tmp_path): "is a folder, expected a file of prompts",
        str(tmp_path / "pipe"): "is a pipe, expected a file of prompts",
        str(tmp_path / "long"): "has more than 100 bytes, expected a file of prompts",
        str(tmp_path / "empty"): "holds no prompts",
        f"{tmp_path}/{'a' * 300}": "cannot be read: File name too long",
    }.items():
        assert reason in refusal(checkpoint, "--prompts-file", file), file


def test_an_output_that_exists_is_left_as_it_is(checkpoint, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    assert "exists and is left as it is" in refusal(checkpoint, "--prompt", "a", "--output", output)
    assert output.read_text() == "mine"


def test_an_output_that_cannot_be_written_is_reported(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(checkpoint, "--prompt", "a", "--output", tmp_path / "file" / "out.jsonl")
    assert isinstance(result.exception, GenerationError)
    assert "cannot be written" in str(result.exception)


def test_a_folder_or_file_that_is_no_checkpoint_is_refused(checkpoint, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no checkpoint")
    assert "holds no checkpoint" in refusal(tmp_path, "--prompt", "a")
    assert "model.pt" in refusal(tmp_path / "model.pt", "--prompt", "a")
    assert "there is no such file" in refusal(tmp_path / "other.pt", "--prompt", "a")


def test_options_that_cannot_be_meant_are_refused(checkpoint):
    assert "top_p = 2.0: expected" in refusal(checkpoint, "--prompt", "a", "--top-p", "2")
    assert "stop = ['']: expected" in refusal(checkpoint, "--prompt", "a", "--stop", "")
    assert "prompt 1 is" in refusal(checkpoint, "--prompt", "0 " * 40)


def test_a_gpu_that_is_not_there_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no CUDA device" in refusal(checkpoint, "--prompt", "a", "--device", "cuda")
