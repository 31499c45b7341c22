"""The optimizer as a map from parameters *and* optimizer state to those after one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.arguments import checked
from lightning_nested.dynamics.maps import DifferentiableMap, forward_derivative
from lightning_nested.linalg.vectors import Vector, clone
from lightning_nested.optim.registry import known_rule
from lightning_nested.optim.update_rules import Descent, UpdateRule

Params: TypeAlias = Sequence[Tensor]
Losses: TypeAlias = Callable[..., Any]
"""Function from a tuple of parameters to a scalar, or from a tuple of players to a tuple of scalars."""


@checked
def update_map(
    optimizer: Optimizer | Sequence[Optimizer],
    loss: Losses,
    *,
    alternating: bool = False,
    rule: UpdateRule | None = None,
) -> UpdateMap:
    """Return the exact map (w, optimizer state) ↦ (w′, optimizer state′) of one ``optimizer.step()``.

    Its derivative along a tangent is in closed form over one product with the Hessian (for a game: with the Jacobian
    of its gradient); nothing differentiates through the optimizer itself.

    Known optimizers: ``torch.optim.SGD`` (momentum, dampening, Nesterov), ``Adam``, ``AdamW``; ``ComplexSGD``,
    ``ComplexAdam``, ``Extragradient``, ``ExtrapolationFromThePast``, ``NuPI``, ``OptimisticSGD``, ``OptimisticAdam``.
    Options are read once, here: a scheduler's changes are not part of the map.

    Args:
        optimizer: One, or one for each player. Only its options and current state are read; it is never stepped.
        loss: ``loss(params) -> scalar``, with ``params`` the tuple of the optimizer's parameters in their order; or the
            game ``losses(players) -> tuple of scalars``. A player is the tensor of its optimizer, or the tuple of its
            tensors if there are several; with a single optimizer every parameter is a player. Made of operations that
            ``torch.func`` differentiates, and a function of its argument alone: fix batches and noise.
        alternating: Let players step one after the other, each seeing the others' new parameters.
        rule: Update rule of an optimizer that is not known, used for every parameter.

    Returns:
        A :class:`DifferentiableMap` for :func:`lyapunov_exponents`; ``initial()`` gives its first state.

    Raises:
        ValueError: An optimizer without a known rule, options outside the known rule (amsgrad), losses that do not
            fit the players, or ``alternating`` with one loss or with extragradient.

    >>> w = torch.tensor([1.0], dtype=torch.float64)
    >>> F = update_map(torch.optim.SGD([w], lr=0.1, momentum=0.9), lambda p: 0.5 * (p[0] ** 2).sum())
    >>> from lightning_nested.dynamics import lyapunov_exponents
    >>> found = lyapunov_exponents(F, F.initial(), k=2, num_steps=1000)
    >>> f"{float(found.sum()):.6f}"  # det J = momentum
    '-0.105361'
    """
    return UpdateMap(optimizer, loss, alternating=alternating, rule=rule)


class UpdateMap(DifferentiableMap):
    """Map of one optimizer step, made by :func:`update_map`.

    A state is (parameters…, buffers of the first parameter…, …, step count).

    Attributes:
        rules: Update rules, one for each parameter.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        loss: Losses,
        *,
        alternating: bool,
        rule: UpdateRule | None,
    ) -> None:
        self._grouped = not isinstance(optimizer, Optimizer)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
        if not optimizers:
            raise ValueError("optimizer must be one, or one for each player. Got an empty list.")
        entries = [
            (player, o, group, p)
            for player, o in enumerate(optimizers)
            for group in o.param_groups
            for p in group["params"]
        ]
        self.rules = [known_rule(o, group) if rule is None else rule for _, o, group, _ in entries]
        self._params: Vector = tuple(p.detach() for *_, p in entries)
        self._buffers = [dict(o.state.get(p, {})) for _, o, _, p in entries]
        self._loss, self._num, self._alternating = loss, len(entries), alternating
        self._owners = [player for player, *_ in entries]
        sample = loss(_grouped(self._params, self._owners) if self._grouped else self._params)
        self._game = not isinstance(sample, Tensor)
        if self._game and not self._grouped:  # every parameter is a player
            self._owners = list(range(self._num))
        players = max(self._owners) + 1
        if self._game and len(sample) != players:
            got = f"Got {len(sample)} losses and {players} players."
            raise ValueError(f"There must be one loss for each player. {got}")
        if alternating and not self._game:
            raise ValueError("alternating=True is for games. Got a single loss.")
        gradients = {r.num_gradients for r in self.rules}
        if len(gradients) > 1 or (alternating and gradients != {1}):
            raise ValueError(
                "Extragradient looks ahead with all players at once. Got it with "
                f"{'alternating=True' if alternating else 'other optimizers'}; use it for every player, simultaneously."
            )
        self._extrapolates = gradients == {2}
        self._sizes = [len(r.start(p)) for r, p in zip(self.rules, self._params, strict=True)]
        self.num_coordinates = self._num + sum(self._sizes)

    # ---- states

    def initial(self) -> Vector:
        """Return the optimizer's current state: parameters, buffers (fresh where it has none), step count."""
        buffers: list[Tensor] = []
        counts = set()
        for p, r, kept in zip(self._params, self.rules, self._buffers, strict=True):
            found, taken = r.resume(p, kept)
            buffers += found
            counts.add(taken)
        if len(counts) > 1:
            raise ValueError(f"All parameters must have the same step count. Got {sorted(counts)}.")
        clock = torch.tensor(counts.pop(), dtype=self._params[0].dtype, device=self._params[0].device)
        return clone((*self._params, *buffers, clock))

    def start(self, params: Params) -> Vector:
        """Return the state with these parameters and fresh buffers, before the first step."""
        buffers = [b for p, r in zip(params, self.rules, strict=True) for b in r.start(p)]
        return (*params, *buffers, torch.zeros((), dtype=params[0].dtype, device=params[0].device))

    def parameters(self, state: Vector) -> Vector:
        """Return the parameters in a state."""
        return state[: self._num]

    def losses(self, params: Vector) -> Vector:
        """Evaluate all losses at these parameters, a tuple of scalars."""
        found = self._loss(_grouped(params, self._owners) if self._grouped else params)
        return tuple(found) if self._game else (found,)

    # ---- the map

    def step(self, x: Vector) -> Vector:
        """Take one step with every player."""
        params, slots, t = self._split(x)
        for players, mine in self._turns():
            g = self.gradient(tuple(params), players)
            if self._extrapolates:
                ahead = self._moved(params, self._ascents(params, g))
                g = self._ascents(ahead, self.gradient(ahead, players))
            for i in mine:
                params[i], slots[i] = self.rules[i].step(params[i], g[i], slots[i], t)
        return (*params, *(b for s in slots for b in s), t)

    def jvp(self, x: Vector, v: Vector) -> tuple[Vector, Vector]:
        """Take one step, and differentiate it along a tangent."""
        params, slots, t = self._split(x)
        dparams, dslots, _ = self._split(v)
        for players, mine in self._turns():
            g, dg = self._product(params, dparams, players)
            if self._extrapolates:
                ahead = self._moved(params, self._ascents(params, g))
                dahead = self._moved(dparams, self._ascents(dparams, dg))
                g, dg = self._product(ahead, dahead, players)
                g, dg = self._ascents(ahead, g), self._ascents(dahead, dg)
            for i in mine:
                r, w, s = self.rules[i], params[i], slots[i]
                dparams[i], dslots[i] = r.tangent(w, g[i], s, t, dparams[i], dg[i], dslots[i])
                params[i], slots[i] = r.step(w, g[i], s, t)
        tangent = (*dparams, *(b for s in dslots for b in s))
        return (*params, *(b for s in slots for b in s), t), tangent

    def gradient(self, params: Vector, players: Sequence[int] | None = None) -> Vector:
        """Return ∂Lᵢ/∂wᵢ for each parameter's own player i, zeros for those that are not among ``players``."""
        if not self._game:
            only: Vector = torch.func.grad(lambda p: self.losses(p)[0])(params)
            return only
        values, pull = torch.func.vjp(self.losses, params)  # type: ignore[misc]  # two without has_aux
        result = [torch.zeros_like(p) for p in params]
        for player in range(len(values)) if players is None else players:
            cotangent = tuple(torch.full_like(v, float(j == player)) for j, v in enumerate(values))
            (pulled,) = pull(cotangent)
            for i, owner in enumerate(self._owners):
                if owner == player:
                    result[i] = pulled[i]
        return tuple(result)

    def _product(self, params: Params, dparams: Params, players: Sequence[int]) -> tuple[Vector, Vector]:
        """Return the gradient and its derivative along a tangent: forward-mode over reverse-mode."""
        return forward_derivative(lambda *p: self.gradient(p, players), tuple(params), tuple(dparams))

    def _turns(self) -> list[tuple[list[int], list[int]]]:
        """Return groups of players that step together, with the indices of their parameters."""
        players = list(range(max(self._owners) + 1))
        turns = [[p] for p in players] if self._alternating else [players]
        return [(turn, [i for i, owner in enumerate(self._owners) if owner in turn]) for turn in turns]

    def _ascents(self, params: Params, g: Vector) -> Vector:
        found = zip(self.rules, params, g, strict=True)
        return tuple(r.ascent(w, a) if isinstance(r, Descent) else a for r, w, a in found)

    def _moved(self, params: Params, e: Vector) -> Vector:
        one = torch.ones(())
        return tuple(r.step(w, a, (), one)[0] for r, w, a in zip(self.rules, params, e, strict=True))

    def _split(self, x: Vector) -> tuple[list[Tensor], list[Vector], Tensor]:
        """Split a state into parameters, the buffers of each, and the number of the coming step."""
        slots, at = [], self._num
        for size in self._sizes:
            slots.append(tuple(x[at : at + size]))
            at += size
        return list(x[: self._num]), slots, x[at] + 1 if len(x) > at else x[0].new_ones(())


def _grouped(params: Vector, owners: Sequence[int]) -> tuple[Tensor | Vector, ...]:
    """Return the players, each its tensor, or the tuple of its tensors."""
    players: list[Tensor | Vector] = []
    for player in range(max(owners) + 1):
        own = tuple(p for p, owner in zip(params, owners, strict=True) if owner == player)
        players.append(own[0] if len(own) == 1 else own)
    return tuple(players)
