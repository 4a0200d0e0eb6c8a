"""NYU Depth V2's frames written as the files that people have: the release's HDF5 file, and numbered images."""

import numpy as np
from PIL import Image

TILT = np.radians(20)
STEP = 10 / 255


def room_depth():
    """Metres ``[480, 640]``: a floor 1.3 m below a camera that looks down a little, and a wall."""
    v = np.indices((480, 640))[0]
    y = (v + 1 - 253.73616633) / 519.46961112
    down, forward = y * np.cos(TILT) + np.sin(TILT), np.cos(TILT) - y * np.sin(TILT)
    with np.errstate(divide="ignore"):
        return np.minimum(np.where(down > 0, 1.3 / down, np.inf), 2.5 / forward)


def write_mat(path, images, depths, scenes, raw=None):
    """A MATLAB 7.3 file as MATLAB writes it: a header of its own before HDF5's, arrays with their axes reversed,
    characters as numbers, and cells of strings as references to them.

    Args:
        path: of the file.
        images: uint8 ``[N, 480, 640, 3]``.
        depths: metres ``[N, 480, 640]``.
        scenes: N scene types.
        raw: metres ``[N, 480, 640]``, 0 where nothing was measured; not written where None.
    """
    import h5py

    with h5py.File(path, "w", userblock_size=512) as file:
        array(file, "images", np.asarray(images, np.uint8).transpose(0, 3, 2, 1), "uint8")
        array(file, "depths", np.asarray(depths, np.float32).transpose(0, 2, 1), "single")
        if raw is not None:
            array(file, "rawDepths", np.asarray(raw, np.float32).transpose(0, 2, 1), "single")
        strings = []
        for i, scene in enumerate(scenes):
            characters = np.array([[ord(character)] for character in scene], np.uint16)
            strings.append(array(file, f"#refs#/{i}", characters, "char"))
        # A cell array of N x 1 in MATLAB, thus 1 x N here.
        array(file, "sceneTypes", np.array([[string.ref for string in strings]], h5py.ref_dtype), "cell")
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Aug 13 2012 HDF5 schema 1.00 .".ljust(124))
        file.write(b"\x00\x02IM")


def array(file, name, values, kind):
    made = file.create_dataset(name, data=values)
    made.attrs["MATLAB_class"] = np.bytes_(kind)
    return made


def write_images(root, images, depths, scenes, train, test, suffix=".png"):
    """``images``, ``depths`` and ``meta`` under ``root``, the depths, in metres, as grey values of 8 bits."""
    for name in ("images", "depths", "meta"):
        (root / name).mkdir(parents=True)
    for i, (image, depth) in enumerate(zip(images, depths, strict=True)):
        Image.fromarray(image).save(root / "images" / f"{i}{suffix}")
        Image.fromarray(np.rint(np.minimum(depth, 10) / STEP).astype(np.uint8)).save(root / "depths" / f"{i}.png")
    lists = {"sceneTypes": ("SceneTypes", scenes), "train_indexes": ("Index", train), "val_indexes": ("Index", test)}
    for name, (heading, lines) in lists.items():
        (root / "meta" / f"{name}.csv").write_text("\n".join(map(str, (heading, *lines))))  # without a last line's end


def write_splits(path, train, test):
    """``splits.mat``."""
    from scipy.io import savemat

    savemat(path, {"trainNdxs": [[number] for number in train], "testNdxs": [[number] for number in test]})


def from_images(root):
    """The options of ``prepare nyud2`` for what ``write_images`` wrote."""
    return ["--images", root / "images", "--depths", root / "depths", "--meta", root / "meta"]
