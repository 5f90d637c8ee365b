"""Causal attention through torch's fused kernels."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(
    q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, scale: float, allowed_BSS: Tensor | None = None
) -> Tensor:
    """The reference's operation, by the kernel that torch chooses for the tensors.

    On a CPU torch's fused kernel needs keys and values of equal width, so narrower values are padded there.
    """
    mask = None if allowed_BSS is None else allowed_BSS[:, None]
    width, missing = v_BSHV.shape[-1], q_BSHK.shape[-1] - v_BSHV.shape[-1]
    if missing > 0 and v_BSHV.device.type == "cpu":
        v_BSHV = F.pad(v_BSHV, (0, missing))
    out_BHSV = F.scaled_dot_product_attention(
        q_BSHK.transpose(1, 2),
        k_BSHK.transpose(1, 2),
        v_BSHV.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    return out_BHSV.transpose(1, 2)[..., :width]


def cudnn_attention(
    q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, scale: float, allowed_BSS: Tensor | None = None
) -> Tensor:
    """The reference's operation by cuDNN: on Hopper about twice as fast as flash with values padded to 192.

    Raises RuntimeError if cuDNN does not support the shape or type. With a mask torch chooses the kernel,
    because cuDNN's backward pass with a mask has returned NaN (pytorch/pytorch#196678).
    """
    if allowed_BSS is not None:
        return attention(q_BSHK, k_BSHK, v_BSHV, scale, allowed_BSS)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attention(q_BSHK, k_BSHK, v_BSHV, scale)
