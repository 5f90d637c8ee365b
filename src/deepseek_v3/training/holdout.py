"""Loss on text that is never trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.loader import TokenLoader
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.training.batches import document_numbers, token_batches
from deepseek_v3.training.loss import next_token_loss


@dataclass(frozen=True)
class HeldOutLoss:
    """`loss` in nats per token over `tokens` tokens; `bits_per_byte` of text, comparable between tokenizers."""

    loss: float
    bits_per_byte: float
    tokens: int


class HeldOutEvaluation:
    """Measures the main model's loss on the first windows of the hold-out split, `max_tokens` at most.

    Raises DataError where the split is shorter than one window.
    """

    def __init__(self, shards: TokenShards, config: RunConfig, max_tokens: int) -> None:
        length = config.training.sequence_length
        self._loader = TokenLoader(shards, "holdout", sequence_length=length, shuffle=False)
        windows = max(1, min(self._loader.num_samples, max_tokens // length))
        # Whole batches only, so that a compiled model meets one shape.
        size = min(config.parallel.micro_batch_size, windows)
        self._batches = [(first, size) for first in range(0, windows - size + 1, size)]
        self._tokens = len(self._batches) * size * length
        self._tokens_per_byte = shards.tokens_per_byte("holdout")
        self._end_of_text = shards.index.end_of_text if config.data.mask_documents else None

    @torch.no_grad()
    def measure(self, model: DeepSeekV3, device: torch.device) -> HeldOutLoss:
        """Runs the model over the windows; nothing of the model changes."""
        total = torch.zeros((), dtype=torch.float64, device=device)
        for tokens_BX in token_batches(self._loader, self._batches, device):
            inputs_BS = tokens_BX[:, :-1]
            documents_BS = None if self._end_of_text is None else document_numbers(inputs_BS, self._end_of_text)
            hidden_BSD = model.hidden_states(inputs_BS, documents_BS, predict=False).main_BSD
            total += next_token_loss(model, hidden_BSD, tokens_BX[:, 1:])
        loss = total.item() / self._tokens
        return HeldOutLoss(loss, loss / math.log(2) * self._tokens_per_byte, self._tokens)
