"""The real texts and frames under QMF_DATA_ROOT."""

import collections
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qmf_examples.corruption.texts import TextCorruption
from qmf_examples.data.catalogue import DATA_SETS
from qmf_examples.data.paired_images import PairedImages
from qmf_examples.data.text_images import TextImages
from qmf_examples.models.vocabulary import Vocabulary
from qmf_examples.prepare.frames import prepare_frames
from qmf_examples.prepare.hha import fill_nearest, gravity_direction, surface_normals
from qmf_examples.prepare.mvsa import check_splits, prepare_mvsa, read_labels, read_splits
from qmf_examples.prepare.sunrgbd import convert_frame, decode_depth, plan_sunrgbd, read_matrix, sunrgbd_converter

ROOT = Path(os.environ.get("QMF_DATA_ROOT", ""))
pytestmark = pytest.mark.skipif("QMF_DATA_ROOT" not in os.environ, reason="QMF_DATA_ROOT is not set: no real data")


def test_mvsa_texts_read_whole():
    sizes = {}
    for split in ("train", "dev", "test"):
        data = TextImages(DATA_SETS["mvsa"], ROOT / "mvsa_single", split, images=False)
        sizes[split] = len(data)
        assert data.classes == ["negative", "neutral", "positive"]
    assert sizes == {"train": 1555, "dev": 518, "test": 519}
    train = TextImages(DATA_SETS["mvsa"], ROOT / "mvsa_single", images=False)
    assert np.bincount(train.labels).tolist() == [422, 282, 851]
    assert len(Vocabulary(row.text for row in train.rows)) > 5000
    blank = TextCorruption(5)
    share = [blank(row.text, i).split(" ").count("_") / len(row.text.split(" ")) for i, row in enumerate(train.rows)]
    assert np.mean(share) == pytest.approx(0.25, abs=0.02)


def test_mvsa_published_labels_are_those_of_the_label_file_and_its_splits_the_pairs_that_agree(tmp_path):
    labels, faults = read_labels(ROOT / "mvsa_single" / "labelResultAll.txt")
    assert (len(labels), faults) == (4869, [])
    splits = read_splits(ROOT / "mvsa_single")
    agree, polarity = (check_splits(splits, labels, rule) for rule in ("agree", "polarity"))
    assert (agree.rows, agree.same, agree.left_out) == (2592, 2592, 0)
    assert (polarity.rows, polarity.same, polarity.left_out) == (2592, 2592, 4511 - 2592)
    prepare_mvsa(ROOT / "mvsa_single", tmp_path, splits=ROOT / "mvsa_single")
    for split in ("train", "dev", "test"):
        file = f"{split}.jsonl"
        assert (tmp_path / file).read_bytes() == (ROOT / "mvsa_single" / file).read_bytes()


def test_food101_texts_read_whole(tmp_path):
    shutil.copy(ROOT / "food101" / "dev.jsonl", tmp_path / "train.jsonl")
    shutil.copy(ROOT / "food101" / "test_hard_gt.jsonl", tmp_path / "test.jsonl")
    train = TextImages(DATA_SETS["food101"], tmp_path, images=False)
    test = TextImages(DATA_SETS["food101"], tmp_path, "test", images=False)
    assert (len(train), len(test)) == (5000, 4999)
    assert tuple(train.classes) == DATA_SETS["food101"].classes
    assert min(collections.Counter(train.labels).values()) == 44


FRAMES = ("2014-12-18_11-31-54_260595134347", "img_0063")


@pytest.mark.parametrize("name", FRAMES)
def test_gravity_of_the_real_frames_is_the_release_s(name):
    folder = ROOT / "sunrgbd_raw" / name
    depth = decode_depth(np.asarray(Image.open(next((folder / "depth_bfx").glob("*.png")))))
    assert 0.5 < depth.min() < np.median(depth) < depth.max() < 4  # an office, in metres
    known = depth > 0
    normals = surface_normals(fill_nearest(depth, known), read_matrix(folder / "intrinsics.txt", 3), 10, known)
    release = read_matrix(next((folder / "extrinsics").iterdir()), 3)[1]
    assert np.degrees(np.arccos(gravity_direction(normals) @ release)) < 3


def test_hha_of_a_real_office_sees_its_floor():
    rgb, encoded = convert_frame(ROOT / "sunrgbd_raw", "hha", "estimate", FRAMES[0])
    assert rgb.shape == encoded.shape == (530, 730, 3)
    carpet = encoded[380:480, 300:550].astype(float)
    assert np.median(carpet[..., 1]) < 10  # centimetres above ground
    assert np.median(carpet[..., 2]) == pytest.approx(38, abs=10)  # along gravity, but for the noise of its normals
    cupboard = encoded[30:100, 490:560].astype(float)
    assert 110 < np.median(cupboard[..., 1]) < 180
    assert np.median(cupboard[..., 2]) == pytest.approx(128, abs=6)  # across it


def test_the_real_frames_go_into_the_layout(tmp_path):
    raw = ROOT / "sunrgbd_raw"
    plan = plan_sunrgbd(raw)
    assert not plan.published
    outcome = prepare_frames(plan.frames, sunrgbd_converter(raw, "hha", "estimate"), tmp_path, {}, workers=1)
    assert (outcome.written, outcome.faults) == (2, [])
    data = PairedImages(DATA_SETS["sunrgbd"], tmp_path, num_classes=0)
    assert data.classes == ["office"]
    assert data[0]["rgb"].size == data[0]["depth"].size == (256, 256)
