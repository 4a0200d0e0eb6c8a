"""The version of the package, for ``--version``: it needs neither torch nor anything of the extra."""

import importlib.util
import runpy
from pathlib import Path


def package_version() -> str:
    # The file on its own, for importing the package would import torch.
    package = importlib.util.find_spec("qmf_fusion")
    assert package is not None
    assert package.origin is not None
    return str(runpy.run_path(str(Path(package.origin).with_name("version.py")))["__version__"])
