"""The table of layers that are faster in FP8: how it follows from measurements, and a whole run on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.planning.fp8_choice import SPEED_FILE, MeasuredSpeed, measured_speeds
from deepseek_v3.utils.errors import ConfigError
from helpers import ROOT
from helpers.runs import run_fields

sys.path.insert(0, str(ROOT / "benchmarks"))
import fp8_layers
from fp8_layers import Kind, Measurement, build_layers, derive_speeds, listed_layers, main, make_passes

CPU = torch.device("cpu")
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 144, "v_head_dim": 16}


def measurement(kind: Kind, rows: int, width: int, ratio: float | None, name: str = "") -> Measurement:
    size = (name or f"{kind}/{rows}/{width}", kind, rows, (4 * width, width), {"output": 0.04})
    return Measurement(*size, failed="wrong") if ratio is None else Measurement(*size, ratio, 1.0)


SIZES = st.sampled_from([512, 768, 1024, 2048, 4096])
MEASUREMENTS = st.lists(
    st.builds(
        measurement,
        st.sampled_from(fp8_layers.KINDS),
        SIZES,
        SIZES,
        st.sampled_from([None, 0.8, 1.0, 1.02, 1.03, 1.2, 2.0]),
    ),
    max_size=20,
)


@given(MEASUREMENTS)
def test_rows_cover_the_faster_layers_that_they_can(measurements: list[Measurement]) -> None:
    rows = derive_speeds("A GPU", measurements)
    for each in measurements:
        is_covered = any(each.is_covered(row) for row in rows)
        # The smallest row that covers a layer begins at its own size.
        smallest = MeasuredSpeed("A GPU", each.kind, each.rows, min(each.widths))
        assert is_covered == all(other.is_faster for other in measurements if other.is_covered(smallest))


@given(MEASUREMENTS)
def test_no_row_could_be_left_out(measurements: list[Measurement]) -> None:
    rows = derive_speeds("A GPU", measurements)
    for row in rows:
        others = [other for other in rows if other != row]
        assert len(others) == len(rows) - 1
        assert any(
            each.is_covered(row) and not any(each.is_covered(other) for other in others) for each in measurements
        )


def test_a_table_by_hand() -> None:
    """Width 512 is never faster, 1024 from 16384 rows on, 2048 from 4096 on; a layer that is wrong blocks."""
    measured = [
        measurement("projection", 32768, 512, 0.9),
        measurement("projection", 16384, 1024, 1.1),
        measurement("projection", 4096, 1024, 1.029),
        measurement("projection", 4096, 2048, 1.03),
        measurement("projection", 8192, 2048, 1.3),
        measurement("experts", 1024, 2048, 1.5),
        measurement("experts", 4096, 2048, None),
    ]
    assert derive_speeds("A GPU", measured) == [
        MeasuredSpeed("A GPU", "projection", rows=4096, width=2048),
        MeasuredSpeed("A GPU", "projection", rows=16384, width=1024),
    ]


def test_a_measurement_survives_its_file() -> None:
    for each in (measurement("experts", 1, 2, 1.5), measurement("experts", 1, 2, None)):
        assert Measurement.from_json(json.loads(json.dumps(each.as_json()))) == each


def test_the_list_names_layers_that_can_compute_in_fp8() -> None:
    listed = listed_layers()
    assert len({each.name for each in listed}) == len(listed) <= 30
    sizes = set()
    for each in listed:
        layer = build_layers(each.config, each.micro_batch_size, "bf16", CPU).layers[each.layer]
        assert layer.size.obstacle() is None
        sizes.add((layer.size.kind, layer.size.rows, layer.size.widths))
    assert len(sizes) == len(listed)


def write_config(folder: Path) -> Path:
    fields = run_fields(folder)
    fields["model"] |= WIDTHS
    fields["parallel"] = {"micro_batch_size": 1}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def test_experts_get_their_rows(tmp_path: Path) -> None:
    layers = build_layers(write_config(tmp_path), 2, "bf16", CPU)
    layer = layers.layers["mlp.experts"]
    layer.module.to_empty(device=CPU)
    passes = make_passes(layer, layers.dtype, layers.experts_per_token, CPU)
    ends_E = passes.inputs[-1]
    assert ends_E[-1] == layer.size.rows * len(ends_E)
    assert list(passes.leaves) == ["x", "gates", "gate_up_proj", "down_proj"]


def test_a_run_on_a_cpu_leaves_the_table_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = SPEED_FILE.read_bytes()
    options: dict[str, Any] = {"config": write_config(tmp_path), "output": tmp_path, "device": "cpu"}
    main(kind=["feed_forward", "experts"], **options)
    file = tmp_path / "fp8_layers_cpu.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["device_type"] == "cpu"
    assert record["versions"]["torch"]
    assert [layer["name"] for layer in record["layers"]] == [
        "tiny/micro_batch_1/mlp",
        "tiny/micro_batch_1/mlp.experts",
    ]
    for layer in record["layers"]:
        assert 0.01 < max(layer["errors"].values()) < 0.12
        assert layer["ratio"] == layer["ms_bf16"] / layer["ms_fp8"]
    assert "tiny/micro_batch_1/mlp: feed_forward, 32 rows, 64×128: " in capsys.readouterr().out

    monkeypatch.setitem(fp8_layers.BOUNDS, "feed_forward", 0.01)
    with pytest.raises(SystemExit, match=r"failed, and so covered by no row of the table: tiny/micro_batch_1/mlp$"):
        main(only=["*/mlp"], **options)
    network, experts = json.loads(file.read_text(encoding="utf-8"))["layers"]
    assert network["ms_fp8"] is None
    assert network["failed"].startswith("wrong in FP8: errors ")
    assert experts == record["layers"][1]
    assert SPEED_FILE.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["none"]}, "--only none: expected one of deepseek_v3_base/micro_batch_1/"),
        ({"kind": ["head"]}, "--kind head: expected projection, feed_forward, experts"),
    ],
)
def test_what_there_is_not_to_measure_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        main(**options, output=tmp_path)


def write_results(folder: Path, device_type: str, measurements: list[Measurement]) -> None:
    record = {"device": "A GPU", "device_type": device_type, "layers": [each.as_json() for each in measurements]}
    (folder / "fp8_layers_a.json").write_text(json.dumps(record), encoding="utf-8")


def test_complete_results_of_a_gpu_replace_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fp8_speed.json"
    other, old = ({"device": name, "kind": "experts", "rows": 1, "width": 1} for name in ("Other", "A GPU"))
    file.write_text(json.dumps([other, old]), encoding="utf-8")
    before = file.read_bytes()
    monkeypatch.setattr(fp8_layers, "SPEED_FILE", file)
    measured = [measurement("projection", 4096, 2048, 1.2, name=each.name) for each in listed_layers()]
    for device_type, found in (("cpu", measured), ("cuda", measured[1:])):
        write_results(tmp_path, device_type, found)
        main(fit_only=True, output=tmp_path)
        assert file.read_bytes() == before
    write_results(tmp_path, "cuda", measured)
    main(fit_only=True, output=tmp_path)
    assert measured_speeds(file) == [MeasuredSpeed(**other), MeasuredSpeed("A GPU", "projection", 4096, 2048)]
