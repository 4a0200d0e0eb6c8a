"""Tables beyond the paper's: accuracy and measures under further damages, and methods by pairs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .cells import Cell
from .damaged_tests import NoisePlan
from .paired_difference import TIE
from .paired_tests import Standing

MEASURES = "ECE / AURC in % / r of weight and loss / AUROC in % of damage from weights"


class Sheet(NamedTuple):
    """A table, before it is drawn."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def accuracy(cell: Cell) -> str:
    """Mean, deviation, worst, and whether the best method can be told from it."""
    std = "-" if cell.std is None else f"{100 * cell.std:.2f}"
    mark = f" {TIE}" if cell.behind is not None and cell.behind.verdict == "tie" else ""
    return f"{100 * cell.mean:.2f} ± {std} ({100 * cell.worst:.2f}){mark}"


def measures(cell: Cell) -> str:
    """What ``MEASURES`` names."""
    return (
        f"{100 * cell.calibration_error:.1f} / {100 * cell.risk_coverage_area:.1f} / {signed(cell.correlation)} / "
        f"{area(cell.detection)}"
    )


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def area(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def damage_sheets(cells: Sequence[Cell], plan: NoisePlan) -> list[Sheet]:
    """Accuracy and measures under the plan's further damages; none without such."""
    names = [condition.kind for condition in plan.further]
    if not names:
        return []
    at = {(cell.method, cell.noise): cell for cell in cells}
    methods = list(dict.fromkeys(cell.method for cell in cells))

    def sheet(title: str, text: Callable[[Cell], str]) -> Sheet:
        rows = [(method, *(text(at[method, damage]) for damage in names)) for method in methods]
        return Sheet(f"further damages: {title}", ("method", *names), rows)

    told = f"accuracy in %, mean ± std (worst) over seeds; {TIE} not distinguishable from the best"
    return [sheet(told, accuracy), sheet(MEASURES, measures)]


def pair_sheets(late: Sequence[Standing], rivals: Sequence[Standing]) -> list[Sheet]:
    """Every method against late fusion and against its peers; none without another method."""
    found = {"late": {each.method: each for each in late}, "peers": {each.method: each for each in rivals}}
    methods = [each.method for each in rivals]
    if not methods:
        return []
    rows: list[tuple[str, ...]] = []
    for method in methods:
        against, peers = found["late"].get(method), found["peers"][method]
        rows.append((method, *(("-", "-") if against is None else against.cells()), peers.other, *peers.cells()))
    header = ("method", "against late", "won : tied : lost", "best peer", "against it", "best of each")
    title = (
        f"by pairs, each condition once: points of mean accuracy [interval], {TIE} not distinguishable; conditions "
        "won : tied : lost, against late fusion and against the best peer of each condition"
    )
    return [Sheet(title, header, rows)]
