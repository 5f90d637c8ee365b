"""One matrix product per group of rows, as a loop.

Axes: X rows in expert order, E experts, I input width, O output width.
"""

import torch
from torch import Tensor

from deepseek_v3.ops.dtypes import at_least_float32


def grouped_linear(x_XI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ends[e-1] … ends[e]-1 of `x_XI` times the transpose of `weight_EOI[e]`; (X, O), in the type of `x`.

    `ends_E` int32, not decreasing, the last one equal to X; a group may be empty.
    """
    weights = weight_EOI.to(x_XI.dtype).unbind()
    return torch.cat([rows @ weight.T for rows, weight in zip(_groups(x_XI, ends_E), weights, strict=True)])


def weight_gradient(grad_XO: Tensor, x_XI: Tensor, ends_E: Tensor) -> Tensor:
    """The sum over the rows of each group of `grad` times `x`: (E, O, I), float32 or wider.

    A group without rows has zeros. Rows from ends[-1] on belong to no group and may hold anything.
    """
    groups = zip(_groups(grad_XO, ends_E), _groups(x_XI, ends_E), strict=True)
    return torch.stack([at_least_float32(grads).T @ at_least_float32(rows) for grads, rows in groups])


def _groups(rows_XD: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    return rows_XD[: sum(sizes)].split(sizes)
