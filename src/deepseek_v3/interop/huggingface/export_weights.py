"""Returns a model's weights under the names of the released checkpoint."""

from __future__ import annotations

from torch import Tensor

from deepseek_v3.interop.huggingface.names import shared_copies, to_released_names
from deepseek_v3.model.transformer import DeepSeekV3


def released_state(model: DeepSeekV3) -> dict[str, Tensor]:
    """Every weight and routing bias of `model` by released name, detached and contiguous, as safetensors needs it.

    Experts are views of their stacks, which do not overlap. The copies of embedding and head in MTP layers are
    cloned.
    """
    released = to_released_names(model.config, model.state_dict())
    copies = shared_copies(model.config).keys()
    return {name: t.clone() if name in copies else t.contiguous() for name, t in released.items()}
