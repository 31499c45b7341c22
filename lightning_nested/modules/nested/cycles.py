"""Inner steps up to an outer step: with a kept graph of the last one, or of all that are unrolled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.hypergradient import Curvature, FiniteDifference, GaussNewton
from lightning_nested.hypergradient.fast_weights import FastWeights
from lightning_nested.hyperparameters import LearningRate, OuterReport
from lightning_nested.linalg.processes import average_gradients
from lightning_nested.linalg.vectors import norm
from lightning_nested.optim.step_dynamics import coupled_decay
from lightning_nested.trainer.inner_problem import InnerProblem, check_loss
from lightning_nested.trainer.isolation import untouched_buffers, without_trace
from lightning_nested.trainer.lightning import reduction
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.requirements import named_outputs


class Cycle(ABC):
    """Inner steps up to the next outer step."""

    def __init__(self, problem: InnerProblem) -> None:
        self.problem = problem
        self._sums: list[Tensor | None] = [None] * len(problem.parameters)

    @abstractmethod
    def add(self, batch: Any, *, remaining: int) -> Tensor:
        """Evaluate one batch of the present inner step, which is ``remaining`` steps before the outer one."""

    @abstractmethod
    def step(self, *, closes: bool) -> OuterReport | FloatingPointError | None:
        """One inner step; if it closes the cycle, also the hypergradient, or why there is none."""

    @abstractmethod
    def drop(self) -> None:
        """Forget all graphs."""

    def _accumulate(self, gradients: tuple[Tensor | None, ...]) -> None:
        self._sums = [
            b if a is None else a if b is None else a + b for a, b in zip(self._sums, gradients, strict=True)
        ]

    def _take(self) -> tuple[Tensor | None, ...]:
        """The step's gradient, the mean over processes."""
        sums, self._sums = self._sums, [None] * len(self._sums)
        problem = self.problem
        return average_gradients(sums, list(problem.parameters.values()), reduction(problem.module.trainer))


class ImplicitCycle(Cycle):
    """Plain steps; the last one's loss is kept for implicit differentiation."""

    def __init__(self, problem: InnerProblem, curvature: Curvature | None) -> None:
        super().__init__(problem)
        self._curvature = curvature
        self._losses: list[Tensor] = []
        self._again: list[Callable[[], Tensor]] = []
        self._outputs: list[Tensor] = []
        self._outputs_of: nn.Module | None = None
        if isinstance(curvature, GaussNewton):
            if problem.accumulate > 1:
                raise MisconfigurationException(
                    "GaussNewton(outputs=...) sees one batch. "
                    f"Got accumulate_grad_batches={problem.accumulate}; use Hessian(), or set it to 1."
                )
            self._outputs_of = named_outputs(problem.module, curvature)

    @override
    def add(self, batch: Any, *, remaining: int) -> Tensor:
        problem, closes = self.problem, remaining == 1
        start = (
            RandomStream.snapshot(problem.module.device)
            if isinstance(self._curvature, FiniteDifference)
            else None
        )
        handle = None
        if closes and self._outputs_of is not None:
            handle = self._outputs_of.register_forward_hook(self._keep_outputs)
        loss = check_loss("inner_loss", problem.module, problem.inner_loss(batch)) / problem.accumulate
        if handle is not None:
            handle.remove()
        with problem.full_precision():
            parameters = tuple(problem.parameters.values())
            self._accumulate(torch.autograd.grad(loss, parameters, retain_graph=closes, allow_unused=True))
        if closes:
            self._losses.append(loss)
            if start is not None:
                self._again.append(lambda: self._evaluate_again(batch, start))
        return loss.detach() * problem.accumulate

    @override
    def step(self, *, closes: bool) -> OuterReport | FloatingPointError | None:
        problem = self.problem
        outcome = self._outer() if closes else None
        self._drop_graphs()
        gradients = list(self._take())
        for parameter, gradient in zip(problem.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        for decay in problem.outer.decays:
            decay.add_gradient_(problem.parameters)
        problem.real_step(problem.limit([p.grad for p in problem.parameters.values()]))
        return outcome

    def _drop_graphs(self) -> None:
        self._losses, self._again, self._outputs = [], [], []

    @override
    def drop(self) -> None:
        self._drop_graphs()
        self._sums = [None] * len(self._sums)

    def _outer(self) -> OuterReport | FloatingPointError:
        problem = self.problem
        outer_loss = problem.evaluate_outer(
            lambda loss, batch: loss(batch),
            (*problem.parameters.values(), *problem.outer.in_graph_tensors),
        )
        again = list(self._again)
        inner = torch.stack(self._losses).sum() if len(self._losses) > 1 else self._losses[0]
        curvature = self._curvature
        if isinstance(curvature, GaussNewton):
            if len(self._outputs) != 1:
                raise MisconfigurationException(
                    f"GaussNewton(outputs={curvature.outputs!r}) must name a submodule that inner_loss calls once "
                    f"and that returns one tensor. Got {len(self._outputs)} outputs in this step; use Hessian()."
                )
            curvature = GaussNewton(outputs=self._outputs[0])
        try:
            # torch.utils.checkpoint runs the forward again in every product, and would move buffers.
            with problem.full_precision(), untouched_buffers(problem.module):
                return problem.outer.compute(
                    (lambda: torch.stack([f() for f in again]).sum()) if again else inner,
                    outer_loss,
                    problem.parameters,
                    curvature=curvature,
                    fixed_decay=coupled_decay(problem.optimizer.optimizer),
                    reduce=reduction(problem.module.trainer),
                )
        except FloatingPointError as error:
            return error

    def _evaluate_again(self, batch: Any, start: RandomStream) -> Tensor:
        """The training loss once more, with the masks of its first evaluation and without trace."""
        problem = self.problem
        trainer = problem.module.trainer
        with (
            start.replay(),
            without_trace(problem.module, trainer),
            trainer.precision_plugin.train_step_context(),
        ):
            return problem.inner_loss(batch) / problem.accumulate

    def _keep_outputs(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            self._outputs.append(output)


class UnrolledCycle(Cycle):
    """The last ``truncate`` steps are made on fast weights, which keep their graph."""

    def __init__(self, problem: InnerProblem, truncate: int) -> None:
        super().__init__(problem)
        self._truncate = truncate
        self._fast: FastWeights | None = None
        self._start()  # refuse an optimizer at the start of fit, not after the first plain steps

    def _start(self) -> FastWeights:
        problem = self.problem
        return FastWeights(problem.module, problem.optimizer.optimizer, problem.parameters)

    @override
    def add(self, batch: Any, *, remaining: int) -> Tensor:
        problem = self.problem
        if self._fast is None and remaining <= self._truncate:
            self._fast = self._start()
        if self._fast is None:
            raw = problem.inner_loss(batch)
        else:
            raw = self._fast.evaluate(problem.inner_loss, batch)
        loss = check_loss("inner_loss", problem.module, raw) / problem.accumulate
        with problem.full_precision():
            if self._fast is not None:
                self._accumulate(self._fast.gradient(loss))
            else:
                self._accumulate(
                    torch.autograd.grad(loss, tuple(problem.parameters.values()), allow_unused=True)
                )
        return loss.detach() * problem.accumulate

    @override
    def step(self, *, closes: bool) -> OuterReport | FloatingPointError | None:
        problem, fast = self.problem, self._fast
        with problem.full_precision():
            gradients = self._decayed(list(self._take()), fast)
            limited = problem.limit(gradients)
            if fast is not None:
                fast.step(limited, self._rates())
        problem.real_step(limited)
        if fast is None:
            return None
        fast.follow()
        if not closes:
            return None
        size = float(norm(tuple(g.detach() for g in gradients if g is not None)))
        outer_loss = problem.evaluate_outer(fast.evaluate)
        self._fast = None
        try:
            with problem.full_precision():
                return problem.outer.compute_unrolled(
                    outer_loss, reduce=reduction(problem.module.trainer), inner_gradient_norm=size
                )
        except FloatingPointError as error:
            return error

    @override
    def drop(self) -> None:
        self._fast = None
        self._sums = [None] * len(self._sums)

    def _decayed(self, gradients: list[Tensor | None], fast: FastWeights | None) -> list[Tensor | None]:
        """With dᵢwᵢ added, by its graph to both."""
        problem = self.problem
        values: dict[str, Tensor] = dict(problem.parameters) if fast is None else fast.values
        by_name = dict(zip(problem.parameters, gradients, strict=True))
        with torch.set_grad_enabled(fast is not None):
            for decay in problem.outer.decays:
                for name, d in decay.decays().items():
                    gradient = by_name[name]
                    if gradient is not None:
                        by_name[name] = gradient + d.to(gradient.dtype) * values[name]
        return list(by_name.values())

    def _rates(self) -> tuple[Tensor, ...] | None:
        for hyperparameter in self.problem.outer.hyperparameters:
            if isinstance(hyperparameter, LearningRate):
                return hyperparameter.rates()
        return None
