"""What is kept of images is what decoding gives, whatever happens to the file, the disk and other processes."""

import errno
import os
import pickle
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from qmf_examples.cli import main
from qmf_examples.data import image_cache
from qmf_examples.data.faults import DataError
from qmf_examples.data.image_cache import ImageCache
from qmf_examples.files import held
from qmf_examples.training import paired_batches, text_batches
from qmf_examples.training.lightning_module import Batches
from qmf_examples.training.run import loader_of
from qmf_examples.training.settings import QUICK, resolve


@pytest.fixture
def cache(tmp_path):
    """A cache with what it said."""
    said = []
    made = ImageCache(tmp_path / "cache", said.append)
    return SimpleNamespace(folder=made.folder, said=said, keep=made.keep)


@pytest.fixture
def data(tmp_path):
    """A folder of three images of different shapes, and one file that is none."""
    root = tmp_path / "data"
    root.mkdir()
    for number, size in enumerate([(5, 3), (4, 6), (7, 7)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    (root / "bad.png").write_bytes(b"nothing")
    return root


NAMES = ["0.png", "1.png", "2.png", "bad.png"]


def decoder(root, calls=None):
    def decode(name):
        if calls is not None:
            calls.append(name)
        if name == "bad.png":
            raise DataError("not an image")
        image = Image.open(root / name).convert("RGB")
        return image.size, [image, image.rotate(90, expand=True)]

    return decode


def keep(cache, data, calls=None, how="as it is"):
    return cache.keep(data, NAMES, how, decoder(data, calls))


def equal_to_decoded(kept, data):
    for name in NAMES[:3]:
        size, images = decoder(data)(name)
        assert kept.results[name] == size
        for pixels, image in zip(kept.get(name), images, strict=True):
            assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert kept.of(["bad.png", "1.png"]) == ["not an image", (4, 6)]
    assert kept.get("bad.png") is None
    assert kept.get("another.png") is None
    return True


def test_images_are_decoded_once_and_kept_as_they_are(cache, data):
    calls = []
    assert equal_to_decoded(keep(cache, data, calls), data)
    assert sorted(calls) == NAMES
    image_cache._verified.clear()  # as another process finds it
    kept = keep(cache, data, calls)
    assert equal_to_decoded(kept, data)
    assert len(calls) == 4
    sent = pickle.dumps(kept)  # to a loader's process that is not forked
    assert len(sent) < 2000
    assert equal_to_decoded(pickle.loads(sent), data)
    assert cache.said == [f"keeping 4 images, decoded and resized, in {cache.folder} (--cache off keeps none)"]


def test_what_images_come_from_makes_another_file(cache, data, monkeypatch):
    keep(cache, data)
    status = (data / "0.png").stat()
    shutil.copy(data / "1.png", data / "other.png")
    pixels = np.zeros((3, 5, 3), np.uint8)
    Image.fromarray(pixels).save(data / "0.png")
    os.utime(data / "0.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert equal_to_decoded(keep(cache, data), data)
    os.truncate(data / "bad.png", 3)
    keep(cache, data)
    keep(cache, data, how="otherwise")
    monkeypatch.setattr(PIL, "__version__", "0")
    keep(cache, data)
    shutil.copytree(data, data.parent / "copy")
    keep(cache, data.parent / "copy")
    assert len(list(cache.folder.glob("*.images"))) == len(cache.said) == 6


def test_what_the_system_refuses_for_now_is_not_kept_as_a_fault(cache, sample, monkeypatch):
    plain, refused = Path.open, [True]

    def opened(path, *arguments, **options):
        if refused and path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    settings = resolve("nyud2", QUICK, {"data_root": str(sample("nyud2")), "cache": str(cache.folder)})
    name = next((sample("nyud2") / "test").glob("*/*.png")).name
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with pytest.raises(DataError, match="Permission denied"):
            paired_batches.load_test(settings)
    images = paired_batches.load_test(settings)
    assert not images.faults
    assert images.kept is not None


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "alien"])
def test_a_damaged_file_is_made_anew(cache, data, damage):
    path = keep(cache, data).path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"bit": content, "short": content[:-9], "empty": b"", "alien": b"PK" + bytes(999)}[damage])
    # What tells that a file has changed may be as coarse as a clock's tick.
    image_cache._verified.clear()
    assert equal_to_decoded(keep(cache, data), data)
    assert f"{path} is damaged, and made anew" in cache.said
    assert len(list(cache.folder.glob("*.images"))) == 1


def test_a_killed_process_leaves_nothing_that_is_read_or_stays(cache, data):
    path = keep(cache, data).path
    whole = path.read_bytes()
    path.unlink()
    old, fresh = (path.with_name(f"{path.name}.{n}-0.part") for n in (1, 2))
    for part in (old, fresh):
        part.write_bytes(whole[:100])
    os.utime(old, (0, time.time() - 2 * image_cache.ABANDONED))
    assert equal_to_decoded(keep(cache, data), data)
    assert not old.exists()
    assert fresh.exists()  # by a process that may be alive, where the file system knows no locks
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("bound", "above its bound of 0.0 GB: delete what is not needed there, or give another folder with --cache"),
        ("free", "0.0 GB for 4 images is more than the 0.0 GB that are free in "),
        ("full", "No space left on device"),
        ("file", "Not a directory"),
    ],
)
def test_what_finds_no_room_is_said_and_not_kept(cache, data, monkeypatch, trouble, message):
    if trouble == "bound":
        monkeypatch.setattr(image_cache, "LARGEST", 500)
    elif trouble == "free":
        monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=500))
    elif trouble == "full":

        def refuse(number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", refuse)
    else:
        cache.folder.parent.joinpath("plain").write_text("")
        cache.keep.__self__.__dict__["folder"] = cache.folder = cache.folder.parent / "plain" / "cache"
    assert keep(cache, data) is None
    assert cache.said[-1].startswith("images are decoded anew in every epoch, as they cannot be kept: ")
    assert message in cache.said[-1]
    assert "\n" not in cache.said[-1]
    assert trouble == "file" or [path.suffix for path in cache.folder.iterdir()] == [".lock"]


def test_of_two_processes_one_waits_and_takes_what_the_other_has_made(cache, data):
    path = keep(cache, data).path
    whole = path.read_bytes()
    path.unlink()
    waits, calls, kept = threading.Event(), [], []
    other = ImageCache(cache.folder, lambda text: waits.set() if "waiting for it" in text else None)
    thread = threading.Thread(target=lambda: kept.append(other.keep(data, NAMES, "as it is", decoder(data, calls))))
    with held(path.with_suffix(".lock"), "busy"):
        thread.start()
        assert waits.wait(60)
        path.write_bytes(whole)
    thread.join(60)
    assert equal_to_decoded(kept[0], data)
    assert calls == []


def batches_of(settings):
    module = loader_of(settings.data_set)
    data = module.load_training(settings)
    batches = Batches(data.train, data.select, module.collate, settings)
    for epoch in (0, 1):
        batches.trainer = SimpleNamespace(current_epoch=epoch, world_size=1, global_rank=0)
        torch.manual_seed(epoch)
        for loader in (batches.train_dataloader(), batches.val_dataloader()):
            yield from loader


@pytest.mark.parametrize("name", ["nyud2", "mvsa"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_and_without_a_cache(name, workers, sample, tmp_path):
    layer = {"data_root": str(sample(name)), "workers": workers, "seed": 3}
    settings = [resolve(name, QUICK, layer, {"cache": cache}) for cache in ("off", str(tmp_path), str(tmp_path))]
    count = 0
    for batches in zip(*[list(batches_of(each)) for each in settings], strict=True):
        wanted = batches[0]
        for batch in batches[1:]:
            assert torch.equal(batch["index"], wanted["index"])
            for key in ("rgb", "depth") if name == "nyud2" else ("image",):
                assert torch.equal(batch["inputs"][key], wanted["inputs"][key])
                assert batch["inputs"][key].dtype == torch.float32
                count += 1
    assert count >= 8
    assert len(list(tmp_path.glob("*.images"))) == 2


def test_bad_files_are_the_same_with_and_without_a_cache(sample, tmp_path):
    for name, module, file in (("nyud2", paired_batches, "train/*/*_0001.png"), ("mvsa", text_batches, "*.jpg")):
        root = shutil.copytree(sample(name), tmp_path / name)
        bad = sorted(root.rglob(file))
        bad[0].write_bytes(b"")
        os.truncate(bad[1], bad[1].stat().st_size // 2)
        settings = resolve(name, QUICK, {"data_root": str(root), "cache": str(tmp_path / "cache")})
        for skip in (False, True):
            said = []
            for cache in (settings.cache, settings.cache, "off"):
                asked = replace(settings, cache=cache, skip_bad=skip)
                try:
                    data = module.load_training(asked)
                    said.append((data.faults, data.fingerprint))
                except DataError as error:
                    said.append(str(error))
            assert said[0] == said[1] == said[2], name
            assert skip or "of" in said[0]
            assert not skip or said[0][0] > 0


@pytest.mark.slow
def test_figures_do_not_depend_on_the_cache(sample, tmp_path, capsys):
    arguments = ["train", "nyud2", "--quick", "--limit-batches", "2", "--data-root", str(sample("nyud2"))]
    written = []
    for where in ("off", str(tmp_path / "cache")):
        folder = tmp_path / Path(where).name
        runs = str(folder / "runs")
        assert main([*arguments, "--epochs", "1", "--cache", where, "--output", runs]) == 0
        # The place may be another one when a run is gone on with.
        assert main([*arguments, "--epochs", "2", "--resume", "--cache", "off", "--output", runs]) == 0
        assert main(["evaluate", runs, "--levels", "0,5", "--output", str(folder / "tested")]) == 0
        written.append((folder / "tested" / "results.json").read_text().replace(str(folder), ""))
    assert written[0] == written[1]
    assert len(list((tmp_path / "cache").glob("*.images"))) == 2


def test_yaml_reads_on_and_off_as_truth_values(tmp_path):
    from qmf_examples.training.settings import load_run, read_settings, write_settings

    file = tmp_path / "settings.yaml"
    for text, cache in (("off", "off"), ("on", "on"), ("here", "here")):
        file.write_text(f"cache: {text}\n")
        settings = resolve("nyud2", {"data_root": "data"}, read_settings(file))
        assert settings.cache == cache
        write_settings(file, settings)
        assert load_run(tmp_path) == settings
