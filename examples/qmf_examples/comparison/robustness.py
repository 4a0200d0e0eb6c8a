"""The robustness bench: which sets under which settings, which conditions make a table, and what a run leaves."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ..corruption.conditions import CLEAN, FEATURES, UNSEEN
from ..data.feature_files import FeatureFile
from ..data.multiview import MultiView
from ..evaluation.display import console
from ..evaluation.paired_difference import TEST, TIE
from ..files import write_results_file
from ..models.methods import RECOMMENDED, Method, Table
from ..models.methods import ROBUSTNESS as TABLE
from .compare import compare
from .figures import Line, tabulate
from .heads import Config
from .paired import Paired, best_rivals, compare_pairs
from .prepared import ROBUSTNESS as PROTOCOL
from .prepared import prepare, prepare_file
from .progress import progress_bars
from .results import Score
from .robustness_plot import plot
from .robustness_tables import MEASURES, accuracy_table, best_rival_sentence, correlation_table, pairs_table, sets_table

METHODS = TABLE.methods
VIEWS = Config(seeds=(0, 1, 2), epochs=None, steps=1000, hidden=128, learning_rate=1e-3, weight_decay=1e-4)
"""How heads on multi-view sets are trained."""
FILES = Config(seeds=(0, 1, 2), epochs=40, batch_size=64, hidden=64, learning_rate=5e-4, weight_decay=1e-4)
"""How heads on the features of frozen encoders are trained."""

Set = MultiView | FeatureFile


class Settings(NamedTuple):
    """One for all sets of a kind: nothing is tuned for a set."""

    views: Config = VIEWS
    files: Config = FILES

    def of(self, data: Set) -> Config:
        return self.files if isinstance(data, FeatureFile) else self.views


class Group(NamedTuple):
    """Sets under the same conditions: a table."""

    title: str
    picture: str
    """Its file's name."""
    scores: dict[str, list[Score]]
    """By set."""


def run(sets: Sequence[Set], settings: Settings, table: Table = TABLE, **options: Any) -> dict[str, list[Score]]:
    """The whole bench, by set; see ``compare``."""
    results = {}
    for data in sets:
        config = settings.of(data)
        # Bound, so that a set does not stand in for those before it.
        if isinstance(data, FeatureFile):
            prepared = partial(prepare_file, data, device=config.device)
        else:
            prepared = partial(prepare, data, PROTOCOL, device=config.device)
        results[data.name] = compare(data.name, prepared, table, config, **options)
    return results


def groups(sets: Sequence[Set], results: dict[str, list[Score]]) -> dict[str, Group]:
    """What is tabled together: each feature file under its inputs' damages, which are its own; all multi-view sets
    under their features' conditions, and under the unseen ones; each set with images under its images' conditions.
    """
    files = {data.name: results[data.name] for data in sets if isinstance(data, FeatureFile)}
    views = {name: scores for name, scores in results.items() if name not in files}
    found = {
        f"{name} (inputs)": Group(f"{name}, damaged inputs", f"robustness-inputs-{name}.png", {name: scores})
        for name, scores in files.items()
    }
    if views:
        count = f"{len(views)} multi-view set{'s' if len(views) > 1 else ''}"
        designed = {name: [s for s in scores if s.under in FEATURES] for name, scores in views.items()}
        unseen = {name: [s for s in scores if s.under in UNSEEN] for name, scores in views.items()}
        found["features"] = Group(count, "robustness.png", designed)
        found["unseen"] = Group(f"{count}, unseen damages", "robustness-unseen.png", unseen)
    for name, scores in views.items():
        images = [s for s in scores if s.under == CLEAN or s.under not in (*FEATURES, *UNSEEN)]
        if any(s.under != CLEAN for s in images):
            found[f"{name} (images)"] = Group(
                f"{name}, damaged images", f"robustness-images-{name}.png", {name: images}
            )
    return found


def run_and_report(
    sets: Sequence[Set], settings: Settings, output: Path, table: Table = TABLE
) -> dict[str, list[Line]]:
    """Run, write ``robustness.json`` and PNGs to the folder, print the tables; by table's name, its lines."""
    with progress_bars(sum(len(settings.of(data).seeds) for data in sets) * len(table.trainings)) as progress:
        results = run(sets, settings, table, progress=progress)
    found = groups(sets, results)
    tables = {name: tabulate(group.scores, table.methods) for name, group in found.items()}
    pairs = {name: compare_pairs(group.scores, RECOMMENDED, table.methods) for name, group in found.items()}
    titles = {name: f"{group.title}, {_seeds(group)}" for name, group in found.items()}
    pictures = {}
    for name, group in found.items():
        trained = dict.fromkeys(settings.of(data).length for data in sets if data.name in group.scores)
        pictures[name] = {
            "file": group.picture,
            "title": ", ".join([titles[name], *trained, "half of the views damaged"]),
        }
    kinds = {"views": MultiView, "files": FeatureFile}
    content = {
        "config": {
            kind: getattr(settings, kind).describe()
            for kind, of in kinds.items()
            if any(isinstance(data, of) for data in sets)
        },
        "sets": [_describe(data) for data in sets],
        "pictures": pictures,
        "tables": {name: [line.to_dict() for line in lines] for name, lines in tables.items()},
        "pairs": {name: [pair.to_dict() for pair in every] for name, every in pairs.items()},
        "scores": {name: [score.to_dict() for score in scores] for name, scores in results.items()},
    }
    write_results_file(output / "robustness.json", "robustness", content)
    shown = console(180)
    for name, group in found.items():
        plot(output / group.picture, tables[name], pictures[name]["title"])
        _print(shown, titles[name], table.methods, tables[name], pairs[name])
    shown.print(
        "Half of each sample's views are damaged, of an odd number the smaller half. 'worst seed': its mean. "
        "'shortfall': the largest gap to the best rule of a condition, oracle aside. ECE, AURC and AUROC are means "
        f"over conditions and seeds, in points. Intervals: {TEST}.\n"
        f"Wrote {output / 'robustness.json'} and pictures beside it.",
        soft_wrap=True,
    )
    return tables


def _seeds(group: Group) -> str:
    count = len({score.seed for scores in group.scores.values() for score in scores})
    return f"{count} seed{'' if count == 1 else 's'}"


def _print(
    shown: Console, title: str, methods: Sequence[Method], lines: Sequence[Line], pairs: Sequence[Paired]
) -> None:
    shown.print(accuracy_table(lines, f"Accuracy in %, and further measures: {title}"))
    if len(lines[0].sets) > 1:
        for measure in MEASURES:
            shown.print(sets_table(lines, measure))
    shown.print(correlation_table(lines, methods, f"Correlation of weight and loss (Eq. 6 wants 0 or less): {title}"))
    what = f"points of mean accuracy [interval], {TIE} not distinguishable, conditions won:lost"
    shown.print(pairs_table(pairs, f"{RECOMMENDED} against each other rule, {what}: {title}"))
    for pair in best_rivals(pairs, methods):
        shown.print(best_rival_sentence(pair), soft_wrap=True)
    shown.print()


def _describe(data: Set) -> dict[str, Any]:
    if isinstance(data, FeatureFile):
        widths = [copies["clean"].shape[1] for copies in data.train.values()]
        return {"name": data.name, "samples": len(data.train_labels) + len(data.test_labels), "views": widths}
    return {"name": data.name, "samples": len(data.labels), "views": [view.shape[1] for view in data.views.values()]}
