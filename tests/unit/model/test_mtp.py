"""Multi-token prediction: the paper's equations, Transformers' layer, and what is shared with the main model."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.interop.huggingface import load_released, to_released_names
from deepseek_v3.mla.attention import AttentionMetadata
from deepseek_v3.mla.rotary import rotary_tables
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.balance import routers_of
from deepseek_v3.training.loss import training_losses
from helpers.models import (
    YARN,
    fill_with_noise,
    largest_difference,
    random_tokens,
    relative_difference,
    small_config,
    small_model,
)
from helpers.transformers_reference import released_names, transformers_config, transformers_model

EXACT = 1e-12


def normalised(h_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return weight_D * h_D / (h_D.square().mean() + eps).sqrt()


def equations_21_and_22(model: DeepSeekV3, tokens_S: Tensor, states_SD: Tensor, depth: int) -> Tensor:
    """h^k of one sequence from h^(k-1): eq. 21 token by token, then the module's Transformer layer."""
    config = model.config
    layer = model.model.layers[config.num_hidden_layers + depth - 1]
    embeddings_VD = model.model.embed_tokens.weight
    joined = []
    for i in range(len(tokens_S) - depth):
        next_D = normalised(embeddings_VD[tokens_S[i + depth]], layer.enorm.weight, config.rms_norm_eps)
        state_D = normalised(states_SD[i], layer.hnorm.weight, config.rms_norm_eps)
        joined.append(layer.eh_proj.weight @ torch.cat((next_D, state_D)))
    positions_BS = torch.arange(len(joined))[None]
    metadata = AttentionMetadata(positions_BS, *rotary_tables(positions_BS, config))
    out_BSD, _ = DecoderLayer.forward(layer, torch.stack(joined)[None], metadata)
    final_D = layer.shared_head["norm"].weight
    return torch.stack([normalised(out_D, final_D, config.rms_norm_eps) for out_D in out_BSD[0]])


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_prediction_is_the_papers_equations(depth: int) -> None:
    config = small_config(num_nextn_predict_layers=depth)
    model = small_model(config, torch.float64)
    tokens_BS = random_tokens(config, 2, 7)

    states = model.hidden_states(tokens_BS)

    assert [tuple(h_BSD.shape) for h_BSD in states.mtp] == [(2, 7 - k, 40) for k in range(1, depth + 1)]
    for b, tokens_S in enumerate(tokens_BS):
        expected_SD = states.main_BSD[b]
        for k in range(1, depth + 1):
            expected_SD = equations_21_and_22(model, tokens_S, expected_SD, k)
            assert largest_difference(states.mtp[k - 1][b], expected_SD) < EXACT


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_the_prediction_loss_is_equations_23_to_25(depth: int) -> None:
    """Positions count from 1 as in the paper: tokens t_1 … t_(T+1), of which the model reads T."""
    config = small_config(num_nextn_predict_layers=depth)
    model = small_model(config, torch.float64)
    tokens_BX = random_tokens(config, 2, 8)
    length, weight = 7, 0.3

    losses = training_losses(model, tokens_BX, mtp_weight=weight, balance_weight=0.0)

    states = model.hidden_states(tokens_BX[:, :-1])
    expected = 0.0
    for b, tokens_X in enumerate(tokens_BX.tolist()):
        for k in range(1, depth + 1):
            for i in range(2 + k, length + 2):  # eq. 24
                state_D = states.mtp[k - 1][b, i - k - 1 - 1]
                probabilities_V = (model.lm_head.weight @ state_D).softmax(-1)  # eq. 23, P_i^k
                expected -= probabilities_V[tokens_X[i - 1]].log().item() / length
    expected *= weight / depth / len(tokens_BX)  # eq. 25, and the mean over the batch
    assert (losses.total - losses.main).item() == pytest.approx(expected, rel=1e-12)


def test_each_depth_sees_the_tokens_up_to_its_own_and_no_further() -> None:
    config = small_config(num_nextn_predict_layers=2)
    model = small_model(config, torch.float64)
    tokens_BS = torch.arange(7)[None]
    states = model.hidden_states(tokens_BS)
    for k, hidden_BSD in enumerate(states.mtp, start=1):
        (gradient_VD,) = torch.autograd.grad(
            hidden_BSD[0, 2].sum(), model.model.embed_tokens.weight, retain_graph=True
        )
        seen = gradient_VD.abs().sum(-1).nonzero().flatten().tolist()
        assert seen == list(range(2 + k + 1))


def test_embedding_and_head_are_shared() -> None:
    config = small_config(num_nextn_predict_layers=2)
    own = {
        name.removeprefix("model.layers.3.").partition(".")[0]
        for name, _ in DeepSeekV3(config).named_parameters()
        if name.startswith("model.layers.3.")
    }
    assert own == {
        "input_layernorm",
        "self_attn",
        "post_attention_layernorm",
        "mlp",
        "enorm",
        "hnorm",
        "eh_proj",
        "shared_head",
    }
    without = {name for name, _ in DeepSeekV3(small_config()).named_parameters()}
    more = {name for name, _ in DeepSeekV3(config).named_parameters()} - without
    assert all(name.startswith(("model.layers.3.", "model.layers.4.")) for name in more)
    assert [name for name in more if "shared_head" in name and not name.endswith("shared_head.norm.weight")] == []


def test_the_mtp_loss_trains_embedding_head_and_main_layers() -> None:
    config = small_config(num_nextn_predict_layers=1)
    model = small_model(config)
    tokens_BS = random_tokens(config, 2, 9)
    hidden_BSD = model.hidden_states(tokens_BS).mtp[0]
    logits_BSV = F.linear(hidden_BSD, model.head_weight_VD)

    F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 2:].flatten()).backward()

    untaught = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert untaught == []


def test_every_prediction_layer_has_a_router_of_its_own() -> None:
    model = DeepSeekV3(small_config(num_nextn_predict_layers=2))
    routers = routers_of(model)
    assert len(routers) == 2 + 2
    assert routers[2:] == [layer.mlp.gate for layer in model.model.layers[3:]]


def test_mtp_uses_experts_where_all_main_layers_are_dense() -> None:
    model = small_model(small_config(first_k_dense_replace=3, num_nextn_predict_layers=1))
    assert len(routers_of(model)) == 1
    assert len(model.hidden_states(random_tokens(model.config, 1, 5)).routing) == 1


@torch.no_grad()
def test_without_prediction_only_the_main_model_runs() -> None:
    config = small_config(num_nextn_predict_layers=1)
    model = small_model(config)
    tokens_BS = random_tokens(config, 2, 6)
    whole, main = model.hidden_states(tokens_BS), model.hidden_states(tokens_BS, with_mtp=False)
    assert torch.equal(main.main_BSD, whole.main_BSD)
    assert main.mtp == []
    assert len(main.routing) == len(whole.routing) - 1
    logits_BSV = model(tokens_BS)
    assert torch.equal(logits_BSV, F.linear(whole.main_BSD, model.lm_head.weight))


@torch.no_grad()
def test_a_documents_mask_holds_for_prediction_too() -> None:
    """Where the token it is given still belongs to the document, a module sees what it would see alone."""
    config = small_config(num_nextn_predict_layers=1)
    model = small_model(config, torch.float64)
    tokens_BS = random_tokens(config, 1, 11)
    documents_BS = torch.tensor([[0] * 5 + [1] * 6])

    together_BSD = model.hidden_states(tokens_BS, documents_BS).mtp[0]

    first_BSD = model.hidden_states(tokens_BS[:, :5]).mtp[0]
    second_BSD = model.hidden_states(tokens_BS[:, 5:]).mtp[0]
    # Angles are float32 and differ by where a document starts; attention sees only their differences.
    assert largest_difference(together_BSD[:, :4], first_BSD) < 1e-5
    assert largest_difference(together_BSD[:, 5:], second_BSD) < 1e-5


def their_prediction_layer(config: ModelConfig) -> MtpLayer:
    """Transformers' module; it builds the decoder layer of index 0, which must hold experts."""
    theirs = transformers_config(config.model_copy(update={"first_k_dense_replace": 0}))
    theirs._attn_implementation = "eager"
    layer = MtpLayer(theirs, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, 0)
    fill_with_noise(layer)
    return layer


def released_prediction_name(name: str) -> str:
    """Where the released checkpoint keeps a tensor of Transformers' module, for a model of three layers."""
    name = name.replace("post_norm.", "shared_head.norm.").removeprefix("mtp_block.")
    return f"model.layers.3.{name}"


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_scaling": YARN}], ids=str)
def test_states_and_every_gradient_agree_with_transformers(changes: dict[str, object]) -> None:
    config = small_config(num_nextn_predict_layers=1, **changes)
    theirs, their_layer = transformers_model(config), their_prediction_layer(config)

    def released(main: dict[str, Tensor], prediction: dict[str, Tensor]) -> dict[str, Tensor]:
        return released_names(main | {released_prediction_name(name): t for name, t in prediction.items()})

    ours = DeepSeekV3(config)
    load_released(ours, released(theirs.state_dict(), their_layer.state_dict()))
    tokens_BS = random_tokens(config, 2, 13)

    found_BSD = ours.hidden_states(tokens_BS).mtp[0]

    embedded_BSD = theirs.model.embed_tokens(tokens_BS[:, 1:])
    later_BS = torch.arange(1, 13)[None]  # theirs counts from the token it is given; only differences matter
    expected_BSD = their_layer(
        embedded_BSD,
        theirs.model(tokens_BS).last_hidden_state[:, :-1],
        position_embeddings=theirs.model.rotary_emb(embedded_BSD, position_ids=later_BS),
        attention_mask=torch.full((12, 12), float("-inf")).triu(1)[None, None],
        position_ids=later_BS,
        past_key_values=None,
    )
    assert relative_difference(found_BSD, expected_BSD) < 1e-5

    upstream_BSD = torch.randn_like(expected_BSD)
    expected_BSD.backward(upstream_BSD)
    found_BSD.backward(upstream_BSD)
    wanted = released(gradients_of(theirs), gradients_of(their_layer))
    found = to_released_names(config, gradients_of(ours))
    for name, gradient in wanted.items():
        assert relative_difference(found[name], gradient) < 1e-5, name


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """What each parameter gathered; the head takes no part and gathered nothing."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
