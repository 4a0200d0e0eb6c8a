"""Every setting of a training run: the released defaults, then a YAML file, then the command line."""

import math
import reprlib
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import CommandError
from ..files import write_atomically

FILE = "settings.yaml"
MOST_SEEDS = 2**31
MANY = 10**9
"""More epochs, batches or samples than there will be."""
LARGEST_FILE = 2**16
DEEPEST = 4
"""Of a YAML file of settings, in bytes and in values that hold values."""

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
    device: str = "auto"
    """Lightning's accelerator (``auto``, ``cpu``, ``cuda``, ``mps``, ...), or one device of it, such as ``cuda:1``."""
    devices: str = "1"
    strategy: str = "auto"
    limit_batches: int | None = None
    """Batches of each epoch; None for all."""

    @property
    def machine(self) -> frozenset[str]:
        """Settings that may change when a run is resumed."""
        return frozenset({"data_root", "workers", "device", "devices", "strategy", "epochs"})


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
    "device": "cpu",
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
        raise CommandError(f"no such setting: {', '.join(unknown):.200}; there are {', '.join(sorted(known))}")
    if given.get("data_set", data_set) != data_set:
        raise CommandError(f"data_set: the settings are for {brief(given['data_set'])}, the command for {data_set}")
    method = given.get("method")
    own = OF_METHOD.get(method, {}) if isinstance(method, str) and METHODS[data_set] is RGBD_METHODS else {}
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
            plain = isinstance(value, int | float | str) and not isinstance(value, bool)
            if kind is bool or not plain or (kind is int and isinstance(value, float)):
                raise ValueError
            made[known.name] = kind(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise CommandError(f"{known.name} must be of type {kind.__name__}, got {brief(value)}") from error
    freeze = made.get("freeze")
    if isinstance(freeze, str):
        freeze = made["freeze"] = parse_freeze(freeze)
    if freeze is not None and not (
        isinstance(freeze, Mapping)
        and all(isinstance(name, str) and type(n) is int and 0 <= n <= MANY for name, n in freeze.items())
    ):
        raise CommandError(f"freeze must map modalities to numbers of epochs, such as image: 3, got {brief(freeze)}")
    return made


def brief(value: object) -> str:
    """A value as it is shown in a message, whatever a file holds: short, of deep nesting and long numbers too."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes out no whole number of more than 4,300 digits.
        return f"a value of type {type(value).__name__} with a number that is too long to be shown"


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
        raise CommandError(f"freeze must be like image=3,text=5, or none; got {brief(text)}") from error


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
            raise CommandError(f"{name} must be one of {', '.join(allowed)}, got {brief(getattr(settings, name))}")
    for names, least, most in (
        (("batch_size", "accumulate", "epochs", "patience", "limit_batches"), 1, MANY),
        (("start_epoch", "sampling_count"), 1, MANY),
        (("image_size", "load_size"), 1, 8192),
        (("regions",), 1, 64),
        (("max_tokens",), 3, MANY),
        (("workers",), 0, 1024),
        (("hidden", "joint_width"), 0, 2**16),
        (("plateau_patience",), 0, MANY),
        (("seed",), 0, MOST_SEEDS),
        (("weight_decay", "ranking_weight", "beta"), 0, sys.float_info.max),
    ):
        for name in names:
            value = getattr(settings, name)
            if value is not None and not least <= value <= most:
                bound = f"at least {least}" if not value > most or value == math.inf else f"at most {most}"
                raise CommandError(f"{name} must be {bound}, got {brief(value)}")
    for name in ("learning_rate", "temperature"):
        if not 0 < getattr(settings, name) < math.inf:
            raise CommandError(f"{name} must be above 0, got {getattr(settings, name)}")
    if settings.alpha is not None and not -math.inf < settings.alpha < 0:
        raise CommandError(f"alpha must be below 0, got {settings.alpha}")
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
        CommandError: no such file, no mapping in it, or what no file of settings has: aliases, a setting twice, deep
            nesting, many kilobytes.
    """
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_FILE + 1).decode()
        if len(text) > LARGEST_FILE:
            raise CommandError(f"{path}: no file of settings: it is larger than {LARGEST_FILE} bytes")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # An alias costs nothing to read, and a few lines of them all memory to go through.
            if isinstance(event, yaml.AliasEvent):
                raise CommandError(f"{path}: must hold plain values, not aliases")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:  # before PyYAML goes on, whose time grows with the square of the depth
                raise CommandError(f"{path}: must hold plain values, not lists in lists in lists")
        root, content = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # such as a number with too many digits
        raise CommandError(f"{path}: not YAML of settings ({' '.join(str(error).split()):.300})") from error
    if not isinstance(content, dict):
        raise CommandError(f"{path}: must be a mapping of settings, got {type(content).__name__}")
    twice = [name for name, n in Counter(key.value for key, _ in root.value).items() if n > 1]
    if twice:  # YAML would take the last one, without a word
        raise CommandError(f"{path}: must set each setting once, got several values of {brief(twice[0])}")
    strangers = [name for name in content if not isinstance(name, str)]
    if strangers:
        raise CommandError(f"{path}: settings must have names, got {brief(strangers[0])}")
    return content


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
    if not isinstance(data_set, str) or data_set not in DEFAULTS:
        raise CommandError(f"{folder / FILE}: data_set must be one of {', '.join(DEFAULTS)}, got {brief(data_set)}")
    try:
        return resolve(data_set, content)
    except CommandError as error:
        raise CommandError(f"{folder / FILE}: {error}") from error


def differences(ours: Settings, theirs: Settings) -> list[str]:
    """What of two runs' settings is not the same, in words; what the machine decides is left out."""
    return [
        f"{f.name} {getattr(theirs, f.name)}, not {getattr(ours, f.name)}"
        for f in fields(Settings)
        if f.name not in ours.machine and (getattr(ours, f.name) or None) != (getattr(theirs, f.name) or None)
    ]
