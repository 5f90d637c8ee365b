"""The README's commands run one after another in an empty folder, on a small corpus."""

import json
import re
import shlex
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from deepseek_v3.config.loading import load_config
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.interop.load_model import load_model
from deepseek_v3.utils.distributed.launch import select_device
from helpers import ROOT
from helpers.runs import dsv3

# Options that make a command quick and change nothing that a later command depends on.
QUICK = {
    "preprocess": ["--set", "workers=1", "--set", "pipeline=[preliminary_cleaning]"],
    "quality": ["--epochs", "1"],
    "train": [
        *("--set", "training.total_tokens=1024", "--set", "training.global_batch_size=2"),
        *("--set", "parallel.micro_batch_size=2", "--set", "training.evaluation.tokens=256", "--device", "cpu"),
    ],
    "generate": ["--max-new-tokens", "3", "--device", "cpu"],
    "eval": ["--tokens", "256", "--device", "cpu"],
}


def commands() -> list[list[str]]:
    """The words of each line in the README's block of commands, without comments."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("## The commands")[1].split("```")[1]
    return [shlex.split(line, comments=True) for line in block.strip().splitlines()]


def write_text(folder: Path) -> None:
    (folder / "raw").mkdir(parents=True)
    for name, text in sorted(topics.items())[:20]:
        (folder / "raw" / f"{name}.txt").write_text(text, encoding="utf-8")
    for name in ("good", "bad"):
        lines = [json.dumps({"text": f"{name} words {number} of a {name} page"}) for number in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_the_commands_of_the_readme_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    said: dict[str, str] = {}
    for program, *words in commands():
        if program != "dsv3":
            continue
        result = dsv3(*words, *QUICK.get(words[0], []))
        assert result.exit_code == 0, f"{words}: {result.output}\n{result.exception}"
        said[words[0]] = said.get(words[0], "") + result.output
        assert words[-1] == "schema" or re.search(r"(^|# )Next:", result.output, re.MULTILINE), words
    tokenizer = TokenShards.open("data/tokens").index.vocab_size
    model = load_model(Path("checkpoints"), select_device("cpu")).config.model
    assert tokenizer <= model.vocab_size < tokenizer + 128
    assert "  dsv3 tokenize --input data/clean/data --vocab-size 32768 --output data/tokens\n" in said["preprocess"]
    assert "  dsv3 train --config tiny --set data.corpus=null\n" in said["tokenize"]
    assert "  dsv3 eval --checkpoint checkpoints/checkpoint_step_2.pt --device cpu\n" in said["train"]


def test_the_launcher_of_the_readme_takes_its_options() -> None:
    [(program, *words)] = [words for words in commands() if words[0] != "dsv3"]
    assert program == "torchrun"
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    rest = words[words.index(script) + 1 :]
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    config = load_config(ROOT / options.pop("--config"), [options.pop("--set")])
    assert not options
    assert config.parallel.layout == "auto"
