"""The commands `train nyud2`, `sunrgbd`, `food101`, `mvsa`; ``attach(train)`` adds them to the typer app of `train`."""

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ..errors import CommandError, require_extras, resumable
from ..training.settings import (
    ABLATION,
    DEFAULTS,
    HEADS,
    METHODS,
    OF_METHOD,
    QUICK,
    Settings,
    brief,
    methods_of,
    read_settings,
    resolve,
    why_not_frozen,
)
from .output_folder import disk_errors, prepare_output

PAPER_SEEDS = {"nyud2": 10, "sunrgbd": 10, "food101": 3, "mvsa": 5}
MOST_RUNS = 1000
"""Of a method; more are a slip."""
UNSET = {
    "word_vectors": "learned",
    "alpha": "-0.1, the energy's",
    "beta": "0, the energy's",
    "sampling_count": "every visit",
    "workers": "one a core, at most 4",
    "limit_batches": "all",
}
"""What leaving an option out means where the setting is None."""
PACKAGES = (
    "numpy",
    "PIL",
    "lightning",
    "torchmetrics",
    "timm",
    "torchvision",
    "transformers",
    "tensorboard",
    "yaml",
    "rich",
)

HELP = {
    "nyud2": "NYU Depth V2: RGB and depth, 10 scenes.",
    "sunrgbd": "SUN RGB-D: RGB and depth, 19 scenes.",
    "food101": "UPMC FOOD-101: text and image, 101 dishes.",
    "mvsa": "MVSA-Single: text and image, 3 sentiments.",
}


def attach(train: typer.Typer) -> None:
    """Add one command per data set to ``train``; they differ in their defaults and methods alone."""
    for name, title in HELP.items():
        methods = ", ".join(METHODS[name])
        about = (
            f"Methods: {methods}; all; ablation (Table 2: {', '.join(ABLATION)}). "
            "Defaults are the paper's settings, and where it has none, the released code's."
        )
        train.command(name, help=f"{title}\n\n{about}")(_with_defaults(name))


def _with_defaults(data_set: str) -> Callable[..., None]:
    """``train_set``, whose help shows what each option is for this data set where it is not given."""
    own = {m: resolve(data_set, {"method": m}) for m in OF_METHOD if m in METHODS[data_set]}
    own["--frozen"] = resolve(data_set, {"frozen": True})
    defaults: dict[str, Any] = {
        **{name: _shown(name, DEFAULTS[data_set], own) for name in Settings.__dataclass_fields__},
        "data_root": False,  # there is none
        "output": f"runs/{data_set}",
        "seeds": f"{PAPER_SEEDS[data_set]}, 1 with --quick",
    }
    signature, parameters = inspect.signature(train_set), []
    for parameter in signature.parameters.values():
        if parameter.name in defaults:
            kind, option = get_args(parameter.annotation)
            option = copy.copy(option)
            option.show_default = defaults[parameter.name]
            parameter = parameter.replace(annotation=Annotated[kind, option])
        parameters.append(parameter)

    def command(**given: Any) -> None:
        train_set(**given)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _shown(name: str, default: Settings, own: Mapping[str, Settings]) -> str:
    """The default of a setting in words, with those of frozen encoders and of the methods that have their ``own``."""
    value = getattr(default, name)
    others = {of: getattr(settings, name) for of, settings in own.items()} if name not in ("method", "frozen") else {}
    said = [f"{of}: {_in_words(name, other)}" for of, other in others.items() if other != value]
    return "; ".join([_in_words(name, value), *said])


def _in_words(name: str, value: Any) -> str:
    if value is None:
        return UNSET.get(name, "none")
    if isinstance(value, Mapping):
        return ",".join(f"{key}={item}" for key, item in value.items()) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def train_set(
    context: typer.Context,
    data_root: Annotated[Path | None, typer.Option(help="The data set's folder.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the runs.")] = None,
    method: Annotated[str | None, typer.Option(help="A method, several with commas, all, or ablation.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=MOST_RUNS, help="How many seeds.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31, help="The first seed.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings, which options override.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed of tiny networks, in seconds.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints of a run that was killed.")] = (
        False
    ),
    selection: Annotated[
        str | None, typer.Option(help="What chooses the epoch: held-out, or test as the released RGB-D scripts do.")
    ] = None,
    validation: Annotated[float | None, typer.Option(help="Share of training that is held out (RGB-D).")] = None,
    skip_bad: Annotated[bool | None, typer.Option("--skip-bad", help="Skip and count what cannot be used.")] = None,
    image_encoder: Annotated[str | None, typer.Option(help="Any image model of timm, or tiny.")] = None,
    weights: Annotated[str | None, typer.Option(help="The image encoder's: imagenet, a file, or none.")] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="Any encoder of Transformers, by name or folder, or tiny.")
    ] = None,
    text_pooling: Annotated[str | None, typer.Option(help="Of a text's tokens: mean, first, or BERT's pooler.")] = None,
    transform: Annotated[
        str | None,
        typer.Option(help="Of images: released, or the encoder's own, the default of all but the paper's ResNets."),
    ] = None,
    word_vectors: Annotated[str | None, typer.Option(help="GloVe's text file for the bag of words.")] = None,
    regions: Annotated[int | None, typer.Option(help="Regions that the image is pooled to.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the classifiers' hidden layer; 0 for none.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Of the hidden layer.")] = None,
    frozen: Annotated[
        bool | None, typer.Option("--frozen", help="Leave encoders as they are, and train heads on what they see.")
    ] = None,
    copies: Annotated[
        int | None,
        typer.Option(min=0, help="Copies of the training images for frozen encoders, cut out and flipped at random."),
    ] = None,
    freeze: Annotated[str | None, typer.Option(help="Epochs for which encoders are fixed: image=3,text=5.")] = None,
    load_size: Annotated[int | None, typer.Option(help="Pixels that images are resized to.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels that are cut out of them.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of a text.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a batch, on each device.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches of a step.")] = None,
    epochs: Annotated[int | None, typer.Option(help="At most so many.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without a better one.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adam or adamw.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the optimizer.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of the optimizer.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of all steps over which the rate rises.")] = None,
    plateau_factor: Annotated[float | None, typer.Option(help="The rate's, on a plateau.")] = None,
    plateau_patience: Annotated[int | None, typer.Option(help="Epochs that make a plateau.")] = None,
    joint_width: Annotated[
        int | None, typer.Option(help="Features of each modality for concat and align; 0 for the encoders' own.")
    ] = None,
    ranking_weight: Annotated[float | None, typer.Option(help="Lambda of Eq. 18, for qmf.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of Eq. 9, below 0.")] = None,
    beta: Annotated[float | None, typer.Option(help="Of Eq. 9, at least 0.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the energy, Eq. 13.")] = None,
    start_epoch: Annotated[int | None, typer.Option(help="T_s of Eq. 14.")] = None,
    sampling_count: Annotated[int | None, typer.Option(help="T of Eq. 14.")] = None,
    update: Annotated[
        str | None, typer.Option(help="Losses enter Eq. 14 before they are ranked (Algorithm 1), or after.")
    ] = None,
    form: Annotated[str | None, typer.Option(help="The ranking's: paper, margin or released.")] = None,
    pairs: Annotated[str | None, typer.Option(help="The ranking's: adjacent or all.")] = None,
    detach_weights: Annotated[
        bool | None, typer.Option("--detach-weights/--no-detach-weights", help="Stop gradients at the weights.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Loader processes.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="Where decoded images are kept: on (the user's cache folder), off, or a folder.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Lightning's: 32-true, 16-mixed, bf16-mixed, ...")] = None,
    device: Annotated[str | None, typer.Option(help="Where to train: auto, cpu, cuda, cuda:1, mps, ...")] = None,
    devices: Annotated[str | None, typer.Option(help="Lightning's: how many, or which.")] = None,
    strategy: Annotated[str | None, typer.Option(help="Lightning's: auto, ddp, ...")] = None,
    limit_batches: Annotated[int | None, typer.Option(min=1, help="Batches of an epoch.")] = None,
) -> None:
    given = {name: value for name, value in locals().items() if name in Settings.__dataclass_fields__}
    data_set = str(context.info_name)
    require_extras(PACKAGES)
    file = read_settings(config) if config is not None else {}
    first, count, chosen = (
        _first(seed, file.pop("seed", None), 1),
        _first(seeds, file.pop("seeds", None), 1 if quick else PAPER_SEEDS[data_set]),
        _first(method, file.pop("method", None), "qmf"),
    )
    fixed = bool(_first(frozen, file.get("frozen"), False))
    layers = (
        {**QUICK, **(HEADS if fixed else {})} if quick else {},
        {"data_root": ""},
        file,
        {**given, "method": None, "seed": None, "data_root": None if data_root is None else str(data_root)},
    )
    base = resolve(data_set, *layers)
    if not base.data_root:
        from ..data.catalogue import DATA_SETS, how_to_obtain

        raise CommandError(f"--data-root: must name the data set's folder. {how_to_obtain(DATA_SETS[data_set])}")
    methods, seeds_of_each = choose_methods(data_set, chosen, base.frozen), _seeds(first, count)
    own = [{**_absolute(base), "method": m, "seed": s} for m in methods for s in seeds_of_each]
    plan = [resolve(data_set, *layers, run) for run in own]
    folder = output if output is not None else Path("runs") / data_set
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise CommandError(f"--output: must be UTF-8, for TensorBoard's files, got {str(folder)!r}") from error
    prepare_output(folder)
    with disk_errors(), resumable("run it again with --resume to go on"):
        _train_all(plan, folder, resume, left_out(data_set, chosen) if base.frozen else "")


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _absolute(settings: Settings) -> dict[str, Any]:
    """The settings that are paths, from the root on, so that a run can be tested from any folder."""
    names = ("data_root", "weights", "text_encoder", "word_vectors")
    given = {name: getattr(settings, name) for name in names}
    paths = {name: Path(value) for name, value in given.items() if value not in (None, "imagenet", "none", "tiny")}
    absolute = {name: str(path.resolve()) for name, path in paths.items() if path.exists()}
    # A folder that may yet have to be made.
    return absolute | ({} if settings.cache in ("on", "off") else {"cache": str(Path(settings.cache).absolute())})


def _seeds(first: Any, count: Any) -> range:
    if type(first) is not int or type(count) is not int or not 1 <= count <= MOST_RUNS:
        raise CommandError(
            f"seed and seeds must be whole numbers, seeds from 1 to {MOST_RUNS}, got {brief(first)} and {brief(count)}"
        )
    return range(first, first + count)


def choose_methods(data_set: str, given: Any, frozen: bool = False) -> tuple[str, ...]:
    """What ``--method`` names: methods and groups of them, with commas, each method once.

    With frozen encoders, ``all`` is all that can be trained on them.

    Raises:
        CommandError: a name that is neither.
    """
    if not isinstance(given, str):
        raise CommandError(f"method must be of type str, got {brief(given)}")
    known = methods_of(data_set, frozen)
    groups = {"all": known, "ablation": ABLATION}
    asked = [name.strip() for name in given.split(",")]
    names = tuple(dict.fromkeys(name for one in asked for name in groups.get(one, (one,))))
    if frozen and why_not_frozen(names):
        raise CommandError(f"--method: {why_not_frozen(names)}")
    strangers = [name for name in names if name not in known]
    if strangers:
        raise CommandError(
            f"--method: {', '.join(strangers):.200} is none of {data_set}'s: {', '.join(known)}, all, ablation"
        )
    return names


def left_out(data_set: str, given: str) -> str:
    """What ``all`` does not take in with frozen encoders, and why."""
    return f"left out: {why_not_frozen(METHODS[data_set])}" if "all" in given.replace(" ", "").split(",") else ""


def _train_all(plan: list[Settings], folder: Path, resume: bool, note: str) -> None:
    from ..frozen.heads import train_frozen
    from ..training.run import check_machine, is_first_process, train_run

    check_machine(plan[0])
    say = typer.echo if is_first_process() else lambda _: None
    if plan[0].selection == "test":
        say("--selection test: epochs are chosen on the test set, as published; their accuracies are flattered")
    if note:
        say(note)
    for settings in plan:
        place = folder / settings.method / f"seed{settings.seed}"
        finished = (train_frozen if settings.frozen else train_run)(settings, place, resume, say)
        skipped = f", {finished.faults} bad rows skipped" if finished.faults else ""
        on = {"test": "test"}.get(settings.selection, "dev" if "text" in _modalities(settings) else "held-out")
        say(
            f"{settings.method}, seed {settings.seed}: {100 * finished.accuracy:.1f} % on {on} samples at best, "
            f"{finished.epochs} epochs{skipped}: {place}"
        )
    say(f"to test: qmf-fusion evaluate {folder}")


def _modalities(settings: Settings) -> tuple[str, ...]:
    from ..data.catalogue import DATA_SETS

    return DATA_SETS[settings.data_set].modalities


assert set(HELP) == set(DEFAULTS) == set(PAPER_SEEDS)
