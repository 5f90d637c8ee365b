"""Writes and reads a model as a Hugging Face directory, beside Transformers: `python benchmarks/interop.py`.

Builds a shipped size with random weights on the GPU, exports it in bfloat16 and in FP8, and loads both exports with
this project and with Transformers. Compares the weights bit by bit and the next tokens, and writes seconds, bytes
per second and peak memory to `results/interop_<name>.json`. Files are read from the page cache.
"""

from __future__ import annotations

import gc
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from environment import RESULTS, environment, select_gpu

from deepseek_v3.config.loading import load_config
from deepseek_v3.interop.huggingface import load_pretrained, save_pretrained, to_released_names
from deepseek_v3.model.backends import select_backends
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.command_line import run_command


def main(
    size: Annotated[str, typer.Option(help="A shipped size.")] = "10b",
    name: Annotated[str, typer.Option(help="Name of the result file.")] = "h200",
    folder: Annotated[Path, typer.Option(help="Where to write the exports; they are deleted.")] = Path("/tmp"),
    commit: Annotated[str | None, typer.Option(help="Where the code has no history beside it.")] = None,
) -> None:
    """Measure, compare, write."""
    device = select_gpu()
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        record = {
            **environment("torch", "transformers", commit=commit),
            "size": size,
            **measure(size, place, device),
        }
    finally:
        shutil.rmtree(place)
    text = json.dumps(record, indent=2)
    (RESULTS / f"interop_{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def measure(size: str, place: Path, device: torch.device) -> dict[str, Any]:
    """All figures of one size."""
    model = random_model(size, device)
    weights = {key: tensor.cpu() for key, tensor in to_released_names(model.config, model.state_dict()).items()}
    record: dict[str, Any] = {"parameters": sum(tensor.numel() for tensor in model.parameters())}
    quantizations: dict[str, Literal["fp8"] | None] = {"bf16": None, "fp8": "fp8"}
    for folder, quantization in quantizations.items():
        save = partial(save_pretrained, model, place / folder, quantization=quantization)
        record[f"save_{folder}"] = timed(save, place / folder)[1]
    tokens = torch.randint(0, model.config.vocab_size, (4, 256), device=device)
    with torch.no_grad():
        expected = model(tokens).float()
    del model, save
    ours, record["load_bf16"] = timed(lambda: load_pretrained(place / "bf16", device=device), place / "bf16")
    state = to_released_names(ours.config, ours.state_dict())
    record["bf16_equal"] = all(torch.equal(state[key].cpu(), tensor) for key, tensor in weights.items())
    with torch.no_grad():
        record["logits_equal"] = torch.equal(ours(tokens).float(), expected)
    del ours, state
    ours, record["load_fp8"] = timed(
        lambda: load_pretrained(place / "fp8", dtype=torch.bfloat16, device=device), place / "fp8"
    )
    dequantized = {key: tensor.cpu() for key, tensor in ours.state_dict().items()}
    del ours
    print(json.dumps(record, indent=2), flush=True)
    return record | beside_transformers(place, device, tokens, dequantized)


@torch.no_grad()
def random_model(size: str, device: torch.device) -> DeepSeekV3:
    """A model in bfloat16, with routers in float32 that hold bfloat16 numbers, as an export does."""
    with torch.device(device):
        model = DeepSeekV3(load_config(size).model).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    model.compute_dtype = torch.bfloat16
    select_backends(model, device)
    return model.eval()


def beside_transformers(
    place: Path,
    device: torch.device,
    tokens: torch.Tensor,
    dequantized: dict[str, torch.Tensor],
) -> dict[str, Any]:
    """Loads both exports with Transformers."""
    from transformers import AutoModelForCausalLM

    record: dict[str, Any] = {}
    theirs, record["transformers_load_bf16"] = timed(
        lambda: AutoModelForCausalLM.from_pretrained(place / "bf16", dtype=torch.bfloat16, device_map=str(device)),
        place / "bf16",
    )
    record["transformers_save_bf16"] = timed(
        lambda: theirs.save_pretrained(place / "theirs", max_shard_size="5GB"), place / "theirs"
    )[1]
    del theirs
    record |= logits_in_float32(place, device, tokens)
    theirs, record["transformers_load_fp8"] = timed(
        lambda: AutoModelForCausalLM.from_pretrained(place / "fp8", device_map=str(device)), place / "fp8"
    )
    state = theirs.state_dict()
    compared = [key for key, tensor in state.items() if tensor.dtype == torch.float8_e4m3fn and key in dequantized]
    record["fp8_tensors_compared"] = len(compared)
    record["fp8_tensors_equal"] = sum(
        torch.equal(dequantize(state, key), dequantized[key].to(device)) for key in compared
    )
    return record


@torch.no_grad()
def logits_in_float32(place: Path, device: torch.device, tokens: torch.Tensor) -> dict[str, float]:
    """The logits of both in float32, from the same weights: how far apart, and how often the same token."""
    from transformers import AutoModelForCausalLM

    model = load_pretrained(place / "bf16", dtype=torch.float32, device=device)
    ours = model(tokens)
    del model
    theirs = AutoModelForCausalLM.from_pretrained(
        place / "bf16", dtype=torch.float32, device_map=str(device), attn_implementation="eager"
    )(tokens).logits
    return {
        "largest_difference_of_logits": (ours - theirs).abs().max().item(),
        "spread_of_logits": ours.std().item(),
        "same_next_token": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }


def dequantize(state: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """A matrix, or a stack of them, in bfloat16 from what Transformers holds."""
    scales = state[f"{key}_scale_inv"].float()
    values = state[key].float()
    rows, columns = values.shape[-2:]
    spread = scales.repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]
    return (values * spread).bfloat16()


def timed(work: Callable[[], Any], folder: Path) -> tuple[Any, dict[str, float]]:
    """The result of some work, with its seconds, its rate in GB of files per second, and what memory it took."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with peak_host_memory() as host:
        start = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    return result, {
        "seconds": seconds,
        "gigabytes_of_files": num_bytes / 1e9,
        "gigabytes_per_second": num_bytes / 1e9 / seconds,
        "peak_gpu_gigabytes": (torch.cuda.max_memory_allocated() - before) / 1e9,
        "peak_host_gigabytes_of_process": host[0],
    }


@contextmanager
def peak_host_memory() -> Iterator[list[float]]:
    """The peak resident memory of this process, in GB, as far as it grows inside the block."""
    found = [0.0]
    yield found
    found[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    run_command(main)
