"""The places of the largest numbers of each row, in plain torch."""

from torch import Tensor


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """The columns of the k largest numbers of each row, the largest first; int64 (T, k), without a gradient.

    NaN counts as the largest number. Which of equal numbers comes first depends on the back end.
    """
    return scores_TE.detach().topk(k, dim=-1).indices
