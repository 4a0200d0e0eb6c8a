"""A last batch of one sample, of which batch normalisation has no statistics."""

import pytest

from qmf_examples.cli import main
from qmf_examples.training.lightning_module import Shuffled


def order(num, batch_size, seed=0, processes=1, process=0):
    return list(Shuffled(range(num), processes, process, seed, batch_size))


@pytest.mark.parametrize(("num", "batch_size", "expected"), [(9, 4, 8), (8, 4, 8), (10, 4, 10), (1, 4, 1), (5, 1, 5)])
def test_a_sample_that_would_be_alone_is_left_out(num, batch_size, expected):
    samples = order(num, batch_size)
    assert len(samples) == len(set(samples)) == len(Shuffled(range(num), 1, 0, 0, batch_size)) == expected
    assert set(samples) <= set(range(num))


def test_it_is_another_one_in_every_epoch():
    assert {(set(range(9)) - set(order(9, 4, seed))).pop() for seed in range(100)} == set(range(9))


def test_all_of_several_processes_leave_out_one():
    assert [len(order(18, 4, processes=2, process=process)) for process in (0, 1)] == [8, 8]


# At 16 x 16 pixels the encoder's last map is of one pixel; the sample has 50 pairs, 7 batches of 7 and one more.
SMALL = ["--image-size", "16", "--load-size", "16", "--epochs", "1", "--limit-batches", "99"]
TRAIN = ["train", "nyud2", "--quick", *SMALL, "--selection", "test"]


def test_a_run_whose_last_batch_would_be_one_sample(sample, tmp_path, capsys):
    arguments = [*TRAIN, "--data-root", str(sample("nyud2")), "--output", str(tmp_path / "runs")]
    assert main([*arguments, "--batch-size", "7"]) == 0, capsys.readouterr().err


def test_batches_of_one_are_refused_in_a_line(sample, tmp_path, capsys):
    arguments = [*TRAIN, "--data-root", str(sample("nyud2")), "--output", str(tmp_path / "runs")]
    assert main([*arguments, "--batch-size", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qmf-fusion: error: a batch of one sample cannot be trained on here (")
    assert "--batch-size" in error
    assert error.count("\n") == 1
