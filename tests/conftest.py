"""What holds for every test: the same random numbers on every run, and no more threads than the work needs."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("same examples on every run", derandomize=True, deadline=None, database=None)
settings.load_profile("same examples on every run")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
