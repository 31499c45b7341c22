"""Numbers that describe one outer step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class OuterReport:
    """Diagnostics of an outer step; NaN where unknown.

    Attributes:
        outer_loss: Mean over processes.
        hypergradient_norm: ‖dL_V/dλ‖ with respect to the unconstrained tensors.
        inner_gradient_norm: Norm of the gradient of the inner loss with its penalties; the implicit formula is exact
            where it is 0.
        residual: Relative residual of the solve.
        iterations: Products with the curvature.
        curvature: Smallest Rayleigh quotient met.
        negative_curvature: True if the solve stopped at negative curvature.
        identity_cosine: Cosine to the hypergradient of ``Identity()``, if asked for.
    """

    outer_loss: float
    hypergradient_norm: float
    inner_gradient_norm: float = math.nan
    residual: float = math.nan
    iterations: int = 0
    curvature: float = math.nan
    negative_curvature: bool = False
    identity_cosine: float = math.nan

    def metrics(self) -> dict[str, float]:
        """Return the finite numbers by name, to log."""
        return {key: float(value) for key, value in asdict(self).items() if math.isfinite(value)}
