"""Inner problem of a NestedModule: what a cycle works on, with the plan of the run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_nested.trainer.inner_problem import InnerProblem
from lightning_nested.trainer.outer_plan import OuterPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class NestedProblem(InnerProblem):
    """Inner problem with tuned decays and the statistics of the run.

    Attributes:
        plan: Plan of the run, attached to the parameters.
    """

    plan: OuterPlan

    @override
    def real_step(self, gradients: list[Tensor | None]) -> None:
        """Make a step of the user's optimizer, after the tuned decays where they are decoupled."""
        if self.plan.decoupled:
            self.put_gradients(gradients)
            self.plan.add_decays(self.parameters, 1.0)
        super().real_step(gradients)
