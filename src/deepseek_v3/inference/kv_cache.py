"""The latent cache of a generation: its format, what fits in the memory of the device, and its pool of pages."""

from __future__ import annotations

from deepseek_v3.mla.kv_compression import KvFormat, PagePool, describe_cache, latent_format, pages_that_fit
from deepseek_v3.model.backends import free_bytes
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.mla_decode.formats import PAGE
from deepseek_v3.utils.logging import get_logger

_SHARE = 0.9  # of the free memory; the activations of a forward pass need the rest

_log = get_logger("Cache")


class KvCache:
    """Makes the pools of pages in which a model caches latents.

    `kv` is the format of the rows; None follows the model's config. `layout` is what follows from it, and
    `compute_dtype` the type in which the model computes. The first `mtp_layers` MTP layers have rows, too. Raises
    ConfigError for FP8 rows of a latent whose width is not a multiple of 128.
    """

    def __init__(self, model: DeepSeekV3, kv: KvFormat | None = None, mtp_layers: int = 0) -> None:
        self._config, self._mtp_layers = model.config, mtp_layers
        self._device = model.head_weight_VD.device
        self.compute_dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
        self.layout = latent_format(model.config, self.compute_dtype, kv)
        self._is_logged = False

    def pages_that_fit(self) -> int:
        """How many pages fit in the memory that is free now; the first call also logs it."""
        free = free_bytes(self._device)
        number = pages_that_fit(self._config, self.layout, int(_SHARE * free), self._mtp_layers)
        if not self._is_logged:
            self._is_logged = True
            _log.info(
                f"{describe_cache(self._config, self.layout, self._mtp_layers)}; {number * PAGE:,} tokens fit in "
                f"{_SHARE:.0%} of the {free / 2**30:.1f} GiB that are free"
            )
        return number

    def new_pool(self, num_pages: int) -> PagePool:
        """A pool of this many pages."""
        return PagePool(self._config, self.layout, num_pages, self._device, self._mtp_layers)
