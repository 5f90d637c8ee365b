"""Which device a command runs on."""

import pytest
import torch

from deepseek_v3.utils.distributed import refuse_several_processes, select_device
from deepseek_v3.utils.errors import ConfigError


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda:0"), (False, "cpu")])
def test_auto_is_the_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, available: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert select_device("auto") == torch.device(expected)
    assert select_device("cpu") == torch.device("cpu")


def test_a_device_that_is_missing_or_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        select_device("cuda")
    with pytest.raises(ConfigError, match="expected auto, cpu or cuda"):
        select_device("tpu")


def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_several_processes()
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="WORLD_SIZE = 8"):
        refuse_several_processes()
