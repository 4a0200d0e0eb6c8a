"""What defines each method: squeezed channels, image tokens in BERT's input, cosine distance."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qmf_examples.errors import CommandError
from qmf_examples.models.image_encoders import ImageEncoder
from qmf_examples.models.learners import (
    Answer,
    AveragedHeads,
    FusedFeatures,
    Head,
    Joint,
    LateFusion,
    QualityAware,
    RankedAverage,
    cosine_distance,
)
from qmf_examples.models.methods import METHODS, Objective
from qmf_examples.models.mmbt import MultimodalBert
from qmf_examples.models.mmtm import MMTM, TwoStreams
from qmf_examples.models.text_encoders import BagOfWords, WordNumbers, load_text_encoder, pad
from qmf_examples.models.vocabulary import Vocabulary
from qmf_fusion import QualityAwareFusion
from qmf_fusion.conflict import degree_of_conflict
from qmf_fusion.evidential import evidential, evidential_loss


def tiny_heads(widths=(4, 6), classes=3):
    heads = {
        name: Head(nn.Linear(width, 8), nn.Linear(8, classes))
        for name, width in zip(("rgb", "depth"), widths, strict=True)
    }
    for head in heads.values():
        head.encoder.width = head.encoder.out_features
    return heads


def build(method, objective):
    """A method of the registry on the tiny heads."""
    sizes = {"modalities": ("rgb", "depth"), "num_classes": 3, "num_samples": 5, "seed": 0, "annealing_steps": 2}
    made = {"objective": objective, "heads": tiny_heads, "classifier": lambda width: nn.Linear(width, 3)}
    return METHODS[method].training.build(SimpleNamespace(**sizes, **made))


def tiny_inputs():
    generator = torch.Generator().manual_seed(1)
    return {"rgb": torch.randn(5, 4, generator=generator), "depth": torch.randn(5, 6, generator=generator)}


def test_squeeze_ratio_four_and_what_excites():
    transfer = MMTM(64, 64)
    assert transfer.squeeze.in_features == 128
    assert transfer.squeeze.out_features == 64
    first, second = torch.randn(2, 64, 7, 7), torch.randn(2, 64, 3, 5)
    a, b = transfer(first, second)
    gate = a[:, :, 0, 0] / first[:, :, 0, 0]
    torch.testing.assert_close(a, first * gate[:, :, None, None])
    assert gate.min() > 0
    assert gate.max() < 1
    # What the first stream becomes depends on the second.
    assert not torch.allclose(a, transfer(first, second + 1)[0])
    assert b.shape == second.shape


def test_two_streams_without_excitation_are_two_encoders():
    torch.manual_seed(0)
    streams = TwoStreams(ImageEncoder("tiny", "none"), ImageEncoder("tiny", "none")).eval()
    images = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    for transfer in streams.transfers:
        for layer in (transfer.excite_first, transfer.excite_second):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, 100.0)  # a gate of 1
    first, second = streams(*images)
    torch.testing.assert_close(first, streams.first(images[0]))
    torch.testing.assert_close(second, streams.second(images[1]))


def test_mmbt_puts_image_tokens_into_berts_input():
    torch.manual_seed(0)
    numbering = WordNumbers(Vocabulary(["red bean soup"]), 16, framed=True)
    text, image = load_text_encoder("tiny", numbering), ImageEncoder("tiny", "none", regions=3)
    network = MultimodalBert(text, image).eval()
    seen = {}
    text.model.encoder.register_forward_pre_hook(lambda module, given: seen.update(tokens=given[0]))
    images, rows = torch.randn(2, 3, 32, 32), [numbering("red bean soup"), numbering("soup")]
    out = network(images, **pad(rows))
    # [CLS] 3 regions [SEP], then the text without its own [CLS].
    assert seen["tokens"].shape == (2, 5 + len(rows[0]) - 1, text.width)
    table = text.model.embeddings
    regions = network.into_words(image.look(images))
    expected = regions + table.position_embeddings.weight[1:4] + table.token_type_embeddings.weight[0]
    torch.testing.assert_close(seen["tokens"][:, 1:4], table.LayerNorm(expected))
    first_word = table.word_embeddings.weight[rows[0][1]]
    expected = first_word + table.position_embeddings.weight[0] + table.token_type_embeddings.weight[1]
    torch.testing.assert_close(seen["tokens"][0, 5], table.LayerNorm(expected))
    # Padding changes nothing; the image does.
    torch.testing.assert_close(out[1:], network(images[1:], **pad(rows[1:])))
    assert not torch.allclose(out, network(images + 1, **pad(rows)))


def test_alignment_adds_the_cosine_distance():
    torch.manual_seed(0)
    encoders = {"rgb": nn.Linear(4, 8), "depth": nn.Linear(6, 8)}
    target, index = torch.tensor([0, 1, 2, 0, 1]), torch.arange(5)
    head = nn.Linear(16, 3)
    plain, aligned = Joint(encoders, head), Joint(encoders, head, alignment=2.0)
    answer = plain(tiny_inputs())
    a, b = (x.double() for x in answer.features)
    distance = (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
    gap = aligned.loss(answer, target, index) - plain.loss(answer, target, index)
    assert abs(gap.item() - 2 * distance.item()) < 1e-5
    assert cosine_distance(a, 3 * a).abs().max() < 1e-6


def test_late_fusion_is_the_mean_and_trains_on_all_three():
    torch.manual_seed(0)
    learner = LateFusion(tiny_heads())
    answer = learner(tiny_inputs())
    target = torch.tensor([0, 1, 2, 0, 1])
    a, b = answer.unimodal_logits
    torch.testing.assert_close(answer.scores, (a + b) / 2)
    expected = sum(F.cross_entropy(x, target) for x in (a, b, (a + b) / 2))
    torch.testing.assert_close(learner.loss(answer, target, torch.arange(5)), expected)


def test_averaged_heads_answer_with_the_mean_of_probabilities():
    learner, target = AveragedHeads(tiny_heads()), torch.tensor([0, 1, 2, 0, 1])
    answer = learner(tiny_inputs())
    a, b = answer.unimodal_logits
    mean = (a.softmax(-1) + b.softmax(-1)) / 2
    torch.testing.assert_close(answer.scores.exp(), mean)
    expected = F.nll_loss(mean.log(), target) + F.cross_entropy(a, target) + F.cross_entropy(b, target)
    torch.testing.assert_close(learner.loss(answer, target, torch.arange(5)), expected)


def test_the_ranking_alone_moves_the_training_of_late_fusion_and_not_its_answer():
    torch.manual_seed(0)
    late, ranked = LateFusion(tiny_heads()), build("ranking-only", Objective(0.5, "margin", "all"))
    assert isinstance(ranked, RankedAverage)
    ranked.heads.load_state_dict(late.heads.state_dict())
    target, index = torch.tensor([0, 1, 2, 0, 1]), torch.arange(5)
    answer = ranked(tiny_inputs())
    torch.testing.assert_close(answer.scores, late(tiny_inputs()).scores)
    plain = late.loss(late(tiny_inputs()), target, index)
    torch.testing.assert_close(ranked.loss(answer, target, index), plain)  # the first visit: nothing to compare with
    second = ranked.loss(ranked(tiny_inputs()), target, index)
    # Float64, by the definition: pairs in their losses' order, a hinge on weights and scaled losses, the mean over 10.
    expected = 0.0
    for x in (logits.detach().double() for logits in answer.unimodal_logits):
        kappa, weight = F.cross_entropy(x, target, reduction="none"), 0.1 * x.logsumexp(-1)
        kappa = (kappa - kappa.min()) / (kappa.max() - kappa.min())
        pairs = [(i, j) for i in range(5) for j in range(5) if kappa[i] > kappa[j]]
        assert len(pairs) == 10
        expected += sum((weight[i] + kappa[i] - weight[j] - kappa[j]).clamp_min(0).item() for i, j in pairs) / 10
    assert expected > 0
    assert abs((second - plain).item() - 0.5 * expected) < 1e-5
    (second - plain).backward()
    assert all(p.grad is not None for p in ranked.heads.parameters())


@pytest.mark.parametrize("method", ["qmf", "energy", "msp", "entropy", "evidence"])
def test_weights_come_from_the_uncertainty_asked_for(method):
    torch.manual_seed(0)
    learner = build(method, Objective(0.1, "released", "adjacent"))
    assert isinstance(learner, QualityAware)
    answer = learner(tiny_inputs())
    x = answer.unimodal_logits[0].double()
    p = x.softmax(-1)
    expected = {
        "qmf": 0.1 * x.logsumexp(-1),
        "energy": 0.1 * x.logsumexp(-1),
        "msp": p.amax(-1),
        "entropy": 1 + (p * p.log()).sum(-1) / np.log(3),
        "evidence": 1 - 3 / (F.softplus(x) + 1).sum(-1),
    }[method]
    torch.testing.assert_close(answer.weights[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert learner.criterion.ranking_weight == (0.1 if method == "qmf" else 0.0)
    learner.loss(answer, torch.tensor([0, 1, 2, 0, 1]), torch.arange(5)).backward()
    assert learner.criterion.ranking.trajectory.count.sum() == 10
    assert isinstance(answer, Answer)


@pytest.mark.parametrize("method", ["tmc", "etmc", "rcml"])
def test_a_rule_with_its_own_objective_trains_by_that_alone(method):
    learner = build(method, Objective(0.7, "margin", "all"))
    rule, target = learner.model.fusion.rule, torch.tensor([0, 1, 2, 0, 1])
    assert rule.annealing_steps == 2
    answer = learner(tiny_inputs())
    for steps in (0, 1, 2, 3):
        assert rule.steps == steps
        rows = torch.stack([*(evidential(x) for x in answer.unimodal_logits), answer.scores])
        each = evidential_loss(rows, F.one_hot(target, 3), min(1.0, steps / 2)).mean(1)
        expected = each.sum()
        if method == "rcml":
            expected = each.mean() + degree_of_conflict(learner.model.fusion, answer.unimodal_logits).mean()
        torch.testing.assert_close(learner.loss(answer, target, torch.arange(5)), expected)
    # Weights are held against what the evidence says, not against a softmax of what it is made of.
    losses = learner.unimodal_losses(answer, target)
    means = (F.softplus(torch.stack(answer.unimodal_logits)) + 1).log().log_softmax(-1)
    torch.testing.assert_close(losses, -means[:, torch.arange(5), target])


@pytest.mark.parametrize("rule", ["product_of_experts", "noisy_or", "entropy_weights"])
def test_a_rule_without_its_own_objective_trains_by_eq_18_without_the_ranking(rule):
    learner, target = build(rule, Objective(0.7, "margin", "all")), torch.tensor([0, 1, 2, 0, 1])
    answer = learner(tiny_inputs())
    torch.testing.assert_close(answer.scores, QualityAwareFusion(2, combine=rule)(answer.unimodal_logits).logits)
    losses = [F.cross_entropy(x, target) for x in (answer.scores, *answer.unimodal_logits)]
    for _ in range(2):
        torch.testing.assert_close(learner.loss(answer, target, torch.arange(5)), sum(losses))


def test_pdfs_networks_see_what_the_encoders_make():
    torch.manual_seed(0)
    learner, seen, target = build("pdf", Objective(0.7)), [], torch.tensor([0, 1, 2, 0, 1])
    assert isinstance(learner, FusedFeatures)
    for encoder in learner.encoders.values():
        encoder.register_forward_hook(lambda _, __, out: seen.append(out))
    answer = learner(tiny_inputs())
    assert len(seen) == 2
    rule = learner.model.fusion.rule
    assert [network[0].in_features for network in rule.networks] == [8, 8]
    predicted = [network(x).sigmoid().squeeze(1) for network, x in zip(rule.networks, seen, strict=True)]
    uncertainty = learner.model.fusion.uncertainties(answer.unimodal_logits, answer.features)
    torch.testing.assert_close(1 - uncertainty, torch.stack(predicted))
    rows = torch.stack(answer.unimodal_logits)
    torch.testing.assert_close(answer.scores, (answer.weights.unsqueeze(-1) * rows).sum(0))
    true = [x.softmax(-1)[torch.arange(5), target] for x in answer.unimodal_logits]
    missed = sum(F.l1_loss(p, t) for p, t in zip(predicted, true, strict=True))
    out = learner.criterion(answer.unimodal_logits, target, torch.arange(5), features=answer.features)
    torch.testing.assert_close(out.loss - out.fused_loss - out.unimodal_losses.sum(), missed)
    learner.loss(answer, target, torch.arange(5)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.parameters())


def test_the_pseudo_view_sees_all_features_of_encoders_that_run_once():
    torch.manual_seed(0)
    learner, seen = build("etmc", Objective()), []
    assert isinstance(learner, FusedFeatures)
    for encoder in learner.encoders.values():
        encoder.register_forward_hook(lambda _, __, out: seen.append(out))
    answer = learner(tiny_inputs())
    assert len(seen) == 2
    heads = learner.model.heads
    expected = [heads["rgb"](seen[0]), heads["depth"](seen[1]), heads["joint"](torch.cat(seen, 1))]
    for x, y in zip(answer.unimodal_logits, expected, strict=True):
        torch.testing.assert_close(x, y.logits)
    assert answer.weights.shape == (3, 5)
    learner.loss(answer, torch.tensor([0, 1, 2, 0, 1]), torch.arange(5)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.parameters())


def test_bag_of_words_sums_vectors_and_keeps_given_ones(tmp_path):
    vocabulary = Vocabulary(["red bean soup", "bean"])
    file = tmp_path / "glove.txt"
    file.write_text("bean 1 2\nsoup 10 20\nother 5 5\n")
    bag = BagOfWords(vocabulary, file)
    rows = pad([vocabulary.encode("bean bean soup"), vocabulary.encode("red")])
    assert bag(rows["input_ids"]).tolist() == [[12, 24], [0, 0]]
    assert not bag.words.weight.requires_grad
    file.write_text("bean 1 2\nsoup 10\n")
    with pytest.raises(CommandError, match="vectors of one width"):
        BagOfWords(vocabulary, file)
    file.write_text("bean one two\n")
    with pytest.raises(CommandError, match="line 1: must be a word and numbers"):
        BagOfWords(vocabulary, file)


def test_weights_from_a_file_and_what_is_said_of_wrong_ones(tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder = ImageEncoder("tiny", "none")
    state = {**encoder.trunk.state_dict(), "fc.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": {f"module.{name}": x for name, x in state.items()}}, tmp_path / "w.pth")
    same = ImageEncoder("tiny", str(tmp_path / "w.pth"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(same.eval()(images), encoder.eval()(images), rtol=0, atol=0)
    with pytest.raises(CommandError, match="weights are of another network"):
        ImageEncoder("resnet18", str(tmp_path / "w.pth"))
    with pytest.raises(CommandError, match=r"no file .*none.pth: --weights must be imagenet"):
        ImageEncoder("tiny", str(tmp_path / "none.pth"))
    torch.save({"code": print}, tmp_path / "code.pth")
    with pytest.raises(CommandError, match="not a file of weights alone"):
        ImageEncoder("tiny", str(tmp_path / "code.pth"))

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(CommandError, match=r"no network.*go online.*timm/resnet18.tv_in1k .* --weights FILE"):
        ImageEncoder("resnet18", "imagenet")


def test_a_text_encoder_that_is_not_there_names_both_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    numbering = WordNumbers(Vocabulary(["a"]), 8, framed=True)
    assert load_text_encoder("tiny", numbering).width == 32
    from qmf_examples.models.text_encoders import load_numbering

    with pytest.raises(CommandError, match=r"--text-encoder .*nowhere: .*go online.*or give the folder"):
        load_numbering(str(tmp_path / "nowhere"), [], 8)


def test_an_objectives_options_reach_layer_ranking_and_trajectory():
    objective = Objective(0.7, "margin", "all", True, -0.3, 0.2, 2.0, 3, 4, "before")
    for method in ("qmf", "energy", "ranking-only"):
        learner = build(method, objective)
        fusion = learner.fusion if method == "ranking-only" else learner.model.fusion
        found = [getattr(fusion.rule.coefficients, f"fixed_{name}") for name in ("alpha", "beta", "temperature")]
        assert [float(x.flatten()[0]) for x in found] == pytest.approx([-0.3, 0.2, 2.0])
        assert fusion.rule.options.detach
        ranking = learner.ranking if method == "ranking-only" else learner.criterion.ranking
        assert (ranking.form, ranking.pairs, ranking.update) == ("margin", "all", "before")
        assert (ranking.trajectory.start_epoch, ranking.trajectory.sampling_count) == (3, 4)
        weight = learner.ranking_weight if method == "ranking-only" else learner.criterion.ranking_weight
        assert weight == (0.0 if method == "energy" else 0.7)


def test_concatenation_joins_so_many_features_of_each_modality():
    torch.manual_seed(0)
    encoders = {"rgb": nn.Linear(4, 8), "depth": nn.Linear(6, 10)}
    for encoder in encoders.values():
        encoder.width = encoder.out_features
    learner = Joint(encoders, nn.Linear(10, 3), alignment=1.0, width=5)
    answer = learner(tiny_inputs())
    assert [x.shape[1] for x in answer.features] == [5, 5]
    expected = torch.relu(learner.narrow["depth"][0](encoders["depth"](tiny_inputs()["depth"])))
    torch.testing.assert_close(answer.features[1], expected)
    learner.loss(answer, torch.tensor([0, 1, 2, 0, 1]), torch.arange(5)).backward()
    assert all(p.grad is not None for p in learner.parameters())
