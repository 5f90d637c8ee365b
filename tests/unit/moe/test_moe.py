"""Routing, experts and load balance against loops over tokens and experts."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.moe.balance import load_metrics, routers_of, sequence_balance_loss, update_biases
from deepseek_v3.moe.dispatch import LocalDispatcher
from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.moe.routing import Router
from deepseek_v3.ops.grouped_gemm import torch_grouped_linear
from deepseek_v3.ops.moe_permute import MOE_PERMUTE
from helpers.models import fill_with_noise, largest_difference, random_tokens, small_config, small_model

EXACT = 1e-12
ROUTINGS: dict[str, dict[str, Any]] = {
    "two of four groups": {},
    "one of two groups": {"n_group": 2, "topk_group": 1},
    "no groups": {"n_group": 1, "topk_group": 1},
    "every group": {"topk_group": 4},
    "one expert": {"num_experts_per_tok": 1, "topk_group": 1},
    "every expert of the best groups": {"num_experts_per_tok": 4},
    "every expert": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8},
    "not normalised": {"norm_topk_prob": False},
    "not scaled": {"routed_scaling_factor": 1.0},
}
# Around zero as in training, and so far below that a losing group masked with zero would win.
BIAS_LEVELS = [0.0, -5.0]


def layer_filled_with_noise(module: torch.nn.Module) -> Any:
    fill_with_noise(module)
    return module.double()


def tokens_of(config: ModelConfig, num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, config.hidden_size, dtype=torch.float64)


def chosen_by_hand(config: ModelConfig, biased: list[float]) -> set[int]:
    """The experts of one token, from its biased scores."""
    size = config.n_routed_experts // config.n_group
    groups = [range(start, start + size) for start in range(0, config.n_routed_experts, size)]
    groups.sort(key=lambda group: sum(sorted(biased[e] for e in group)[-2:]), reverse=True)
    allowed = [expert for group in groups[: config.topk_group] for expert in group]
    return set(sorted(allowed, key=lambda e: biased[e])[-config.num_experts_per_tok :])


def gates_by_hand(config: ModelConfig, router: Router, x_D: Tensor) -> dict[int, float]:
    """The gate of every chosen expert of one token (eq. 12-16 with the group limit)."""
    scores = [1 / (1 + math.exp(-float(weight_D @ x_D))) for weight_D in router.weight]
    bias = router.e_score_correction_bias.tolist()
    chosen = chosen_by_hand(config, [s + b for s, b in zip(scores, bias, strict=True)])
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


def feed_forward(gate: Tensor, up: Tensor, down: Tensor, x_D: Tensor) -> Tensor:
    hidden = gate @ x_D
    return down @ (hidden * torch.sigmoid(hidden) * (up @ x_D))


def routed_by_hand(experts: RoutedExperts, gates: dict[int, float], x_D: Tensor) -> Tensor:
    """The gated sum over the experts of one token."""
    out_D = torch.zeros_like(x_D)
    for e, weight in gates.items():
        gate, up = experts.gate_up_proj[e].chunk(2)
        out_D = out_D + weight * feed_forward(gate, up, experts.down_proj[e], x_D)
    return out_D


@pytest.mark.parametrize("bias_level", BIAS_LEVELS)
@pytest.mark.parametrize("routing", ROUTINGS)
@torch.no_grad()
def test_experts_and_gates_are_those_chosen_by_hand(routing: str, bias_level: float) -> None:
    config = small_config(**ROUTINGS[routing])
    router = layer_filled_with_noise(Router(config))
    router.e_score_correction_bias += bias_level
    x_TD = tokens_of(config, 64)

    found = router(x_TD)

    assert largest_difference(found.scores_TE, torch.sigmoid(x_TD @ router.weight.T)) < EXACT
    for x_D, gates_K, experts_K in zip(x_TD, found.gates_TK, found.experts_TK, strict=True):
        assert dict(zip(experts_K.tolist(), gates_K.tolist(), strict=True)) == pytest.approx(
            gates_by_hand(config, router, x_D), rel=1e-12
        )


def test_masked_groups_are_never_chosen() -> None:
    """All biased scores are below zero, so zero in place of minus infinity would choose a losing group."""
    config = small_config(n_group=2, topk_group=1, num_experts_per_tok=2)
    router = Router(config)
    torch.nn.init.zeros_(router.weight)
    router.e_score_correction_bias.copy_(torch.tensor([-3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0, -9.0]))
    assert router(torch.zeros(1, config.hidden_size)).experts_TK.tolist() == [[0, 1]]


def test_a_groups_score_is_the_sum_of_its_two_best_experts() -> None:
    config = small_config(n_group=2, topk_group=1, num_experts_per_tok=1)
    router = Router(config)
    torch.nn.init.zeros_(router.weight)
    router.e_score_correction_bias.copy_(torch.tensor([0.9, 0.0, 0.0, 0.0, 0.5, 0.5, -9.0, -9.0]))
    assert router(torch.zeros(1, config.hidden_size)).experts_TK.item() in (4, 5)


@torch.no_grad()
def test_the_bias_steers_the_choice_and_never_the_gates() -> None:
    config = small_config(num_experts_per_tok=8, n_group=1, topk_group=1)
    router = layer_filled_with_noise(Router(config))
    x_TD = tokens_of(config, 16)
    before = router(x_TD)
    router.e_score_correction_bias.normal_(std=3)
    after = router(x_TD)

    def by_expert(routing: Any) -> Tensor:
        return torch.zeros_like(routing.scores_TE).scatter(1, routing.experts_TK, routing.gates_TK)

    assert not torch.equal(before.experts_TK, after.experts_TK)
    assert largest_difference(by_expert(before), by_expert(after)) < EXACT


def test_the_bias_is_saved_and_not_trained() -> None:
    router = Router(small_config())
    assert set(router.state_dict()) == {"weight", "e_score_correction_bias"}
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_scores_are_taken_in_float32_whatever_the_tokens_are() -> None:
    config = small_config()
    router = Router(config)
    fill_with_noise(router)
    x_TD = torch.randn(32, config.hidden_size).bfloat16()
    narrow, wide = router(x_TD), router(x_TD.float())
    assert narrow.gates_TK.dtype == narrow.scores_TE.dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("shared", [0, 1, 2, 3])
@torch.no_grad()
def test_a_layer_sums_gated_experts_and_shared_experts(shared: int) -> None:
    config = small_config(n_shared_experts=shared)
    layer = layer_filled_with_noise(MixtureOfExperts(config))
    x_BSD = torch.randn(2, 9, config.hidden_size, dtype=torch.float64)

    y_BSD, stats = layer(x_BSD)

    counts = [0] * config.n_routed_experts
    for x_D, y_D in zip(x_BSD.flatten(0, 1), y_BSD.flatten(0, 1), strict=True):
        gates = gates_by_hand(config, layer.gate, x_D)
        expected_D = routed_by_hand(layer.experts, gates, x_D)
        for s in range(shared):
            rows = slice(s * config.moe_intermediate_size, (s + 1) * config.moe_intermediate_size)
            network = layer.shared_experts
            expected_D = expected_D + feed_forward(
                network.gate_proj.weight[rows], network.up_proj.weight[rows], network.down_proj.weight[:, rows], x_D
            )
        assert largest_difference(y_D, expected_D) < EXACT
        for expert in gates:
            counts[expert] += 1
    assert stats.counts_E.tolist() == counts
    assert any(name.startswith("shared_experts") for name in layer.state_dict()) == (shared > 0)


CHOICES: dict[str, list[list[int]]] = {
    "mixed": [[0, 7], [7, 3], [2, 0], [3, 4], [1, 6]],
    "all to one": [[5], [5], [5]],
    "most experts empty": [[1, 6], [6, 1], [1, 6], [6, 1]],
    "one token": [[4, 2, 0]],
}


def routed(x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, experts: RoutedExperts) -> Tensor:
    """Tokens through experts that are all here."""
    dispatcher = LocalDispatcher(experts.num_experts)
    dispatched = dispatcher.wait_dispatch(dispatcher.dispatch(x_TD, gates_TK, experts_TK))
    y_TD = experts(dispatched.x_RD, dispatched.gates_X, dispatched.copies, dispatched.ends_E)
    return dispatcher.wait_combine(dispatcher.combine(y_TD, dispatched.handle))


@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_dispatch_equals_a_loop_over_tokens(choice: str) -> None:
    config = small_config()
    experts = layer_filled_with_noise(RoutedExperts(config))
    experts_TK = torch.tensor(CHOICES[choice])
    x_TD, gates_TK = tokens_of(config, len(experts_TK)), torch.rand(experts_TK.shape, dtype=torch.float64)

    y_TD = routed(x_TD, gates_TK, experts_TK, experts)

    for t, x_D in enumerate(x_TD):
        gates = dict(zip(experts_TK[t].tolist(), gates_TK[t].tolist(), strict=True))
        assert largest_difference(y_TD[t], routed_by_hand(experts, gates, x_D)) < EXACT


@torch.no_grad()
def test_neither_the_order_of_tokens_nor_of_choices_matters() -> None:
    config = small_config()
    experts = layer_filled_with_noise(RoutedExperts(config))
    experts_TK = torch.stack([torch.randperm(8)[:3] for _ in range(12)])
    x_TD, gates_TK = tokens_of(config, 12), torch.rand(12, 3, dtype=torch.float64)
    y_TD = routed(x_TD, gates_TK, experts_TK, experts)

    tokens = torch.randperm(12)
    moved_TD = routed(x_TD[tokens], gates_TK[tokens], experts_TK[tokens], experts)
    turned_TD = routed(x_TD, gates_TK.flip(1), experts_TK.flip(1), experts)

    assert largest_difference(moved_TD, y_TD[tokens]) < EXACT
    assert largest_difference(turned_TD, y_TD) < EXACT


def test_an_expert_without_tokens_gets_a_gradient_of_zeros() -> None:
    config = small_config()
    experts = layer_filled_with_noise(RoutedExperts(config))
    x_TD = tokens_of(config, 4).requires_grad_()
    gates_TK = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    experts_TK = torch.tensor(CHOICES["most experts empty"])

    routed(x_TD, gates_TK, experts_TK, experts).sum().backward()

    for weight in (experts.gate_up_proj, experts.down_proj):
        used = [expert for expert, gradient in enumerate(weight.grad) if gradient.abs().sum() > 0]
        assert used == [1, 6]
    assert gates_TK.grad is not None
    assert gates_TK.grad.abs().min() > 0


@pytest.mark.parametrize("permute", ["reference", "triton"])
def test_a_layer_with_all_its_experts_compiles_whole(permute: str) -> None:
    """A break in the graph is an error; so would be a number that the program reads from the device."""
    if permute == "triton":
        pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
        if torch.cuda.is_available():
            pytest.skip("the same process cannot both interpret and compile")
    torch._dynamo.reset()  # compiled code does not notice another back end that is a module
    layer = MixtureOfExperts(small_config(moe_intermediate_size=24)).bfloat16()
    fill_with_noise(layer)
    layer.experts.grouped_linear = torch_grouped_linear
    layer.experts.permute = MOE_PERMUTE.backends[permute].load()
    x_BSD = torch.randn(2, 9, layer.config.hidden_size).bfloat16().requires_grad_()
    inputs = [x_BSD, *layer.parameters()]

    def results(run: Callable[[Tensor], Any]) -> list[Tensor]:
        y_BSD = run(x_BSD)[0]
        return [y_BSD, *torch.autograd.grad(y_BSD, inputs, torch.ones_like(y_BSD))]

    expected = results(layer)
    found = results(torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_experts_compile_once_for_any_number_of_rows() -> None:
    """As under expert parallelism, where every step brings another number of tokens."""
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    if torch.cuda.is_available():
        pytest.skip("the same process cannot both interpret and compile")
    torch._dynamo.reset()
    config = small_config(moe_intermediate_size=24)
    experts = layer_filled_with_noise(RoutedExperts(config)).bfloat16()
    experts.grouped_linear, experts.permute = torch_grouped_linear, MOE_PERMUTE.backends["triton"].load()
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend=graphs)
    for number in (6, 11, 3):
        routings = [torch.randperm(config.n_routed_experts)[:2] for _ in range(number)]
        x_TD, gates_TK = tokens_of(config, number).bfloat16().requires_grad_(), torch.rand(number, 2)
        found, expected = (
            torch.autograd.grad(routed(x_TD, gates_TK, torch.stack(routings), run).square().sum(), x_TD)[0]
            for run in (compiled, experts)
        )
        assert torch.equal(found, expected)
    assert graphs.frame_count == 1


# Load balance.


def equations_17_to_20(scores_TE: list[list[Tensor]], experts_per_token: int) -> Tensor:
    """The sequence-wise loss of one sequence, without α."""
    tokens, experts = len(scores_TE), len(scores_TE[0])
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(experts):
        times_among_the_best = sum(
            int(scores_E[i] >= sorted(scores_E, reverse=True)[experts_per_token - 1]) for scores_E in scores_TE
        )
        f_i = experts / (experts_per_token * tokens) * times_among_the_best  # eq. 18
        p_i = sum(scores_E[i] / sum(scores_E) for scores_E in scores_TE) / tokens  # eq. 19 and 20
        loss = loss + f_i * p_i  # eq. 17
    return loss


def test_the_sequence_loss_equals_the_papers_equations() -> None:
    config = small_config()
    layer = layer_filled_with_noise(MixtureOfExperts(config))
    x_BSD = torch.randn(3, 5, config.hidden_size, dtype=torch.float64)
    weight = layer.gate.weight

    found = layer(x_BSD)[1].balance_loss

    scores_BSE = torch.sigmoid(x_BSD @ weight.T)
    losses = [
        equations_17_to_20([list(scores_E) for scores_E in scores_SE], config.num_experts_per_tok)
        for scores_SE in scores_BSE
    ]
    expected = sum(losses) / len(losses)
    assert largest_difference(found, expected) < EXACT
    (gradient,) = torch.autograd.grad(found, weight)
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    assert gradient.abs().max() > 1e-3
    assert largest_difference(gradient, expected_gradient) < EXACT


def test_the_sequence_loss_is_1_for_even_load_and_more_otherwise() -> None:
    even_TE = torch.eye(4, dtype=torch.float64) + 0.001
    leaning_TE = even_TE[:1].expand(4, 4)
    assert sequence_balance_loss(even_TE, 1, 1).item() == pytest.approx(1.0)
    assert sequence_balance_loss(leaning_TE, 1, 1).item() == pytest.approx(4.0, rel=0.02)


# Logits of one token in float32, whose sigmoid is 0 for all experts, for some, or loses digits.
FAR_LOGITS = {
    "all equal": [-90.0] * 8,
    "all different": [-90.0, -91.0, -92.5, -94.0, -90.5, -95.0, -93.0, -91.5],
    "below any exponent": [-1e4, -1e4 - 1, -1e4 - 2, -2e4, -1e4 - 3, -1e4 - 4, -1e4 - 0.5, -3e4],
    "far below any": [-1e30, -2e30, -1e30, -3e30, -1e30, -1e30, -1e30, -1e30],
    "denormal scores": [-88.0, -88.5, -87.5, -87.0, -89.0, -100.0, -103.0, -88.25],
    "on both sides of the limit": [-63.0, -64.0, -65.0, -66.0, -90.0, -110.0, -63.5, -64.5],
    "high": [90.0, 1e4, 89.0, 20.0, -90.0, 0.0, 1.0, 88.0],
    "as in training": [0.1, -0.2, 0.3, -1.0, 2.0, 0.0, -3.0, 0.5],
}


def layer_with_logits(logits_E: Tensor) -> tuple[MixtureOfExperts, Tensor]:
    """A layer, and two tokens: one whose logits are these, and an ordinary one."""
    config = small_config(n_group=1, topk_group=1)
    layer = MixtureOfExperts(config).to(logits_E.dtype)
    fill_with_noise(layer)
    with torch.no_grad():
        layer.gate.weight[:, 0] = logits_E
        layer.gate.e_score_correction_bias.zero_()
    x_BSD = torch.zeros(1, 2, config.hidden_size, dtype=logits_E.dtype)
    x_BSD[0, 0, 0] = 1.0
    x_BSD[0, 1, 1:] = torch.linspace(-1, 1, config.hidden_size - 1)
    return layer, x_BSD.requires_grad_()


@pytest.mark.parametrize("name", FAR_LOGITS)
def test_logits_of_any_size_balance_as_in_log_space(name: str) -> None:
    layer, x_BSD = layer_with_logits(torch.tensor(FAR_LOGITS[name]))
    y_BSD, stats = layer(x_BSD)
    (y_BSD.square().mean() + stats.balance_loss).backward()
    gradients = [x_BSD.grad, *(parameter.grad for parameter in layer.parameters())]
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert y_BSD.isfinite().all()

    weight_ED = layer.gate.weight.detach().double().requires_grad_()
    logits_TE = x_BSD[0].detach().double() @ weight_ED.T
    shares_TE = torch.softmax(torch.nn.functional.logsigmoid(logits_TE), -1)
    best_TK = layer.gate(x_BSD[0]).scores_TE.topk(layer.config.num_experts_per_tok).indices
    f_E = torch.zeros_like(shares_TE).scatter(1, best_TK, 1.0).mean(0) * 8 / layer.config.num_experts_per_tok
    expected = (f_E * shares_TE.mean(0)).sum()
    assert stats.balance_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient_ED,) = torch.autograd.grad(expected, weight_ED)
    layer.zero_grad()
    layer(x_BSD)[1].balance_loss.backward()
    torch.testing.assert_close(layer.gate.weight.grad, gradient_ED.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAR_LOGITS)
@torch.no_grad()
def test_gates_of_far_logits_are_those_of_the_released_gate(name: str) -> None:
    layer, x_BSD = layer_with_logits(torch.tensor(FAR_LOGITS[name]))
    routing = layer.gate(x_BSD[0])
    scores_TE = torch.sigmoid(x_BSD[0].double() @ layer.gate.weight.double().T)
    chosen_TK = scores_TE.gather(1, routing.experts_TK)
    expected_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20) * layer.config.routed_scaling_factor
    torch.testing.assert_close(routing.gates_TK.double(), expected_TK, rtol=1e-5, atol=1e-7)


def test_scores_of_zero_add_nothing_to_the_sequence_loss() -> None:
    scores_TE = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.5, 0.1, 0.1, 0.1]], requires_grad=True)
    loss = sequence_balance_loss(scores_TE, 2, 1)
    loss.backward()
    assert loss.item() == pytest.approx(4 * 0.5 / 0.8 / 2)
    assert scores_TE.grad is not None
    assert scores_TE.grad.isfinite().all()


def test_no_tokens_give_finite_load_figures_and_no_step() -> None:
    counts_LE = torch.zeros(2, 4, dtype=torch.int64)
    assert all(values_L.isfinite().all() for values_L in load_metrics(counts_LE).values())
    assert torch.equal(moved_bias(counts_LE, 0.001), torch.full((2, 4), 0.5))


def moved_bias(counts_LE: Tensor, speed: float) -> Tensor:
    """Where one update takes the biases of as many routers, all starting at 0.5."""
    config = small_config(n_routed_experts=counts_LE.shape[1], n_group=1, topk_group=1)
    routers = [Router(config) for _ in counts_LE]
    for router in routers:
        router.e_score_correction_bias.fill_(0.5)
    update_biases(routers, counts_LE, speed)
    return torch.stack([router.e_score_correction_bias for router in routers])


def test_a_bias_moves_once_by_gamma_against_the_load() -> None:
    counts_LE = torch.tensor([[0, 10, 5, 5], [100, 0, 0, 0], [7, 7, 7, 7], [3, 1, 2, 3]])
    signs_LE = torch.tensor([[1, -1, 0, 0], [-1, 1, 1, 1], [0, 0, 0, 0], [-1, 1, 1, -1]])
    assert torch.equal(moved_bias(counts_LE, 0.001), 0.5 + 0.001 * signs_LE)


@pytest.mark.parametrize("count", [1, 3, 1_966_081, 2**24 + 3])
@pytest.mark.parametrize("experts", [4, 160])
def test_equal_load_leaves_the_bias_at_any_scale(count: int, experts: int) -> None:
    assert torch.equal(moved_bias(torch.full((1, experts), count), 0.001), torch.full((1, experts), 0.5))


def test_one_token_above_the_mean_moves_the_bias_at_any_scale() -> None:
    counts_LE = torch.full((1, 4), 2**26)
    counts_LE[0, 0] += 1
    counts_LE[0, 1] -= 1
    assert torch.equal(moved_bias(counts_LE, 0.25), torch.tensor([[0.25, 0.75, 0.5, 0.5]]))


def test_a_model_without_experts_has_no_routers() -> None:
    assert routers_of(small_model(small_config(first_k_dense_replace=3))) == []


def recomputed(layer: torch.nn.Module, *inputs: Any) -> Any:
    return checkpoint(layer, *inputs, use_reentrant=False)


def loads_and_gradients(run_layer: Callable[..., Any] | None) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    config = small_config(num_nextn_predict_layers=1)
    model = small_model(config, torch.float64)
    if run_layer is not None:
        model.run_layer = run_layer
    states = model.hidden_states(random_tokens(config, 2, 12))
    loss = states.main_BSD.square().mean() + states.mtp[0].square().mean()
    gradients = torch.autograd.grad(
        loss + sum(stats.balance_loss for stats in states.routing), list(model.model.parameters())
    )
    return torch.stack([stats.counts_E for stats in states.routing]), list(gradients)


def test_recomputing_a_layer_changes_no_count_and_no_gradient() -> None:
    counts_LE, gradients = loads_and_gradients(None)
    recomputed_LE, recomputed_gradients = loads_and_gradients(recomputed)
    assert counts_LE.sum(-1).tolist() == [2 * 12 * 3, 2 * 12 * 3, 2 * 11 * 3]
    assert torch.equal(counts_LE, recomputed_LE)
    assert all(torch.equal(one, other) for one, other in zip(gradients, recomputed_gradients, strict=True))


@torch.no_grad()
def test_loads_of_micro_batches_add_up_to_those_of_the_batch() -> None:
    config = small_config()
    model = small_model(config)
    tokens_BS = random_tokens(config, 4, 10)

    def loads(part_BS: Tensor) -> Tensor:
        return torch.stack([stats.counts_E for stats in model.hidden_states(part_BS).routing])

    assert torch.equal(sum(loads(part_BS) for part_BS in tokens_BS.split(1)), loads(tokens_BS))


@torch.no_grad()
def test_routers_and_loads_have_the_same_order() -> None:
    """Each router prefers a different expert, so its largest load identifies the router."""
    config = small_config(num_nextn_predict_layers=2, n_group=1, topk_group=1, num_experts_per_tok=1)
    model = small_model(config)
    routers = routers_of(model)
    for favourite, router in enumerate(routers):
        router.e_score_correction_bias[favourite] += 100
    routing = model.hidden_states(random_tokens(config, 1, 8)).routing
    assert len(routers) == 2 + 2
    assert [stats.counts_E.argmax().item() for stats in routing] == [0, 1, 2, 3]


def test_metrics_of_the_load() -> None:
    metrics = load_metrics(torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0], [12, 4, 0, 0], [0, 0, 0, 0]]))
    uneven = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert metrics["entropy"].tolist() == pytest.approx([1, 0, 0.5, uneven, 0])
    assert metrics["utilisation"].tolist() == [1, 0.25, 0.5, 0.5, 0]
    assert metrics["max_violation"].tolist()[:4] == [0, 3, 1, 2]
