"""Functions as operations of torch: called, traced by the compiler, and described without their values."""

import pytest
import torch
from torch import Tensor

from deepseek_v3.ops.operation import custom_op, fake_of

calls: list[tuple[int, ...]] = []


@custom_op("test_scaled")
def _scaled(x_TD: Tensor, factor: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    calls.append(tuple(x_TD.shape))
    return (x_TD * factor).to(dtype or x_TD.dtype), x_TD.sum(-1)


@fake_of(_scaled)
def _empty_scaled(x_TD: Tensor, factor: float, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape, dtype=dtype or x_TD.dtype), x_TD.new_empty(x_TD.shape[:-1])


def test_an_operation_is_the_function_it_was_made_of() -> None:
    x = torch.arange(6.0).view(2, 3)
    scaled, sums = _scaled(x, 2.0, torch.float64)
    assert scaled.dtype == torch.float64
    assert torch.equal(scaled, (2 * x).double())
    assert torch.equal(sums, x.sum(-1))
    assert torch.ops.deepseek_v3.test_scaled.default is _scaled


def test_the_compiler_keeps_an_operation_in_one_graph() -> None:
    """It runs once for each call of the compiled code; tracing runs its fake."""

    def step(x: Tensor) -> Tensor:
        return _scaled(x + 1, 3.0, None)[0].relu()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    calls.clear()
    x = torch.randn(4, 5)
    assert torch.equal(compiled(x), step(x))
    assert calls == [(4, 5), (4, 5)]


def test_a_fake_gives_shapes_and_types_alone() -> None:
    calls.clear()
    scaled, sums = _scaled(torch.empty(7, 2, device="meta"), 1.0, torch.bfloat16)
    assert (scaled.shape, scaled.dtype, sums.shape) == ((7, 2), torch.bfloat16, (7,))
    assert not calls


def test_an_unknown_type_of_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="infer_schema"):

        @custom_op("test_unknown")
        def _unknown(x: object) -> Tensor:
            return torch.zeros(1)


def test_the_schema_is_sound() -> None:
    torch.library.opcheck(_scaled, (torch.randn(3, 2), 2.0, None))
