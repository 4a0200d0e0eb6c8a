"""Each rule against numbers that its authors' code gave on these inputs.

Each repository's own functions were run, at the commit that stands beside its numbers, in float64 and with
``torch.Tensor.cuda`` made the identity: the encoders and classifiers before them gave ``LOGITS`` and ``FEATURES``. No
line of theirs is here.
``pytest -rP`` on this file prints the largest difference of each.
"""

import math

import pytest
import torch
from torch import nn

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_fusion.conflict import degree_of_conflict
from qmf_fusion.rules import PDF, RCML, TMC, EntropyWeights, NoisyOr, ProductOfExperts

# Three modalities, four samples, three classes.
LOGITS = torch.tensor(
    [
        [[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [6.0, 1.0, -3.0], [-2.0, 0.25, 1.5]],
        [[-0.5, 1.0, 3.0], [1.5, -0.5, 0.25], [0.1, 0.2, 0.3], [-4.0, 2.0, 0.0]],
        [[1.0, 1.25, -2.0], [0.0, 5.0, 0.0], [-1.0, -1.0, 2.0], [0.5, 0.5, 0.0]],
    ],
    dtype=torch.float64,
)
TARGET = torch.tensor([0, 1, 2, 2])
# Of the first two modalities.
FEATURES = torch.tensor(
    [[[1.0, -0.5], [0.2, 0.8], [-1.5, 0.3], [0.0, 2.0]], [[0.4, 0.4], [-2.0, 1.0], [0.7, -0.1], [1.1, 0.6]]],
    dtype=torch.float64,
)


def agrees(what, got, expected, within=1e-10):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert got.shape == expected.shape
    difference = float((got.detach() - expected).abs().max())
    print(f"{what}: {difference:.1e}")
    assert difference <= within, what


def fuse(rule):
    return QualityAwareFusion(rule.num_modalities, combine=rule)(LOGITS[: rule.num_modalities])


# hanmenghan/TMC, commit 08d0ca4c, "TMC ICLR/model.py": DS_Combin, ce_loss and TMC.forward with lambda_epochs=50.
DEMPSTER = {
    2: [
        [2.937114200904228, 1.7636548991647745, 5.012517260230706],
        [2.7876703974096984, 1.2767592063909863, 1.7099191271729017],
        [8.23627996260775, 2.460788956392466, 0.9167795489195565],
        [0.14584585037784237, 3.538438660110115, 2.787670397409697],
    ],
    3: [
        [5.5361090723935265, 4.148545508014421, 5.351521553326897],
        [4.124906203401295, 8.414264526534286, 2.7981415150613205],
        [9.409578636778985, 3.0310076109459256, 3.6936822608119773],
        [1.167277863255026, 5.661419530539008, 4.124906203401293],
    ],
}
TMC_LOSSES = {10: 5.596792099445888, 50: 7.802769809110115}
TMC_TERMS = [1.540420480368704, 1.712195616105935, 0.9713566009732999, 1.3728194019979487]


@pytest.mark.parametrize("modalities", [2, 3])
def test_tmc_evidence(modalities):
    agrees(f"TMC, evidence of {modalities}", torch.expm1(fuse(TMC(modalities)).logits), DEMPSTER[modalities])


@pytest.mark.parametrize("step", [10, 50])
def test_tmc_loss(step):
    rule = TMC(3, annealing_steps=50)
    rule.steps.fill_(step)
    out = QMFLoss(QualityAwareFusion(3, combine=rule).eval(), ranking_weight=0).eval()(LOGITS, TARGET)
    # 10 / 50 is in float32.
    agrees(f"TMC, loss at {step} of 50", out.loss, TMC_LOSSES[step], within=1e-7)
    if step == 10:
        terms = torch.cat([out.unimodal_losses, out.fused_loss.view(1)])
        agrees("TMC, its terms", terms, TMC_TERMS, within=1e-7)


# jiajunsi/RCML, commit c9c5ab41, model.py (RCML.forward) and loss_function.py (get_loss with gamma=1, get_dc_loss).
AVERAGE = [
    [1.3068820925648814, 1.1575953844317979, 1.0691300894599485],
    [0.945213704915647, 2.795163715429572, 0.7263452403896699],
    [1.8433489300619368, 0.6844809829840651, 1.2891996545320537],
    [0.5233079768302489, 1.2252553498205074, 0.945213704915647],
]
CONFLICT = {2: 0.14100101366866777, 3: 0.23355667967008867}
RCML_LOSSES = {
    (2, 10): 1.7548853756889362,
    (2, 50): 2.17695384118256,
    (3, 10): 1.585466111025139,
    (3, 50): 1.9131216112801093,
}


def test_rcml_evidence():
    agrees("RCML, evidence of 3", torch.expm1(fuse(RCML(3)).logits), AVERAGE)


@pytest.mark.parametrize(("modalities", "step"), RCML_LOSSES)
def test_rcml_loss(modalities, step):
    rule = RCML(modalities, annealing_steps=50)
    rule.steps.fill_(step)
    fusion = QualityAwareFusion(modalities, combine=rule).eval()
    loss = QMFLoss(fusion, ranking_weight=0).eval()(LOGITS[:modalities], TARGET).loss
    # Their log-gamma of K is in float32.
    agrees(f"RCML, loss of {modalities} at {step} of 50", loss, RCML_LOSSES[modalities, step], within=1e-6)
    degree = degree_of_conflict(fusion, LOGITS[:modalities]).mean()
    agrees(f"RCML, conflict of {modalities}", degree, CONFLICT[modalities])


# Yinan-Xia/PDF, commit 86486742, src/models/latefusion_pdf.py (forward, "pdf_test" and "pdf_train") and train_pdf.py
# (model_forward), with confidence networks of width 2 and the weights of ``networks`` below.
CONFIDENCE = [
    [0.5533421530783043, 0.7518474555250059, 0.5624748531475253, 0.8881193510320693],
    [0.7495175390430572, 0.4649453599063568, 0.6209089792192309, 0.8932899539397615],
]
BELIEF = [
    [0.34017758630631423, 0.32381114085650875, 0.7222435149651707, 0.41791829756170806],
    [0.6598224136936858, 0.6761888591434912, 0.27775648503482925, 0.5820817024382919],
]
FUSED = [
    [0.35044396576578557, 0.31964482738737154, 2.1495560342342146],
    [1.0142832887152369, -0.3380944295717456, 0.1690472147858728],
    [4.361236738294507, 0.7777948119721365, -2.0834035993850635],
    [-3.164163404876584, 1.2686429792670109, 0.6268774463425622],
]
FUSED_IN_TRAINING = [
    [0.419906255565717, 0.2640749955474264, 2.080093744434283],
    [0.4831397935059124, -0.16104659783530414, 0.08052329891765207],
    [2.8256609527631342, 0.5695811461373741, -1.2245222278166683],
    [-3.0151225011106653, 1.138232188471832, 0.7386581241670012],
]
PDF_LOSS = 7.925245547499196
PDF_GRADS = (
    [
        [-0.08560712433297465, 0.08064001431956104],
        [-0.09491224654308059, 0.08940523326733943],
        [-0.10421736875318655, 0.09817045221511779],
        [-0.11352249096329248, 0.10693567116289616],
    ],
    [0.19180405019800634],
)


def networks():
    """PDF of two modalities with features, whose networks have fixed weights."""
    rule = PDF(2, num_classes=3, features=[2, 2]).double()
    for m, network in enumerate(rule.networks):
        for n, layer in enumerate(each for each in network if isinstance(each, nn.Linear)):
            with torch.no_grad():
                line = torch.linspace(-0.6, 0.9, layer.weight.numel(), dtype=torch.float64)
                layer.weight.copy_(line.view_as(layer.weight) + 0.1 * m * (n + 1))
                layer.bias.copy_(torch.linspace(-0.2, 0.3, layer.bias.numel(), dtype=torch.float64) - 0.1 * m)
    return QualityAwareFusion(2, combine=rule)


def test_pdf():
    fusion = networks()
    logits, features = list(LOGITS[:2]), list(FEATURES)
    agrees("PDF, confidence", 1 - fusion.uncertainties(logits, features), CONFIDENCE)
    out = fusion(logits, features=features)
    # They add 1e-8 to a denominator.
    agrees("PDF, weights in the test", out.weights, BELIEF, within=1e-7)
    agrees("PDF, fused in the test", out.logits, FUSED, within=1e-7)
    res = QMFLoss(fusion, ranking_weight=0)(logits, TARGET, features=features)
    agrees("PDF, fused in training", res.logits, FUSED_IN_TRAINING, within=1e-7)
    agrees("PDF, loss", res.loss, PDF_LOSS, within=1e-7)
    res.loss.backward()
    first, second = fusion.rule.networks
    agrees("PDF, a gradient of the first network", first[0].weight.grad, PDF_GRADS[0])
    agrees("PDF, a gradient of the second network", second[2].bias.grad, PDF_GRADS[1])


# Jamie725/Multimodal-Object-Detection-via-Probabilistic-Ensembling, commit 65494f9a, demo/FLIR/demo_probEn.py:
# bayesian_fusion_multiclass, which returns the largest score and its class, the background being the last.
PROBEN = {
    2: [(0.8192988218598652, 2), (0.6363716838484414, 0), (0.9764004103349545, 0), (0.6337027042473331, 1)],
    3: [(0.538711612860053, 0), (0.9344501455492438, 1), (0.8826666257840627, 0), (0.7403601864879263, 1)],
}


@pytest.mark.parametrize("modalities", [2, 3])
def test_product_of_experts(modalities):
    background = torch.tensor([0.3, -0.2, 1.0, 0.0], dtype=torch.float64).view(1, 4, 1).expand(3, 4, 1)
    logits = torch.cat([LOGITS, background], -1)[:modalities]
    best = QualityAwareFusion(modalities, combine=ProductOfExperts(modalities))(logits).logits.exp().max(-1)
    agrees(f"product of experts, score of {modalities}", best.values, [score for score, _ in PROBEN[modalities]])
    assert best.indices.tolist() == [label for _, label in PROBEN[modalities]]


# GT-RIPL/UNO-IC, commit 6a95f2c6, segmentation/ptsemseg/core/core.py: likelihood_flattening with a mean of 0.4 and 0.5
# and a standard deviation of 0.1 and 0.25, for images of one pixel; fusion, "Noisy-Or".
NOISY_OR = {
    2: [
        [0.4335768955139989, 0.08258057558885769, 0.4838425288971434],
        [0.4813255904087096, 0.23807327845967, 0.28060113113162033],
        [0.5857174647868165, 0.19815182257643604, 0.2161307126367475],
        [0.014585066246792296, 0.5267951959476143, 0.4586197378055934],
    ],
    3: [
        [0.369399772237065, 0.2592159863514487, 0.37138424141148635],
        [0.35448904121820013, 0.4376293069964647, 0.20788165178533508],
        [0.431888547824049, 0.1591093002527964, 0.40900215192315464],
        [0.1832339551449724, 0.4323022141268642, 0.3844638307281633],
    ],
}
# What theirs returns over what it is given, which is 0 / 0 of a row of zeros.
RATIOS = [
    [0.766893800950974, math.nan, 1.0, 0.7584512640488095],
    [1.0, 0.9187852783633836, 0.5915148832140134, 1.0],
]
SCALED = [
    [0.40042298566642925, 0.10024817350142504, 0.49932884083214574],
    [0.47094366604355276, 0.24313524309390785, 0.2859210908625394],
    [0.5903304950686162, 0.2001184991042548, 0.20955100582712896],
    [0.029866267718690825, 0.5407928610126481, 0.42934087026966106],
]


@pytest.mark.parametrize("modalities", [2, 3])
def test_noisy_or(modalities):
    got = fuse(NoisyOr(modalities)).logits.exp()
    agrees(f"noisy-or of {modalities}", got, NOISY_OR[modalities])


def test_noisy_or_scaled():
    rule = NoisyOr(2)
    rule.typical.copy_(torch.tensor([[0.4, 0.1, 1.0], [0.5, 0.25, 1.0]]))
    out = fuse(rule)
    known = ~torch.tensor(RATIOS).isnan()
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    agrees("noisy-or, deviation ratio", out.weights[known], ratios[known], within=1e-6)
    agrees("noisy-or of 2, scaled", out.logits.exp(), SCALED, within=1e-6)


# Cecile-hi/Multimodal-Learning-with-Alternating-Unimodal-Adaptation, commit ab6c1845, main.py: calculate_gating_weights
# and calculate_gating_weights3, called sample by sample: their softmax is over the first dimension, the batch's.
MLA = {
    2: [
        [0.4636897736748713, 0.5363102263251287],
        [0.42447843449289485, 0.5755215655071051],
        [0.7415204330731686, 0.25847956692683144],
        [0.43848226249900146, 0.5615177375009985],
    ],
    3: [
        [0.33164376875149615, 0.383583927824873, 0.28477230342363086],
        [0.19510128398556015, 0.26452461955095, 0.5403740964634899],
        [0.4828658447540996, 0.16831761994545433, 0.3488165353004461],
        [0.3424479228414409, 0.4385367420564253, 0.21901533510213392],
    ],
}


@pytest.mark.parametrize("modalities", [2, 3])
def test_entropy_weights(modalities):
    out = fuse(EntropyWeights(modalities))
    agrees(f"entropy weights of {modalities}", out.weights.T, MLA[modalities])
    torch.testing.assert_close(out.logits, (out.weights.unsqueeze(-1) * LOGITS[:modalities]).sum(0))
