"""The commands `inspect`, `sample` and `prepare`; ``attach(app)`` adds them to a typer app."""

import dataclasses
import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.catalogue import DATA_SETS
from ..data.faults import DataError, Fault, summary
from ..data.progress import progress_bar
from ..errors import require_extras, resumable
from ..files import results_header


class Name(StrEnum):
    """The data sets, for the command line."""

    nyud2 = "nyud2"
    sunrgbd = "sunrgbd"
    food101 = "food101"
    mvsa = "mvsa"


class Depth(StrEnum):
    """How depth is encoded."""

    hha = "hha"
    grey = "grey"


class Gravity(StrEnum):
    """Where the direction of gravity comes from."""

    estimate = "estimate"
    extrinsics = "extrinsics"


class Rule(StrEnum):
    """How MVSA's two labels make one."""

    agree = "agree"
    polarity = "polarity"


prepare = typer.Typer(help="Turn a data set's official release into what the trainers read.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder to write to.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes. (default: one per core)")]
Size = Annotated[int, typer.Option(min=0, help="Pixels to each side of each half; 0 keeps the frame's own size.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of a split that has to be drawn.")]


def attach(app: typer.Typer) -> None:
    """Add the commands of this file to ``app``."""
    app.command("inspect")(inspect)
    app.command("sample")(sample)
    app.add_typer(prepare, name="prepare")


def inspect(
    data_set: Annotated[Name, typer.Argument(metavar="SET", help="nyud2, sunrgbd, food101 or mvsa.")],
    data_root: Annotated[Path, typer.Option(help="The data set's folder.")],
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Judge as training with --skip-bad would.")] = False,
    text_only: Annotated[bool, typer.Option("--text-only", help="Do not look at the images of texts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count a data set's rows and read all its images, before any training; exit code 1 if training could not run."""
    require_extras(("numpy", "PIL", "rich"))
    from ..data.inspection import inspect_data

    known = DATA_SETS[data_set]
    if known.paired and text_only:
        raise DataError(f"--text-only: {known.title} has no texts")
    with progress_bar(f"reading {data_root}", None) as done:
        report = inspect_data(known, data_root, images=not text_only, done=done)
    if as_json:
        typer.echo(
            json.dumps(
                {**results_header("inspection"), **dataclasses.asdict(report), "can_train": report.can_train(skip_bad)},
                indent=1,
            )
        )
    else:
        _print_report(known.title, report, skip_bad)
    if not report.can_train(skip_bad):
        raise typer.Exit(1)


def _print_report(title: str, report: Any, skip_bad: bool) -> None:
    names = sorted({name for split in report.splits for name in split.classes})
    if names:
        width = max(map(len, (*names, "class")))
        typer.echo(f"{title}: usable rows per class")
        typer.echo(f"  {'class':{width}}" + "".join(f"{split.split:>9}" for split in report.splits))
        for name in names:
            typer.echo(f"  {name:{width}}" + "".join(f"{split.classes.get(name, 0):9,}" for split in report.splits))
        typer.echo(f"  {'all':{width}}" + "".join(f"{split.usable:9,}" for split in report.splits))
    for split in report.splits:
        for what, values in (
            ("image width", split.widths),
            ("image height", split.heights),
            ("words", split.words),
            ("characters", split.characters),
        ):
            if values:
                typer.echo(f"{split.split}: {what} from {values[0]:,} to {values[2]:,}, median {values[1]:,.9g}")
    for split in report.splits:
        if split.repeated_ids:
            count = len(split.repeated_ids)
            typer.echo(f"{split.split}: {count:,} ids stand on several lines, such as {split.repeated_ids[0]!r}")
    for split in report.splits:
        if split.faults:
            typer.echo(f"{split.split}: {len(split.faults)} cannot be used\n{_indented(split.faults)}")
    for problem in report.problems:
        typer.echo(f"problem: {problem}")
    if report.can_train(skip_bad):
        typer.echo("training can run" + (f", without the {report.faults} faults" if report.faults else ""))
    elif report.problems:
        typer.echo("training could not run")
    else:
        typer.echo(f"training could not run, unless with --skip-bad, without the {report.faults} faults")


def _indented(faults: list[Fault]) -> str:
    return "\n".join(f"  {line}" for line in summary(faults).splitlines())


def sample(
    data_set: Annotated[Name, typer.Argument(metavar="SET", help="nyud2, sunrgbd, food101 or mvsa.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or an empty folder.")],
    train: Annotated[
        int | None, typer.Option(min=1, help="Training samples of each class. (default: 8; 27 of mvsa)")
    ] = None,
    dev: Annotated[
        int | None,
        typer.Option(min=1, help="Validation samples of each class, food101 and mvsa. (default: 2; 7 of mvsa)"),
    ] = None,
    test: Annotated[
        int | None, typer.Option(min=1, help="Test samples of each class. (default: 4; 14 of mvsa)")
    ] = None,
    image_size: Annotated[int, typer.Option(min=16, max=4096, help="Pixels to each side.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same files.")] = 0,
) -> None:
    """Write a small made-up data set in a set's exact layout, from which a model can learn."""
    require_extras(("numpy", "PIL", "rich"))
    from ..prepare.sample import write_sample

    known = DATA_SETS[data_set]
    given = {"train": train, "dev": dev, "test": test}
    # Of few classes more of each, or else there would be too little to learn from, and to tell methods apart by.
    least = {"train": (8, 80), "dev": (2, 20), "test": (4, 40)}
    counts = {
        split: given[split] or max(least[split][0], math.ceil(least[split][1] / len(known.classes)))
        for split in known.splits
    }
    with progress_bar(f"writing {folder}", sum(counts.values()) * len(known.classes)) as done:
        count = write_sample(known, folder, per_class=counts, image_size=image_size, seed=seed, done=done)
    typer.echo(f"{folder}: {count:,} samples of {len(known.classes)} classes, laid out as {known.title}")


@prepare.command()
def sunrgbd(
    raw: Annotated[Path, typer.Option(help="The release's folder, with SUNRGBD and SUNRGBDtoolbox.")],
    out: Out,
    depth: Annotated[Depth, typer.Option(help="How depth is encoded.")] = Depth.hha,
    gravity: Annotated[Gravity, typer.Option(help="Estimated as published, or the release's.")] = Gravity.estimate,
    splits: Annotated[
        Path | None, typer.Option(help="allsplit.mat. (default: the toolbox's, in or beside --raw)")
    ] = None,
    size: Size = 256,
    workers: Workers = None,
    seed: Seed = 0,
) -> None:
    """SUN RGB-D: frames of the 19 scenes as RGB and HHA, in the published split. Run it again to go on."""
    require_extras(("numpy", "scipy", "PIL", "rich"))
    from ..prepare.sunrgbd import plan_sunrgbd, sunrgbd_converter

    plan = plan_sunrgbd(raw, splits, seed)
    typer.echo(f"split: {plan.split_source}")
    if not plan.published:
        typer.echo("  not the published split: figures on it do not compare with the paper's")
    if plan.other_scenes:
        most = ", ".join(f"{scene} {count}" for scene, count in plan.other_scenes.most_common(5))
        typer.echo(f"of other scenes than the 19, left out: {plan.other_scenes.total():,} frames ({most})")
    if plan.unsplit:
        typer.echo(f"in neither half of the split, left out: {plan.unsplit:,} frames")
    settings: dict[str, object] = {
        "set": "sunrgbd",
        "depth": str(depth),
        "gravity": str(gravity),
        "split": _split_name(plan, seed),
    }
    _convert(plan.frames, sunrgbd_converter(raw, depth, gravity), out, settings, size, workers, plan.faults)


def _split_name(plan: Any, seed: int) -> str:
    # A drawn split depends on the frames it is drawn from: with others, a frame might change sides.
    return "published" if plan.published else f"seed {seed} of {len(plan.frames)} frames"


@prepare.command()
def nyud2(
    out: Out,
    mat: Annotated[Path | None, typer.Option(help="nyu_depth_v2_labeled.mat, with --splits.")] = None,
    splits: Annotated[Path | None, typer.Option(help="splits.mat.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="0.jpg, 1.jpg, ..., with --depths and --meta in place of --mat.")
    ] = None,
    depths: Annotated[Path | None, typer.Option(help="0.png, 1.png, ..., in 8 bits, 255 being 10 m.")] = None,
    meta: Annotated[Path | None, typer.Option(help="sceneTypes.csv, train_indexes.csv and val_indexes.csv.")] = None,
    depth: Annotated[Depth, typer.Option(help="How depth is encoded.")] = Depth.hha,
    crop: Annotated[bool, typer.Option("--crop/--no-crop", help="Cut off the white border.")] = True,
    size: Size = 256,
    workers: Workers = None,
) -> None:
    """NYU Depth V2: images of the 10 classes as RGB and HHA, in the published split. Run it again to go on."""
    given = {"--mat": mat, "--splits": splits, "--images": images, "--depths": depths, "--meta": meta}
    named = [name for name, path in given.items() if path is not None]
    if named not in (["--mat", "--splits"], ["--images", "--depths", "--meta"]):
        raise DataError(
            "give either --mat and --splits, or --images, --depths and --meta; got "
            + (" and ".join(named) or "neither")
        )
    require_extras(("numpy", "scipy", "PIL", "rich", *(["h5py"] if mat else [])))
    settings: dict[str, object] = {"set": "nyud2", "depth": str(depth), "crop": crop}
    if mat is not None and splits is not None:
        from ..prepare.nyud2_mat import mat_converter, plan_mat

        _convert(plan_mat(mat, splits), mat_converter(mat, depth, crop), out, settings, size, workers, [])
    elif images is not None and depths is not None and meta is not None:
        from ..prepare.nyud2_images import images_converter, plan_images

        frames = plan_images(images, depths, meta)
        # Their depth is coarser: the pairs of the two sources do not belong into one folder.
        settings["source"] = "images"
        _convert(frames, images_converter(images, depths, depth, crop), out, settings, size, workers, [])


def _convert(
    frames: Any,
    convert: Any,
    out: Path,
    settings: dict[str, object],
    size: int,
    workers: int | None,
    faults: list[Fault],
) -> None:
    from ..prepare.frames import prepare_frames

    with resumable("run it again to go on"), progress_bar(f"writing {out}", len(frames)) as done:
        outcome = prepare_frames(frames, convert, out, settings, size=size, workers=workers, done=done)
    bad = sorted(faults + outcome.faults, key=lambda fault: fault.file)
    if bad:
        typer.echo(f"broken, skipped: {len(bad):,} frames\n{_indented(bad)}", err=True)
    typer.echo(f"{out}: {outcome.written:,} frames written, {outcome.finished:,} finished before, {len(bad):,} skipped")
    if not outcome.written and not outcome.finished:
        raise DataError("no frame could be written")


@prepare.command()
def mvsa(
    raw: Annotated[Path, typer.Option(help="MVSA_Single: labelResultAll.txt and data/.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the .jsonl files. (default: --raw)")] = None,
    rule: Annotated[
        Rule, typer.Option(help="agree: both labels the same, as published; polarity: neutral gives way.")
    ] = Rule.agree,
    splits: Annotated[
        Path | None, typer.Option(help="A folder with published .jsonl splits. (default: draw 60/20/20)")
    ] = None,
    seed: Seed = 0,
) -> None:
    """MVSA-Single: one label per pair, in train.jsonl, dev.jsonl and test.jsonl."""
    require_extras(("numpy", "rich"))
    from ..prepare.mvsa import prepare_mvsa

    target = out if out is not None else raw
    outcome = prepare_mvsa(raw, target, rule.value, splits, seed)
    if outcome.agreement is None:
        typer.echo(f"split: drawn with seed {seed}, not the published one; --splits takes that one's .jsonl files")
    else:
        agreement = outcome.agreement
        typer.echo(
            f"split: of {splits}; {agreement.same:,} of {agreement.rows:,} labels are those of the label file, "
            f"{len(agreement.differ):,} differ, {len(agreement.unlisted):,} are not in it, "
            f"{agreement.left_out:,} pairs that the rule keeps are in no split"
        )
    if outcome.faults:
        typer.echo(f"broken, skipped: {len(outcome.faults):,}\n{_indented(outcome.faults)}", err=True)
    for split, counts in outcome.counts.items():
        shares = ", ".join(f"{label} {count:,}" for label, count in sorted(counts.items()))
        typer.echo(f"{target / split}.jsonl: {counts.total():,} rows ({shares})")
    typer.echo(f"dropped by the rule {rule.value}: {outcome.dropped:,} pairs")
