"""Training under constraints, as a game of weights and Lagrange multipliers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.arguments import check, positive
from lightning_nested.games.constraints import ConstrainedLoss, Multipliers, augmented_lagrangian
from lightning_nested.modules.game.loop import GameLoop
from lightning_nested.modules.game.module import GameModule


class AugmentedLagrangian(GameModule):
    """Training under constraints: minimize f(w) subject to g(w) ≤ 0 and h(w) = 0; to be extended.

    A zero-sum game on the :func:`~lightning_nested.games.augmented_lagrangian`: the player ``"weights"`` descends, the
    player ``"multipliers"`` ascends. A subclass has the network as an attribute, and returns the values on a batch:

        class SmallWeights(AugmentedLagrangian):
            def __init__(self, **options):
                super().__init__(num_inequalities=1, **options)
                self.network = torch.nn.Linear(784, 10)

            def constrained_loss(self, batch):
                x, y = batch
                loss = F.cross_entropy(self.network(x), y)
                norm = self.network.weight.square().sum()
                return ConstrainedLoss(loss=loss, inequalities=norm - 1.0)    # ‖W‖² ≤ 1

        SmallWeights(optimizers={"weights": lambda params: Adam(params, lr=1e-3)}, penalty=10.0)

    By default the multipliers take gradient steps of size ``penalty``: the method of multipliers, with one step of the
    weights in place of a whole minimization. Where the weights move slowly make those steps smaller, by
    ``optimizers={"multipliers": partial(SGD, lr=...)}``. Negative λ are set to 0 after each step. Constraints that
    are means over a batch are noisy: take large batches. In data-parallel runs each process has those of its own
    batch, and gradients are averaged. Logged beside the losses: ``objective``, ``violation`` (the largest of g and
    |h|, at least 0), and the largest ``multiplier``.

    Hestenes (1969), J. Optim. Theory Appl. 4:303-320; for networks Gallego-Posada et al. (2025), arXiv 2504.01212.

    Args:
        num_inequalities: Numbers in g.
        num_equalities: Numbers in h.
        penalty: c, the weight of the squared violation.
        optimizers: From parameters to an optimizer, by player.
        loop: Accumulation, clipping, batches; None: ``GameLoop(reuse_batch=True)``, both step on each batch.
        **game: Arguments of :class:`GameModule`.

    Attributes:
        multipliers: λ and ν.
        last: f, g and h on the last batch, without graphs; None before the first.

    Raises:
        ValueError: No constraint at all, or in ``fit`` a number of constraints that differs from the one given here.
    """

    def __init__(
        self,
        *,
        num_inequalities: int = 0,
        num_equalities: int = 0,
        penalty: float = 1.0,
        optimizers: dict[str, OptimizerCallable] | None = None,
        loop: GameLoop | None = None,
        **game: Any,
    ) -> None:
        check(AugmentedLagrangian.__init__, locals())
        positive(penalty=penalty)
        ascent = cast(OptimizerCallable, partial(torch.optim.SGD, lr=penalty))
        loop = GameLoop(reuse_batch=True) if loop is None else loop
        super().__init__(optimizers={"multipliers": ascent} | (optimizers or {}), loop=loop, **game)
        self.multipliers = Multipliers(num_inequalities, num_equalities)
        self.penalty = penalty
        self.last: ConstrainedLoss | None = None

    @abstractmethod
    def constrained_loss(self, batch: Any) -> ConstrainedLoss:
        """Compute f, g and h on a batch, with their graphs."""
        raise NotImplementedError(f"{type(self).__name__} must define constrained_loss(self, batch).")

    @override
    def players(self) -> dict[str, nn.Module]:
        own = [child for name, child in self.named_children() if name != "multipliers"]
        direct = nn.ParameterList(p for _, p in self.named_parameters(recurse=False))
        return {"weights": nn.ModuleList([*own, direct]), "multipliers": self.multipliers}

    @override
    def player_losses(self, names: Sequence[str], batch: Any) -> dict[str, Tensor]:
        problem = self.constrained_loss(batch)
        self.last = problem.detach()
        value = augmented_lagrangian(problem, self.multipliers, penalty=self.penalty)
        signs = {"weights": 1.0, "multipliers": -1.0}
        return {name: signs[name] * value for name in names}

    @override
    def player_loss(self, name: str, batch: Any) -> Tensor:
        return self.player_losses([name], batch)[name]

    @override
    def on_player_step(self, name: str) -> None:
        if name == "multipliers":
            self.multipliers.project()

    @override
    def game_metrics(self) -> dict[str, Any]:
        if self.last is None:
            return {}
        largest = torch.stack([p.detach().abs().max() for p in self.multipliers.parameters()]).max()
        return {"objective": self.last.loss, "violation": self.last.violation(), "multiplier": largest}
