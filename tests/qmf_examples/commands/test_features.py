"""The command `features`: a file that the bench reads, the same bytes every time, and one line of what is wrong."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from qmf_examples.cli import main
from qmf_examples.data.feature_files import load_npz

TINY = [
    "--image-encoder",
    "tiny",
    "--weights",
    "none",
    "--text-encoder",
    "tiny",
    "--load-size",
    "36",
    "--image-size",
    "32",
]


def features(root, out, data_set="mvsa", *more):
    return main(["features", data_set, "--data-root", str(root), *TINY, "--out", str(out), *more])


def test_a_file_for_the_bench_of_several_damages_and_copies(sample, tmp_path, capsys):
    out = tmp_path / "mvsa.npz"
    damages = ["gaussian:10,30", "salt-pepper:10", "blur", "black", "words:0.5", "blur:3+shuffle"]
    more = ["--damage", *damages, "--copies", "2", "--damage", "blank"]
    assert features(sample("mvsa"), out, "mvsa", *more) == 0, capsys.readouterr().err
    found = load_npz(out)
    assert found.classes == ("negative", "neutral", "positive")
    of_images = ["clean", "gaussian10", "gaussian30", "salt-pepper10", "blur", "black", "blur3+shuffle"]
    assert list(found.test["image"]) == of_images
    assert list(found.test["text"]) == ["clean", "words0.5", "blur3+shuffle", "blank"]
    assert {name: list(copies) for name, copies in found.train.items()} == {
        "text": ["clean"],
        "image": ["clean", "copy1", "copy2"],
    }
    content = out.read_bytes()
    # Again from the cache, and again from nothing.
    for cache in (tmp_path / "feature-cache", tmp_path / "other"):
        assert features(sample("mvsa"), out, "mvsa", *more, "--cache", str(cache)) == 0
        assert out.read_bytes() == content
    assert not list(tmp_path.glob("*.part"))


def test_pairs_have_the_damage_on_both_images(sample, tmp_path):
    assert features(sample("nyud2"), tmp_path / "nyud2.npz", "nyud2", "--damage", "gaussian:60") == 0
    found = load_npz(tmp_path / "nyud2.npz")
    for copies in found.test.values():
        assert (copies["gaussian60"] != copies["clean"]).any(1).all()
    assert (found.test["rgb"]["clean"] != found.test["depth"]["clean"]).any()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--damage", "fog:3"], "the kind must be one of gaussian, salt-pepper, blur, black, words"),
        (["--damage", "gaussian"], "levels of gaussian must be numbers above 0 and up to 255"),
        (["--damage", "words:2"], "levels of words must be numbers above 0 and up to 1"),
        (["--damage", "black:2"], "black has no levels"),
        (["--damage", "blur", "blur:6"], "blur must be named once"),
        (["--damage", "blur+black"], "a damage must be one of images"),
        (["--damage", "gaussian:1,2+blank"], "kinds that act together must have one level each"),
        (["--damage"], "--damage"),
        (["--out", "features.txt"], "must end in .npz"),
        (["--image-encoder", "resnet9000"], "--image-encoder must be a model of timm, or tiny, got 'resnet9000'"),
        (["--weights", "gone.pth"], "no file gone.pth: --weights must be imagenet"),
        (["--text-pooling", "max"], "text_pooling must be one of mean, first, pooler"),
        (["--device", "meta"], "'meta' cannot be used here"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(more, said, sample, tmp_path, capsys):
    assert features(sample("mvsa"), tmp_path / "mvsa.npz", "mvsa", *more) != 0
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "mvsa.npz").exists()


def test_a_damage_of_texts_needs_texts(sample, tmp_path, capsys):
    assert features(sample("nyud2"), tmp_path / "nyud2.npz", "nyud2", "--damage", "words:0.5") == 1
    assert "--damage words0.5: nyud2 has no texts, which it damages" in capsys.readouterr().err
    assert not (tmp_path / "nyud2.npz").exists()


@pytest.mark.skipif("QMF_DATA_ROOT" not in os.environ, reason="QMF_DATA_ROOT is not set: no real pairs to encode")
def test_sixty_real_pairs_of_each_split(tmp_path):
    data, root = Path(os.environ["QMF_DATA_ROOT"]) / "mvsa_single", tmp_path / "data"
    (root / "data").mkdir(parents=True)
    for split in ("train", "test"):
        lines = (data / f"{split}.jsonl").read_text().splitlines(True)[:60]
        (root / f"{split}.jsonl").write_text("".join(lines))
        for line in lines:
            image = json.loads(line)["img"]
            shutil.copy(data / image, root / image)
    assert features(root, tmp_path / "mvsa.npz", "mvsa", "--damage", "gaussian:50+words:0.5", "blur") == 0
    found = load_npz(tmp_path / "mvsa.npz")
    for name, copies in found.test.items():
        assert copies["clean"].shape == (60, 32)
        assert np.isfinite(copies["gaussian50+words0.5"]).all()
        # A text of words that the training texts do not have is the same without them.
        changed = (copies["gaussian50+words0.5"] != copies["clean"]).any(1)
        assert changed.mean() > (0.5 if name == "text" else 0.99)
