"""No message, log line, traceback or file shows a password, key or token."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pytest
import yaml
from fsspec.implementations.memory import MemoryFileSystem

from deepseek_v3.config.loading import config_from_dict, config_to_yaml, load_section
from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.redaction import redact, redact_environment
from helpers.runs import dsv3, message_of, run_fields

SECRET = "s3cr%2Ft"
ADDRESSES = [
    f"s3://user:{SECRET}@bucket/a.jsonl",
    f"https://{SECRET}@host/a.jsonl",
    f"https://user:{SECRET}@@host:443/x@y",
    f"https://user:s/{SECRET}@host/a",
    f"https:/user:{SECRET}@host/a",
    f"simplecache::https://user:{SECRET}@host/a",
    f"https://host/a.jsonl?X-Amz-Signature={SECRET}&page=2",
    f"https://host/a?page=2&X-Amz-Credential={SECRET}/20260101",
    f"https://host/a?sv=1&sig={SECRET}",
    f"https://host/a?Token={SECRET}",
    f"https://host/a?AWSAccessKeyId={SECRET}&Expires=1",
    f"https://host/a?access_key={SECRET};b=1",
    f"hf://datasets/a/b?hf_token={SECRET}",
    f"AWS_SECRET_ACCESS_KEY={SECRET}",
    f"AccountName=n;AccountKey={SECRET};x",
    f"{{'key': '{SECRET}', 'anon': False}}",
    f'{{"secret": "{SECRET}"}}',
    f"Authorization: Bearer {SECRET}aaaa",
]
PLAIN = [
    "abfs://container@account.dfs.core.windows.net/a",
    "sftp://me@host/a",
    "hf://datasets/user/name@main/a.jsonl",
    "https://host:8080/a@b",
    "https://[::1]:80/a",
    "s3://bucket/key?page=2",
    "--set mixing.tokens=5 --set training.total_tokens=7 keys=3",
    "found {'a': 1}: expected key = value",
    "/data/a:b@c",
    "the token hf_short, a key, a secret",
]


@pytest.mark.parametrize("text", ADDRESSES)
def test_secrets_of_every_kind_are_redacted(text: str) -> None:
    shown = redact(f"before {text} after")
    assert "s3cr" not in shown
    assert "***" in shown
    assert shown.startswith("before ")
    assert redact(shown) == shown


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_is_not_redacted(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("key", ["AKIA" + "A1" * 8, "ASIA" + "B2" * 8, "hf_" + "a" * 30, "ghp_" + "b" * 36])
def test_keys_of_a_known_form_are_redacted(key: str) -> None:
    assert redact(f"denied for {key}.") == "denied for ***."


@pytest.mark.parametrize("address", [f"https://host/a?token={SECRET}", f"AWS_SECRET_ACCESS_KEY={SECRET}"])
def test_the_colon_after_a_secret_stays(address: str) -> None:
    assert redact(f"{address}: denied") == f"{address.replace(SECRET, '***')}: denied"


def test_decoded_and_partial_secrets_are_redacted() -> None:
    address = f"https://user:{SECRET}@host/a?sig=abc%2Bd"
    assert redact("s3cr/t is wrong, and abc+d and abc%2Bd", address) == "*** is wrong, and *** and ***"


def test_secrets_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "WANDB_API_KEY": "aaaa1111",
        "MLFLOW_TRACKING_TOKEN": "aaaa1111bbbb",
        "MLFLOW_TRACKING_PASSWORD": "cccc",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:dddd@host/")
    monkeypatch.setenv("PWD", "/home/me")
    assert redact_environment("aaaa1111 aaaa1111bbbb cccc dddd /home/me") == "*** *** *** *** /home/me"
    assert redact("wandb_v1_" + "a" * 40) == "***"


def test_errors_and_log_lines_are_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    error = DataError(f"{ADDRESSES[0]}: denied")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "s3://***@bucket/a.jsonl: denied"
    configure_logging()
    get_logger("Test").warning("%s: denied", ADDRESSES[6])
    logging.getLogger("deepseek_v3").handlers.clear()
    shown = capsys.readouterr().out
    assert "X-Amz-Signature=***&page=2: denied" in shown


def test_tracebacks_are_redacted() -> None:
    program = (
        "from deepseek_v3.utils.command_line import run_app\n"
        "def app():\n"
        "    address = 'https://user:' + 'hidden' + '@host'\n"
        "    try: raise OSError(address)\n"
        "    except OSError as error: raise RuntimeError('reading ' + address) from error\n"
        "run_app(app)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert "RuntimeError: reading https://***@host" in result.stderr
    assert "OSError: https://***@host" in result.stderr
    assert "user:hidden" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["ADDRESS"],
        ["plan", "--gpus", "ADDRESS"],
        ["config", "show"] + 2 * ["ADDRESS"],
        ["config", "ADDRESS"],
    ],
)
def test_usage_errors_are_redacted(words: list[str]) -> None:
    address = "https://user:hiddenhidden@host.invalid/a.jsonl?token=hiddentoken&X-Amz-Signature=hiddensignature"
    result = dsv3(*(word.replace("ADDRESS", address) for word in words))
    assert result.exit_code == 2
    assert "***" in result.output
    assert "hidden" not in result.output


class _Leaky(MemoryFileSystem):
    """A store whose errors repeat the address that it got, like those of libraries."""

    protocol = "leaky"
    failure: Exception | None = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("leaky://").strip("/")

    def unstrip_protocol(self, name: str) -> str:
        return "leaky://" + name.lstrip("/")

    def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        return super()._open(path, *arguments, **options)

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:  # noqa: ARG002
        return {path: {"size": 100, "type": "file", "etag": "1"}}


LEAKY = "leaky://user:passw0rd@host/a.jsonl"


@pytest.fixture
def leaky(monkeypatch: pytest.MonkeyPatch) -> type[_Leaky]:
    fsspec.register_implementation("leaky", _Leaky, clobber=True)
    monkeypatch.setattr(_Leaky, "store", {})
    with fsspec.open(LEAKY, "wb") as file:
        file.write(b'{"text": "a good text"}\n' * 4)
    return _Leaky


def _pipeline(folder: Path) -> Path:
    path = folder / "data.yaml"
    fields = {"input_path": LEAKY, "output_dir": str(folder / "out"), "pipeline": [], "workers": 1}
    path.write_text(yaml.safe_dump(fields))
    return path


def _leaks(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "data.yaml"]
    return [str(path) for path in files if b"passw0rd" in path.read_bytes()]


@pytest.mark.parametrize(
    "failure",
    [
        TimeoutError(f"no answer from {LEAKY}"),
        RuntimeError(f"403 for {LEAKY}, password passw0rd"),
        FileNotFoundError(2, f"gone: {LEAKY}"),
        PermissionError(13, "passw0rd is wrong"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_failing_read_leaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaky: type[_Leaky], failure: Exception
) -> None:
    monkeypatch.setattr(leaky, "failure", failure)
    result = dsv3("preprocess", "--config", _pipeline(tmp_path))
    shown = result.output + (message_of(result) if result.exception else "")
    assert "leaky://***@host/a.jsonl" in shown or "quarantined" in shown
    assert "passw0rd" not in shown
    assert _leaks(tmp_path) == []


def test_the_password_does_not_identify_a_run(tmp_path: Path, leaky: type[_Leaky]) -> None:
    config = load_section(PreprocessConfig, _pipeline(tmp_path))
    manifest = run_pipeline(config)
    assert manifest["counts"]["kept"] == 4
    assert manifest["config"]["input_path"] == "leaky://***@host/a.jsonl"
    assert _leaks(tmp_path) == []
    other = config.model_copy(update={"input_path": LEAKY.replace("passw0rd", "another")})
    assert run_pipeline(other) == manifest
    written = tmp_path / "out" / "manifest.json"
    stored = orjson.loads(written.read_bytes())
    stored["config"]["input_path"] = LEAKY  # as an earlier version of this program wrote it
    written.write_bytes(orjson.dumps(stored))
    assert run_pipeline(config)["counts"] == manifest["counts"]
    with pytest.raises(DataError, match="another bytes_per_token"):
        run_pipeline(config.model_copy(update={"bytes_per_token": 5.0}))


def test_addresses_in_a_resolved_config_are_redacted(tmp_path: Path) -> None:
    fields = run_fields(tmp_path)
    fields["data"]["corpus"]["source"] = ADDRESSES[0]
    config = config_from_dict(fields, "here")
    assert config.data.corpus is not None
    assert config.data.corpus.source == ADDRESSES[0]
    assert "s3cr" not in config_to_yaml(config)


@pytest.mark.parametrize(
    "words",
    [
        ["tokenize", "--input", "text", "--vocab-size", "300", "--output"],
        ["quality", "train", "--good", "text/a.txt", "--bad", "text/b.txt", "--output"],
        ["quickstart", "--runs"],
    ],
    ids=lambda words: words[0],
)
def test_an_address_as_an_output_makes_no_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(f"some text of kind {name}. " * 500, encoding="utf-8")
    result = dsv3(*words, "s3://user:passw0rd@bucket/x")
    assert result.exit_code == 1
    assert "is an address, expected a path of this machine" in message_of(result)
    assert "passw0rd" not in result.output + message_of(result)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
