"""Joint gradient of a game and its Jacobian: dense, and as products from one kept graph.

With losses L_i and players θ_i the joint gradient is ξ = (∂L_1/∂θ_1, …, ∂L_n/∂θ_n), and J = ∂ξ/∂θ. Unlike a
Hessian J is not symmetric, and its eigenvalues are complex where the players are in conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_nested.arguments import checked
from lightning_nested.linalg.curvature import gradient_with_graph, owned
from lightning_nested.linalg.graph import explain_double_backward
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.processes import Reduce, average
from lightning_nested.linalg.vectors import Vector, flatten, unflatten, zeros_where_none

Player: TypeAlias = Tensor | tuple[Tensor, ...]
"""A tensor, or the parameters of a network, that one player holds."""

PlayersT = TypeVar("PlayersT", bound="tuple[Player, ...]")

Losses: TypeAlias = Callable[[PlayersT], Sequence[Tensor]] | Sequence[Tensor]
"""A function of the players, or the losses themselves with graphs that reach the players' tensors."""


@checked
def joint_gradient(
    losses: Losses[PlayersT], players: PlayersT, *, create_graph: bool = False, reduce: Reduce | None = None
) -> PlayersT:
    """Compute each player's gradient of its own loss, ξ = (∂L_i/∂θ_i)_i.

    No player's loss reaches another player's gradient, so nothing has to be frozen or toggled.

    Args:
        losses: ``losses(players) -> scalars``, or those scalars with graphs.
        players: Per player a tensor or a tuple of tensors. Tensors that require no gradient are seen as leaves.
        create_graph: Keep a graph of the gradients.
        reduce: Averages a tensor over processes: all gradients then travel in one message.

    Returns:
        Gradients of the same structure as ``players``; zeros for a tensor that its loss does not depend on.

    Raises:
        ValueError: Players share a parameter, or one has a loss that does not depend on it.
        FloatingPointError: A loss is not finite.

    Example:
        >>> x, y = torch.tensor([2.0]), torch.tensor([3.0])
        >>> [g.item() for g in joint_gradient(lambda p: ((p[0] * p[1]).sum(), -(p[0] * p[1]).sum()), (x, y))]
        [3.0, -2.0]
    """
    values, tensors, owners = _evaluate(losses, players, reduce)
    gradient: list[Tensor] = []
    for player, loss in enumerate(values):
        own = tuple(t for t, o in zip(tensors, owners, strict=True) if o == player)
        keep = create_graph or player < len(values) - 1
        found = torch.autograd.grad(
            loss, own, create_graph=create_graph, retain_graph=keep, allow_unused=True
        )
        _check_used(found, player)
        gradient += zeros_where_none(found, own)
    return _structured(average(tuple(gradient), reduce), players)


@checked
def game_jacobian(losses: Losses[PlayersT], players: PlayersT, *, reduce: Reduce | None = None) -> Tensor:
    """Compute the dense Jacobian J of the joint gradient, shape (n, n), row i the gradient of ξ_i.

    One backward pass a row: for small games; :class:`JacobianOperator` has products. Arguments and errors as in
    :func:`joint_gradient`; n counts the numbers that all players hold, the first player's first.

    Example:
        >>> from lightning_nested.games import QuadraticGame
        >>> game = QuadraticGame.from_eigenvalues([0.5 + 2j])
        >>> game_jacobian(game.losses, game.initial()).tolist()
        [[0.5, 2.0], [-2.0, 0.5]]
    """
    return JacobianOperator(losses, players, reduce=reduce).dense()


class JacobianOperator(LinearOperator):
    """Products with J and its transpose: ``J @ v``, ``J.matvec(v)`` = J v, ``J.rmatvec(v)`` = Jᵀ v, ``J.T``.

    The gradients are built once with their graphs; a product is then one backward pass through them, so all
    products see the same batch and noise. Jᵀu is the derivative of ⟨ξ, u⟩. The i-th block of J v is the
    derivative of ⟨∂L_i/∂θ, v⟩ with respect to θ_i, because the Hessian of each L_i is symmetric; no third
    derivative is needed, as it would be in forward mode by two transpositions.

    Vectors are flat tuples of tensors, the first player's tensors first. Arguments and errors as in
    :func:`joint_gradient`; with ``reduce`` products are those of the whole batch.

    Attributes:
        like: Tensors of the players, one after the other.
        owners: Index of the player for each of them.
        gradient: Joint gradient of this process, with its graph.

    Raises:
        DoubleBackwardError: An operation of a loss can be differentiated only once.

    Example:
        >>> from lightning_nested.games import Bilinear
        >>> jacobian = JacobianOperator(Bilinear().losses, Bilinear().initial())
        >>> (jacobian @ torch.tensor([1.0, 2.0], dtype=torch.float64)).tolist()
        [2.0, -1.0]
    """

    symmetric = False
    like: Vector

    def __init__(self, losses: Losses[PlayersT], players: PlayersT, *, reduce: Reduce | None = None) -> None:
        self._losses, self.like, self.owners = _evaluate(losses, players, reduce)
        self.reduce = reduce
        self.gradient: Vector = ()
        for player, loss in enumerate(self._losses):
            own = gradient_with_graph(loss, self.tensors_of(player))
            _check_used([g if g.requires_grad else None for g in own], player)
            self.gradient += own

    @property
    def size(self) -> int:
        """Numbers that all players hold."""
        return sum(p.numel() for p in self.like)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers that each player holds."""
        return tuple(sum(p.numel() for p in self.tensors_of(i)) for i in range(len(self._losses)))

    def tensors_of(self, player: int) -> Vector:
        """Return the tensors of one player."""
        return tuple(p for p, owner in zip(self.like, self.owners, strict=True) if owner == player)

    @cached_property
    def _full(self) -> list[Vector]:
        """∂L_i/∂θ for all of θ, with graphs; only products with J need them."""
        return [gradient_with_graph(loss, self.like) for loss in self._losses]

    def matvec(self, v: Vector) -> Vector:
        """Return J v, by one backward pass per player."""
        products: list[Tensor | None] = []
        for player, gradient in enumerate(self._full):
            products += derivative(gradient, self.tensors_of(player), v)
        return average(owned(products, self.like, v), self.reduce)

    def rmatvec(self, v: Vector) -> Vector:
        """Return Jᵀ v, by one backward pass."""
        return average(owned(derivative(self.gradient, self.like, v), self.like, v), self.reduce)

    @property
    def T(self) -> TransposedOperator:  # noqa: N802
        """Jᵀ as an operator; it has the same eigenvalues, and cheaper products."""
        return TransposedOperator(self)

    def block(self, player: int) -> PlayerBlock:
        """Return a player's own block ∂²L_i/∂θ_i², symmetric, on that player's tensors alone.

        Raises:
            ValueError: No such player.
        """
        if not 0 <= player < len(self._losses):
            raise ValueError(f"player must lie in [0, {len(self._losses)}). Got {player}.")
        own = tuple(g for g, owner in zip(self.gradient, self.owners, strict=True) if owner == player)
        return PlayerBlock(own, self.tensors_of(player), self.reduce)

    def dense(self) -> Tensor:
        """Return J as a matrix of shape (n, n), by one product with Jᵀ a row."""
        units = torch.eye(self.size, dtype=self.like[0].dtype, device=self.like[0].device)
        return torch.stack([flatten(self.rmatvec(unflatten(unit, self.like))) for unit in units])


class TransposedOperator(LinearOperator):
    """Jᵀ of a :class:`JacobianOperator`."""

    symmetric = False

    def __init__(self, operator: JacobianOperator) -> None:
        self.T, self.like = operator, operator.like

    def matvec(self, v: Vector) -> Vector:
        """Return Jᵀ v."""
        return self.T.rmatvec(v)

    def rmatvec(self, v: Vector) -> Vector:
        """Return J v."""
        return self.T.matvec(v)


class PlayerBlock(LinearOperator):
    """Own block ∂²L_i/∂θ_i² of a player, by the kept graph of its gradient."""

    like: Vector

    def __init__(self, gradient: Vector, tensors: Vector, reduce: Reduce | None) -> None:
        self.gradient, self.like, self.reduce = gradient, tensors, reduce

    def matvec(self, v: Vector) -> Vector:
        """Return ∂⟨∂L_i/∂θ_i, v⟩/∂θ_i, by one backward pass."""
        return average(owned(derivative(self.gradient, self.like, v), self.like, v), self.reduce)


def derivative(outputs: Sequence[Tensor], inputs: Vector, v: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Differentiate ⟨outputs, v⟩ with respect to the inputs."""
    live = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not live:  # every loss is linear
        return [None] * len(inputs)
    with explain_double_backward():
        return torch.autograd.grad(
            [outputs[i] for i in live], inputs, [v[i] for i in live], retain_graph=True, allow_unused=True
        )


def _evaluate(
    losses: Losses[PlayersT], players: PlayersT, reduce: Reduce | None
) -> tuple[tuple[Tensor, ...], Vector, tuple[int, ...]]:
    """Return losses with graphs, the tensors that they are functions of, and the player of each tensor."""
    if isinstance(players, Tensor) or not players:
        raise ValueError(f"players must be a tuple with one entry per player. Got {type(players).__name__}.")
    tensors: list[Tensor] = []
    owners: list[int] = []
    for index, player in enumerate(players):
        held = (player,) if isinstance(player, Tensor) else tuple(player)
        if not held:
            raise ValueError(f"Every player must hold a tensor. Got none for player {index}.")
        tensors += held
        owners += [index] * len(held)
    _check_distinct(tensors, owners)
    found: object = losses
    if callable(losses):
        with torch.enable_grad():
            tensors = [t if t.requires_grad else t.detach().requires_grad_(True) for t in tensors]
            found = losses(_structured(tuple(tensors), players))
    return _checked_losses(found, len(players), reduce), tuple(tensors), tuple(owners)


def _structured(tensors: Vector, players: PlayersT) -> PlayersT:
    """Return the tensors in the structure of ``players``."""
    rest = iter(tensors)
    made = (next(rest) if isinstance(p, Tensor) else tuple(next(rest) for _ in p) for p in players)
    return tuple(made)  # type: ignore[return-value]  # the structure of `players`, entry by entry


def _check_distinct(tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
    """Refuse parameters that are held twice; plain tensors become leaves of their own, even the same one."""
    held: list[tuple[int, int, int, Tensor]] = []  # first byte, end, owner, tensor
    for tensor, owner in zip(tensors, owners, strict=True):
        if not tensor.is_floating_point():
            raise ValueError(
                f"Players must hold floating-point tensors. Got {tensor.dtype} for player {owner}."
            )
        if tensor.requires_grad and tensor.numel() and not tensor.is_meta:
            reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            first = tensor.data_ptr()
            held.append((first, first + reach * tensor.element_size(), owner, tensor))
    held.sort(key=lambda entry: entry[:2])
    near: list[tuple[int, int, int, Tensor]] = []  # those before that reach into the current one
    for entry in held:
        near = [e for e in near if e[1] > entry[0]]
        for other in near:
            if _overlap(other[3], entry[3]):
                raise ValueError(
                    "Every tensor must belong to one player, once. Got one of shape "
                    f"{tuple(entry[3].shape)} for players {min(other[2], entry[2])} and {max(other[2], entry[2])}: "
                    "give a shared part to one of them, or copy it."
                )
        near.append(entry)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Return True if tensors on overlapping stretches of memory have numbers in common; two columns have none."""

    def places(tensor: Tensor) -> Tensor:
        offsets = torch.zeros((), dtype=torch.int64)
        for n, step in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = offsets[..., None] + step * torch.arange(n)
        return tensor.data_ptr() + tensor.element_size() * offsets

    return a.device == b.device and bool(torch.isin(places(a), places(b)).any())


def _checked_losses(losses: object, num_players: int, reduce: Reduce | None) -> tuple[Tensor, ...]:
    """Return the losses, if they are one finite scalar with a graph for each player."""
    if isinstance(losses, Tensor) or not isinstance(losses, Iterable):
        raise ValueError(
            f"losses must return one scalar tensor for each player, in a tuple. Got a {type(losses).__name__}; "
            "return (loss_1, loss_2, ...)."
        )
    values = tuple(losses)
    for index, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"The loss of player {index} must be a scalar tensor with its graph. Got a {type(value).__name__}; "
                "compute it with torch operations, without .item() or float()."
            )
    if len(values) != num_players or any(v.numel() != 1 for v in values):
        raise ValueError(
            f"losses must hold one scalar loss for each of the {num_players} players. "
            f"Got shapes {[tuple(v.shape) for v in values]}."
        )
    for index, value in enumerate(values):
        if not value.requires_grad:
            raise ValueError(
                f"The loss of player {index} must have a graph. Got one without; is it detached?"
            )
    together = torch.stack([v.detach().reshape(()) for v in values])
    together = together if reduce is None else reduce(together)  # every process raises, or none
    if not bool(torch.isfinite(together).all()):
        raise FloatingPointError(
            f"Every loss must be finite. Got {together.tolist()}: lower the learning rates, or look at the data."
        )
    return values


def _check_used(gradient: Sequence[Tensor | None], player: int) -> None:
    if all(g is None for g in gradient):
        raise ValueError(
            f"The loss of player {player} must depend on that player. Got one that does not: is the player frozen, "
            "or its output detached?"
        )
