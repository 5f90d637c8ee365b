"""What holds for every test: the same random numbers on every run, no more threads than the work needs."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run on the CPU, line by line; read when triton is imported

from hypothesis import settings
from matplotlib.figure import Figure

from deepseek_v3.config import vocabulary_size
from deepseek_v3.config.data_config import DEFAULT_TOKENS
from helpers import fork_server
from helpers.rank_pool import RankPool

torch.set_num_threads(1)  # the suite runs one process per core
settings.register_profile("same examples on every run", derandomize=True, deadline=None, database=None)
settings.load_profile("same examples on every run")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    fork_server.start()


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four ranks over gloo."""
    found = RankPool(4)
    yield found
    found.close()


@pytest.fixture(scope="session")
def deepspeed_pool() -> Iterator[RankPool]:
    """Two ranks for DeepSpeed, which keeps the first group that it saw."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    found = RankPool(2, one_group=True)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _shipped_configs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that somebody made in the checkout change no config that a test loads there."""
    size_of, local = vocabulary_size._tokenizer_size, Path(__file__).parents[1] / DEFAULT_TOKENS
    monkeypatch.setattr(
        vocabulary_size, "_tokenizer_size", lambda path: None if Path(path).absolute() == local else size_of(path)
    )


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device on which an operation has to hold."""
    return torch.device(request.param)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from here on."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures
