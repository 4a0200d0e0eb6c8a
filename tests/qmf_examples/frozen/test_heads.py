"""Heads on frozen encoders: every method that can, features computed once, resuming, and what must not be mixed."""

import json
import re

import numpy as np
import pytest
import torch

from qmf_examples.cli import main
from qmf_examples.commands.train_sets import choose_methods, left_out
from qmf_examples.comparison.prepared import fit_each_feature
from qmf_examples.comparison.robustness import FILES
from qmf_examples.errors import CommandError
from qmf_examples.evaluation.damaged_tests import NoisePlan
from qmf_examples.evaluation.testing import evaluate_runs
from qmf_examples.frozen import encode, heads
from qmf_examples.frozen.heads import load_training, train_frozen
from qmf_examples.models.feature_heads import Scaled, feature_heads
from qmf_examples.models.methods import METHODS
from qmf_examples.training.checkpoints import read_checkpoint
from qmf_examples.training.lightning_module import TrainingModule
from qmf_examples.training.run import load_learner, train_run
from qmf_examples.training.settings import HEADS, NOT_FROZEN, QUICK, methods_of, resolve
from qmf_examples.training.settings import METHODS as ROWS

TINY = {**QUICK, **HEADS, "frozen": True, "copies": 1, "batch_size": 16}


def settings_of(data_set, root, **given):
    return resolve(data_set, TINY, {"data_root": str(root), **given})


@pytest.fixture(autouse=True)
def _nothing_in_memory():
    heads._splits.clear()


@pytest.mark.parametrize(
    ("data_set", "methods"),
    [("nyud2", methods_of("nyud2", frozen=True)), ("mvsa", ("image", "bert", "concatbert", "etmc", "robust"))],
)
def test_every_method_that_can_trains_on_features_that_were_computed_once(
    data_set, methods, sample, tmp_path, monkeypatch
):
    asked = []

    def counted(settings, split, *rest, **options):
        asked.append(split)
        return encode.encode_split(settings, split, *rest, **options)

    monkeypatch.setattr(heads, "encode_split", counted)
    for method in methods:
        folder = tmp_path / method / "seed1"
        settings = settings_of(data_set, sample(data_set), method=method, epochs=1)
        assert train_frozen(settings, folder).epochs == 1
        loaded, learner, _ = load_learner(folder)
        assert loaded == settings
        state = read_checkpoint(folder / "last.ckpt")["state_dict"]
        assert all(torch.equal(x, state[f"learner.{name}"]) for name, x in learner.state_dict().items())
    assert asked == (["train"] if data_set == "nyud2" else ["train", "dev"])


def test_robust_judges_by_features_and_robust_logits_by_logits_alone(sample, tmp_path):
    made = {}
    for method in ("robust", "robust-logits"):
        train_frozen(settings_of("nyud2", sample("nyud2"), method=method, epochs=1), tmp_path / method / "seed1")
        made[method] = set(load_learner(tmp_path / method / "seed1")[1].state_dict())
    assert made["robust-logits"] < made["robust"]


def test_a_run_that_was_cut_short_goes_on_to_the_same_numbers(sample, tmp_path, monkeypatch):
    settings = settings_of("nyud2", sample("nyud2"), method="robust", epochs=3, dropout=0.2)
    train_frozen(settings, tmp_path / "whole" / "robust" / "seed1")
    plain, calls = TrainingModule.training_step, []

    def step(self, batch, number):
        calls.append(number)
        if len(calls) == 8:  # three batches an epoch: in the middle of the third
            raise MemoryError("stands for a kill")
        return plain(self, batch, number)

    cut = tmp_path / "cut" / "robust" / "seed1"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", step)
        with pytest.raises(MemoryError):
            train_frozen(settings, cut)
    train_frozen(settings, cut, resume=True)
    first, second = (
        read_checkpoint(folder / "last.ckpt")["state_dict"] for folder in (tmp_path / "whole" / "robust" / "seed1", cut)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_features_of_other_weights_are_not_gone_on_with(sample, tmp_path):
    from qmf_examples.models.image_encoders import ImageEncoder

    weights = tmp_path / "weights.pth"
    run = tmp_path / "late" / "seed1"
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(ImageEncoder("tiny", "none").trunk.state_dict(), weights)
        settings = settings_of("nyud2", sample("nyud2"), method="late", epochs=1 + seed, weights=str(weights))
        if seed == 0:
            train_frozen(settings, run)
    heads._splits.clear()
    with pytest.raises(CommandError, match=r"--resume: .* other encoders see: the weights of tiny"):
        train_frozen(settings, run, resume=True)
    with pytest.raises(CommandError, match="was trained on what other encoders see: tiny, --weights"):
        evaluate_runs([run], NoisePlan(("gaussian",), (0.0,)))


def test_features_are_scaled_as_the_bench_scales_them():
    rows = np.random.default_rng(0).normal(3.0, 5.0, (40, 6))
    rows[:, 2] = 7.0
    scaled = Scaled(METHODS["late"].training.build(feature_heads({"a": 6}, 3, 40, 4, seed=0, steps=10)), {"a": 6})
    seen = []
    scaled.method.forward = lambda inputs: seen.append(inputs["a"])
    scaled.fit({"a": torch.from_numpy(rows).float()})
    other = np.concatenate([rows[:3], 1000 * rows[:3]])
    scaled({"a": torch.from_numpy(other).float()})
    expected = fit_each_feature(rows.astype(np.float32).astype(np.float64))(other)
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() == 50


def test_heads_are_trained_as_the_bench_trains_them():
    bench = {"hidden": FILES.hidden, "epochs": FILES.epochs, "learning_rate": FILES.learning_rate}
    bench |= {"weight_decay": FILES.weight_decay, "batch_size": FILES.batch_size}
    assert bench == {name: HEADS[name] for name in bench}
    for data_set, copies in (("nyud2", 1), ("mvsa", 0)):
        settings = resolve(data_set, {"frozen": True, "method": "tmc"})
        assert (settings.copies, settings.batch_size, settings.text_pooling) == (copies, 64, "mean")
        assert (settings.freeze, settings.regions) == ({}, 1)
    assert resolve("nyud2", {"frozen": True, "hidden": 0, "epochs": 7}).epochs == 7


def test_epochs_draw_copies_and_tests_do_not(sample, tmp_path):
    data = load_training(settings_of("nyud2", sample("nyud2")), tmp_path)
    which = list(range(len(data.train)))
    torch.manual_seed(0)
    drawn = [data.train.__getitems__(which)["inputs"]["rgb"] for _ in range(2)]
    same = (drawn[0] == drawn[1]).all(1).float().mean()
    assert 0.2 < same < 0.8
    first, again = (data.select.__getitems__([0, 1]) for _ in range(2))
    assert torch.equal(first["inputs"]["depth"], again["inputs"]["depth"])
    assert not set(first["index"].tolist()) & set(data.train.__getitems__(which)["index"].tolist())


def test_what_cannot_be_is_said_in_a_line(sample, tmp_path, capsys):
    train = ["train", "nyud2", "--quick", "--frozen", "--data-root", str(sample("nyud2")), "--output", str(tmp_path)]
    for extra, message in (
        (["--method", "late,mmtm"], "--method: mmtm cannot be trained on frozen encoders"),
        (["--freeze", "rgb=3"], "freeze is for encoders that are trained"),
        (["--copies", "2000"], "copies must be at most 1000"),
        (["--method", "bow"], "--method: bow cannot be trained on frozen encoders"),
    ):
        assert main([*train, *extra]) == 1
        assert message in capsys.readouterr().err
    assert main(["train", "nyud2", "--quick", "--method", "robust-logits", "--data-root", "x"]) == 1
    assert "robust-logits is none of nyud2's" in capsys.readouterr().err
    assert main(["train", "nyud2", "--quick", "--copies", "2", "--data-root", "x"]) == 1
    assert "copies are of frozen encoders' images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="load must be given"):
        train_run(settings_of("nyud2", "x"), tmp_path / "run")


def test_nothing_is_encoded_where_none_could_be_held_out(sample, tmp_path):
    settings = settings_of("nyud2", sample("nyud2"), validation=0.001)
    with pytest.raises(CommandError, match=r"--validation 0\.001: must hold out at least one sample"):
        load_training(settings, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_all_is_what_can_be_trained():
    assert set(methods_of("mvsa", frozen=True)) == {*ROWS["mvsa"], "robust-logits"} - set(NOT_FROZEN)
    assert choose_methods("nyud2", "all", frozen=True) == methods_of("nyud2", frozen=True)
    assert left_out("mvsa", "qmf, all").startswith("left out: bow and concatbow cannot be trained on frozen encoders")
    assert left_out("mvsa", "qmf") == ""


def encoded(split, said):
    """How often a split was encoded to its end; on a busy machine lines of progress come before."""
    return len(re.findall(rf"features of {split}, .*: \d+ rows, ", said))


def test_the_commands_train_and_test_without_encoding_twice(sample, tmp_path, capsys):
    runs = tmp_path / "runs"
    train = ["train", "nyud2", "--quick", "--frozen", "--data-root", str(sample("nyud2")), "--output", str(runs)]
    options = ["--epochs", "2", "--limit-batches", "1", "--method", "late,robust,robust-logits"]
    assert main([*train, *options]) == 0, capsys.readouterr().err
    assert encoded("train", capsys.readouterr().out) == 2
    evaluate = ["--noise", "gaussian", "--levels", "0,10", "--damage", "blur", "conflict", "gaussian:90"]
    assert main(["evaluate", str(runs), *evaluate]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    # Clean, noise, two damages; a conflict is other samples' clean features.
    assert encoded("test", said) == 4
    assert "Frozen encoders (tiny sees images), a hidden layer of 64 a modality" in " ".join(said.split())
    assert "robust against late fusion: wins" in " ".join(said.split())
    content = json.loads((runs / "evaluation" / "results.json").read_text())
    assert content["conditions"]["damages"] == ["blur", "gaussian90", "conflict"]
    cells = {(c["method"], c["noise"], c["level"]): c for c in content["cells"]}
    assert cells["robust", "gaussian", 0.0]["detection"] is None
    assert cells["late", "blur", 0.0]["detection"] is None
    for noise, level in (("gaussian", 10.0), ("gaussian90", 0.0), ("conflict", 0.0)):
        assert 0 <= cells["robust", noise, level]["detection"] <= 1
    assert cells["robust", "blur", 0.0]["against_late"]["other"] == "late"
    assert cells["robust", "blur", 0.0]["against_best_peer"]["other"] == "late"
    assert cells["late", "gaussian", 10.0]["published"]["table"] == "5"
    heads._splits.clear()
    assert main(["evaluate", str(runs / "late"), *evaluate]) == 0
    assert encoded("test", capsys.readouterr().out) == 0


def test_further_damages_need_frozen_encoders(sample, tmp_path, capsys):
    runs = ["--output", str(tmp_path)]
    train = ["train", "nyud2", "--quick", "--data-root", str(sample("nyud2")), "--method", "rgb", *runs]
    assert main([*train, "--epochs", "1", "--limit-batches", "1"]) == 0
    assert main(["evaluate", str(tmp_path), "--damage", "blur"]) == 1
    assert "--damage is for runs on frozen encoders" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path), "--damage", "fog"]) == 1
    assert "--damage: 'fog': the kind must be one of" in capsys.readouterr().err


def test_frozen_and_trained_encoders_make_no_table_together(sample, tmp_path, capsys):
    for name, method, kind in (("a", "mmtm", []), ("b", "robust-logits", ["--frozen"])):
        train = ["train", "nyud2", "--quick", "--data-root", str(sample("nyud2")), "--output", str(tmp_path / name)]
        assert main([*train, *kind, "--method", method, "--epochs", "1", "--limit-batches", "1"]) == 0
    for places in (("a", "b"), ("b", "a")):
        assert main(["evaluate", *(str(tmp_path / place) for place in places)]) == 1
        error = capsys.readouterr().err
        assert f"does not belong to {tmp_path / places[0]}" in error
        assert "frozen" in error
        assert error.count("\n") == 1
