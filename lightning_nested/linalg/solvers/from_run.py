"""Inverses that a running training provides: Kronecker factors of its layers, and its optimizer's own diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_nested.arguments import checked, positive
from lightning_nested.linalg.solvers.base import (
    InverseSolver,
    LinearSystem,
    RunStatistics,
    Solution,
)
from lightning_nested.linalg.solvers.given import GivenInverse


@dataclass(frozen=True, kw_only=True)
class _FromRun(InverseSolver):
    damping: float | None = None

    needs_operator: ClassVar[bool] = False
    needs_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        positive(damping=self.damping)

    def _solve(self, system: LinearSystem) -> Solution:
        raise TypeError(
            f"{type(self).__name__} must be bound to a running training. Got a solve without one: use it in "
            "HypergradientCallback or NestedModule(gradient=Implicit(solver=...)), or give "
            "KroneckerFisher(...).inverse(damping) as the solver."
        )


@checked
@dataclass(frozen=True, kw_only=True)
class KroneckerFactored(_FromRun):
    """x = (F + D + γ)⁻¹b with F the Kronecker-factored Fisher information of the layers, D the weight decay.

    Costs no product: the factors are means over backward passes that the training makes anyway. See
    :class:`~lightning_nested.linalg.kronecker.KroneckerFisher` for the layers that have factors.
    Martens & Grosse (2015), ICML, PMLR 37:2408-2417.

    Args:
        damping: γ > 0; None: what is left of the run damps, γ = 1/(R·t) with R the long-run step of the inner optimizer
            per unit of gradient and t the remaining steps: directions in which the weights cannot get far any more
            respond as far as they still can.
        relative: ρ > 0 sets γ = ρ · mean(diag F): damping relative to the curvature, whatever is left of the run.

    Raises:
        ValueError: ``damping`` or ``relative`` is not positive, or both are given.
    """

    relative: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(relative=self.relative)
        if self.damping is not None and self.relative is not None:
            raise ValueError(
                "damping and relative must not both be given. "
                f"Got damping={self.damping}, relative={self.relative}; leave one of them None."
            )

    def bind(self, statistics: RunStatistics) -> InverseSolver:
        """Return the inverse at the present state of a training."""
        return GivenInverse(inverse=statistics.kronecker_inverse(self.damping, self.relative))


@checked
@dataclass(frozen=True, kw_only=True)
class AdamDiagonal(_FromRun):
    """x = (1/(R·t) + D)⁻¹b with R the diagonal in front of the inner optimizer's step, t the remaining steps.

    R = α/(√v̂ + ε) for Adam, a number for SGD; D is the weight decay. No product, no memory.
    Choe, Neiswanger, Xie & Xing (2023), ICLR (Betty) and SAMA (2023), NeurIPS 36, use the same diagonal.

    Args:
        damping: Number in place of 1/(R·t) in each direction, relative to the mean of 1/R; None: 1/t.

    Raises:
        ValueError: The damping is not positive.
    """

    def bind(self, statistics: RunStatistics) -> InverseSolver:
        """Return the inverse at the present state of a training."""
        return GivenInverse(inverse=statistics.diagonal_inverse(self.damping))
