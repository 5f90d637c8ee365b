"""The forward pass over generated tokens on a GPU: rows that are independent of each other but for the cache.

A row is one token of one sequence; several may be of the same sequence, because every layer writes the latents of
all rows before it attends. A pass has one of a few shapes: the number of rows and the width of their page tables
are powers of two. Each shape is captured once as a CUDA graph, and replayed. What is computed for a row depends
neither on the shape nor on the other rows.

Axes: N rows, M rows with padding, T pages of the longest sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_v3.inference.engine.device_layer import DeviceLayer, PassedRows
from deepseek_v3.mla.attention import MultiHeadLatentAttention
from deepseek_v3.mla.cached_sequences import CachedSequence
from deepseek_v3.mla.kv_compression import PagePool
from deepseek_v3.mla.rotary import rotary_tables
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.model.mtp import MTPLayer
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.dispatch import LocalDispatcher
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.ops.few_rows import FEW_ROWS
from deepseek_v3.ops.layers import Linear
from deepseek_v3.ops.mla_decode import PAGE, reference
from deepseek_v3.ops.operation import Select, Target

MOST_ROWS = 512  # of one pass


class Row(NamedTuple):
    """The token at a position of a sequence, which has room for it.

    The tokens before it are cached, or in the same pass.
    """

    sequence: CachedSequence
    position: int


class _Shape(NamedTuple):
    rows: int
    pages: int
    is_draft: bool

    @property
    def numbers(self) -> int:
        """Tokens, slots and lengths of all rows, and their page tables."""
        return self.rows * (3 + self.pages)


class _Pass(NamedTuple):
    """What the passes of a shape read: `numbers` int64, which are tokens, slots, lengths and then page tables, and
    states. With a graph, also what it writes; without one, a pass is computed anew.
    """

    numbers: Tensor
    hidden_MD: Tensor
    states_MD: Tensor | None
    graph: torch.cuda.CUDAGraph | None


class RowsForward:
    """Runs a model, whose weights are stored in its compute type and do not change, over the pages of a pool."""

    def __init__(self, model: DeepSeekV3, pool: PagePool, select: Select) -> None:
        self._config, self._model, self._device = model.config, model, pool.device
        self._dtype = model.head_weight_VD.dtype
        self._ops = select(FEW_ROWS, model.config.hidden_size)
        modules = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)][: len(pool.pages)]
        self._layers = [DeviceLayer(layer, pool, select) for layer in modules]
        self._mtp = next((layer for layer in modules if isinstance(layer, MTPLayer)), None)
        self._passes: dict[_Shape, _Pass] = {}
        self._memory = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    def states(
        self, rows: Sequence[Row], tokens: Sequence[int] | Tensor, hidden_ND: Tensor | None = None
    ) -> Tensor:
        """The states (N, D) of the tokens at some rows, given on the host or as a tensor on the device.

        With `hidden_ND`, those of the first MTP layer, from the states of the tokens before.
        """
        parts = []
        for first in range(0, len(rows), MOST_ROWS):
            part = slice(first, first + MOST_ROWS)
            parts.append(self._run(rows[part], tokens[part], None if hidden_ND is None else hidden_ND[part]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def logits(self, states_ND: Tensor) -> Tensor:
        """The logits (N, V), in float32 or wider, of the tokens after some states."""
        wide = torch.promote_types(self._dtype, torch.float32)
        return self._ops.product(states_ND, self._model.head_weight_VD, wide)

    def _run(self, rows: Sequence[Row], tokens: Sequence[int] | Tensor, hidden_ND: Tensor | None) -> Tensor:
        number = len(rows)
        pages = _power_of_two(max(len(row.sequence.pages) for row in rows))
        shape = _Shape(_power_of_two(number), pages, hidden_ND is not None)
        numbers = torch.zeros(shape.numbers, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        _fill(numbers.numpy(), rows, tokens, shape)
        if shape not in self._passes:
            self._passes[shape] = self._prepare(shape)
        inputs = self._passes[shape]
        inputs.numbers.copy_(numbers, non_blocking=True)
        if isinstance(tokens, Tensor):
            inputs.numbers[:number].copy_(tokens)
        if hidden_ND is not None:
            inputs.hidden_MD[:number].copy_(hidden_ND)
        if inputs.graph is None:
            return self._compute(shape, inputs)[:number]
        inputs.graph.replay()
        assert inputs.states_MD is not None
        return inputs.states_MD[:number].clone()

    def _prepare(self, shape: _Shape) -> _Pass:
        """The inputs of a shape; on a GPU also its graph, captured after a pass that compiles the kernels."""
        numbers = torch.zeros(shape.numbers, dtype=torch.int64, device=self._device)
        numbers[shape.rows : 2 * shape.rows] = -1
        hidden_MD = numbers.new_zeros(shape.rows, self._config.hidden_size, dtype=self._dtype)
        inputs = _Pass(numbers, hidden_MD, None, None)
        if self._device.type != "cuda":
            return inputs
        self._compute(shape, inputs)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            states_MD = self._compute(shape, inputs)
        return inputs._replace(states_MD=states_MD, graph=graph)

    def _compute(self, shape: _Shape, inputs: _Pass) -> Tensor:
        """The states (M, D) of a pass."""
        tokens_M, slots_M, lengths_M = inputs.numbers[: 3 * shape.rows].view(3, -1).unbind()
        table_MT = inputs.numbers[3 * shape.rows :].view(shape.rows, -1).int()
        cos_1MP, sin_1MP = rotary_tables((lengths_M - 1).clamp(min=0)[None], self._config)
        rows = PassedRows(slots_M, lengths_M.int(), table_MT, cos_1MP[0], sin_1MP[0])
        x_MD = F.embedding(tokens_M, self._model.model.embed_tokens.weight)
        main, norm = self._config.num_hidden_layers, self._model.model.norm
        layers = self._layers[:main]
        if shape.is_draft:
            assert self._mtp is not None
            layers, norm = self._layers[main:], self._mtp.head_norm
            pairs = (x_MD, self._mtp.enorm), (inputs.hidden_MD, self._mtp.hnorm)
            parts = [self._ops.rms_norm(part, each.weight, each.eps) for part, each in pairs]
            x_MD = self._ops.product(torch.cat(parts, dim=-1), self._mtp.eh_proj.weight)
        norms = [*(layer.input_norm for layer in layers), norm]
        normed_MD = self._ops.rms_norm(x_MD, norms[0].weight, norms[0].eps)
        for layer, next_norm in zip(layers, norms[1:], strict=True):
            x_MD, normed_MD = layer(x_MD, normed_MD, rows, next_norm)
        return normed_MD


def runs_by_rows(model: DeepSeekV3) -> bool:
    """Whether `RowsForward` can run a model.

    It is not trained, its weights are stored in its compute type, all experts are on this device, and a GPU has the
    kernels.
    """
    dtype = model.head_weight_VD.dtype
    if model.compute_dtype not in (None, dtype) or any(weight.requires_grad for weight in model.parameters()):
        return False
    return all(_is_stored(module, dtype) for module in model.modules()) and _has_kernels(model)


def _is_stored(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module has its weights on this device in a type."""
    if isinstance(module, MixtureOfExperts):
        return isinstance(module.dispatcher, LocalDispatcher) and module.experts.gate_up_proj.dtype == dtype
    return not isinstance(module, Linear) or (module.weight.dtype == dtype and module.weight.is_contiguous())


def _has_kernels(model: DeepSeekV3) -> bool:
    """Whether a model on a GPU needs no reference, which reads numbers on the host: no graph can hold that."""
    head_VD = model.head_weight_VD
    if head_VD.device.type == "cpu":
        return True
    rows = FEW_ROWS.select(Target(head_VD.device, head_VD.dtype, (model.config.hidden_size,)))
    attentions = [module for module in model.modules() if isinstance(module, MultiHeadLatentAttention)]
    attend_by_kernel = all(each.cached.mla_decode is not reference.mla_decode for each in attentions)
    return attend_by_kernel and rows.backend != "reference"


def _fill(
    numbers: npt.NDArray[np.int64], rows: Sequence[Row], tokens: Sequence[int] | Tensor, shape: _Shape
) -> None:
    """Sets tokens, if they are on the host, slots, lengths and page tables of the rows; the rest are zeros."""
    tokens_M, slots_M, lengths_M = numbers[: 3 * shape.rows].reshape(3, -1)
    table_MT, number = numbers[3 * shape.rows :].reshape(shape.rows, -1), len(rows)
    for table_T, row in zip(table_MT, rows, strict=False):
        table_T[: len(row.sequence.pages)] = row.sequence.pages
    if not isinstance(tokens, Tensor):
        tokens_M[:number] = tokens
    positions_N = np.array([row.position for row in rows])
    slots_M[number:] = -1
    slots_M[:number] = table_MT[np.arange(number), positions_N // PAGE] * PAGE + positions_N % PAGE
    lengths_M[:number] = positions_N + 1


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
