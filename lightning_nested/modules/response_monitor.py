"""Options of HypernetworkModule, and how far its predicted weights are from trained ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_nested.callbacks.isolation import untouched_buffers, without_trace
from lightning_nested.callbacks.outer_batches import LastBatch
from lightning_nested.hypergradient import ConjugateGradient, InverseSolver, implicit_hypergradient
from lightning_nested.modules.cycles import InnerProblem, check_loss

if TYPE_CHECKING:
    from lightning_nested.modules.hypernetwork import HypernetworkModule


@dataclass(frozen=True, kw_only=True)
class ResponseMonitor:
    """When to trust the response: is w_φ(λ̂) trained, and is its slope the one of the implicit function theorem?

    Logged as ``response/inner_loss`` (at w_φ(λ̂), on the present training batch), ``response/refined_inner_loss``
    (after real steps from there) and ``response/implicit_cosine``, between the outer gradient through the response
    and the implicit one, over the hyperparameters that the training loss has a derivative for.

    Args:
        every_n_outer_steps: How often.
        num_steps: k real steps of plain gradient descent, at the weights' learning rate.
        solver: Of the implicit gradient; None: that is left out.
    """

    every_n_outer_steps: int = 100
    num_steps: int = 10
    solver: InverseSolver | None = ConjugateGradient(max_iterations=20, damping=1e-3)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.every_n_outer_steps < 1 or self.num_steps < 0:
            raise ValueError(
                "every_n_outer_steps must be at least 1 and num_steps at least 0. "
                f"Got {self.every_n_outer_steps} and {self.num_steps}."
            )


@dataclass(frozen=True, kw_only=True)
class ResponseOptions:
    """What the Trainer refuses to do in manual optimization, and details of the response.

    Args:
        per_example: Whether each example of a batch gets a perturbation of its own, which lowers the variance; None:
            where layers and hyperparameters allow it (no weight decay).
        refine_steps: k real training steps from the predicted weights before each outer gradient.
        monitor: Logs the response's error; None: not.
        gradient_clip_val: Limit of the training gradient of w₀ and φ together; None: none.
        gradient_clip_algorithm: Whether it limits the norm of all gradients or each entry.
        max_skipped: Successive outer steps that may be non-finite before the run ends.
        log_every_n_outer_steps: Log diagnostics and values at every n-th outer step; 0: never.

    Raises:
        ValueError: A value is out of range.
    """

    per_example: bool | None = None
    refine_steps: int = 0
    monitor: ResponseMonitor | None = None
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    max_skipped: int = 10
    log_every_n_outer_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("refine_steps", "max_skipped", "log_every_n_outer_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0. Got {getattr(self, name)}.")
        if self.gradient_clip_val is not None and not self.gradient_clip_val > 0:
            raise ValueError(f"gradient_clip_val must be positive, or None. Got {self.gradient_clip_val}.")
        if self.gradient_clip_algorithm not in ("norm", "value"):
            raise ValueError(
                f"gradient_clip_algorithm must be 'norm' or 'value'. Got {self.gradient_clip_algorithm!r}."
            )


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
        if module._trainer is None
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
