"""Every setting of a training run: the released defaults, then a YAML file, then the command line."""

import math
import reprlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import CommandError
from ..files import write_atomically
from ..models.image_transforms import RELEASED, encoder_transform

FILE = "settings.yaml"
POOLINGS = ("mean", "first", "pooler")
"""Of a text's tokens, see ``TextEncoder``."""
MOST_SEEDS = 2**31
MANY = 10**9
"""More epochs, batches or samples than there will be."""
LARGEST_FILE = 2**16
DEEPEST = 4
"""Of a YAML file of settings, in bytes and in values that hold values."""

_PUBLISHED = ("tmc", "etmc", "rcml", "pdf", "product_of_experts", "noisy_or", "entropy_weights")
_FUSED = (*_PUBLISHED, "ranking-only", "qmf", "robust", "msp", "entropy", "evidence", "energy")
RGBD_METHODS = ("rgb", "depth", "late", "concat", "align", "mmtm", *_FUSED)
TEXT_METHODS = ("bow", "image", "bert", "late", "concatbow", "concatbert", "mmbt", *_FUSED)
METHODS = {"nyud2": RGBD_METHODS, "sunrgbd": RGBD_METHODS, "food101": TEXT_METHODS, "mvsa": TEXT_METHODS}
"""The rows of the paper's tables, in their order, the package's recommended rule, and the weightings of
the paper's Figure 3 and Table 3."""
NOT_FROZEN = {
    "mmtm": "it joins the stages inside of the image encoders",
    "mmbt": "it reads the image's regions into the text encoder",
    "bow": "a bag of words is no encoder, and is learned with the method",
    "concatbow": "a bag of words is no encoder, and is learned with the method",
}
"""Why these methods cannot work on what frozen encoders have seen."""
LOGITS_ALONE = "robust-logits"
"""The recommended rule, judging by logits alone, where ``robust`` judges by features too: with frozen encoders. Where
encoders are trained, ``robust`` itself judges by logits alone."""
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
    transform: str = "released"
    """``"released"``, or ``"encoder"`` for the image encoder's own; the default of all but the paper's ResNets."""
    load_size: int = 256
    image_size: int = 224
    """With ``transform="encoder"``, the encoder's own where not given."""
    max_tokens: int = 512
    # Networks
    frozen: bool = False
    """Whether encoders stay as they are: what they see is computed once, and heads are trained on that."""
    copies: int = 0
    """For frozen encoders: augmented ones of each training image, of which an epoch takes one, or the image itself."""
    image_encoder: str = "resnet18"
    """A model of timm, or ``tiny``."""
    weights: str = "imagenet"
    """The image encoder's: ``imagenet``, ``none``, or a file."""
    text_encoder: str = "bert-base-uncased"
    """A model of Transformers, by its name or folder, or ``tiny``."""
    text_pooling: str = "pooler"
    """``mean`` or ``first`` of a text's tokens, or BERT's ``pooler``, as released."""
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
    workers: int | None = None
    """Processes that load; None for as many as cores, and at most 4."""
    cache: str = "on"
    """Where decoded and resized images are kept: ``"on"`` for the user's folder for caches, ``"off"``, or a folder."""
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
        return frozenset({"data_root", "workers", "cache", "device", "devices", "strategy", "epochs"})


RGBD = Settings("nyud2", "")
TEXT = replace(
    RGBD,
    data_set="mvsa",
    image_encoder="resnet152",
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
    "image_encoder": "tiny",
    "weights": "none",
    "text_encoder": "tiny",
    "load_size": 36,
    "image_size": 32,
    "max_tokens": 24,
    "batch_size": 16,
    "accumulate": 1,
    "epochs": 12,
    "learning_rate": 3e-3,
    "freeze": {},
    "workers": 0,
    "device": "cpu",
    "limit_batches": 12,
}
"""A run of seconds on a CPU, in which tiny networks learn what `qmf-fusion sample` writes. Its figures of real data
mean nothing."""

FROZEN: dict[str, Any] = {"regions": 1, "text_pooling": "mean"}
"""Of encoders that are not trained: what the image encoder itself hands to its classifier, and the mean of the tokens,
since a pooler that is not trained along was made for another task."""
HEADS: dict[str, Any] = {
    "hidden": 64,
    "dropout": 0.0,
    "joint_width": 0,
    "batch_size": 64,
    "accumulate": 1,
    "epochs": 40,
    "patience": 40,
    "optimizer": "adam",
    "learning_rate": 5e-4,
    "weight_decay": 1e-4,
    "warmup": 0.0,
    "plateau_patience": 40,
    "freeze": {},
    "workers": 0,
    "device": "cpu",
}
"""How heads on frozen encoders are trained, on every data set, in place of its own settings: `bench-robustness` trains
heads on feature files so too. The rate stays, and no epoch is too many: the best one of all is kept."""


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
    own = {**_own(data_set, given), **_own_transform(data_set, given)}
    settings = replace(DEFAULTS[data_set], **_typed({**own, **given}))
    _check(settings)
    return settings


def _own(data_set: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What takes the place of the data set's defaults: of frozen encoders, or else of the method."""
    if given.get("frozen") is True:
        return {**FROZEN, **HEADS, "copies": int(METHODS[data_set] is RGBD_METHODS)}
    method = given.get("method")
    return OF_METHOD.get(method, {}) if isinstance(method, str) and METHODS[data_set] is RGBD_METHODS else {}


def methods_of(data_set: str, frozen: bool = False) -> tuple[str, ...]:
    """The methods that can be trained, in the order of the tables.

    Example:
        >>> [name for name in methods_of("mvsa", frozen=True) if name not in methods_of("mvsa")]
        ['robust-logits']
    """
    names = METHODS[data_set]
    if not frozen:
        return names
    able = [name for name in names if name not in NOT_FROZEN]
    able.insert(able.index("robust") + 1, LOGITS_ALONE)
    return tuple(able)


def why_not_frozen(methods: Sequence[str]) -> str:
    """Which of these methods need encoders that are trained, and why, in one line; "" where none does.

    Example:
        >>> why_not_frozen(["mmtm", "qmf"])
        'mmtm cannot be trained on frozen encoders (it joins the stages inside of the image encoders)'
    """
    reasons: dict[str, list[str]] = {}
    for name in methods:
        if name in NOT_FROZEN:
            reasons.setdefault(NOT_FROZEN[name], []).append(name)
    return "; ".join(
        f"{' and '.join(names)} cannot be trained on frozen encoders ({why})" for why, names in reasons.items()
    )


def _own_transform(data_set: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Which transform an image encoder has unless told otherwise, and its sizes where it is its own."""
    encoder = given.get("image_encoder", DEFAULTS[data_set].image_encoder)
    if not isinstance(encoder, str):
        return {}  # which the check of types says better
    chosen = given.get("transform", "released" if encoder in RELEASED else "encoder")
    if chosen != "encoder":
        return {"transform": chosen}
    made = encoder_transform(encoder)
    return {"transform": chosen, "load_size": made.load_size, "image_size": made.image_size}


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
    if isinstance(made.get("cache"), bool):  # as which YAML reads on and off
        made["cache"] = "on" if made["cache"] else "off"
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
    if settings.frozen and settings.method in NOT_FROZEN:
        raise CommandError(f"method: {why_not_frozen([settings.method])}")
    if settings.copies and not settings.frozen:
        raise CommandError("copies are of frozen encoders' images (--frozen): else each epoch augments anew")
    if settings.frozen and any(settings.freeze.values()):
        raise CommandError("freeze is for encoders that are trained after so many epochs: frozen ones stay as they are")
    for name, allowed in (
        ("method", methods_of(settings.data_set, settings.frozen)),
        ("selection", ("held-out", "test")),
        ("transform", ("released", "encoder")),
        ("text_pooling", POOLINGS),
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
        (("copies",), 0, 1000),
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
    if not settings.cache or "\0" in settings.cache:
        raise CommandError(f"cache must be on, off or a folder, got {brief(settings.cache)}")
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
