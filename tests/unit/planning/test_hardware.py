"""The table of accelerators: look-up by name and memory, plausible figures, and files of the user."""

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.planning.hardware import (
    Device,
    device_with_memory,
    find_device,
    known_devices,
    load_device,
    peak_bfloat16_flops,
)
from deepseek_v3.utils.errors import ConfigError

OWN: dict[str, Any] = {
    "name": "our accelerator",
    "memory_gib": 64.0,
    "bfloat16_tflops": 400.0,
    "float32_tflops": 50.0,
    "memory_gb_per_s": 1600.0,
    "link_gb_per_s": 100.0,
    "dollars_per_hour": 2.0,
    "source": "its data sheet",
}


def _named(name: str) -> Device:
    device = find_device(name)
    assert device is not None
    return device


def _own(folder: Path, **changes: Any) -> Path:
    path = folder / "device.yaml"
    path.write_text(yaml.safe_dump({**OWN, **changes}, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("driver_name", "name"),
    [
        ("NVIDIA B200", "B200"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H800", "H800"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("h100", "H100"),
        ("rtx 4090", "RTX 4090"),
        ("cpu", "CPU"),
    ],
)
def test_devices_are_found_by_what_drivers_and_people_call_them(driver_name: str, name: str) -> None:
    assert _named(driver_name).name == name


@pytest.mark.parametrize("name", ["", "Tesla T4", "NVIDIA L40", "NVIDIA A10", "AMD Instinct MI300X", "RTX 40"])
def test_other_cards_are_not_taken_for_known_ones(name: str) -> None:
    assert find_device(name) is None


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA GH200 480GB", "NVIDIA GB200"])
def test_a_name_inside_a_longer_word_is_another_card(name: str) -> None:
    assert find_device(name) is None


def test_every_device_is_found_by_its_own_name() -> None:
    assert [_named(device.name) for device in known_devices()] == list(known_devices())
    names = [device.name for device in known_devices()]
    assert len(set(names)) == len(names)


def test_another_list_of_devices_is_searched() -> None:
    own = Device(**OWN)
    assert find_device("Our Accelerator 64 GB", (own,)) is own
    assert find_device("NVIDIA H100 80GB HBM3", (own,)) is None


@pytest.mark.parametrize("device", known_devices(), ids=lambda device: device.name)
def test_device_figures_are_plausible(device: Device) -> None:
    assert len(device.source.split()) >= 3
    assert 0 < device.dollars_per_hour < 20
    assert 0.1 < device.float32_tflops < 200
    assert device.devices_per_node in (1, 8)
    assert device.is_cpu == (device.bfloat16_tflops is None)
    assert device.link_gb_per_s < device.memory_gb_per_s
    assert device.network_gb_per_s <= device.memory_gb_per_s
    assert device.memory_bytes == device.memory_gib * 2**30
    if device.bfloat16_tflops is not None:
        assert 16 < device.memory_gib < 200
        assert 500 < device.memory_gb_per_s < 10_000
        assert 32 <= device.link_gb_per_s <= 900
        assert 1.5 < device.bfloat16_tflops / device.float32_tflops < 40
        assert device.fp8_tflops is None or device.fp8_tflops == pytest.approx(
            2 * device.bfloat16_tflops, rel=0.002
        )
        # Without sparsity, no card has a higher ratio of operations to bytes.
        assert 50 < device.bfloat16_tflops * 1e3 / device.memory_gb_per_s < 500
        # Drivers report slightly less memory than the advertised size.
        sold = next(size for size in (24, 32, 40, 48, 80, 94, 141, 192) if size >= device.memory_gib)
        assert device.memory_gib > 0.9 * sold


def test_peak_rates_follow_the_number_format() -> None:
    assert _named("H100").peak(1) == 1979e12
    assert _named("A100").peak(1) == _named("A100").peak(2) == 312e12
    assert _named("H100").peak(2) == 989e12
    assert _named("H100").peak(4) == 67e12
    cpu = _named("CPU")
    assert cpu.peak(1) == cpu.peak(2) == cpu.peak(4) == cpu.float32_tflops * 1e12
    without = Device(**{**OWN, "bfloat16_tflops": None})
    assert without.peak(2) == without.peak(4) == 50e12


def test_peak_rates_are_found_by_the_card_in_the_device_name() -> None:
    assert peak_bfloat16_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_bfloat16_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_bfloat16_flops("a card nobody has heard of") is None
    assert peak_bfloat16_flops("CPU") is None


@pytest.mark.parametrize(
    ("gigabytes", "name"),
    [
        (24, "RTX 4090"),
        (32, "RTX 5090"),
        (40, "A100 40GB"),
        (48, "L40S"),
        (80, "H100"),
        (79.6, "H100"),
        (141, "H200"),
        (192, "B200"),
    ],
)
def test_devices_are_found_by_the_memory_they_are_sold_with(gigabytes: float, name: str) -> None:
    assert device_with_memory(gigabytes).name == name


@pytest.mark.parametrize("gigabytes", [1, 16, 28, 64, 110, 1000])
def test_an_unknown_memory_size_lists_the_known_ones(gigabytes: float) -> None:
    with pytest.raises(ConfigError, match=rf"^--gpu-memory {gigabytes}: .*80 \(H100\).*--gpu.*--hardware") as error:
        device_with_memory(gigabytes)
    assert "\n" not in str(error.value)


@given(st.floats(0.1, 2000))
def test_a_device_found_by_size_has_about_that_size(gigabytes: float) -> None:
    try:
        device = device_with_memory(gigabytes)
    except ConfigError:
        return
    assert device.memory_gib == pytest.approx(gigabytes, rel=0.13)


def test_a_users_own_device(tmp_path: Path) -> None:
    device = load_device(_own(tmp_path))
    assert device == Device(**OWN)
    assert (device.network_gb_per_s, device.devices_per_node, device.is_cpu) == (50.0, 8, False)
    changed = load_device(
        _own(tmp_path, devices_per_node=4, network_gb_per_s=12.5, dollars_per_hour=0, is_cpu=True)
    )
    assert (changed.devices_per_node, changed.network_gb_per_s, changed.dollars_per_hour) == (4, 12.5, 0)
    for table_row in known_devices():
        assert load_device(_own(tmp_path, **table_row.model_dump())) == table_row


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("memory_gib", -1.0, "greater than 0"),
        ("memory_gib", "much", "number"),
        ("bfloat16_tflops", 0.0, "greater than 0"),
        ("float32_tflops", None, "number"),
        ("memory_gb_per_s", [], "number"),
        ("link_gb_per_s", 0, "greater than 0"),
        ("network_gb_per_s", -5, "greater than 0"),
        ("devices_per_node", 1.5, "valid integer"),
        ("devices_per_node", 0, "greater than 0"),
        ("dollars_per_hour", -0.5, "greater than or equal to 0"),
        ("is_cpu", "yes", "expected true or false"),
        ("name", 7, "expected text"),
        ("source", "", "at least 1 character"),
        ("memory", 80, "did you mean memory_gib"),
    ],
)
def test_a_bad_field_is_named_with_its_line(tmp_path: Path, field: str, value: object, problem: str) -> None:
    path = _own(tmp_path, **{field: value})
    lines = path.read_text(encoding="utf-8").splitlines()
    number = next(number for number, line in enumerate(lines, start=1) if line.startswith(f"{field}:"))
    with pytest.raises(ConfigError) as error:
        load_device(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{number}: {field}: ")
    assert problem in message
    assert "\n" not in message


def test_every_bad_field_has_a_line_of_its_own(tmp_path: Path) -> None:
    path = _own(tmp_path, memory_gib=0, link_gb_per_s="fast", colour="green")
    with pytest.raises(ConfigError) as error:
        load_device(path)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["memory_gib", "link_gb_per_s", "colour"]
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in (2, 6, 9)]


@pytest.mark.parametrize("field", ["name", "memory_gib", "float32_tflops", "dollars_per_hour", "source"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    path = tmp_path / "device.yaml"
    path.write_text(yaml.safe_dump({name: OWN[name] for name in OWN if name != field}), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_device(path)
    assert str(error.value).startswith(f"{path}: {field}: missing")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("- a list", "holds a list"), ("name: [", "is not valid YAML"), ("name: a\nname: b", ":2: .*given twice")],
)
def test_a_file_that_is_no_device_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "device.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"device.yaml.*{problem}"):
        load_device(path)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_device(tmp_path / "nowhere.yaml")


def test_a_date_is_text(tmp_path: Path) -> None:
    assert load_device(_own(tmp_path, source=datetime.date(2026, 1, 1))).source == "2026-01-01"
