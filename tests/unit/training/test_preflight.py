"""What a run is checked for before anything is allocated."""

import logging
from pathlib import Path

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.calibration import calibration
from deepseek_v3.training import preflight
from deepseek_v3.training.data import open_tokens
from deepseek_v3.training.parallel.auto_layout import resolve_layout
from deepseek_v3.training.preflight import Peer, check_memory, describe_device, log_findings, require_same_versions
from deepseek_v3.training.train import train_run
from deepseek_v3.utils.errors import ConfigError, PlanError
from helpers.runs import write_run

CPU = torch.device("cpu")


def _with(config: RunConfig, section: str, **changes: object) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})


def test_a_host_has_what_its_control_groups_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "usable_memory", lambda: 3 * 2**30)
    assert describe_device(CPU).memory_bytes == 3 * 2**30
    assert describe_device(CPU, local_ranks=2).memory_bytes == 3 * 2**29


def test_a_run_too_large_is_refused_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(preflight, "usable_memory", lambda: 2**29)
    config = load_config(write_run(tmp_path))
    with pytest.raises(PlanError, match="GiB on CPU"):
        train_run(config, CPU)
    assert not config.logging.directory.exists()
    assert not config.checkpoint.directory.exists()


def test_force_starts_it_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "usable_memory", lambda: 2**29)
    with caplog.at_level(logging.WARNING, logger="deepseek_v3"):
        check_memory(load_config(write_run(tmp_path)), describe_device(CPU), force=True)
    assert "started by --force although this run needs" in caplog.text


def test_a_layout_of_other_size_is_refused_with_one_that_fits(tmp_path: Path) -> None:
    config = _with(load_config(write_run(tmp_path)), "parallel", data_shard=4, pipeline=2)
    with pytest.raises(
        ConfigError, match=r"× pipeline 2 = 8 ranks, and 4 processes were started; --set parallel.data_shard=2 fits"
    ):
        resolve_layout(config, 4, describe_device(CPU))
    with pytest.raises(ConfigError, match=r"8 ranks, and 3 processes were started; let the planner choose"):
        resolve_layout(config, 3, describe_device(CPU))
    with pytest.raises(ConfigError, match=r"8 ranks, and 1 process was started; let the planner choose"):
        resolve_layout(config, 1, describe_device(CPU))
    assert resolve_layout(config, 8, describe_device(CPU)) == config


def test_the_planner_lays_out_what_was_started(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = _with(load_config(write_run(tmp_path)), "parallel", layout="auto")
    with caplog.at_level(logging.INFO, logger="deepseek_v3"):
        chosen = resolve_layout(config, 2, describe_device(CPU, 2)).parallel
    assert chosen.world_size == 2
    assert chosen.layout == "given"
    assert f"data_replicate {chosen.data_replicate}, data_shard {chosen.data_shard}" in caplog.text
    assert "of all that fit it has the shortest step" in caplog.text
    with pytest.raises(PlanError, match=r"the batch of 4 does not divide over 3 processes; start [12], or change"):
        resolve_layout(config, 3, describe_device(CPU, 3))


def test_the_planner_may_replace_degrees_that_fit_no_batch(tmp_path: Path) -> None:
    """As where a config for eight ranks is tried on two with a smaller batch."""
    unsuited = ["parallel.data_shard=8", "parallel.micro_batch_size=3"]
    with pytest.raises(ConfigError, match="is not a multiple of parallel"):
        load_config(write_run(tmp_path), unsuited)
    config = load_config(write_run(tmp_path), [*unsuited, "parallel.layout=auto"])
    chosen = resolve_layout(config, 2, describe_device(CPU, 2)).parallel
    assert chosen.world_size == 2
    assert config.training.global_batch_size % (chosen.micro_batch_size * chosen.data_ranks) == 0


def test_a_layout_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    config = _with(load_config(write_run(tmp_path)), "parallel", layout="auto")
    small = describe_device(CPU).model_copy(update={"memory_gib": 0.1})
    with pytest.raises(
        PlanError, match=r"no layout over 2 × CPU fits: the leanest needs 0\.\d GiB on each, of 0\.1"
    ):
        resolve_layout(config, 2, small)


@pytest.mark.gpu
def test_a_gpu_is_known_by_name_with_the_memory_that_is_free() -> None:
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()  # else the allocation below may take memory that an earlier test has freed
    described = describe_device(device)
    assert described.name == torch.cuda.get_device_name(device)
    _, total = torch.cuda.mem_get_info(device)
    held = torch.empty(2**30, dtype=torch.uint8, device=device)
    assert described.memory_bytes - describe_device(device).memory_bytes == pytest.approx(2**30, rel=0.05)
    assert 0.5 * total < described.memory_bytes <= 1.02 * total
    del held


@pytest.mark.parametrize(
    ("name", "capability", "fp8", "bfloat16", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 1979, 989, 3350),
        ("Tesla V100-SXM2-32GB", (7, 0), None, None, 2039),
        ("NVIDIA GeForce RTX 5090", (12, 0), None, 209.5, 1792),
        ("a card that nobody knows yet", (13, 0), 624, 312, 2039),
    ],
)
def test_a_gpu_is_described_by_name_units_and_free_memory(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    fp8: float | None,
    bfloat16: float | None,
    bandwidth: float,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (30 * 2**30, 32 * 2**30))
    described = describe_device(torch.device("cuda", 0))
    assert (described.name, described.memory_gb_per_s) == (name, bandwidth)
    assert (described.fp8_tflops, described.bfloat16_tflops) == (fp8, bfloat16)
    assert described.memory_bytes == pytest.approx(30 * 2**30 + calibration(described).context_bytes)


def test_one_table_shows_what_was_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(write_run(tmp_path))
    tokens = open_tokens(config)
    config.checkpoint.directory.mkdir()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        log_findings(config, describe_device(CPU), tokens, None, CPU)
    (found,) = caplog.messages
    names = " ".join(line.split("  ")[0] for line in found.splitlines()[3:])
    assert names == "memory disk data data checksum tokenizer peers versions rights rights"
    assert tokens.identity[0][:16] in found
    assert f"torch {torch.__version__}" in found
    assert "1 rank on 1 host answered: CPU" in found


def test_ranks_with_other_versions_are_named() -> None:
    same = Peer("one", "CPU", "torch 2.12")
    require_same_versions([same, same])
    with pytest.raises(ConfigError, match=r"torch 2\.13 on 1 rank, the first is rank 2 on two; install the same"):
        require_same_versions([same, same, Peer("two", "CPU", "torch 2.13")])
