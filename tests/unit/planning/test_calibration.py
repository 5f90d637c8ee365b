"""Which fit of the planner's factors a device takes."""

from dataclasses import replace

import pytest

from deepseek_v3.planning.advice.advisor import sources
from deepseek_v3.planning.calibration import calibration, nearest_fit, read_fits
from deepseek_v3.planning.hardware import Device, find_device, known_devices

H100 = next(fit for fit in read_fits() if fit.device == "H100")
FITS = [H100, replace(H100, device="H200"), replace(H100, device="RTX 3090")]


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
    named = _device("H100").model_copy(update={"name": "NVIDIA H100 80GB HBM3", "memory_gib": 40.0})
    assert H100.fits(named)
    assert not H100.fits(_device("H200"))
    assert "scaled" not in sources(_device("H100"))["memory and time"]
    assert "scaled to A100 by its published rates" in sources(_device("A100"))["memory and time"]


def test_every_known_device_has_a_fit_with_positive_factors() -> None:
    for device in known_devices():
        fit = calibration(device)
        for rates in (fit.bfloat16, fit.float32):
            assert rates.matrices >= 1
            assert rates.attention >= 1
            assert set(rates.assumed) <= set(vars(rates))


def test_a_fit_of_a_device_outside_the_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"calibration.json: 'MI300' is not in the planner's table"):
        replace(H100, device="MI300").distance(_device("H100"))
