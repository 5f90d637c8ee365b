"""Weights under the names of the released Hugging Face checkpoint, to and from this project's model."""

from deepseek_v3.interop.huggingface.export_weights import released_state
from deepseek_v3.interop.huggingface.import_weights import load_released
from deepseek_v3.interop.huggingface.names import to_released_names

__all__ = ["load_released", "released_state", "to_released_names"]
