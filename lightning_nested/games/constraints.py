"""Constrained problems as games: the weights descend on the augmented Lagrangian, the multipliers ascend on it.

Hestenes (1969), J. Optim. Theory Appl. 4:303-320; inequalities after Rockafellar (1973), Math. Programming 5:354-373.
Bertsekas (1982), Constrained Optimization and Lagrange Multiplier Methods, sections 2.2 and 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_nested.arguments import at_least, checked, positive


@checked
@dataclass(frozen=True, kw_only=True, eq=False)
class ConstrainedLoss:
    """Values of minimize f(w) subject to g(w) ≤ 0 and h(w) = 0, with their graphs.

    Attributes:
        loss: f, a scalar.
        inequalities: g, a tensor of any shape; None: there are none.
        equalities: h, a tensor of any shape; None: there are none.
    """

    loss: Tensor
    inequalities: Tensor | None = None
    equalities: Tensor | None = None

    def detach(self) -> ConstrainedLoss:
        """Return the same values without graphs."""
        g, h = (None if v is None else v.detach() for v in (self.inequalities, self.equalities))
        return ConstrainedLoss(loss=self.loss.detach(), inequalities=g, equalities=h)

    @torch.no_grad()
    def violation(self) -> Tensor:
        """Return the largest of g and |h|, at least 0: by how much a constraint is broken."""
        parts = [self.loss.new_zeros(1)]
        if self.inequalities is not None:
            parts.append(self.inequalities.flatten())
        if self.equalities is not None:
            parts.append(self.equalities.flatten().abs())
        return torch.cat(parts).max()


@checked
class Multipliers(nn.Module):
    """Lagrange multipliers: ``inequality`` λ ≥ 0 of shape (m,) and ``equality`` ν of shape (p,), zero at first.

    Args:
        num_inequalities: m.
        num_equalities: p.
        dtype: Of both; None: torch's default.
    """

    inequality: nn.Parameter | None
    equality: nn.Parameter | None

    def __init__(
        self, num_inequalities: int = 0, num_equalities: int = 0, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        at_least(0, num_inequalities=num_inequalities, num_equalities=num_equalities)
        if not num_inequalities + num_equalities:
            raise ValueError(
                "There must be a constraint. Got num_inequalities=0 and num_equalities=0; give the number of "
                "constraints of each kind, or train without multipliers."
            )
        for name, count in (("inequality", num_inequalities), ("equality", num_equalities)):
            # No empty parameters: optimizers of a player want a gradient for each.
            value = nn.Parameter(torch.zeros(count, dtype=dtype)) if count else None
            self.register_parameter(name, value)

    @torch.no_grad()
    def project(self) -> None:
        """Set negative λ to 0."""
        if self.inequality is not None:
            self.inequality.clamp_(min=0.0)


@checked
def augmented_lagrangian(problem: ConstrainedLoss, multipliers: Multipliers, *, penalty: float) -> Tensor:
    """Compute L(w, λ, ν) = f + Σᵢ (max(0, λᵢ + c gᵢ)² − λᵢ²)/2c + ν·h + c/2 ‖h‖², with c = ``penalty``.

    Its gradient in the multipliers is max(g, −λ/c) and h, so a gradient step of size c is the method of multipliers,
    λ ← max(0, λ + c g) and ν ← ν + c h. At a solution with second-order sufficiency it has a minimum in w for c large
    enough, where the Lagrangian itself, c → 0, may have none.

    Returns:
        A scalar, differentiable in w, λ and ν.

    Raises:
        ValueError: As many constraints as multipliers are needed.

    >>> problem = ConstrainedLoss(loss=torch.tensor(3.0), inequalities=torch.tensor([1.0, -9.0]))
    >>> augmented_lagrangian(problem, Multipliers(2), penalty=2.0).item()  # 3 + ½·2·1², the second is inactive
    4.0
    """
    positive(penalty=penalty)
    total = problem.loss
    g = _matching("inequality", problem.inequalities, multipliers.inequality)
    if g is not None and multipliers.inequality is not None:
        shifted = torch.relu(multipliers.inequality + penalty * g)
        total = total + (shifted.square() - multipliers.inequality.square()).sum() / (2 * penalty)
    h = _matching("equality", problem.equalities, multipliers.equality)
    if h is not None and multipliers.equality is not None:
        total = total + torch.dot(multipliers.equality.to(h), h) + penalty / 2 * h.square().sum()
    return total


def _matching(kind: str, values: Tensor | None, multipliers: Tensor | None) -> Tensor | None:
    """Return the constraints as a vector, if there is a multiplier for each."""
    found = 0 if values is None else values.numel()
    held = 0 if multipliers is None else multipliers.numel()
    if found != held:
        plural = {"inequality": "inequalities", "equality": "equalities"}[kind]
        raise ValueError(
            f"Each constraint needs a multiplier. Got {found} {plural} for {held}; set num_{plural}={found}, or "
            "return as many from every batch."
        )
    return None if values is None else values.reshape(-1)
