"""Top Lyapunov exponents of a game while its players train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics.tangents import Clip, Tangents
from lightning_nested.games.jacobian import JacobianOperator, derivative
from lightning_nested.linalg.curvature import gradient_with_graph
from lightning_nested.linalg.finite import check_matrix
from lightning_nested.linalg.vectors import Vector, flatten, unflatten, zeros_where_none
from lightning_nested.optim.update_rules import UpdateRule


class GameTracker(Tangents):
    """Pushes k tangents of all players through the rounds of a game.

    For players that step together, call :meth:`observe` with their losses at the current point (a graph to *every*
    player), then :meth:`advance` for each just before its ``optimizer.step()``, and :meth:`end_step` after a round.
    Players in turns, or several steps of one, are observed one after the other. A tangent costs one backward pass
    through each stepping player's gradient: the rows ∂²L_i/∂w_i∂w of the game's Jacobian times the tangent.

    Args:
        players: Parameters of each player that require gradients, in its optimizer's order.
        **options: Arguments of :class:`Tangents`.

    Attributes:
        growth: (T, k), the logarithmic growth in each window.
        alignment: min over the frame of ‖QQᵀAq‖/‖Aq‖ with A the Jacobian of the joint step, 1 for an invariant
            subspace; NaN before :meth:`align_to`, or where every product is zero.

    >>> x, y = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (1.0, 2.0))
    >>> optimizers = [torch.optim.SGD([p], lr=0.1) for p in (x, y)]
    >>> tracker = GameTracker([(x,), (y,)], k=2)
    >>> for _ in range(3):  # simultaneous gradient on xy
    ...     losses = ((x * y).sum(), -(x * y).sum())
    ...     tracker.observe(dict(enumerate(losses)))
    ...     x.grad, y.grad = y.detach().clone(), -x.detach()
    ...     for player, optimizer in enumerate(optimizers):  # both before either steps
    ...         _ = tracker.advance(player, optimizer)
    ...     for optimizer in optimizers:
    ...         optimizer.step()
    ...     _ = tracker.end_step()
    >>> [f"{value:.7f}" for value in tracker.running().tolist()]  # ½ ln 1.01
    ['0.0049752', '0.0049752']
    """

    def __init__(self, players: Sequence[Vector], **options: Any) -> None:
        self.players: list[Vector] = []
        self.follow_players(players, **options)

    def follow_players(self, players: Sequence[Vector], **options: Any) -> None:
        """Follow these parameters, with new tangents; the growth so far is kept."""
        flat = [p for held in players for p in held]
        if self.players:
            self.follow(flat)
        else:
            super().__init__(flat, **options)
        self.players = [tuple(held) for held in players]
        starts = accumulate((sum(p.numel() for p in held) for held in self.players), initial=0)
        self._blocks = [slice(a, b) for a, b in pairwise(starts)]
        self._sums: Tensor | None = (
            None  # (k + 1, n), of products with tangents, and of gradients before clipping
        )
        self._counts = [0] * len(self.players)

    def observe(self, losses: Mapping[int, Tensor]) -> None:
        """Add the derivatives of the stepping players' gradients along every tangent, averaged over batches of a step.

        ``losses`` are scalars with graphs to all parameters, by the indices of players that step together.
        """
        if self.frame is None:
            self.frame = self.random_frame()
        frame = self.frame
        if self._sums is None:
            self._sums = frame.new_zeros(self.k + 1, self.n)
        for player, loss in losses.items():
            block, own = self._blocks[player], self.players[player]
            if not self._counts[player]:
                self._sums[:, block] = 0.0
            self._counts[player] += 1
            gradient = gradient_with_graph(loss, self.params)
            mine = [g for p, g in zip(self.params, gradient, strict=True) if any(p is q for q in own)]
            self._sums[-1, block] += flatten(g.detach() for g in mine)
            live = [i for i, g in enumerate(gradient) if g.requires_grad]
            for row, tangent in zip(self._sums[:-1], frame, strict=True):
                v = unflatten(tangent, self.params)
                found = derivative([gradient[i] for i in live], own, [v[i] for i in live])
                row[block] += flatten(zeros_where_none(found, own))

    def has_observed(self, player: int) -> bool:
        """Return True if there is a loss for this player to advance by."""
        return self._counts[player] > 0

    def advance(
        self,
        player: int,
        optimizer: Optimizer,
        rule: UpdateRule | None = None,
        *,
        clip: Clip | None = None,
        ahead: bool | None = None,
    ) -> bool:
        """Push the tangents through the coming step of ``player``; return True if it is a whole one.

        Call it before the optimizer's step, with gradients in ``.grad``. ``ahead`` is True for the first half of an
        :class:`Extragradient` step; None: True unless the optimizer has extrapolated.
        """
        if not self._counts[player] or self._sums is None:
            raise RuntimeError(
                "advance() needs a loss of this player. Got none; call observe(losses) before."
            )
        block, count = self._blocks[player], self._counts[player]
        self._counts[player] = 0
        with torch.no_grad():
            own = self._sums[:, block] / count
            self._sums[:, block] = own if self.reduce is None else self.reduce(own.contiguous())
        products, gradient = self._sums[:-1], self._sums[-1]
        return self.push(optimizer, products, gradient=gradient, rule=rule, clip=clip, ahead=ahead)

    def align_to(self, losses: Sequence[Tensor], scale: Vector) -> None:
        """Begin with the subspace that a joint gradient step w ← w − D·ξ(w) stretches most: Arnoldi's Ritz vectors.

        ``losses`` of all players are to be descended, with graphs to all parameters; ``scale`` is D for each parameter.
        """
        operator = JacobianOperator(list(losses), tuple(self.players), reduce=self.reduce)

        def product(v: Tensor) -> Tensor:
            found = operator.matvec(unflatten(v, self.params))
            return flatten(a * d for a, d in zip(found, scale, strict=True))

        def choose(basis: Tensor, images: Tensor) -> Tensor:
            values, vectors = torch.linalg.eig(
                check_matrix((basis @ images.mT).double(), "The projected Jacobian")
            )
            chosen: list[Tensor] = []
            for i in (1 - values).abs().argsort(descending=True).tolist():
                if values[i].imag >= 0:  # of a conjugate pair both parts of one
                    chosen.append(vectors[:, i].real)
                    if values[i].imag > 0:
                        chosen.append(vectors[:, i].imag)
            return torch.stack(chosen[: self.k])

        self.begin(product, choose)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs, the sums of an incomplete step included."""
        pending = None
        if self._sums is not None and any(self._counts):
            # every process may go on from the mean
            sums = self._sums if self.reduce is None else self.reduce(self._sums.clone())
            pending = {"products": sums[:-1], "sums": sums[-1], "counts": list(self._counts)}
        return {**super().state_dict(), "pending": pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore on the devices of the parameters."""
        super().load_state_dict(state)
        pending = state["pending"]
        if pending is not None and self.frame is not None:
            self._sums = torch.cat([pending["products"], pending["sums"].unsqueeze(0)]).to(self.frame)
            self._counts = list(pending["counts"])
