"""One matrix product per group of rows, in one kernel that reads the group borders on the device."""

import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x_XI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """The reference's operation without a host synchronisation. Row widths must be multiples of 16 bytes."""
    return F.grouped_mm(x_XI, weight_EOI.to(x_XI.dtype).transpose(-2, -1), offs=ends_E)
