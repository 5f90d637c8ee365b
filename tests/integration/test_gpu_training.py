"""The compiled bfloat16 path on a GPU runs the expected kernels and never waits for the GPU."""

import gc
from pathlib import Path

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.model.backends import select_backends
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.attention import cudnn_attention, reference_attention
from deepseek_v3.planning.execution import resolve_execution
from deepseek_v3.planning.hardware import find_device
from deepseek_v3.planning.memory import estimate_memory
from deepseek_v3.training.loss import training_losses
from deepseek_v3.training.parallel.parallelize import _compile_layers
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.monitoring import read_metrics
from helpers.gpu_steps import check_compiled_steps
from helpers.models import random_tokens, small_config
from helpers.runs import WIDE_LAYERS, WIDE_RUNS, WideRun, dsv3, write_run

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
# Widths of heads and experts that the fast kernels support.
WIDTHS = [
    "model.hidden_size=128",
    "model.moe_intermediate_size=64",
    "model.qk_nope_head_dim=24",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=16",
]


def _relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


@pytest.mark.parametrize("length", [128, 200, 4095])
def test_cudnn_attention_of_192_and_128_wide_heads(length: int) -> None:
    shapes = [(2, length, 4, 192), (2, length, 4, 192), (2, length, 4, 128)]
    inputs = [torch.randn(shape, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    upstream = torch.randn(2, length, 4, 128, device=CUDA, dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out = cudnn_attention(*inputs, 192**-0.5)
        out.backward(upstream)
    kernels = {event.key for event in profile.key_averages()}
    assert any("cudnn" in kernel for kernel in kernels), kernels
    expected = reference_attention(*exact, 192**-0.5)
    expected.backward(upstream.float())
    assert _relative_error(out, expected) < 5e-3
    for mine, other in zip(inputs, exact, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert _relative_error(mine.grad, other.grad) < 1e-2


def test_bfloat16_losses_and_gradients_stay_near_float32() -> None:
    config = small_config(
        hidden_size=128, moe_intermediate_size=64, num_nextn_predict_layers=1, qk_nope_head_dim=24, v_head_dim=32
    )
    model = DeepSeekV3(config).to(CUDA)
    tokens = random_tokens(config, 2, 65).to(CUDA)

    def gradients() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        losses = training_losses(model, tokens, 0.3, 1e-4)
        losses.total.backward()
        return losses.total.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    exact_loss, exact = gradients()
    model.compute_dtype = torch.bfloat16
    select_backends(model, CUDA)
    loss, found = gradients()
    assert loss == pytest.approx(exact_loss, rel=1e-3)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    # Rounding may send a token whose experts are nearly tied to another expert, which changes single weights much.
    assert _relative_error(found["lm_head.weight"], exact["lm_head.weight"]) < 2e-2
    assert _relative_error(found["model.embed_tokens.weight"], exact["model.embed_tokens.weight"]) < 5e-2


def test_training_steps_are_compiled_whole_and_wait_for_nothing(tmp_path: Path) -> None:
    trainer = Trainer(load_config(write_run(tmp_path), WIDTHS), CUDA)
    assert trainer.engine.models[0].compute_dtype == torch.bfloat16
    check_compiled_steps(trainer)


def test_reports_wait_only_for_the_step_before(tmp_path: Path) -> None:
    """Every step is reported, and only after the launch of the next one."""
    overrides = [*WIDTHS, "training.evaluation.interval_steps=0", "checkpoint.interval_steps=0"]
    config = load_config(write_run(tmp_path, steps=8), overrides)
    reported: dict[int, list[int]] = {}

    def begins(number: int) -> None:
        records = read_metrics(config.logging.directory / "metrics.jsonl")
        reported[number] = [record["step"] for record in records]
        torch.cuda.set_sync_debug_mode("error" if 3 <= number < 8 else "default")  # a wait for an event is none

    try:
        Trainer(config, CUDA, step_begins=begins).run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reported == {1: [], **{number: list(range(1, max(2, number - 1))) for number in range(2, 9)}}


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_layers_in_compiled_parts_train_as_whole_ones_do(tmp_path: Path, recomputation: str) -> None:
    """The layers are compiled in parts as under expert parallelism, here with all experts on one GPU.

    The learning rate is low: at a high one the rounding of the first steps grows from step to step.
    """
    slow = ["training.optimizer.moments=float32", "training.optimizer.learning_rate=0.001"]
    settings = [*WIDTHS, *slow, f"parallel.recomputation={recomputation}"]
    losses = []
    for name, compiles in (("whole", "auto"), ("parts", "false")):
        folder = tmp_path / name
        trainer = Trainer(load_config(write_run(folder), [*settings, f"parallel.compile={compiles}"]), CUDA)
        if name == "parts":
            (model,) = trainer.engine.models
            layers = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
            _compile_layers(layers, trainer.config.parallel.model_copy(update={"expert": 2}))
        batches = trainer.batches()
        losses.append(
            [trainer._train_step(trainer.plan.step(n), next(batches))[0].total.item() for n in range(1, 5)]
        )
    assert not torch._dynamo.utils.counters["graph_break"]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.parametrize("run", WIDE_RUNS, ids=lambda run: run.name)
def test_steps_need_the_memory_that_was_planned(tmp_path: Path, run: WideRun) -> None:
    """The compiler stores nothing that is to be recomputed. Most of the memory here is activations."""
    config = load_config(write_run(tmp_path), [*WIDE_LAYERS, *run.overrides])
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # the workspace of a previous test would be in `before`
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(config, CUDA)
    tokens = torch.randint(config.model.vocab_size, (16, 1025), device=CUDA)
    for number in (1, 2):
        trainer._train_step(trainer.plan.step(number), iter([tokens]))
    device = find_device(torch.cuda.get_device_name())
    assert device is not None
    planned = estimate_memory(config, resolve_execution(device, config)).total
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned, rel=0.05)


def test_a_run_resumes_and_generates_on_the_gpu(tmp_path: Path) -> None:
    config = write_run(tmp_path, steps=6)
    sizes = [word for width in WIDTHS for word in ("--set", width)]
    first = dsv3("train", "--device", "cuda", "--config", config, *sizes)
    assert first.exit_code == 0, first.output
    last = tmp_path / "checkpoints" / "checkpoint_step_6.pt"
    whole = load_checkpoint(last)["model"]
    last.unlink()
    again = dsv3("train", "--device", "cuda", "--config", config, *sizes, "--resume", "latest")
    assert again.exit_code == 0, again.output
    for name, value in load_checkpoint(last)["model"].items():
        torch.testing.assert_close(value, whole[name], rtol=2e-2, atol=2e-3)
    written = dsv3(
        "generate", "--checkpoint", last, "--prompt", "def ", "--max-new-tokens", "8", "--temperature", "0"
    )
    assert written.exit_code == 0, written.output
    exact = ["--set", "parallel.precision=fp32", "--set", f"checkpoint.directory={tmp_path / 'exact'}"]
    assert dsv3("train", "--device", "cuda", "--config", config, *sizes, *exact).exit_code == 0
    masked = [*sizes, "--set", "data.mask_documents=true", "--set", f"checkpoint.directory={tmp_path / 'masked'}"]
    assert dsv3("train", "--device", "cuda", "--config", config, *masked).exit_code == 0
