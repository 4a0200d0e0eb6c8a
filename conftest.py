"""What every test shares: the same random numbers, whatever ran before, and one thread, for tests run side by side.

Where no GPU is, kernels run in Triton's interpreter, which has to be asked for before Triton is imported; tests of the
compiler run in processes of their own. Where something is missing, the files that need it are left out by name, and
the head of the report says so; a file that can't be imported for any other reason fails the run.
"""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from qmf_kernels import takes_triton

LEFT_OUT = []
collect_ignore_glob = []

try:
    takes_triton(torch.device("meta"), backend="triton")
except RuntimeError as error:
    os.environ.pop("TRITON_INTERPRET", None)  # what tests that can do without the kernels go by
    LEFT_OUT += [f"the kernels' tests are left out: {error}"]
    collect_ignore_glob += ["kernels/qmf_kernels/triton_kernels/*", "tests/qmf_kernels/triton_kernels/*", "tests/gpu/*"]

EXAMPLES = ("h5py", "lightning", "matplotlib", "scipy", "sklearn", "torchmetrics", "torchvision", "transformers")
MISSING = [name for name in EXAMPLES if not find_spec(name)]
if MISSING:
    LEFT_OUT += [f"the examples' tests are left out: no {', '.join(MISSING)} here"]
    collect_ignore_glob += ["examples/*", "tests/qmf_examples/*"]
for name, needed in {"lightning": ["lightning"], "transformers": ["transformers", "accelerate"]}.items():
    if not all(find_spec(each) for each in needed):
        LEFT_OUT += [f"the tests of {name}'s integration are left out: they take {' and '.join(needed)}"]
        collect_ignore_glob += [f"qmf_fusion/integrations/{name}.py", f"tests/qmf_fusion/integrations/test_{name}.py"]


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_report_header() -> list[str]:
    return LEFT_OUT
