"""A run that cannot fit is refused, with the smallest change that makes it fit."""

import re

import pytest

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.hardware import Device, find_device
from deepseek_v3.planning.layout_search import estimate_layout, fastest_layout, fewest_devices
from deepseek_v3.planning.memory_check import require_memory, suggest_fix
from deepseek_v3.utils.errors import PlanError
from helpers import ROOT

CONFIGS = ROOT / "configs"


def _config(size: str, *overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"deepseek_v3_{size}.yaml", overrides)


def _device(gib: float) -> Device:
    h100 = find_device("H100")
    assert h100
    return h100.model_copy(update={"memory_gib": gib})


def _suggested(message: str) -> list[str]:
    return re.findall(r"--set (\S+)", message)


def test_a_run_that_fits_passes_and_one_byte_less_is_refused() -> None:
    config = _config("1b")
    needed = estimate_layout(config, _device(80)).needed_bytes / 2**30
    require_memory(config, _device(needed * (1 + 1e-12)))
    with pytest.raises(PlanError, match=r"needs \d+\.\d GiB on H100, which has \d+\.\d GiB free: weights 4\.1"):
        require_memory(config, _device(needed * (1 - 1e-6)))


@pytest.mark.parametrize("gib", [16, 18, 20, 24, 28, 32, 48])
def test_the_suggested_change_fits_and_no_shorter_one_does(gib: float) -> None:
    config = _config("1b", "parallel.micro_batch_size=40", "training.optimizer.moments=float32")
    device = _device(gib)
    changes = _suggested(suggest_fix(config, device))
    assert changes
    overrides = ["parallel.micro_batch_size=40", "training.optimizer.moments=float32", *changes]
    assert estimate_layout(_config("1b", *overrides), device).needed_bytes <= device.memory_bytes
    for left_out in changes:  # every change is needed, whatever the micro-batch size
        for micro in (1, 2, 4, 5, 8, 10, 16, 20, 40):
            fewer = [change for change in changes if change != left_out]
            if not any(change.startswith("parallel.micro_batch_size") for change in fewer):
                continue
            fewer = [change for change in fewer if not change.startswith("parallel.micro_batch_size")]
            trial = _config("1b", *overrides[:2], *fewer, f"parallel.micro_batch_size={micro}")
            assert estimate_layout(trial, device).needed_bytes > device.memory_bytes


def test_the_suggestion_has_few_and_fast_changes() -> None:
    config = _config("1b", "parallel.micro_batch_size=16")
    assert _suggested(suggest_fix(config, _device(40))) == ["parallel.micro_batch_size=10"]


def test_a_too_large_model_names_the_devices_it_needs() -> None:
    config, device = _config("10b", "parallel.data_shard=1"), _device(79.2)
    enough = fewest_devices(config, device)
    assert enough
    several = fastest_layout(config, device, enough)
    assert several
    assert several.needed_bytes <= device.memory_bytes
    message = suggest_fix(config, device)
    assert f"it takes {several.devices} of this kind" in message
    assert "--set" not in message


def test_a_model_that_never_fits_suggests_a_smaller_one() -> None:
    assert fewest_devices(_config("base"), _device(3)) is None
    assert "take a smaller model" in suggest_fix(_config("base"), _device(3))


@pytest.mark.parametrize("size", ["tiny", "1b", "5b", "10b", "15b", "20b", "base"])
def test_every_shipped_plan_fits_on_80_gb(size: str) -> None:
    require_memory(_config(size), _device(79.2))
