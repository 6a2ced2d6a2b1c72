import math

import pytest

from pikv.tasks.statistics import wilson_interval


def test_wilson_interval():
    assert wilson_interval(0, 10)[0] == pytest.approx(0)
    assert wilson_interval(10, 10)[1] == pytest.approx(1)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert all(math.isnan(bound) for bound in wilson_interval(0, 0))
