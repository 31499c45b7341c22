"""What HypernetworkModule does with a batch: a training step of weights and response, steps of the hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_nested.hypernetworks.response import Mode, Weights
from lightning_nested.hyperparameters import DropConnect, OuterReport
from lightning_nested.linalg.processes import average_gradients
from lightning_nested.modules.hypernetwork.monitor import (
    another_look,
    monitor_response,
    sgd_steps,
    two_optimizers,
)
from lightning_nested.trainer.inner_problem import InnerProblem, check_loss
from lightning_nested.trainer.lightning import reduction
from lightning_nested.trainer.random_stream import RandomStream

if TYPE_CHECKING:
    from lightning_nested.modules.hypernetwork.module import HypernetworkModule


def training_loss(
    module: HypernetworkModule,
    batch: Any,
    h: Tensor,
    mode: Mode = "response",
    weights: Weights | None = None,
    *,
    repeated: bool = False,
) -> Tensor:
    """The inner loss with its penalties at h, of shape (n,) or (batch, n).

    Args:
        module: Its hyperparameters stand at h meanwhile.
        batch: Of the training data.
        h: Unconstrained.
        mode: See :meth:`Response.at`.
        weights: In place of w(h).
        repeated: The batch has been seen: it must not count twice in running statistics, metrics and logs.
    """
    response, decays = module.network, module.outer.decays
    if weights is None and decays and mode == "response":
        weights = response.weights(h)
    hold = another_look(module) if repeated else nullcontext()
    with hold, module.vector.bound(h) as values, _at(module, h, mode, weights):
        loss = check_loss("inner_loss", module, module.inner_loss(batch, values))
        for decay in decays:
            loss = loss + decay.penalty(_penalised(module, h, mode, weights))
    return loss


def _penalised(module: HypernetworkModule, h: Tensor, mode: Mode, weights: Weights | None) -> Weights:
    if weights is not None:
        return weights
    general = module.network.general_parameters()
    if mode == "general":
        return dict(general)
    changes = module.network.changes(h - module.network.center)
    return {name: p.detach() + changes[name] for name, p in general.items()}


@contextmanager
def _at(module: HypernetworkModule, h: Tensor, mode: Mode, weights: Weights | None) -> Iterator[None]:
    drop_connects = [x for x in module.outer.hyperparameters if isinstance(x, DropConnect)]

    def dropped(weights: dict[str, Tensor]) -> Weights:
        result: Weights = weights
        for drop_connect in drop_connects:
            result = drop_connect(result)
        return result

    with module.network.at(h, mode, weights=weights, change=dropped if drop_connects else None):
        yield


class _Loss:
    """What a loop calls."""

    def __init__(self, module: HypernetworkModule) -> None:
        self._module, self.response, self.inner_steps = module, module.network, module.inner_steps

    def __call__(self, batch: Any, h: Tensor, mode: Mode = "response", *, repeated: bool = False) -> Tensor:
        return training_loss(self._module, batch, h, mode, repeated=repeated)


class ResponseSteps:
    """The steps of one ``fit``.

    Args:
        module: Whose counters, network and hyperparameters move.
        problem: Its losses and batches.
    """

    def __init__(self, module: HypernetworkModule, problem: InnerProblem) -> None:
        self.module, self.problem = module, problem

    def inner(self, batch: Any) -> Tensor:
        """One training step; returns the loss."""
        module, problem = self.module, self.problem
        general, phi = module.network.general_parameters(), module.network.response_parameters()
        frozen = [name for name, p in general.items() if not p.requires_grad]
        if frozen:
            raise MisconfigurationException(
                "Parameters must be trained if they were when the network was converted. "
                f"Got {frozen[0]} frozen since; freeze it before the module is made."
            )
        with RandomStream(self.seed(module.inner_steps, 1), module.device), torch.enable_grad():
            size = module.num_examples(batch) if module.per_example else None
            center = module.vector.flat().detach()
            with torch.no_grad():
                noise = self.noise(center, size, module.inner_steps, 2)
                h = module.loop.distribution.sample(center, module.scale, noise)
            loss, for_general, for_phi = module.loop.gradients(
                _Loss(module), batch, center, h, list(general.values()), list(phi.values())
            )
        found = [*for_general, *for_phi]
        averaged = average_gradients(found, list(problem.parameters.values()), reduction(module.trainer))
        limited = problem.limit(list(averaged))
        for parameter, gradient in zip(problem.parameters.values(), limited, strict=True):
            parameter.grad = gradient
        weights, response = two_optimizers(module)
        weights.step()
        response.optimizer.step()  # past Lightning's wrapper: global_step counts training steps
        for parameter in problem.parameters.values():
            parameter.grad = None
        module.outer_loop.inner_steps += 1
        return loss

    def outer(self, batch: Any) -> None:
        """One step of the hyperparameters and of the perturbation's scale.

        Args:
            batch: Of the training data, for refinement and the monitor.
        """
        module, loop = self.module, self.module.outer_loop
        try:
            report = self._outer_gradients(batch)
        except FloatingPointError as error:
            loop.skip(error)
            return
        loop.keep(report)
        loop.step(module)
        if module._scale_optimizer is not None:
            module._scale_optimizer.step()
        module._follow()
        if loop.logs(module.outer_steps):
            for name, scale in module.scales().items():
                module.log(f"perturbation/{name}", float(scale.mean()), batch_size=1)
        monitor = module.options.monitor
        if monitor is not None and (module.outer_steps - 1) % monitor.every_n_outer_steps == 0:
            with RandomStream(self.seed(module.outer_steps, 5), module.device):
                found = monitor_response(module, batch, self.problem)
            module.log_dict({f"response/{key}": value for key, value in found.items()}, batch_size=1)

    def _outer_gradients(self, batch: Any) -> OuterReport:
        """Of λ and of the scales, held for their optimizers."""
        module, problem = self.module, self.problem
        flat = module.vector.flat()
        step = module.outer_steps + module.skipped_steps

        def tried(size: int | None) -> Tensor:
            if module.scale is None:  # only a learned scale needs perturbed outer steps
                return flat
            return module.loop.distribution.sample(flat, module.scale, self.noise(flat, size, step, 3))

        with torch.enable_grad():
            common = None if module.per_example else tried(None)
            refines = module.options.refine_steps and common is not None
            weights = self._refined(batch, common) if refines and common is not None else None

        def evaluate(outer_loss: Any, outer_batch: Any) -> Tensor:
            h = tried(module.num_examples(outer_batch)) if common is None else common
            with module.network.at(h, weights=weights):
                return check_loss("outer_loss", module, outer_loss(outer_batch))

        with torch.enable_grad():
            loss = problem.evaluate_outer(evaluate)
            bonus = module.loop.distribution.bonus(module.scale)
            total = loss if bonus is None else loss - bonus
        reduce = reduction(module.trainer)
        mean = float(loss.detach()) if reduce is None else float(reduce(loss.detach().reshape(1).clone()))
        if not math.isfinite(mean):
            raise FloatingPointError(f"The outer loss must be finite. Got {mean}.")
        learned = [] if module.scale is None else [module.scale]
        with problem.full_precision():
            found = torch.autograd.grad(total, [*module.vector.tensors, *learned], allow_unused=True)
        report = module.outer.hold(found[: len(module.vector.tensors)], mean, reduce=reduce)
        if module.scale is not None:
            (gradient,) = average_gradients(found[-1:], learned, reduce)
            if gradient is not None and not bool(gradient.isfinite().all()):
                raise FloatingPointError(
                    "The gradient of the perturbation's scale must be finite. Got one that is not."
                )
            module.scale.grad = gradient
        return report

    def _refined(self, batch: Any, h: Tensor) -> dict[str, Tensor]:
        """w(h) moved by a few real steps on the training loss; the derivative is w(h)'s."""
        module = self.module
        predicted = module.network.weights(h)
        with RandomStream(self.seed(module.outer_steps, 4), module.device):
            rate = float(two_optimizers(module)[0].param_groups[0]["lr"])
            refined = sgd_steps(module, batch, h.detach(), predicted, module.options.refine_steps, rate)
        return {name: w + (refined[name] - w).detach() for name, w in predicted.items()}

    def noise(self, center: Tensor, size: int | None, step: int, kind: int) -> Tensor:
        """The perturbation's, other in each process."""
        generator = torch.Generator().manual_seed(self.seed(step, kind))
        return self.module.loop.distribution.draw(center, size, generator)

    def seed(self, step: int, kind: int) -> int:
        """A number for each step, kind of draw and process; the kinds' factors are large primes."""
        base = self.problem.batches.seed + 15_485_863 * (step + 1)
        return (base + 32_452_843 * kind + 49_979_687 * self.module.global_rank) % 2**31
