"""The monitor's test for exchangeability: each part against its definition, and false alarms by simulation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmf_fusion.monitor.e_process import KAPPAS, LEAST, Evidence, extend, log_bets, log_rest, log_stakes
from qmf_fusion.monitor.exchangeability import ExchangeabilityTest
from qmf_fusion.monitor.ranks import GRID, grid_index, p_values, uniforms

THRESHOLD = math.log(1 / 0.1)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_the_grid_keeps_the_order(values):
    x = torch.tensor(values)
    index = grid_index(x)
    assert int(index.min()) >= 0
    assert int(index.max()) < GRID
    rounded = x.to(torch.bfloat16).float()
    assert torch.equal(index.unsqueeze(0) < index.unsqueeze(1), rounded.unsqueeze(0) < rounded.unsqueeze(1))


def test_random_numbers_are_those_of_splitmix64():
    def reference(k):
        mask = 2**64 - 1
        z = (k + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return (((z ^ (z >> 31)) >> 11) + 0.5) / 2**53

    got = uniforms(3, 5, 1000, torch.device("cpu"))
    assert got.tolist() == [reference((3 << 40) + n) for n in range(5, 1005)]
    other = uniforms(3, 5, 10, torch.device("cpu"), seed=2**32 - 1)
    assert other.tolist() == [reference((3 << 40) + n + (2**32 - 1) * 0xD6E8FEB86659FD93) for n in range(5, 15)]
    assert torch.equal(got[700:], uniforms(3, 705, 300, torch.device("cpu")))
    assert 0 < float(got.min()) < float(got.max()) < 1
    assert abs(float(got.mean()) - 0.5) < 0.03


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_p_values_are_ranks_among_all_before(reference, stream):
    counts = torch.bincount(torch.tensor(reference, dtype=torch.int64), minlength=4)
    draws = uniforms(0, 0, len(stream), torch.device("cpu"))
    got = p_values(counts, torch.tensor(stream), draws)
    bag = list(reference)
    for value, draw, p in zip(stream, draws.tolist(), got.tolist(), strict=True):
        bag.append(value)
        expected = (sum(x > value for x in bag) + draw * sum(x == value for x in bag)) / len(bag)
        assert p == pytest.approx(expected, abs=1e-12)


def test_bets_are_fair():
    """They pay 1 on average: by Simpson's rule over log p, where they and their means are smooth but for a kink."""
    paid = torch.zeros(2, len(KAPPAS), dtype=torch.float64)
    for low, high in ((-100.0, math.log(LEAST)), (math.log(LEAST), 0.0)):
        log_p = torch.linspace(low, high, 20_001, dtype=torch.float64)
        weight = torch.ones_like(log_p)
        weight[1:-1:2], weight[2:-1:2] = 4, 2
        weight *= (high - low) / 20_000 / 3 * log_p.exp()
        paid[0] += (log_bets(log_p.exp(), False).exp() * weight).sum(1)
        paid[1] += (log_bets(log_p.exp(), True)[: len(KAPPAS)].exp() * weight).sum(1)
    torch.testing.assert_close(paid, torch.ones_like(paid), atol=1e-9, rtol=0)
    p = torch.tensor([1e-9, 0.1, 0.5], dtype=torch.float64)
    both = log_bets(p, True)
    torch.testing.assert_close(both[len(KAPPAS) :], log_bets(1 - p, False))
    assert float(log_bets(torch.ones(1, dtype=torch.float64), True).max()) < 30


def test_stakes_add_up_to_one():
    t = torch.arange(1, 5001, dtype=torch.float64)
    torch.testing.assert_close(log_stakes(t).exp().cumsum(0) + log_rest(t).exp(), torch.ones_like(t))
    late = torch.tensor([1e9], dtype=torch.float64)
    assert float(log_stakes(late)) == pytest.approx(math.log(1 / (1e9 * math.log(2) * math.log2(1e9) ** 2)), abs=1e-3)


def test_the_e_process_sums_over_moments_of_a_change():
    bets = torch.randn(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, rows = torch.arange(1.0, 31, dtype=torch.float64), torch.arange(101, 131)
    nothing = torch.full((2,), -torch.inf, dtype=torch.float64)
    whole, along = extend(Evidence(nothing, nothing, torch.zeros(2, dtype=torch.int64)), bets, t, rows)
    parts = torch.stack([log_stakes(t[c : c + 1]) + bets[:, c:].sum(1) for c in range(30)])
    torch.testing.assert_close(whole.staked, parts.logsumexp(0))
    torch.testing.assert_close(whole.best, parts.max(0).values)
    assert torch.equal(whole.start, rows[parts.argmax(0)])
    torch.testing.assert_close(along[-1].exp(), parts.logsumexp(0).exp().mean() + log_rest(t)[-1].exp())
    half, first = extend(Evidence(nothing, nothing, torch.zeros(2, dtype=torch.int64)), bets[:, :11], t[:11], rows[:11])
    again, rest = extend(half, bets[:, 11:], t[11:], rows[11:])
    torch.testing.assert_close(torch.cat([first, rest]), along)
    torch.testing.assert_close(again, whole)


def run(kind, streams, reference, rows, seed=0):
    """Which of many streams, exchangeable with their references, ever raise an alarm."""
    g = torch.Generator().manual_seed(seed)
    test = ExchangeabilityTest(streams, 2 if kind == "binary" else GRID, 0, two_sided=kind == "two-sided")

    def draw(n):
        if kind == "binary":
            return (torch.rand(streams, n, generator=g) < 0.1).long()
        if kind == "ties":
            return grid_index(torch.randint(3, (streams, n), generator=g).float())
        return grid_index(torch.randn(streams, n, generator=g))

    def everywhere(x):
        return torch.ones_like(x, dtype=torch.bool)

    x = draw(reference)
    test.fit(x, everywhere(x))
    for start in range(0, rows, 256):
        x = draw(min(256, rows - start))
        test.add(x, everywhere(x), start + torch.arange(1, x.shape[1] + 1), THRESHOLD)
    return test.raised > 0


@pytest.mark.parametrize("kind", ["one-sided", "two-sided", "ties", "binary"])
@pytest.mark.parametrize("reference", [1, 40])
def test_false_alarms_are_rare(kind, reference):
    """Nominally at most 10 %; fewer so early, as most of the fortune is not staked yet."""
    assert float(run(kind, 200, reference, 384).double().mean()) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one-sided", "two-sided", "binary"])
def test_false_alarms_are_rare_however_long_it_runs(kind):
    raised = run(kind, 100, 50, 100_000)
    assert float(raised.double().mean()) <= 0.1


@pytest.mark.slow
def test_a_bag_that_stays_as_it_is_would_raise_false_alarms(monkeypatch):
    """Which is why the stream joins it."""
    monkeypatch.setattr(ExchangeabilityTest, "_p_values", _against_the_reference)
    assert float(run("one-sided", 50, 50, 10_000).double().mean()) > 0.2


def _against_the_reference(self, m, values):
    draws = uniforms(m, int(self.steps[m]), len(values), values.device)
    upto = self.reference[m].cumsum(0)
    larger, equal = upto[-1] - upto[values], self.reference[m][values] + 1
    return (larger + draws * equal) / (upto[-1] + 1)


def test_standing_is_the_share_below_less_the_share_above():
    test, counted = ExchangeabilityTest(1, 4, 0), torch.tensor([[True, True, True, True, False]])
    test.fit(torch.tensor([[1, 1, 2]]), torch.ones(1, 3, dtype=torch.bool))
    got = test.standing(torch.tensor([[0, 1, 2, 3, -1]]), counted)
    torch.testing.assert_close(got, torch.tensor([[-1, -1 / 3, 2 / 3, 1, math.nan]]).double(), equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_parts_of_any_size_leave_the_same_state(seed, sizes):
    g = torch.Generator().manual_seed(seed)
    reference, rows = torch.randn(2, 9, generator=g), sum(sizes)
    values, counted = grid_index(torch.randn(2, rows, generator=g)), torch.rand(2, rows, generator=g) < 0.8
    whole, parts = (ExchangeabilityTest(2, GRID, 0, two_sided=True) for _ in range(2))
    for test in (whole, parts):
        test.fit(grid_index(reference), torch.ones(2, 9, dtype=torch.bool))
    number = torch.arange(1, rows + 1)
    log_e = whole.add(values, counted, number, 1.0)
    split = [x.split(sizes, -1) for x in (values, counted, number)]
    got = [parts.add(*each, 1.0) for each in zip(*split, strict=True)]
    torch.testing.assert_close(torch.cat(got, 1), log_e)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(parts.get_buffer(name), buffer)
