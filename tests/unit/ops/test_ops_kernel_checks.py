"""The checks of the built kernels: they accept right results and notice wrong ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepseek_v3.ops.fp8 import Fp8Quantize
from deepseek_v3.ops.fp8 import reference as fp8_reference
from deepseek_v3.ops.fp8_gemm import cuda as fp8_gemm_cuda
from deepseek_v3.ops.fp8_gemm import reference as gemm_reference
from deepseek_v3.ops.fp8_gemm.cuda.check import check as check_fp8_gemm
from deepseek_v3.ops.grouped_gemm import reference as grouped_gemm_reference
from deepseek_v3.ops.grouped_gemm.cuda.check import check as check_grouped_gemm
from deepseek_v3.ops.mla_decode import reference as mla_decode_reference

CPU = torch.device("cpu")
H200 = 132  # its multiprocessors


def check_fp8(kernels: Any) -> list[bool]:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    from deepseek_v3.ops.fp8.cuda.check import check

    quantize: Fp8Quantize = kernels
    return [holds for _, holds in check(CPU, quantize)]


def check_gemm(kernels: Any) -> list[bool]:
    return [holds for _, holds in check_fp8_gemm(CPU, kernels, wide_rows=600)]


def check_mla_decode(kernels: Any) -> list[bool]:
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    from deepseek_v3.ops.mla_decode.cuda.check import check

    return [holds for _, holds in check(CPU, kernels, lengths=[0, 65, 200])]


def check_weight_gradient(kernels: Any) -> list[bool]:
    return [holds for _, holds in check_grouped_gemm(CPU, kernels.weight_gradient)]


def changed(reference: Any, name: str, place: int | None = None) -> SimpleNamespace:
    """The reference with one function that gives one wrong number: in its result `place`, if it has several."""

    def changed_function(*given: Any) -> Any:
        found = getattr(reference, name)(*given)
        tensor = found if place is None else found[place]
        if isinstance(tensor, tuple):
            scales = tensor[1].view(-1)
            scales[0] *= 1.5
        else:
            numbers = tensor.view(-1)
            numbers[numbers.abs().argmax()] *= 1.5
        return found

    names = [each for each in dir(reference) if not each.startswith("_")]
    return SimpleNamespace(**{each: getattr(reference, each) for each in names} | {name: changed_function})


def test_references_pass_the_checks() -> None:
    assert all(check_gemm(gemm_reference))
    assert all(check_fp8(fp8_reference))
    assert all(check_mla_decode(mla_decode_reference))
    assert all(check_weight_gradient(grouped_gemm_reference))


@pytest.mark.parametrize("name", ["rows_product", "columns_product"])
def test_a_wrong_product_is_noticed(name: str) -> None:
    assert check_gemm(changed(gemm_reference, name)).count(False) == 4


def test_a_wrong_weight_gradient_is_noticed() -> None:
    assert not any(check_weight_gradient(changed(grouped_gemm_reference, "weight_gradient")))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("quantize_columns", 1),
        ("quantize_both", 0),
        ("quantize_both", 1),
        ("gather_columns", 1),
        ("swiglu_backward", 0),
        ("swiglu_backward", 1),
        ("swiglu_backward", 2),
        ("swiglu_backward", 3),
    ],
)
def test_a_wrong_scale_or_gradient_is_noticed(name: str, place: int) -> None:
    assert check_fp8(changed(fp8_reference, name, place)).count(False) == 2


@pytest.mark.parametrize("place", [0, 1])
def test_a_wrong_result_of_decoding_is_noticed(place: int) -> None:
    def wrong(*given: Any) -> Any:
        found = mla_decode_reference.mla_decode(*given)
        found[place][-1] *= 1.05
        return found

    assert not any(check_mla_decode(SimpleNamespace(mla_decode=wrong)))


def test_products_of_the_checks_take_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any Hopper GPU, so that each variant is launched."""
    for multiprocessors in (78, 114, H200):
        monkeypatch.setattr(fp8_gemm_cuda, "multiprocessors", lambda _, number=multiprocessors: number)
        fp8_gemm_cuda._tile_columns.cache_clear()
        for added in (0, 1):  # `_rows_product` adds a tile for three groups
            assert fp8_gemm_cuda._tile_columns(3 + added, 144, CPU) == 128
            assert fp8_gemm_cuda._tile_columns(multiprocessors - 1 + added, 256, CPU) == 256
    fp8_gemm_cuda._tile_columns.cache_clear()
