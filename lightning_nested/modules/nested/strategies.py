"""Strategies by which NestedModule finds the hypergradient, and options of its loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.hypergradient import Current, Curvature, EvaluationPoint, InverseSolver, Neumann
from lightning_nested.modules.nested.cycles import Cycle, ImplicitCycle, UnrolledCycle
from lightning_nested.modules.nested.problem import NestedProblem


class GradientStrategy(ABC):
    """Strategy that finds the derivative for the outer step.

    Attributes:
        length: Inner steps per outer step, where the strategy itself decides.
        ends_with_epoch: Whether a cycle is closed at an epoch's end.
        solver: Solver of implicit differentiation; None: there is none.
        at: Where the outer loss is differentiated.
    """

    length: int | None = None
    ends_with_epoch = False
    solver: InverseSolver | None = None
    at: EvaluationPoint = Current()

    @abstractmethod
    def begin(self, problem: NestedProblem) -> Cycle:
        """Return a cycle for one ``fit``."""


@checked
@dataclass(frozen=True, kw_only=True)
class Implicit(GradientStrategy):
    """dL_V/dλ = ∂L_V/∂λ − (∂L_V/∂w) H⁻¹ ∂²L_T/∂w∂λ, with H at the weights before the cycle's last inner step.

    The training loss of that step is used with its graph: there is no further forward pass of it.
    See :func:`lightning_nested.hypergradient.implicit_hypergradient`.

    Args:
        solver: Solver that finds H⁻¹v; ``KroneckerFactored()`` and ``AdamDiagonal()`` read the run, without products.
        curvature: Approximation of H; None: the Hessian. ``GaussNewton(outputs=...)`` takes the dotted name of
            the submodule that returns the logits.
        at: Where the outer loss is differentiated: ``Current()``, the current weights, or ``LookAhead()``, where the
            training is heading; it evaluates the training loss of an outer step once more, there.
    """

    solver: InverseSolver = Neumann()  # noqa: RUF009 - frozen
    curvature: Curvature | None = None
    at: EvaluationPoint = Current()  # noqa: RUF009 - frozen

    def begin(self, problem: NestedProblem) -> Cycle:
        """Return a cycle for one ``fit``."""
        return ImplicitCycle(problem, self.curvature)


@checked
@dataclass(frozen=True, kw_only=True)
class Unrolled(GradientStrategy):
    """Differentiate the outer loss through the last ``truncate`` of ``num_steps`` training steps.

    The training steps are the unrolled ones: nothing is run twice. Between two outer steps the graph of up to
    ``truncate`` steps is kept. Works with SGD, Adam, AdamW and the optimizers of this package except
    :class:`Extragradient`; sees learning rates (:class:`LearningRate`).
    A cycle does not cross an epoch's end: it closes there with the steps it has, so that validation,
    checkpoints and resumed runs never see half a cycle. Where an epoch ends without notice (``max_time``,
    a loader without length) the open cycle is dropped without an outer step. A fit whose epochs are shorter than a
    cycle warns at its start; with :class:`StepsDataModule` an epoch is as long as you like. See
    :func:`lightning_nested.hypergradient.unrolled_hypergradient`.

    Args:
        num_steps: T, inner steps per outer step.
        truncate: Steps that carry a graph; None: all.

    Raises:
        ValueError: A step count is below 1.
    """

    num_steps: int
    truncate: int | None = None

    ends_with_epoch = True

    def __post_init__(self) -> None:
        at_least(1, num_steps=self.num_steps, truncate=self.truncate)

    @property
    def length(self) -> int:  # type: ignore[override]
        """T, inner steps per outer step."""
        return self.num_steps

    def begin(self, problem: NestedProblem) -> Cycle:
        """Return a cycle for one ``fit``."""
        return UnrolledCycle(problem, min(self.num_steps, self.truncate or self.num_steps))


@checked
@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Accumulation and clipping, which the Trainer refuses in manual optimization, and the times of outer steps.

    Args:
        accumulate_grad_batches: Batches per inner step; an epoch's last step may have fewer.
        gradient_clip_val: Limit of the inner gradient; None: none.
        gradient_clip_algorithm: Limit of the norm of all gradients, or of each entry.
        warmup_steps: Inner steps before the first cycle.
        restart_every: Re-initialise weights and inner optimizer state after this many outer steps; None: never.
        max_skipped: Successive outer steps that may fail (non-finite values, no positive curvature) before
            the run ends with ``FloatingPointError``.
        log_every_n_outer_steps: Log diagnostics and values at every n-th outer step; 0: never.
        self_check: Check products at the first outer step (one gradient more, at most four); warn of what is wrong.

    Raises:
        ValueError: A value is out of range.
    """

    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    warmup_steps: int = 0
    restart_every: int | None = None
    max_skipped: int = 10
    log_every_n_outer_steps: int = 10
    self_check: bool = True

    def __post_init__(self) -> None:
        positive(gradient_clip_val=self.gradient_clip_val)
        at_least(1, accumulate_grad_batches=self.accumulate_grad_batches, restart_every=self.restart_every)
        at_least(0, warmup_steps=self.warmup_steps, max_skipped=self.max_skipped)
        at_least(0, log_every_n_outer_steps=self.log_every_n_outer_steps)
