"""What every test shares: the same random numbers, whatever ran before, and one thread, for tests run side by side."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    torch.set_num_threads(1)
