"""The command `dsv3 eval`: the loss of a model on held-out tokens, and on any text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from deepseek_v3.config.data_config import DataConfig
from deepseek_v3.data.tokens.open_source import open_tokens_of
from deepseek_v3.data.tokens.source import RunTokens
from deepseek_v3.evaluation.perplexity import compare_saved
from deepseek_v3.evaluation.results_file import check_output, write_results
from deepseek_v3.evaluation.scoring import Scorer
from deepseek_v3.evaluation.text_loss import WindowRule, loss_table, measure_texts, total_of
from deepseek_v3.evaluation.text_sources import (
    ReadingRules,
    TextSource,
    encoded_documents,
    is_tokenized,
    parse_sources,
)
from deepseek_v3.interop.load_model import load_for_inference
from deepseek_v3.model.pretrained import LoadedModel
from deepseek_v3.utils.command_line import integer_option, print_next_steps
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import CheckpointError, ConfigError, DataError
from deepseek_v3.utils.logging import configure_logging, get_console, get_logger
from deepseek_v3.utils.optional import missing_library
from deepseek_v3.utils.progress import ProgressDisplay
from deepseek_v3.utils.text import printable

_log = get_logger("Evaluation")

# The parts of lm-eval's results that are written; its others describe the machine.
_REPORTED = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples", "lm_eval_version")

_positive = integer_option(at_least=1)


def evaluate(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A checkpoint, a folder of them (the newest undamaged), or a Hugging Face directory.",
        ),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="The same as MODEL.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Text, or token shards; may be repeated. Left out: the held-out tokens of the run.",
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of a record that holds the text.")] = "text",
    source_field: Annotated[
        str | None, typer.Option(help="Field of a record that names its source, instead of the file.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            parser=_positive,
            help="Tokens to read of each --data, or of the run's; all if left out.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", parser=_positive, help="Tokens in a window of a text; by default the model's context."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            parser=_positive,
            help="New tokens in each later window of a text; by default the context, so windows do not overlap.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME[,NAME]", help="Run these tasks of lm-evaluation-harness instead."),
    ] = None,
    task_path: Annotated[Path | None, typer.Option(help="A folder with tasks of your own, as YAML files.")] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", parser=integer_option(at_least=0), help="Examples in each prompt of the tasks."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", parser=_positive, help="Documents of each task; all if left out."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this new file, as JSON.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    ema: Annotated[
        bool, typer.Option("--ema", help="Measure the averages of the weights that the run kept.")
    ] = False,
) -> None:
    """Measure a model's loss on held-out tokens or on any text, by source."""
    configure_logging()
    path = _one_of(model, checkpoint)
    check_output(output)
    place = select_device(device)
    sources = parse_sources(data) if data else []
    rules = ReadingRules(text_field, source_field, tokens)
    harness = _harness(tasks, task_path, num_fewshot, limit, data, tokens, context, stride, source_field)
    saved = load_for_inference(path, place, averaged=ema)
    if harness is not None:
        results = harness(saved)
    elif compared := _compared_tokens(saved, data, path):
        _refuse_text_options((compared.sources or (compared,))[0].path, context, stride, source_field)
        results = _compare(saved, open_tokens_of(compared), path, tokens, place)
    else:
        results = _measure(saved, sources, rules, WindowRule.checked(context, stride, _context_of(saved)))
    if output is not None:
        write_results(output, {"model": str(path), "step": saved.step, **results})
    same = [] if device == "auto" else ["--device", device]
    print_next_steps(["dsv3", "generate", "--checkpoint", path, "--prompt", "The", *same])


def _one_of(model: Path | None, checkpoint: Path | None) -> Path:
    given = [path for path in (model, checkpoint) if path is not None]
    if len(given) != 1:
        found = "both" if given else "neither"
        raise CheckpointError(f"found {found} of MODEL and --checkpoint, expected one of the two: a checkpoint")
    return given[0]


def _harness(
    names: str | None, folder: Path | None, num_fewshot: int | None, limit: int | None, *others: object
) -> Callable[[LoadedModel], dict[str, Any]] | None:
    """Runs the tasks of the command line; None if it names none. `others` are the options for texts.

    Raises ConfigError if lm-eval is not installed, and DataError for options that do not go together.
    """
    if names is None:
        if folder is not None or num_fewshot is not None or limit is not None:
            raise DataError("--task-path, --num-fewshot and --limit: are for --tasks; name the tasks to run")
        return None
    if any(option is not None for option in others):
        raise DataError("--tasks: tasks have texts of their own; leave out --data and its options")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{missing_library('--tasks', 'lm_eval')} ({error})") from None
    from deepseek_v3.evaluation.harness import TaskOptions, results_table, run_tasks

    wanted = list(dict.fromkeys(name for part in names.split(",") if (name := part.strip())))
    if not wanted:
        raise DataError(f"--tasks {names!r}: names no task; expected names such as hellaswag,arc_easy")
    options = TaskOptions(wanted, folder, num_fewshot, limit)

    def run(saved: LoadedModel) -> dict[str, Any]:
        results = run_tasks(saved.model, saved.tokenizer, options)
        typer.echo(printable(results_table(results)))
        return {name: results[name] for name in _REPORTED if name in results}

    return run


def _compared_tokens(saved: LoadedModel, data: Sequence[str] | None, path: Path) -> DataConfig | None:
    """The tokens on which the model is compared with n-gram models: one folder without a name, or the run's.

    A model that was trained elsewhere has no tokens to fit them to. Raises DataError if it has no data then.
    """
    if data is None:
        if not saved.tokens:
            raise DataError(f"{path}: names no token shards of its training; give --data with text or token shards")
        return saved.config.data
    one = Path(data[0])
    return DataConfig(path=one) if len(data) == 1 and is_tokenized(one) and saved.tokens else None


def _refuse_text_options(shards: Path, *given: object) -> None:
    if any(value is not None for value in given):
        raise DataError(
            "--context, --stride and --source-field are for texts, and held-out tokens are read as in training; "
            f"name the shards to measure their documents one by one, as in --data held-out={shards}"
        )


def _compare(
    saved: LoadedModel, shards: RunTokens, path: Path, tokens: int | None, device: torch.device
) -> dict[str, Any]:
    comparison = compare_saved(saved, shards, path, tokens, device)
    console, count = get_console(), comparison.model.tokens
    console.print(f"{path}, step {saved.step}, on {count:,} held-out tokens of {shards.name}")
    console.print(comparison.table())
    return {"shards": shards.name, **comparison.as_json()}


def _context_of(saved: LoadedModel) -> int:
    return saved.model.config.max_position_embeddings


def _measure(
    saved: LoadedModel, sources: Sequence[TextSource], rules: ReadingRules, rule: WindowRule
) -> dict[str, Any]:
    trained = saved.config.training.sequence_length
    if saved.tokens and rule.context > trained:
        _log.warning(
            f"windows have up to {rule.context:,} tokens, and the model was trained on sequences of {trained:,}: "
            f"later tokens may be predicted badly; --context {trained} measures as it was trained"
        )
    documents = encoded_documents(sources, saved.tokenizer, rules)
    with ProgressDisplay() as display, display.task("Scoring text", None, "tokens", _log) as progress:
        losses = measure_texts(Scorer(saved.model), documents, saved.tokenizer.text_start, rule, progress)
    typer.echo(printable("\n".join(loss_table(losses))))
    return {
        "context": rule.context,
        "stride": rule.stride,
        "dtype": str(saved.model.compute_dtype or saved.model.head_weight_VD.dtype).removeprefix("torch."),
        "sources": [loss.as_json() for loss in losses],
        "total": total_of(losses).as_json(),
    }
