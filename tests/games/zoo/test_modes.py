"""Covered modes and good samples."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nested.games import (
    high_quality,
    modes_covered,
    ring,
)
from tests.games.zoo.games import DOUBLE


class TestModes:
    def test_counts(self) -> None:
        centres = ring()
        at = centres[[0, 0, 3]].clone()
        at[1, 0] += 0.0599  # just within three standard deviations
        at[2, 1] += 0.0601  # just outside
        assert modes_covered(at, centres, 0.02) == 1
        assert modes_covered(at, centres, 0.02, at_least=2) == 1
        assert modes_covered(at, centres, 0.02, at_least=3) == 0
        assert modes_covered(at, centres, 0.02, within=4) == 2
        assert float(high_quality(at, centres, 0.02)) == pytest.approx(2 / 3)

    def test_samples_that_are_not_finite_count_for_nothing(self) -> None:
        samples = torch.full((3, 2), math.nan, dtype=DOUBLE)
        samples[0] = torch.inf
        assert modes_covered(samples, ring(), 0.02) == 0
        assert float(high_quality(samples, ring(), 0.02)) == 0

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match=r"shapes \(n, d\) and \(m, d\)"):
            modes_covered(torch.zeros(3), ring(), 0.02)
        with pytest.raises(ValueError, match="at least one sample"):
            high_quality(torch.zeros(0, 2), ring(), 0.02)
        with pytest.raises(ValueError, match="std must be positive"):
            modes_covered(torch.zeros(1, 2), ring(), 0.0)
