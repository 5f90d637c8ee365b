"""The shape of a DeepSeek-V3 model, under the field names of the released `config.json`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, ValidationError, model_validator

from deepseek_v3.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Real, Section
from deepseek_v3.config.errors import describe_errors
from deepseek_v3.config.text_files import printable_path, read_json_object
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.text import format_value

# Architectures, and names of model types, whose models are those of DeepSeek-V3: Kimi-K2 and Moonlight differ in
# numbers only.
_ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV3Model")
_MODEL_TYPES = ("deepseek_v3", "kimi_k2", "moonlight")
# Fields of a released config.json, or of one that Transformers or a fine-tuning tool wrote, that do not shape the
# model: bookkeeping, hints for serving and generation, the format of the weights, the import table of modules.
_WITHOUT_EFFECT = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures auto_map "
    "aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping "
    "encoder_no_repeat_ngram_size eos_token_id ep_size experts_implementation exponential_decay_length_penalty "
    "finetuning_task forced_bos_token_id forced_eos_token_id head_dim id2label is_decoder is_encoder_decoder "
    "keys_to_ignore_at_inference label2id length_penalty max_length min_length model_type no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_router_logits "
    "output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads quantization_config "
    "remove_invalid_values repetition_penalty return_dict return_dict_in_generate router_aux_loss_coef "
    "sep_token_id seq_aux suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder "
    "tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unsloth_fixed "
    "unsloth_version use_bfloat16 use_cache".split()
)
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}  # the quantization that is read
_FP8_BLOCK = 128  # numbers of a latent that share a scale in an FP8 cache
# Newer names of fields, as attributes of Transformers' config.
_NEWER_NAMES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}

# The defaults of Transformers' DeepseekV3Config, for fields that a config.json lacks.
_TRANSFORMERS_DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}


class RopeScaling(Section):
    """YaRN (arXiv:2309.00071): extends rotary positions beyond the length of pre-training.

    A frequency that turns more than `beta_fast` times over the original length is kept, one that turns less than
    `beta_slow` times is divided by `factor`, and those between are interpolated.
    """

    rope_type: Literal["yarn"] = Field(default="yarn", validation_alias=AliasChoices("rope_type", "type"))
    factor: Annotated[Real, Field(ge=1)]
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: Annotated[Real, Field(ge=0)] = 1.0
    mscale_all_dim: Annotated[Real, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast = {self.beta_fast} must not be below beta_slow = {self.beta_slow}")
        return self


class ModelConfig(Section):
    """Every number that shapes the model (DeepSeek-V3 technical report, arXiv:2412.19437, §2 and §4.2).

    Fields without a default must be given. `num_nextn_predict_layers` is the depth of multi-token prediction.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: Annotated[PositiveInt, Field(le=1024)]
    first_k_dense_replace: NonNegativeInt
    intermediate_size: PositiveInt

    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt

    n_routed_experts: Annotated[PositiveInt, Field(le=2**16)]
    n_shared_experts: NonNegativeInt = 1
    num_experts_per_tok: PositiveInt
    moe_intermediate_size: PositiveInt
    n_group: PositiveInt = 1
    topk_group: PositiveInt = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: PositiveFloat = 1.0

    num_nextn_predict_layers: Annotated[NonNegativeInt, Field(le=64)] = 0
    tie_word_embeddings: bool = False
    initializer_range: PositiveFloat = 0.006
    rms_norm_eps: Annotated[PositiveFloat, Field(ge=1e-30)] = 1e-6  # 0 in float32 would make zeros NaN
    max_position_embeddings: PositiveInt = 4096
    rope_theta: Annotated[Real, Field(gt=1)] = 10000.0
    rope_scaling: RopeScaling | None = None
    use_fp8_kv: bool = False  # of this project: the format of the latent cache in generation

    # The released file names these choices; this project implements exactly one of each.
    hidden_act: Literal["silu"] = "silu"
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    attention_bias: Literal[False] = False
    attention_dropout: Annotated[Real, Field(ge=0, le=0)] = 0.0
    moe_layer_freq: Literal[1] = 1
    rope_interleave: Literal[True] = True

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without position plus the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model; each multi-token prediction module adds one more."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0; MTP modules follow the main layers) holds experts."""
        return layer >= self.first_k_dense_replace

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        self._check_attention()
        self._check_experts()
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace = {self.first_k_dense_replace} is more than "
                f"num_hidden_layers = {self.num_hidden_layers}"
            )
        return self

    def _check_attention(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim = {self.qk_rope_head_dim} must be even: rotary embedding turns pairs"
            )
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} must equal num_attention_heads = "
                f"{self.num_attention_heads} or be left out: latent attention shares the latent, not the heads"
            )
        if self.use_fp8_kv and self.kv_lora_rank % _FP8_BLOCK:
            raise ValueError(
                f"use_fp8_kv = true needs a kv_lora_rank that is a multiple of {_FP8_BLOCK}, found "
                f"{self.kv_lora_rank}; leave it out"
            )

    def _check_experts(self) -> None:
        experts, groups, kept, chosen = (
            self.n_routed_experts,
            self.n_group,
            self.topk_group,
            self.num_experts_per_tok,
        )
        if chosen > experts:
            raise ValueError(f"num_experts_per_tok = {chosen} is more than n_routed_experts = {experts}")
        if experts % groups:
            raise ValueError(f"n_routed_experts = {experts} does not divide into n_group = {groups} equal groups")
        if kept > groups:
            raise ValueError(f"topk_group = {kept} is more than n_group = {groups}")
        if groups > 1 and experts // groups < 2:
            raise ValueError(
                f"n_group = {groups} leaves {experts // groups} expert per group; "
                "a group is scored by its two best experts and needs at least 2"
            )
        if chosen > kept * (experts // groups):
            raise ValueError(
                f"num_experts_per_tok = {chosen} is more than the {kept * (experts // groups)} experts "
                f"in topk_group = {kept} groups of {experts // groups}"
            )

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Reads a released `config.json`, of DeepSeek-V3, Kimi-K2 or Moonlight, or one that Transformers wrote.

        Raises ConfigError if the file cannot be read, and as `from_released` does.
        """
        return cls.from_released(read_json_object(Path(path)), Path(path))

    @classmethod
    def from_released(cls, file: dict[str, Any], path: Path) -> ModelConfig:
        """Builds the config from the fields of the released config at `path`.

        A field that the file lacks gets the default of Transformers' `DeepseekV3Config`. Raises ConfigError with
        the file and the field if it holds an unknown field, or describes a model that this project does not build,
        or weights that it does not read.
        """
        try:
            given = _shape_fields(file)
            fields = _TRANSFORMERS_DEFAULTS | given
            config = cls.model_validate_json(json.dumps(fields))
            _check_head_dim(file.get("qk_head_dim"), config)
        except ValidationError as error:
            problems = describe_errors(error, cls, {(): printable_path(path)})
            raise ConfigError(_with_defaults_named(problems, given)) from None
        except ValueError as error:
            raise ConfigError(f"{printable_path(path)}: {error}") from None
        return config


def _shape_fields(released: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that shape the model, under their released names."""
    _check_architecture(released)
    left_out = _WITHOUT_EFFECT | {"qk_head_dim"}
    fields = {name: value for name, value in released.items() if name not in left_out}
    for newer, name in _NEWER_NAMES.items():
        if newer in fields:
            value = fields.pop(newer)
            if fields.setdefault(name, value) != value:
                raise ValueError(f"{newer} = {format_value(value)}, and {name} = {format_value(fields[name])}")
    return _with_released_rope(fields)


def _check_architecture(released: dict[str, Any]) -> None:
    """Raises ValueError, naming it, for a model of another architecture, and for weights in another format."""
    kind = released.get("model_type", _MODEL_TYPES[0])
    if kind not in _MODEL_TYPES:
        raise ValueError(f"model_type = {format_value(kind)}, expected {' or '.join(_MODEL_TYPES)}")
    names = released.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    if names and not set(map(str, names)) & set(_ARCHITECTURES):
        raise ValueError(f"architectures = {format_value(names)}, expected {_ARCHITECTURES[0]}")
    _check_quantization(released.get("quantization_config"))


def _check_quantization(fields: Any) -> None:
    """Raises ValueError for weights that are quantized in another way than those of the release."""
    given = fields if isinstance(fields, dict) else {"quant_method": fields}
    found = {name: given.get(name) for name in _FP8}
    if any(value not in (None, _FP8[name]) for name, value in found.items()):
        raise ValueError(
            f"quantization_config with {format_value(found)}, expected {format_value(_FP8)} or weights that are "
            "not quantized; convert them to bfloat16 first"
        )


def _with_defaults_named(problems: str, given: dict[str, Any]) -> str:
    """Adds to each problem the fields in it that the file lacks, with their defaults."""
    lines = []
    for line in problems.splitlines():
        words = set(re.findall(r"\w+", line))
        absent = [
            f"{name} = {value}" for name, value in _TRANSFORMERS_DEFAULTS.items() if name in words - given.keys()
        ]
        lines.append(f"{line} (not in the file, so as in Transformers: {', '.join(absent)})" if absent else line)
    return "\n".join(lines)


def _check_head_dim(stated: object, config: ModelConfig) -> None:
    """Raises ValueError if the file's `qk_head_dim` is not qk_nope_head_dim + qk_rope_head_dim."""
    if stated not in (None, config.qk_head_dim):
        raise ValueError(
            f"qk_head_dim = {format_value(stated)}, "
            f"expected qk_nope_head_dim + qk_rope_head_dim = {config.qk_head_dim}"
        )


def _with_released_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Converts either form of the rotary parameters to the released `rope_theta` and `rope_scaling`.

    The precedence is that of Transformers: `rope_scaling` over `rope_parameters`, and a `rope_theta` inside them
    over the one outside. The type "default" scales nothing.
    """
    rope = fields.pop("rope_parameters", None)
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    scaling = fields.pop("rope_scaling", None) or rope or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"{name} = {format_value(scaling)}: expected an object of fields")
    scaling = dict(scaling)
    if "rope_theta" in scaling:
        fields["rope_theta"] = scaling.pop("rope_theta")
    if scaling.get("type") == scaling.get("rope_type"):
        scaling.pop("type", None)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default" or ("type" in scaling and "rope_type" in scaling):
        longest = fields.get("max_position_embeddings", _TRANSFORMERS_DEFAULTS["max_position_embeddings"])
        fields["rope_scaling"] = {"original_max_position_embeddings": longest} | scaling
    return fields
