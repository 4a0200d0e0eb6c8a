"""Every setting of a training run: the released defaults, then a YAML file, then the command line."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import CommandError
from ..files import write_atomically

FILE = "settings.yaml"
MOST_SEEDS = 2**31

_FUSED = ("tmc", "etmc", "rcml", "pdf", "ranking-only", "qmf", "robust", "msp", "entropy", "evidence", "energy")
RGBD_METHODS = ("rgb", "depth", "late", "concat", "align", "mmtm", *_FUSED)
TEXT_METHODS = ("bow", "image", "bert", "late", "concatbow", "concatbert", "mmbt", *_FUSED)
METHODS = {"nyud2": RGBD_METHODS, "sunrgbd": RGBD_METHODS, "food101": TEXT_METHODS, "mvsa": TEXT_METHODS}
"""The rows of the paper's tables, in their order, the package's recommended rule, and the weightings of
the paper's Figure 3 and Table 3."""
ABLATION = ("late", "ranking-only", "energy", "qmf")
"""The rows of Table 2: neither part, the ranking loss alone, the weights alone, both."""


@dataclass(frozen=True)
class Settings:
    """One run: one method, one seed. What ``settings.yaml`` beside its checkpoints holds."""

    data_set: str
    data_root: str
    method: str = "qmf"
    seed: int = 1
    # What is learned from
    selection: str = "held-out"
    """``"held-out"`` or, as the released RGB-D scripts do, ``"test"``: what chooses the epoch. Text sets use dev."""
    validation: float = 0.1
    """The share of the training set that is held out, class by class (RGB-D)."""
    skip_bad: bool = False
    load_size: int = 256
    image_size: int = 224
    max_tokens: int = 512
    # Networks
    backbone: str = "resnet18"
    weights: str = "imagenet"
    """``imagenet``, ``none``, or a file."""
    text_model: str = "bert-base-uncased"
    word_vectors: str | None = None
    """A file in GloVe's text format for the bag of words; None learns the vectors."""
    regions: int = 1
    """How many regions the image encoder's last feature map is pooled to."""
    hidden: int = 0
    """Width of a hidden layer in every classifier; 0 for none, as released."""
    dropout: float = 0.1
    joint_width: int = 128
    """To how many features a modality's are taken for concatenation and alignment; 0 leaves them, as released."""
    # Optimisation
    batch_size: int = 256
    accumulate: int = 3
    epochs: int = 500
    patience: int = 20
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    warmup: float = 0.0
    """The share of all steps over which the learning rate rises."""
    plateau_factor: float = 0.3
    plateau_patience: int = 10
    freeze: Mapping[str, int] = field(default_factory=dict)
    """For how many epochs the encoder of each modality named is frozen."""
    # The objective of QMF (Eq. 18)
    ranking_weight: float = 0.1
    form: str = "paper"
    pairs: str = "adjacent"
    detach_weights: bool = False
    alpha: float | None = None
    beta: float | None = None
    """Of Eq. 9; None for the published -0.1 and 0 of the energy, and -1 and 1 of the other uncertainties."""
    temperature: float = 1.0
    start_epoch: int = 1
    """T_s of Eq. 14."""
    sampling_count: int | None = None
    """T of Eq. 14; None counts every visit."""
    update: str = "before"
    """When a batch's losses enter kappa: before they are ranked (Algorithm 1), or after."""
    # The machine
    workers: int = 4
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: str = "1"
    strategy: str = "auto"
    limit_batches: int | None = None
    """Batches of each epoch; None for all."""

    @property
    def machine(self) -> frozenset[str]:
        """Settings that may change when a run is resumed."""
        return frozenset({"data_root", "workers", "accelerator", "devices", "strategy", "epochs"})


RGBD = Settings("nyud2", "")
TEXT = replace(
    RGBD,
    data_set="mvsa",
    backbone="resnet152",
    regions=3,
    batch_size=16,
    accumulate=40,
    epochs=100,
    patience=5,
    optimizer="adamw",
    learning_rate=1e-4,
    weight_decay=0.0,
    warmup=0.1,
    plateau_factor=0.5,
    plateau_patience=2,
    freeze={"image": 3, "text": 5},
    joint_width=0,
)
DEFAULTS = {
    "nyud2": RGBD,
    "sunrgbd": replace(RGBD, data_set="sunrgbd", batch_size=128),
    "food101": replace(TEXT, data_set="food101"),
    "mvsa": TEXT,
}
"""The paper's settings, by data set, and the released scripts' where it says nothing; `docs/trainers.md` has both."""
OF_METHOD: dict[str, dict[str, Any]] = {
    "tmc": {"batch_size": 32},
    "etmc": {"batch_size": 32},
    "mmtm": {"batch_size": 64, "weight_decay": 1e-4},
}
"""The released RGB-D scripts' own settings for these methods, in place of the data set's."""

QUICK: dict[str, Any] = {
    "backbone": "tiny",
    "weights": "none",
    "text_model": "tiny",
    "load_size": 36,
    "image_size": 32,
    "max_tokens": 24,
    "batch_size": 16,
    "accumulate": 2,
    "epochs": 2,
    "learning_rate": 3e-3,
    "freeze": {},
    "workers": 0,
    "accelerator": "cpu",
    "limit_batches": 6,
}
"""A run of seconds on a CPU, to see that everything works; its figures mean nothing."""


def resolve(data_set: str, *layers: Mapping[str, Any]) -> Settings:
    """The defaults of data set and method, overridden by each layer in turn; a value of None overrides nothing.

    Raises:
        CommandError: a setting that does not exist, or has a value it cannot have.
    """
    given: dict[str, Any] = {}
    for layer in layers:
        given.update({name: value for name, value in layer.items() if value is not None})
    known = {f.name for f in fields(Settings)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise CommandError(f"no such setting: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if given.get("data_set", data_set) != data_set:
        raise CommandError(f"data_set: the settings are for {given['data_set']}, the command for {data_set}")
    own = OF_METHOD.get(str(given.get("method")), {}) if METHODS[data_set] is RGBD_METHODS else {}
    settings = replace(DEFAULTS[data_set], **_typed({**own, **given}))
    _check(settings)
    return settings


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the fields declare them: YAML reads ``1e-4`` as text and ``1`` for a float."""
    kinds = {
        "int": int,
        "float": float,
        "str": str,
        "bool": bool,
        "int | None": int,
        "float | None": float,
        "str | None": str,
    }
    made = dict(given)
    for known in fields(Settings):
        kind = kinds.get(str(getattr(known.type, "__name__", known.type)))
        value = made.get(known.name)
        if value is None or kind is None or (kind is not str and type(value) is kind):
            continue
        try:
            # Python would make 1 of True, 2 of 2.5, and text of a list.
            if kind is bool or isinstance(value, bool | list | dict) or (kind is int and isinstance(value, float)):
                raise ValueError
            made[known.name] = kind(value)
        except (TypeError, ValueError) as error:
            raise CommandError(f"{known.name} must be of type {kind.__name__}, got {value!r}") from error
    freeze = made.get("freeze")
    if isinstance(freeze, str):
        freeze = made["freeze"] = parse_freeze(freeze)
    if freeze is not None and not (
        isinstance(freeze, Mapping) and all(type(epochs) is int and epochs >= 0 for epochs in freeze.values())
    ):
        raise CommandError(f"freeze must map modalities to numbers of epochs, such as image: 3, got {freeze!r}")
    return made


def parse_freeze(text: str) -> dict[str, int]:
    """``"image=3,text=5"`` as a mapping; ``"none"`` as an empty one.

    Raises:
        CommandError: anything else.

    Example:
        >>> parse_freeze("image=3,text=5")
        {'image': 3, 'text': 5}
    """
    if text == "none":
        return {}
    try:
        pairs = [item.split("=") for item in text.split(",")]
        return {name.strip(): int(epochs) for name, epochs in pairs}
    except ValueError as error:
        raise CommandError(f"freeze must be like image=3,text=5, or none; got {text!r}") from error


def _check(settings: Settings) -> None:
    modalities = ("rgb", "depth") if settings.data_set in ("nyud2", "sunrgbd") else ("text", "image")
    for name, allowed in (
        ("method", METHODS[settings.data_set]),
        ("selection", ("held-out", "test")),
        ("optimizer", ("adam", "adamw")),
        ("form", ("paper", "margin", "released")),
        ("pairs", ("adjacent", "all")),
        ("update", ("after", "before")),
    ):
        if getattr(settings, name) not in allowed:
            raise CommandError(f"{name} must be one of {', '.join(allowed)}, got {getattr(settings, name)!r}")
    for names, least in (
        (("batch_size", "accumulate", "epochs", "patience", "regions", "image_size", "load_size", "limit_batches"), 1),
        (("start_epoch", "sampling_count"), 1),
        (("max_tokens",), 3),
        (("seed", "workers", "hidden", "joint_width", "plateau_patience"), 0),
        (("weight_decay", "ranking_weight", "beta"), 0),
    ):
        for name in names:
            value = getattr(settings, name)
            if value is not None and not least <= value < math.inf:
                raise CommandError(f"{name} must be at least {least}, got {value}")
    for name in ("learning_rate", "temperature"):
        if not 0 < getattr(settings, name) < math.inf:
            raise CommandError(f"{name} must be above 0, got {getattr(settings, name)}")
    if settings.alpha is not None and not -math.inf < settings.alpha < 0:
        raise CommandError(f"alpha must be below 0, got {settings.alpha}")
    if settings.seed > MOST_SEEDS:
        raise CommandError(f"seed must be at most {MOST_SEEDS}, got {settings.seed}")
    for name, low, high in (
        ("validation", 0.0, 1.0),
        ("dropout", 0.0, 1.0),
        ("plateau_factor", 0.0, 1.0),
        ("warmup", -1.0, 1.0),
    ):
        if not low < getattr(settings, name) + (name == "dropout") * 1e-12 < high:
            raise CommandError(f"{name} must lie between 0 and 1, got {getattr(settings, name)}")
    if settings.image_size > settings.load_size:
        raise CommandError(f"image_size must be at most load_size, got {settings.image_size} > {settings.load_size}")
    strangers = sorted(set(settings.freeze) - set(modalities))
    if strangers:
        raise CommandError(f"freeze names {', '.join(strangers)}; {settings.data_set} has {', '.join(modalities)}")


def read_settings(path: Path) -> dict[str, Any]:
    """A YAML file of settings: nothing but plain values.

    Raises:
        CommandError: no such file, or no mapping in it.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise CommandError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise CommandError(f"{path}: must be a mapping of settings, got {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


def write_settings(path: Path, settings: Settings) -> None:
    """Write ``settings`` as YAML, atomically."""
    import yaml

    content = asdict(settings)
    content["freeze"] = dict(settings.freeze)
    text = yaml.safe_dump(content, sort_keys=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def load_run(folder: Path) -> Settings:
    """The settings of the run in ``folder``.

    Raises:
        CommandError: there are none, or they are none of ours.
    """
    content = read_settings(folder / FILE)
    data_set = content.get("data_set")
    if data_set not in DEFAULTS:
        raise CommandError(f"{folder / FILE}: data_set must be one of {', '.join(DEFAULTS)}, got {data_set!r}")
    return resolve(data_set, content)


def differences(ours: Settings, theirs: Settings) -> list[str]:
    """What of two runs' settings is not the same, in words; what the machine decides is left out."""
    return [
        f"{f.name} {getattr(theirs, f.name)}, not {getattr(ours, f.name)}"
        for f in fields(Settings)
        if f.name not in ours.machine and (getattr(ours, f.name) or None) != (getattr(theirs, f.name) or None)
    ]
