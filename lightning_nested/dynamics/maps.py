"""Maps x ↦ F(x) that push a frame of tangents along with the point, for Lyapunov exponents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.dynamics.solves import DifferentiableSolves
from lightning_nested.linalg.vectors import Vector

State: TypeAlias = Tensor | tuple[Tensor, ...]
Step: TypeAlias = Callable[[Any], Any]
"""Function from a state to the next one, in the same form: a tensor, or a tuple of tensors."""


class DifferentiableMap(ABC):
    """Map of tuples of tensors with its derivative along a frame.

    A state may carry tensors that are no coordinates, such as a step count: they come after the first
    ``num_coordinates`` ones, and frames have no entry for them.
    """

    num_coordinates: int | None = None  # None: every tensor of the state is one

    @abstractmethod
    def step(self, x: Vector) -> Vector:
        """Return the next state F(x)."""

    @abstractmethod
    def jvp(self, x: Vector, v: Vector) -> tuple[Vector, Vector]:
        """Return F(x) and the derivative J(x)·v along one tangent, a tensor per coordinate tensor."""

    def push(self, x: Vector, frame: Vector) -> tuple[Vector, Vector]:
        """Return F(x) and the frame of derivatives, one tensor (k, *shape) per coordinate tensor in and out."""
        # Dual numbers carry the value with every tangent: k equal copies of it come out.
        values, pushed = torch.vmap(lambda v: self.jvp(x, v))(frame)
        return tuple(a[0] for a in values), pushed

    def push_batch(self, x: Vector, frame: Vector) -> tuple[Vector, Vector]:
        """Apply :meth:`push` to a batch of states (batch, *shape) and their frames (batch, k, *shape)."""
        # One vmap over all pairs: through two nested ones torch 2.14 silently derives torch.linalg.solve wrongly.
        batch, k = frame[0].shape[:2]
        states = tuple(a.repeat_interleave(k, dim=0) for a in x)
        values, pushed = torch.vmap(self.jvp)(states, tuple(a.flatten(0, 1) for a in frame))
        return tuple(a[::k] for a in values), tuple(a.view(batch, k, *a.shape[1:]) for a in pushed)

    def coordinates(self, x: Vector) -> Vector:
        """Return the part of a state that has tangents."""
        return x if self.num_coordinates is None else x[: self.num_coordinates]


class FunctionMap(DifferentiableMap):
    """Map of any function that ``torch.func`` differentiates, by forward mode, all k tangents at once.

    Inside the function, take gradients by ``torch.func.grad``, not ``torch.autograd.grad``. ``single`` is True if it
    takes and returns one tensor instead of a tuple.
    """

    def __init__(self, step: Step, *, single: bool) -> None:
        self._function, self._single = step, single

    @override
    def step(self, x: Vector) -> Vector:
        out = self._function(x[0] if self._single else x)
        return (out,) if self._single else tuple(out)

    @override
    def jvp(self, x: Vector, v: Vector) -> tuple[Vector, Vector]:
        return forward_derivative(lambda *x: self.step(x), x, v)


def forward_derivative(function: Callable[..., Vector], x: Vector, v: Vector) -> tuple[Vector, Vector]:
    """Return ``function(*x)`` and its derivative along v, by forward mode; both can be differentiated."""
    with DifferentiableSolves():
        value, derivative = torch.func.jvp(function, x, v)  # type: ignore[misc]  # two without has_aux
    return value, derivative


def as_map(step: Step | DifferentiableMap, x0: State) -> DifferentiableMap:
    """Return ``step`` itself if it has a derivative of its own, else a :class:`FunctionMap`."""
    if isinstance(step, DifferentiableMap):
        return step
    if not callable(step):
        raise TypeError(f"step must be a function of the state. Got {type(step).__name__}.")
    return FunctionMap(step, single=isinstance(x0, Tensor))


def recorded(function: Callable[..., Any], *example: Any) -> Callable[..., Any]:
    """Record ``function`` as the list of its tensor operations, for inputs of the example's shapes.

    Nested transforms (a batch of forward derivatives of gradients) cost ten times the arithmetic of a small problem,
    and half of their results are never used; replaying the operations that matter avoids both. A function whose
    operations depend on values (Python branches on a tensor) is returned as it is: PyTorch refuses to record it.
    """

    def call(*inputs: Any) -> Any:
        # A recorded solve would keep its factors as constants of a derivative.
        with DifferentiableSolves():
            return function(*inputs)

    try:
        graph = make_fx(call)(*example)
        if any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in graph.graph.nodes):
            # Only without in-place operations can what nothing reads be left out.
            graph = make_fx(functionalize(call, remove="mutations"))(*example)
    except Exception:  # of any kind: a function that cannot be recorded still runs as it is
        return call
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._linalg_check_errors.default:
            graph.graph.erase_node(node)
        node.target = _REPLACED.get(node.target, node.target)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    expected, found = (tree_flatten(f(*example))[0] for f in (call, graph))
    if not all(torch.allclose(a, b, rtol=1e-4, equal_nan=True) for a, b in zip(expected, found, strict=True)):
        return call
    replay: Callable[..., Any] = graph
    return replay


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(target, non_blocking=non_blocking).expand_as(target)


# Operations that a recording holds and that autograd cannot differentiate.
_REPLACED: dict[Any, Any] = {
    torch.ops.aten.copy.default: _copied,  # has no derivative
    torch.ops.aten._efficientzerotensor.default: torch.ops.aten.zeros.default,  # holds no memory to be read
}


@checked
def rk4_step(field: Step, dt: float) -> Step:
    """Return a step of the classical Runge-Kutta method for the flow ẋ = field(x).

    x ← x + dt/6 (k₁ + 2k₂ + 2k₃ + k₄); local error O(dt⁵).

    Args:
        field: Function from a state (a tensor or a tuple of tensors) to its velocity.
        dt: Time of a step. Give the same to :func:`lyapunov_exponents`, for exponents per unit time.

    >>> step = rk4_step(lambda x: -x, 0.1)
    >>> f"{float(step(torch.tensor(1.0, dtype=torch.float64))):.6f}"  # exp(-0.1) = 0.904837
    '0.904837'
    """

    def combine(function: Callable[..., Tensor], *states: State) -> State:
        if isinstance(states[0], Tensor):
            return function(*states)
        return tuple(function(*tensors) for tensors in zip(*states, strict=True))

    def moved(x: State, velocity: State, time: float) -> State:
        return combine(lambda a, b: a + time * b, x, velocity)

    def step(x: State) -> State:
        k1 = field(x)
        k2 = field(moved(x, k1, dt / 2))
        k3 = field(moved(x, k2, dt / 2))
        k4 = field(moved(x, k3, dt))
        return moved(x, combine(lambda p, q, r, s: p + 2 * (q + r) + s, k1, k2, k3, k4), dt / 6)

    return step
