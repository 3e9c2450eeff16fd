"""Intervals for success rates."""

import math


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a binomial proportion; z = 1.96 gives 95 %.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    scale = 1 + z * z / trials
    center = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # The ends are exact where nothing, or everything, succeeded; rounding leaves about 1e-17 there.
    return max(0.0, center - half) if successes else 0.0, min(1.0, center + half) if successes < trials else 1.0


def difference_interval(
    successes: int, trials: int, other_successes: int, other_trials: int, z: float = 1.959964
) -> tuple[float, float]:
    """Interval of the difference of two independent binomial proportions, the first less the other; z = 1.96 gives 95 %.

    From the Wilson intervals of both: method 10 of Newcombe, "Interval estimation for the difference between independent
    proportions", Statistics in Medicine 17 (1998).
    """
    if not trials or not other_trials:
        return -1.0, 1.0
    p, q = successes / trials, other_successes / other_trials
    low, high = wilson_interval(successes, trials, z)
    other_low, other_high = wilson_interval(other_successes, other_trials, z)
    return p - q - math.hypot(p - low, other_high - q), p - q + math.hypot(high - p, q - other_low)
