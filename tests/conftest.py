"""Settings and fixtures for all tests: seeded random numbers, one thread, pools of ranks."""

import gc
import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # read when those libraries are imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # runs kernels on the CPU; Triton reads it when it is imported

from hypothesis import settings
from matplotlib.figure import Figure

from deepseek_v3.config import vocabulary_size
from deepseek_v3.config.data_config import DEFAULT_TOKENS
from deepseek_v3.training import loss_curve
from helpers import fork_server
from helpers.rank_pool import RankPool
from helpers.triton_interpreter import round_as_a_gpu

torch.set_num_threads(1)  # the suite runs one process per core
settings.register_profile("default", derandomize=True, deadline=None, database=None, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=1000)  # other examples on every run
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish() -> None:
    gc.freeze()  # the garbage collector need not search all modules and tests again and again


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="module")
def no_fsync() -> Iterator[None]:
    """Skips fsync, which takes most of the time of a test that writes many small files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """CUDA C++ kernels are compiled anew in every session, and are kept out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSV3_KERNEL_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _fork_server(_kernel_cache: None) -> None:
    fork_server.start()


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A program that a test ran in this process decides for no other test which lines are logged."""
    project = logging.getLogger("deepseek_v3")
    level = project.level
    yield
    project.setLevel(level)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """A pool of four ranks over gloo."""
    found = RankPool(4)
    yield found
    found.close()


@pytest.fixture(scope="module")
def deepspeed_pool() -> Iterator[RankPool]:
    """A pool of two ranks for DeepSpeed, which keeps the first process group that it sees."""
    if find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is an extra")
    found = RankPool(2, one_group=True)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _shipped_configs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignores tokens in the checkout, which would change the vocabulary of the shipped configs."""
    size_of, local = vocabulary_size._tokenizer_size, Path(__file__).parents[1] / DEFAULT_TOKENS
    monkeypatch.setattr(
        vocabulary_size, "_tokenizer_size", lambda path: None if Path(path).absolute() == local else size_of(path)
    )


@pytest.fixture
def loss_picture() -> None:
    """For tests of loss.png; other runs do not draw it, which would take almost half of their time."""


@pytest.fixture(autouse=True)
def _no_loss_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "loss_picture" not in request.fixturenames:
        monkeypatch.setattr(loss_curve, "plot_losses", lambda *_: None)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device on which an operation is tested."""
    return torch.device(request.param)


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device on which a Triton kernel is tested: a CPU, line by line, and a GPU."""
    pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds only")
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    if torch.cuda.is_available():
        pytest.skip("the same process cannot both interpret and compile")
    with round_as_a_gpu():
        yield torch.device("cpu")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collects the Matplotlib figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, *args: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures
