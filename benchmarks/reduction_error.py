"""The error of gradients that are summed over 2 to 64 ranks in fewer bits: `python benchmarks/reduction_error.py`.

Trains a small model on Python's sources for some steps, computes the gradients of 64 micro-batches, one for each
rank, and sums them as `parallel.gradient_reduction` does. Prints the relative error of the whole gradient,
‖sum - exact‖ / ‖exact‖ with an exact sum in float64, and writes it to `--output`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from environment import RESULTS, ROOT, environment
from torch import Tensor

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.data import DocumentIds, open_tokens
from deepseek_v3.training.loss import Objective
from deepseek_v3.training.parallel.gradient_reduction import NarrowForm, narrow_form
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.command_line import run_command
from deepseek_v3.utils.files import atomic_write
from deepseek_v3.utils.logging import configure_logging

RANKS = (2, 4, 8, 64)
CPU = torch.device("cpu")
FORMS = {"bf16": narrow_form("bf16", CPU), "fp8": narrow_form("fp8", CPU)}


class NarrowSum:
    """A gradient summed as one of the forms does: every rank's is rounded once, the sum is float32."""

    def __init__(self, form: NarrowForm, size: int) -> None:
        self._form, self._total_N = form, torch.zeros(size)

    def add(self, gradient_N: Tensor) -> None:
        piece_N = torch.empty_like(gradient_N)
        self._form.add(self._form.rounded(gradient_N[None]), piece_N)
        self._total_N += piece_N

    def total(self) -> Tensor:
        """The sum after a reduce-scatter: what the owner of a shard receives."""
        return self._total_N


class Bfloat16Sum:
    """A gradient whose partial sums are bfloat16 as well, as in a reduction that a library does in bfloat16."""

    def __init__(self, size: int) -> None:
        self._total_N = torch.zeros(size, dtype=torch.bfloat16)

    def add(self, gradient_N: Tensor) -> None:
        self._total_N += gradient_N.bfloat16()

    def total(self) -> Tensor:
        return self._total_N


def errors(gradients: Iterator[Tensor], size: int) -> list[dict[str, Any]]:
    """One row for each number of ranks: the relative error of each way to sum that many of the gradients."""
    sums: dict[str, NarrowSum | Bfloat16Sum] = {name: NarrowSum(form, size) for name, form in FORMS.items()}
    sums["bf16, summed in bf16"] = Bfloat16Sum(size)
    exact_N, rows = torch.zeros(size, dtype=torch.float64), []
    for count, gradient_N in enumerate(gradients, start=1):
        exact_N += gradient_N
        for each in sums.values():
            each.add(gradient_N)
        if count in RANKS:
            totals = {name: each.total() for name, each in sums.items()}
            # A sum over replicas comes back in bfloat16.
            totals |= {f"{form}, replicas": totals[form].bfloat16() for form in FORMS}
            found = {name: float((total - exact_N).norm() / exact_N.norm()) for name, total in totals.items()}
            rows.append({"ranks": count, "relative_error": found})
    return rows


def gradients_of(trainer: Trainer, config: RunConfig) -> Iterator[Tensor]:
    """The gradients of one micro-batch after another, all parameters in one float32 vector."""
    model = trainer.engine.models[0]
    objective = Objective(model)
    tokens = open_tokens(config)
    documents = DocumentIds(tokens, config.data.mask_documents)
    size, step = config.parallel.micro_batch_size, trainer.plan.step(trainer.plan.total_steps)
    for rank in range(max(RANKS)):
        batch = torch.from_numpy(trainer.loader.batch(rank * size, size))
        losses = objective(batch, step.mtp_weight, config.training.balance.sequence_loss_weight, documents(batch))
        losses.total.backward()
        yield torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()


def main(
    folder: Annotated[Path, typer.Option(help="Where tokens and the run go.")] = Path("data/reduction_error"),
    output: Annotated[Path, typer.Option(help="Where the errors are written.")] = RESULTS / "reduction_error.json",
    steps: Annotated[int, typer.Option(min=1, help="Steps of training before the gradients are computed.")] = 50,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field; repeatable."),
    ] = None,
) -> None:
    """Measure the error of narrow sums of real gradients."""
    configure_logging()
    places = [f"data.path={folder}/tokens", f"checkpoint.directory={folder}/checkpoints"]
    places += [f"logging.directory={folder}/run", f"training.total_tokens={steps * 16 * 256}"]
    small = ["parallel.micro_batch_size=16", "training.global_batch_size=16", "parallel.precision=auto"]
    config = load_config(ROOT / "configs" / "deepseek_v3_tiny.yaml", [*places, *small, *(override or [])])
    trainer = Trainer(config, CPU)
    trainer.run()
    size = sum(parameter.numel() for parameter in trainer.engine.models[0].parameters())
    figures = {"parameters": size, "trained_steps": steps, "rows": errors(gradients_of(trainer, config), size)}
    text = json.dumps({**environment("torch"), "results": figures}, indent=2)
    with atomic_write(output) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    typer.echo(text)


if __name__ == "__main__":
    run_command(main)
