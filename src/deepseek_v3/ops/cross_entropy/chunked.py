"""The loss of a linear head, a chunk of tokens at a time.

The logits of all tokens at once would be the largest tensor of the whole training step. Here the forward pass
computes the logits of one chunk, overwrites them with the gradient of the loss, and adds that chunk's share to the
gradients of the hidden states and of the weight. The backward pass only scales these two gradients.

Axes: T tokens, D width, V vocabulary.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deepseek_v3.ops.cross_entropy.reference import IGNORED
from deepseek_v3.ops.dtypes import at_least_float32

# The most logits of a chunk: 0.5 GiB in bfloat16 on a GPU; few enough for the caches of a CPU.
_CHUNK_LOGITS = {"cuda": 1 << 28, "cpu": 1 << 20}
# The fewest rows of a chunk: each chunk reads the head, and reads and writes its gradient.
_LEAST_ROWS = 256


class LossesOfRows(Protocol):
    """What a back end computes from a chunk of logits."""

    def __call__(self, logits_TV: Tensor, targets_T: Tensor, with_gradient: bool) -> Tensor:
        """The loss of each row (T,), float32 at least, and 0 where the target is `IGNORED`.

        `with_gradient` overwrites the logits with the gradient of the sum of these losses.
        """


def losses_of_rows(logits_TV: Tensor, targets_T: Tensor, with_gradient: bool) -> Tensor:
    """The definition of `LossesOfRows`, in plain torch."""
    wide_TV = at_least_float32(logits_TV)
    log_sum_T1 = wide_TV.logsumexp(-1, keepdim=True)
    is_left_out_T1 = (targets_T == IGNORED)[:, None]
    targets_T1 = targets_T.clamp(min=0)[:, None]
    losses_T1 = (log_sum_T1 - wide_TV.gather(-1, targets_T1)).masked_fill(is_left_out_T1, 0)
    if with_gradient:
        wide_TV.sub_(log_sum_T1.masked_fill(is_left_out_T1, math.inf)).exp_()
        wide_TV.scatter_(-1, targets_T1, wide_TV.gather(-1, targets_T1) - (~is_left_out_T1).to(wide_TV.dtype))
        logits_TV.copy_(wide_TV)
    return losses_T1.squeeze(-1)


def _accumulate_product(total_VD: Tensor, grad_TV: Tensor, hidden_TD: Tensor) -> None:
    """total += gradᵀ · hidden, summed in the type of `total` even if the factors are narrower."""
    if total_VD.dtype == grad_TV.dtype:
        total_VD.addmm_(grad_TV.T, hidden_TD)
    elif total_VD.is_cuda:
        torch.addmm(total_VD, grad_TV.T, hidden_TD, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD.addmm_(grad_TV.T.to(total_VD.dtype), hidden_TD.to(total_VD.dtype))


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        needs_gradient: bool,
        losses_of_rows: LossesOfRows,
    ) -> Tensor:
        narrow_VD = weight_VD.to(hidden_TD.dtype)
        losses_T = hidden_TD.new_empty(len(hidden_TD), dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_gradient else None
        sum_dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=sum_dtype) if needs_gradient else None
        size = _chunk_size(hidden_TD.shape[0], weight_VD.shape[0], hidden_TD.device.type)
        for start in range(0, hidden_TD.shape[0], size):
            chunk = slice(start, start + size)
            logits_TV = hidden_TD[chunk] @ narrow_VD.T
            losses_T[chunk] = losses_of_rows(logits_TV, targets_T[chunk], needs_gradient)
            if grad_hidden_TD is not None and grad_weight_VD is not None:  # the logits are their gradient now
                torch.mm(logits_TV, narrow_VD, out=grad_hidden_TD[chunk])
                _accumulate_product(grad_weight_VD, logits_TV, hidden_TD[chunk])
            del logits_TV  # freed before the next chunk allocates its own
        if needs_gradient:
            ctx.save_for_backward(grad_hidden_TD, grad_weight_VD)
            ctx.weight_dtype = weight_VD.dtype
        return losses_T.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden_TD, grad_weight_VD = ctx.saved_tensors
        scaled_TD = (at_least_float32(grad_hidden_TD) * grad_loss).to(grad_hidden_TD.dtype)
        grad_loss = grad_loss.to(grad_weight_VD.dtype)
        if _keeps_graph():  # another backward pass may follow, as in a pipeline whose backward pass has two halves
            grad_weight_VD = grad_weight_VD * grad_loss
        else:  # autograd frees the saved gradient after this; in place it needs no second matrix
            grad_weight_VD.data.mul_(grad_loss)
        return scaled_TD, grad_weight_VD.to(ctx.weight_dtype), None, None, None


def _keeps_graph() -> bool:
    """Whether the backward pass that is running retains the graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _chunk_size(num_tokens: int, vocab_size: int, device_type: str) -> int:
    chunks = math.ceil(num_tokens * vocab_size / _CHUNK_LOGITS.get(device_type, _CHUNK_LOGITS["cuda"]))
    return max(1, math.ceil(num_tokens / max(chunks, 1)), min(num_tokens, _LEAST_ROWS))


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, losses_of_rows: LossesOfRows = losses_of_rows
) -> Tensor:
    """The reference's operation without ever holding all logits; sums the weight's gradient in float32 at least.

    Differentiable once, by any number of backward passes. `losses_of_rows` computes a chunk's losses and gradient.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    return _ChunkedLinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, needs_gradient, losses_of_rows)


@torch.no_grad()
def linear_argmax(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """The most probable id of each token, the lowest one of several: int64 (T,), without ever holding all logits.

    Logits have the type of `hidden_TD`, as those of the loss.
    """
    narrow_VD = weight_VD.to(hidden_TD.dtype)
    size = _chunk_size(hidden_TD.shape[0], weight_VD.shape[0], hidden_TD.device.type)
    return torch.cat([(chunk_TD @ narrow_VD.T).argmax(-1) for chunk_TD in hidden_TD.split(size)])
