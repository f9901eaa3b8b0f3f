"""What the seeds of two cells tell: means, differences in pairs, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from fastmrcnn.study.suite import Claim

# Two-sided 95 % quantiles of Student's t, for 1 to 30 degrees of freedom; beyond, the normal's is near.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Verdict = Literal["held", "reversed", "open", "missing"]


class Estimate(NamedTuple):
    """A mean over seeds, with its spread."""

    mean: float
    deviation: float  # of one run; NaN for a single one
    runs: int

    @property
    def half_width(self) -> float:
        """Of the 95 % confidence interval of the mean; NaN for a single run."""
        if self.runs < 2:
            return math.nan
        quantile = _STUDENT[self.runs - 2] if self.runs - 1 <= len(_STUDENT) else 1.960
        return quantile * self.deviation / math.sqrt(self.runs)


class Judged(NamedTuple):
    claim: Claim
    difference: Estimate | None  # of `one` minus `other`, seed by seed; None: no seed has both
    verdict: Verdict


def estimate(values: Sequence[float]) -> Estimate:
    """Raises ValueError if there are none."""
    if not values:
        raise ValueError("no values to take a mean of")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance), len(values))


def spread(found: Estimate) -> str:
    """Mean and standard deviation of the runs."""
    if math.isnan(found.deviation):
        return f"{found.mean:.1f}"
    return f"{found.mean:.1f} ± {found.deviation:.1f}"


def judge(claim: Claim, one: Mapping[int, float], other: Mapping[int, float]) -> Judged:
    """A claim by its metric of two cells, each a value a seed.

    "more" holds if the whole interval of the difference lies above 0, and is reversed if it lies below.
    "same" holds if the interval lies within the margin, and is reversed if it lies outside of it. Anything
    else is open: the runs cannot tell.
    """
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return Judged(claim, None, "missing")
    found = estimate([one[seed] - other[seed] for seed in seeds])
    if found.runs < 2:
        return Judged(claim, found, "open")
    low, high = found.mean - found.half_width, found.mean + found.half_width
    verdict: Verdict = "open"
    if claim.expects == "more":
        verdict = "held" if low > 0 else "reversed" if high < 0 else "open"
    elif -claim.margin <= low and high <= claim.margin:
        verdict = "held"
    elif low > claim.margin or high < -claim.margin:
        verdict = "reversed"
    return Judged(claim, found, verdict)
