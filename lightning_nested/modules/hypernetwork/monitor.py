"""Error of a response: its predicted weights against trained ones, and its slope against the implicit one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_nested.hypergradient import implicit_hypergradient
from lightning_nested.linalg.vectors import double_dot
from lightning_nested.modules.hypernetwork.options import ResponseMonitor
from lightning_nested.modules.hypernetwork.problem import ResponseProblem
from lightning_nested.trainer.inner_problem import check_loss
from lightning_nested.trainer.outer_batches import LastBatch


def monitor_response(problem: ResponseProblem, monitor: ResponseMonitor, batch: Any) -> dict[str, float]:
    """Measure the response's error at λ̂ on one training and one outer batch; see :class:`ResponseMonitor`."""
    h = problem.vector.flat().detach().requires_grad_()
    predicted = problem.response.weights(h)
    weights = {name: w.detach().requires_grad_() for name, w in predicted.items()}
    with torch.enable_grad():
        inner = problem.training_loss(batch, h, weights=weights, repeated=True)
    refined = problem.gradient_steps(batch, h.detach(), weights, monitor.num_steps)
    with torch.enable_grad():
        leaves = {name: w.requires_grad_() for name, w in refined.items()}
        after = problem.training_loss(batch, h.detach(), weights=leaves, repeated=True)
    result = {"inner_loss": float(inner.detach()), "refined_inner_loss": float(after.detach())}
    if monitor.solver is None or not _depends(inner, h):
        return result

    def outer(outer_loss: Any, outer_batch: Any) -> Tensor:
        with problem.response.at(h.detach(), weights=weights):
            return check_loss("outer_loss", problem.module, outer_loss(outer_batch))

    # Not the next batch: a run must go the same way whether it is watched or not.
    loss = replace(problem, batches=LastBatch(problem.batches)).evaluate_outer(outer)
    through = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
    pairs = [(w, g) for w, g in zip(predicted.values(), through, strict=True) if g is not None]
    ours = torch.autograd.grad([w for w, _ in pairs], [h], [g for _, g in pairs], retain_graph=True)[0]
    try:
        (implicit,) = implicit_hypergradient(
            inner, loss, tuple(weights.values()), (h,), solver=monitor.solver
        )
    except FloatingPointError:
        # no positive curvature at the current weights: there is nothing to compare with
        return result
    seen = implicit != 0
    found, expected = (ours[seen],), (implicit[seen],)
    scale = float((double_dot(found, found) * double_dot(expected, expected)).sqrt())
    if scale > 0 and math.isfinite(scale):
        result["implicit_cosine"] = float(double_dot(found, expected)) / scale
    return result


def _depends(loss: Tensor, h: Tensor) -> bool:
    (found,) = torch.autograd.grad(loss, [h], retain_graph=True, allow_unused=True)
    return found is not None and bool(found.any())
