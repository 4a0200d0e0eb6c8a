"""What the user can put right, said in one line."""

import contextlib
import importlib
import re
from collections.abc import Iterable, Iterator

EXTRAS = {
    "PIL": "pillow",
    "h5py": "h5py",
    "lightning": "lightning",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "rich": "rich",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "torchmetrics": "torchmetrics",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "typer": "typer",
    "yaml": "pyyaml",
}
"""The packages of the extra ``[examples]``, by the module's name."""


_IN_WORKER = re.compile(r"^Caught \w+ in .*^[\w.]*Error: ", re.DOTALL | re.MULTILINE)


class CommandError(Exception):
    """Ends the command with its message on one line, and no traceback."""

    def __str__(self) -> str:
        # A loader's process hands its error on as one of the same kind, whose message is the traceback.
        message = super().__str__()
        return _IN_WORKER.sub("", message).strip() if message.startswith("Caught ") else message


class ResumableError(Exception):
    """An interrupt of work that can be gone on with; the message says how."""


@contextlib.contextmanager
def resumable(how: str) -> Iterator[None]:
    """Interrupts as ``ResumableError``: what was finished is kept, and ``how`` says how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise ResumableError(f"interrupted; what was finished is kept: {how}") from error


def missing_extra(package: str) -> CommandError:
    return CommandError(f"this command needs {package}, which is not installed: pip install 'qmf-fusion[examples]'")


def require_extras(modules: Iterable[str]) -> None:
    """Import the modules now, rather than fail after the training.

    Raises:
        CommandError: one is missing; the message names the extra to install.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise missing_extra(EXTRAS.get(error.name or "", error.name or module)) from error
