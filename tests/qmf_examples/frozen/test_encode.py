"""Features of frozen encoders: what they are, what they depend on, and what a cache on disk is worth."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image

from qmf_examples.corruption.conditions import Condition
from qmf_examples.corruption.every_row import Damage
from qmf_examples.errors import CommandError
from qmf_examples.files import held
from qmf_examples.frozen import encode, store
from qmf_examples.frozen.encode import encode_split
from qmf_examples.frozen.encoders import encoder_widths
from qmf_examples.training.settings import QUICK, resolve

GAUSSIAN = Damage((Condition("gaussian", 60.0),))


def settings_of(data_set, root, **given):
    return resolve(data_set, QUICK, {"data_root": str(root), "regions": 1, **given})


def files(cache):
    return {path: path.stat().st_mtime_ns for path in sorted(cache.rglob("*.features"))}


@pytest.fixture
def pairs(sample, tmp_path):
    shutil.copytree(sample("nyud2"), tmp_path / "data")
    return tmp_path / "data"


def test_pairs_and_texts_have_features_of_their_encoders_widths_in_the_data_sets_order(sample, tmp_path):
    for data_set, widths in (("nyud2", {"rgb": 32, "depth": 32}), ("mvsa", {"text": 32, "image": 32})):
        settings = settings_of(data_set, sample(data_set))
        found = encode_split(settings, "test", tmp_path / "cache")
        assert encoder_widths(settings) == widths
        rows = 20 if data_set == "nyud2" else 6
        assert {name: x.shape for name, x in found.items()} == dict.fromkeys(widths, (1, rows, 32))
        assert all(x.dtype == torch.float32 and torch.isfinite(x).all() for x in found.values())
        assert all(len(x[0].unique(dim=0)) > rows // 2 for x in found.values())


def test_what_is_computed_again_is_equal_to_the_last_bit_and_what_is_there_is_read(pairs, tmp_path, monkeypatch):
    settings = settings_of("nyud2", pairs)
    first = encode_split(settings, "train", tmp_path / "a", copies=2)
    again = encode_split(settings, "train", tmp_path / "b", copies=2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["rgb"][0], first["rgb"][1])
    monkeypatch.setattr(encode, "_Work", None)
    assert torch.equal(encode_split(settings, "train", tmp_path / "a", copies=2)["depth"], first["depth"])


@pytest.mark.parametrize("change", ["an image", "the transform", "the encoder", "the damage", "the seed of a copy"])
def test_features_of_anything_else_are_never_taken(change, pairs, tmp_path):
    settings, cache = settings_of("nyud2", pairs), tmp_path / "cache"
    split, damage, copies = "test", None, 1
    before = encode_split(settings, split, cache)["rgb"]
    if change == "an image":
        path = next((pairs / "test").glob("*/*.png"))
        times = path.stat()
        Image.new("RGB", Image.open(path).size, (9, 200, 30)).save(path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        encode.open_split.__globals__["_digests"].clear()  # as in a new process
    if change == "the transform":
        settings = settings_of("nyud2", pairs, load_size=30, image_size=30)
    if change == "the encoder":
        torch.manual_seed(5)
        from qmf_examples.models.image_encoders import TinyResNet

        torch.save(TinyResNet().state_dict(), tmp_path / "w.pth")
        settings = settings_of("nyud2", pairs, weights=str(tmp_path / "w.pth"))
    if change == "the damage":
        damage = GAUSSIAN
    if change == "the seed of a copy":
        split, copies = "train", 2
        before = encode_split(settings, split, cache, copies=2)["rgb"]
        settings = settings_of("nyud2", pairs, seed=7)
    after = encode_split(settings, split, cache, damage, copies)["rgb"]
    assert not torch.equal(before, after)


def test_a_moved_folder_has_the_same_features(pairs, tmp_path, monkeypatch):
    before = encode_split(settings_of("nyud2", pairs), "test", tmp_path / "cache")
    pairs.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(encode, "_Work", None)
    after = encode_split(settings_of("nyud2", tmp_path / "elsewhere"), "test", tmp_path / "cache")
    assert torch.equal(before["rgb"], after["rgb"])


def test_a_damage_of_texts_takes_the_images_that_are_there(sample, tmp_path):
    settings = settings_of("mvsa", sample("mvsa"))
    clean = encode_split(settings, "test", tmp_path)
    number = len(files(tmp_path))
    both = Damage((Condition("words", 1.0), Condition("black", 0.0)))
    texts = encode_split(settings, "test", tmp_path, Damage((Condition("words", 1.0),)))
    assert torch.equal(texts["image"], clean["image"])
    assert not torch.equal(texts["text"], clean["text"])
    assert len(files(tmp_path)) == number + 1
    found = encode_split(settings, "test", tmp_path, both)
    assert torch.equal(found["text"], texts["text"])
    assert len(found["image"][0].unique(dim=0)) == 1
    assert len(files(tmp_path)) == number + 2


def test_texts_that_are_gone_are_encoded_again_without_images_and_copies_still_have_them(sample, tmp_path):
    settings = settings_of("mvsa", sample("mvsa"))
    before = encode_split(settings, "train", tmp_path)
    for folder in tmp_path.glob("text-*"):
        shutil.rmtree(folder)
    after = encode_split(settings, "train", tmp_path, copies=2)
    assert all(torch.equal(before[name][0], after[name][0]) for name in before)
    assert torch.equal(after["text"][1], after["text"][0])
    assert not torch.equal(after["image"][1], after["image"][0])


@pytest.mark.parametrize("damage", ["cut off", "changed", "empty"])
def test_a_file_that_is_not_whole_is_computed_again(damage, pairs, tmp_path):
    settings = settings_of("nyud2", pairs)
    before = encode_split(settings, "test", tmp_path)
    path = next(tmp_path.rglob("*.features"))
    content = path.read_bytes()
    path.write_bytes({"cut off": content[:-7], "changed": content[:-1] + b"\x7f", "empty": b""}[damage])
    after = encode_split(settings, "test", tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert path.read_bytes() == content


KILLED = """
import json, os, signal, sys
from pathlib import Path
from qmf_examples.corruption.conditions import Condition
from qmf_examples.corruption.every_row import Damage
from qmf_examples.frozen import encode, store
from qmf_examples.training.settings import resolve
data_set, layers, cache, after, damage = sys.argv[1], *map(json.loads, sys.argv[2:])
store.ROWS = encode.ROWS = 8
write = store.Store.write
def once(self, copy, part, features):
    if part == after:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, copy, part, features)
store.Store.write = once
damage = Damage((Condition(*damage[0]),), damage[1]) if damage else None
encode.encode_split(resolve(data_set, layers), "test", Path(cache), damage)
"""


@pytest.mark.parametrize("protocol", [None, pytest.param("released-2023", marks=pytest.mark.slow)])
def test_a_killed_command_goes_on_from_what_it_had_finished(protocol, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROWS", 8)
    monkeypatch.setattr(encode, "ROWS", 8)
    damage = None if protocol is None else Damage((Condition("gaussian", 40.0),), protocol)
    layers = {**QUICK, "data_root": str(pairs), "regions": 1}
    whole = encode_split(resolve("nyud2", layers), "test", tmp_path / "whole", damage)
    given = [layers, str(tmp_path / "cache"), 1, [["gaussian", 40.0], protocol] if damage else None]
    command = [sys.executable, "-c", KILLED, "nyud2", *map(json.dumps, given)]
    code = subprocess.run(command, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert code.returncode == -signal.SIGKILL, code.stderr.decode()
    there = files(tmp_path / "cache")
    assert there
    found = encode_split(resolve("nyud2", layers), "test", tmp_path / "cache", damage)
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert {path: time for path, time in files(tmp_path / "cache").items() if path in there} == there


def test_two_at_once_compute_everything_once(pairs, tmp_path):
    settings, lines = settings_of("nyud2", pairs), []
    with held(_made(tmp_path / "cache") / "encoding.lock", "busy"):
        found = {}
        other = threading.Thread(
            target=lambda: found.update(encode_split(settings, "test", tmp_path / "cache", say=lines.append))
        )
        other.start()
        while not lines:
            other.join(0.05)
            assert other.is_alive(), "it did not wait"
        assert "another command computes features there" in lines[0]
        assert not files(tmp_path / "cache")
    other.join(60)
    assert found["rgb"].shape == (1, 20, 32)


def _made(folder):
    folder.mkdir()
    return folder


def test_the_paper_s_protocols_damage_half(sample, tmp_path):
    settings = settings_of("mvsa", sample("mvsa"))
    clean = encode_split(settings, "test", tmp_path)
    for protocol in ("clean", "released-2023"):
        found = encode_split(settings, "test", tmp_path, Damage((Condition("gaussian", 10.0),), protocol))
        for name in clean:
            same = (found[name][0] == clean[name][0]).all(1)
            assert 0 < same.sum() < len(same), (protocol, name)


def test_every_row_is_damaged_and_a_stronger_noise_is_the_same_noise(pairs, tmp_path):
    settings = settings_of("nyud2", pairs)
    clean = encode_split(settings, "test", tmp_path)["rgb"][0]
    weak, strong = (
        encode_split(settings, "test", tmp_path, Damage((Condition("gaussian", level),)))["rgb"][0]
        for level in (20.0, 80.0)
    )
    near, far = (weak - clean).norm(dim=1), (strong - clean).norm(dim=1)
    assert near.min() > 0
    assert (far > near).float().mean() > 0.9


def test_bad_rows_are_named_and_skipped_where_asked(pairs, tmp_path):
    path = sorted((pairs / "test").glob("*/*.png"))[3]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Exception, match=path.name):
        encode_split(settings_of("nyud2", pairs), "test", tmp_path / "cache")
    assert not files(tmp_path / "cache")
    found = encode_split(settings_of("nyud2", pairs, skip_bad=True), "test", tmp_path / "cache")
    assert found["rgb"].shape == (1, 19, 32)


def test_what_cannot_be_asked_for(sample, tmp_path):
    settings = settings_of("mvsa", sample("mvsa"))
    with pytest.raises(CommandError, match="split must be one of train, dev, test, got 'val'"):
        encode_split(settings, "val", tmp_path)
    with pytest.raises(ValueError, match="copies must be at least 1"):
        encode_split(settings, "train", tmp_path, GAUSSIAN, copies=2)
    with pytest.raises(CommandError, match="gaussian60: level must be from 0 to 10"):
        encode_split(settings, "test", tmp_path, Damage((Condition("gaussian", 60.0),), "clean"))


@pytest.mark.parametrize("protocol", ["every-row", "released-2023"])
def test_damage_that_depends_on_how_a_text_is_written_is_computed_anew(protocol, sample, tmp_path):
    # Two blanks for one leave the tokens as they are, and shift which words are blanked; in the released protocols
    # the draws for texts shift those for the images behind them, too.
    root = tmp_path / "data"
    shutil.copytree(sample("mvsa"), root)
    kind = "words" if protocol == "every-row" else "salt-pepper"
    damage = Damage((Condition(kind, 0.5 if protocol == "every-row" else 8.0),), protocol)
    settings = settings_of("mvsa", root)
    encode_split(settings, "test", tmp_path / "cache", damage)
    rows = [json.loads(line) for line in (root / "test.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "text": row["text"].replace(" ", "  ", 1)}) + "\n" for row in rows)
    (root / "test.jsonl").write_text(text)
    found = encode_split(settings, "test", tmp_path / "cache", damage)
    fresh = encode_split(settings, "test", tmp_path / "other", damage)
    assert all(torch.equal(found[name], fresh[name]) for name in fresh)


def test_features_that_are_not_finite_are_not_kept(pairs, tmp_path):
    from qmf_examples.models.image_encoders import TinyResNet

    weights = TinyResNet().state_dict()
    weights["conv1.weight"][0] = float("nan")
    torch.save(weights, tmp_path / "w.pth")
    settings = settings_of("nyud2", pairs, weights=str(tmp_path / "w.pth"))
    with pytest.raises(CommandError, match="features of test, clean: rgb is not finite in 20 of 20 rows"):
        encode_split(settings, "test", tmp_path / "cache")
    assert not files(tmp_path / "cache")
