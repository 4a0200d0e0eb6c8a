"""``prepare`` killed half-way, and workers killed: nothing half-written, nothing done twice."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qmf_examples.data.catalogue import DATA_SETS
from qmf_examples.data.faults import DataError
from qmf_examples.data.paired_images import PairedImages
from qmf_examples.errors import CommandError
from qmf_examples.prepare.frames import Frame, prepare_frames

FRAMES = [Frame(str(i), f"train/a/{i}.png") for i in range(60)]

CONVERTERS = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from qmf_examples.prepare.frames import Frame, prepare_frames


def slow(source):
    time.sleep(0.03)  # so that a kill falls into the middle
    half = np.random.default_rng(int(source)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return half, half


def die(source):
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    frames = [Frame(str(i), f"train/a/{i}.png") for i in range(60)]
    prepare_frames(frames, slow, Path(sys.argv[1]), {}, size=0, workers=2)
"""


@pytest.fixture
def converters(tmp_path, monkeypatch):
    """A module that other processes can import."""
    (tmp_path / "converters_of_test.py").write_text(CONVERTERS)
    monkeypatch.syspath_prepend(tmp_path)
    import converters_of_test

    yield converters_of_test
    del sys.modules["converters_of_test"]


def session_alive(leader):
    """Whether a process is left of the session that ``leader`` began."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) == leader and state != "Z":
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for left-over workers in /proc")
def test_a_killed_run_leaves_whole_files_and_goes_on_where_it_was(tmp_path, converters):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, converters.__file__, str(out)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        while process.poll() is None and len(list(out.rglob("*.png"))) < 5:
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    while session_alive(process.pid):  # its workers end by themselves; were they not to, this would never
        time.sleep(0.01)
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert 5 <= len(finished) < 60
    for path in finished:
        assert np.array_equal(np.asarray(Image.open(path))[:, :64], converters.slow(path.stem)[0])
    with pytest.raises(DataError, match="prepare has not finished there; run the same command again to go on"):
        PairedImages(DATA_SETS["nyud2"], out, num_classes=0)
    (out / "train" / "a" / "59.png.123.part").write_bytes(b"half")  # what a kill during a write leaves
    outcome = prepare_frames(FRAMES, converters.slow, out, {}, size=0, workers=1)
    assert (outcome.written, outcome.finished) == (60 - len(finished), len(finished))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    assert len(list(out.rglob("*.png"))) == 60
    assert list(out.rglob("*.part")) == []
    assert len(PairedImages(DATA_SETS["nyud2"], out, num_classes=0)) == 60


def test_a_second_run_at_the_same_time_is_refused_and_disturbs_nothing(tmp_path, converters):
    pytest.importorskip("fcntl", reason="file locks of POSIX")
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    first = subprocess.Popen([sys.executable, converters.__file__, str(out)], env=environment)
    try:
        while first.poll() is None and not list(out.rglob("*.png")):
            time.sleep(0.005)
        half = out / "train" / "a" / "59.png.123.part"  # as the first run's own, in the middle of a write
        half.write_bytes(b"half")
        with pytest.raises(CommandError, match="another run of prepare is writing there"):
            prepare_frames(FRAMES, converters.slow, out, {}, size=0, workers=1)
        assert first.poll() is None, "the first run ended before the second could begin"
        assert half.exists()
        assert first.wait() == 0
    finally:
        first.kill()
        first.wait()
    outcome = prepare_frames(FRAMES, converters.slow, out, {}, size=0, workers=1)
    assert (outcome.written, outcome.finished) == (0, 60)


def test_a_killed_worker_is_one_clear_error(tmp_path, converters):
    with pytest.raises(DataError, match="a worker was killed"):
        prepare_frames(FRAMES[:2], converters.die, tmp_path / "out", {}, workers=2)
