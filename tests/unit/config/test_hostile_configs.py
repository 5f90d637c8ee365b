"""Any bytes as a configuration file, and any text after --set, give an error that names the place."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_v3.config.loading import load_config, load_section
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.planning.counts_command import counts_of
from deepseek_v3.planning.hardware import find_device, load_device
from deepseek_v3.planning.memory_check import require_memory
from deepseek_v3.planning.token_budget import planned_steps
from deepseek_v3.training.parallel.deepspeed_config import DeepSpeedFile
from deepseek_v3.training.schedule import TrainingSchedule
from deepseek_v3.utils.errors import ConfigError, PlanError, translate_os_errors
from deepseek_v3.utils.files import atomic_write
from helpers import ROOT
from helpers.models import small_config
from helpers.runs import dsv3, message_of, run_fields

PREPROCESS = "input_path: a\noutput_dir: b\npipeline: [mixing]\nmemory: 8GB\nmixing:\n  weights: {a: 1, b: 2.5}\n"
DEVICE = (
    "name: mine\nmemory_gib: 80\nfloat32_tflops: 20\nmemory_gb_per_s: 100\nlink_gb_per_s: 30\n"
    "dollars_per_hour: 1\nsource: me\n"
)
KINDS: dict[str, tuple[Callable[[Path], Any], bytes]] = {
    "run": (load_config, yaml.safe_dump(run_fields(Path("run")), sort_keys=False).encode()),
    "preprocess": (lambda path: load_section(PreprocessConfig, path), PREPROCESS.encode()),
    "device": (load_device, DEVICE.encode()),
    "config.json": (ModelConfig.from_json, json.dumps(small_config().model_dump(mode="json"), indent=1).encode()),
    "deepspeed": (DeepSpeedFile, b'{\n"train_batch_size": "auto",\n"zero_optimization": {"stage": 2}\n}\n'),
}
VALUES = [
    *(
        "2020-02-30",
        "!!timestamp x",
        "!!bool ''",
        "!!int x",
        "!!binary x",
        "!<tag> x",
        "!!omap [a: 1]",
        "!!python/x y",
    ),
    *("[&a [1], *a]", "&a {b: *a}", "*x", "[" * 80, "{a: " * 80, "- " * 2000, "[" * 70 + "]" * 70),
    *(
        "9" * 5000,
        "1e99999",
        "1." + "3" * 5000,
        "18446744073709551616",
        "-1",
        "0x10",
        "1:30",
        ".inf",
        ".nan",
        "NaN",
    ),
    *(
        '"\\ud800"',
        '"\\UFFFFFFFF"',
        '"\\x"',
        '"\\0"',
        "\0",
        "\x85",
        "\u2028",
        "\ufeff",
        "'",
        '"',
        "`",
        "@",
        "%",
        "?",
    ),
    *(
        "null",
        "true",
        "[]",
        "{}",
        "{? [a]: 1}",
        "{1: 2}",
        "{null: 1, ~: 2}",
        "<<: 5",
        "=",
        "\t",
        "|",
        ">",
        "#",
        "x: y",
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_as_a_file_end_in_lines_that_name_it(tmp_path: Path, kind: str) -> None:
    read, content = KINDS[kind]
    chooser = random.Random(kind)
    path = tmp_path / "file"
    refusals = []
    for _ in range(40):
        path.write_bytes(_damaged(content, chooser))
        refusals.append(_refusal(read, path))
    lines = [line for refusal in refusals if refusal for line in refusal.split("\n")]
    assert len(lines) > 20
    assert all(line.startswith(str(path)) for line in lines)
    assert max(map(len, lines)) < 2000


def _refusal(read: Callable[[Path], Any], path: Path) -> str:
    """The message of the ConfigError, empty without one; any other exception fails the test."""
    try:
        read(path)
    except ConfigError as error:
        return str(error)
    return ""


def _damaged(content: bytes, chooser: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chooser.randint(1, 3)):
        at = chooser.randrange(len(data) + 1)
        how = chooser.randrange(4)
        if how == 0:
            data[at:at] = chooser.choice(VALUES).encode("utf-8", "surrogatepass")
        elif how == 1:
            lines = bytes(data).split(b"\n")
            number = chooser.randrange(len(lines))
            lines[number] = lines[number].partition(b":")[0] + b": " + chooser.choice(VALUES).encode()
            data = bytearray(b"\n".join(lines))
        elif how == 2:
            del data[at : at + chooser.randrange(30)]
        else:
            data[at : at + 2] = chooser.randbytes(3)
    return bytes(data)


def test_any_text_after_set_ends_in_lines_that_name_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(KINDS["run"][1])
    fields = cycle(["training.seed", "model", "data.path", "model.rope_scaling"])
    refusals = [_refusal(partial(load_config, overrides=[f"{next(fields)}={value}"]), path) for value in VALUES]
    assert sum(map(bool, refusals)) > 40
    for refusal in filter(None, refusals):
        assert all(line.startswith("--set ") for line in refusal.split("\n"))


@pytest.mark.parametrize("name", ["a" * 5000, "\udcff", ".".join("a" * 5000), "", "a..b", "training.\0", "a\nb"])
def test_any_name_after_set_ends_in_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(KINDS["run"][1])
    refusal = _refusal(partial(load_config, overrides=[f"{name}=1"]), path)
    assert refusal.startswith("--set ")
    assert "\n" not in refusal
    assert len(refusal) < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2020-02-30 \na: 3", ":3: is not valid YAML: a is given twice"),
        ("a: !!timestamp x", ":1: is not valid YAML: tags (!!timestamp) are not supported"),
        ("b: &x 1\na: *x", ":2: is not valid YAML: aliases (*name) are not supported"),
        ("a: " + "[" * 2000, ":1: is not valid YAML: values are nested more than 50 deep"),
        ("a: " + "9" * 5000, ":1: is not valid YAML: a number of 5,000 characters, expected at most 64"),
        ("\n\na: \0", ':3: is not valid YAML: holds the control character "\\u0000"'),
        ('a: "\\0"', ":1: is not valid YAML: holds a NUL character"),
        ('\na: "\\ud800"', ":2: is not valid YAML: holds half of a surrogate pair"),
        ('a: "\\UFFFFFFFF"', ":1: is not valid YAML: holds an escape that is not a character"),
        ("x" * (2**20 + 1), ": has more than 1,048,576 bytes, expected a configuration"),
    ],
)
def test_forbidden_yaml_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    assert str(refusal.value).startswith(f"{path}{message}")


def test_encodings_and_byte_order_marks(tmp_path: Path) -> None:
    path, text = tmp_path / "run.yaml", KINDS["run"][1]
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert load_config(path).training.seed == 0
    path.write_bytes(text.decode().encode("utf-16"))
    with pytest.raises(ConfigError, match="is in UTF-16, expected UTF-8"):
        load_config(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, kind in ((tmp_path, "folder"), (tmp_path / "pipe", "pipe"), (Path("/dev/zero"), "device")):
        for read, _ in KINDS.values():
            with pytest.raises(ConfigError, match=f"^{place}: is a {kind}, expected a configuration"):
                read(place)
    for place in (Path("a\0b"), Path("x" * 5000)):
        for words in (["validate", "--config"], ["config", "show"], ["plan", "--hardware"]):
            result = dsv3(*words, place)
            assert result.exit_code == 2 or isinstance(result.exception, ConfigError), (words, result.exception)


def _counts(fields: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name, value in fields.items():
        if isinstance(value, dict):
            found += _counts(value, f"{path}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            found.append(f"{path}{name}")
    return found


def test_every_count_of_any_size_is_planned_or_refused(tmp_path: Path) -> None:
    fields = run_fields(tmp_path)
    fields["training"]["batch_ramp"] = {"initial": 2, "increment": 2}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    everything = load_config(path).model_dump(mode="json")
    device = find_device("H100")
    assert device is not None
    planned = 0
    for field in _counts(everything):
        for value in (0, -1, 10**6, 10**9, 10**12, 2**63, 2**64):
            try:
                config = load_config(path, [f"{field}={value}"])
                counts_of(config)
                TrainingSchedule(config).step(planned_steps(config))
                require_memory(config, device)
                planned += 1
            except (ConfigError, PlanError):
                continue
    assert planned > 20


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_hidden_layers=1000000"],
        ["model.n_routed_experts=1e12", "parallel.expert=7"],
        ["parallel.expert=7", "parallel.data_shard=1048576", "training.global_batch_size=1048576"],
        ["parallel.micro_batch_size=1e9"],
        ["training.total_tokens=100000000000000000000"],
        ["training.total_tokens=99999999999999x"],
        ["model.num_nextn_predict_layers=1e6", "training.sequence_length=2e6", "model.max_position_embeddings=2e6"],
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(KINDS["run"][1])
    with pytest.raises(ConfigError, match=r"^(--set|.*run\.yaml)"):
        load_config(path, overrides)


@pytest.mark.parametrize(
    "words",
    [
        ["--gpus", "1e9"],
        ["--gpus", "999983"],
        ["--budget-hours", "1e308"],
        ["--budget-hours", "nan"],
        ["--budget-hours", "-1"],
        ["--budget-dollars", "1e-308"],
        ["--price", "1e308", "--budget-dollars", "1"],
        ["--price", "1e-320", "--budget-dollars", "1"],
        ["--tokens", "1e18", "--gpu", "CPU", "--gpus", "1e12"],
    ],
)
def test_a_plan_for_any_numbers_is_a_result_or_a_refusal(words: list[str]) -> None:
    tiny = ROOT / "configs" / "deepseek_v3_tiny.yaml"
    result = dsv3("plan", "--config", tiny, *words)
    assert result.exit_code == 0 or isinstance(result.exception, ConfigError), result.exception


def test_a_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(FileExistsError, match="is not a regular file"), atomic_write(place):
            pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "nnn"),
            "nnn: cannot be used: File name too long; make room",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be used: No space left on device; make room"),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), "a and b: cannot be used: Invalid link"),
    ],
)
def test_a_system_error_is_one_line(monkeypatch: pytest.MonkeyPatch, error: OSError, message: str) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("deepseek_v3.planning.plan_command.select_config_files", refuse)
    assert message_of(dsv3("plan")).startswith(message)


def test_other_system_errors_are_defects() -> None:
    with pytest.raises(BrokenPipeError), translate_os_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
