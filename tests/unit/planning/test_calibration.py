"""Which fit of the planner's factors a device takes."""

from dataclasses import replace

import pytest

from deepseek_v3.config.loading import load_config
from deepseek_v3.planning.advice import advisor
from deepseek_v3.planning.advice.advisor import advise, sources
from deepseek_v3.planning.advice.request import PlanOptions
from deepseek_v3.planning.calibration import calibration, nearest_fit, read_fits
from deepseek_v3.planning.execution import Execution, resolve_execution
from deepseek_v3.planning.hardware import Device, find_device, known_devices
from deepseek_v3.utils.errors import ConfigError
from helpers import ROOT
from helpers.fp8_choices import EVERY_LAYER

H200 = next(fit for fit in read_fits() if fit.device == "H200")
TINY = ROOT / "configs" / "deepseek_v3_tiny.yaml"
NARROW = Execution(2, compiled=True)
FITS = [replace(H200, device="H100"), H200, replace(H200, device="RTX 3090")]


def _device(name: str) -> Device:
    device = find_device(name)
    assert device is not None
    return device


@pytest.mark.parametrize(
    ("name", "fitted"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX 3090"),
    ],
)
def test_a_device_takes_the_fit_of_the_nearest_rates(name: str, fitted: str) -> None:
    assert nearest_fit(FITS, _device(name)).device == fitted
    assert nearest_fit(FITS[::-1], _device(name)).device == fitted


def test_a_fit_is_a_device_s_own_whatever_the_device_is_called() -> None:
    named = _device("H200").model_copy(update={"name": "NVIDIA H200 SXM", "memory_gib": 40.0})
    assert H200.fits(named)
    assert not H200.fits(_device("H100"))
    assert "scaled" not in _sources("H200")["memory and time"]
    assert "scaled to H100 by its published rates" in _sources("H100")["memory and time"]
    assert "scaled to A100 by its published rates" in _sources("A100")["memory and time"]


def _sources(gpu: str, execution: Execution = NARROW) -> dict[str, str]:
    """The sources that an advice names whose only row is executed in this way."""
    advice = advise(PlanOptions(1, gpu).request(), {TINY: load_config(TINY)})
    rows = tuple(
        replace(row, layout=row.layout and replace(row.layout, execution=execution)) for row in advice.rows
    )
    return sources(replace(advice, rows=rows))


def test_a_plan_in_fp8_says_that_it_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8 = replace(NARROW, fp8=EVERY_LAYER)
    factors = ("fp8_matrices", "fp8_experts", "quantization")
    for assumed, says in ((factors, True), (factors[2:], True), ((), False)):
        fit = replace(H200, bfloat16=replace(H200.bfloat16, assumed=assumed))
        monkeypatch.setattr(advisor, "calibration", lambda _, fit=fit: fit)
        assert ("FP8" in _sources("H200", fp8)) == says
        assert "FP8" not in _sources("H200")


@pytest.mark.parametrize(("device", "width"), [("H100", 2), ("H200", 2), ("A100", None), ("CPU", 4)])
def test_fp8_needs_a_device_that_has_it(device: str, width: int | None) -> None:
    config = load_config(TINY)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"precision": "fp8"})})
    if width is not None:
        run = resolve_execution(_device(device), config)
        assert run.width == width
        assert run.fp8
    else:
        with pytest.raises(
            ConfigError, match=r"fp8: FP8 training is not known to run on A100, but on B200, .*H100"
        ):
            resolve_execution(_device(device), config)


def test_every_known_device_has_a_fit_with_positive_factors() -> None:
    for device in known_devices():
        fit = calibration(device)
        for rates in (fit.bfloat16, fit.float32):
            assert rates.matrices >= 1
            assert rates.attention >= 1
            assert set(rates.assumed) <= set(vars(rates))


def test_a_fit_of_a_device_outside_the_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"calibration.json: 'MI300' is not in the planner's table"):
        replace(H200, device="MI300").distance(_device("H100"))
