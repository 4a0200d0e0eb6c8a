"""What the user can put right, said in one line."""

import importlib
from collections.abc import Iterable

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
    "torchmetrics": "torchmetrics",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "typer": "typer",
    "yaml": "pyyaml",
}
"""The packages of the extra ``[examples]``, by the module's name."""


class CommandError(Exception):
    """Ends the command with its message on one line, and no traceback."""


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
