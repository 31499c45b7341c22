"""Options of HypernetworkModule, and how far its predicted weights are from trained ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_nested.hypergradient import implicit_hypergradient
from lightning_nested.trainer.inner_problem import InnerProblem, check_loss
from lightning_nested.trainer.isolation import untouched_buffers, without_trace
from lightning_nested.trainer.lightning import has_trainer
from lightning_nested.trainer.outer_batches import LastBatch

if TYPE_CHECKING:
    from lightning_nested.modules.hypernetwork.module import HypernetworkModule


def two_optimizers(module: HypernetworkModule) -> tuple[LightningOptimizer, LightningOptimizer]:
    """Of w₀ and of φ.

    Raises:
        MisconfigurationException: ``configure_optimizers`` was overridden and returns others.
    """
    optimizers = module.optimizers()
    if not isinstance(optimizers, list) or len(optimizers) != 2:
        raise MisconfigurationException(
            "configure_optimizers must return two: of the weights and of the response. "
            f"Got {len(optimizers) if isinstance(optimizers, list) else 1}."
        )
    weights, response = optimizers
    assert isinstance(weights, LightningOptimizer)
    assert isinstance(response, LightningOptimizer)
    return weights, response


@contextmanager
def another_look(module: HypernetworkModule) -> Iterator[None]:
    """For further evaluations on a batch: buffers, metrics and logs stay as they are."""
    with (
        untouched_buffers(module)
        if not has_trainer(module)
        else without_trace(module, module.trainer, attributes=False)
    ):
        yield


def sgd_steps(
    module: HypernetworkModule, batch: Any, h: Tensor, start: Mapping[str, Tensor], steps: int, rate: float
) -> dict[str, Tensor]:
    """Weights after plain gradient steps on the training loss at h, from ``start``; without trace."""
    weights = {name: w.detach() for name, w in start.items()}
    with torch.enable_grad(), another_look(module):
        for _ in range(steps):
            leaves = {name: w.requires_grad_() for name, w in weights.items()}
            loss = module.training_loss(batch, h, weights=leaves)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            weights = {
                name: (w if g is None else w - rate * g).detach()
                for (name, w), g in zip(leaves.items(), found, strict=True)
            }
    return weights


def monitor_response(module: HypernetworkModule, batch: Any, problem: InnerProblem) -> dict[str, float]:
    """The response's error at λ̂ on one training and one outer batch; see :class:`ResponseMonitor`."""
    monitor, network = module.options.monitor, module.network
    assert monitor is not None
    h = module.vector.flat().detach().requires_grad_()
    predicted = network.weights(h)
    weights = {name: w.detach().requires_grad_() for name, w in predicted.items()}
    rate = float(two_optimizers(module)[0].param_groups[0]["lr"])
    with another_look(module), torch.enable_grad():
        inner = module.training_loss(batch, h, weights=weights)
    result = {"inner_loss": float(inner.detach())}
    refined = sgd_steps(module, batch, h.detach(), weights, monitor.num_steps, rate)
    with another_look(module), torch.enable_grad():
        leaves = {name: w.requires_grad_() for name, w in refined.items()}
        result["refined_inner_loss"] = float(module.training_loss(batch, h.detach(), weights=leaves).detach())
    if monitor.solver is None or not _depends(inner, h):
        return result

    def outer(outer_loss: Any, outer_batch: Any) -> Tensor:
        with network.at(h.detach(), weights=weights):
            return check_loss("outer_loss", module, outer_loss(outer_batch))

    # Not the next one: a run must go the same way whether it is watched or not.
    loss = replace(problem, batches=LastBatch(problem.batches)).evaluate_outer(outer)
    through = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
    pairs = [(w, g) for w, g in zip(predicted.values(), through, strict=True) if g is not None]
    ours = torch.autograd.grad([w for w, _ in pairs], [h], [g for _, g in pairs], retain_graph=True)[0]
    try:
        (implicit,) = implicit_hypergradient(
            inner, loss, tuple(weights.values()), (h,), solver=monitor.solver
        )
    except (
        FloatingPointError
    ):  # no positive curvature where the weights stand: there is nothing to compare with
        return result
    seen = implicit != 0
    scale = float(ours[seen].norm() * implicit[seen].norm())
    if scale > 0 and math.isfinite(scale):
        result["implicit_cosine"] = float((ours[seen] * implicit[seen]).sum()) / scale
    return result


def _depends(loss: Tensor, h: Tensor) -> bool:
    (found,) = torch.autograd.grad(loss, [h], retain_graph=True, allow_unused=True)
    return found is not None and bool(found.any())
