"""The small files of a Hugging Face directory: config, generation config and tokenizer, written from a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepseek_v3.config.model_config import ModelConfig, RopeScaling
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.data.tokens.tokenizer_config import special_token, write_tokenizer_config
from deepseek_v3.utils.files import write_synced

# Without these, Transformers would take the ids 0 and 1 of the released tokenizer.
_NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # reads any tokenizer.json as it is
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


def released_config(config: ModelConfig, dtype: str, quantization: dict[str, Any] | None = None) -> dict[str, Any]:
    """The fields of `config.json`, under the names of the release, which every loader of this architecture reads.

    `dtype` is the type of the weights that are not quantized, such as `bfloat16`; `quantization` becomes the
    `quantization_config`. `use_fp8_kv` is left out, because other loaders have options of their own for it.
    """
    fields = config.model_dump(mode="json", exclude={"rope_scaling", "use_fp8_kv"})
    fields |= {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": config.num_attention_heads,
        "rope_scaling": None if config.rope_scaling is None else _released_scaling(config.rope_scaling),
        "torch_dtype": dtype,
        "use_cache": True,
        **_NO_IDS,
    }
    return fields if quantization is None else {**fields, "quantization_config": quantization}


def _released_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """YaRN's fields; `type` is what releases write, `rope_type` what newer loaders look for."""
    fields = scaling.model_dump(mode="json")
    return {"type": fields["rope_type"], **fields}


def write_configs(
    folder: Path, fields: dict[str, Any], tokenizer: Tokenizer | None, max_position_embeddings: int
) -> None:
    """Writes `config.json` and, with a tokenizer, `generation_config.json` and the tokenizer's files."""
    if tokenizer is None:
        _write(folder / CONFIG, fields)
        return
    ids = _special_ids(tokenizer)
    _write(folder / CONFIG, {**fields, **ids})
    _write(folder / GENERATION_CONFIG, ids)
    tokenizer.save(folder / "tokenizer.json")
    write_tokenizer_config(folder, tokenizer_config(tokenizer, max_position_embeddings))


def tokenizer_config(tokenizer: Tokenizer, max_position_embeddings: int) -> dict[str, Any]:
    """The fields of `tokenizer_config.json`: those of the tokenizer, if it has any, else those of plain text.

    Its `eos_token` is the tokenizer's end-of-text marker.

    A tokenizer without a config, such as one that was trained here, never turns text into a marker:
    `split_special_tokens` has Transformers encode the name of a marker like any other text, too.
    """
    end_of_text, config = tokenizer.token(tokenizer.end_of_text), tokenizer.config or {}
    if not config.keys() & {"tokenizer_class", "chat_template"}:  # none, or only the marker that a corpus kept
        return {
            "tokenizer_class": _TOKENIZER_CLASS,
            "pad_token": end_of_text,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_position_embeddings,
            "split_special_tokens": True,
            **config,
            "eos_token": end_of_text,
        }
    fields = {"tokenizer_class": _TOKENIZER_CLASS, **config}
    return fields if special_token(fields, "eos_token") == end_of_text else {**fields, "eos_token": end_of_text}


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids at which generation stops, and that of the begin-of-text marker if there is one.

    A tokenizer may have such a marker without putting it before prompts.
    """
    ends = list(tokenizer.ends)
    ids: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    marker = special_token(tokenizer.config or {}, "bos_token")
    if tokenizer.prompt_start:
        return {"bos_token_id": tokenizer.prompt_start[0], **ids}
    if marker is not None and tokenizer.token(tokenizer.text_start) == marker:
        return {"bos_token_id": tokenizer.text_start, **ids}
    return ids


def _write(path: Path, fields: dict[str, Any]) -> None:
    write_synced(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
