"""Transformers' DeepSeek-V3 on the shape and the tokens of one of our runs: experts as grouped products, compiled,
bfloat16 weights, clipping, fused AdamW. It has no bias updates and no balance loss, which cost nothing there."""

from __future__ import annotations

import time
from importlib.metadata import version
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor

from deepseek_v3.benchmark.own_training import TrainingFigures
from deepseek_v3.benchmark.shape_files import INTERVAL
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.mixture import MixtureLoader
from deepseek_v3.interop.huggingface.released_config import released_config
from deepseek_v3.planning.counts import count_parameters
from deepseek_v3.training.data import open_tokens
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import BenchmarkError
from deepseek_v3.utils.monitoring import device_memory_bytes
from deepseek_v3.utils.optional import missing_library


def train_alone(config: RunConfig, steps: int, device: str, started: float) -> TrainingFigures:
    """Trains the first steps of a run. Raises BenchmarkError if Transformers is missing or builds another model."""
    place = select_device(device)
    torch.manual_seed(config.training.seed)
    model = _build(config, place)
    built = sum(weight.numel() for weight in model.parameters())
    if built != (expected := count_parameters(config.model).total):
        raise BenchmarkError(f"Transformers built {built} parameters; the shape has {expected}")
    settings = config.training.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    tokens = MixtureLoader(
        open_tokens(config), sequence_length=config.training.sequence_length, seed=config.training.seed
    )
    micro = config.parallel.micro_batch_size
    ends, losses, norms = [time.time()], {}, {}
    first_step_end = 0.0
    firsts = count(0, micro)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, step / max(1, config.training.schedule.warmup_steps))
        loss = torch.zeros((), device=place)
        for _ in range(config.gradient_accumulation_steps):
            samples = torch.from_numpy(tokens.batch(next(firsts), micro)).to(place)
            loss += _backward(model, samples[:, :-1].contiguous(), config.gradient_accumulation_steps)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % INTERVAL == 0:
            losses[step], norms[step] = loss.item(), norm.item()  # waits for the device
            first_step_end = first_step_end or time.time()
            if step % INTERVAL == 0:
                ends.append(time.time())
    rate = INTERVAL * config.tokens_per_step
    return TrainingFigures(
        rates=tuple(rate / (end - start) for start, end in pairwise(ends[1:])),
        memory_bytes=device_memory_bytes(place),
        first_step_seconds=first_step_end - started,
        losses=losses,
        norms=norms,
        notes=f"Transformers {version('transformers')}, grouped products, compiled, bfloat16 weights and moments",
    )


def _build(config: RunConfig, device: torch.device) -> Any:
    """The model without its prediction layers, compiled on a GPU."""
    try:
        from transformers import AutoModelForCausalLM, DeepseekV3Config
    except ImportError as error:
        raise BenchmarkError(f"{missing_library('the peer Transformers', 'transformers')} ({error})") from None
    main = config.model.model_copy(update={"num_nextn_predict_layers": 0})
    fields = DeepseekV3Config.from_dict(released_config(main, "bfloat16"))
    with device:
        model = AutoModelForCausalLM.from_config(
            fields, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    model.train()
    if device.type == "cuda":
        model.compile(dynamic=False)
    return model


def _backward(model: Any, tokens_BS: Tensor, micro_batches: int) -> Tensor:
    """Adds the gradients of one micro-batch; returns its part of the mean loss."""
    loss: Tensor = model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss / micro_batches
    loss.backward()
    return loss.detach()
