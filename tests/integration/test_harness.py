"""Scores of lm-evaluation-harness: this project's model against the harness's own `hf` model on its export.

Runs where lm-eval and accelerate are installed.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.evaluation.scoring import Scorer
from deepseek_v3.inference.generator import Generator
from deepseek_v3.interop.huggingface import save_pretrained
from deepseek_v3.interop.load_model import load_model
from helpers.harness_tasks import ANSWERS, CHOICES, ROLLING, TASKS, write_tasks
from helpers.models import small_config, small_model
from helpers.runs import dsv3, message_of

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import TaskIndex

from deepseek_v3.evaluation.harness import HarnessModel

BEGIN = "<|fim_begin|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(
        ["def a(x): return x + 1\n" * 20, "def b(x): return x + 3\n" * 20, "é naïve 日本 🙂"], 290
    )


def _with_begin(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, which puts a begin-of-text marker before every text."""
    fields = json.loads(tokenizer.to_json())
    text, marker = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [marker, text],
        "pair": [marker, text],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [1], "tokens": [BEGIN]}},
    }
    return Tokenizer(json.dumps(fields), config={"bos_token": BEGIN, "eos_token": "<|endoftext|>"})


@pytest.fixture(scope="module", params=["end-of-text alone", "begin-of-text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A Hugging Face directory with more ids than its tokenizer has."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model") / "hf"
    model = small_model(small_config(vocab_size=300)).requires_grad_(False)
    save_pretrained(model, folder, tokenizer=_with_begin(tokenizer) if "begin" in request.param else tokenizer)
    return folder


def _ours(folder: Path) -> HarnessModel:
    saved = load_model(folder, torch.device("cpu"))
    return HarnessModel(saved.model, saved.tokenizer)


def _theirs(folder: Path) -> LM:
    from lm_eval.models.huggingface import HFLM  # slow to import

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, trust_remote_code=False)


def _requests(kind: str, arguments: Sequence[tuple[object, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_scores_equal_those_of_transformers(folder: Path) -> None:
    pairs = [(one["query"], choice) for one in CHOICES for choice in one["choices"]]
    answers = [lm.loglikelihood(_requests("loglikelihood", pairs)) for lm in (_ours(folder), _theirs(folder))]
    assert [nats for nats, _ in answers[0]] == pytest.approx([nats for nats, _ in answers[1]], abs=1e-4)
    assert [greedy for _, greedy in answers[0]] == [greedy for _, greedy in answers[1]]
    texts = _requests("loglikelihood_rolling", [(text,) for text in ROLLING])
    rolling = [lm.loglikelihood_rolling(texts) for lm in (_ours(folder), _theirs(folder))]
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-4)


def test_greedy_texts_equal_those_of_transformers(folder: Path) -> None:
    options: list[dict[str, Any]] = [
        {"until": ["\n", "r", "x +"], "max_gen_toks": 24, "do_sample": False},
        {"until": "ret", "max_gen_toks": 9, "temperature": 0.0},
        {"until": [], "max_new_tokens": 20, "repetition_penalty": 1.5},
    ]
    arguments = [(text, each) for each in options for text in ANSWERS]
    found, expected = (
        lm.generate_until(_requests("generate_until", arguments)) for lm in (_ours(folder), _theirs(folder))
    )
    assert found == expected
    assert len(set(found)) > len(ANSWERS)


@pytest.fixture
def _no_report_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # takes seconds


@pytest.mark.usefixtures("_no_report_of_the_machine")
@pytest.mark.parametrize("folder", ["end-of-text alone"], indirect=True)
def test_tasks_on_the_command_line_equal_the_harness(folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    command = ["eval", folder, "--device", "cpu", "--tasks", ",".join(TASKS), "--task-path", tasks]
    result = dsv3(*command, "--num-fewshot", 1, "--limit", 3, "--output", tmp_path / "results.json")
    assert result.exit_code == 0, result.output
    assert "|choices|" in result.output
    assert f"Next:\n  dsv3 generate --checkpoint {folder} --prompt The --device cpu\n" in result.output
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    expected = simple_evaluate(
        _theirs(folder), tasks=[*TASKS], task_manager=manager, num_fewshot=1, limit=3, log_samples=False
    )
    assert written["n-shot"] == expected["n-shot"] == dict.fromkeys(TASKS, 1)
    for task in TASKS:
        for name, value in expected["results"][task].items():
            found = written["results"][task][name]
            assert found == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)


@pytest.mark.parametrize("folder", ["end-of-text alone"], indirect=True)
def test_cached_answers_need_no_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"until": ["\n"], "max_gen_toks": 8}
    requests = {
        "loglikelihood": [("def", " a"), ("", "x"), ("def a(x): retu", "rn")],
        "loglikelihood_rolling": [(text,) for text in ROLLING],
        "generate_until": [(text, options) for text in ANSWERS],
    }

    def ask(number: int) -> dict[str, Any]:
        lm = CachingLM(_ours(folder), str(tmp_path / "answers.db"))
        return {
            kind: [*map(_as_list, getattr(lm, kind)(_requests(kind, every[:number])))]
            for kind, every in requests.items()
        }

    first, whole = ask(2), ask(4)
    assert {kind: answers[:2] for kind, answers in whole.items()} == first
    monkeypatch.setattr(Scorer, "score", None)
    monkeypatch.setattr(Generator, "continue_tokens", None)
    assert ask(4) == whole


@pytest.mark.parametrize("folder", ["end-of-text alone"], indirect=True)
def test_answers_are_cached_before_all_are_known(folder: Path) -> None:
    lm, cached = _ours(folder), {}
    lm.cache_hook.add_partial = lambda kind, request, answer: cached.update({(kind, str(request)): answer})
    options = {"until": ["\n"], "max_gen_toks": 8}
    asked = {
        "loglikelihood": ("def", " a"),
        "loglikelihood_rolling": ("x" * 200,),
        "generate_until": ("x", options),
    }
    for kind, request in asked.items():
        (answer,) = getattr(lm, kind)(_requests(kind, [request]))
        assert cached[kind, str(request)] == answer


def _as_list(answer: Any) -> Any:
    return [*answer] if isinstance(answer, tuple) else answer


@pytest.mark.parametrize("folder", ["end-of-text alone"], indirect=True)
def test_samples_repeat_and_differ(folder: Path) -> None:
    options = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
    requests = _requests("generate_until", [("def", options)] * 40)
    answers = _ours(folder).generate_until(requests)
    assert answers == _ours(folder).generate_until(requests)
    assert len(set(answers)) == 40


@pytest.mark.parametrize("folder", ["end-of-text alone"], indirect=True)
def test_tasks_that_cannot_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading the thousands of tasks of lm-eval takes seconds.
    monkeypatch.setattr(TaskIndex, "build", partial(_without_own, TaskIndex.build))
    tasks = write_tasks(tmp_path / "tasks")
    command = ["eval", folder, "--task-path", tasks, "--tasks"]
    assert f"no task 'choice', and {tasks} defines answers, choices, rolling" in message_of(
        dsv3(*command, "choice")
    )
    assert "did you mean choices" in message_of(dsv3(*command, "rolling,choice"))
    rolling = (tasks / "rolling.yaml").read_text(encoding="utf-8")
    (tasks / "rolling.yaml").write_text(rolling.replace("{{text}}", '{{text.split("x")[1]}}'), encoding="utf-8")
    assert "--tasks rolling: cannot be run: UndefinedError" in message_of(dsv3(*command, "rolling"))
    (tasks / "rolling.yaml").write_text("task: rolling\ntask_alias: {", encoding="utf-8")
    assert "rolling.yaml is not YAML: while parsing" in message_of(dsv3(*command, "rolling"))
    (tasks / "choices.jsonl").unlink()
    assert "task choices: cannot be loaded: FileNotFoundError" in message_of(dsv3(*command, "choices"))
    missing = message_of(dsv3("eval", folder, "--task-path", tmp_path / "nowhere", "--tasks", "choices"))
    assert "is no folder" in missing


def _without_own(build: Callable[..., dict[str, Any]], paths: Sequence[Path], **options: Any) -> dict[str, Any]:
    return build([path for path in paths if "lm_eval" not in path.parts], **options)
