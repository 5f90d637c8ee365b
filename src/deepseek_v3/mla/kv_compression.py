"""The latent cache, the only state that generation keeps of past tokens: its format, its size and its pages.

Per token and layer it holds kv_lora_rank + qk_rope_head_dim numbers: the normalised latent and the rotated shared
key (DeepSeek-V2 report, §2.1.3). Multi-head attention would cache the key and value of every head. The pages of a
pool are handed out to sequences as these grow (PagedAttention, arXiv:2309.06180).

Axes: P pages, T tokens of a page, L width of a cached row, C kv rank, H heads, N qk_nope, V v_head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import Enum

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.ops.fp8.formats import E4M3
from deepseek_v3.ops.mla_decode.formats import PAGE, LatentFormat
from deepseek_v3.utils.errors import CacheFullError


class KvFormat(str, Enum):
    """What the rows of the cache hold: bfloat16 numbers, or 8-bit blocks with a bfloat16 rotary key."""

    BF16 = "bf16"
    FP8 = "fp8"


def latent_format(config: ModelConfig, compute_dtype: torch.dtype, kv: KvFormat | None = None) -> LatentFormat:
    """The format of cached rows; without `kv`, FP8 if the config has `use_fp8_kv`, else the compute type.

    Raises ConfigError for FP8 with a kv_lora_rank that is not a multiple of 128.
    """
    if kv is None:
        dtype = E4M3 if config.use_fp8_kv else compute_dtype
    else:
        dtype = E4M3 if kv is KvFormat.FP8 else torch.bfloat16
    return LatentFormat(config.kv_lora_rank, config.qk_rope_head_dim, dtype)


def latent_width(config: ModelConfig) -> int:
    """Numbers cached per token and layer."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def expanded_width(config: ModelConfig) -> int:
    """Numbers that multi-head attention of the same heads would cache per token and layer."""
    return config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)


def bytes_per_token(config: ModelConfig, layout: LatentFormat, mtp_layers: int = 0) -> int:
    """Bytes of a token's rows in all main layers, and in the first `mtp_layers` MTP layers."""
    return (config.num_hidden_layers + mtp_layers) * layout.row_bytes


def expanded_bytes_per_token(config: ModelConfig, layout: LatentFormat, mtp_layers: int = 0) -> int:
    """Bytes that multi-head attention would cache of a token: in the type of the rows, bfloat16 beside FP8 rows."""
    itemsize = torch.bfloat16.itemsize if layout.is_fp8 else layout.dtype.itemsize
    return (config.num_hidden_layers + mtp_layers) * expanded_width(config) * itemsize


def pages_that_fit(config: ModelConfig, layout: LatentFormat, budget: int, mtp_layers: int = 0) -> int:
    """The number of pages, of all main layers and `mtp_layers` MTP layers, in `budget` bytes."""
    return max(0, budget) // (PAGE * bytes_per_token(config, layout, mtp_layers))


def pages_of(num_tokens: int) -> int:
    """The number of pages that hold this many tokens of one sequence."""
    return -(-num_tokens // PAGE)


def describe_cache(config: ModelConfig, layout: LatentFormat, mtp_layers: int = 0) -> str:
    """Bytes per token beside those of multi-head attention, for a log."""
    latent = bytes_per_token(config, layout, mtp_layers)
    expanded = expanded_bytes_per_token(config, layout, mtp_layers)
    name = "FP8" if layout.is_fp8 else str(layout.dtype).removeprefix("torch.")
    return (
        f"latent cache in {name}: {latent:,} bytes per token; multi-head attention would take {expanded:,}, "
        f"{expanded / latent:.3g} times as many"
    )


class PagePool:
    """The memory of the cache: pages of `PAGE` tokens, numbered alike in all layers.

    `pages`: of each main layer, and then of each of the first `mtp_layers` MTP layers, one tensor (P, T, L), or
    (P, T, row bytes) uint8 for FP8. A page has one owner or, if sequences share a beginning, several. What the pool
    holds is valid for the weights that computed it: a new pool is needed when the weights change. Therefore
    `absorbed` also keeps, for each layer, the up-projections of keys (H, N, C) and of values (H, V, C) in the type
    of the queries, which are cast once.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: LatentFormat,
        num_pages: int,
        device: torch.device,
        mtp_layers: int = 0,
    ) -> None:
        self.layout = layout
        self.device = device
        num_layers = config.num_hidden_layers + mtp_layers
        self.pages = [layout.empty_pages(num_pages, device) for _ in range(num_layers)]
        self.absorbed: dict[int, tuple[Tensor, Tensor]] = {}
        self.bytes_per_token = bytes_per_token(config, layout, mtp_layers)
        self._owners = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_pages(self) -> int:
        """All pages, free or not."""
        return len(self._owners)

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def owners(self, page: int) -> int:
        """How many sequences hold this page."""
        return self._owners[page]

    def require(self, number: int, num_tokens: int) -> None:
        """Raises CacheFullError if fewer than `number` pages are free, which `num_tokens` new tokens need."""
        if number > self.num_free:
            fp8 = " or an FP8 format" if self.layout.could_be_fp8 else ""
            raise CacheFullError(
                f"the latent cache is full: {num_tokens:,} more tokens need {number:,} pages of {PAGE} tokens, "
                f"found {self.num_free:,} of {self.num_pages:,} free, for {self.num_free * PAGE:,} tokens; run "
                f"fewer or shorter sequences, or give the cache more memory{fp8}"
            )

    def allocate(self, number: int) -> list[int]:
        """Takes free pages, whose rows may hold anything. Raises CacheFullError if there are too few."""
        self.require(number, number * PAGE)
        taken = [self._free.pop() for _ in range(number)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Gives each page one more owner. Raises ValueError for a page that has none."""
        for page in self._held(pages):
            self._owners[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Takes one owner from each page; a page without any is free again.

        Raises ValueError, and frees nothing, for a page that has no owner or is not of this pool.
        """
        for page in self._held(pages):
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)

    def copy(self, page: int) -> int:
        """Takes a page of its own for one owner of a shared page, with the same rows, and returns its number."""
        (own,) = self.allocate(1)
        for pages in self.pages:
            pages[own] = pages[page]
        self.free([page])
        return own

    def _held(self, pages: Iterable[int]) -> list[int]:
        """The pages, after the check that each has as many owners as it occurs."""
        held = list(pages)
        for page, count in Counter(held).items():
            if not 0 <= page < self.num_pages:
                raise ValueError(f"page {page} is not of this pool, whose pages are 0 to {self.num_pages - 1}")
            if self._owners[page] < count:
                raise ValueError(f"page {page} has {self._owners[page]} owners, expected at least {count}")
        return held
