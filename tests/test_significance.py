"""Against scipy called pair by pair, closed forms, and a simulation of settings that are all the same."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from cifar.significance import Difference, Sample, differences_from_first, holm, mean_interval


def test_interval_of_a_mean() -> None:
    # Student's t with two degrees of freedom has a closed form: t = (2p - 1) / sqrt(2p (1 - p)).
    t = 0.95 / math.sqrt(2 * 0.975 * 0.025)
    half = t * 0.1 / math.sqrt(3)
    assert mean_interval([0.4, 0.5, 0.6]) == pytest.approx((0.5 - half, 0.5 + half))
    assert mean_interval([0.5]) is None
    assert mean_interval([0.5, 0.5]) is None


def test_holm_as_in_its_definition() -> None:
    # Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1 but not below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_every_pair_counts_for_the_correction() -> None:
    generator = np.random.default_rng(0)
    samples = [Sample(range(n), generator.normal(0.5 - n / 100, 0.01, n).tolist()) for n in (4, 4, 3, 5, 1)]
    samples[1] = Sample([3, 1, 0, 2], samples[1].values)  # the same seeds in another order
    found, count = differences_from_first(samples)

    def p_value(first: Sample, other: Sample) -> float:
        if sorted(first.seeds) != sorted(other.seeds):
            return stats.ttest_ind(first.values, other.values, equal_var=False).pvalue
        one, two = ([value for _, value in sorted(zip(s.seeds, s.values, strict=True))] for s in (first, other))
        return stats.ttest_rel(one, two).pvalue

    pairs = [p_value(first, other) for first, other in itertools.combinations(samples[:4], 2)]
    assert count == len(pairs) == 6
    assert [difference.p for difference in found[:3]] == pytest.approx(pairs[:3])
    assert [difference.p_holm for difference in found[:3]] == pytest.approx(holm(pairs)[:3])
    assert [difference.test for difference in found] == ["paired t-test", "Welch's t-test", "Welch's t-test", None]
    assert found[3] == Difference(found[3].mean, (4, 1), why="n = 1 is too few for an interval")


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (Sample([0, 1], [0.75, 0.5]), Sample([0, 1], [0.74, 0.49])),  # always by 0.01, but for rounding
        (Sample([0, 1], [0.75, 0.5]), Sample([1, 0], [0.5, 0.75])),
        (Sample([0, 1], [0.75, 0.75]), Sample([1, 2], [0.5, 0.5])),
    ],
)
def test_without_spread_there_is_no_test(first: Sample, other: Sample) -> None:
    ((difference,), count) = differences_from_first([first, other])
    assert (difference.test, difference.interval, difference.p, count) == (None, None, None, 0)
    assert difference.why is not None
    assert "no spread" in difference.why


@pytest.mark.parametrize("seeds", [[0, 1, 1], [0, 1, None]])
def test_repeated_and_unknown_seeds_are_not_paired(seeds: list[int | None]) -> None:
    ((difference,), _) = differences_from_first([Sample(seeds, [0.5, 0.6, 0.8]), Sample(seeds, [0.4, 0.6, 0.5])])
    assert difference.test == "Welch's t-test"


def test_equal_settings_seldom_beat_each_other() -> None:
    """Of eight settings that are the same, the best to look at "beats" one of the others in at most 5 % of sweeps."""
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(100):
        drawn = sorted(generator.normal(0.5, 0.01, (8, 5)).tolist(), key=np.mean, reverse=True)
        found, count = differences_from_first([Sample(range(5), values) for values in drawn])
        assert count == 28
        wrong += any(difference.p_holm is not None and difference.p_holm < 0.05 for difference in found)
    assert wrong <= 11  # 5 expected at most; the chance of more than 11 is below 1 %
