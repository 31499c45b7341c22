"""Iterated games against reference values and against play."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from lightning_nested.games import (
    IteratedPrisonersDilemma,
    MatchingPennies,
    PenniesAndDilemma,
    SmallIPD,
    policy_losses,
)
from tests.conftest import Normal
from tests.games.zoo.games import DOUBLE, jacobian, logit

TFT, DEFECT, HALF = (torch.tensor(p, dtype=DOUBLE) for p in ([1, 1, 0, 1, 0], [0.0] * 5, [0.5] * 5))


class TestIteratedGames:
    @pytest.mark.parametrize(
        ("first", "second", "losses"),
        [
            (TFT, TFT, (1.0, 1.0)),
            (DEFECT, DEFECT, (2.0, 2.0)),
            (TFT, DEFECT, (2.04, 1.92)),
            (DEFECT, TFT, (1.92, 2.04)),
            (HALF, HALF, (1.5, 1.5)),
        ],
    )
    def test_dilemma(self, first: Tensor, second: Tensor, losses: tuple[float, float]) -> None:
        assert [float(x) for x in policy_losses(first, second, 0.96)] == pytest.approx(losses, abs=1e-13)

    def test_dilemma_is_the_discounted_mean_of_play(self, normal: Normal) -> None:
        p, q = torch.sigmoid(normal(5)), torch.sigmoid(normal(5))
        state = torch.tensor(
            [1.0, 0, 0, 0, 0], dtype=DOUBLE
        )  # start, CC, CD, DC, DD as the first player sees them
        totals, weight = [0.0, 0.0], 1 - 0.96
        for _ in range(1200):  # 0.96¹²⁰⁰ = 5e-22
            after = torch.zeros(5, dtype=DOUBLE)
            for s, swapped in enumerate((0, 1, 3, 2, 4)):
                a, b = p[s], q[swapped]
                after[1:] += state[s] * torch.stack([a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)])
            state = after
            totals[0] += weight * float(state[1] * 1 + state[2] * 3 + state[4] * 2)
            totals[1] += weight * float(state[1] * 1 + state[3] * 3 + state[4] * 2)
            weight *= 0.96
        assert [float(x) for x in policy_losses(p, q, 0.96)] == pytest.approx(totals, rel=1e-12)

    def test_dilemma_reads_logits(self, normal: Normal) -> None:
        players = (normal(5), normal(5))
        expected = policy_losses(*(torch.sigmoid(x) for x in players), 0.96)
        assert IteratedPrisonersDilemma().losses(players) == expected

    @pytest.mark.parametrize(
        ("first", "second", "losses"),
        [
            (1.0, 1.0, (1.0, 1.0)),
            (0.0, 0.0, (1.9590640, 1.9590640)),
            (1.0, 0.0, (2.1023451, 1.6894059)),
            (0.5, 0.5, (1.8436209, 1.8436209)),
        ],
    )
    def test_small_dilemma(self, first: float, second: float, losses: tuple[float, float]) -> None:
        p, q = (torch.tensor([x], dtype=DOUBLE) for x in (first, second))
        found = [float(x) for x in SmallIPD().probability_losses(p, q)]
        assert found == pytest.approx(losses, abs=5e-8)
        if 0 < first < 1:
            assert [float(x) for x in SmallIPD().losses((logit(first), logit(second)))] == pytest.approx(
                found
            )

    def test_small_dilemma_has_a_saddle_on_the_diagonal(self) -> None:
        game = SmallIPD()

        def slope(at: float) -> float:
            x, y = (torch.tensor([at], dtype=DOUBLE, requires_grad=i == 0) for i in (0, 1))
            return float(torch.autograd.grad(game.losses((x, y))[0], x)[0])

        root = brentq(slope, 0.0, 1.0, xtol=1e-12)
        assert root == pytest.approx(0.4179033, abs=5e-8)
        point = torch.tensor([root], dtype=DOUBLE)
        found = jacobian(game, point, point)
        expected = torch.tensor([[0.0, -0.03925], [-0.03925, 0.0]], dtype=DOUBLE)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
        eigenvalues = torch.linalg.eigvals(found).real
        assert eigenvalues.min() < 0 < eigenvalues.max()

    def test_pennies(self) -> None:
        for p, q, first in ((0.75, 0.75, -0.25), (0.75, 0.25, 0.25), (0.5, 0.9, 0.0)):
            losses = [float(x) for x in MatchingPennies().losses((logit(p), logit(q)))]
            assert losses == pytest.approx([first, -first])
        zero = torch.zeros(1, dtype=DOUBLE)
        found = jacobian(MatchingPennies(), zero, zero)
        assert torch.equal(found, torch.tensor([[0.0, -0.25], [0.25, 0.0]], dtype=DOUBLE))
        step = torch.linalg.eigvals(torch.eye(2, dtype=DOUBLE) - 0.1 * found).abs().log()
        assert step.tolist() == pytest.approx([0.5 * math.log1p(0.1**2 / 16)] * 2, rel=1e-12)

    def test_mix_is_the_weighted_mean(self, normal: Normal) -> None:
        players = (normal(1), normal(1))
        years, coins = SmallIPD().losses(players), MatchingPennies().losses(players)
        for share in (0.0, 0.3, 1.0):
            mixed = PenniesAndDilemma(share).losses(players)
            for m, a, b in zip(mixed, years, coins, strict=True):
                assert float(m) == pytest.approx(share * float(a) + (1 - share) * float(b))

    def test_refuses(self) -> None:
        for discount in (0.0, 1.0, -0.5, math.nan):
            with pytest.raises(ValueError, match="discount must be"):
                IteratedPrisonersDilemma(discount)
            with pytest.raises(ValueError, match="discount must be"):
                SmallIPD(discount)
        with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]\. Got 1\.5"):
            PenniesAndDilemma(1.5)
