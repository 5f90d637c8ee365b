"""How pages store the latent cache: per token one latent of C numbers and one rotated key of R numbers.

A page holds `PAGE` tokens of one layer. Wide rows hold the L = C + R numbers in a float type. Rows of 8-bit blocks
are the bytes of C e4m3 values, then C / 128 float32 scales, then R bfloat16 numbers: 656 bytes for C = 512 and
R = 64, the layout that vLLM and SGLang call `fp8_ds_mla`. The scales that are written are powers of two, so that a
value times its scale is exact in bfloat16, too; any float32 scales are read. The rotated key stays in bfloat16,
because its error would move scores the most.

Axes: P pages, T tokens of a page, L width of a wide row, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_v3.ops.fp8.formats import BLOCK, E4M3
from deepseek_v3.ops.fp8.reference import dequantize_1x128, quantize_1x128
from deepseek_v3.utils.errors import ConfigError

PAGE = 64  # tokens


@dataclass(frozen=True)
class LatentFormat:
    """The widths of a cached row, and the type of its latent: a float type, or e4m3 for 8-bit blocks.

    Raises ConfigError for 8-bit blocks of a latent whose width is not a multiple of 128.
    """

    rank: int
    rope: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.is_fp8 and self.rank % BLOCK:
            raise ConfigError(
                f"a latent cache in FP8: found kv_lora_rank = {self.rank}, expected a multiple of {BLOCK}; "
                "keep the cache in bf16"
            )

    @property
    def is_fp8(self) -> bool:
        """Whether rows are bytes of 8-bit blocks."""
        return self.dtype == E4M3

    @property
    def could_be_fp8(self) -> bool:
        """Whether rows of the same latents may also be 8-bit blocks, and are not."""
        return not self.is_fp8 and self.rank % BLOCK == 0

    @property
    def width(self) -> int:
        """L, the numbers of a row."""
        return self.rank + self.rope

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's row in one layer."""
        if self.is_fp8:
            return self.rank + 4 * (self.rank // BLOCK) + 2 * self.rope
        return self.width * self.dtype.itemsize

    def empty_pages(self, number: int, device: torch.device) -> Tensor:
        """Memory for pages: (P, T, L) of the float type, or (P, T, row bytes) uint8."""
        columns, dtype = (self.row_bytes, torch.uint8) if self.is_fp8 else (self.width, self.dtype)
        return torch.empty(number, PAGE, columns, dtype=dtype, device=device)

    def pack(self, latent_NC: Tensor, rope_NR: Tensor) -> Tensor:
        """Rows as pages store them, (N, L) or (N, row bytes), from latents and rotated keys of any float type."""
        if not self.is_fp8:
            return torch.cat((latent_NC, rope_NR), dim=-1).to(self.dtype)
        values_NC, scales_NG = quantize_1x128(latent_NC, power_of_two=True)
        parts = (values_NC, scales_NG, rope_NR.to(torch.bfloat16))
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers (..., L) in `dtype` of rows (..., L) or (..., row bytes)."""
        if not self.is_fp8:
            return rows.to(dtype)
        flat = rows.reshape(-1, rows.shape[-1])
        widths = (self.rank, 4 * (self.rank // BLOCK), 2 * self.rope)
        values_NC, scales_NG, rope_NR = (part.contiguous() for part in flat.split(widths, -1))
        latent_NC = dequantize_1x128(values_NC.view(E4M3), scales_NG.view(torch.float32), dtype)
        numbers_NL = torch.cat((latent_NC, rope_NR.view(torch.bfloat16).to(dtype)), dim=-1)
        return numbers_NL.unflatten(0, rows.shape[:-1])
