"""Steps of HypernetworkModule on a batch: of the weights and the response, and of the hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_nested.hyperparameters import OuterReport
from lightning_nested.linalg.processes import average_gradients
from lightning_nested.modules.hypernetwork.monitor import monitor_response
from lightning_nested.modules.hypernetwork.problem import ResponseProblem
from lightning_nested.trainer.inner_problem import check_loss
from lightning_nested.trainer.lightning import reduction
from lightning_nested.trainer.random_stream import RandomStream


class ResponseSteps:
    """Steps of one ``fit``. The module counts them; each draws from random streams that follow from its number."""

    def __init__(self, problem: ResponseProblem) -> None:
        self.problem = problem

    def inner(self, batch: Any, step: int) -> Tensor:
        """Make the training step that follows ``step`` of them, and return its loss."""
        problem, loop = self.problem, self.problem.loop
        general = problem.response.general_parameters()
        phi = problem.response.response_parameters()
        frozen = [name for name, p in general.items() if not p.requires_grad]
        if frozen:
            raise MisconfigurationException(
                "Parameters must be trained if they were when the network was converted. "
                f"Got {frozen[0]} frozen since; freeze it before the module is made."
            )
        with self._stream(step, 1), torch.enable_grad():
            size = problem.num_examples(batch) if problem.per_example else None
            center = problem.vector.flat().detach()
            with torch.no_grad():
                h = loop.perturbation.sample(center, problem.scale, self.noise(center, size, step, 2))
            training_loss = replace(problem.training_loss, inner_steps=step)
            leaves = list(general.values()), list(phi.values())
            loss, for_general, for_phi = loop.gradients(training_loss, batch, center, h, *leaves)
        parameters = list(problem.parameters.values())
        averaged = average_gradients([*for_general, *for_phi], parameters, reduction(problem.module.trainer))
        problem.real_step(problem.limit(list(averaged)))
        # past Lightning's wrapper: global_step counts training steps
        problem.response_optimizer.optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return loss

    def outer_gradients(self, batch: Any, done: int, skipped: int) -> OuterReport:
        """Give the gradients of the outer loss for λ and for the perturbation's scale to their optimizers.

        ``batch`` is of the training data, for refinement; ``done`` outer steps were made before, others skipped.

        Raises:
            FloatingPointError: The loss or a gradient is not finite.
        """
        problem = self.problem
        flat, step = problem.vector.flat(), done + skipped

        def tried(size: int | None) -> Tensor:
            if problem.scale is None:  # only a learned scale needs perturbed outer steps
                return flat
            return problem.loop.perturbation.sample(flat, problem.scale, self.noise(flat, size, step, 3))

        with torch.enable_grad():
            common = None if problem.per_example else tried(None)
            refines = problem.options.refine_steps > 0
            weights = self._refined(batch, common, done) if refines and common is not None else None

        def evaluate(outer_loss: Any, outer_batch: Any) -> Tensor:
            h = tried(problem.num_examples(outer_batch)) if common is None else common
            with problem.response.at(h, weights=weights):
                return check_loss("outer_loss", problem.module, outer_loss(outer_batch))

        with torch.enable_grad():
            loss = problem.evaluate_outer(evaluate)
            bonus = problem.loop.perturbation.bonus(problem.scale)
            total = loss if bonus is None else loss - bonus
        return self._hold(total, loss.detach())

    def _hold(self, total: Tensor, loss: Tensor) -> OuterReport:
        problem = self.problem
        reduce = reduction(problem.module.trainer)
        mean = float(loss) if reduce is None else float(reduce(loss.reshape(1).clone()))
        if not math.isfinite(mean):
            raise FloatingPointError(f"The outer loss must be finite. Got {mean}.")
        tensors = problem.vector.tensors
        learned = [] if problem.scale is None else [problem.scale]
        with problem.full_precision():
            found = torch.autograd.grad(total, [*tensors, *learned], allow_unused=True)
        report = problem.outer.hold(found[: len(tensors)], mean, reduce=reduce)
        if problem.scale is not None:
            (gradient,) = average_gradients(found[-1:], learned, reduce)
            if gradient is not None and not bool(gradient.isfinite().all()):
                raise FloatingPointError(
                    "The gradient of the perturbation's scale must be finite. Got one that is not."
                )
            problem.scale.grad = gradient
        return report

    def _refined(self, batch: Any, h: Tensor, done: int) -> dict[str, Tensor]:
        """w(h) moved by a few real steps on the training loss; the derivative is w(h)'s."""
        problem = self.problem
        predicted = problem.response.weights(h)
        with self._stream(done, 4):
            refined = problem.gradient_steps(batch, h.detach(), predicted, problem.options.refine_steps)
        return {name: w + (refined[name] - w).detach() for name, w in predicted.items()}

    def log(self, batch: Any, done: int, scales: Mapping[str, Tensor]) -> None:
        """Log the perturbation's scales, and the response's error if that is due after ``done`` outer steps."""
        problem, monitor = self.problem, self.problem.options.monitor
        for name, scale in scales.items():
            problem.module.log(f"perturbation/{name}", float(scale.mean()), batch_size=1)
        if monitor is not None and (done - 1) % monitor.every_n_outer_steps == 0:
            with self._stream(done, 5):
                found = monitor_response(problem, monitor, batch)
            problem.module.log_dict({f"response/{key}": value for key, value in found.items()}, batch_size=1)

    def noise(self, center: Tensor, size: int | None, step: int, kind: int) -> Tensor:
        """Draw the perturbation's noise, different in each process."""
        generator = torch.Generator().manual_seed(self._seed(step, kind))
        return self.problem.loop.perturbation.draw(center, size, generator)

    def _stream(self, step: int, kind: int) -> RandomStream:
        return RandomStream(self._seed(step, kind), self.problem.module.device)

    def _seed(self, step: int, kind: int) -> int:
        # A number for each step, kind of draw and process; the kinds' factors are large primes.
        base = self.problem.batches.seed + 15_485_863 * (step + 1)
        return (base + 32_452_843 * kind + 49_979_687 * self.problem.module.global_rank) % 2**31
