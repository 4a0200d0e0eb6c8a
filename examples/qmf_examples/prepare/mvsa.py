"""MVSA-Single's label file and texts to the JSON-lines splits that the trainers read.

``labelResultAll.txt`` (Niu, Zhu, Pang and El Saddik, MMM 2016) has a line ``ID<tab>text label,image label`` per pair,
and ``data/`` an ID.txt and an ID.jpg. Two rules make one label of the two:

- "agree" keeps a pair whose labels are the same. The splits published with QMF are exactly these pairs, 2,592 of 4,869.
- "polarity" drops a pair of positive and negative, and lets a polarity win over neutral (Xu and Mao, *MultiSentiNet*,
  CIKM 2017): 4,511 pairs.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.catalogue import data_set
from ..data.faults import DataError, Fault
from ..data.stratified_split import stratified_split
from ..data.text_images import Row, read_rows
from ..files import write_atomically

RULES = ("agree", "polarity")
SPLITS = ("train", "dev", "test")
SHARES = (0.6, 0.2, 0.2)
"""The shares of the published splits, 1,555, 518 and 519 of 2,592."""
LABELS = ("negative", "neutral", "positive")


def joint_label(text: str, image: str, rule: str = "agree") -> str | None:
    """The one label of a pair, or None where it is dropped.

    Example:
        >>> [joint_label("neutral", "positive", rule) for rule in RULES]
        [None, 'positive']
        >>> [joint_label("negative", "positive", rule) for rule in RULES]
        [None, None]
    """
    if text == image:
        return text
    if rule == "agree" or {text, image} == {"negative", "positive"}:
        return None
    return image if text == "neutral" else text


def read_labels(file: Path) -> tuple[dict[str, tuple[str, str]], list[Fault]]:
    """Each pair's text and image label by its ID, and the lines that hold something else.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    labels: dict[str, tuple[str, str]] = {}
    faults = []
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}. {data_set('mvsa').obtain}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.upper().startswith("ID")):
            continue
        identifier, _, both = line.partition("\t")
        text, _, image = (part.strip() for part in both.partition(","))
        if text not in LABELS or image not in LABELS:
            faults.append(Fault(file.name, f"must be ID<tab>text label,image label, got {line!r:.60}", number))
        elif not identifier.strip().isdigit():
            faults.append(Fault(file.name, f"must start with a number, got {identifier!r:.60}", number))
        elif identifier.strip() in labels:
            faults.append(Fault(file.name, f"pair {identifier.strip()} a second time", number))
        else:
            labels[identifier.strip()] = (text, image)
    return labels, faults


@dataclass
class Agreement:
    """How the labels of given splits compare with those that a rule makes of the label file."""

    rows: int = 0
    same: int = 0
    differ: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    left_out: int = 0


def check_splits(splits: Mapping[str, Sequence[Row]], labels: Mapping[str, tuple[str, str]], rule: str) -> Agreement:
    """Compare splits with the label file.

    ``left_out`` counts the pairs that the rule keeps and no split has.
    """
    result = Agreement()
    for row in (row for rows in splits.values() for row in rows):
        result.rows += 1
        if row.id not in labels:
            result.unlisted.append(row.id)
        elif joint_label(*labels[row.id], rule) == row.label:
            result.same += 1
        else:
            result.differ.append(row.id)
    given = {row.id for rows in splits.values() for row in rows}
    result.left_out = sum(i not in given for i in labels if joint_label(*labels[i], rule) is not None)
    return result


def read_splits(folder: Path) -> dict[str, list[Row]]:
    """The rows of the .jsonl splits in ``folder``.

    Raises:
        DataError: one is missing, or has a line that does not parse.
    """
    splits = {}
    for split in SPLITS:
        rows, faults = read_rows(data_set("mvsa"), folder / f"{split}.jsonl")
        if faults:
            raise DataError(f"{folder}: {faults[0]}")
        splits[split] = rows
    return splits


@dataclass
class MvsaOutcome:
    """What ``prepare_mvsa`` wrote: rows per split and label, pairs dropped by the rule, and faults left out."""

    counts: dict[str, Counter[str]]
    dropped: int
    faults: list[Fault]
    agreement: Agreement | None


def prepare_mvsa(raw: Path, out: Path, rule: str = "agree", splits: Path | None = None, seed: int = 0) -> MvsaOutcome:
    """Write train.jsonl, dev.jsonl and test.jsonl to ``out``.

    Args:
        raw: the folder with labelResultAll.txt and data/.
        out: the folder to write to, usually ``raw``: ``img`` is ``data/ID.jpg``.
        rule: "agree" or "polarity".
        splits: a folder with the published .jsonl files, which then say which pair is in which split, and its text; a
            stratified 60/20/20 split is drawn, and texts are read from ``data/ID.txt``, where None.
        seed: of that split.

    A pair without its text is left out, and told in the outcome. A file that is there already with other content is
    not overwritten.

    Raises:
        DataError: what cannot be read or written, no pair to write, or splits already there that differ.
    """
    labels, faults = read_labels(raw / "labelResultAll.txt")
    joint = {i: label for i, both in labels.items() if (label := joint_label(*both, rule)) is not None}
    agreement = None
    texts: dict[str, str] = {}
    if splits is not None:
        given = read_splits(splits)
        agreement = check_splits(given, labels, rule)
        chosen = {split: [row.id for row in rows if row.id in joint] for split, rows in given.items()}
        texts = {row.id: row.text for rows in given.values() for row in rows}
    else:
        identifiers = sorted(joint, key=int)
        parts = stratified_split([joint[i] for i in identifiers], SHARES, seed)
        chosen = {split: [identifiers[i] for i in part] for split, part in zip(SPLITS, parts, strict=True)}
    files: dict[Path, bytes] = {}
    counts: dict[str, Counter[str]] = {}
    for split, members in chosen.items():
        lines = []
        counts[split] = Counter()
        for identifier in members:
            text = texts[identifier] if identifier in texts else _read_text(raw, identifier)
            if isinstance(text, Fault):
                faults.append(text)
                continue
            row = {"id": identifier, "label": joint[identifier], "text": text, "img": f"data/{identifier}.jpg"}
            lines.append(json.dumps(row) + "\n")
            counts[split][joint[identifier]] += 1
        if not lines:
            few = f"; {faults[0]}" if faults else ""
            raise DataError(f"no pair for {split}.jsonl, of {len(joint)} that the rule {rule!r} keeps{few}")
        files[out / f"{split}.jsonl"] = "".join(lines).encode()
    _write(files, out)
    return MvsaOutcome(counts, len(labels) - len(joint), faults, agreement)


def _read_text(raw: Path, identifier: str) -> str | Fault:
    file = raw / "data" / f"{identifier}.txt"
    try:
        content = file.read_bytes()
    except OSError as error:
        return Fault(f"data/{file.name}", error.strerror or str(error))
    # The tweets came in several encodings; the published splits have a ? for what they could not read.
    return " ".join(content.decode("utf-8", errors="replace").replace("�", "?").splitlines()).strip()


def _write(files: Mapping[Path, bytes], out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            if path.exists() and path.read_bytes() != content:
                raise DataError(f"{path} is there already with other rows; choose another --out, or move it away")
        for path, content in files.items():
            write_atomically(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror or error}") from error
