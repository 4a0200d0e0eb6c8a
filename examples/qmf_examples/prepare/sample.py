"""Small made-up data sets in the exact layout of the real ones, for trying out and for tests."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.catalogue import DataSet
from ..data.faults import DataError
from ..files import write_atomically
from .sample_scenes import dish, room

FILLER = [
    "the",
    "a",
    "my",
    "at",
    "with",
    "for",
    "and",
    "great",
    "really",
    "today",
    "new",
    "best",
    "love",
    "this",
    "recipe",
    "photo",
    "home",
    "city",
    "look",
    "from",
]
SENTIMENT = {
    "negative": ["sad", "awful", "angry", "worst", "broken", "cry", "pain", "fear"],
    "neutral": ["report", "table", "map", "list", "page", "number", "item", "update"],
    "positive": ["happy", "smile", "sunny", "win", "gift", "party", "friend", "joy"],
}


def write_sample(
    known: DataSet,
    out: Path,
    *,
    per_class: dict[str, int],
    image_size: int = 64,
    seed: int = 0,
    done: Callable[[], object] = lambda: None,
) -> int:
    """Write a sample of ``known`` to ``out``; the same arguments write the same bytes.

    Images and texts depend on the class, and each sample on its own stream of random numbers. MVSA comes with its
    label file and its text files, as in the release.

    Args:
        known: which data set.
        out: a new or an empty folder.
        per_class: how many samples of each class a split has, for each of the data set's splits.
        image_size: of each image, or of each half of a pair, in pixels to each side.
        seed: of everything.
        done: called after each sample.

    Returns:
        How many samples were written.

    Raises:
        DataError: the folder is not empty or cannot be written to.
        ValueError: a split without a count, a count below 1, or an image size below 16.
    """
    if set(per_class) != set(known.splits) or min(per_class.values()) < 1:
        raise ValueError(f"per_class must give a count of at least 1 for each of {known.splits}, got {per_class}")
    if image_size < 16:
        raise ValueError(f"image_size must be at least 16, got {image_size}")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out} is there already and not an empty folder; choose a new one")
        write = _write_paired if known.paired else _write_texts
        for number, (split, count) in enumerate((split, per_class[split]) for split in known.splits):
            write(known, out, split, count, image_size, [seed, number], done)
        if known.name == "mvsa":
            _write_label_file(known, out)
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror or error}") from error
    return sum(per_class.values()) * len(known.classes)


def _write_paired(
    known: DataSet, out: Path, split: str, count: int, size: int, seed: list[int], done: Callable[[], object]
) -> None:
    for label, name in enumerate(known.classes):
        folder = out / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            rgb, depth = room(label, len(known.classes), size, np.random.default_rng([*seed, label, i]))
            Image.fromarray(np.concatenate([rgb, depth], axis=1)).save(folder / f"{name}_{i:04d}.png")
            done()


def _write_texts(
    known: DataSet, out: Path, split: str, count: int, size: int, seed: list[int], done: Callable[[], object]
) -> None:
    rows = []
    for i in range(count):
        for label, name in enumerate(known.classes):
            rng = np.random.default_rng([*seed, label, i])
            if known.name == "mvsa":
                identifier = str(1 + seed[1] * 1_000_000 + i * len(known.classes) + label)
                img = f"data/{identifier}.jpg"
            else:
                identifier = f"{name}_{name}_{i}.jpg"
                img = f"images/{'test' if split == 'test' else 'train'}/{name}/{split}_{i}.jpg"
            path = out / img
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(dish(label, len(known.classes), size, rng)).save(path, quality=90)
            text = sentence(known, name, rng)
            if known.name == "mvsa":
                path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
            rows.append({"id": identifier, "label": name, "text": text, "img": img})
            done()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_atomically(out / f"{split}.jsonl", lambda file: file.write(lines))


def sentence(known: DataSet, name: str, rng: np.random.Generator) -> str:
    """Four to nine words, one to three of which tell the class."""
    telling = SENTIMENT[name] if known.name == "mvsa" else name.split("_")
    words = [*rng.choice(telling, rng.integers(1, 4)), *rng.choice(FILLER, rng.integers(3, 7))]
    return " ".join(rng.permutation(words).tolist())


def _write_label_file(known: DataSet, out: Path) -> None:
    lines = [line for split in known.splits for line in (out / f"{split}.jsonl").read_text("utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    # Two more pairs, as the release has them: one that contradicts itself and one with a neutral text.
    extra = [("9000001", "positive", "negative"), ("9000002", "neutral", "positive")]
    pairs = [(row["id"], row["label"], row["label"]) for row in rows] + extra
    for identifier, _, _ in extra:
        (out / "data" / f"{identifier}.txt").write_text("the report today\n", encoding="utf-8")
        Image.new("RGB", (32, 32), (90, 90, 90)).save(out / "data" / f"{identifier}.jpg")
    text = "ID\ttext,image\n" + "".join(f"{i}\t{text},{image}\n" for i, text, image in pairs)
    (out / "labelResultAll.txt").write_text(text, encoding="utf-8")
