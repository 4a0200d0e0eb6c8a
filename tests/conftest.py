"""What every test shares: the same random numbers, whatever ran before, and one thread, for tests run side by side.

Where no GPU is, kernels run in Triton's interpreter, which has to be asked for before Triton is imported; tests of the
compiler run in processes of their own.
"""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

MISSING = [name for name in ("lightning", "torchmetrics", "torchvision", "transformers", "yaml") if not find_spec(name)]
NEED_THEM = ["models/test_learners.py", "training/*", "evaluation/*"]
collect_ignore_glob = [f"qmf_examples/{name}" for name in NEED_THEM] if MISSING else []


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    return [f"the trainers' tests are left out: no {', '.join(MISSING)} here"] if MISSING else []
