"""The command `dsv3 generate`: continues one prompt, or a file of prompts, with the model of a checkpoint."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields as dataclass_fields
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from deepseek_v3.config.text_files import printable_path
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.engine.drafts import MOST_DRAFTS
from deepseek_v3.inference.generator import Completion, Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.interop.load_model import load_for_inference
from deepseek_v3.mla.kv_compression import KvFormat
from deepseek_v3.utils.command_line import integer_option, number_option, print_next_steps
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import GenerationError
from deepseek_v3.utils.files import atomic_write, new_file_problem, read_regular_file
from deepseek_v3.utils.logging import configure_logging, get_logger

_MOST_PROMPT_BYTES = 2**26  # bytes of a file of prompts, which are all held in memory


class StoredPrecision(str, Enum):
    """The type that holds the weights; `auto` is the one that the model was trained in, or that suits a GPU."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


# Options that `dsv3 chat` and `dsv3 serve` have, too.
TopPOption = Annotated[
    float,
    typer.Option(
        metavar="NUMBER",
        parser=number_option,
        help="Sample from the fewest tokens that hold this share of the probability.",
    ),
]
KvOption = Annotated[
    KvFormat | None,
    typer.Option(help="Format of the cache; by default fp8 if the config has use_fp8_kv, else as computed."),
]
PrecisionOption = Annotated[
    StoredPrecision, typer.Option(help="Type that weights are stored and multiplied in; auto as the run computed.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
SpeculateOption = Annotated[
    int,
    typer.Option(
        metavar="NUMBER",
        parser=integer_option(0, MOST_DRAFTS),
        help="Tokens that the model's MTP layer drafts per step, 0 to 2; texts keep their distribution.",
    ),
]
InvariantOption = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="On a GPU, too, a text is the same alone and beside any others. Long prompts take longer.",
    ),
]


def generate(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, or a folder of them: the newest undamaged.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help='One prompt per line, or .jsonl with a field "prompt"; blank lines are skipped.'),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="NUMBER", parser=integer_option(), help="The most tokens to add.")
    ] = SamplingConfig.max_new_tokens,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="NUMBER",
            parser=number_option,
            help="0: always the most probable token; 1: the model's own distribution.",
        ),
    ] = SamplingConfig.temperature,
    top_p: TopPOption = SamplingConfig.top_p,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", parser=integer_option(), help="Sample from this many of the most probable tokens."
        ),
    ] = None,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            metavar="NUMBER", parser=number_option, help="Above 1: tokens already in the text become less probable."
        ),
    ] = SamplingConfig.repetition_penalty,
    min_p: Annotated[
        float,
        typer.Option(
            metavar="NUMBER",
            parser=number_option,
            help="Leave out tokens below this share of the likeliest one.",
        ),
    ] = SamplingConfig.min_p,
    seed: Annotated[
        int, typer.Option(metavar="NUMBER", parser=integer_option(), help="The same seed gives the same text.")
    ] = SamplingConfig.seed,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            parser=integer_option(),
            help="Write log-probabilities to --output, also of this many of the most probable tokens.",
        ),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Recompute the whole text at every step.")] = False,
    kv: KvOption = None,
    speculate: SpeculateOption = 0,
    batch_invariant: InvariantOption = False,
    precision: PrecisionOption = StoredPrecision.AUTO,
    device: DeviceOption = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Also write the results to this new file, as JSON lines.")
    ] = None,
) -> None:
    """Continue text with a trained model."""
    configure_logging(stderr=True)
    sampling = SamplingConfig(
        temperature,
        top_p,
        top_k,
        repetition_penalty,
        seed,
        max_new_tokens,
        tuple(stop or ()),
        min_p=min_p,
        logprobs=logprobs,
    )
    if logprobs is not None and output is None:
        raise GenerationError("found --logprobs without --output, expected a file to write them to")
    prompts = _prompts(prompt, prompts_file)
    if no_cache and kv is not None:
        raise GenerationError(f"found --no-cache and --kv {kv.value}, expected one of the two")
    if no_cache and speculate:
        raise GenerationError(f"found --no-cache and --speculate {speculate}, expected one of the two")
    if output is not None and (problem := new_file_problem(output)):
        raise GenerationError(f"--output {output}: {problem}")
    saved = load_for_inference(checkpoint, select_device(device), precision.value, mtp_layers=min(speculate, 1))
    generator = Generator(saved.model, saved.tokenizer, kv=kv, speculate=speculate, batch_invariant=batch_invariant)
    _warn_of_length(prompts, saved.tokenizer, sampling, saved.config)
    start = time.perf_counter()
    if prompt is not None:
        completions = [_stream(generator, prompt, sampling, use_cache=not no_cache)]
    else:
        completions = generator.generate(prompts, sampling, use_cache=not no_cache)
        _print_all(completions)
    seconds = time.perf_counter() - start
    if output is not None:
        _write(output, completions)
    drafted = f"; {generator.acceptance}" if speculate else ""
    typer.echo(_summary(completions, seconds) + drafted, err=True)
    same = [] if device == "auto" else ["--device", device]
    own = [] if saved.tokens else ["--data", "FILE"]  # a model that was not trained here has no held-out tokens
    print_next_steps(
        ["dsv3", "eval", "--checkpoint", checkpoint, *own, *same],
        ["dsv3", "serve", "--checkpoint", checkpoint, *same],
        err=True,
    )


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if prompt is not None and file is None:
        return [prompt]
    if file is not None and prompt is None:
        return _read_prompts(file)
    found = "neither" if file is None else "both"
    raise GenerationError(f"found {found} of --prompt and --prompts-file, expected one of the two")


def _read_prompts(file: Path) -> list[str]:
    """The prompts of a file, one per line that is not blank."""
    try:
        text = read_regular_file(file, _MOST_PROMPT_BYTES, "a file of prompts").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GenerationError(f"{file}: is not UTF-8 at byte {error.start}; convert it to UTF-8") from None
    except ValueError as error:
        raise GenerationError(f"{printable_path(file)}: {error}") from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise GenerationError(f"{file}: holds no prompts; expected one per line")
    if file.suffix.lower() == ".jsonl":
        return [_prompt_of(line, f"{file}:{number}") for number, line in filled]
    return [line for _, line in filled]


def _prompt_of(line: str, where: str) -> str:
    """The prompt in one line of JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GenerationError(f'{where}: is not JSON: {error}; expected {{"prompt": "text"}}') from None
    prompt: Any = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise GenerationError(f'{where}: holds {line.strip()[:80]}, expected {{"prompt": "text"}}')
    return prompt


def _warn_of_length(prompts: list[str], tokenizer: Tokenizer, sampling: SamplingConfig, config: RunConfig) -> None:
    """Warns if a prompt and its new tokens may become longer than the sequences that the model was trained on."""
    trained, context = config.training.sequence_length, config.model.max_position_embeddings
    longest = min(max(map(len, tokenizer.encode_batch(prompts))) + sampling.max_new_tokens, context)
    if longest > trained:
        get_logger("Generate").warning(
            f"a prompt with its {sampling.max_new_tokens:,} new tokens may reach {longest:,} tokens, and the model "
            f"was trained on sequences of {trained:,}: text beyond them may be of little use; lower "
            "--max-new-tokens, or shorten the prompt"
        )


def _stream(generator: Generator, prompt: str, sampling: SamplingConfig, use_cache: bool) -> Completion:
    """Prints the text while it is generated; on a terminal, prints the prompt before it."""
    text = generator.stream(prompt, sampling, use_cache)
    if sys.stdout.isatty():
        _print_dim(prompt)
    while True:
        try:
            typer.echo(next(text), nl=False)
        except StopIteration as end:
            typer.echo()
            return end.value


def _print_all(completions: Iterable[Completion]) -> None:
    """Prints each prompt with its text, followed by an empty line."""
    for completion in completions:
        _print_dim(completion.prompt)
        typer.echo(f"{completion.text}\n")


def _print_dim(prompt: str) -> None:
    """Prints a prompt, dim on a terminal."""
    typer.secho(prompt, dim=True, nl=False)


def _summary(completions: Sequence[Completion], seconds: float) -> str:
    num_tokens = sum(len(completion.tokens) for completion in completions)
    reasons = Counter(completion.finish_reason for completion in completions)
    ended = ", ".join(f"{count} by {reason}" for reason, count in reasons.most_common())
    return f"{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.1f} tokens/s; ended {ended}"


def _record(completion: Completion) -> dict[str, Any]:
    """The fields of a completion; log-probabilities only if they were asked for."""
    fields = {each.name: getattr(completion, each.name) for each in dataclass_fields(completion)}
    given = fields.pop("logprobs")
    return fields if given is None else {**fields, "logprobs": [each._asdict() for each in given]}


def _write(output: Path, completions: Iterable[Completion]) -> None:
    try:
        with atomic_write(output) as partial:
            lines = (json.dumps(_record(completion), ensure_ascii=False) for completion in completions)
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise GenerationError(
            f"--output {output}: cannot be written: {error.strerror}; choose another file"
        ) from None
