"""Problem that HypernetworkModule solves in one fit, as its steps and its monitor see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_nested.hypernetworks.linearized import Weights
from lightning_nested.hypernetworks.loops import ResponseLoop
from lightning_nested.hypernetworks.response import Mode, Response
from lightning_nested.hyperparameters import DropConnect, HyperparameterVector, OuterStep
from lightning_nested.modules.hypernetwork.options import ResponseOptions
from lightning_nested.trainer.inner_problem import InnerProblem, check_loss
from lightning_nested.trainer.isolation import without_trace
from lightning_nested.trainer.lightning import has_trainer
from lightning_nested.trainer.reachable_state import untouched_networks


@dataclass(frozen=True, eq=False)
class ResponseLoss:
    """Inner loss with its penalties, at any hyperparameters.

    Attributes:
        module: Module of ``inner_loss``, for errors and isolation.
        inner_loss: From a batch and the tried values to the training loss without tuned weight decays.
        response: Response under training.
        vector: Hyperparameters; they have the values of h during an evaluation.
        outer: Step that owns the hyperparameters.
        inner_steps: Training steps made before this one.
    """

    module: LightningModule
    inner_loss: Callable[[Any, Mapping[str, Tensor]], Tensor]
    response: Response
    vector: HyperparameterVector
    outer: OuterStep
    inner_steps: int

    def __call__(
        self,
        batch: Any,
        h: Tensor,
        mode: Mode = "response",
        *,
        weights: Weights | None = None,
        repeated: bool = False,
    ) -> Tensor:
        """Return a scalar with its graph at h, unconstrained, (n,) or (batch, n); see :meth:`Response.at`.

        A ``repeated`` batch has been seen: it must not count twice in running statistics, metrics and logs.
        """
        decays = self.outer.decays
        if weights is None and decays and mode == "response":
            weights = self.response.weights(h)
        with ExitStack() as stack:
            if repeated:
                stack.enter_context(self.isolated())
            values = stack.enter_context(self.vector.bound(h))
            stack.enter_context(self.response.at(h, mode, weights=weights, change=self._drop_connect()))
            loss = check_loss("inner_loss", self.module, self.inner_loss(batch, values))
            if decays:
                penalized = self._general_weights(h, mode) if weights is None else weights
                for decay in decays:
                    loss = loss + decay.penalty(penalized)
        return loss

    def isolated(self) -> AbstractContextManager[None]:
        """Restore running statistics, metrics and logging on exit."""
        if not has_trainer(self.module):
            return untouched_networks(self.module)
        return without_trace(self.module, self.module.trainer, attributes=False)

    def _general_weights(self, h: Tensor, mode: Mode) -> Weights:
        general = self.response.general_parameters()
        if mode == "general":
            return dict(general)
        changes = self.response.changes(h - self.response.center)
        return {name: p.detach() + changes[name] for name, p in general.items()}

    def _drop_connect(self) -> Callable[[dict[str, Tensor]], Weights] | None:
        drops = [x for x in self.outer.hyperparameters if isinstance(x, DropConnect)]
        return (lambda weights: reduce(lambda w, drop: drop(w), drops, weights)) if drops else None


@dataclass(frozen=True, kw_only=True, eq=False)
class ResponseProblem(InnerProblem):
    """Inner problem whose solution is a response; ``optimizer`` is that of the weights w₀.

    Attributes:
        num_examples: From a batch to its number of examples.
        response_optimizer: Optimizer of φ.
        scale: Unconstrained scales of the perturbation; None: not learned.
        per_example: Each example of a batch tries an h of its own.
    """

    training_loss: ResponseLoss
    num_examples: Callable[[Any], int]
    loop: ResponseLoop
    options: ResponseOptions
    response_optimizer: LightningOptimizer
    scale: Tensor | None
    per_example: bool

    @property
    def response(self) -> Response:
        """Response under training."""
        return self.training_loss.response

    @property
    def vector(self) -> HyperparameterVector:
        """Hyperparameters as one vector."""
        return self.training_loss.vector

    def gradient_steps(self, batch: Any, h: Tensor, start: Weights, steps: int) -> dict[str, Tensor]:
        """Return weights after plain gradient steps on the training loss at h, at the learning rate of w₀."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        weights = {name: w.detach() for name, w in start.items()}
        # Isolated together: buffers move from one step to the next, as in real steps.
        with torch.enable_grad(), self.training_loss.isolated():
            for _ in range(steps):
                leaves = {name: w.requires_grad_() for name, w in weights.items()}
                loss = self.training_loss(batch, h, weights=leaves)
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                weights = {
                    name: (w if g is None else w - rate * g).detach()
                    for (name, w), g in zip(leaves.items(), found, strict=True)
                }
        return weights


def two_optimizers(module: LightningModule) -> tuple[LightningOptimizer, LightningOptimizer]:
    """Return the optimizers of the weights w₀ and the response φ.

    Raises:
        MisconfigurationException: ``configure_optimizers`` was overridden and returns others.
    """
    optimizers = module.optimizers()
    if not isinstance(optimizers, list) or len(optimizers) != 2:
        raise MisconfigurationException(
            "configure_optimizers must return two: of the weights and of the response. "
            f"Got {len(optimizers) if isinstance(optimizers, list) else 1}."
        )
    return cast("tuple[LightningOptimizer, LightningOptimizer]", tuple(optimizers))
