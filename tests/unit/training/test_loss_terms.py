"""Loss terms from outside the package: values, gradients, runs on one and several ranks, metrics, and errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.config.loading import config_from_dict, config_to_yaml, load_config
from deepseek_v3.ops.cross_entropy import IGNORED
from deepseek_v3.training import loss_terms
from deepseek_v3.training.data import document_ids
from deepseek_v3.training.loss import Losses, Objective, count_targets
from deepseek_v3.training.loss_terms import LossInputs, LossTerm, register_loss_term, select_loss_terms
from deepseek_v3.training.train import train_run
from deepseek_v3.utils.errors import ConfigError
from helpers import parallel_runs
from helpers.models import small_config, small_model
from helpers.rank_pool import RankPool
from helpers.runs import write_run

CPU = torch.device("cpu")


def z_loss(inputs: LossInputs) -> Tensor:
    """The squared log-partition of the head, as another package would write it."""
    logits_BSV = F.linear(inputs.hidden_BSD, inputs.head_weight_VD.to(inputs.hidden_BSD.dtype)).float()
    return inputs.sum_over_targets(logits_BSV.logsumexp(-1).square())


def hidden_norm(inputs: LossInputs) -> Tensor:
    return inputs.sum_over_targets(inputs.hidden_BSD.float().square().mean(-1))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_terms, "_registered", {})
    register_loss_term("z_loss", z_loss)
    register_loss_term("hidden_norm", hidden_norm)


def packed_tokens(config: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    tokens_BX = torch.randint(1, config.vocab_size, (2, 13))
    tokens_BX[:, 5] = 0
    return tokens_BX, document_ids(tokens_BX, end_of_text=0)


@pytest.mark.parametrize("masked", [False, True], ids=["whole sequences", "documents"])
def test_value_and_gradient_are_those_by_hand(masked: bool) -> None:
    config = small_config(num_nextn_predict_layers=1)
    model = small_model(config)
    tokens_BX, documents_BX = packed_tokens(config)
    documents = documents_BX if masked else None
    terms = select_loss_terms({"z_loss": 0.01, "hidden_norm": -0.5})
    assert [term.name for term in terms] == ["hidden_norm", "z_loss"]
    losses = Objective(model, terms)(tokens_BX, 0.3, 0.001, documents)
    plain = Objective(model)(tokens_BX, 0.3, 0.001, documents)

    counted_BS = documents_BX[:, 1:] == documents_BX[:, :-1] if masked else torch.ones(2, 12, dtype=torch.bool)
    num_targets = counted_BS.sum()
    if masked:
        assert num_targets == count_targets(documents_BX) < 24
    documents_BS = None if documents is None else documents_BX[:, :-1]
    hidden_BSD = model.hidden_states(tokens_BX[:, :-1], documents_BS).main_BSD
    z_BS = (hidden_BSD @ model.head_weight_VD.T).logsumexp(-1).square()
    norm_BS = hidden_BSD.square().mean(-1)
    expected_N = torch.stack([norm_BS[counted_BS].sum(), z_BS[counted_BS].sum()]) / num_targets
    torch.testing.assert_close(losses.terms_N, expected_N.detach())
    assert plain.terms_N.shape == (0,)
    for name in ("main", "mtp", "balance"):
        assert torch.equal(getattr(losses, name), getattr(plain, name))
    by_hand = plain.total - 0.5 * expected_N[0] + 0.01 * expected_N[1]
    torch.testing.assert_close(losses.total, by_hand)
    parameters = list(model.parameters())
    found, exact = (
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for loss in (losses.total, by_hand)
    )
    for gradient, correct in zip(found, exact, strict=True):
        torch.testing.assert_close(gradient, correct, rtol=1e-4, atol=1e-6)


def test_validation_leaves_the_terms_out() -> None:
    def fails(inputs: LossInputs) -> Tensor:
        raise AssertionError

    config = small_config()
    tokens_BX, _ = packed_tokens(config)
    objective = Objective(small_model(config), [LossTerm("fails", 1.0, fails)])
    losses: Losses = objective(tokens_BX, 0.0, 0.0, main_only=True)
    assert losses.total == losses.main


def train_with_terms(parallel: dict[str, Any], masked: bool, weights: dict[str, float]) -> dict[str, Any]:
    """Trains three steps on the ranks of a layout; every rank registers the terms."""
    register_loss_term("z_loss", z_loss)
    register_loss_term("hidden_norm", hidden_norm)
    values: list[np.ndarray] = []
    build = parallel_runs.engine_of

    def engine_of(*arguments: Any) -> Any:
        engine = build(*arguments)
        run_step = engine.run_step

        def recorded(*batches: Any) -> Any:
            result = run_step(*batches)
            values.append(result.losses.terms_N.numpy())
            return result

        engine.run_step = recorded
        return engine

    parallel_runs.engine_of = engine_of
    try:
        training, model = {"loss_terms": weights}, {"num_hidden_layers": 2}
        return {**parallel_runs.train(3, parallel, training, "cpu", masked, model), "terms": values}
    finally:
        parallel_runs.engine_of = build


WEIGHTS = {"z_loss": 0.05, "hidden_norm": 0.1}


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> dict[str, Any]:
    """What one process trains."""
    (found,) = pool.run(1, train_with_terms, {}, True, WEIGHTS)
    return found


def test_the_total_changes_and_the_main_loss_does_not(pool: RankPool, alone: dict[str, Any]) -> None:
    (without,) = pool.run(1, train_with_terms, {}, True, {})
    assert alone["rows"][0][0][0] != without["rows"][0][0][0]
    assert alone["rows"][0][0][1] == without["rows"][0][0][1]


@pytest.mark.parametrize(
    "layout",
    [
        {"data_shard": 2},
        {"pipeline": 2},
        {"data_shard": 2, "expert": 2},
        {"data_shard": 2, "pipeline": 2},
    ],
    ids=["FSDP 2", "PP 2", "EP 2", "FSDP 2 × PP 2"],
)
def test_every_layout_trains_as_one_process(pool: RankPool, alone: dict[str, Any], layout: dict[str, int]) -> None:
    config = parallel_runs.run_config(3, layout, {})
    results = pool.run(config.parallel.world_size, train_with_terms, layout, True, WEIGHTS)
    for result in results:
        np.testing.assert_allclose(result["terms"], alone["terms"], rtol=2e-5)
        for found, expected in zip(result["rows"], alone["rows"], strict=True):
            np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
    gradients = parallel_runs.whole(results, "gradients")
    for name, expected in parallel_runs.whole([alone], "gradients").items():
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-3, atol=1e-6, err_msg=name)


def test_a_run_logs_the_value_of_each_term(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, steps=2), ["training.loss_terms.z_loss=1e-3"])
    train_run(config, CPU)
    records = [json.loads(line) for line in (config.logging.directory / "metrics.jsonl").read_text().splitlines()]
    values = [record["loss_terms/z_loss"] for record in records if "loss" in record]
    assert len(values) == 2
    assert all(value > 0 for value in values)


def test_unknown_names_are_refused_in_one_line() -> None:
    message = (
        "training.loss_terms.zloss: there is no loss term of this name; known: hidden_norm, z_loss; install the "
        "package that provides it, or remove the field"
    )
    with pytest.raises(ConfigError) as error:
        select_loss_terms({"z_loss": 0.1, "zloss": 0.1})
    assert str(error.value) == message


def test_a_name_is_registered_once() -> None:
    register_loss_term("z_loss", z_loss)
    with pytest.raises(ValueError, match="the name is taken"):
        register_loss_term("z_loss", hidden_norm)


def test_entry_points_of_an_installed_package_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "entropy_package.py").write_text("def entropy(inputs):\n    return inputs.hidden_BSD.sum()\n")
    information = tmp_path / "entropy_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: entropy-package\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[deepseek_v3.loss_terms]\nentropy = entropy_package:entropy\nbroken = entropy_package:nothing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (term,) = select_loss_terms({"entropy": 2.0})
    assert (term.name, term.weight) == ("entropy", 2.0)
    assert term.function is sys.modules["entropy_package"].entropy
    with pytest.raises(ConfigError, match=r"training.loss_terms.broken: the entry point .* cannot be loaded"):
        select_loss_terms({"broken": 1.0})
    with pytest.raises(ConfigError, match="known: broken, entropy, hidden_norm, z_loss;"):
        select_loss_terms({"other": 1.0})
    again = tmp_path / "other_package-1.0.dist-info"
    again.mkdir()
    (again / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (again / "entry_points.txt").write_text("[deepseek_v3.loss_terms]\nentropy = other_package:entropy\n")
    with pytest.raises(ConfigError, match=r"training.loss_terms.entropy: several packages offer it"):
        select_loss_terms({"entropy": 2.0})


def test_the_field_appears_in_yaml_only_when_it_is_set(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path))
    assert "loss_terms" not in config_to_yaml(config)
    assert "loss_terms" not in config.model_dump(mode="json")["training"]
    training = config.training.model_copy(update={"loss_terms": {"z_loss": 0.001}})
    changed = config.model_copy(update={"training": training})
    assert "z_loss: 0.001" in config_to_yaml(changed)
    again = config_from_dict(changed.model_dump(mode="json"), "test")
    assert again == changed
    assert hash(again) == hash(changed) != hash(config)
    assert again.training.loss_terms == {"z_loss": 0.001}


def test_ignored_targets_do_not_count() -> None:
    inputs = LossInputs(torch.ones(1, 3, 2), torch.tensor([[4, IGNORED, 5]]), torch.ones(9, 2), small_config())
    assert inputs.sum_over_targets(torch.tensor([[1.0, float("nan"), 3.0]])) == 4.0
