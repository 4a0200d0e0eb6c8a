"""Released defaults, YAML files, and what is said of settings that cannot be."""

import pytest

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


def test_defaults_are_the_released_ones():
    nyud2 = resolve("nyud2")
    assert (nyud2.batch_size, nyud2.accumulate, nyud2.learning_rate, nyud2.weight_decay) == (256, 3, 1e-4, 1e-5)
    assert (nyud2.plateau_factor, nyud2.plateau_patience, nyud2.patience) == (0.3, 10, 20)
    assert (nyud2.load_size, nyud2.image_size, nyud2.dropout, nyud2.ranking_weight) == (256, 224, 0.1, 0.1)
    sunrgbd = resolve("sunrgbd")
    assert (sunrgbd.batch_size, sunrgbd.ranking_weight, sunrgbd.backbone) == (128, 1.0, "resnet18")
    for name in ("food101", "mvsa"):
        text = resolve(name)
        assert (text.batch_size, text.accumulate, text.learning_rate, text.warmup) == (16, 40, 5e-5, 0.1)
        assert (text.plateau_factor, text.plateau_patience, text.patience, text.epochs) == (0.5, 2, 5, 100)
        assert (text.max_tokens, text.freeze, text.backbone, text.regions) == (
            512,
            {"image": 3, "text": 5},
            "resnet152",
            3,
        )


def test_later_layers_win_and_none_leaves_alone():
    settings = resolve("mvsa", {"epochs": 3, "warmup": 0.2}, {"epochs": 4, "warmup": None})
    assert (settings.epochs, settings.warmup) == (4, 0.2)


def test_a_run_reads_back_as_written(tmp_path):
    settings = resolve("mvsa", {"data_root": "x", "seed": 3, "freeze": "image=1", "learning_rate": "1e-4"})
    write_settings(tmp_path / "settings.yaml", settings)
    assert load_run(tmp_path) == settings
    assert differences(settings, load_run(tmp_path)) == []
    other = resolve("mvsa", {"data_root": "y", "seed": 3, "freeze": "image=1", "workers": 0})
    assert differences(other, settings) == ["learning_rate 0.0001, not 5e-05"]


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
