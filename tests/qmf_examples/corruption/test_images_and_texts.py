"""The released protocol against the scripts' own steps on global generators, and what the clean one promises."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from qmf_examples.corruption.conditions import PROTOCOLS
from qmf_examples.corruption.images import ImageCorruption, wrapped
from qmf_examples.corruption.released_streams import ReleasedStreams
from qmf_examples.corruption.texts import TextCorruption

SEED = 3


def picture(seed=0, size=(20, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def set_seed(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def script_gaussian(pixels, sigma):
    """What the released evaluation does to an image, with the global generators."""
    if torch.rand(1).item() > 0.5:
        return pixels
    np.random.seed(0)
    noisy = np.repeat(np.random.normal(0.0, sigma, (*pixels.shape[:2], 1)), 3, axis=2) + pixels
    noisy[noisy > 255] = 255
    return (np.trunc(noisy).astype(np.int64) & 255).astype(np.uint8)


def script_salt_pepper(pixels, probability):
    if torch.rand(1).item() > 0.5 or not random.uniform(0, 1) < probability:
        return pixels
    mask = np.random.choice((0, 1, 2), size=(*pixels.shape[:2], 1), p=[0.05, 0.05, 0.9])
    out = pixels.copy()
    out[np.repeat(mask, 3, axis=2) == 0] = 0
    out[np.repeat(mask, 3, axis=2) == 1] = 255
    return out


def script_text(text, level):
    if not np.random.choice([0, 1], p=[0.5, 0.5]):
        return text
    words = text.split(" ")
    for i in range(len(words)):
        if np.random.choice([0, 1], p=[1 - 0.1 * level, 0.1 * level]):
            words[i] = "_"
    return " ".join(words)


@pytest.mark.parametrize(("data_set", "sigma"), [("nyud2", 10), ("sunrgbd", 10), ("food101", 100), ("mvsa", 100)])
def test_released_gaussian_repeats_the_script(data_set, sigma):
    set_seed(SEED)
    expected = [script_gaussian(np.asarray(picture(i)), sigma) for i in range(12)]
    corrupt = ImageCorruption("gaussian", 10, data_set, protocol="released", seed=SEED)
    got = [np.asarray(corrupt(picture(i), i, "rgb")) for i in range(12)]
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    changed = [not np.array_equal(a, np.asarray(picture(i))) for i, a in enumerate(got)]
    assert 0 < sum(changed) < 12


def test_released_faults_are_there():
    corrupt = ImageCorruption("gaussian", 10, "mvsa", protocol="released", seed=0)
    dark = Image.new("RGB", (40, 40), (2, 2, 2))
    results = [np.asarray(corrupt(dark, i, "image")) for i in range(20)]
    changed = [r for r in results if r.max() > 2]
    assert max(r.max() for r in changed) > 200  # a negative value came round from above
    assert all(np.array_equal(r, changed[0]) for r in changed)  # every image has the same noise


@pytest.mark.parametrize(
    ("protocol", "level", "probability"),
    [("released-2023", 5, 0.5), ("released", 10, 1.0), ("released-2025", 10, 0.1), ("released-2025", 60, 0.6)],
)
def test_released_salt_and_pepper_repeats_the_script(protocol, level, probability):
    set_seed(SEED)
    expected = [script_salt_pepper(np.asarray(picture(i)), probability) for i in range(60)]
    corrupt = ImageCorruption("salt-pepper", level, "food101", protocol=protocol, seed=SEED)
    got = [np.asarray(corrupt(picture(i), i, "image")) for i in range(60)]
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    assert any(not np.array_equal(a, np.asarray(picture(i))) for i, a in enumerate(got))


def test_released_text_shares_the_generator_that_the_image_noise_seeds():
    texts = [f"word{i} and some more of them here" for i in range(20)]
    set_seed(SEED)
    expected = []
    for i, text in enumerate(texts):
        expected.append(script_text(text, 5))
        script_gaussian(np.asarray(picture(i)), 50)
    streams = ReleasedStreams(SEED)
    blank = TextCorruption(5, protocol="released", streams=streams)
    noise = ImageCorruption("gaussian", 5, "mvsa", protocol="released", streams=streams)
    got = []
    for i, text in enumerate(texts):
        got.append(blank(text, i))
        noise(picture(i), i, "image")
    assert got == expected
    assert 0 < sum("_" in text for text in got) < 20


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["gaussian", "salt-pepper"])
def test_global_generators_are_left_alone(kind, protocol):
    set_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    corrupt = ImageCorruption(kind, 10, "nyud2", protocol=protocol)
    blank = TextCorruption(10, protocol=protocol)
    for i in range(6):
        corrupt(picture(i), i, "rgb")
        blank("a few words", i)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("kind", ["gaussian", "salt-pepper"])
def test_clean_damage_depends_on_the_sample_alone(kind):
    one = ImageCorruption(kind, 10, "mvsa", seed=5)
    other = ImageCorruption(kind, 10, "mvsa", seed=5)
    forward = [one(picture(), i, "image").tobytes() for i in range(10)]
    backward = [other(picture(), i, "image").tobytes() for i in reversed(range(10))][::-1]
    assert forward == backward
    assert len(set(forward)) > 3  # not the same noise everywhere
    assert forward != [ImageCorruption(kind, 10, "mvsa", seed=6)(picture(), i, "image").tobytes() for i in range(10)]


def test_clean_damage_hits_half_the_images_the_same_at_every_level_and_modalities_apart():
    def hit(level, kind, modality):
        corrupt = ImageCorruption(kind, level, "mvsa")
        grey = Image.new("RGB", (8, 8), (128, 128, 128))
        return [corrupt(grey, i, modality).tobytes() != grey.tobytes() for i in range(400)]

    assert hit(5, "gaussian", "rgb") == hit(10, "gaussian", "rgb") == hit(99, "salt-pepper", "rgb")
    assert 160 < sum(hit(5, "gaussian", "rgb")) < 240
    both = [a and b for a, b in zip(hit(5, "gaussian", "rgb"), hit(5, "gaussian", "depth"), strict=True)]
    assert 65 < sum(both) < 135


def test_clean_gaussian_has_its_deviation_and_clips():
    corrupt = ImageCorruption("gaussian", 2, "mvsa")
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    changed = [x for i in range(8) if (x := np.asarray(corrupt(grey, i, "image")).astype(float)).std() > 0]
    assert np.std(changed[0]) == pytest.approx(20, rel=0.03)
    assert np.array_equal(changed[0][..., 0], changed[0][..., 2])  # one noise for all channels, as published
    dark = Image.new("RGB", (50, 50), (3, 3, 3))
    strong = ImageCorruption("gaussian", 5, "mvsa")
    values = np.concatenate([np.asarray(strong(dark, i, "image")).ravel() for i in range(8)])
    assert values.max() < 3 + 6 * 50
    assert (values == 0).mean() > 0.15


def test_clean_salt_and_pepper_replaces_epsilon_percent():
    corrupt = ImageCorruption("salt-pepper", 10, "nyud2")
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    changed = [x for i in range(8) if (x := np.asarray(corrupt(grey, i, "rgb"))).std() > 0]
    for pixels in changed:
        assert set(np.unique(pixels)) == {0, 128, 255}
        assert (pixels != 128).mean() == pytest.approx(0.1, abs=0.01)
        assert (pixels == 0).mean() == pytest.approx(0.05, abs=0.01)


def test_clean_text_blanks_its_share_of_words_in_half_of_the_texts_and_more_at_a_higher_level():
    text = " ".join(f"w{i}" for i in range(100))
    low = [TextCorruption(3)(text, i).split(" ") for i in range(200)]
    high = [TextCorruption(8)(text, i).split(" ") for i in range(200)]
    hit = [words for words in low if "_" in words]
    assert 75 < len(hit) < 125
    assert np.mean([word == "_" for words in hit for word in words]) == pytest.approx(0.3, abs=0.02)
    for a, b in zip(low, high, strict=True):
        assert {i for i, w in enumerate(a) if w == "_"} <= {i for i, w in enumerate(b) if w == "_"}
        assert len(a) == len(b) == 100


def test_level_zero_changes_nothing_in_either_protocol():
    for protocol in PROTOCOLS:
        image = picture()
        assert ImageCorruption("gaussian", 0, "nyud2", protocol=protocol)(image, 0, "rgb") is image
        assert TextCorruption(0, protocol=protocol)("some words", 0) == "some words"


def test_wrapping_is_modulo_256_after_truncation():
    values = np.array([-300.2, -256.0, -1.5, -0.5, 0.0, 254.9, 255.0, 1000.0])
    assert wrapped(values).tolist() == [212, 0, 255, 0, 0, 254, 255, 255]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageCorruption("blur", 5, "mvsa"), "kind must be one of"),
        (lambda: ImageCorruption("gaussian", 5, "cifar"), "data_set must be one of"),
        (lambda: ImageCorruption("gaussian", -1, "mvsa"), "level must be"),
        (lambda: ImageCorruption("gaussian", float("nan"), "mvsa"), "level must be"),
        (lambda: ImageCorruption("salt-pepper", 101, "mvsa"), "at most 100"),
        (lambda: ImageCorruption("gaussian", 5, "mvsa", protocol="old"), "protocol must be one of"),
        (lambda: TextCorruption(11), "from 0 to 10"),
        (lambda: TextCorruption(1, protocol="old"), "protocol must be one of"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
