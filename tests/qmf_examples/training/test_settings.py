"""The paper's defaults, YAML files, and what is said of settings that cannot be."""

import pytest

from qmf_examples.cli import main
from qmf_examples.commands.train_sets import choose_methods
from qmf_examples.errors import CommandError
from qmf_examples.training.settings import (
    ABLATION,
    METHODS,
    differences,
    load_run,
    read_settings,
    resolve,
    write_settings,
)


def test_defaults_are_the_papers_and_the_released_ones_where_it_has_none():
    nyud2 = resolve("nyud2")
    assert (nyud2.batch_size, nyud2.accumulate, nyud2.learning_rate, nyud2.weight_decay) == (256, 3, 1e-4, 1e-5)
    assert (nyud2.plateau_factor, nyud2.plateau_patience, nyud2.patience) == (0.3, 10, 20)
    assert (nyud2.load_size, nyud2.image_size, nyud2.dropout, nyud2.ranking_weight) == (256, 224, 0.1, 0.1)
    sunrgbd = resolve("sunrgbd")
    assert (sunrgbd.batch_size, sunrgbd.ranking_weight, sunrgbd.image_encoder) == (128, 0.1, "resnet18")
    assert (nyud2.joint_width, sunrgbd.joint_width) == (128, 128)
    for name in ("food101", "mvsa"):
        text = resolve(name)
        assert (text.batch_size, text.accumulate, text.learning_rate, text.warmup) == (16, 40, 1e-4, 0.1)
        assert (text.plateau_factor, text.plateau_patience, text.patience, text.epochs) == (0.5, 2, 5, 100)
        assert (text.max_tokens, text.freeze, text.image_encoder, text.regions) == (
            512,
            {"image": 3, "text": 5},
            "resnet152",
            3,
        )
        assert (text.dropout, text.joint_width) == (0.1, 0)
    for name in METHODS:
        settings = resolve(name)
        assert (settings.ranking_weight, settings.form, settings.update) == (0.1, "paper", "before")
        assert (settings.detach_weights, settings.sampling_count) == (False, None)


@pytest.mark.parametrize(
    ("data_set", "method", "batch_size", "weight_decay"),
    [
        ("nyud2", "tmc", 32, 1e-5),
        ("sunrgbd", "mmtm", 64, 1e-4),
        ("nyud2", "qmf", 256, 1e-5),
        ("mvsa", "tmc", 16, 0.0),
    ],
)
def test_some_methods_have_settings_of_their_own(data_set, method, batch_size, weight_decay):
    settings = resolve(data_set, {"method": method})
    assert (settings.batch_size, settings.weight_decay) == (batch_size, weight_decay)
    assert resolve(data_set, {"batch_size": 7}, {"method": method}).batch_size == 7


def test_each_method_of_a_plan_has_its_own_settings(tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr("qmf_examples.commands.train_sets._train_all", lambda plan, *_: plans.append(plan))
    for options in ([], ["--batch-size", "8"]):
        arguments = ["train", "nyud2", "--data-root", str(tmp_path), "--method", "tmc,mmtm,qmf", "--seeds", "1"]
        assert main([*arguments, "--output", str(tmp_path / "runs"), *options]) == 0
    assert [[settings.batch_size for settings in plan] for plan in plans] == [[32, 64, 256], [8, 8, 8]]


def test_later_layers_win_and_none_leaves_alone():
    settings = resolve("mvsa", {"epochs": 3, "warmup": 0.2}, {"epochs": 4, "warmup": None})
    assert (settings.epochs, settings.warmup) == (4, 0.2)


def test_a_run_reads_back_as_written(tmp_path):
    settings = resolve("mvsa", {"data_root": "x", "seed": 3, "freeze": "image=1", "learning_rate": "5e-5"})
    write_settings(tmp_path / "settings.yaml", settings)
    assert load_run(tmp_path) == settings
    assert differences(settings, load_run(tmp_path)) == []
    other = resolve("mvsa", {"data_root": "y", "seed": 3, "freeze": "image=1", "workers": 0})
    assert differences(other, settings) == ["learning_rate 5e-05, not 0.0001"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "no such setting: epoch"),
        ({"epochs": "many"}, "epochs must be of type int, got 'many'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 2.5}, "epochs must be of type int"),
        ({"method": "bert"}, "method must be one of rgb, depth"),
        ({"selection": "dev"}, "selection must be one of held-out, test"),
        ({"validation": 1.0}, "validation must lie between 0 and 1"),
        ({"dropout": -0.1}, "dropout must lie between 0 and 1"),
        ({"image_size": 300}, "image_size must be at most load_size"),
        ({"freeze": "text=3"}, "freeze names text; nyud2 has rgb, depth"),
        ({"freeze": "rgb"}, "freeze must be like image=3,text=5, or none; got 'rgb'"),
        ({"freeze": [1]}, r"freeze must map modalities to numbers of epochs, .* got \[1\]"),
        ({"freeze": {"rgb": "x"}}, "freeze must map modalities"),
        ({"freeze": {"rgb": -2}}, "freeze must map modalities"),
        ({"freeze": "rgb=-2"}, "freeze must map modalities"),
        ({"batch_size": True}, "batch_size must be of type int, got True"),
        ({"weights": ["a"]}, r"weights must be of type str, got \['a'\]"),
        ({"learning_rate": [1, 2]}, "learning_rate must be of type float"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"ranking_weight": -1}, "ranking_weight must be at least 0, got -1"),
        ({"weight_decay": float("inf")}, "weight_decay must be at least 0, got inf"),
        ({"alpha": 0}, "alpha must be below 0, got 0"),
        ({"alpha": "x"}, "alpha must be of type float"),
        ({"beta": -1}, "beta must be at least 0, got -1"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"start_epoch": 0}, "start_epoch must be at least 1, got 0"),
        ({"sampling_count": 0}, "sampling_count must be at least 1, got 0"),
        ({"update": "later"}, "update must be one of after, before, got 'later'"),
        ({"joint_width": -1}, "joint_width must be at least 0, got -1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"limit_batches": 0}, "limit_batches must be at least 1, got 0"),
        ({"seed": -4}, "seed must be at least 0, got -4"),
        ({"seed": 2**32}, "seed must be at most"),
        ({"data_set": "mvsa"}, "the settings are for 'mvsa', the command for nyud2"),
    ],
)
def test_what_cannot_be_is_named(given, message):
    with pytest.raises(CommandError, match=message):
        resolve("nyud2", given)


def test_yaml_holds_plain_values_only(tmp_path):
    file = tmp_path / "s.yaml"
    for content, message in (
        ("a: [", "not YAML"),
        ("- 1", "must be a mapping of settings, got list"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ):
        file.write_text(content)
        with pytest.raises(CommandError, match=message):
            read_settings(file)
    with pytest.raises(CommandError, match="No such file"):
        read_settings(tmp_path / "none.yaml")


def test_method_takes_names_and_groups():
    assert choose_methods("nyud2", "ablation, rgb,late") == (*ABLATION, "rgb")
    assert choose_methods("mvsa", "all") == METHODS["mvsa"]
    with pytest.raises(CommandError, match=r"--method: rgb is none of mvsa's: bow, .* all, ablation"):
        choose_methods("mvsa", "qmf,rgb")
