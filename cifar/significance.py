"""Is it luck? Means over seeds with confidence intervals, and tests of their differences, from scipy.stats."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

LEVEL = 0.95  # of every confidence interval
NO_SPREAD = 1e-9  # accuracies that differ by less than this are equal: it is rounding


@dataclass(frozen=True)
class Sample:
    """One result a seed, of runs that share all other settings. A seed may be unknown (None)."""

    seeds: Sequence[int | None]
    values: Sequence[float]


@dataclass(frozen=True)
class Difference:
    """The mean of one sample minus that of another.

    `interval` is Student's, for this pair alone; `p` is the two-sided test's; `p_holm` is corrected for all pairs that were
    tested. All are None, as is `test`, where there is no test: `why` then says so.
    """

    mean: float
    n: tuple[int, int]
    test: str | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    why: str | None = None


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the confidence interval of the values' mean, by Student's t; None for fewer than two values or no spread."""
    from scipy import stats

    if len(values) < 2 or np.ptp(values) <= NO_SPREAD:
        return None
    low, high = stats.t.interval(LEVEL, len(values) - 1, np.mean(values), stats.sem(values))
    return float(low), float(high)


def differences_from_first(samples: Sequence[Sample]) -> tuple[list[Difference], int]:
    """Compare the first sample with each other one; return the differences and how many pairs the correction counts.

    Where both have the same seeds, each once, the test is paired, else Welch's. Holm's correction is over all pairs of
    samples, not only those with the first: the first is first because it came out best, so it was chosen by looking at all.
    """
    differences = [_difference(samples[0], other) for other in samples[1:]]
    # One row of the triangle of pairs was tested above; the rest only counts, so whole rows are tested in one call.
    p = [difference.p for difference in differences if difference.p is not None]
    others = [
        value for position, sample in enumerate(samples[1:], 2) for value in _p_values(sample, samples[position:])
    ]
    corrected = iter(holm([*p, *others]))
    tested = [
        replace(difference, p_holm=next(corrected)) if difference.p is not None else difference
        for difference in differences
    ]
    return tested, len(p) + len(others)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number, family-wise (Holm 1979, Scandinavian Journal of Statistics 6)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected.tolist()


def _difference(first: Sample, other: Sample) -> Difference:
    from scipy import stats

    mean = float(np.mean(first.values) - np.mean(other.values))
    n = (len(first.values), len(other.values))
    if min(n) < 2:
        return Difference(mean, n, why="n = 1 is too few for an interval")
    if not _varies(first, other):
        return Difference(mean, n, why="the same with every seed: no spread to test it against")
    if _paired(first, other):
        test, result = "paired t-test", stats.ttest_rel(*_aligned(first, other))
    else:
        test, result = "Welch's t-test", stats.ttest_ind(first.values, other.values, equal_var=False)
    interval: Any = result.confidence_interval(LEVEL)
    return Difference(mean, n, test, (float(interval.low), float(interval.high)), float(result.pvalue))


def _p_values(first: Sample, others: Sequence[Sample]) -> list[float]:
    """Return the p-values of `_difference` for one sample against each of many."""
    from scipy import stats

    others = [other for other in others if min(len(first.values), len(other.values)) > 1 and _varies(first, other)]
    paired = [_aligned(first, other) for other in others if _paired(first, other)]
    unpaired = [other.values for other in others if not _paired(first, other)]
    found: list[float] = []
    if paired:
        found += stats.ttest_rel(*np.swapaxes(paired, 0, 1), axis=1).pvalue.tolist()
    if unpaired:
        own, *summaries = [
            np.array([np.mean(values), np.std(values, ddof=1), len(values)]) for values in (first.values, *unpaired)
        ]
        found += stats.ttest_ind_from_stats(*own, *np.transpose(summaries), equal_var=False).pvalue.tolist()
    return found


def _paired(first: Sample, other: Sample) -> bool:
    """Whether both have the same seeds, each known and there once."""
    seeds = set(first.seeds)
    return None not in seeds and seeds == set(other.seeds) and len(seeds) == len(first.seeds) == len(other.seeds)


def _aligned(first: Sample, other: Sample) -> tuple[list[float], list[float]]:
    """Return both samples' values in the order of the first one's seeds."""
    by_seed = dict(zip(other.seeds, other.values, strict=True))
    return [*first.values], [by_seed[seed] for seed in first.seeds]


def _varies(first: Sample, other: Sample) -> bool:
    """Whether there is a spread to hold the difference against: of the differences by seed, or within a sample."""
    if _paired(first, other):
        return bool(np.ptp(np.subtract(*_aligned(first, other))) > NO_SPREAD)
    return bool(max(np.ptp(first.values), np.ptp(other.values)) > NO_SPREAD)
