"""Experts on several ranks: the one part of the model that knows of `torch.distributed`.

`expert_dispatcher` gives a layer its way to them: through torch.distributed (`all_to_all.py`, in the steps of
`hops.py`) or through DeepEP (`library.py`).
"""

from deepseek_v3.moe.deepep.all_to_all import AllToAllDispatcher
from deepseek_v3.moe.deepep.buffers import Traffic
from deepseek_v3.moe.deepep.choice import expert_dispatcher
from deepseek_v3.moe.deepep.hops import Hop

__all__ = ["AllToAllDispatcher", "Hop", "Traffic", "expert_dispatcher"]
