"""A directory that is written here runs in Transformers: the same logits, MTP states and texts; and back again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.interop.huggingface import load_pretrained, load_released, save_pretrained
from deepseek_v3.interop.huggingface.pretrained_folder import open_pretrained
from deepseek_v3.model.transformer import DeepSeekV3
from helpers.models import YARN, largest_difference, random_tokens, small_config, small_model
from helpers.released_shapes import KIMI_K2, SHAPES, stored_weights
from helpers.transformers_reference import transformers_model


def in_transformers(folder: Path) -> DeepseekV3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_transformers_computes_the_same_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The logits are about 5; the limit is relative to them."""
    model = small_model(small_config(**changes))
    save_pretrained(model, tmp_path / "hf", max_shard_size="100KB")
    theirs = in_transformers(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    tokens_BS = random_tokens(model.config, 2, 30)
    logits_BSV = model(tokens_BS)
    assert largest_difference(theirs(tokens_BS).logits, logits_BSV) < 1e-5 * logits_BSV.abs().max().item()


@pytest.mark.skipif(
    not hasattr(MtpModel, "forward_layer"), reason="before 5.20 Transformers runs MTP layers inside generate only"
)
@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_transformers_computes_the_same_mtp_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """Transformers looks for MTP layers at the place of the released model only, layer 61."""
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\."])
    model = small_model(small_config(num_nextn_predict_layers=depth, rope_scaling=YARN))
    save_pretrained(model, tmp_path / "hf", max_shard_size="100KB")
    theirs = in_transformers(tmp_path / "hf")
    mtp = MtpModel.from_pretrained(theirs)
    cache = MtpCache(config=theirs.config.get_mtp_config())
    tokens_BS = random_tokens(model.config, 1, 12)
    hidden_BSD = theirs.model(tokens_BS).last_hidden_state
    for layer, ours_BSD in enumerate(model.hidden_states(tokens_BS).mtp, start=1):
        positions_BS = torch.arange(layer, 12)[None]
        hidden_BSD = mtp.forward_layer(
            layer - 1, hidden_BSD[:, :-1], positions_BS, cache, input_ids=tokens_BS[:, layer:]
        )
        assert largest_difference(hidden_BSD, ours_BSD) < 1e-5 * ours_BSD.abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kimi_k2", "moonlight"])
def test_relatives_of_the_release_load_under_their_names(tmp_path: Path, kind: str) -> None:
    """A directory as Kimi publishes it; Transformers knows only the name deepseek_v3 of this architecture."""
    model = transformers_model(small_config(**KIMI_K2))
    save_pretrained(small_model(small_config(**KIMI_K2)), tmp_path / "hf")
    fields = json.loads((tmp_path / "hf" / "config.json").read_text())
    released = {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "aux_loss_alpha": 0.001}
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**fields, **released, "model_type": kind}))
    model.save_pretrained(tmp_path / "theirs")
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    save_file(stored_weights(tmp_path / "theirs") | tables, tmp_path / "hf" / "model.safetensors")
    ours = load_pretrained(tmp_path / "hf")
    tokens_BS = random_tokens(ours.config, 2, 30)
    logits_BSV = model(tokens_BS).logits
    assert largest_difference(ours(tokens_BS), logits_BSV) < 1e-5 * logits_BSV.abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "saved"])
def test_stacked_experts_of_transformers_are_understood(tmp_path: Path, saved: bool) -> None:
    theirs = transformers_model(small_config())
    state = theirs.state_dict()
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    if saved:
        save_pretrained(small_model(small_config()), tmp_path / "hf")
        save_file(state, tmp_path / "hf" / "model.safetensors")
        ours = load_pretrained(tmp_path / "hf")
    else:
        ours = DeepSeekV3(small_config())
        load_released(ours, state)
    tokens_BS = random_tokens(ours.config, 2, 9)
    assert largest_difference(ours(tokens_BS), theirs(tokens_BS).logits) < 1e-4


PROMPTS = [
    *(
        "the cat",
        "the mat",
        " sat on",
        "return",
        "cat cat cat",
        "a",
        "The",
        "0123",
        "x = 5",
        "def f(x):\n    return x",
    ),
    *(
        "日本語",
        "Grüße",
        "😀",
        "\n\n",
        "    ",
        "naïve café",
        "\t",
        "the cat sat on the mat\n",
        "<|endoftext|>",
        "é",
    ),
]


def with_begin_marker(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The same tokens with `<s>` before every text, in the way of a published tokenizer."""
    json_text = json.loads(tokenizer.to_json())
    theirs = HuggingFaceTokenizer.from_str(json.dumps(json_text))
    theirs.add_special_tokens([AddedToken("<s>", normalized=False, special=True)])
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {"single": [begin, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [begin]}
    template["pair"] = [*template["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    ids = {"<s>": {"id": "<s>", "ids": [theirs.token_to_id("<s>")], "tokens": ["<s>"]}}
    fields = json.loads(theirs.to_str())
    fields["post_processor"] = {"type": "TemplateProcessing", **template, "special_tokens": ids}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast", **names}))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("begin", [False, True], ids=["plain", "begin marker"])
def test_greedy_texts_are_those_of_transformers(tmp_path: Path, begin: bool) -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat\n", "return the cat\n"] * 3, vocab_size=280)
    if begin:
        tokenizer = with_begin_marker(tokenizer, tmp_path / "tokenizer")
    config = small_config(vocab_size=tokenizer.vocab_size, num_nextn_predict_layers=1, rope_scaling=YARN)
    model = small_model(config)
    save_pretrained(model, tmp_path / "hf", tokenizer=tokenizer)
    theirs, their_tokenizer = in_transformers(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    completions = Generator(model, tokenizer).generate(PROMPTS, SamplingConfig(temperature=0, max_new_tokens=6))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        if begin and prompt == "<|endoftext|>":
            continue  # a published tokenizer reads the name of a marker as the marker
        inputs = their_tokenizer(prompt, return_tensors="pt")
        length = inputs.input_ids.shape[1]
        assert [*tokenizer.prompt_start, *tokenizer.encode(prompt)] == inputs.input_ids[0].tolist()
        ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=6)[0, length:].tolist()
        assert ids == list(completion.tokens), prompt


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "rope_scaling": YARN}], ids=["plain", "YaRN"])
def test_rotary_rows_may_be_in_halves(tmp_path: Path, changes: dict[str, Any]) -> None:
    """With `rope_interleave: false` the numbers of a pair are not neighbours; an export has them side by side."""
    theirs = transformers_model(small_config(**changes))
    theirs.config.rope_interleave = False
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = in_transformers(tmp_path / "theirs")
    assert theirs.config.rope_interleave is False
    ours = load_pretrained(tmp_path / "theirs")
    tokens_BS = random_tokens(ours.config, 2, 30)
    logits_BSV = theirs(tokens_BS).logits
    limit = 1e-5 * logits_BSV.abs().max().item()
    assert largest_difference(ours(tokens_BS), logits_BSV) < limit
    save_pretrained(ours, tmp_path / "ours")
    assert largest_difference(in_transformers(tmp_path / "ours")(tokens_BS).logits, logits_BSV) < limit


def test_a_block_of_rows_in_halves_is_that_part_of_the_whole(tmp_path: Path) -> None:
    save_pretrained(small_model(small_config()), tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(file.read_text().replace('"rope_interleave": true', '"rope_interleave": false'))
    weights = open_pretrained(tmp_path / "hf")
    for name in ("q_b_proj", "kv_a_proj_with_mqa"):
        parameter = f"model.layers.1.self_attn.{name}.weight"
        whole = torch.empty(weights.shapes[parameter])
        weights.read_into(whole, parameter)
        for first in range(len(whole)):
            block = torch.full((min(5, len(whole) - first), whole.shape[1] - 3), torch.nan)
            weights.read_into(block, parameter, (first, 2))
            assert torch.equal(block, whole[first : first + 5, 2:-1])
