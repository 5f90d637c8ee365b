"""The DeepEP back end with fakes of the library, and the selection of a back end."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_v3.moe.all_to_all import AllToAllDispatcher
from deepseek_v3.moe.deepep import BufferShape, DeepEPDispatcher
from deepseek_v3.moe.expert_parallel import Fp8Dispatch
from deepseek_v3.moe.select_dispatcher import select_dispatcher
from deepseek_v3.ops.fp8 import FP8_QUANTIZE
from deepseek_v3.utils.errors import ConfigError
from helpers.experts import Case, run_this_rank
from helpers.fakes.deep_ep import run_this_rank_with_deepep
from helpers.rank_pool import RankPool

FP8 = Fp8Dispatch(FP8_QUANTIZE.backends["reference"].load())
GENERATIONS = ["Buffer", "ElasticBuffer"]
# Rows of bfloat16 and of 8 bits with whole blocks; 8 experts, of which each rank holds as many.
MODEL = {"hidden_size": 128, "n_group": 1, "topk_group": 1}
SITUATIONS: dict[str, dict[str, Any]] = {
    "two ranks": {"lengths": (5, 7)},
    "four ranks": {"lengths": (5, 4, 3, 7)},
    "a rank without tokens": {"lengths": (5, 0, 3, 7)},
    "empty ranks": {"lengths": (5, 0, 3, 7), "favoured": (2, 3), "model": MODEL | {"num_experts_per_tok": 2}},
    "all to one expert": {"lengths": (4, 4), "favoured": (5,), "model": MODEL | {"num_experts_per_tok": 1}},
    "8 bits": {"lengths": (5, 4, 3, 7), "fp8": True},
    "recomputed": {"lengths": (5, 4), "recomputed": True},
}


def run_this_rank_with_each(case: Case) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The results of this rank with torch, and with each generation of DeepEP."""
    return run_this_rank(case), [run_this_rank_with_deepep(case, generation) for generation in GENERATIONS]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_deepep_equals_torch_bit_for_bit(pool: RankPool, situation: str) -> None:
    """Bit for bit: rows arrive in the same order, and sums of a few bfloat16 are exact in float32."""
    case = Case(**{"model": MODEL, **SITUATIONS[situation]}, dtype=torch.bfloat16)
    for expected, found in pool.run(len(case.lengths), run_this_rank_with_each, case):
        for generation, one in zip(GENERATIONS, found, strict=True):
            assert one.keys() == expected.keys()
            assert all(torch.equal(one[name], expected[name]) for name in expected), generation


# Selecting a back end.

BUFFER_SHAPE = BufferShape(tokens=64, width=256, experts_per_token=2, dtype=torch.bfloat16)


class Group(SimpleNamespace):
    """The part of a process group that the selection reads."""

    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 1


class SilentBuffer:
    """A buffer that is created and not used."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.get_theoretical_num_sms = lambda *_: 4

    @staticmethod
    def get_dispatch_config(*_: Any) -> Any:
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda *_: 1, get_rdma_buffer_size_hint=lambda *_: 1)

    get_combine_config = get_dispatch_config


def refuse_number_of_ranks(number: int) -> Any:
    raise AssertionError(f"Unsupported number of EP ranks: {number}")


def library(*generations: str) -> ModuleType:
    module = ModuleType("deep_ep")
    for generation in generations:
        setattr(module, generation, SilentBuffer)
    return module


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks on CUDA devices, with both generations of the library."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda _: "cuda:nccl")
    monkeypatch.setitem(sys.modules, "deep_ep", library("Buffer", "ElasticBuffer"))


def chosen(kind: Any, shape: BufferShape = BUFFER_SHAPE, num_experts: int = 8, **options: Any) -> Any:
    return select_dispatcher(kind, num_experts, Group(), shape, torch.device("cpu"), **options)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("kind", ["auto", "deepep"])
@pytest.mark.parametrize("installed", [["Buffer"], ["ElasticBuffer"], ["Buffer", "ElasticBuffer"]])
def test_auto_selects_deepep_and_its_newest_buffer(
    kind: str, installed: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", library(*installed))
    with caplog.at_level(logging.INFO, logger="deepseek_v3"):
        assert isinstance(chosen(kind, fp8=FP8), DeepEPDispatcher)
    assert f"DeepEP's {installed[-1]}, dispatched rows in FP8" in caplog.text


@pytest.mark.usefixtures("gpus")
def test_torch_is_selected_by_name() -> None:
    dispatcher = chosen("torch", ranks_per_node=2, fp8=FP8)
    assert isinstance(dispatcher, AllToAllDispatcher)
    assert [(step.num_ranks, step.stride) for step in dispatcher.steps] == [(2, 2), (2, 1)]
    assert dispatcher.fp8


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(("in_groups", "num_sms"), [(False, 4), (True, 20)])
def test_group_limited_gates_do_not_use_the_librarys_estimate(
    in_groups: bool, num_sms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def dispatch(_buffer: Any, _rows: Any, **options: Any) -> Any:
        asked.append(options)
        return None, None, None, SimpleNamespace(num_recv_tokens_per_expert_list=[]), None

    monkeypatch.setattr(SilentBuffer, "dispatch", dispatch, raising=False)
    monkeypatch.setattr(SilentBuffer, "capture", lambda _: None, raising=False)
    monkeypatch.setattr(SilentBuffer, "combine", lambda _, __, **options: asked.append(options), raising=False)
    buffer = chosen("deepep", BUFFER_SHAPE._replace(in_groups=in_groups))._buffer
    buffer.dispatch(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    buffer.dispatch_again(torch.zeros(1), None)
    buffer.combine(torch.zeros(1), None)
    assert [options["num_sms"] for options in asked] == [num_sms] * 3


OBSTACLES: dict[str, Any] = {
    "no CUDA": (BUFFER_SHAPE, {}, "it needs CUDA devices"),
    "no NCCL": (BUFFER_SHAPE, {}, "NCCL between them"),
    "not installed": (BUFFER_SHAPE, {}, "deep_ep cannot be imported"),
    "unknown": (BUFFER_SHAPE, {}, "neither Buffer nor ElasticBuffer"),
    "float32": (
        BUFFER_SHAPE._replace(dtype=torch.float32),
        {},
        "the model computes in torch.float32",
    ),
    "ranks": (BUFFER_SHAPE, {}, "its Buffer has no configuration for 4 ranks"),
    "int32": (BUFFER_SHAPE, {}, "deep_ep was built for expert numbers of type torch.int32, not torch.int64"),
    "odd width": (BUFFER_SHAPE._replace(width=252), {}, "hidden_size = 252 is not a multiple of 8"),
    "no whole blocks": (
        BUFFER_SHAPE._replace(width=192),
        {"fp8": FP8},
        "hidden_size = 192 is not a multiple of 128",
    ),
}


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_auto_says_why_deepep_cannot_run_and_naming_it_raises(
    obstacle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shape, options, reason = OBSTACLES[obstacle]
    if obstacle == "no CUDA":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif obstacle == "no NCCL":
        monkeypatch.setattr(dist, "get_backend_config", lambda _: "cpu:gloo")
    elif obstacle == "not installed":
        monkeypatch.setitem(sys.modules, "deep_ep", None)
    elif obstacle == "unknown":
        monkeypatch.setitem(sys.modules, "deep_ep", library())
    elif obstacle == "ranks":
        monkeypatch.setitem(sys.modules, "deep_ep", library("Buffer"))
        monkeypatch.setattr(SilentBuffer, "get_combine_config", refuse_number_of_ranks)
    elif obstacle == "int32":
        monkeypatch.setattr(sys.modules["deep_ep"], "topk_idx_t", torch.int32, raising=False)
    with caplog.at_level(logging.INFO, logger="deepseek_v3"):
        assert isinstance(chosen("auto", shape, **options), AllToAllDispatcher)
    assert reason in caplog.text
    with pytest.raises(ConfigError, match=r"expert_back_end = deepep: .*expert_back_end=torch") as error:
        chosen("deepep", shape, **options)
    assert reason in str(error.value)


@pytest.mark.parametrize("kind", ["auto", "torch", "deepep"])
def test_experts_must_divide_over_the_ranks(kind: str) -> None:
    with pytest.raises(ConfigError, match="10 experts do not divide over 4 ranks"):
        chosen(kind, num_experts=10)


@pytest.mark.parametrize(("ranks_per_node", "num_steps"), [(None, 1), (1, 1), (2, 2), (4, 1), (8, 1)])
def test_two_exchange_steps_where_there_are_nodes(ranks_per_node: int | None, num_steps: int) -> None:
    assert len(chosen("torch", ranks_per_node=ranks_per_node).steps) == num_steps


def test_a_group_must_be_whole_nodes() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.expert = 4 ranks are not a whole number of nodes of 3"):
        chosen("torch", ranks_per_node=3)
