"""FlashMLA's dense decoding on Hopper, from the libraries that a vLLM wheel contains, without vLLM itself.

`vllm/_flashmla_C.abi3.so` decodes bfloat16 caches, and `vllm/_flashmla_extension_C.abi3.so` caches of 8-bit
numbers with one scale for all. Both are looked for in the folders of `PYTHONPATH`. The order of the arguments is
that of vLLM 0.22.0. A schedule depends on the lengths alone, and a model computes it once for all its layers, so
the timed calls do not contain it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepseek_v3.benchmark.decode_benchmark import DecodePeer
from deepseek_v3.benchmark.decode_cases import SCALE, DecodeInputs, Outputs, Tolerance
from deepseek_v3.ops.fp8 import E4M3
from deepseek_v3.utils.errors import BenchmarkError

_CAUSAL = True


def bind_bf16(inputs: DecodeInputs) -> Callable[[], Outputs]:
    """The call with queries and cache in bfloat16. Raises BenchmarkError where it cannot run."""
    library = _load("_flashmla_C", inputs.pages.device)
    arguments = (
        inputs.q_BSHL,
        inputs.pages.unsqueeze(2),
        inputs.layout.rank,
        inputs.lengths_B,
        inputs.table_BM,
        SCALE,
        _CAUSAL,
    )
    schedule = library.dense_decode_fwd(*arguments, None, None, None)[2:4]

    def run() -> Outputs:
        out_BSHC, sums_BHS, *_ = library.dense_decode_fwd(*arguments, *schedule, None)
        return out_BSHC, sums_BHS.transpose(1, 2)

    return run


def bind_fp8(inputs: DecodeInputs) -> Callable[[], Outputs]:
    """The call with queries and cache in e4m3, all scales 1. Raises BenchmarkError where it cannot run."""
    library = _load("_flashmla_extension_C", inputs.pages.device)
    q_BSHL, pages = inputs.q_BSHL.to(E4M3), inputs.pages.unsqueeze(2).to(E4M3)
    rows = q_BSHL.shape[1] * q_BSHL.shape[2]
    rank, lengths_B, table_BM = inputs.layout.rank, inputs.lengths_B, inputs.table_BM
    schedule = library.get_mla_decoding_metadata_dense_fp8(lengths_B, rows, 1)
    scale = torch.ones(1, device=pages.device)

    def run() -> Outputs:
        out_BSHC, sums_BHS = library.fwd_kvcache_mla_fp8(
            q_BSHL, pages, rank, lengths_B, table_BM, SCALE, _CAUSAL, *schedule, scale, scale
        )
        return out_BSHC, sums_BHS.transpose(1, 2)

    return run


def _load(name: str, device: torch.device) -> Any:
    """The operations of a library. Raises BenchmarkError with the reason if it cannot be used on the device."""
    if device.type != "cuda":
        raise BenchmarkError("needs a CUDA device")
    if torch.cuda.get_device_capability(device) != (9, 0):
        raise BenchmarkError("needs a GPU of compute capability 9.0")
    file = f"vllm/{name}.abi3.so"
    path = next((Path(folder) / file for folder in sys.path if (Path(folder) / file).is_file()), None)
    if path is None:
        raise BenchmarkError(f"not installed: no {file} in the folders of PYTHONPATH")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be loaded: {error.__cause__ or error}") from error
    return getattr(torch.ops, name)


# Rounding a weight of the softmax to e4m3 changes it by up to 2⁻⁴ of itself, so the cosine difference of an output
# reaches (2⁻⁴)² / 2. vLLM's test allows log-sum-exps a cosine difference of 10⁻⁵, an error of 4 · 10⁻³ of each.
FLASH_MLA = DecodePeer(
    title="FlashMLA",
    bind={"bf16": bind_bf16, "fp8": bind_fp8},
    fp8_tolerance=Tolerance(output=None, cosine=2**-9, log_sum=(1e-6, 4e-3)),
    notes={"fp8": "576 bytes a token and one scale for all, queries in e4m3; ours has 656 bytes and four scales"},
)
