"""AdamW against torch's own, and what is particular to ours."""

import pytest
import torch
from torch import Tensor, nn

from deepseek_v3.config.train_config import OptimizerConfig
from deepseek_v3.ops.multi_tensor import AdamWStep, reference
from deepseek_v3.training.optimizer import AdamW

SHAPES = [(6, 5), (7,), (3, 4, 2)]


def _parameters(device: torch.device) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]


def _config(**changes: object) -> OptimizerConfig:
    return OptimizerConfig(**{"learning_rate": 0.1, "moments": "float32", **changes})  # type: ignore[arg-type]


def _named(parameters: list[nn.Parameter]) -> dict[str, nn.Parameter]:
    return {str(number): parameter for number, parameter in enumerate(parameters)}


def _with_gradients(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()


def test_equals_torch_adamw_with_clipping_and_matrix_decay(device: torch.device) -> None:
    ours = _parameters(device)
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer = AdamW(_named(ours), _config(max_grad_norm=0.5))
    matrices, vectors = [theirs[0], theirs[2]], [theirs[1]]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 6):
        gradients = [torch.randn_like(parameter) for parameter in ours]
        _with_gradients(ours, gradients)
        _with_gradients(theirs, gradients)
        norm = optimizer.step(0.1 / step)
        assert norm.item() == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, 0.5)))
        for group in reference.param_groups:
            group["lr"] = 0.1 / step
        reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_pieces_on_a_cpu_give_the_same_bits_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    start = [torch.randn(shape) for shape in SHAPES]
    gradients = [torch.randn(shape) for shape in SHAPES]
    results = []
    for piece in (1 << 18, 7):
        monkeypatch.setattr(reference, "_CHUNK", piece)
        parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = AdamW(_named(parameters), _config(moments="bfloat16"))
        for _ in range(3):
            _with_gradients(parameters, gradients)
            optimizer.step(0.1)
        moments = [moment for state in optimizer.state.values() for moment in state.values()]
        results.append([*(parameter.detach() for parameter in parameters), *moments])
    for whole, pieces in zip(*results, strict=True):
        assert torch.equal(whole, pieces)


def test_bfloat16_moments_stay_close_to_float32_ones(device: torch.device) -> None:
    exact, rounded = _parameters(device), _parameters(device)
    for mine, other in zip(rounded, exact, strict=True):
        mine.data.copy_(other)
    optimizers = [AdamW(_named(exact), _config()), AdamW(_named(rounded), _config(moments="bfloat16"))]
    for _ in range(10):
        gradients = [torch.randn_like(parameter) for parameter in exact]
        for parameters, optimizer in zip((exact, rounded), optimizers, strict=True):
            _with_gradients(parameters, gradients)
            optimizer.step(0.01)
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in optimizers[1].state.values())
    for mine, other in zip(rounded, exact, strict=True):
        assert not torch.equal(mine, other)
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_restored_optimizer_goes_on_bit_for_bit(moments: str) -> None:
    parameters = _parameters(torch.device("cpu"))
    optimizer = AdamW(_named(parameters), _config(moments=moments))
    gradients = [[torch.randn_like(parameter) for parameter in parameters] for _ in range(6)]
    for step in range(3):
        _with_gradients(parameters, gradients[step])
        optimizer.step(0.1)
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    restored = AdamW(_named(copies), _config(moments=moments))
    restored.num_steps = optimizer.num_steps
    for saved, copy in zip(parameters, copies, strict=True):
        for moment, values in optimizer.state[saved].items():
            restored.state[copy][moment].copy_(values)
    for step in range(3, 6):
        for group, twin in ((parameters, optimizer), (copies, restored)):
            _with_gradients(group, gradients[step])
            twin.step(0.1)
    assert all(torch.equal(mine, other) for mine, other in zip(parameters, copies, strict=True))


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf", "huge", "loss"])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(device: torch.device, moments: str, bad: str) -> None:
    """One bad number among all gradients, or a bad loss; a norm that overflows counts too."""
    parameters = _parameters(device)
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    optimizer, other = (AdamW(_named(given), _config(moments=moments)) for given in (parameters, twins))
    gradients = [[torch.randn_like(parameter) for parameter in parameters] for _ in range(3)]
    spoiled = [gradient.clone() for gradient in gradients[1]]
    if bad != "loss":
        spoiled[1][3] = 1e30 if bad == "huge" else float(bad)
    for given, taken in ((gradients[0], True), (spoiled, False), (gradients[2], True)):
        before = [parameter.detach().clone() for parameter in parameters]
        _with_gradients(parameters, given)
        loss = torch.tensor(1.0 if taken or bad != "loss" else torch.nan, device=device)
        norm = optimizer.step(0.1, loss)
        assert bool(norm.isfinite()) == (taken or bad == "loss")
        same = all(torch.equal(one, two) for one, two in zip(before, parameters, strict=True))
        assert same == (not taken)
        if taken:
            _with_gradients(twins, given)
            other.step(0.1, loss)
    assert optimizer.num_steps == other.num_steps == 2
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(one, two) for one, two in zip(parameters, twins, strict=True))


def test_a_first_step_that_is_not_finite_changes_nothing(device: torch.device) -> None:
    """Its bias correction would divide by 0."""
    parameters = _parameters(device)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = AdamW(_named(parameters), _config())
    _with_gradients(parameters, [torch.full_like(parameter, torch.nan) for parameter in parameters])
    optimizer.step(0.1)
    assert all(torch.equal(one, other) for one, other in zip(before, parameters, strict=True))
    assert not any(moment.any() for state in optimizer.state.values() for moment in state.values())
    assert optimizer.num_steps == 0


def test_the_smallest_eps_divides_no_gradient_of_0(device: torch.device) -> None:
    parameters = [nn.Parameter(torch.ones(2, 3, device=device))]
    optimizer = AdamW(_named(parameters), _config(eps=1e-30, weight_decay=0.0))
    _with_gradients(parameters, [torch.tensor([[0.0, 1e-10, 1.0], [0.0, 0.0, 0.0]], device=device)])
    optimizer.step(0.1)
    torch.testing.assert_close(parameters[0], torch.tensor([[1.0, 0.9, 0.9], [1.0, 1.0, 1.0]], device=device))
    with pytest.raises(ValueError, match="eps"):
        _config(eps=1e-46)


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    parameters = _parameters(torch.device("cpu"))
    before = parameters[1].detach().clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    AdamW(_named(parameters), _config()).step(0.1)
    assert torch.equal(parameters[1], before)


def _moments_after(dtype: torch.dtype, beta: float, before: Tensor, gradient: Tensor, steps: int) -> list[Tensor]:
    """Both moments after `steps` steps of `gradient`, starting from those of a constant gradient of `before`."""
    means, squares = before.to(dtype), before.square().to(dtype)
    step = AdamWStep(decay=1.0, size=0.0, correction=1.0, beta1=beta, beta2=beta, eps=1e-8)
    for _ in range(steps):
        reference.adamw_([torch.zeros_like(gradient)], [gradient], [means], [squares], torch.ones(()), step)
    return [means.double(), squares.double()]


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_bfloat16_moments_follow_the_gradient_down_and_up(factor: float) -> None:
    """To a tenth, from ten times too large and from ten times too small, wherever between two powers of 2."""
    gradient = torch.logspace(0, 1, 500, base=2)
    OptimizerConfig(learning_rate=0.1, beta1=0.96, beta2=0.96)
    means, squares = _moments_after(torch.bfloat16, 0.96, factor * gradient, gradient, 400)
    for found, exact in ((means, gradient.double()), (squares, gradient.double().square())):
        assert ((found - exact).abs() / found).max() < 0.1 + 2**-8
        assert ((found - exact).abs() / found).max() > 0.05  # the rule is about an error that is there


def test_bfloat16_moments_would_not_follow_with_beta_near_1() -> None:
    gradient = torch.logspace(0, 1, 500, base=2)
    _, squares = _moments_after(torch.bfloat16, 0.999, 10 * gradient, gradient, 2000)
    assert (squares / gradient.square()).min() > 90


@pytest.mark.parametrize(
    ("moments", "name", "beta", "error", "limit"),
    [
        ("bfloat16", "beta2", 0.999, "391%", "0.9609375"),
        ("bfloat16", "beta2", 0.97, "13%", "0.9609375"),
        ("bfloat16", "beta1", 0.99, "39%", "0.9609375"),
        ("float32", "beta2", 1 - 1e-7, "60%", "0.9999994"),
    ],
)
def test_betas_that_rounding_would_undo_are_refused(
    moments: str, name: str, beta: float, error: str, limit: str
) -> None:
    with pytest.raises(ValueError, match=f"{name} = {beta} with moments in {moments}.* {error} .* {limit}"):
        _config(moments=moments, **{name: beta})
    _config(moments=moments, **{name: 0.96})
    _config(moments="float32", **{name: 0.999})
