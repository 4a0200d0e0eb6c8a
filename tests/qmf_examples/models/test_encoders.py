"""Encoders from timm and Transformers: their transforms, poolings, regions and weights, and what they cannot do."""

import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform
from timm.data.config import resolve_data_config
from torchvision.transforms import v2
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from qmf_examples.data.pixels import Normal, stack, to_pixels
from qmf_examples.errors import CommandError
from qmf_examples.models.image_encoders import ImageEncoder
from qmf_examples.models.image_transforms import encoder_config, encoder_transform
from qmf_examples.models.mmbt import MultimodalBert
from qmf_examples.models.mmtm import TwoStreams
from qmf_examples.models.text_encoders import TextEncoder, load_numbering, load_text_encoder, pad
from qmf_examples.training.image_preparation import resize, transform_of
from qmf_examples.training.settings import resolve

SMALL = "mobilenetv3_small_050"
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sad", "happy", "the", "map", "##s"]
SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_torchvisions_weights_give_torchvisions_features(prefix, tmp_path):
    theirs = torchvision.models.resnet18()
    torch.save({"state_dict": {prefix + key: x for key, x in theirs.state_dict().items()}}, tmp_path / "w.pth")
    theirs.fc = torch.nn.Identity()
    ours = ImageEncoder("resnet18", str(tmp_path / "w.pth"))
    torch.testing.assert_close(ours.eval()(IMAGES), theirs.eval()(IMAGES), rtol=0, atol=0)


def test_weights_under_timms_names_are_loaded_strictly_but_for_the_classifier(tmp_path):
    whole = timm.create_model(SMALL, num_classes=7).eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    encoder = ImageEncoder(SMALL, str(tmp_path / "w.safetensors")).eval()
    expected = whole.forward_head(whole.forward_features(IMAGES), pre_logits=True)
    torch.testing.assert_close(encoder(IMAGES), expected)
    assert encoder.width == expected.shape[1]
    state = whole.state_dict()
    state.pop("conv_stem.weight")
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(CommandError, match=r"less.safetensors: the weights are of another network .*conv_stem.weight"):
        ImageEncoder(SMALL, str(tmp_path / "less.safetensors"))


def test_regions_are_pooled_from_the_last_map_of_any_convolutional_model():
    encoder = ImageEncoder(SMALL, "none", regions=3).eval()
    found = encoder.trunk.forward_features(IMAGES.repeat(1, 1, 3, 1))
    rows = found.shape[2] // 3
    expected = torch.stack([found[:, :, n * rows : (n + 1) * rows].mean((2, 3)) for n in range(3)], 1)
    torch.testing.assert_close(encoder.look(IMAGES.repeat(1, 1, 3, 1)), expected)
    with pytest.raises(CommandError, match=r"vit_tiny.*--regions 3 needs a convolutional model.*--regions 1"):
        ImageEncoder("vit_tiny_patch16_224", "none", regions=3)
    with pytest.raises(CommandError, match="does not take images of 64 x 64 pixels"):
        ImageEncoder("vit_tiny_patch16_224", "none")(IMAGES)


def test_models_that_are_not_there_or_lack_what_a_method_needs():
    with pytest.raises(CommandError, match=r"got 'efficientnetlite0' \(is it efficientnet_lite0"):
        ImageEncoder("efficientnetlite0", "none")
    with pytest.raises(CommandError, match="Invalid pretrained tag"):
        ImageEncoder("resnet18.nonsense", "none")
    with pytest.raises(CommandError, match=f"mmtm needs the stages of a ResNet as its image encoder, got {SMALL}"):
        TwoStreams(ImageEncoder(SMALL, "none"), ImageEncoder(SMALL, "none"))


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet50", "vit_base_patch16_siglip_224"])
def test_an_encoders_own_transform_is_timms(name):
    settings = resolve("mvsa", {"data_root": "x", "image_encoder": name, "transform": "encoder"})
    made = transform_of(settings)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 410, 3), np.uint8))
    cut = v2.Compose([resize(made), v2.CenterCrop(made.image_size)])(image)
    ours = stack([Normal(to_pixels(cut), made.mean, made.std)])[0]
    config = resolve_data_config(pretrained_cfg=encoder_config(name))
    theirs = create_transform(**config, is_training=False)(image)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_which_transform_an_encoder_has_unless_told_otherwise():
    paper = resolve("nyud2", {"data_root": "x"})
    assert (paper.transform, paper.load_size, paper.image_size) == ("released", 256, 224)
    assert (transform_of(paper).squash, transform_of(paper).mean) == (True, (0.4951, 0.3601, 0.4587))
    other = resolve("nyud2", {"data_root": "x", "image_encoder": "tf_efficientnet_b3"})
    assert (other.transform, other.load_size, other.image_size) == ("encoder", 331, 300)
    assert (
        resolve("nyud2", {"data_root": "x", "image_encoder": "tf_efficientnet_b3", "image_size": 96}).image_size == 96
    )
    told = resolve("nyud2", {"data_root": "x", "image_encoder": "tf_efficientnet_b3", "transform": "released"})
    assert (told.load_size, told.image_size) == (256, 224)
    with pytest.raises(CommandError, match="the tiny image encoder has no transform of its own"):
        encoder_transform("tiny")
    with pytest.raises(CommandError, match="transform must be one of released, encoder, got 'own'"):
        resolve("nyud2", {"data_root": "x", "transform": "own"})
    with pytest.raises(CommandError, match="no such setting: backbone"):
        resolve("nyud2", {"data_root": "x", "backbone": "resnet18"})


@pytest.fixture
def folder(tmp_path):
    """Of a text encoder: its tokenizer, to which ``save`` adds the model."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return tmp_path


def test_texts_are_pooled_by_mean_first_and_pooler(folder):
    bert = BertModel(BertConfig(intermediate_size=64, **SIZES)).eval()
    bert.save_pretrained(folder)
    numbering = load_numbering(str(folder), [], 16)
    batch = pad([numbering("happy map"), numbering("sad")])
    tokens = bert(**batch).last_hidden_state
    expected = {
        "mean": torch.stack([tokens[0].mean(0), tokens[1, :3].mean(0)]),
        "first": tokens[:, 0],
        "pooler": bert(**batch).pooler_output,
    }
    for pooling, wanted in expected.items():
        encoder = load_text_encoder(str(folder), numbering, pooling).eval()
        torch.testing.assert_close(encoder(**batch), wanted)
        assert encoder.width == 32


def test_a_model_without_a_pooler_is_pooled_otherwise_and_is_none_for_mmbt(folder):
    sizes = {"vocab_size": len(WORDS), "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}
    DistilBertModel(DistilBertConfig(**sizes)).save_pretrained(folder)
    numbering = load_numbering(str(folder), [], 16)
    with pytest.raises(
        CommandError, match="DistilBertModel without a trained pooler: give --text-pooling mean or first"
    ):
        load_text_encoder(str(folder), numbering)
    encoder = load_text_encoder(str(folder), numbering, "mean")
    assert encoder(**pad([numbering("happy map")])).shape == (1, 32)
    with pytest.raises(CommandError, match=r"mmbt needs a BERT .*got a DistilBertModel"):
        MultimodalBert(encoder, ImageEncoder("tiny", "none"))


def test_weights_that_a_file_lacks_are_not_drawn_at_random(folder):
    bert = BertModel(BertConfig(intermediate_size=64, **SIZES), add_pooling_layer=False)
    bert.save_pretrained(folder)
    numbering = load_numbering(str(folder), [], 16)
    with pytest.raises(CommandError, match="BertModel without a trained pooler"):
        load_text_encoder(str(folder), numbering, "pooler")
    assert isinstance(load_text_encoder(str(folder), numbering, "mean"), TextEncoder)
    state = {key: x for key, x in bert.state_dict().items() if "word_embeddings" not in key}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CommandError, match=r"its file lacks weights of the BertModel, embeddings.word_embeddings.weight"
    ):
        load_text_encoder(str(folder), numbering, "mean")
