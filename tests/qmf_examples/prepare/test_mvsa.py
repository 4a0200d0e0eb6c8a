"""``prepare mvsa`` on a generated release."""

import json

import pytest

from qmf_examples.data.catalogue import DATA_SETS
from qmf_examples.data.faults import DataError
from qmf_examples.prepare.mvsa import joint_label, prepare_mvsa, read_labels
from qmf_examples.prepare.sample import write_sample


def test_mvsa_rules_by_truth_table():
    n, o, p = "negative", "neutral", "positive"
    table = {(n, n): n, (o, o): o, (p, p): p, (n, p): None, (p, n): None, (n, o): n, (o, n): n, (p, o): p, (o, p): p}
    for pair, label in table.items():
        assert joint_label(*pair, "polarity") == label
        assert joint_label(*pair, "agree") == (label if pair[0] == pair[1] else None)


def test_mvsa_from_the_label_file_and_from_published_splits(tmp_path):
    raw = tmp_path / "mvsa"
    write_sample(DATA_SETS["mvsa"], raw, per_class={"train": 10, "dev": 3, "test": 3}, image_size=16)
    drawn = prepare_mvsa(raw, tmp_path / "drawn")
    assert {split: counts.total() for split, counts in drawn.counts.items()} == {"train": 30, "dev": 9, "test": 9}
    assert drawn.dropped == 2
    rows = [json.loads(line) for line in (tmp_path / "drawn" / "dev.jsonl").read_text().splitlines()]
    assert rows[0].keys() == {"id", "label", "text", "img"}
    assert rows[0]["text"] == (raw / "data" / f"{rows[0]['id']}.txt").read_text().strip()
    published = prepare_mvsa(raw, tmp_path / "published", splits=raw)
    assert (tmp_path / "published/test.jsonl").read_text() == (raw / "test.jsonl").read_text()
    assert (published.agreement.rows, published.agreement.same, published.agreement.left_out) == (48, 48, 0)
    polarity = prepare_mvsa(raw, tmp_path / "polarity", rule="polarity")
    assert polarity.dropped == 1
    assert sum(counts.total() for counts in polarity.counts.values()) == 49
    lines = (raw / "test.jsonl").read_text().replace('"label": "negative"', '"label": "positive"', 1)
    (raw / "test.jsonl").write_text(lines)
    assert len(prepare_mvsa(raw, tmp_path / "again", splits=raw).agreement.differ) == 1
    with pytest.raises(DataError, match="there already with other rows"):
        prepare_mvsa(raw, raw)


def test_mvsa_faults_are_told_with_their_line(tmp_path):
    raw = tmp_path / "mvsa"
    write_sample(DATA_SETS["mvsa"], raw, per_class={"train": 3, "dev": 1, "test": 1}, image_size=16)
    with (raw / "labelResultAll.txt").open("a") as file:
        file.write("77\tpositive\nx\tpositive,positive\n1\tneutral,neutral\n78\tpositive,glad\n")
    _, faults = read_labels(raw / "labelResultAll.txt")
    assert [fault.line for fault in faults] == [19, 20, 21, 22]
    (raw / "data" / "1.txt").unlink()
    outcome = prepare_mvsa(raw, tmp_path / "out")
    assert [fault.file for fault in outcome.faults[4:]] == ["data/1.txt"]
    assert sum(counts.total() for counts in outcome.counts.values()) == 14
    with pytest.raises(DataError, match=r"labelResultAll\.txt: No such file"):
        prepare_mvsa(tmp_path, tmp_path / "x")
