"""Generates with this project's engine: a model of a shape with random weights, greedy, no text ends early.

Axes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.interop.huggingface.pretrained_folder import save_pretrained
from deepseek_v3.model.backends import select_backends
from deepseek_v3.model.init import initialize
from deepseek_v3.model.pretrained import allocate_weights, prepare_for_inference
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.monitoring import device_memory_bytes

_END = 0  # the id that ends texts, which no prompt holds and which is never the most probable one
_WARM_UP_TOKENS = 8
_LONG_SECONDS, _REPEATS = 20.0, 3  # a call that takes longer is not repeated


@dataclass(frozen=True)
class GenerationTask:
    """What every system does: continue `batch` prompts of `prompt` random ids by `new` tokens each.

    `model` has no prediction layers. `dtype` of weights and products. `batch_invariant`: see `Generator`.
    """

    model: ModelConfig
    dtype: torch.dtype
    batch: int
    prompt: int
    new: int
    device: str
    batch_invariant: bool = False

    def prompts(self) -> Tensor:
        """The ids of all prompts, (B, S) int64; the same for every system."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, self.model.vocab_size, (self.batch, self.prompt), generator=generator)


@dataclass(frozen=True)
class GenerationFigures:
    """Seconds for all new tokens, and for the first one of every prompt; and the peak memory of the device.

    `tokens` of the first prompt, with the log-probability that the system gave each.
    """

    seconds: float
    first_seconds: float
    memory_bytes: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    notes: str = ""


def generate_own(task: GenerationTask) -> GenerationFigures:
    """Times the engine, loaded and warm, at one batch."""
    model = build_model(task)
    generator = Generator(
        model, _tokenizer(), batch_size=task.batch, all_ids=True, batch_invariant=task.batch_invariant
    )
    prompts = task.prompts().tolist()

    def run(new: int) -> None:
        generator.continue_tokens(prompts, SamplingConfig(temperature=0, max_new_tokens=new))

    seconds, first_seconds = timed(run, task.new, model.head_weight_VD.device)
    memory = device_memory_bytes(model.head_weight_VD.device)
    asked = SamplingConfig(temperature=0, max_new_tokens=task.new, logprobs=0)
    (first,) = generator.continue_tokens(prompts[:1], asked)
    assert first.logprobs is not None
    logprobs = tuple(each.logprob for each in first.logprobs)
    return GenerationFigures(seconds, first_seconds, memory, first.tokens, logprobs)


def trained_logprobs(task: GenerationTask, tokens: Sequence[int]) -> list[float]:
    """The log-probabilities of a continuation of the first prompt by training's forward pass, without a cache."""
    model = build_model(task)
    ids_BS = torch.cat((task.prompts()[0], torch.tensor(tokens)))[None].to(model.head_weight_VD.device)
    with torch.inference_mode():
        return logprobs_of(model.logits(model.final_states(ids_BS)[0, task.prompt - 1 : -1]), tokens)


def write_weights(task: GenerationTask, folder: Path) -> None:
    """Writes the model's weights as a Hugging Face directory."""
    save_pretrained(build_model(task), folder)


def build_model(task: GenerationTask) -> DeepSeekV3:
    """The model with its random weights, which depend on its shape and the type of the device alone."""
    with torch.device("meta"):
        model = DeepSeekV3(task.model)
    prepare_for_inference(model, task.dtype)
    allocate_weights(model, select_device(task.device), "random weights")
    initialize(model, task.model.initializer_range, seed=0)
    with torch.no_grad():
        model.head_weight_VD[_END] = 0
    select_backends(model, model.head_weight_VD.device)
    return model.eval().requires_grad_(False)


def timed(run: Callable[[int], None], new: int, device: torch.device) -> tuple[float, float]:
    """The median seconds of `run(new)` and of `run(1)`, after a shorter call; the device is waited for."""
    run(min(new, _WARM_UP_TOKENS))
    return _median_seconds(lambda: run(new), device), _median_seconds(lambda: run(1), device)


def logprobs_of(logits_SV: Tensor, tokens: Sequence[int]) -> list[float]:
    """The log-probability of each token by the row of logits before it."""
    tokens_S1 = torch.tensor(tokens, device=logits_SV.device)[:, None]
    found: list[float] = logits_SV.float().log_softmax(-1).gather(1, tokens_S1)[:, 0].tolist()
    return found


def _tokenizer() -> Tokenizer:
    """Bytes and markers; other ids have no text."""
    tokenizer = Tokenizer.train(["text"], vocab_size=260)
    assert tokenizer.ends == (_END,)
    return tokenizer


def _median_seconds(run: Callable[[], None], device: torch.device) -> float:
    found: list[float] = []
    while len(found) < _REPEATS and sum(found) < _LONG_SECONDS:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return median(found)
