"""The optimizer as a map: parameters *and* optimizer state at one step, from those at the step before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics.maps import DifferentiableMap
from lightning_nested.linalg.vectors import Vector, clone
from lightning_nested.optim.registry import known_rule
from lightning_nested.optim.update_rules import Descent, UpdateRule

Losses: TypeAlias = Callable[..., Any]
"""From a tuple of parameters to a scalar, or from a tuple of players to a tuple of scalars."""


def update_map(
    optimizer: Optimizer | Sequence[Optimizer],
    loss: Losses,
    *,
    alternating: bool = False,
    rule: UpdateRule | None = None,
) -> UpdateMap:
    """The exact map (w, optimizer state) ↦ (w′, optimizer state′) of one ``optimizer.step()``.

    Its derivative along a tangent is in closed form over one product with the Hessian (of a game: with the Jacobian
    of its gradient); nothing differentiates through the optimizer itself.

    Known: ``torch.optim.SGD`` (momentum, dampening, Nesterov), ``Adam``, ``AdamW``; ``ComplexSGD``, ``ComplexAdam``,
    ``Extragradient``, ``ExtrapolationFromThePast``, ``OptimisticSGD``, ``OptimisticAdam``. Options are read once, here:
    a scheduler's changes are not part of the map.

    Args:
        optimizer: One, or one for each player. Only its options and present state are read; it is never stepped.
        loss: ``loss(params) -> scalar``, with ``params`` the tuple of the optimizer's parameters in their order; or the
            game ``losses(players) -> tuple of scalars``. A player is the tensor of its optimizer, or the tuple of its
            tensors if there are several; with a single optimizer every parameter is a player. Made of operations that
            ``torch.func`` differentiates, and a function of its argument alone: fix batches and noise.
        alternating: Players step one after the other, each seeing the others' new parameters.
        rule: For an optimizer that is not known: its re-statement, used for every parameter.

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
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    entries = [
        [
            (p, rule if rule is not None else known_rule(o, group))
            for group in o.param_groups
            for p in group["params"]
        ]
        for o in optimizers
    ]
    params = tuple(p.detach() for player in entries for p, _ in player)
    rules = [r for player in entries for _, r in player]
    buffers = [
        dict(o.state.get(p, {})) for o, player in zip(optimizers, entries, strict=True) for p, _ in player
    ]
    owners = [i for i, player in enumerate(entries) for _ in player]
    return UpdateMap(
        params,
        rules,
        loss,
        owners=owners,
        several=not isinstance(optimizer, Optimizer),
        alternating=alternating,
        buffers=buffers,
    )


class UpdateMap(DifferentiableMap):
    """What :func:`update_map` returns. A state is (parameters…, buffers of the first parameter…, …, step count).

    Attributes:
        rules: One for each parameter.
    """

    def __init__(
        self,
        params: Vector,
        rules: Sequence[UpdateRule],
        loss: Losses,
        *,
        owners: Sequence[int],
        several: bool,
        alternating: bool = False,
        buffers: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.rules, self._loss = list(rules), loss
        self._params, self._buffers = params, buffers
        self._num = len(params)
        sample = loss(params if not several else _grouped(params, owners))
        self._game = not isinstance(sample, Tensor)
        # One optimizer and several losses: every parameter is a player.
        self._owners = list(range(self._num)) if self._game and not several else list(owners)
        self._grouped = several
        self._alternating = alternating
        players = max(self._owners) + 1
        if self._game and len(sample) != players:
            raise ValueError(
                f"There must be one loss for each player. Got {len(sample)} losses and {players} players."
            )
        if alternating and not self._game:
            raise ValueError("alternating=True is for games. Got a single loss.")
        gradients = {r.num_gradients for r in self.rules}
        if len(gradients) > 1 or (alternating and gradients != {1}):
            raise ValueError(
                "Extragradient looks ahead with all players at once. Got it with "
                f"{'alternating=True' if alternating else 'other optimizers'}; use it for every player, simultaneously."
            )
        self._extrapolates = gradients == {2}
        self._sizes = [len(r.start(p)) for r, p in zip(self.rules, params, strict=True)]
        self.num_coordinates = self._num + sum(self._sizes)

    # ---- states

    def initial(self) -> Vector:
        """The state that the optimizer is in: its parameters, its buffers (fresh where it has none), its step count."""
        buffers: list[Tensor] = []
        counts = set()
        for p, r, kept in zip(self._params, self.rules, self._buffers, strict=True):
            found, taken = r.resume(p, kept)
            buffers += found
            counts.add(taken)
        if len(counts) > 1:
            raise ValueError(
                f"All parameters must have taken the same number of steps. Got {sorted(counts)}."
            )
        clock = torch.tensor(counts.pop(), dtype=self._params[0].dtype, device=self._params[0].device)
        return clone((*self._params, *buffers, clock))

    def start(self, params: Sequence[Tensor]) -> Vector:
        """The state with these parameters and fresh buffers, before the first step."""
        buffers = [b for p, r in zip(params, self.rules, strict=True) for b in r.start(p)]
        return (*params, *buffers, torch.zeros((), dtype=params[0].dtype, device=params[0].device))

    def parameters(self, state: Vector) -> Vector:
        """The parameters in a state."""
        return state[: self._num]

    def losses(self, params: Vector) -> Vector:
        """All losses at these parameters, a tuple of scalars."""
        found = self._loss(_grouped(params, self._owners) if self._grouped else params)
        return tuple(found) if self._game else (found,)

    # ---- the map

    def step(self, x: Vector) -> Vector:
        """One step of every player."""
        params, slots, t = self._split(x)
        for players in self._turns():
            mine = [i for i, owner in enumerate(self._owners) if owner in players]
            g = self.gradient(params, players)
            before = params
            if self._extrapolates:
                e = self._ascents(params, g)
                ahead = self._moved(params, e, params)
                g = self._ascents(ahead, self.gradient(ahead, players))
            after, done = list(params), list(slots)
            for i in mine:
                after[i], done[i] = self.rules[i].step(before[i], g[i], slots[i], t)
            params, slots = tuple(after), done
        return (*params, *(b for s in slots for b in s), t)

    def jvp(self, x: Vector, v: Vector) -> tuple[Vector, Vector]:
        """One step, and its derivative along a tangent."""
        params, slots, t = self._split(x)
        dparams, dslots, _ = self._split(v)
        for players in self._turns():
            mine = [i for i, owner in enumerate(self._owners) if owner in players]
            g, dg = self._product(params, dparams, players)
            if self._extrapolates:
                e, de = self._ascents(params, g), self._ascents(dparams, dg)
                ahead, dahead = self._moved(params, e, params), self._moved(dparams, de, dparams)
                g, dg = self._product(ahead, dahead, players)
                g, dg = self._ascents(ahead, g), self._ascents(dahead, dg)
            after, done, dafter, ddone = list(params), list(slots), list(dparams), list(dslots)
            for i in mine:
                r = self.rules[i]
                after[i], done[i] = r.step(params[i], g[i], slots[i], t)
                dafter[i], ddone[i] = r.tangent(params[i], g[i], slots[i], t, dparams[i], dg[i], dslots[i])
            params, slots, dparams, dslots = tuple(after), done, tuple(dafter), ddone
        flat = (*params, *(b for s in slots for b in s), t)
        return flat, (*dparams, *(b for s in dslots for b in s))

    def gradient(self, params: Vector, players: Sequence[int] | None = None) -> Vector:
        """∂Lᵢ/∂wᵢ for each parameter's own player i, zeros for those who are not among ``players``."""
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

    def _product(self, params: Vector, dparams: Vector, players: Sequence[int]) -> tuple[Vector, Vector]:
        """The gradient and its derivative along a tangent: forward-mode over reverse-mode."""
        value: Vector
        derivative: Vector
        value, derivative = torch.func.jvp(  # type: ignore[misc]  # two without has_aux
            lambda *p: self.gradient(p, players), params, dparams
        )
        return value, derivative

    def _turns(self) -> list[list[int]]:
        players = list(range(max(self._owners) + 1))
        return [[p] for p in players] if self._alternating else [players]

    def _ascents(self, params: Vector, g: Vector) -> Vector:
        return tuple(
            r.ascent(w, a) if isinstance(r, Descent) else a
            for r, w, a in zip(self.rules, params, g, strict=True)
        )

    def _moved(self, params: Vector, e: Vector, anchors: Vector) -> Vector:
        one = torch.ones(())
        return tuple(r.step(w, a, (), one)[0] for r, w, a in zip(self.rules, anchors, e, strict=True))

    def _split(self, x: Vector) -> tuple[Vector, list[Vector], Tensor]:
        """Parameters, buffers of each, and the number of the step to come."""
        slots, at = [], self._num
        for size in self._sizes:
            slots.append(tuple(x[at : at + size]))
            at += size
        return tuple(x[: self._num]), slots, x[at] + 1 if len(x) > at else x[0].new_ones(())


def _grouped(params: Vector, owners: Sequence[int]) -> tuple[Tensor | Vector, ...]:
    """Players: a tensor each, or the tuple of its tensors."""
    players: list[Tensor | Vector] = []
    for player in range(max(owners) + 1):
        own = tuple(p for p, owner in zip(params, owners, strict=True) if owner == player)
        players.append(own[0] if len(own) == 1 else own)
    return tuple(players)
