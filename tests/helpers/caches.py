"""Pools of pages for the latent cache whose unwritten rows show when they are read."""

import torch

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.kv_compression import KvFormat, PagePool, latent_format


def poisoned_pool(
    config: ModelConfig, num_pages: int = 16, dtype: torch.dtype = torch.float64, kv: KvFormat | None = None
) -> PagePool:
    """A pool on the CPU whose memory is NaN."""
    return poisoned(PagePool(config, latent_format(config, dtype, kv), num_pages, torch.device("cpu")))


def poisoned(pool: PagePool) -> PagePool:
    """The pool, after its memory was set to NaN."""
    for pages in pool.pages:
        pages.fill_(255 if pool.layout.is_fp8 else float("nan"))  # 255 is NaN in e4m3, and 65535 in bfloat16
    return pool
