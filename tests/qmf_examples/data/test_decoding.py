"""Odd image files: what becomes of each is the same in both readers and in what ``inspect`` counts."""

import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from qmf_examples.data.catalogue import DATA_SETS
from qmf_examples.data.decoding import check_image, read_image
from qmf_examples.data.faults import DataError
from qmf_examples.data.inspection import inspect_data
from qmf_examples.data.paired_images import PairedImages
from qmf_examples.data.text_images import TextImages
from qmf_examples.prepare.sample import write_sample

GREY = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
"""A small picture, all of its pixels different, of 20 x 12."""
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
HALF_SEEN = np.where(GREY % 3 > 0, 255, 0).astype(np.uint8)
WHITE_BELOW = np.where(HALF_SEEN[..., None] > 0, COLOUR, 255)
DEEP = GREY.astype(np.uint16) * 256 + 200  # as 8 bits cut off: 255 everywhere but for one pixel


def three(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def palette():
    """Colours by number, one of them transparent."""
    image = Image.fromarray(GREY % 4)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.info["transparency"] = 3
    return image


COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], np.uint8)
EXACT = {
    "grey": (lambda: Image.fromarray(GREY), {}, three(GREY)),
    "black and white": (lambda: Image.fromarray(GREY > 100), {}, three(255 * (GREY > 100).astype(np.uint8))),
    "16-bit grey": (lambda: Image.fromarray(DEEP), {}, three(GREY)),
    "palette with transparency": (palette, {}, COLOURS[GREY % 4]),
    "alpha": (lambda: Image.fromarray(np.dstack([COLOUR, HALF_SEEN])), {}, WHITE_BELOW),
    "grey with alpha": (
        lambda: Image.fromarray(np.dstack([GREY, HALF_SEEN])),
        {},
        np.where(HALF_SEEN[..., None] > 0, three(GREY), 255),
    ),
    "a transparent colour": (
        lambda: Image.fromarray(COLOUR),
        {"transparency": tuple(COLOUR[3, 4].tolist())},
        np.where(np.equal(COLOUR, COLOUR[3, 4]).all(-1, keepdims=True), 255, COLOUR),
    ),
    "an animated PNG": (
        lambda: Image.fromarray(COLOUR),
        {"save_all": True, "append_images": [Image.fromarray(255 - COLOUR)]},
        COLOUR,
    ),
    "an animated GIF": (
        lambda: Image.fromarray(GREY),
        {"format": "GIF", "save_all": True, "append_images": [Image.fromarray(255 - GREY)]},
        three(GREY),
    ),
    "an animated WEBP": (
        lambda: Image.fromarray(COLOUR),
        {"format": "WEBP", "lossless": True, "save_all": True, "append_images": [Image.fromarray(255 - COLOUR)]},
        COLOUR,
    ),
}


def write(kind, path):
    """The file, and the pixels that must come of it."""
    make, options, expected = EXACT[kind]
    make().save(path, **{"format": "PNG", **options})
    return expected


@pytest.mark.parametrize("kind", EXACT)
def test_odd_files_become_these_pixels(tmp_path, kind):
    expected = write(kind, tmp_path / "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of conversions that lose something
        image = read_image(tmp_path / "x")
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), expected)
    assert check_image(tmp_path / "x") == image.size == (20, 12)


def test_16_bits_are_the_same_in_grey_and_in_colour(tmp_path):
    """Pillow reads colours of 16 bits, and cannot write them: a PNG by hand."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in DEEP)
    header = struct.pack(">IIBBBBB", 20, 12, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "x").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert np.array_equal(np.asarray(read_image(tmp_path / "x")), three(GREY))


def test_cmyk_is_converted(tmp_path):
    inks = Image.new("CMYK", (64, 48), (255, 0, 0, 0))
    inks.paste((0, 0, 0, 255), (32, 0, 64, 48))
    inks.save(tmp_path / "x", format="JPEG", quality=100)
    image = read_image(tmp_path / "x")
    assert image.mode == "RGB"
    assert np.allclose(image.getpixel((8, 20)), (0, 255, 255), atol=8)  # cyan
    assert np.allclose(image.getpixel((60, 20)), 0, atol=8)
    assert check_image(tmp_path / "x") == (64, 48)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_upright(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Blocks of 16 pixels, so that a turn is told from JPEG's losses.
    picture = Image.fromarray(COLOUR[:3, :5].repeat(16, 0).repeat(16, 1))
    picture.save(tmp_path / "x", format=kind, exif=exif)
    image = read_image(tmp_path / "x")
    assert np.array_equal(np.asarray(image), np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x"))))
    assert check_image(tmp_path / "x") == image.size == ((48, 80) if orientation >= 5 else (80, 48))


@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"x"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_fault(tmp_path, exif):
    Image.fromarray(COLOUR).save(tmp_path / "x", format="JPEG", exif=exif)
    assert read_image(tmp_path / "x").size == check_image(tmp_path / "x") == (20, 12)


def test_an_orientation_that_does_not_exist_is_none(tmp_path):
    for stated in (0, 9):
        exif = Image.Exif()
        exif[0x0112] = stated
        Image.fromarray(COLOUR).save(tmp_path / "x", format="PNG", exif=exif)
        assert np.array_equal(np.asarray(read_image(tmp_path / "x")), COLOUR)
        assert check_image(tmp_path / "x") == (20, 12)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_truncated_files_are_faults_in_both_reads(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x", format=kind)
    whole = (tmp_path / "x").read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / "x").write_bytes(whole[: int(share * len(whole))])
        for read in (read_image, check_image):
            with pytest.raises(DataError, match=r"cannot be read: x|not an image of .*: x"):
                read(tmp_path / "x")


def test_an_animation_needs_its_first_frame_alone(tmp_path):
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 80), dtype=np.uint8)) for i in range(3)]
    frames[0].save(tmp_path / "x", format="GIF", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[: 2 * len(whole) // 3])
    assert np.array_equal(np.asarray(read_image(tmp_path / "x")), three(np.asarray(frames[0])))
    assert check_image(tmp_path / "x") == (80, 60)


def test_training_and_inspection_see_odd_files_alike(tmp_path):
    """Every kind as an image of texts and as a pair; a file lying on its side counts as it stands."""
    texts, pairs = tmp_path / "m", tmp_path / "n"
    write_sample(DATA_SETS["mvsa"], texts, per_class={"train": 4, "dev": 1, "test": 1}, image_size=16)
    write_sample(DATA_SETS["nyud2"], pairs, per_class={"train": 1, "test": 2}, image_size=16)
    images = [texts / json.loads(line)["img"] for line in (texts / "train.jsonl").read_text().splitlines()]
    halves = sorted(pairs.glob("test/*/*.png"))
    side = Image.Exif()
    side[0x0112] = 6
    for kind, image, pair in zip(EXACT, images, halves, strict=False):
        write(kind, image)
        write(kind, pair)
    for path in (images[11], halves[11]):
        Image.fromarray(COLOUR).save(path, format="PNG", exif=side)
    train = TextImages(DATA_SETS["mvsa"], texts)
    for i, kind in enumerate(EXACT):
        assert np.array_equal(np.asarray(train[i]["image"]), EXACT[kind][2])
    assert train[11]["image"].size == train.sizes[11] == (12, 20)
    test = PairedImages(DATA_SETS["nyud2"], pairs, "test")
    for i, kind in enumerate(EXACT):
        both = np.concatenate([np.asarray(test[i]["rgb"]), np.asarray(test[i]["depth"])], axis=1)
        assert np.array_equal(both, EXACT[kind][2])
    assert test.sizes[11] == (12, 20)
    for known, root, split in ((DATA_SETS["mvsa"], texts, 0), (DATA_SETS["nyud2"], pairs, 1)):
        report = inspect_data(known, root)
        assert report.can_train(skip_bad=False)
        assert report.splits[split].heights[::2] == (12, 20)
