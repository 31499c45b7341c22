"""Options of HypernetworkModule beside its loop and its optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.hypergradient import ConjugateGradient, InverseSolver


@checked
@dataclass(frozen=True, kw_only=True)
class ResponseMonitor:
    """Log whether w_φ(λ̂) is trained, and whether its slope is that of the implicit function theorem.

    Logs ``response/inner_loss`` (at w_φ(λ̂), on the current training batch), ``response/refined_inner_loss``
    (after real steps from there) and ``response/implicit_cosine``, between the outer gradient through the response
    and the implicit one, over the hyperparameters that the training loss has a derivative for.

    Args:
        every_n_outer_steps: Outer steps between two measurements.
        num_steps: k real steps of plain gradient descent, at the weights' learning rate.
        solver: Solver of the implicit gradient, by products; None: no cosine.

    Raises:
        ValueError: A count is out of range, or the solver reads a run.
    """

    every_n_outer_steps: int = 100
    num_steps: int = 10
    solver: InverseSolver | None = ConjugateGradient(max_iterations=20, damping=1e-3)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.solver is not None and self.solver.needs_statistics:
            raise ValueError(
                "solver must need no statistics of a training: predicted weights have none. Got "
                f"{type(self.solver).__name__}; use ConjugateGradient(), or NestedModule."
            )
        at_least(1, every_n_outer_steps=self.every_n_outer_steps)
        at_least(0, num_steps=self.num_steps)


@checked
@dataclass(frozen=True, kw_only=True)
class ResponseOptions:
    """Options of the response, and of gradient clipping, which the Trainer leaves to manual optimization.

    Args:
        per_example: Give each example of a batch its own perturbation, which lowers the variance; None: where layers
            and hyperparameters allow it (no weight decay).
        refine_steps: k real training steps from the predicted weights before each outer gradient.
        monitor: Log the response's error; None: do not.
        gradient_clip_val: Limit of the training gradient of w₀ and φ together; None: no limit.
        gradient_clip_algorithm: Limit the norm of all gradients, or each entry.
        max_skipped: Successive outer steps that may be non-finite before the run ends.
        log_every_n_outer_steps: Log diagnostics and values at every n-th outer step; 0: never.
    """

    per_example: bool | None = None
    refine_steps: int = 0
    monitor: ResponseMonitor | None = None
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    max_skipped: int = 10
    log_every_n_outer_steps: int = 10

    def __post_init__(self) -> None:
        at_least(0, refine_steps=self.refine_steps, max_skipped=self.max_skipped)
        at_least(0, log_every_n_outer_steps=self.log_every_n_outer_steps)
        positive(gradient_clip_val=self.gradient_clip_val)
