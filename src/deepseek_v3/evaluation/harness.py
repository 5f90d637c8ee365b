"""A model of this project for the tasks of lm-evaluation-harness (lm-eval)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from traceback import extract_tb
from typing import Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.evaluation.scoring import Scorer, Window, batches_by_length
from deepseek_v3.evaluation.task_requests import TaskEncoder, TaskSampling
from deepseek_v3.inference.generator import Generator
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.errors import DataError, UserError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.progress import ProgressDisplay

_BATCH_SIZE = 32  # prompts that are continued together
_SIMILAR_NAMES = 3
_NAMES_SHOWN = 10

_log = get_logger("Evaluation")


class HarnessModel(LM):
    """Answers the three kinds of requests of lm-eval: log-likelihoods, rolling ones, and generated text.

    Tokens, windows and stop strings follow the rules of lm-eval's own `hf` model. Every answer goes to lm-eval's
    cache as soon as it is known.
    """

    def __init__(self, model: DeepSeekV3, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._device = model.head_weight_VD.device
        self._scorer, self._tokenizer = Scorer(model), tokenizer
        self._encoder = TaskEncoder(tokenizer, self._scorer.context)
        self._generator = Generator(model, tokenizer, _BATCH_SIZE, all_ids=True)

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in the names of lm-eval's caches."""
        return sha256(self._tokenizer.to_json().encode()).hexdigest()[:16]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log P in nats, and whether greedy decoding gives the continuation."""
        pairs = [request.args for request in requests]
        encoded = [self._encoder.pair(*pair) for pair in pairs]
        if merged := sum(not targets and bool(pair[1]) for pair, (_, targets) in zip(pairs, encoded, strict=True)):
            _log.warning(
                f"{merged:,} of {len(pairs):,} continuations have no token of their own, because a token spans the "
                "boundary to their context: their log-likelihood is 0, as in lm-eval's `hf` model"
            )
        if cut := sum(len(before) + len(targets) > self._scorer.context + 1 for before, targets in encoded):
            _log.warning(
                f"{cut:,} of {len(pairs):,} requests are longer than the model's context of "
                f"{self._scorer.context:,} tokens: the start of their context is left out"
            )
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        windows = [self._encoder.pair_windows(*pair) for pair in encoded]
        for index, nats, is_greedy in self._scored(windows, "Scoring continuations"):
            answers[index] = (nats, is_greedy)
            self.cache_hook.add_partial("loglikelihood", pairs[index], answers[index])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """For each (text,): log P of the whole text in nats, each token scored once in windows without overlap."""
        texts = [request.args[0] for request in requests]
        answers = [0.0] * len(texts)
        windows = [self._encoder.text_windows(text) for text in texts]
        for index, nats, _ in self._scored(windows, "Scoring texts"):
            answers[index] = nats
            self.cache_hook.add_partial("loglikelihood_rolling", (texts[index],), nats)
        return answers

    def _scored(self, requests: Sequence[Sequence[Window]], title: str) -> Iterator[tuple[int, float, bool]]:
        """Yields index, log P and whether every token is the likeliest, of each request that has any window."""
        places = [(index, number) for index, parts in enumerate(requests) for number in range(len(parts))]
        left = [len(parts) for parts in requests]
        nats = [[0.0] * len(parts) for parts in requests]
        is_greedy = [True] * len(requests)
        with ProgressDisplay() as display, display.task(title, len(places), "windows", _log) as progress:
            for place, scores in self._scorer.score([requests[index][number] for index, number in places]):
                index, number = places[place]
                nats[index][number] = float(scores.log_probabilities.sum())
                is_greedy[index] &= bool(scores.is_likeliest.all())
                left[index] -= 1
                progress.advance(1)
                if not left[index]:
                    yield index, sum(nats[index]), is_greedy[index]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """For each (context, options): the text that continues the context, up to a stop string.

        A context loses its start if it leaves no room for the new tokens.
        """
        arguments = [request.args for request in requests]
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, (_, options) in enumerate(arguments):
            groups.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(index)
        with ProgressDisplay() as display, display.task("Generating", len(requests), "answers", _log) as progress:
            for group in groups.values():
                prompts = [arguments[index][0] for index in group]
                for place, text in self._continued(prompts, arguments[group[0]][1]):
                    answers[group[place]] = text
                    self.cache_hook.add_partial("generate_until", arguments[group[place]], text)
                    progress.advance(1)
        return answers

    def _continued(self, contexts: Sequence[str], options: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """Yields the index and the continuation of each context, the longest contexts first."""
        end_of_text = self._tokenizer.token(self._tokenizer.end_of_text) or ""
        task = TaskSampling.from_options(options, self._scorer.context, end_of_text)
        room = self._scorer.context - task.sampling.max_new_tokens
        prompts = [(self._encoder.prompt(text) or [self._tokenizer.end_of_text])[-room:] for text in contexts]
        longest = max(map(len, prompts))
        # Each batch has a seed of its own, so that a context that is asked for repeatedly gets different samples.
        for seed, batch in enumerate(batches_by_length([len(ids) for ids in prompts], _BATCH_SIZE * longest)):
            sampling = replace(task.sampling, seed=seed)
            completions = self._generator.continue_tokens([prompts[index] for index in batch], sampling)
            for index, completion in zip(batch, completions, strict=True):
                yield index, task.cut(self._tokenizer.decode(completion.tokens, skip_markers=True))


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks run: their names, a folder with further tasks, examples in the prompt, requests of each task."""

    names: Sequence[str]
    folder: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None


def run_tasks(model: DeepSeekV3, tokenizer: Tokenizer, options: TaskOptions) -> dict[str, Any]:
    """Runs tasks on a model and returns the results of lm-eval.

    Raises DataError for a task that is unknown, cannot be loaded, such as one whose data is not there, or whose
    templates do not fit its documents.
    """
    manager = _task_manager(options)
    tasks = _load(manager, options.names)
    lm = HarnessModel(model, tokenizer)
    limits = {"num_fewshot": options.num_fewshot, "limit": options.limit}
    try:
        found: dict[str, Any] = simple_evaluate(lm, tasks=tasks, task_manager=manager, log_samples=False, **limits)
    except UserError:
        raise
    except Exception as error:
        # What lm-eval raises by itself comes from the YAML files and documents; what our model raises is a defect.
        if any(__file__ == frame.filename for frame in extract_tb(error.__traceback__)[1:]):
            raise
        raise DataError(f"--tasks {','.join(options.names)}: cannot be run: {_one_line(error)}") from error
    return found


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _load(manager: TaskManager, names: Iterable[str]) -> list[Any]:
    """The tasks and groups of these names, with their data."""
    found: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 -- reading YAML, code and data of a task can fail in any way
            raise DataError(f"task {name}: cannot be loaded: {_one_line(error)}") from None
        group = loaded["groups"].get(name)
        found += loaded["tasks"].values() if group is None else [group]
    return found


def _task_manager(options: TaskOptions) -> TaskManager:
    """Finds the tasks; reads those of lm-eval only if a name is not in the folder, since there are thousands."""
    if options.folder is not None and not options.folder.is_dir():
        raise DataError(f"--task-path {options.folder}: is no folder, expected one with tasks as YAML files")
    manager = TaskManager(include_path=options.folder, include_defaults=False) if options.folder else None
    if manager is None or not set(options.names) <= set(manager.all_tasks):
        own = manager.all_tasks if manager else []
        manager = TaskManager(include_path=options.folder)
        for name in options.names:
            if name not in manager.all_tasks:
                raise DataError(_unknown(name, options.folder, own, manager.all_tasks))
    return manager


def _unknown(name: str, folder: Path | None, own: Sequence[str], names: Sequence[str]) -> str:
    similar = get_close_matches(name, names, _SIMILAR_NAMES)
    hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
    inside = (
        f", and {folder} defines {', '.join(own[:_NAMES_SHOWN]) or 'none'}{_not_yaml(folder)}" if folder else ""
    )
    return f"--tasks: lm-eval has no task {name!r}{inside}{hint or '; `lm-eval ls tasks` lists them'}"


def _not_yaml(folder: Path) -> str:
    """Names the first file of a folder that cannot be read, which lm-eval skips without a word."""
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            return f"; {path} is not YAML: {' '.join(str(error).split())}"
    return ""


def results_table(results: dict[str, Any]) -> str:
    """The results as lm-eval prints them: one table of tasks, and one of groups if there are any."""
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)
