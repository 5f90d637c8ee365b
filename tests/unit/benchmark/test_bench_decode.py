"""`dsv3 bench decode`: every system is compared with float64 first, and one that is wrong has no time."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_v3.benchmark import command, decode_benchmark
from deepseek_v3.benchmark.ceilings import Ceilings
from deepseek_v3.benchmark.decode_benchmark import DecodeBenchmark, DecodeMeasurement, DecodePeer, measure_decoding
from deepseek_v3.benchmark.decode_cases import (
    LAYOUTS,
    RANK,
    ROPE,
    SCALE,
    DecodeError,
    DecodeShape,
    Tolerance,
    checked_outputs,
    make_inputs,
)
from deepseek_v3.benchmark.peers import flashmla
from deepseek_v3.ops.fp8 import E4M3
from deepseek_v3.ops.mla_decode import MLA_DECODE, reference
from deepseek_v3.ops.mla_decode.formats import PAGE, LatentFormat
from deepseek_v3.ops.operation import Backend
from deepseek_v3.utils.errors import BenchmarkError
from helpers.runs import dsv3, message_of

CPU = torch.device("cpu")
TINY = DecodeShape(2, 2 * PAGE, 3, 2)
GPU = torch.device("cuda")
BF16 = LAYOUTS["bf16"]


@pytest.fixture(autouse=True)
def _tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_benchmark, "CPU_SHAPES", (TINY,))


class SeesTheFuture:
    """A back end without a causal mask: every query sees what the last one sees."""

    def mla_decode(self, q_BSHL: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        pairs = [reference.mla_decode(q_BHL.unsqueeze(1), *others) for q_BHL in q_BSHL.unbind(1)]
        out, sums = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
        return out, sums


class FakeLibrary:
    """Both of FlashMLA's libraries, computed by the reference."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def dense_decode_fwd(self, *arguments: Any) -> tuple[Tensor, ...]:
        self.calls.append(arguments[7:])
        return *self._decode(*arguments[:7]), torch.tensor([7]), torch.tensor([8])

    def get_mla_decoding_metadata_dense_fp8(self, lengths_B: Tensor, rows: int, key_heads: int) -> list[Tensor]:
        assert (len(lengths_B), rows, key_heads) == (TINY.batch, TINY.queries * TINY.heads, 1)
        return [torch.tensor([7]), torch.tensor([8])]

    def fwd_kvcache_mla_fp8(self, q: Tensor, pages: Tensor, *others: Any) -> list[Tensor]:
        assert q.dtype == pages.dtype == E4M3
        schedule, scales = others[5:7], others[7:]
        assert [each.tolist() for each in (*schedule, *scales)] == [[7], [8], [1.0], [1.0]]
        return [*self._decode(q.bfloat16(), pages.bfloat16(), *others[:5])]

    def _decode(
        self, q: Tensor, pages: Tensor, rank: int, lengths: Tensor, table: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        assert causal
        assert pages.shape[2] == 1
        layout = LatentFormat(rank, pages.shape[-1] - rank, torch.bfloat16)
        out, sums = reference.mla_decode(q, pages.squeeze(2), table, lengths, layout, scale)
        return out, sums.transpose(1, 2)


def test_every_back_end_and_cache_is_measured(tmp_path: Path) -> None:
    output = tmp_path / "decode.json"
    result = dsv3("bench", "decode", "--device", "cpu", "--output", output, "--commit", "abc")
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text(encoding="utf-8"))
    assert (found["command"], found["commit"]) == ("bench decode", "abc")
    assert found["ceilings"]["copy_gb_per_s"] > 0
    assert [each["cache"] for each in found["measurements"]] == ["bf16", "fp8"]
    for each in found["measurements"]:
        assert [each[name] for name in ("batch", "context", "heads", "queries")] == [2, 128, 3, 2]
        assert each["failed"] is None
        assert 0 < each["error"]["cosine"] <= each["allowed"]["cosine"]
        assert 0 < each["error"]["output"] <= 1
        assert each["error"]["log_sum"] <= 1
        assert each["floor_seconds"] > 0
        assert each["tflops"] == pytest.approx(each["operations"] / each["seconds"] / 1e12)
        assert each["gb_per_s"] == pytest.approx(each["bytes"] / each["seconds"] / 1e9)
    assert "2 × 128, 3, 2" in result.output
    assert "figures of a CPU" in result.output
    assert "dsv3 bench decode --peers flashmla" in result.output


def test_a_wrong_decoder_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MLA_DECODE, "backends", {"faulty": Backend("faulty", SeesTheFuture), **MLA_DECODE.backends})
    output = tmp_path / "decode.json"
    result = dsv3("bench", "decode", "--kv", "bf16", "--device", "cpu", "--output", output)
    assert result.exit_code == 1
    message = message_of(result)
    assert message.startswith(
        "no speed is shown for 2 × 128, 3, 2, bf16, faulty: its largest error of an output is"
    )
    found = json.loads(output.read_text(encoding="utf-8"))["measurements"]
    assert [(each["system"], each["seconds"] is not None) for each in found] == [
        ("faulty", False),
        ("reference", True),
    ]


def test_a_missing_peer_is_a_reason() -> None:
    result = dsv3("bench", "decode", "--peers", "flashmla", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for cache in ("bf16", "fp8"):
        assert f"FlashMLA, {cache}: no figures: needs a CUDA device" in result.output
    assert "FlashMLA, fp8: 576 bytes a token" in result.output
    assert "--peers" not in result.output.partition("Next:")[2]


def test_a_peer_stands_beside_our_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary()
    monkeypatch.setattr(flashmla, "_load", lambda *_: library)
    result = measure_decoding(["bf16", "fp8"], [flashmla.FLASH_MLA], CPU)
    assert [each.failed for each in result.measurements] == [None] * 4
    by_cache = {each.cache: each for each in result.measurements if not each.is_ours}
    assert by_cache["bf16"].work == TINY.work(1152, 2, in_fp8=False)
    assert by_cache["fp8"].work == TINY.work(576, 1, in_fp8=True)
    assert library.calls[0] == (None, None, None)  # which computes the schedule
    assert [each.tolist() for each in library.calls[-1][:2]] == [[7], [8]]
    assert [("×" in line.split()[-1]) for line in result.table()[2:-1]] == [True, False, True, False]


def test_a_wrong_peer_is_only_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(inputs: Any) -> Any:
        return lambda: SeesTheFuture().mla_decode(*inputs, SCALE)

    peers = {"future": DecodePeer("Future", {"bf16": bind}, Tolerance())}
    monkeypatch.setattr(command, "DECODE_PEERS", peers)
    result = dsv3("bench", "decode", "--peers", "future", "--kv", "bf16", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "Future, bf16: no figures: its largest error of an output is" in result.output


def test_the_library_of_a_peer_may_be_missing_or_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BenchmarkError, match=r"compute capability 9\.0"):
        flashmla._load("_flashmla_C", GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(BenchmarkError, match=r"not installed: no vllm/_flashmla_C\.abi3\.so"):
        flashmla._load("_flashmla_C", GPU)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "_flashmla_C.abi3.so").write_bytes(b"no library")
    with pytest.raises(BenchmarkError, match=r"abi3\.so cannot be loaded: .*(invalid|too short)"):
        flashmla._load("_flashmla_C", GPU)


def test_work_of_decoding_is_counted_by_hand() -> None:
    shape = DecodeShape(batch=3, context=10, heads=4, queries=2)
    work = shape.work(row_bytes=656, query_bytes=2, in_fp8=True)
    assert work.operations == 3 * 4 * (9 + 10) * (2 * 576 + 2 * 512)
    assert work.num_bytes == 3 * (10 * 656 + 2 * 4 * (2 * 576 + 2 * 512 + 4))
    assert work.in_fp8
    largest = DecodeShape(128, 4096, 128, 1).work(BF16.row_bytes, 2, in_fp8=False)
    assert largest.operations / 281e-6 / 1e12 == pytest.approx(519.7, abs=0.1)


@pytest.mark.parametrize("cache", ["bf16", "fp8"])
def test_rows_that_no_query_sees_are_nan(cache: str) -> None:
    layout = LAYOUTS[cache]
    inputs = make_inputs(TINY, layout, CPU, ragged=True)
    assert inputs.lengths_B.tolist() == [127, 126]
    assert inputs.table_BM.shape == (2, 3)
    numbers = layout.unpack(inputs.pages, torch.float32)
    listed = numbers[inputs.table_BM.long()].flatten(1, 2)
    for sequence, length in zip(listed, inputs.lengths_B, strict=True):
        assert sequence[:length].isfinite().all()
        assert sequence[length:].isnan().all()
    whole = make_inputs(TINY, layout, CPU)
    assert whole.lengths_B.tolist() == [128, 128]
    assert whole.table_BM.shape == (2, 2)
    assert layout.unpack(whole.pages, torch.float32).isnan().all(-1).all(-1).sum() == 1


def test_rounded_inputs_are_numbers_of_8_bits() -> None:
    inputs = make_inputs(TINY, BF16, CPU, rounded=True)
    for each in (inputs.q_BSHL, inputs.pages):
        assert torch.equal(each.to(E4M3).to(torch.bfloat16).nan_to_num(), each.nan_to_num())


def test_only_some_sequences_are_compared() -> None:
    inputs = make_inputs(DecodeShape(40, PAGE, 1, 1), BF16, CPU)
    found = reference.mla_decode(*inputs, SCALE)
    (out, sums), expected = checked_outputs(inputs, found)
    assert out.shape == (16, 1, 1, RANK)
    assert torch.equal(out[-1], found[0][-1])
    assert expected[0].dtype == torch.float64
    assert Tolerance().problem(Tolerance().measure((out, sums), expected)) is None


def test_tolerances_of_decoding() -> None:
    tolerance = Tolerance(output=(1e-3, 0.1), cosine=1e-3, log_sum=(1e-6, 0.01))
    out, sums = torch.tensor([1.0, 0.0]), torch.tensor([10.0])

    def error_of(one: float, other: float, log_sum: float) -> DecodeError:
        return tolerance.measure((torch.tensor([one, other]), torch.tensor([log_sum])), (out, sums))

    assert error_of(1.0, 0.0, 10.0) == (0, 0, 0)
    assert error_of(1.05, 0.0, 10.0).output == pytest.approx(0.5, rel=1e-5)
    assert error_of(1.0, 5e-4, 10.0).output == pytest.approx(0.5, rel=1e-5)
    assert error_of(1.0, 0.0, 10.2).log_sum == pytest.approx(2, rel=1e-4)
    assert error_of(1.2, 0.0, 10.0).cosine == pytest.approx(1 - 2.4 / 2.44, rel=1e-5)
    assert error_of(float("nan"), 0.0, 10.0) == (float("inf"),) * 3
    assert tolerance.measure((out[:1], sums), (out, sums)) == (float("inf"),) * 3
    assert tolerance.problem(DecodeError(1, 1e-3, 1)) is None
    for error, text in (
        (DecodeError(2, 0, 0), "an output is 2.00 times"),
        (DecodeError(0, 2e-3, 0), "is 2.0e-03, expected at most 0.001"),
        (DecodeError(0, 0, float("nan")), "a log-sum-exp"),
    ):
        assert text in str(tolerance.problem(error))


def test_the_nearer_limit_gives_the_rate() -> None:
    work = TINY.work(1152, 2, in_fp8=False)
    ours = DecodeMeasurement(
        TINY, "bf16", "cuda", True, work, 1e-6, True, DecodeError(0, 0, 0), Tolerance(), 2e-6, None
    )
    peer = replace(ours, system="Peer", is_ours=False, seconds=3e-6, is_bound_by_products=False)
    made = DecodeBenchmark(CPU, Ceilings(1.0, None, 1.0), {}, measurements=[ours, peer])
    first, second = made.table()[2:4]
    assert f"50%  {work.operations / 2e-6 / 1e12:.1f} TFLOP/s" in first
    assert first.endswith("1.50×")
    assert f"33%  {work.num_bytes / 3e-6 / 1e9:,.0f} GB/s".split() == second.split()[-4:-1]


@pytest.mark.parametrize(("option", "names"), [("kv", "expected bf16 or fp8"), ("peers", "expected flashmla")])
def test_unknown_names_are_refused(option: str, names: str) -> None:
    result = dsv3("bench", "decode", f"--{option}", "int4")
    assert result.exit_code == 1
    assert message_of(result) == f"--{option} int4: {names}"


def test_the_published_widths() -> None:
    assert (RANK, ROPE) == (512, 64)
    assert [LAYOUTS[each].row_bytes for each in decode_benchmark.CACHES] == [1152, 656]
