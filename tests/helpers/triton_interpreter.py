"""Triton's interpreter on a CPU, with conversions, products and fused operations that round as a GPU rounds.

The interpreter of Triton 3.6 rounds float32 to bfloat16 towards zero, and to e4m3 at ties away from zero, without
the carry into the exponent and without rounding subnormal numbers. It rounds the product of a fused multiply-add,
and multiplies the bits of bfloat16 matrices as if they were integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch


@contextmanager
def round_as_a_gpu() -> Iterator[None]:
    """Mends the interpreter: conversions between float types are torch's, a multiply-add rounds once, and bfloat16
    matrices are multiplied as float32 ones.
    """
    from triton.runtime import interpreter

    convert, builder = interpreter._convert_float, interpreter.InterpreterBuilder
    multiply = builder.create_dot
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn}
    storage = {1: np.uint8, 2: np.uint16, 4: np.uint32}

    def converted(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source.name not in types or target.name not in types:
            return convert(data, source, target, rounding_mode)
        bits = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8))
        found = bits.view(types[source.name]).to(types[target.name])
        return found.view(torch.uint8).numpy().view(storage[found.element_size()]).reshape(data.shape)

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        wide = x.data.astype(np.float64) * y.data + z.data  # the product of two float32 is exact in float64
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    def product(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return multiply(self, wide(a), wide(b), d, *options)

    def wide(x: Any) -> Any:
        if x.dtype.scalar.name != "bf16":
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    with (
        patch.object(interpreter, "_convert_float", converted),
        patch.object(builder, "create_fma", fused),
        patch.object(builder, "create_dot", product),
    ):
        yield
