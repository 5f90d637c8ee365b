"""The most probable token of each row: the kernel against the reference, with ties, signs, NaN and infinity."""

import pytest
import torch

from deepseek_v3.ops.greedy_choice import greedy_choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 300, 4099])
def test_the_lowest_of_the_most_probable_ids_is_chosen(
    triton_device: torch.device, dtype: torch.dtype, vocabulary: int
) -> None:
    from deepseek_v3.ops.greedy_choice import triton

    logits_BV = torch.randn(9, vocabulary + 5, device=triton_device).to(dtype)[:, :vocabulary]
    logits_BV[1] = -3
    logits_BV[2] = 0
    logits_BV[2, : vocabulary // 2] = -0.0
    logits_BV[3] -= 100
    for row, value in ((4, torch.nan), (5, torch.inf), (6, -torch.inf)):
        logits_BV[row, vocabulary // 3] = value
    tokens_B = triton.greedy_choice(logits_BV)
    assert torch.equal(tokens_B, greedy_choice(logits_BV))
    assert tokens_B[1:3].tolist() == [0, 0]
    assert tokens_B[4:7].tolist() == [-1] * 3
    assert torch.equal(triton.greedy_choice(logits_BV[:0]), tokens_B[:0])
