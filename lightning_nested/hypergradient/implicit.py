"""Implicit differentiation: how the outer loss changes when the inner optimum moves with the hyperparameters.

At w*(λ) = argmin L_T(w, λ) the implicit function theorem gives

    dL_V/dλ = ∂L_V/∂λ − (∂L_V/∂w) H⁻¹ ∂²L_T/∂w∂λ,   H = ∂²L_T/∂w².

Lorraine, Vicol & Duvenaud (2020), AISTATS, PMLR 108:1540-1552.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_nested.arguments import checked
from lightning_nested.hypergradient.inner_curvature import (
    AnyCurvature,
    Curvature,
    Linearization,
    Loss,
    Mixed,
    as_curvature,
)
from lightning_nested.linalg.curvature import FiniteDifferenceOperator
from lightning_nested.linalg.first_derivatives import first_derivative
from lightning_nested.linalg.graph import (
    HIDDEN,
    DoubleBackwardError,
    hides_layers,
    infinite_operations,
    without_hooks,
)
from lightning_nested.linalg.operators import AveragedOperator, DiagonalOperator, LinearOperator, UnitProducts
from lightning_nested.linalg.processes import Reduce, average
from lightning_nested.linalg.shards import in_shards
from lightning_nested.linalg.solvers.base import InverseSolver, Solution, SolverState
from lightning_nested.linalg.solvers.given import AnySolver, as_solver
from lightning_nested.linalg.vectors import Vector, double_dot, norm, scale_, zeros_where_none


class Penalty(Protocol):
    """A regularizer of the inner loss whose derivatives are known in closed form, so that it needs no graph."""

    def curvature(self) -> LinearOperator:
        """Return ∂²P/∂w², identical on every process."""

    def mixed(self, v: Vector) -> Vector:
        """Return vᵀ ∂²P/∂w∂λ, one fresh tensor per unconstrained tensor of the penalty."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImplicitResult:
    """A hypergradient and how it was found."""

    hypergradient: Vector  # dL_V/dλ, one tensor per hyperparameter in the losses' graphs
    penalties: tuple[Vector, ...]  # hypergradients of each penalty's own tensors
    solution: Solution  # of the inverse-vector product
    # ∂L_T/∂w without the penalties, averaged over processes; should be small. None: nothing needed it, or asked for it.
    inner_gradient: Vector | None
    # To the hypergradient of Identity(). NaN unless asked for, and with a given mixed product, whose second evaluation
    # may be of other batches.
    identity_cosine: float = math.nan
    unreached: tuple[int, ...] = ()  # hyperparameters in no loss's graph; their hypergradients are zero

    @property
    def gradients(self) -> Vector:
        """All hypergradients: of the hyperparameters in the graphs, then of the penalties' tensors."""
        return _join(self.hypergradient, self.penalties)


Inspect: TypeAlias = Callable[[Linearization | None, Vector], AbstractContextManager[Linearization | None]]
"""What looks at a hypergradient: given the linearized inner loss, None where nothing needs it, and the outer gradient,
it returns a context that is open from the solve to the mixed derivative, and gives the linearized loss whose products
both are made of."""

Otherwise: TypeAlias = Callable[[DoubleBackwardError], tuple[Curvature, Loss]]
"""Given the error about a missing second derivative, it returns a curvature that needs none, and the inner loss for it;
or raises."""


def implicit_result(
    inner_loss: Loss,
    outer_loss: Tensor,
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    *,
    solver: AnySolver = None,
    curvature: AnyCurvature = None,
    penalties: Sequence[Penalty] = (),
    state: SolverState | None = None,
    reduce: Reduce | None = None,
    inner_scale: float = 1.0,
    allow_unused: bool = False,
    compare_identity: bool = False,
    keep_gradient: bool = True,
    inspect: Inspect | None = None,
    mixed: Mixed | None = None,
    otherwise: Otherwise | None = None,
) -> ImplicitResult:
    """Run the engine behind :func:`implicit_hypergradient`, the callback and NestedModule.

    Args:
        inner_loss: Training loss, a scalar with its graph, or a function without arguments that returns it.
        outer_loss: Validation loss with its graph, which is freed.
        params: Inner parameters w.
        hparams: Hyperparameters λ that appear in the graphs.
        solver: Solver for H⁻¹v; default ``Neumann()``.
        curvature: Curvature in place of H; default ``Hessian()``.
        penalties: Regularizers in closed form, added to H and to the mixed derivative.
        state: The solver's state from the previous call.
        reduce: Averages a tensor over processes.
        inner_scale: Factor of ``inner_loss`` (a GradScaler's), taken off after each product; no given operator has it.
        allow_unused: Give zeros for hyperparameters that the inner gradient does not depend on.
        compare_identity: Also fill ``identity_cosine`` (one more product).
        keep_gradient: Also fill ``inner_gradient`` (one more message between processes).
        inspect: See :data:`Inspect`.
        mixed: Product (v, λ) → vᵀ ∂²L_T/∂w∂λ, with the factor ``inner_scale``, in place of that of ``inner_loss``.
        otherwise: What to do where ``inner_loss`` has no second derivative; None: raise.
    """
    w, hyper = tuple(params), tuple(hparams)
    _check_inputs(outer_loss, inner_loss, w, hyper, penalties)
    if reduce is not None and hides_layers(outer_loss):
        raise DoubleBackwardError(HIDDEN)
    with without_hooks(w):
        outer = first_derivative(outer_loss, (*w, *hyper))
        b, direct = average(zeros_where_none(outer[: len(w)], w), reduce), outer[len(w) :]
        solve = partial(
            _solve,
            as_solver(solver),
            b=b,
            direct=direct,
            inner=_InnerProblem(None, mixed, hyper, penalties, reduce, inner_scale),
            params=w,
            state=state,
            allow_unused=allow_unused,
            compare_identity=compare_identity,
            keep_gradient=keep_gradient,
            inspect=inspect,
        )
        try:
            return solve(curvature=as_curvature(curvature), inner_loss=inner_loss)
        except DoubleBackwardError as error:
            if otherwise is None:
                raise
            curvature, inner_loss = otherwise(error)
        return solve(curvature=curvature, inner_loss=inner_loss)


def _solve(
    inverse: InverseSolver,
    *,
    curvature: Curvature,
    inner_loss: Loss,
    b: Vector,
    direct: Sequence[Tensor | None],
    inner: _InnerProblem,
    params: Vector,
    state: SolverState | None,
    allow_unused: bool,
    compare_identity: bool,
    keep_gradient: bool,
    inspect: Inspect | None,
) -> ImplicitResult:
    """Find the hypergradient from the outer gradient b; ``inner`` is filled in here."""
    problem, mixed, reduce = None, inner.mixed, inner.reduce
    if (inner.hparams and mixed is None) or inverse.needs_operator:
        problem, state = _linearize(curvature, inner_loss, params, b, state)
    watch = nullcontext(problem) if inspect is None else inspect(problem, b)
    with _explain_infinite_curvature(inner_loss, params, problem), watch as watched:
        inner = replace(inner, problem=watched)
        # Sums over shards are those of all processes already.
        solution = inverse.solve(inner.operator(), b, state=state, reduce=None if in_shards(b) else reduce)
        found, closed, unreached = inner.hypergradient(solution.x, direct, allow_unused)
    compares = compare_identity and mixed is None
    plain = inner.hypergradient(b, direct, allow_unused)[:2] if compares else None
    gradient = problem.gradient if problem is not None and keep_gradient else None
    return ImplicitResult(
        hypergradient=found,
        penalties=closed,
        solution=solution,
        inner_gradient=None if gradient is None else average(_unscale(gradient, inner.scale), reduce),
        identity_cosine=math.nan if plain is None else _cosine(_join(found, closed), _join(*plain)),
        unreached=unreached,
    )


@dataclass(frozen=True)
class _InnerProblem:
    """The linearized inner loss with its penalties, on the global batch and without the loss's factor."""

    # None: nothing multiplies with the curvature, and the mixed product is given or not needed.
    problem: Linearization | None
    mixed: Mixed | None  # in place of that of the problem
    hparams: Vector
    penalties: Sequence[Penalty]
    reduce: Reduce | None
    scale: float

    def operator(self) -> LinearOperator:
        if self.problem is None:
            return DiagonalOperator(0.0)
        operator = self.problem.curvature
        if self.scale != 1.0 and self.problem.scaled:  # fp16: its range is short
            operator = UnitProducts(operator) * (1.0 / self.scale)
        if self.reduce is not None:
            operator = AveragedOperator(operator, self.reduce)
        for penalty in self.penalties:
            operator = operator + penalty.curvature()
        return operator

    def hypergradient(
        self, v: Vector, direct: Sequence[Tensor | None], allow_unused: bool
    ) -> tuple[Vector, tuple[Vector, ...], tuple[int, ...]]:
        """∂L_V/∂λ − vᵀ ∂²L_T/∂w∂λ; −vᵀ ∂²P/∂w∂λ of each penalty; and indices of hyperparameters in no graph."""
        # At unit length where the loss carries a factor, as in UnitProducts.
        size = (float(norm(v)) if self.scale != 1.0 else 1.0) or 1.0
        product = self.mixed if self.problem is None or self.mixed is not None else self.problem.mixed
        mixed = () if product is None else product(_unscale(v, size), self.hparams)
        for i, (m, d) in enumerate(zip(mixed, direct, strict=True)):
            if m is None and not allow_unused:
                raise ValueError(unseen_hyperparameter(i, outer_sees=d is not None))
        factor = size / self.scale
        total = tuple(
            _combined(h, d, m, -factor) for h, d, m in zip(self.hparams, direct, mixed, strict=True)
        )
        unreached = tuple(
            i for i, pair in enumerate(zip(mixed, direct, strict=True)) if pair[0] is None and pair[1] is None
        )
        return average(total, self.reduce), tuple(scale_(p.mixed(v), -1.0) for p in self.penalties), unreached


@checked
def implicit_hypergradient(
    inner_loss: Loss,
    outer_loss: Tensor,
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    *,
    solver: AnySolver = None,
    curvature: AnyCurvature = None,
    reduce: Reduce | None = None,
) -> Vector:
    """Gradient of the outer loss with respect to the hyperparameters, through the inner optimum.

    dL_V/dλ = ∂L_V/∂λ − (∂L_V/∂w) H⁻¹ ∂²L_T/∂w∂λ, exact where ∂L_T/∂w = 0 and H is positive definite.
    Used like ``torch.autograd.grad``: scalars with their graphs in, one gradient per hyperparameter out; nothing
    is accumulated into ``.grad``. The graph of ``inner_loss`` is kept, the one of ``outer_loss`` is freed.
    Lorraine, Vicol & Duvenaud (2020), AISTATS, PMLR 108:1540-1552.

    Args:
        inner_loss: Training loss, a scalar with its graph, or a function without arguments that returns it.
        outer_loss: Validation loss at the same parameters, a scalar with its graph.
        params: Inner parameters w, tensors that require gradients.
        hparams: Hyperparameters λ, tensors that require gradients.
        solver: Solver for H⁻¹v: ``Neumann()`` (default), ``ConjugateGradient()``, ``Nystrom()``, ``Identity()``,
            ``DenseSolve()``, or any object with ``A @ v`` on a flat vector as an approximate inverse.
        curvature: The curvature in place of H: ``Hessian()`` (default), ``GaussNewton(outputs=...)``,
            ``FiniteDifference()``, or any object with ``A @ v`` on a flat vector.
        reduce: Averages a tensor over processes; the result is then that of the global batch on every process.

    Returns:
        One tensor per hyperparameter, of its shape.

    Raises:
        ValueError: The gradient of the inner loss does not depend on a hyperparameter (a learning rate, say); the
            parameters are in shards.
        FloatingPointError: A value is not finite, the series diverges, or there is no positive curvature.
        DoubleBackwardError: An operation of the inner loss has no second derivative.

    Example:
        Inner ½(w−λ)² + ½w², outer ½(w−2)²; at λ = 3 the optimum is w = 1.5 and the hypergradient −0.25.

        >>> import torch
        >>> from lightning_nested.hypergradient import ConjugateGradient
        >>> w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        >>> lam = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        >>> inner = (w - lam) ** 2 / 2 + w**2 / 2
        >>> (gradient,) = implicit_hypergradient(
        ...     inner, (w - 2) ** 2 / 2, [w], [lam], solver=ConjugateGradient()
        ... )
        >>> float(gradient)
        -0.25
    """
    if in_shards(params):
        raise ValueError(
            "params must be whole on every process. Got DTensors: who moves shards must let fully_shard gather them "
            "again; use HypergradientCallback under Lightning's ModelParallelStrategy, which does."
        )
    result = implicit_result(
        inner_loss, outer_loss, params, hparams, solver=solver, curvature=curvature, reduce=reduce
    )
    return result.hypergradient


def _linearize(
    curvature: Curvature, loss: Loss, w: Vector, b: Vector, state: SolverState | None
) -> tuple[Linearization, SolverState]:
    problem = curvature.linearize(loss, w)
    return problem, _calibrated(problem, b, state)


def _calibrated(problem: Linearization, b: Vector, state: SolverState | None) -> SolverState:
    """Take the length of differences from the previous solve; measure it at solves 1, 2, 4, 8 and so on."""
    operator, state = problem.curvature, state if state is not None else SolverState()
    if not isinstance(operator, FiniteDifferenceOperator) or not operator.calibrates:
        return state
    solves = state.solves + 1
    if state.length is not None:
        operator.resume(state.length, state.sides)
    if state.length is None or solves & (solves - 1) == 0:
        operator.calibrate(b)
    return replace(state, length=operator.length, sides=operator.sides, solves=solves)


@contextmanager
def _explain_infinite_curvature(loss: Loss, params: Vector, problem: Linearization | None) -> Iterator[None]:
    """Raise an error that names the operation, if the gradient is finite and a derivative of it is not."""
    try:
        yield
    except FloatingPointError as error:
        if not isinstance(loss, Tensor) or problem is None:
            raise
        finite = all(bool(g.isfinite().all()) for g in problem.gradient)
        names = infinite_operations(loss, params) if finite else ""
        if not names:
            raise
        raise FloatingPointError(
            "The second derivative of the inner loss must be finite. Got a finite gradient whose derivative is not in "
            f"{names} (as in a norm or a root at 0): use curvature=FiniteDifference(), or keep the operation away from "
            "there, (x² + ε).sqrt() in place of x.norm() say."
        ) from error


def _combined(like: Tensor, direct: Tensor | None, mixed: Tensor | None, factor: float) -> Tensor:
    """Return direct + factor·mixed, None standing for zeros, in a tensor of its own."""
    if mixed is None:
        return torch.zeros_like(like) if direct is None else direct.detach().clone()
    scaled = mixed.detach() * factor
    return scaled if direct is None else scaled.add_(direct.detach())


def _unscale(v: Vector, scale: float) -> Vector:
    return v if scale == 1.0 else tuple(a / scale for a in v)


def _join(total: Vector, closed: tuple[Vector, ...]) -> Vector:
    return (*total, *(t for group in closed for t in group))


def _cosine(u: Vector, v: Vector) -> float:
    scale = float((double_dot(u, u) * double_dot(v, v)).sqrt())
    return float(double_dot(u, v)) / scale if scale > 0 else math.nan


def _check_inputs(
    outer_loss: Tensor, inner_loss: Loss, params: Vector, hparams: Vector, penalties: Sequence[Penalty]
) -> None:
    for name, loss in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"{name} must be a scalar. Got shape {tuple(loss.shape)}; take its mean.")
        if isinstance(loss, Tensor) and not loss.requires_grad:
            raise ValueError(
                f"{name} must carry its graph. Got a tensor that does not require gradients: was it computed under "
                "torch.no_grad(), detached, or independent of the parameters?"
            )
    if not params:
        raise ValueError("params must hold at least one tensor. Got none.")
    if not hparams and not penalties:
        raise ValueError("hparams must hold at least one tensor. Got none.")
    for name, group in (("params", params), ("hparams", hparams)):
        for i, x in enumerate(group):
            if not x.is_floating_point():
                raise ValueError(f"{name}[{i}] must be a real floating-point tensor. Got {x.dtype}.")
            if not x.requires_grad:
                raise ValueError(f"{name}[{i}] must require gradients. Got shape {tuple(x.shape)} without.")
    if overlap := {id(p) for p in params} & {id(h) for h in hparams}:
        raise ValueError(f"params and hparams must be different tensors. Got {len(overlap)} in both.")
    if not torch.isfinite(outer_loss.detach()).all():
        raise FloatingPointError(f"outer_loss must be finite. Got {float(outer_loss.detach())}.")


def unseen_hyperparameter(index: int, *, outer_sees: bool) -> str:
    """Describe a hyperparameter that the inner gradient does not depend on, and the cures."""
    if outer_sees:
        found = "and only the outer loss depends on it"
        cure = "one of outer_loss only needs torch.autograd.grad"
    else:
        found, cure = "and neither loss depends on it", "otherwise it was detached or never used"
    return (
        "unseen hyperparameter: the gradient of inner_loss must depend on every hyperparameter. Got "
        f"hparams[{index}], {found}. A hyperparameter of the update (a learning rate, a momentum) needs "
        f"unrolled_hypergradient; {cure}."
    )
