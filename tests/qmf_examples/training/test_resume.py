"""Going on with a run: wherever its folder lies now, for more epochs, on the same rows, and one process at a time."""

import json
import os
import shutil

import pytest
import torch

from qmf_examples.cli import main
from qmf_examples.errors import CommandError
from qmf_examples.files import alone_in
from qmf_examples.training.lightning_module import ACCURACY, TrainingModule
from qmf_examples.training.run import load_learner, read_checkpoint, train_run
from qmf_examples.training.settings import QUICK, resolve


@pytest.fixture
def layers(sample):
    return [QUICK, {"batch_size": 8, "limit_batches": 1, "data_root": str(sample("nyud2")), "method": "rgb"}]


@pytest.fixture
def accuracies(monkeypatch):
    """The accuracies that the epochs are said to reach, to be filled by the test."""
    figures = []

    def on_validation_epoch_end(self):
        self.accuracy.reset()
        self.log(ACCURACY, torch.tensor(figures[self.current_epoch]))

    monkeypatch.setattr(TrainingModule, "on_validation_epoch_end", on_validation_epoch_end)
    return figures


def move(folder, to):
    shutil.move(folder, to)
    return to


def copy(folder, to):
    return shutil.copytree(folder, to)


def lift(folder, to):
    """Copy what is in a folder to the one above it."""
    shutil.copytree(folder, folder.parent, dirs_exist_ok=True)
    return folder.parent


def stay(folder, to):
    return folder


@pytest.mark.parametrize(
    "carry", [pytest.param(stay, marks=pytest.mark.slow), move, pytest.param(copy, marks=pytest.mark.slow), lift]
)
def test_the_best_stays_the_best_wherever_the_folder_lies(carry, layers, accuracies, tmp_path):
    accuracies += [0.5, 0.75, 0.25, 0.625]
    first = tmp_path / "runs" / "first"
    train_run(resolve("nyud2", *layers, {"epochs": 2}), first)
    before = read_checkpoint(first / "best.ckpt")
    (first / "finished.json").unlink()  # as if killed
    folder = carry(first, tmp_path / "moved")
    finished = train_run(resolve("nyud2", *layers, {"epochs": 4}), folder, resume=True)
    after = read_checkpoint(folder / "best.ckpt")
    assert (finished.accuracy, finished.epochs, after["accuracy"], after["epoch"]) == (0.75, 4, 0.75, 1)
    assert json.loads((folder / "finished.json").read_text())["accuracy"] == 0.75
    for name, weight in before["state_dict"].items():
        assert torch.equal(after["state_dict"][name], weight)
    # What it was copied from is as it was.
    assert carry in (stay, move) or read_checkpoint(first / "last.ckpt")["epoch"] == 1


def test_a_better_epoch_replaces_the_best_after_a_move(layers, accuracies, tmp_path):
    accuracies += [0.5, 0.75]
    train_run(resolve("nyud2", *layers, {"epochs": 1}), tmp_path / "a")
    folder = move(tmp_path / "a", tmp_path / "b")
    assert train_run(resolve("nyud2", *layers, {"epochs": 2}), folder, resume=True).accuracy == 0.75
    assert read_checkpoint(folder / "best.ckpt")["epoch"] == 1


def test_the_figure_is_that_of_the_weights_that_are_tested(layers, accuracies, tmp_path, sample, monkeypatch):
    # Chosen on the test set, the best epoch's accuracy is the one that evaluation finds.
    monkeypatch.undo()
    layers = [*layers, {"selection": "test", "limit_batches": 100, "epochs": 1}]
    finished = train_run(resolve("nyud2", *layers), tmp_path / "a")
    (tmp_path / "a" / "finished.json").unlink()  # as if killed
    folder = move(tmp_path / "a", tmp_path / "b")

    def worse(self):
        self.accuracy.reset()
        self.log(ACCURACY, torch.tensor(0.0))

    monkeypatch.setattr(TrainingModule, "on_validation_epoch_end", worse)
    assert train_run(resolve("nyud2", *layers, {"epochs": 2}), folder, resume=True).accuracy == finished.accuracy
    assert main(["evaluate", str(folder), "--levels", "0", "--noise", "gaussian"]) == 0
    (cell,) = json.loads((folder / "evaluation" / "results.json").read_text())["cells"]
    assert cell["mean"] == pytest.approx(finished.accuracy, abs=1e-6)


def test_a_kill_between_the_two_checkpoints_leaves_figure_and_weights_of_one_epoch(layers, accuracies, tmp_path):
    accuracies += [0.5, 0.75]
    train_run(resolve("nyud2", *layers, {"epochs": 1}), tmp_path)
    last = (tmp_path / "last.ckpt").read_bytes()
    train_run(resolve("nyud2", *layers, {"epochs": 2}), tmp_path, resume=True)
    # As if killed after best.ckpt of the second epoch; trained again, on another machine say, it is not as good.
    (tmp_path / "last.ckpt").write_bytes(last)
    (tmp_path / "finished.json").unlink()
    accuracies[1] = 0.625
    assert train_run(resolve("nyud2", *layers, {"epochs": 2}), tmp_path, resume=True).accuracy == 0.75
    assert read_checkpoint(tmp_path / "best.ckpt")["accuracy"] == 0.75


def test_a_run_without_its_best_weights_is_not_gone_on_with(layers, accuracies, tmp_path):
    accuracies += [0.5, 0.25]
    train_run(resolve("nyud2", *layers, {"epochs": 1}), tmp_path)
    (tmp_path / "best.ckpt").unlink()
    with pytest.raises(CommandError, match=r"no checkpoint .*best\.ckpt"):
        train_run(resolve("nyud2", *layers, {"epochs": 2}), tmp_path, resume=True)


def test_warnings_of_states_that_are_not_restored_are_shown(layers, accuracies, tmp_path, recwarn, monkeypatch):
    from lightning.pytorch.callbacks import ModelCheckpoint

    from qmf_examples.training.checkpoints import KeptCheckpoint

    accuracies += [0.5, 0.25]
    train_run(resolve("nyud2", *layers, {"epochs": 1}), tmp_path / "a")
    assert not recwarn.list
    # Lightning's own callback says what it forgets.
    monkeypatch.setattr(KeptCheckpoint, "load_state_dict", ModelCheckpoint.load_state_dict)
    folder = move(tmp_path / "a", tmp_path / "b")
    train_run(resolve("nyud2", *layers, {"epochs": 2}), folder, resume=True)
    assert any("won't be reloaded" in str(warning.message) for warning in recwarn.list)


def test_more_epochs_are_trained_to_the_numbers_of_one_go(layers, tmp_path):
    whole = train_run(resolve("nyud2", *layers, {"epochs": 3}), tmp_path / "whole")
    train_run(resolve("nyud2", *layers, {"epochs": 1}), tmp_path / "parts")
    assert train_run(resolve("nyud2", *layers, {"epochs": 3}), tmp_path / "parts", resume=True) == whole
    ours, theirs = (read_checkpoint(tmp_path / name / "last.ckpt")["state_dict"] for name in ("parts", "whole"))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight)


def test_a_finished_run_says_why_nothing_is_trained(layers, accuracies, tmp_path, capsys):
    accuracies += [0.5, 0.25, 0.25]
    arguments = ["train", "nyud2", "--quick", "--method", "rgb", "--data-root", layers[1]["data_root"]]
    arguments += ["--limit-batches", "1", "--patience", "2", "--output", str(tmp_path)]
    place = tmp_path / "rgb" / "seed1"
    assert main([*arguments, "--epochs", "1"]) == 0
    for epochs, why in (
        ("1", "it has trained 1 epochs, and --epochs is 1"),
        ("9", None),
        ("9", "it stopped after 2 epochs without a better one (--patience), 3 in all"),
        ("2", "it stopped after 2 epochs"),
    ):
        capsys.readouterr()
        assert main([*arguments, "--epochs", epochs, "--resume"]) == 0
        said = capsys.readouterr().out
        assert (f"{place}: nothing to train: {why}" in said) if why else ("nothing to train" not in said), said
    (place / "last.ckpt").unlink()
    assert main([*arguments, "--epochs", "9", "--resume"]) == 0
    assert "it has finished after 3 epochs, and last.ckpt to go on from is gone" in capsys.readouterr().out


def swap(lines):
    return [lines[1], lines[0], *lines[2:]]


def retext(lines):
    return [lines[0].replace('"text": "', '"text": "other '), *lines[1:]]


def drop(lines):
    return lines[1:]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("train", swap),
        pytest.param("train", retext, marks=pytest.mark.slow),
        pytest.param("train", drop, marks=pytest.mark.slow),
        ("dev", swap),
    ],
)
def test_other_rows_are_refused(file, change, sample, tmp_path):
    data = shutil.copytree(sample("mvsa"), tmp_path / "data")
    layers = [QUICK, {"batch_size": 8, "limit_batches": 1, "data_root": str(data), "method": "image"}]
    train_run(resolve("mvsa", *layers, {"epochs": 1}), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.is_file()}
    lines = (data / f"{file}.jsonl").read_text().splitlines()
    changed = change(lines)
    assert changed != lines
    (data / f"{file}.jsonl").write_text("\n".join(changed) + "\n")
    with pytest.raises(CommandError, match=r"data does not hold the samples that .*run was trained on"):
        train_run(resolve("mvsa", *layers, {"epochs": 2}), tmp_path / "run", resume=True)
    for name, content in before.items():
        assert name == "run.lock" or (tmp_path / "run" / name).read_bytes() == content
    (data / f"{file}.jsonl").write_text("\n\n".join(lines) + "\n")  # the same rows, on other lines
    assert train_run(resolve("mvsa", *layers, {"epochs": 2}), tmp_path / "run", resume=True).epochs == 2


def test_a_renamed_image_is_another_row(layers, tmp_path):
    data = shutil.copytree(layers[1]["data_root"], tmp_path / "data")
    layers = [*layers, {"data_root": str(data)}]
    train_run(resolve("nyud2", *layers, {"epochs": 1}), tmp_path / "run")
    image = min((data / "train" / "office").iterdir())
    image.rename(image.with_name("zzz.png"))
    with pytest.raises(CommandError, match="does not hold the samples"):
        train_run(resolve("nyud2", *layers, {"epochs": 2}), tmp_path / "run", resume=True)


def test_words_that_have_other_numbers_now_are_not_tested(sample, tmp_path):
    data = shutil.copytree(sample("mvsa"), tmp_path / "data")
    layers = [QUICK, {"limit_batches": 1, "data_root": str(data), "method": "bow", "epochs": 1}]
    train_run(resolve("mvsa", *layers), tmp_path / "run")
    load_learner(tmp_path / "run")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    word = rows[0]["text"].split()[0]
    for row in rows:  # as many words as before, and in another order
        row["text"] = row["text"].replace(word, "zzz")
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CommandError, match="was trained on other classes, or other words, than"):
        load_learner(tmp_path / "run")


def test_classes_that_have_other_numbers_now_are_not_tested(layers, tmp_path, capsys):
    data = shutil.copytree(layers[1]["data_root"], tmp_path / "data")
    train_run(resolve("nyud2", *layers, {"data_root": str(data), "epochs": 1}), tmp_path / "run")
    for split in ("train", "test"):
        (data / split / "bathroom").rename(data / split / "washroom")
    assert main(["evaluate", str(tmp_path / "run"), "--levels", "0"]) == 1
    assert "was trained on other classes, or other words, than" in capsys.readouterr().err
    # Elsewhere they lie as they did, and the run is told where.
    assert load_learner(tmp_path / "run", layers[1]["data_root"])


def test_texts_that_have_moved_are_found_where_evaluation_is_told(sample, tmp_path):
    data = shutil.copytree(sample("mvsa"), tmp_path / "data")
    layers = [QUICK, {"limit_batches": 1, "data_root": str(data), "method": "bow", "epochs": 1}]
    train_run(resolve("mvsa", *layers), tmp_path / "run")
    moved = move(data, tmp_path / "moved")
    arguments = ["evaluate", str(tmp_path / "run"), "--levels", "0", "--noise", "gaussian"]
    assert main([*arguments, "--data-root", str(moved)]) == 0


def test_one_process_trains_a_run_and_the_second_says_who(layers, tmp_path, capsys, monkeypatch):
    arguments = ["train", "nyud2", "--quick", "--method", "rgb", "--data-root", layers[1]["data_root"]]
    arguments += ["--limit-batches", "1", "--output", str(tmp_path)]
    place = tmp_path / "rgb" / "seed1"
    place.mkdir(parents=True)
    with alone_in(place):
        for more in ([], ["--resume"]):
            assert main([*arguments, *more]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(
                f"qmf-fusion: error: {place}: another command is writing there; wait for it, or give"
            )
            assert f"(process {os.getpid()} on " in line
        assert [path.name for path in place.iterdir()] == ["run.lock"]
        # Of processes that train together, the first holds it for all of them.
        monkeypatch.setattr("qmf_examples.training.run.is_first_process", lambda: False)
        monkeypatch.setattr("qmf_examples.training.run._train_alone", lambda *_: "trained")
        assert train_run(resolve("nyud2", *layers), place) == "trained"
    monkeypatch.undo()
    assert main(arguments) == 0, capsys.readouterr().err


def test_a_run_is_held_while_it_trains(layers, tmp_path, monkeypatch):
    step, refused = TrainingModule.training_step, []

    def training_step(self, batch, number):
        with pytest.raises(CommandError, match="another command is writing there"), alone_in(tmp_path):
            pass
        refused.append(number)
        return step(self, batch, number)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    train_run(resolve("nyud2", *layers), tmp_path)
    assert refused
    with alone_in(tmp_path):
        pass
