"""Numbers that describe one outer step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class OuterReport:
    """Diagnostics of an outer step; NaN where unknown."""

    outer_loss: float  # mean over processes
    hypergradient_norm: float  # ‖dL_V/dλ‖ with respect to the unconstrained tensors
    inner_gradient_norm: float = math.nan  # with the penalties; the implicit formula is exact where it is 0
    residual: float = math.nan  # relative, of the solve
    iterations: int = 0  # products with the curvature
    curvature: float = math.nan  # smallest Rayleigh quotient met
    negative_curvature: bool = False  # True if the solve stopped there
    identity_cosine: float = math.nan  # to the hypergradient of Identity(), if asked for

    def metrics(self) -> dict[str, float]:
        """Return the finite numbers by name, to log."""
        return {key: float(value) for key, value in asdict(self).items() if math.isfinite(value)}
