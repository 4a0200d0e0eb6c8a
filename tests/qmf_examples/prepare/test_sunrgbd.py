"""``prepare sunrgbd`` on a synthetic release: layout, split, geometry, broken frames, and going on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qmf_examples.data.catalogue import DATA_SETS
from qmf_examples.data.faults import DataError
from qmf_examples.data.paired_images import PairedImages
from qmf_examples.prepare.frames import prepare_frames
from qmf_examples.prepare.hha import hha
from qmf_examples.prepare.sunrgbd import convert_frame, decode_depth, plan_sunrgbd, split_key, sunrgbd_converter

HEIGHT, WIDTH = 40, 56
CAMERA = np.array([[50.0, 0, 28], [0, 50.0, 20], [0, 0, 1]])
TILT = np.radians(20)


def floor_depth():
    """A camera 1.3 m above a floor, looking 20 degrees down, at a wall 2.5 m away."""
    v = np.indices((HEIGHT, WIDTH))[0]
    y = (v + 1 - 20) / 50
    down, forward = y * np.cos(TILT) + np.sin(TILT), np.cos(TILT) - y * np.sin(TILT)
    with np.errstate(divide="ignore"):
        return np.minimum(np.where(down > 0, 1.3 / down, np.inf), 2.5 / forward)


def sun_frame(folder, scene, seed=0):
    """A frame as the release has it; depth is written by the release's rule, millimetres rotated left by 3."""
    for name in ("image", "depth_bfx", "extrinsics"):
        (folder / name).mkdir(parents=True)
    rgb = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(folder / "image" / "x.jpg")
    millimetres = np.rint(1000 * floor_depth()).astype(np.uint32)
    stored = ((millimetres << 3) | (millimetres >> 13)) & 0xFFFF
    Image.fromarray(stored.astype(np.uint16)).save(folder / "depth_bfx" / "x.png")
    np.savetxt(folder / "intrinsics.txt", CAMERA)
    rotation = [[1, 0, 0], [0, np.cos(TILT), np.sin(TILT)], [0, -np.sin(TILT), np.cos(TILT)]]
    np.savetxt(folder / "extrinsics" / "20150101.txt", np.column_stack([rotation, np.zeros(3)]))
    (folder / "scene.txt").write_text(scene)


@pytest.fixture
def sun(tmp_path):
    root = tmp_path / "SUNRGBD"
    scenes = ["office"] * 4 + ["kitchen"] * 4 + ["gym", "idk"]
    for i, scene in enumerate(scenes):
        sun_frame(root / ("kv1" if i % 2 else "kv2") / "set" / f"frame{i:03d}", scene, i)
    return root


def allsplit(file, train, test):
    from scipy.io import savemat

    def cell(names):
        array = np.empty((1, len(names)), dtype=object)
        array[0] = [f"/n/fs/sun3d/data/SUNRGBD/{name}" for name in names]
        return array

    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, {"alltrain": cell(train), "alltest": cell(test)})


def pngs(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))


def run(plan, raw, out, depth="hha", gravity="estimate", **options):
    options = {"size": 0, "workers": 1, **options}
    return prepare_frames(plan.frames, sunrgbd_converter(raw, depth, gravity), out, {"depth": depth}, **options)


def test_sunrgbd_with_the_published_split(sun, tmp_path):
    toolbox = tmp_path / "SUNRGBDtoolbox" / "traintestSUNRGBD" / "allsplit.mat"
    names = sorted(p.parent.relative_to(sun).as_posix() for p in sun.rglob("scene.txt"))
    train, test = [n for n in names if n[-1] in "0145"], [n + "/" for n in names if n[-1] in "26"]
    allsplit(toolbox, train, test)
    for raw in (sun, tmp_path):  # the release's folder, and the one above it
        plan = plan_sunrgbd(raw)
        assert plan.published
        assert plan.other_scenes == {"gym": 1, "idk": 1}
        assert plan.unsplit == 2
        assert plan.faults == []
    plan = plan_sunrgbd(sun)
    outcome = run(plan, sun, tmp_path / "out")
    assert (outcome.written, outcome.finished, outcome.faults) == (6, 0, [])
    assert pngs(tmp_path / "out") == [
        "test/kitchen/kv2__set__frame006.png",
        "test/office/kv2__set__frame002.png",
        "train/kitchen/kv1__set__frame005.png",
        "train/kitchen/kv2__set__frame004.png",
        "train/office/kv1__set__frame001.png",
        "train/office/kv2__set__frame000.png",
    ]
    data = PairedImages(DATA_SETS["sunrgbd"], tmp_path / "out", "test", num_classes=0)
    assert data.classes == ["kitchen", "office"]
    rgb = np.asarray(Image.open(sun / "kv2/set/frame006/image/x.jpg"))
    assert np.array_equal(np.asarray(data[0]["rgb"]), rgb)
    world = np.array([0, np.cos(TILT), np.sin(TILT)])
    expected = hha(np.rint(1000 * floor_depth()) / 1000, CAMERA, gravity=world)
    assert np.abs(np.asarray(data[0]["depth"]).astype(int) - expected.astype(int)).max() <= 3


def test_sunrgbd_without_a_split_draws_one_and_says_so(sun):
    plan = plan_sunrgbd(sun)
    assert not plan.published
    assert "drawn with seed 0" in plan.split_source
    assert len(plan.frames) == 8
    halves = {name: sum(f.target.startswith(f"train/{name}") for f in plan.frames) for name in ("office", "kitchen")}
    assert halves == {"office": 2, "kitchen": 2}
    assert plan.frames == plan_sunrgbd(sun).frames
    assert plan_sunrgbd(sun, seed=1).frames != plan.frames


@pytest.mark.parametrize(("depth", "gravity"), [("grey", "estimate"), ("hha", "extrinsics")])
def test_sunrgbd_depth_as_asked(sun, depth, gravity):
    _, image = convert_frame(sun, depth, gravity, "kv2/set/frame000")
    metres = np.rint(1000 * floor_depth()) / 1000
    if depth == "grey":
        assert np.array_equal(image[..., 0], np.rint(25.5 * metres))
    else:
        world = np.array([0, np.cos(TILT), np.sin(TILT)])
        assert np.array_equal(image, hha(metres, CAMERA, gravity=world))


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BROKEN = {
    "truncated image": (lambda f: halve(f / "image/x.jpg"), "cannot be read: x.jpg"),
    "truncated depth": (lambda f: halve(f / "depth_bfx/x.png"), "cannot be read: x.png"),
    "no depth": (lambda f: (f / "depth_bfx/x.png").unlink(), "no file in depth_bfx"),
    "eight bits": (lambda f: Image.new("L", (WIDTH, HEIGHT)).save(f / "depth_bfx/x.png"), "one channel of 16 bits"),
    "all zero": (lambda f: Image.new("I;16", (WIDTH, HEIGHT)).save(f / "depth_bfx/x.png"), "no pixel whose depth"),
    "sizes": (lambda f: Image.new("RGB", (9, 9)).save(f / "image/x.jpg"), "height by width"),
    "intrinsics": (lambda f: (f / "intrinsics.txt").write_text("1 2 x"), "intrinsics.txt"),
    "short intrinsics": (lambda f: (f / "intrinsics.txt").write_text("1 2 3"), "3 rows"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_frame_is_told_and_the_others_written(sun, tmp_path, kind):
    damage, reason = BROKEN[kind]
    damage(sun / "kv1/set/frame003")
    out = tmp_path / "out"
    outcome = run(plan_sunrgbd(sun), sun, out)
    assert outcome.written == 7
    assert [fault.file for fault in outcome.faults] == ["kv1/set/frame003"]
    assert reason in outcome.faults[0].reason
    assert len(pngs(out)) == 7
    assert list(out.rglob("*.part")) == []


def test_a_repaired_frame_is_made_by_the_next_run_and_the_others_stay(sun, tmp_path):
    out = tmp_path / "out"
    whole = (sun / "kv1/set/frame003/intrinsics.txt").read_text()
    (sun / "kv1/set/frame003/intrinsics.txt").write_text("")
    plan = plan_sunrgbd(sun)
    run(plan, sun, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (sun / "kv1/set/frame003/intrinsics.txt").write_text(whole)
    outcome = run(plan, sun, out)
    assert (outcome.written, outcome.finished) == (1, 7)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_other_settings_or_a_folder_of_others_are_refused(sun, tmp_path):
    plan = plan_sunrgbd(sun)
    run(plan, sun, tmp_path / "out")
    with pytest.raises(DataError, match="prepared with other settings"):
        run(plan, sun, tmp_path / "out", depth="grey")
    with pytest.raises(DataError, match="prepared with other settings"):
        run(plan, sun, tmp_path / "out", size=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.part").write_text("precious")
    with pytest.raises(DataError, match="holds other files"):
        run(plan, sun, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.part").read_text() == "precious"


def test_a_failing_write_ends_the_run_and_leaves_nothing_half_written(sun, tmp_path):
    out = tmp_path / "out"
    plan = plan_sunrgbd(sun)
    run(plan, sun, out)
    victim = out / plan.frames[0].target
    victim.unlink()
    victim.parent.rename(out / "elsewhere")
    victim.parent.write_text("a file where a folder must be")
    with pytest.raises(DataError, match="cannot write to"):
        run(plan, sun, out)


def test_workers_write_the_same_bytes_as_one_process(sun, tmp_path):
    plan = plan_sunrgbd(sun)
    run(plan, sun, tmp_path / "one")
    run(plan, sun, tmp_path / "two", workers=2)
    assert pngs(tmp_path / "one") == pngs(tmp_path / "two")
    for name in pngs(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_sunrgbd_bad_folders_and_split_files_are_told(sun, tmp_path):
    with pytest.raises(DataError, match="--raw: no folder"):
        plan_sunrgbd(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--raw: no frame"):
        plan_sunrgbd(tmp_path / "empty")
    bad = tmp_path / "bad.mat"
    with pytest.raises(DataError, match="--splits: no file"):
        plan_sunrgbd(sun, bad)
    bad.write_bytes(b"nothing of MATLAB's")
    with pytest.raises(DataError, match="cannot be read as a MATLAB file"):
        plan_sunrgbd(sun, bad)
    allsplit(bad, ["kv9/other/1"], ["kv9/other/2"])
    with pytest.raises(DataError, match="names none of the 8 frames"):
        plan_sunrgbd(sun, bad)


def test_depth_bits_are_rotated_and_cut_off_at_eight_metres():
    millimetres = np.array([[1, 2000, 7999, 8000, 8100, 65535 >> 3]], dtype=np.uint32)
    stored = ((millimetres << 3) | (millimetres >> 13)).astype(np.uint16)
    assert decode_depth(stored).tolist() == [[0.001, 2.0, 7.999, 8.0, 8.0, 8.0]]
    assert split_key(Path("/data/SUNRGBD/kv1/b3do/img_0063")) == "kv1/b3do/img_0063"
    assert split_key(Path("/data/renamed/xtion/sun3d/a")) == "xtion/sun3d/a"
