"""How sure a share of right answers is."""

import math


def wilson_interval(num_right: float, num_asked: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion, or a mean of scores from 0 to 1; NaN where nothing was asked.

    >>> [round(bound, 3) for bound in wilson_interval(95, 100)]
    [0.888, 0.978]
    """
    if num_asked == 0:
        return math.nan, math.nan
    z = 1.959964
    share = num_right / num_asked
    centre = share + z * z / (2 * num_asked)
    spread = z * math.sqrt(share * (1 - share) / num_asked + z * z / (4 * num_asked**2))
    scale = 1 + z * z / num_asked
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
