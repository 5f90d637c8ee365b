"""`dsv3 bench`: how fast training, operations and generation are, beside other systems and what is possible."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deepseek_v3.benchmark.decode_benchmark import CACHES, measure_decoding
from deepseek_v3.benchmark.generate_benchmark import measure_generation
from deepseek_v3.benchmark.ops_benchmark import OPERATIONS, measure_operations
from deepseek_v3.benchmark.own_generation import GenerationTask
from deepseek_v3.benchmark.peers.peer_systems import DECODE_PEERS, GENERATION_PEERS, PEERS
from deepseek_v3.benchmark.shape_files import INTERVAL, PRECISIONS, main_model, shape_names
from deepseek_v3.benchmark.train_benchmark import PeerSystem, measure_training
from deepseek_v3.benchmark.train_table import explanations, result_table
from deepseek_v3.inference.generate import StoredPrecision
from deepseek_v3.model.backends import compute_dtype
from deepseek_v3.utils.command_line import integer_option, override_options, print_next_steps
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import BenchmarkError, ConfigError
from deepseek_v3.utils.files import atomic_write, output_file_problem
from deepseek_v3.utils.logging import configure_logging
from deepseek_v3.utils.text import format_value, printable

bench_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measure training, operations and generation, checked first, beside peers and what is possible.",
)

_OUTPUT = typer.Option(metavar="FILE.json", help="Also write all that is measured to this file, as it is found.")
_COMMIT = typer.Option(help="The measured commit, where the code has no Git history beside it.")
_DEVICE = typer.Option(help="auto, cpu or cuda.")


@bench_app.command("train")
def train(
    shape: Annotated[str, typer.Option(help=f"{' or '.join(shape_names())}, or a run's YAML file.")] = "1b",
    precision: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(PRECISIONS), help="Of our runs; repeatable, or with commas between them."),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(PEERS), help="Other systems; repeatable, or with commas between them."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="SEQUENCES",
            parser=integer_option(at_least=1),
            help="Sequences of a step, all at once. Default: the shape's.",
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            metavar="NUMBER",
            parser=integer_option(at_least=2 * INTERVAL),
            help=f"Steps of each system; the first {INTERVAL} are not counted.",
        ),
    ] = 25,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field; repeatable."),
    ] = None,
    device: Annotated[str, _DEVICE] = "auto",
    output: Annotated[Path | None, _OUTPUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
) -> None:
    """Train a shape's first steps, as a run does, and show how fast they were beside other systems."""
    configure_logging()
    _require_writable(output)
    asked = _names("precision", precision, PRECISIONS)
    precisions = [each for each in PRECISIONS if each in asked] or ["bf16"]
    systems = [PeerSystem(name, PEERS[name]) for name in _names("peers", peers, list(PEERS))]
    result = measure_training(
        shape,
        precisions,
        systems,
        device=device,
        steps=steps,
        batch=batch,
        overrides=override or [],
        commit=commit,
        keep=lambda found: _write(output, found.as_json()),
    )
    _print(result_table(result))
    _print(explanations(result, select_device(device)))
    if result.problems:
        raise BenchmarkError(f"no speed is shown for {' | '.join(result.problems)}")
    same: list[object] = [
        "--shape",
        shape,
        *([] if batch is None else ["--batch", batch]),
        *override_options(override),
    ]
    print_next_steps(
        ["dsv3", "bench", "ops"],
        ["dsv3", "bench", "train", *same, "--precision", "bf16,fp8", "--peers", ",".join(PEERS)],
    )


@bench_app.command("ops")
def ops(
    op: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Only these: {', '.join(OPERATIONS)}; repeatable, or with commas."),
    ] = None,
    device: Annotated[str, _DEVICE] = "auto",
    output: Annotated[Path | None, _OUTPUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
) -> None:
    """Compare every back end of the operations with its reference; show its speed beside what is possible."""
    configure_logging()
    _require_writable(output)
    names = _names("op", op, list(OPERATIONS)) or list(OPERATIONS)
    place = select_device(device)
    result = measure_operations(names, place, commit, keep=lambda found: _write(output, found.as_json()))
    _print([*result.table(), *result.explanations()])
    if result.problems:
        raise BenchmarkError(f"no speed is shown for {' | '.join(result.problems)}")
    print_next_steps(["dsv3", "bench", "train", "--shape", "1b", "--peers", ",".join(PEERS)])


@bench_app.command("decode")
def decode(
    kv: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(CACHES), help="Of the cache; repeatable, or with commas. Default: all."),
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(DECODE_PEERS), help="Other systems; repeatable, or with commas."),
    ] = None,
    device: Annotated[str, _DEVICE] = "auto",
    output: Annotated[Path | None, _OUTPUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
) -> None:
    """Compare the back ends of decoding over a latent cache with float64; show speed beside what is possible."""
    configure_logging()
    _require_writable(output)
    caches = _names("kv", kv, CACHES) or list(CACHES)
    names = _names("peers", peers, list(DECODE_PEERS))
    result = measure_decoding(
        caches,
        [DECODE_PEERS[name] for name in names],
        select_device(device),
        commit,
        keep=lambda found: _write(output, found.as_json()),
    )
    _print([*result.table(), *result.explanations()])
    if result.problems:
        raise BenchmarkError(f"no speed is shown for {' | '.join(result.problems)}")
    beside: list[list[object]] = [] if names else [["dsv3", "bench", "decode", "--peers", ",".join(DECODE_PEERS)]]
    print_next_steps(*beside, ["dsv3", "bench", "ops"])


@bench_app.command("generate")
def generate(
    shape: Annotated[str, typer.Option(help=f"{' or '.join(shape_names())}, or a run's YAML file.")] = "1b",
    batch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="PROMPTS",
            parser=integer_option(at_least=1),
            help="Texts that are continued together; repeatable. Default: 1 and 32.",
        ),
    ] = None,
    prompt: Annotated[
        int, typer.Option(metavar="TOKENS", parser=integer_option(at_least=1), help="Length of every prompt.")
    ] = 512,
    new: Annotated[
        int, typer.Option(metavar="TOKENS", parser=integer_option(at_least=2), help="New tokens of every text.")
    ] = 256,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Ours computes prompts, too, with the same bits in any batch.")
    ] = False,
    precision: Annotated[
        StoredPrecision,
        typer.Option(help="Of weights and products; auto: bf16 on GPUs that have it, else fp32."),
    ] = StoredPrecision.AUTO,
    peers: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(GENERATION_PEERS), help="Other systems; repeatable, or with commas."),
    ] = None,
    device: Annotated[str, _DEVICE] = "auto",
    output: Annotated[Path | None, _OUTPUT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
) -> None:
    """Continue prompts with a shape's random weights, and show how fast that was beside other systems."""
    configure_logging()
    _require_writable(output)
    names = _names("peers", peers, list(GENERATION_PEERS))
    place, model = select_device(device), main_model(shape)
    dtype = compute_dtype(precision.value, place)
    tasks = [GenerationTask(model, dtype, each, prompt, new, device, batch_invariant) for each in batch or [1, 32]]
    result = measure_generation(
        shape,
        tasks,
        {name: GENERATION_PEERS[name] for name in names},
        place,
        commit,
        keep=lambda found: _write(output, found.as_json()),
    )
    _print([*result.table(), *result.explanations()])
    if result.problems:
        raise BenchmarkError(f"no speed is shown for {' | '.join(result.problems)}")
    same: list[object] = ["--shape", shape, "--prompt", prompt, "--new", new]
    beside: list[list[object]] = [["dsv3", "bench", "generate", *same, "--peers", ",".join(GENERATION_PEERS)]]
    print_next_steps(*([] if names else beside), ["dsv3", "bench", "decode"])


def _names(option: str, given: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The names that an option lists, each once. Raises ConfigError for one that is not known."""
    names = [name.strip() for text in given or [] for name in text.split(",")]
    for name in names:
        if name not in known:
            found = name or format_value(",".join(given or []))
            others = f"{', '.join(known[:-1])} or " if known[:-1] else ""
            raise ConfigError(f"--{option} {found}: expected {others}{known[-1]}")
    return list(dict.fromkeys(names))


def _print(lines: Sequence[str]) -> None:
    typer.echo(printable("\n".join(lines)))


def _require_writable(output: Path | None) -> None:
    """Raises ConfigError for a file that cannot be written, before anything is measured."""
    if output is not None and (problem := output_file_problem(output)):
        raise ConfigError(f"--output {output}: {problem}")


def _write(output: Path | None, found: dict[str, Any]) -> None:
    if output is not None:
        with atomic_write(output) as partial:
            partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
