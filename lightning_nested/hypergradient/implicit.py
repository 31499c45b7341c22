"""Implicit differentiation: how the outer loss changes when the inner optimum moves with the hyperparameters.

At w*(λ) = argmin L_T(w, λ) the implicit function theorem gives

    dL_V/dλ = ∂L_V/∂λ − (∂L_V/∂w) H⁻¹ ∂²L_T/∂w∂λ,   H = ∂²L_T/∂w².

Lorraine, Vicol & Duvenaud (2020), AISTATS, PMLR 108:1540-1552.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lightning_nested.linalg.curvature import (
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    HessianOperator,
    central_difference,
    difference_length,
    gradient_with_graph,
)
from lightning_nested.linalg.graph import explain_double_backward, refuse_sparse
from lightning_nested.linalg.operators import (
    AveragedOperator,
    FlatOperator,
    LinearOperator,
    UnitProducts,
    as_operator,
)
from lightning_nested.linalg.solvers.base import InverseSolver, Solution, SolverState
from lightning_nested.linalg.solvers.given import as_solver
from lightning_nested.linalg.solvers.neumann import Neumann
from lightning_nested.linalg.vectors import Reduce, Vector, average, dot, norm, scale_

Loss: TypeAlias = Tensor | Callable[[], Tensor]


class Linearization(ABC):
    """The inner problem around its present parameters: a curvature, and products with the mixed derivative."""

    curvature: LinearOperator
    gradient: Vector  # ∂L_T/∂w, detached

    @abstractmethod
    def mixed(self, v: Vector, hparams: Vector) -> tuple[Tensor | None, ...]:
        """vᵀ ∂²L_T/∂w∂λ for each hyperparameter; None where the inner gradient does not depend on it."""


class _GraphLinearization(Linearization):
    """Mixed derivatives by one more pass through the kept graph of the gradient."""

    def __init__(self, curvature: LinearOperator, graph: Vector) -> None:
        self.curvature, self._graph = curvature, graph
        self.gradient = tuple(g.detach() for g in graph)

    def mixed(self, v: Vector, hparams: Vector) -> tuple[Tensor | None, ...]:
        live = [i for i, g in enumerate(self._graph) if g.requires_grad]
        if not live or not hparams:
            return (None,) * len(hparams)
        with explain_double_backward():
            return torch.autograd.grad(
                [self._graph[i] for i in live],
                hparams,
                [v[i] for i in live],
                retain_graph=True,
                allow_unused=True,
            )


class Curvature(ABC):
    """Strategy: which matrix stands for the inner Hessian, and how its products are made."""

    @abstractmethod
    def linearize(self, inner_loss: Loss, params: Vector) -> Linearization:
        """Prepare products around the parameters' present values."""


def _tensor(inner_loss: Loss) -> Tensor:
    return inner_loss if isinstance(inner_loss, Tensor) else inner_loss()


@dataclass(frozen=True, kw_only=True)
class Hessian(Curvature):
    """The exact Hessian through the kept graph of the gradient; see :class:`HessianOperator`."""

    def linearize(self, inner_loss: Loss, params: Vector) -> Linearization:
        """One gradient with its graph."""
        operator = HessianOperator(_tensor(inner_loss), params)
        return _GraphLinearization(operator, operator.gradient)


@dataclass(frozen=True, kw_only=True)
class GaussNewton(Curvature):
    """The generalised Gauss-Newton matrix; see :class:`GaussNewtonOperator`.

    Args:
        outputs: The tensor the inner loss is convex in, usually the logits; in a callback the dotted name of the
            submodule that returns it.
    """

    outputs: Tensor | str

    def linearize(self, inner_loss: Loss, params: Vector) -> Linearization:
        """One gradient with its graph for the mixed derivative, one pull-back with its graph for J."""
        if isinstance(self.outputs, str):
            raise TypeError(
                f"GaussNewton(outputs=...) needs the tensor itself here. Got the name {self.outputs!r}: names are "
                "resolved by HypergradientCallback."
            )
        loss = _tensor(inner_loss)
        operator = GaussNewtonOperator(loss, self.outputs, params)
        graph = gradient_with_graph(loss, params)
        return _GraphLinearization(operator, graph)


@dataclass(frozen=True, kw_only=True)
class FiniteDifference(Curvature):
    """The Hessian and the mixed derivative by central differences of gradients: no second derivative is taken.

    Two gradients a product. The inner loss must be given as a function, with its noise and statistics frozen.

    Args:
        epsilon: Length of the move relative to ``1 + ‖w‖``; None: half the cube root of the machine epsilon of the
            coarsest dtype that the loss is computed in: 0.0025 in float32, 0.1 under bfloat16 autocast.
    """

    epsilon: float | None = None

    def linearize(self, inner_loss: Loss, params: Vector) -> Linearization:
        """One gradient."""
        if isinstance(inner_loss, Tensor):
            raise TypeError(
                "FiniteDifference() evaluates the inner loss again: inner_loss must be a function without arguments "
                f"that returns it. Got a {type(inner_loss).__name__}."
            )
        return _DifferenceLinearization(inner_loss, params, self.epsilon)


def _gradient(loss: Tensor, inputs: Vector) -> Vector:
    gradient = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    refuse_sparse(gradient)
    return gradient


class _DifferenceLinearization(Linearization):
    def __init__(self, loss: Callable[[], Tensor], params: Vector, epsilon: float | None) -> None:
        self._loss, self._params = loss, params
        value = loss()
        length = epsilon if epsilon is not None else difference_length(value, params)
        self.gradient = _gradient(value, params)
        operator = FiniteDifferenceOperator(lambda: _gradient(loss(), params), params, epsilon=length)
        self.curvature, self._length = operator, operator._length

    def mixed(self, v: Vector, hparams: Vector) -> tuple[Tensor | None, ...]:
        if not hparams:
            return ()
        seen = torch.autograd.grad(self._loss(), hparams, allow_unused=True)
        reached = [i for i, g in enumerate(seen) if g is not None]
        if not reached:
            return (None,) * len(hparams)
        live = tuple(hparams[i] for i in reached)
        products = central_difference(lambda: _gradient(self._loss(), live), self._params, v, self._length)
        result: list[Tensor | None] = [None] * len(hparams)
        for i, product in zip(reached, products, strict=True):
            result[i] = product
        return tuple(result)


class _GivenCurvature(Linearization):
    """A curvature the user brings, with mixed derivatives of the real loss."""

    def __init__(self, operator: LinearOperator, inner_loss: Loss, params: Vector) -> None:
        graph = gradient_with_graph(_tensor(inner_loss), params)
        self._graph = _GraphLinearization(operator, graph)
        self.curvature, self.gradient = operator, self._graph.gradient

    def mixed(self, v: Vector, hparams: Vector) -> tuple[Tensor | None, ...]:
        return self._graph.mixed(v, hparams)


class Penalty(Protocol):
    """A regularizer of the inner loss whose derivatives are known in closed form, so that it needs no graph."""

    def curvature(self) -> LinearOperator:
        """∂²P/∂w², identical on every process."""

    def mixed(self, v: Vector) -> Vector:
        """vᵀ ∂²P/∂w∂λ, one fresh tensor per unconstrained tensor of the penalty."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImplicitResult:
    """A hypergradient and how it was found.

    Attributes:
        hypergradient: dL_V/dλ, one tensor per hyperparameter in the losses' graphs.
        penalties: The same for each penalty's own tensors.
        solution: Of the inverse-vector product.
        inner_gradient: ∂L_T/∂w without the penalties, averaged over processes; should be small.
        outer_gradient: ∂L_V/∂w, averaged over processes.
        identity_cosine: Cosine between this hypergradient and the one of ``Identity()``; NaN unless asked for.
    """

    hypergradient: Vector
    penalties: tuple[Vector, ...]
    solution: Solution
    inner_gradient: Vector
    outer_gradient: Vector
    identity_cosine: float = math.nan


def implicit_result(
    inner_loss: Loss,
    outer_loss: Tensor,
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    *,
    solver: InverseSolver | LinearOperator | FlatOperator | None = None,
    curvature: Curvature | LinearOperator | FlatOperator | None = None,
    penalties: Sequence[Penalty] = (),
    state: SolverState | None = None,
    reduce: Reduce | None = None,
    inner_scale: float = 1.0,
    allow_unused: bool = False,
    compare_identity: bool = False,
) -> ImplicitResult:
    """The engine behind :func:`implicit_hypergradient`, the callback and NestedModule; see there.

    Args:
        inner_loss: Scalar with its graph, or a function that returns it.
        outer_loss: Scalar with its graph, which is freed.
        params: Inner parameters w.
        hparams: Hyperparameters λ that appear in the graphs.
        solver: How H⁻¹v is found; default ``Neumann()``.
        curvature: What stands for H; default ``Hessian()``. Any object with ``A @ v`` on a flat vector.
        penalties: Regularizers in closed form, added to H and to the mixed derivative.
        state: The solver's state from the previous call.
        reduce: Averages a tensor over processes: then the result is the hypergradient of the global batch.
        inner_scale: Factor that ``inner_loss`` already carries (a GradScaler's), taken off after each product; a
            given operator is the curvature without it.
        allow_unused: Give zeros for hyperparameters that the inner gradient does not depend on.
        compare_identity: Also fill ``identity_cosine`` (one more product).
    """
    w, hyper = tuple(params), tuple(hparams)
    _check_inputs(outer_loss, inner_loss, w, hyper, penalties)
    grads = torch.autograd.grad(outer_loss, (*w, *hyper), allow_unused=True)
    refuse_sparse(grads)
    b = average(_zeros_where_none(grads[: len(w)], w), reduce)
    direct = grads[len(w) :]

    if curvature is None:
        curvature = Hessian()
    if isinstance(curvature, Curvature):
        problem = curvature.linearize(inner_loss, w)
        operator = problem.curvature
        if inner_scale != 1.0:  # fp16: its range is short
            operator = UnitProducts(operator) * (1.0 / inner_scale)
    else:
        problem = _GivenCurvature(as_operator(curvature, w), inner_loss, w)
        operator = problem.curvature  # its owner knows nothing of the scale
    if reduce is not None:
        operator = AveragedOperator(operator, reduce)
    for penalty in penalties:
        operator = operator + penalty.curvature()
    solution = as_solver(solver if solver is not None else Neumann()).solve(
        operator, b, state=state, reduce=reduce
    )

    def indirect(v: Vector) -> tuple[Vector, tuple[Vector, ...]]:
        size = float(norm(v)) if inner_scale != 1.0 else 1.0  # as in UnitProducts
        factor = size / inner_scale if size > 0 else 1.0
        mixed = problem.mixed(v if inner_scale == 1.0 else tuple(a / (size or 1.0) for a in v), hyper)
        if not allow_unused:
            _refuse_unseen(mixed, direct, hyper)
        total = tuple(
            (torch.zeros_like(h) if d is None else d.detach()) - (0.0 if m is None else m.detach() * factor)
            for h, d, m in zip(hyper, direct, mixed, strict=True)
        )
        closed = tuple(scale_(penalty.mixed(v), -1.0) for penalty in penalties)
        return (average(total, reduce) if total else total), closed

    hypergradient, closed = indirect(solution.x)
    cosine = math.nan
    if compare_identity:
        plain, plain_closed = indirect(b)
        cosine = _cosine(_join(hypergradient, closed), _join(plain, plain_closed))
    return ImplicitResult(
        hypergradient=hypergradient,
        penalties=closed,
        solution=solution,
        inner_gradient=average(_unscale(problem.gradient, inner_scale), reduce),
        outer_gradient=b,
        identity_cosine=cosine,
    )


def implicit_hypergradient(
    inner_loss: Loss,
    outer_loss: Tensor,
    params: Sequence[Tensor],
    hparams: Sequence[Tensor],
    *,
    solver: InverseSolver | LinearOperator | FlatOperator | None = None,
    curvature: Curvature | LinearOperator | FlatOperator | None = None,
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
        solver: How H⁻¹v is found: ``Neumann()`` (default), ``ConjugateGradient()``, ``Nystrom()``, ``Identity()``,
            ``DenseSolve()``, or any object with ``A @ v`` on a flat vector as an approximate inverse.
        curvature: What stands for H: ``Hessian()`` (default), ``GaussNewton(outputs=...)``, ``FiniteDifference()``,
            or any object with ``A @ v`` on a flat vector.
        reduce: Averages a tensor over processes; the result is then that of the global batch on every process.

    Returns:
        One tensor per hyperparameter, of its shape.

    Raises:
        ValueError: The gradient of the inner loss does not depend on a hyperparameter (a learning rate, say).
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
    result = implicit_result(
        inner_loss, outer_loss, params, hparams, solver=solver, curvature=curvature, reduce=reduce
    )
    return result.hypergradient


def _zeros_where_none(grads: Sequence[Tensor | None], like: Vector) -> Vector:
    return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(grads, like, strict=True))


def _unscale(v: Vector, scale: float) -> Vector:
    return v if scale == 1.0 else tuple(a / scale for a in v)


def _join(total: Vector, closed: tuple[Vector, ...]) -> Vector:
    return (*total, *(t for group in closed for t in group))


def _cosine(u: Vector, v: Vector) -> float:
    scale = float(norm(u) * norm(v))
    return float(dot(u, v)) / scale if scale > 0 else math.nan


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
        for i, tensor in enumerate(group):
            if not tensor.requires_grad:
                raise ValueError(
                    f"{name}[{i}] must require gradients. Got shape {tuple(tensor.shape)} without."
                )
    overlap = {id(p) for p in params} & {id(h) for h in hparams}
    if overlap:
        raise ValueError(
            f"params and hparams must be different tensors. Got {len(overlap)} tensor(s) in both."
        )
    if not torch.isfinite(outer_loss.detach()).all():
        raise FloatingPointError(f"outer_loss must be finite. Got {float(outer_loss.detach())}.")


def _refuse_unseen(mixed: Sequence[Tensor | None], direct: Sequence[Tensor | None], hparams: Vector) -> None:
    for i, (m, d) in enumerate(zip(mixed, direct, strict=True)):
        if m is None:
            seen = "only the outer loss depends on it" if d is not None else "neither loss depends on it"
            raise ValueError(
                f"The gradient of inner_loss must depend on every hyperparameter. Got hparams[{i}] of shape "
                f"{tuple(hparams[i].shape)}: {seen}. A hyperparameter of the update (a learning rate, a momentum) "
                "has no mixed derivative of the loss: use unrolled_hypergradient. One of the outer loss alone needs "
                "torch.autograd.grad only."
            )
