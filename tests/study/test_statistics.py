"""Means, intervals and verdicts, beside values from tables and by hand."""

from __future__ import annotations

import math

import pytest

from fastmrcnn.study.statistics import estimate, judge
from fastmrcnn.study.suite import Claim

MORE, SAME = Claim("a", "b", "segm/AP", 3.0), Claim("a", "b", "segm/AP", 0.1, "same", margin=1.0)


def test_interval_is_students() -> None:
    """Of 1, 2, 3: deviation 1, and 4.303 for two degrees of freedom."""
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.deviation, found.runs) == (2.0, 1.0, 3)
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))


def test_more_runs_never_widen_what_the_table_says() -> None:
    quantiles = [estimate([0.0, 2.0] * pairs).half_width for pairs in range(1, 30)]
    assert quantiles == sorted(quantiles, reverse=True)


def test_one_run_has_no_interval_and_no_verdict() -> None:
    assert math.isnan(estimate([5.0]).half_width)
    assert judge(MORE, {0: 5.0}, {0: 1.0}).verdict == "open"


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        estimate([])


@pytest.mark.parametrize(
    ("claim", "differences", "verdict"),
    [
        (MORE, [3.0, 3.1, 2.9], "held"),
        (MORE, [-3.0, -3.1, -2.9], "reversed"),
        (MORE, [3.0, -3.1, 1.0], "open"),
        (SAME, [0.1, 0.0, -0.1], "held"),
        (SAME, [3.0, 3.1, 2.9], "reversed"),
        (SAME, [-3.0, -3.1, -2.9], "reversed"),
        (SAME, [0.9, 1.1, 1.0], "open"),
    ],
)
def test_verdicts(claim: Claim, differences: list[float], verdict: str) -> None:
    base = [30.0, 20.0, 40.0]  # seeds differ by more than the cells do: pairs tell them apart
    one = {seed: value + differences[seed] for seed, value in enumerate(base)}
    found = judge(claim, one, dict(enumerate(base)))
    assert found.verdict == verdict
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(sum(differences) / 3)


def test_only_seeds_that_both_have_count() -> None:
    found = judge(MORE, {0: 1.0, 1: 5.0, 2: 6.0}, {1: 4.0, 2: 5.0, 7: 0.0})
    assert found.difference is not None
    assert (found.difference.mean, found.difference.runs) == (1.0, 2)
    assert judge(MORE, {0: 1.0}, {1: 1.0}).verdict == "missing"
