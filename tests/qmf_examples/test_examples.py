"""The files to copy: each runs on a made-up sample of its data set and says how well it does."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("transformers")
pytest.importorskip("timm")
FOLDER = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "options", "tests"),
    [
        ("nyud2", ["--epochs", "2"], ["clean", "rgb noisy", "depth noisy"]),
        ("nyud2", ["--epochs", "1", "--robust"], ["clean", "rgb noisy", "depth noisy"]),
        ("sunrgbd", ["--epochs", "1"], ["rgb and depth", "rgb", "depth"]),
        ("food101", ["--epochs", "1", "--accumulate", "4"], [""]),
        ("mvsa", ["--epochs", "2"], ["text", "image", "mean of logits", "fused"]),
        # Of 15 samples one is left over.
        ("mvsa", ["--epochs", "1", "--robust", "--batch-size", "7"], ["text", "image", "mean of logits", "fused"]),
    ],
)
def test_an_example_trains_and_tests(name, options, tests, sample, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(sample(name)), "--size", "32", *options])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    accuracies = re.findall(r"^test(?:,| with)? ?(.*?): accuracy ([\d.]+) %", said, re.MULTILINE)
    assert [what for what, _ in accuracies] == tests
    assert all(0 <= float(accuracy) <= 100 for _, accuracy in accuracies)
    losses = [float(loss) for loss in re.findall(r"loss of the last batch ([\d.]+)", said)]
    assert len(losses) == int(options[1])
    assert losses == sorted(losses, reverse=True)
    if name == "mvsa":
        assert re.search(r"^on dev: .+\.$", said, re.MULTILINE)


def test_an_example_takes_pretrained_encoders_from_files(sample, tmp_path, monkeypatch, capsys):
    """Random ones, saved as Transformers and timm save pretrained ones; the heads on them are new."""
    import timm
    from safetensors.torch import save_model
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "text")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=15, **shape)).save_pretrained(tmp_path / "text")
    image = timm.create_model("test_efficientnet", num_classes=7)
    save_model(image, tmp_path / "image.safetensors")
    options = ["--text-encoder", tmp_path / "text", "--image-encoder", "test_efficientnet"]
    options += ["--weights", tmp_path / "image.safetensors", "--epochs", 0, "--size", 32]
    monkeypatch.setattr(sys, "argv", ["mvsa.py", str(sample("mvsa")), *map(str, options)])
    ran = runpy.run_path(str(FOLDER / "mvsa.py"))
    made = ran["make_image_head"]("test_efficientnet", str(tmp_path / "image.safetensors"), 3)
    assert made.get_classifier().out_features == 3
    assert torch.equal(made.conv_stem.weight, image.conv_stem.weight)
    ran["main"]()
    assert "test, fused: accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_whole_and_short(path):
    text = path.read_text()
    assert "qmf_examples" not in text
    assert len(text.splitlines()) <= 160
