"""Methods by pairs: against late fusion and the best peer, and what is damaged as the tests know it."""

import numpy as np
import pytest

from qmf_examples.corruption.conditions import Condition
from qmf_examples.evaluation.damaged_tests import NoisePlan, Samples
from qmf_examples.evaluation.paired_tests import by_condition, in_words, peers, stand
from qmf_examples.evaluation.testing import Tested as Record
from qmf_examples.training import text_batches
from qmf_examples.training.settings import QUICK, resolve

SAMPLES = 200


def record(method, seed, condition, right):
    run = resolve("nyud2", {"frozen": True, "method": method, "seed": seed, "data_root": "x"})
    flags = bytes(n < right for n in range(SAMPLES))
    return Record(run, condition, right / SAMPLES, 0.1, 0.2, None, None, None, flags)


CONDITIONS = [Condition("gaussian", 0), Condition("salt-pepper", 0), Condition("gaussian", 10), Condition("blur")]
RIGHT = {  # by method: clean (for both kinds of noise), noise, blur
    "late": (140, 140, 80, 100),
    "rgb": (100, 100, 110, 120),
    "robust": (142, 142, 120, 119),
    "robust-logits": (160, 160, 160, 160),
}


def runs():
    return [
        record(method, seed, condition, right)
        for method, rights in RIGHT.items()
        for seed in (1, 2)
        for condition, right in zip(CONDITIONS, rights, strict=True)
    ]


def test_clean_data_count_once():
    assert [condition.name for condition in by_condition(runs())] == ["clean", "gaussian 10", "blur"]


def test_the_recommended_rule_is_not_held_against_its_variants():
    assert peers("robust", list(RIGHT)) == ["late", "rgb"]
    assert peers("rgb", list(RIGHT)) == ["late", "robust", "robust-logits"]


def test_wins_ties_and_losses_against_late_fusion_and_the_best_peer():
    late, rivals = ({each.method: each for each in standings} for standings in stand(runs()))
    assert late["robust"].verdicts == {"clean": "tie", "gaussian 10": "better", "blur": "better"}
    assert "late" not in late
    # Late fusion is the best peer on clean data, one modality under noise and blur, and over all.
    assert rivals["robust"].verdicts == {"clean": "tie", "gaussian 10": "better", "blur": "tie"}
    assert rivals["robust"].other == "rgb"
    expected = 100 * np.mean([42, 10, -1]) / SAMPLES
    assert rivals["robust"].gap.points == pytest.approx(expected)
    said = in_words(*stand(runs()))
    assert said[0].startswith("robust against late fusion: wins 2 (gaussian 10, blur); ties 1 (clean); loses 0;")
    assert "best peer of each condition: wins 1 (gaussian 10); ties 2 (clean, blur); loses 0" in said[1]
    assert said[1].endswith("against rgb.")


def test_without_late_fusion_or_another_method_nothing_is_compared():
    alone = [each for each in runs() if each.settings.method == "robust"]
    assert stand(alone) == ([], [])


def test_what_is_damaged_is_noticed_in_images_and_texts(sample):
    for data_set in ("nyud2", "mvsa"):
        settings = resolve(data_set, QUICK, {"data_root": str(sample(data_set)), "method": "late"})
        numbering = None if data_set == "nyud2" else text_batches.load_texts_numbering(settings)
        plan = NoisePlan(("gaussian",), (0.0, 10.0), "clean", seed=3)
        data = Samples(settings, numbering, plan, batch_size=4, workers=0, say=print)
        clean, noisy = (
            np.concatenate([batch["damaged"].numpy() for batch in data.batches(condition)], 1)
            for condition in plan.conditions
        )
        assert not clean.any()
        names = ("rgb", "depth") if data_set == "nyud2" else ("text", "image")
        chosen = [
            [np.random.default_rng([3, index, *name.encode()]).random() < 0.5 for index in range(noisy.shape[1])]
            for name in names
        ]
        assert noisy.tolist() == chosen
