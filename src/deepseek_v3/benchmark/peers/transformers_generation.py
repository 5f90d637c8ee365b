"""Transformers' DeepSeek-V3 on the weights and prompts of one of our generation tasks.

On a GPU with a static cache, for which it compiles its decoding step; on a CPU with the dynamic one, which is
faster there.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from deepseek_v3.benchmark.own_generation import GenerationFigures, GenerationTask, logprobs_of, timed
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import BenchmarkError
from deepseek_v3.utils.monitoring import device_memory_bytes
from deepseek_v3.utils.optional import missing_library


def generate(task: GenerationTask, folder: Path, tokens: tuple[int, ...]) -> GenerationFigures:
    """Times it, and gives its log-probabilities of `tokens`, a continuation of the first prompt.

    Raises BenchmarkError if Transformers is missing.
    """
    device = select_device(task.device)
    model = _load(task, folder, device)
    prompts = task.prompts().to(device)
    on_gpu = device.type == "cuda"
    cache = {"cache_implementation": "static"} if on_gpu else {}

    def run(new: int) -> None:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, **cache}
        model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    with torch.inference_mode():
        seconds, first_seconds = timed(run, task.new, device)
        memory = device_memory_bytes(device)
        ids = torch.cat((prompts[0], torch.tensor(tokens, device=device)))[None]
        logprobs = logprobs_of(model(ids, use_cache=False).logits[0, task.prompt - 1 : -1], tokens)
    notes = f"Transformers {version('transformers')}, {'static cache' if on_gpu else 'dynamic cache'}"
    return GenerationFigures(seconds, first_seconds, memory, tokens, tuple(logprobs), notes)


def _load(task: GenerationTask, folder: Path, device: torch.device) -> Any:
    """The model of a directory, its weights in the task's type."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise BenchmarkError(f"{missing_library('the peer Transformers', 'transformers')} ({error})") from None
    logging.disable_progress_bar()
    with device:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=task.dtype, attn_implementation="sdpa").eval()
