"""Sample texts that the model generates during training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from deepseek_v3.config.train_config import RunConfig, SamplesConfig
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.errors import ConfigError, GenerationError
from deepseek_v3.utils.logging import get_logger

_log = get_logger("Samples")


def check_samples_config(config: RunConfig, processes: int, by_deepspeed: bool) -> None:
    """Raises ConfigError if the config asks for samples and no single process holds the whole model."""
    if config.logging.samples and (processes > 1 or by_deepspeed):
        found = "DeepSpeed" if by_deepspeed else f"{processes} processes"
        raise ConfigError(
            f"logging.samples is given, and this run has {found}: expected one process, which has the whole model; "
            "set it to null, and let checkpoints write with dsv3 generate"
        )


class SampleWriter:
    """Continues the prompts of a config with the current model, and logs the texts.

    Weights, gradients and random state do not change, so a run with samples computes the same steps, bit for bit.
    Raises ConfigError for a prompt that fills the model's context.
    """

    def __init__(self, config: SamplesConfig, model: DeepSeekV3, tokenizer: Tokenizer) -> None:
        for prompt in config.prompts:
            length, context = len(tokenizer.encode(prompt)), model.config.max_position_embeddings
            if length >= context:
                raise ConfigError(
                    f"logging.samples.prompts: {prompt[:40]!r} has {length:,} tokens, expected fewer than "
                    f"model.max_position_embeddings = {context:,}"
                )
        self._config, self._model = config, model
        self._generator = Generator(model, tokenizer)
        self._sampling = SamplingConfig(max_new_tokens=config.max_new_tokens)

    def is_due(self, step_number: int) -> bool:
        """Whether texts are to be written after this step."""
        return step_number % self._config.interval_steps == 0

    def write(self, step_number: int) -> list[str]:
        """Logs one text for each prompt; returns prompts with their texts."""
        try:
            with self._uncompiled():
                completions = self._generator.generate(self._config.prompts, self._sampling)
        except GenerationError as error:
            _log.warning(f"no samples after step {step_number}: {error}")
            return []
        for completion in completions:
            _log.info(f"After step {step_number}, {completion.prompt!r} continues:\n{completion.text}")
        return [completion.prompt + completion.text for completion in completions]

    def _uncompiled(self) -> AbstractContextManager[object]:
        """Runs compiled layers eagerly: each new length of a text would compile them again."""
        if any(module._compiled_call_impl is not None for module in self._model.modules()):
            return torch.compiler.set_stance("force_eager")
        return nullcontext()
