"""The chunked loss of a linear head against the plain one: values, gradients, and what it costs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deepseek_v3.ops.cross_entropy import (
    IGNORED,
    chunked,
    linear_argmax,
    linear_cross_entropy,
    reference_linear_cross_entropy,
)
from helpers.models import largest_difference

TOKENS, WIDTH, VOCABULARY = 13, 8, 31


def states_head_targets(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_TD = torch.randn(TOKENS, WIDTH, dtype=hidden_dtype, device=device, requires_grad=True)
    weight_VD = torch.randn(VOCABULARY, WIDTH, dtype=weight_dtype, device=device, requires_grad=True)
    return hidden_TD, weight_VD, torch.randint(VOCABULARY, (TOKENS,), device=device)


@pytest.fixture(params=[1, 2, 5, TOKENS], ids="{} chunks".format)
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the logits of all tokens take this many chunks, the last one shorter where that does not divide."""
    limit = -(-TOKENS * VOCABULARY // request.param)
    monkeypatch.setattr(chunked, "_CHUNK_LOGITS", {"cpu": limit, "cuda": limit})
    monkeypatch.setattr(chunked, "_LEAST_ROWS", 1)


def test_the_reference_is_the_negative_log_likelihood() -> None:
    hidden_TD, weight_VD, targets_T = states_head_targets(torch.float64, torch.float64, torch.device("cpu"))
    expected = -sum(
        torch.log(torch.exp(weight_VD[target] @ hidden_D) / torch.exp(weight_VD @ hidden_D).sum())
        for hidden_D, target in zip(hidden_TD, targets_T, strict=True)
    )
    assert largest_difference(reference_linear_cross_entropy(hidden_TD, weight_VD, targets_T), expected) < 1e-12


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.02),
        (torch.bfloat16, torch.bfloat16, 0.02),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_chunks(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    hidden_TD, weight_VD, targets_T = states_head_targets(hidden_dtype, weight_dtype, device)
    wide = [x.detach().to(hidden_dtype).double().requires_grad_() for x in (hidden_TD, weight_VD)]
    expected = reference_linear_cross_entropy(*wide, targets_T)

    loss = linear_cross_entropy(hidden_TD, weight_VD, targets_T)

    assert loss.dtype == torch.promote_types(hidden_dtype, torch.float32)
    gradients = torch.autograd.grad(loss, (hidden_TD, weight_VD))
    assert [g.dtype for g in gradients] == [hidden_dtype, weight_dtype]
    expected_gradients = torch.autograd.grad(expected, wide)
    for found, exact in zip((loss, *gradients), (expected, *expected_gradients), strict=True):
        assert largest_difference(found.double(), exact) <= tolerance * exact.abs().max()


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("ignored", [[0], [1, 5, 6, 12], list(range(TOKENS))], ids=str)
def test_ignored_targets_have_no_loss_and_no_gradient(ignored: list[int], device: torch.device) -> None:
    hidden_TD, weight_VD, targets_T = states_head_targets(torch.float64, torch.float64, device)
    kept = [token for token in range(TOKENS) if token not in ignored]
    expected = reference_linear_cross_entropy(hidden_TD[kept], weight_VD, targets_T[kept])
    expected_gradients = torch.autograd.grad(expected, (hidden_TD, weight_VD))
    targets_T[ignored] = IGNORED

    with torch.no_grad():
        assert largest_difference(linear_cross_entropy(hidden_TD, weight_VD, targets_T), expected) < 1e-12
    for operation in (linear_cross_entropy, reference_linear_cross_entropy):
        loss = operation(hidden_TD, weight_VD, targets_T)
        gradients = torch.autograd.grad(loss, (hidden_TD, weight_VD))
        for found, exact in zip((loss, *gradients), (expected, *expected_gradients), strict=True):
            assert largest_difference(found, exact) < 1e-12


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_far_from_zero_lose_nothing(offset: float) -> None:
    """An offset that all logits share changes neither the loss nor its gradients."""
    hidden_TD, weight_VD, targets_T = states_head_targets(torch.float64, torch.float64, torch.device("cpu"))
    shifted_TD = torch.cat((hidden_TD, torch.full((TOKENS, 1), offset, dtype=torch.float64)), dim=1)
    widened_VD = torch.cat((weight_VD, torch.ones(VOCABULARY, 1, dtype=torch.float64)), dim=1)

    plain = linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    shifted = linear_cross_entropy(shifted_TD, widened_VD, targets_T)

    assert largest_difference(shifted, plain) < 1e-8
    inputs = (hidden_TD, weight_VD)
    for found, expected in zip(
        torch.autograd.grad(shifted, inputs), torch.autograd.grad(plain, inputs), strict=True
    ):
        assert largest_difference(found, expected) < 1e-8


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_any_size_stay_finite_in_float32(size: float) -> None:
    hidden_TD = torch.full((2, 1), size, requires_grad=True)
    weight_VD = torch.linspace(-1, 1, 5)[:, None].requires_grad_()
    targets_T = torch.tensor([0, 4])

    loss = linear_cross_entropy(hidden_TD, weight_VD, targets_T)

    assert loss.item() == pytest.approx(2e4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden_TD, weight_VD)))


@pytest.mark.usefixtures("_chunks")
def test_without_gradients_the_loss_is_the_same(device: torch.device) -> None:
    hidden_TD, weight_VD, targets_T = states_head_targets(torch.float32, torch.float32, device)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    assert not loss.requires_grad
    expected = reference_linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    assert largest_difference(loss, expected) < 1e-5 * expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_logits_are_multiplied(mode: type) -> None:
    """Evaluation runs on trainable weights; it must not pay for gradients that nobody asks for."""
    inputs = states_head_targets(torch.float32, torch.float32, torch.device("cpu"))
    with mode(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(*inputs)
    assert counter.get_total_flops() == 2 * TOKENS * WIDTH * VOCABULARY


def test_a_head_used_twice_in_one_graph_sums_its_gradients() -> None:
    hidden_TD, weight_VD, targets_T = states_head_targets(torch.float64, torch.float64, torch.device("cpu"))

    def two_losses(cross_entropy: object) -> Tensor:
        first = cross_entropy(hidden_TD, weight_VD, targets_T)
        second = cross_entropy(hidden_TD.tanh()[:-1], weight_VD, targets_T[1:])
        return 0.7 * first + 0.3 * second / TOKENS

    inputs = (hidden_TD, weight_VD)
    found = torch.autograd.grad(two_losses(linear_cross_entropy), inputs)
    expected = torch.autograd.grad(two_losses(reference_linear_cross_entropy), inputs)
    for one, other in zip(found, expected, strict=True):
        assert largest_difference(one, other) < 1e-12


@pytest.mark.parametrize("factor", [0.0, 0.7])
def test_going_back_twice_through_one_graph(factor: float) -> None:
    """As a zero-bubble pipeline does. The factor is 0 for a prediction loss without weight."""
    inputs = states_head_targets(torch.float64, torch.float64, torch.device("cpu"))
    loss = factor * linear_cross_entropy(*inputs)
    (expected,) = torch.autograd.grad(reference_linear_cross_entropy(*inputs), inputs[1])
    torch.autograd.grad(loss, inputs[0], retain_graph=True)
    (found,) = torch.autograd.grad(loss, inputs[1])
    assert largest_difference(found, factor * expected) < 1e-12


def test_gradients_accumulate_over_micro_batches() -> None:
    hidden_TD, weight_VD, targets_T = states_head_targets(torch.float64, torch.float64, torch.device("cpu"))
    linear_cross_entropy(hidden_TD, weight_VD, targets_T).backward()
    (linear_cross_entropy(hidden_TD, weight_VD, targets_T) * 3).backward()
    (gradient,) = torch.autograd.grad(reference_linear_cross_entropy(hidden_TD, weight_VD, targets_T), weight_VD)
    assert weight_VD.grad is not None
    assert largest_difference(weight_VD.grad, 4 * gradient) < 1e-12


@pytest.mark.parametrize("frozen", [0, 1], ids=["states", "head"])
def test_one_side_may_need_no_gradient(frozen: int) -> None:
    hidden_TD, weight_VD, targets_T = states_head_targets(torch.float64, torch.float64, torch.device("cpu"))
    inputs = [hidden_TD, weight_VD]
    (expected,) = torch.autograd.grad(
        reference_linear_cross_entropy(hidden_TD, weight_VD, targets_T), inputs[1 - frozen]
    )
    inputs[frozen] = inputs[frozen].detach()
    (found,) = torch.autograd.grad(linear_cross_entropy(*inputs, targets_T), inputs[1 - frozen])
    assert largest_difference(found, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [(0.0, 0.0), (0.0, 2.0, 0.25), (0.25, 0.0, 2.0), (1e-30, 2.0)], ids=str)
@pytest.mark.parametrize("asked", ["both", "halves", "halves, weight first"])
def test_every_backward_pass_of_one_graph_is_right(
    dtype: torch.dtype, factors: tuple[float, ...], asked: str, device: torch.device
) -> None:
    """A pipeline may go back to the states first, to the weights later; a loss of weight 0 has a gradient of 0."""
    hidden_TD, weight_VD, targets_T = states_head_targets(dtype, dtype, device)
    inputs = {"states": hidden_TD, "weight": weight_VD}
    loss = linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    exact = torch.autograd.grad(linear_cross_entropy(hidden_TD, weight_VD, targets_T), (hidden_TD, weight_VD))
    unscaled = dict(zip(inputs, exact, strict=True))
    passes = {"both": [["states", "weight"]], "halves": [["states"], ["weight"]]}.get(
        asked, [["weight"], ["states"]]
    )
    steps = [(factor, names) for factor in factors for names in passes]
    found = []
    for number, (factor, names) in enumerate(steps, start=1):
        upstream = torch.full_like(loss, factor)
        retain = number < len(steps)
        found.append(torch.autograd.grad(loss, [inputs[name] for name in names], upstream, retain_graph=retain))
    for (factor, names), gradients in zip(
        steps, found, strict=True
    ):  # at the end: later passes must not touch them
        for name, gradient in zip(names, gradients, strict=True):
            torch.testing.assert_close(
                gradient, unscaled[name] * factor, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=0
            )


def test_one_backward_pass_scales_where_the_gradient_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second matrix of the vocabulary's size would be the largest tensor of the step."""
    hidden_TD, weight_VD, targets_T = states_head_targets(torch.float32, torch.float32, torch.device("cpu"))
    summed: list[Tensor] = []
    accumulate = chunked._accumulate_product

    def remember(total_VD: Tensor, *factors: Tensor) -> None:
        summed.append(total_VD)
        accumulate(total_VD, *factors)

    monkeypatch.setattr(chunked, "_accumulate_product", remember)
    loss = linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    (gradient,) = torch.autograd.grad(0.5 * loss, [weight_VD])
    assert gradient.data_ptr() == summed[0].data_ptr()


def test_no_tokens_make_no_loss() -> None:
    inputs = torch.zeros(0, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.zeros(0, dtype=torch.int64)
    assert reference_linear_cross_entropy(*inputs).item() == 0
    assert linear_cross_entropy(*inputs).item() == 0


@pytest.mark.parametrize(
    ("tokens", "words", "device_type", "rows"),
    [
        (16384, 129280, "cuda", 2048),  # eight chunks of half a gigabyte
        (8192, 512, "cpu", 2048),
        (4096, 129280, "cpu", 256),  # not eight rows at a time, each time with the whole head
        (100, 129280, "cpu", 100),
        (1, 7, "cpu", 1),
    ],
)
def test_a_chunk_is_small_but_worth_its_pass_over_the_head(
    tokens: int, words: int, device_type: str, rows: int
) -> None:
    assert chunked._chunk_size(tokens, words, device_type) == rows


@pytest.fixture
def kernels(triton_device: torch.device) -> tuple[Any, torch.device]:
    """The Triton back end and where it runs."""
    from deepseek_v3.ops.cross_entropy import triton

    return triton, triton_device


def logits_and_targets(
    words: int, offset: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Five rows that lie apart in memory full of NaN; one has no target, one the first word, one the last."""
    memory = torch.full((6, words + 3), torch.nan, dtype=dtype, device=device)
    logits_TV = memory[1:, :words]
    logits_TV.copy_(4 * torch.randn(5, words) + offset)
    return logits_TV, torch.tensor([0, words - 1, IGNORED, words // 2, 0], device=device)


def exact_losses(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    wide_TV = logits_TV.double().requires_grad_()
    losses_T = torch.nn.functional.cross_entropy(wide_TV, targets_T, reduction="none", ignore_index=IGNORED)
    return losses_T.detach(), torch.autograd.grad(losses_T.sum(), wide_TV)[0]


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        (1, torch.float32),
        (31, torch.float32),
        (65536, torch.float32),
        (40_003, torch.bfloat16),
        (4096, torch.float16),
    ],
)
def test_the_kernel_s_losses_and_gradients_are_those_of_float64(
    kernels: tuple[Any, torch.device], words: int, dtype: torch.dtype, offset: float
) -> None:
    """One word, less than a step of a pass, whole steps, and steps with a rest; offsets that all logits share."""
    ops, device = kernels
    logits_TV, targets_T = logits_and_targets(words, offset, dtype, device)
    losses_T, gradient_TV = exact_losses(logits_TV, targets_T)
    around = logits_TV._base.clone()
    found_T = ops.losses_of_rows(logits_TV, targets_T, with_gradient=False)
    assert torch.equal(logits_TV, around[1:, :words])

    again_T = ops.losses_of_rows(logits_TV, targets_T, with_gradient=True)

    assert torch.equal(found_T, again_T)
    torch.testing.assert_close(found_T.double(), losses_T, rtol=1e-5, atol=2e-6)
    rounding = max(1e-5, 0.52 * torch.finfo(dtype).eps)
    torch.testing.assert_close(logits_TV.double(), gradient_TV, rtol=rounding, atol=1e-6)
    assert logits_TV[2].eq(0).all()
    around[1:, :words] = logits_TV
    assert torch.equal(logits_TV._base.nan_to_num(7.0), around.nan_to_num(7.0))  # nothing outside was written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_chunks")
def test_the_most_probable_id_is_the_lowest_of_equal_ones(dtype: torch.dtype) -> None:
    # Whole numbers, whose products are exact in both types and often equal.
    hidden_TD = torch.randint(-1, 2, (TOKENS, 3)).to(dtype)
    weight_VD = torch.randint(-1, 2, (VOCABULARY, 3)).float().requires_grad_()
    found_T = linear_argmax(hidden_TD, weight_VD)
    rows_TV = (hidden_TD.double() @ weight_VD.double().T).tolist()
    assert found_T.dtype == torch.int64
    assert found_T.tolist() == [row.index(max(row)) for row in rows_TV]
    assert any(row.count(max(row)) > 1 for row in rows_TV)
    assert linear_argmax(hidden_TD[:0], weight_VD).shape == (0,)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_kernel_makes_the_loss_nan_if_a_logit_is_not_finite(
    kernels: tuple[Any, torch.device], bad: float
) -> None:
    """And only the loss of that row; the same for a target that is no word."""
    ops, device = kernels
    logits_TV, targets_T = logits_and_targets(40, 0.0, torch.float32, device)
    logits_TV[1, 7], logits_TV[2, 7], targets_T[4] = bad, bad, 40
    losses_T = ops.losses_of_rows(logits_TV, targets_T, with_gradient=True)
    assert losses_T.isnan().tolist() == [False, True, False, False, True]
    assert logits_TV[2].eq(0).all()


def test_the_kernel_s_loss_of_a_head_is_that_of_plain_torch(kernels: tuple[Any, torch.device]) -> None:
    ops, device = kernels
    hidden_TD, weight_VD, targets_T = states_head_targets(torch.bfloat16, torch.float32, device)
    targets_T[3] = IGNORED
    found = ops.linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    expected = linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    inputs = (hidden_TD, weight_VD)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(found, inputs)
    for one, other in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert largest_difference(one.float(), other.float()) < 0.02 * other.abs().max()
    assert ops.linear_cross_entropy(hidden_TD[:0], weight_VD, targets_T[:0]).item() == 0
