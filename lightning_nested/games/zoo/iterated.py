"""Matching pennies, the iterated prisoner's dilemma, and mixes of them: games with solutions of different kinds.

Players hold logits; each of them acts with the probabilities σ(θ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_nested.arguments import checked, positive, within
from lightning_nested.games.zoo.game import Game

# After (own, other's) moves CC, CD, DC, DD: costs, minus the rewards −1, −3, 0, −2.
_COSTS = (1.0, 3.0, 0.0, 2.0)
_SWAPPED = [0, 1, 3, 2, 4]  # (start, CC, CD, DC, DD) as the other player sees them


class PolicyGame(Game):
    """Base of games whose players hold logits of what they do."""

    def policies(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return σ(θ): probabilities of heads, or to cooperate in the game's states."""
        return tuple(torch.sigmoid(p) for p in self._unpack(players))


class MatchingPennies(PolicyGame):
    """One coin each: the first player wins if they match, the second if they differ.

    Each player holds one logit; with p = σ(θ) for heads, L₁ = −(2p₁−1)(2p₂−1) = −L₂. At the equilibrium θ = 0 the
    Jacobian is [[0, −¼], [¼, 0]], with the eigenvalues ± i/4.

    Example:
        >>> first, second = MatchingPennies().losses((torch.tensor([1.0]), torch.tensor([1.0])))
        >>> round(first.item(), 6), round(second.item(), 6)
        (-0.213552, 0.213552)
    """

    def losses(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute −(2p₁−1)(2p₂−1) and its negative."""
        first, second = self._unpack(players)
        matched = (torch.tanh(first / 2) * torch.tanh(second / 2)).sum()  # 2σ(θ) − 1 = tanh(θ/2)
        return -matched, matched


@checked
class IteratedPrisonersDilemma(PolicyGame):
    """The prisoner's dilemma played for ever, with memory of one round: 5 logits of cooperation a player.

    Its states are (start, CC, CD, DC, DD), a player's own move first. The loss is the discounted mean
    (1−γ) Σ_t γᵗ c_t, with costs c = 1, 3, 0, 2 after CC, CD, DC, DD. Tit for tat against itself loses 1, always
    defecting 2.
    Foerster, Chen, Al-Shedivat, Whiteson, Abbeel & Mordatch (2018), AAMAS 122-130.

    Args:
        discount: γ in (0, 1).

    Example:
        >>> uniform = torch.zeros(5, dtype=torch.float64)
        >>> [round(loss.item(), 6) for loss in IteratedPrisonersDilemma().losses((uniform, uniform))]
        [1.5, 1.5]
    """

    sizes = (5, 5)

    def __init__(self, discount: float = 0.96) -> None:
        _check_discount(discount)
        self.discount = discount

    def losses(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the losses of the policies σ(players)."""
        first, second = self.policies(players)
        return policy_losses(first, second, self.discount)


@checked
class SmallIPD(PolicyGame):
    """The iterated dilemma with one logit a player: to cooperate at first, and after the other cooperated.

    After the other defected, a player cooperates with probability σ(−3). Two solutions: mutual cooperation and mutual
    defection, and between them a saddle on the diagonal at the logit 0.4179.

    Args:
        discount: γ in (0, 1).
        forgiveness: Logit of cooperation after the other player defected.

    Example:
        >>> even = torch.zeros(1, dtype=torch.float64)
        >>> round(SmallIPD().losses((even, even))[0].item(), 7)
        1.8436209
    """

    def __init__(self, discount: float = 0.9, forgiveness: float = -3.0) -> None:
        _check_discount(discount)
        self.discount, self.forgiveness = discount, forgiveness

    def losses(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the losses of the policies σ(players)."""
        return self.probability_losses(*self.policies(players))

    def probability_losses(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the losses of two probabilities of cooperation, each of shape (1,); 0 and 1 are exact."""
        forgive = torch.sigmoid(torch.full_like(first, self.forgiveness))

        def policy(p: Tensor) -> Tensor:
            return torch.cat([p, p, forgive, p, forgive])

        return policy_losses(policy(first), policy(second), self.discount)


@checked
class PenniesAndDilemma(PolicyGame):
    """τ times the small iterated dilemma and 1−τ times matching pennies, on the same two logits.

    The dilemma's solutions attract or repel; the pennies make the players turn around each other. Between the two lie
    bifurcations that turn by complex eigenvalues.

    Args:
        share: τ in [0, 1], the dilemma's weight.
        dilemma: Small iterated dilemma; None: with its defaults.

    Raises:
        ValueError: A share outside [0, 1].
    """

    def __init__(self, share: float = 0.5, dilemma: SmallIPD | None = None) -> None:
        within(0, 1, share=share)
        self.share = share
        self.dilemma = dilemma if dilemma is not None else SmallIPD()
        self.pennies = MatchingPennies()

    def losses(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the weighted means of both games' losses."""
        years, coins = self.dilemma.losses(players), self.pennies.losses(players)
        return tuple(self.share * a + (1 - self.share) * b for a, b in zip(years, coins, strict=True))


def policy_losses(first: Tensor, second: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """Compute the losses of two policies in the iterated prisoner's dilemma: (1−γ) p₀ᵀ(I − γP)⁻¹c, in closed form.

    Args:
        first: Probabilities to cooperate in (start, CC, CD, DC, DD), own move first, shape (5,); 0 and 1 are exact.
        second: Probabilities of the other player, its own move first.
        discount: γ in (0, 1).

    Example:
        Tit for tat against one who always defects.

        >>> tit_for_tat = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
        >>> [round(x.item(), 6) for x in policy_losses(tit_for_tat, torch.zeros_like(tit_for_tat), 0.96)]
        [2.04, 1.92]
    """
    other = second[_SWAPPED]
    # Probabilities of the next CC, CD, DC, DD from each of the five states, shape (5, 4).
    both = torch.stack(
        [first * other, first * (1 - other), (1 - first) * other, (1 - first) * (1 - other)], dim=1
    )
    start, transition = both[0], both[1:]
    identity = torch.eye(4, dtype=first.dtype, device=first.device)
    visits = (1 - discount) * torch.linalg.solve((identity - discount * transition).mT, start)
    costs = torch.tensor(_COSTS, dtype=first.dtype, device=first.device)
    return visits @ costs, visits @ costs[[0, 2, 1, 3]]


def _check_discount(discount: float) -> None:
    positive(discount=discount)
    if not discount < 1:
        raise ValueError(f"discount must be below 1. Got {discount}.")
