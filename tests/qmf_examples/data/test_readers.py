"""The readers on generated samples, and every fault they must tell with its file and line."""

import json
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from qmf_examples.data.catalogue import DATA_SETS
from qmf_examples.data.decoding import check_image, read_image
from qmf_examples.data.faults import DataError, Fault, file_inside, summary
from qmf_examples.data.paired_images import PairedImages, split_pair
from qmf_examples.data.stratified_split import stratified_split
from qmf_examples.data.text_images import TextImages
from qmf_examples.models.vocabulary import Vocabulary
from qmf_examples.prepare.sample import write_sample

SIZES = {"nyud2": 10, "sunrgbd": 19, "food101": 101, "mvsa": 3}


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read(name, root, split="train", **options):
    known = DATA_SETS[name]
    return (PairedImages if known.paired else TextImages)(known, root, split, **options)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("samples")
    for name, known in DATA_SETS.items():
        counts = {split: count for split, count in (("train", 2), ("dev", 1), ("test", 1)) if split in known.splits}
        write_sample(known, root / name, per_class=counts, image_size=24)
    return root


@pytest.mark.parametrize("name", DATA_SETS)
def test_each_set_has_its_classes_and_gives_every_sample_once(samples, name):
    train = read(name, samples / name)
    assert len(train.classes) == len(set(train.classes)) == SIZES[name]
    assert train.classes == sorted(DATA_SETS[name].classes)
    assert len(train) == 2 * SIZES[name]
    assert np.bincount(train.labels).tolist() == [2] * SIZES[name]
    assert train.faults == []
    assert [train[i]["index"] for i in range(len(train))] == list(range(len(train)))
    assert [train[i]["label"] for i in range(len(train))] == train.labels
    with pytest.raises(IndexError):
        train[len(train)]
    test = read(name, samples / name, "test")
    assert test.classes == train.classes
    assert len(test) == SIZES[name]


@pytest.mark.parametrize("name", DATA_SETS)
def test_batches_collate_and_the_reader_pickles(samples, name):
    known = DATA_SETS[name]
    options = (
        {"transform": _both_tensors}
        if known.paired
        else {"transform": tensor, "text_transform": lambda text: len(text)}
    )
    data = read(name, samples / name, **options)
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert batch["index"].tolist() == [0, 1, 2, 3]
    image = batch["depth" if known.paired else "image"]
    assert image.shape == (4, 3, 24, 24)
    assert image.dtype == torch.uint8
    plain = pickle.loads(pickle.dumps(read(name, samples / name)))
    assert plain[3]["label"] == data.labels[3]


def _both_tensors(rgb, depth):
    return tensor(rgb), tensor(depth)


def test_pair_halves_are_left_and_right_and_transforms_see_both(tmp_path):
    left = np.random.default_rng(0).integers(0, 256, (10, 8, 3), dtype=np.uint8)
    right = np.random.default_rng(1).integers(0, 256, (10, 8, 3), dtype=np.uint8)
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.concatenate([left, right], 1)).save(tmp_path / "train" / "a" / "x.png")
    calls = []

    def flip_both(rgb, depth):
        return rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT), depth.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def corrupt(image, index, modality):
        calls.append((index, modality, image.size))
        return Image.eval(image, lambda value: 255 - value) if modality == "depth" else image

    data = PairedImages(
        DATA_SETS["nyud2"], tmp_path, num_classes=0, transform=flip_both, corrupt=corrupt, finish=_both_tensors
    )
    sample = data[0]
    assert torch.equal(sample["rgb"], tensor(left[:, ::-1].copy()))
    assert torch.equal(sample["depth"], 255 - tensor(right[:, ::-1].copy()))
    assert calls == [(0, "rgb", (8, 10)), (0, "depth", (8, 10))]


def test_wide_halves_are_shrunk_as_in_the_released_code():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 800, 3), dtype=np.uint8))
    rgb, depth = split_pair(image)
    expected = image.crop((400, 0, 800, 300)).resize((256, 256), Image.Resampling.BICUBIC)
    assert rgb.size == depth.size == (256, 256)
    assert depth.tobytes() == expected.tobytes()
    assert split_pair(image.crop((0, 0, 448, 300)))[0].size == (224, 300)


def test_text_hooks_and_a_null_image(samples, tmp_path):
    rows = [{"id": "1", "label": "a", "text": "one two", "img": None}]
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]))
    data = TextImages(
        DATA_SETS["mvsa"],
        tmp_path,
        num_classes=0,
        corrupt_text=lambda text, index: f"{text} {index}",
        text_transform=str.upper,
        finish=tensor,
    )
    assert data[0]["text"] == "ONE TWO 0"
    assert data[0]["image"].shape == (3, 256, 256)
    assert (data[0]["image"] == 128).all()
    assert "image" not in TextImages(DATA_SETS["mvsa"], samples / "mvsa", images=False)[0]


def bomb():
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def _truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


IMAGE_FAULTS = {
    "truncated": (_truncate, "cannot be read: .*truncated|cannot be read"),
    "missing": (lambda path: path.unlink(), "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_bytes(b"not an image"), "not an image of PNG, JPEG"),
    "bomb": (lambda path: path.write_bytes(bomb()), "refused"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "not a file"),
}


@pytest.fixture
def mvsa(tmp_path):
    counts = {"train": 2, "dev": 1, "test": 1}
    write_sample(DATA_SETS["mvsa"], tmp_path / "mvsa", per_class=counts, image_size=32)
    return tmp_path / "mvsa"


def check_told(root, split, line, reason, rows):
    """The fault is fatal and names file and line; with ``skip_bad`` the rest is there, without gaps."""
    with pytest.raises(DataError, match=rf"1 of {rows} cannot be used\n{split}\.jsonl, line {line}: .*(?:{reason})"):
        read("mvsa", root, split)
    data = read("mvsa", root, split, skip_bad=True)
    assert len(data) == rows - 1
    assert [(fault.file, fault.line) for fault in data.faults] == [(f"{split}.jsonl", line)]
    assert [data[i]["index"] for i in range(len(data))] == list(range(rows - 1))


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_of_texts_are_told_by_line(mvsa, fault):
    damage, reason = IMAGE_FAULTS[fault]
    row = json.loads((mvsa / "train.jsonl").read_text().splitlines()[3])
    damage(mvsa / row["img"])
    check_told(mvsa, "train", 4, reason, 6)


def test_a_mark_of_byte_order_windows_lines_and_a_long_line(mvsa):
    file = mvsa / "train.jsonl"
    before = read("mvsa", mvsa, "train")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["text"] = "word " * 400_000
    file.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n" for row in rows).encode())
    after = read("mvsa", mvsa, "train")
    assert after.labels == before.labels
    assert [after[i]["text"] for i in (0, 2)] == [before[i]["text"] for i in (0, 2)]
    assert len(after[1]["text"]) == 2_000_000


def test_a_whole_pair_of_surrogates_is_a_character(mvsa):
    file = mvsa / "dev.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["text"] = "smile 😀"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "\\ud83d\\ude00" in file.read_text()
    assert read("mvsa", mvsa, "dev")[0]["text"] == "smile 😀"


def test_an_image_that_resizing_would_make_too_large_is_told(mvsa):
    """A shorter side of 1 pixel becomes 256, and the longer side 256 times as long."""
    path = mvsa / json.loads((mvsa / "dev.jsonl").read_text().splitlines()[0])["img"]
    for size in ((1, 60_000), (60_000, 1), (2, 8_000_000)):
        Image.new("1", size).save(path, format="PNG")
        assert path.stat().st_size < 20_000
        check_told(mvsa, "dev", 1, "refused: .* pixels would be resized by way of", 3)
    with pytest.raises(DataError, match=r"dev\.jsonl, line 1: refused"):
        read("mvsa", mvsa, "dev", check=False)[0]
    # 256 x 256 x 976 pixels are just below the bound.
    for length, usable in ((976, True), (977, False)):
        Image.new("1", (length, 1)).save(path, format="PNG")
        assert (len(read("mvsa", mvsa, "dev", skip_bad=True)) == 3) is usable
    Image.new("1", (900, 1)).save(path, format="PNG")
    assert len(read("mvsa", mvsa, "dev", resized=256)) == 3
    assert len(read("mvsa", mvsa, "dev", resized=300, skip_bad=True)) == 2


def test_a_pair_that_resizing_would_make_too_large_on_its_way_is_told(tmp_path):
    """The halves become 256 x 256 by way of 256 pixels in each of the old rows."""
    write_sample(DATA_SETS["nyud2"], tmp_path / "n", per_class={"train": 1, "test": 1}, image_size=16)
    path = tmp_path / "n" / "test" / "office" / "office_0000.png"
    for size, usable in (((2, 250_000), True), ((2, 250_001), False), ((2, 8_000_000), False), ((8_000_000, 2), True)):
        Image.new("1", size).save(path)
        data = read("nyud2", tmp_path / "n", "test", skip_bad=True)
        assert len(data) == 9 + usable, size
        assert [fault.reason.split(":")[0] for fault in data.faults] == ([] if usable else ["refused"])
    assert len(read("nyud2", tmp_path / "n", "test", resized=8001, skip_bad=True, num_classes=0, check=False)) == 10
    Image.new("1", (2, 250_001)).save(path)
    data = read("nyud2", tmp_path / "n", "test", check=False)
    with pytest.raises(DataError, match=r"office_0000\.png: refused: 1 x 250001 pixels"):
        data[data.labels.index(data.classes.index("office"))]


LINE_FAULTS = {
    "json": ("{'id': 1}", "not JSON"),
    "half a line": ('{"id": "1", "label": "pos', "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "utf-8": (b'{"id": "\xff"}', "not UTF-8"),
    "list": ("[1, 2]", "must be an object"),
    "no text": ('{"id": "1", "label": "positive", "img": "x.jpg"}', "'text' must be text"),
    "text of numbers": ('{"id": "1", "label": "positive", "text": 3, "img": "x.jpg"}', "'text' must be text, got 3"),
    "no img": ('{"id": "1", "label": "positive", "text": "a"}', "'img' is missing"),
    "img of numbers": ('{"id": "1", "label": "positive", "text": "a", "img": 7}', "'img' must be a path or null"),
    "label": ('{"id": "1", "label": "angry", "text": "a", "img": null}', "unknown label 'angry'"),
    "climbs": ('{"id": "1", "label": "positive", "text": "a", "img": "../secret.jpg"}', "leads out of"),
    "climbs back": ('{"id": "1", "label": "positive", "text": "a", "img": "data/../../x.jpg"}', "leads out of"),
    "absolute": ('{"id": "1", "label": "positive", "text": "a", "img": "/etc/hostname"}', "must be relative"),
    "drive": ('{"id": "1", "label": "positive", "text": "a", "img": "C:\\\\x.jpg"}', "must be relative"),
    "nul": ('{"id": "1", "label": "positive", "text": "a", "img": "a\\u0000.jpg"}', "must be relative"),
    "half a surrogate in the text": (
        '{"id": "1", "label": "positive", "text": "smile \\ud83d", "img": null}',
        r"'text' has half of a pair of surrogates, \\ud83d, which is no character",
    ),
    "half a surrogate in the image": (
        '{"id": "1", "label": "positive", "text": "a", "img": "\\udcff.jpg"}',
        "'img' has half of a pair",
    ),
    "half a surrogate in the label": (
        '{"id": "1", "label": "\\ude00", "text": "a", "img": null}',
        "'label' has half of a pair",
    ),
    "half a surrogate in the id": (
        '{"id": "\\ud83d!", "label": "positive", "text": "a", "img": null}',
        "'id' has half of a pair",
    ),
    "long": (
        json.dumps({"id": "1", "label": "positive", "text": "a", "img": "x" * 5000}),
        "cannot look up|no such file",
    ),
}


@pytest.mark.parametrize("fault", LINE_FAULTS)
def test_bad_lines_are_told_by_line(mvsa, fault):
    line, reason = LINE_FAULTS[fault]
    lines = (mvsa / "dev.jsonl").read_bytes().splitlines()
    lines[1:1] = [line if isinstance(line, bytes) else line.encode()]
    (mvsa / "dev.jsonl").write_bytes(b"\n".join(lines))
    check_told(mvsa, "dev", 2, reason, 4)


def test_links_out_of_the_folder_are_refused_and_inside_followed(mvsa, tmp_path):
    row = json.loads((mvsa / "dev.jsonl").read_text().splitlines()[0])
    outside = tmp_path / "outside.jpg"
    (mvsa / row["img"]).rename(outside)
    os.symlink(outside, mvsa / row["img"])
    check_told(mvsa, "dev", 1, "the path leads out of the data folder by a link", 3)
    (mvsa / row["img"]).unlink()
    outside.rename(mvsa / "data" / "moved.jpg")
    os.symlink("moved.jpg", mvsa / row["img"])
    assert len(read("mvsa", mvsa, "dev")) == 3
    (tmp_path / "alias").symlink_to(mvsa, target_is_directory=True)
    assert len(read("mvsa", tmp_path / "alias", "dev")) == 3


@pytest.mark.parametrize("fault", sorted(IMAGE_FAULTS.keys() - {"missing", "folder"}))
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pairs_are_told_by_file(tmp_path, fault):
    write_sample(DATA_SETS["nyud2"], tmp_path / "n", per_class={"train": 2, "test": 1}, image_size=16)
    damage, reason = IMAGE_FAULTS[fault]
    damage(tmp_path / "n" / "train" / "kitchen" / "kitchen_0001.png")
    with pytest.raises(DataError, match=rf"1 of 20 cannot be used\ntrain/kitchen/kitchen_0001\.png: .*(?:{reason})"):
        read("nyud2", tmp_path / "n")
    assert len(read("nyud2", tmp_path / "n", skip_bad=True)) == 19


def test_pairs_of_odd_width_unknown_class_or_linked_out_are_told(tmp_path):
    root = tmp_path / "n"
    write_sample(DATA_SETS["nyud2"], root, per_class={"train": 1, "test": 1}, image_size=16)
    Image.new("RGB", (33, 16)).save(root / "test" / "kitchen" / "odd.png")
    (root / "test" / "cellar").mkdir()
    os.symlink("/etc/hostname", root / "test" / "office" / "z.png")
    data = read("nyud2", root, "test", skip_bad=True)
    assert len(data) == 10
    assert sorted(str(fault).split(":")[0] for fault in data.faults) == [
        "test/cellar",
        "test/kitchen/odd.png",
        "test/office/z.png",
    ]
    assert "unknown class 'cellar'" in summary(data.faults)
    assert "33 pixels wide" in summary(data.faults)
    assert "by a link" in summary(data.faults)


def test_without_the_check_a_bad_image_is_named_when_its_turn_comes(mvsa):
    row = json.loads((mvsa / "train.jsonl").read_text().splitlines()[2])
    (mvsa / row["img"]).write_bytes(b"broken")
    data = read("mvsa", mvsa, check=False)
    assert len(data) == 6
    with pytest.raises(DataError, match=r"train\.jsonl, line 3: not an image"):
        data[2]


def test_a_wrong_number_of_classes_or_no_data_says_what_to_do(samples, tmp_path):
    with pytest.raises(DataError, match="SUN RGB-D has 19 classes, found 10"):
        PairedImages(DATA_SETS["sunrgbd"], samples / "nyud2")
    with pytest.raises(DataError, match="UPMC FOOD-101 has 101 classes, found 3"):
        TextImages(DATA_SETS["food101"], samples / "mvsa")
    for name in DATA_SETS:
        with pytest.raises(DataError, match=rf"no f.*To get it: download.*qmf-fusion sample {name} DIR"):
            read(name, tmp_path / "nowhere")


def test_all_faults_are_counted_and_a_few_named(mvsa):
    for path in (mvsa / "data").glob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError) as caught:
        read("mvsa", mvsa, skip_bad=True)
    assert str(caught.value).count("no such file") == 5
    assert str(caught.value).endswith("... and 1 more")
    assert len(caught.value.faults) == 6


def test_jpegs_truncated_anywhere_are_found_by_the_quick_check(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    assert check_image(path) == (128, 96)
    assert read_image(path).size == (128, 96)
    for keep in (2, 100, len(whole) // 3, len(whole) - 200):
        path.write_bytes(whole[:keep])
        for opened in (check_image, read_image):
            with pytest.raises(DataError, match=r"cannot be read|not an image"):
                opened(path)


def test_a_link_to_a_folder_is_not_followed_out(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "real", outside / "deep"):
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(b"x")
    (root / "linked").symlink_to(outside, target_is_directory=True)
    (root / "inside").symlink_to("real", target_is_directory=True)
    assert file_inside(root, "inside/x.png").read_bytes() == b"x"
    for name in ("linked/deep/x.png", "./linked/deep/x.png", "real/../linked/deep/x.png"):
        with pytest.raises(DataError, match="leads out of the data folder"):
            file_inside(root, name)


def test_the_bound_is_64_million_pixels(tmp_path):
    Image.new("1", (8000, 8000)).save(tmp_path / "a.png")
    Image.new("1", (8000, 8001)).save(tmp_path / "b.png")
    assert check_image(tmp_path / "a.png") == read_image(tmp_path / "a.png").size == (8000, 8000)
    for opened in (check_image, read_image):
        with pytest.raises(DataError, match=r"refused: b\.png has 8000 x 8001 pixels, more than 64,000,000"):
            opened(tmp_path / "b.png")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="not a file"):
        file_inside(tmp_path, "pipe.jpg")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match=r"cannot look up|no such file"):
        file_inside(tmp_path, "loop")
    assert str(Fault("a", "b")) == "a: b"


def test_stratified_split_keeps_every_share_and_every_sample():
    labels = [0] * 50 + [1] * 10 + [2] * 5
    parts = stratified_split(labels, (0.6, 0.2, 0.2), seed=1)
    assert sorted(i for part in parts for i in part) == list(range(65))
    assert [[labels[i] for i in part].count(0) for part in parts] == [30, 10, 10]
    assert [[labels[i] for i in part].count(2) for part in parts] == [3, 1, 1]
    assert parts == stratified_split(labels, (0.6, 0.2, 0.2), seed=1) != stratified_split(labels, (0.6, 0.2, 0.2))
    with pytest.raises(ValueError, match="add up to 1"):
        stratified_split(labels, (0.5, 0.6))


def test_vocabulary_is_the_same_whatever_the_order_of_the_texts():
    texts = ["b a a", "c b a", "d"]
    forward, backward = Vocabulary(texts), Vocabulary(reversed(texts))
    assert forward.words == backward.words == ("[PAD]", "[UNK]", "a", "b", "c", "d")
    assert forward.encode("a x d") == [2, 1, 5]
    assert forward.decode([2, 5]) == "a d"
    assert Vocabulary(texts, min_count=2).words == ("[PAD]", "[UNK]", "a", "b")
    assert len(Vocabulary(texts, max_size=3)) == 3
