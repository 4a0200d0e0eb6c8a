"""The run behind ``qmf-fusion bench-trainers``: each set's loading and training step, tables and results.json."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..data.catalogue import DATA_SETS
from ..evaluation.display import bare_table, console
from ..files import write_results_file
from ..prepare.sample import write_sample
from ..training.settings import QUICK, Settings, resolve
from .loading import Loading, measure_loading
from .objective import environment
from .steps import PHASES, Step, measure_step

SAMPLES = 200
"""About so many training samples has a sample that the benchmark writes for itself."""
PARTS = ("loading", "step")


@dataclass(frozen=True)
class Bench:
    """What is measured, and how."""

    sets: tuple[str, ...]
    parts: tuple[str, ...] = PARTS
    data_root: Path | None = None
    """Of the one set; None writes a sample for each."""
    sample_size: int = 256
    """Pixels to each side of a sample's images, or of each half of a pair."""
    device: str = "cpu"
    repeats: int = 7
    batch_size: int | None = None
    """Of the training step; None for the released one."""
    tokens: int = 32
    quick: bool = False
    """Tiny networks and images; the figures mean nothing."""


def settings_of(bench: Bench, name: str, root: Path) -> Settings:
    """The released settings, or the quick ones, for the data in ``root``."""
    layers: list[dict[str, Any]] = [{"data_root": str(root), "batch_size": bench.batch_size}]
    return resolve(name, *([QUICK] if bench.quick else []), *layers)


def measure(bench: Bench, say: Callable[[str], object] = print) -> tuple[list[Loading], list[Step]]:
    """Every set's figures; ``say`` is told what is under way.

    Raises:
        DataError: data that cannot be used.
    """
    loading, steps = [], []
    for name in bench.sets:
        if "loading" in bench.parts:
            say(f"{name}: loading")
            with _data(bench, name) as root:
                # Words are numbered, not cut by BERT's tokenizer, which would have to be downloaded.
                settings = dataclasses.replace(settings_of(bench, name, root), text_encoder="tiny", method="qmf")
                loading.append(measure_loading(settings, bench.repeats))
        if "step" in bench.parts:
            say(f"{name}: training steps")
            steps.append(measure_step(settings_of(bench, name, Path()), bench.device, bench.repeats, bench.tokens))
    return loading, steps


@contextmanager
def _data(bench: Bench, name: str) -> Iterator[Path]:
    if bench.data_root is not None:
        yield bench.data_root
        return
    known = DATA_SETS[name]
    train = math.ceil((20 if bench.quick else SAMPLES) / len(known.classes))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / name
        counts = {split: train if split == "train" else 1 for split in known.splits}
        write_sample(known, root, per_class=counts, image_size=bench.sample_size)
        yield root


def loading_table(rows: Sequence[Loading], bench: Bench) -> Table:
    what = "the data set's files" if bench.data_root else f"a sample of {bench.sample_size} pixels to each side"
    table = bare_table(f"Loading: image files per second on one core, {what}")
    for name in ("set", "files", "from the cache", "decoded anew", "plain torchvision", "cache / plain"):
        table.add_column(name, justify="left" if name == "set" else "right")
    for row in rows:
        speeds = (f"{speed:,.0f}" for speed in (row.kept, row.anew, row.plain))
        table.add_row(row.data_set, f"{row.samples:,}", *speeds, f"x{row.ratio:.1f}")
    return table


def step_table(rows: Sequence[Step]) -> Table:
    table = bare_table("A training step of qmf, in milliseconds; share of fusion with its objective")
    for name in ("set", "networks", "batch", *PHASES, "share"):
        table.add_column(name, justify="left" if name in ("set", "networks") else "right")
    for row in rows:
        cells = [f"{1000 * row.seconds[phase]:,.2f}" for phase in PHASES]
        table.add_row(row.data_set, row.networks, str(row.batch), *cells, f"{100 * row.share:.2f} %")
    return table


def run_and_report(bench: Bench, folder: Path) -> None:
    """Measure, print the tables, and write results.json into ``folder``."""
    shown = console()
    where = {**environment(), "device": bench.device}
    if torch.device(bench.device).type == "cuda":
        where["device"] = torch.cuda.get_device_name(bench.device)
    loading, steps = measure(bench, lambda text: shown.print(text, soft_wrap=True))
    said = [", ".join(f"{name} {value}" for name, value in where.items())]
    if bench.quick:
        said.append("Tiny networks and images: these figures only show that everything runs.")
    tables = [*([loading_table(loading, bench)] if loading else []), *([step_table(steps)] if steps else [])]
    shown.print(Group(*tables, *(Text(text) for text in said)))
    content = {
        "environment": where,
        "bench": {**dataclasses.asdict(bench), "data_root": None if bench.data_root is None else str(bench.data_root)},
        "loading": [row._asdict() for row in loading],
        "steps": [row._asdict() for row in steps],
        "notes": said[1:],
    }
    path = folder / "results.json"
    write_results_file(path, "trainers", content)
    shown.print(f"Wrote {path}.", soft_wrap=True)
