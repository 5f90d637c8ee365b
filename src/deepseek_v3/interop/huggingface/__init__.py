"""Models in Hugging Face's format: released checkpoints in, and what we train out."""

from deepseek_v3.interop.huggingface.export_weights import released_state
from deepseek_v3.interop.huggingface.import_weights import load_released
from deepseek_v3.interop.huggingface.names import to_released_names
from deepseek_v3.interop.huggingface.pretrained_folder import load_pretrained, save_pretrained

__all__ = ["load_pretrained", "load_released", "released_state", "save_pretrained", "to_released_names"]
