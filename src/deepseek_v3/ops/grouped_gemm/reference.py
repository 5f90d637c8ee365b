"""One matrix product per group of rows, as a loop."""

import torch
from torch import Tensor


def grouped_linear(x_XI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ends[e-1] … ends[e]-1 of `x_XI` times the transpose of `weight_EOI[e]`; (X, O), in the type of `x`.

    `ends_E` int32, not decreasing, the last one equal to X; a group may be empty.
    Axes: X rows in expert order, E experts, I input width, O output width.
    """
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    weights = weight_EOI.to(x_XI.dtype).unbind()
    return torch.cat([rows @ weight.T for rows, weight in zip(x_XI.split(sizes), weights, strict=True)])
