"""What two random sets share, beside draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from skillfast.statistics.overlaps import shared_by_chance


def test_shared_by_chance_is_that_of_draws():
    one, other, widths = (3, 0, 6), (4, 2, 5), (10, 4, 12)
    rng = np.random.default_rng(0)
    drawn = sum(
        (rng.permuted(np.tile(np.arange(width) < a, (4000, 1)), axis=1)[:, :b]).sum(1)
        for a, b, width in zip(one, other, widths, strict=True)
    )
    found = shared_by_chance(one, other, widths)
    assert found.mean == pytest.approx(3 * 4 / 10 + 6 * 5 / 12)
    assert found.probabilities.sum() == pytest.approx(1)
    assert found.probabilities[: drawn.max() + 1] == pytest.approx(np.bincount(drawn) / 4000, abs=0.025)
    assert found.p_of(0) == pytest.approx(1)
    assert found.p_of(5) == pytest.approx((drawn >= 5).mean(), abs=0.025)
    inside = found.probabilities[found.low : found.high + 1].sum()
    tail = found.probabilities[: found.low].sum(), found.probabilities[found.high + 1 :].sum()
    assert inside >= 0.95
    assert max(tail) <= 0.025


def test_the_interval_is_the_central_95_percent():
    found, exact = shared_by_chance((50,), (60,), (400,)), stats.hypergeom(400, 50, 60)
    assert (found.low, found.high) == (exact.ppf(0.025), exact.ppf(0.975)) != (exact.ppf(0.05), exact.ppf(0.95))


def test_sets_that_are_whole_share_all():
    found = shared_by_chance((4, 2), (4, 3), (4, 3))
    assert (found.mean, found.low, found.high) == (pytest.approx(6), 6, 6)
    assert found.p_of(6) == pytest.approx(1)
