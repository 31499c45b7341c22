"""Inner steps up to an outer step, with the graph of the last one or of all that are unrolled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nested.hypergradient import Curvature
from lightning_nested.hypergradient.fast_weights import FastWeights
from lightning_nested.hyperparameters import OuterReport
from lightning_nested.linalg.graph import explain_double_backward
from lightning_nested.linalg.processes import average_gradients
from lightning_nested.linalg.vectors import norm
from lightning_nested.modules.nested.problem import NestedProblem
from lightning_nested.trainer.find_hypergradient import find_hypergradient
from lightning_nested.trainer.forecast import expect_loss
from lightning_nested.trainer.inner_graph import InnerGraph
from lightning_nested.trainer.inner_problem import check_loss
from lightning_nested.trainer.lightning import reduction
from lightning_nested.trainer.outer_plan import needs_graph


class Cycle(ABC):
    """Inner steps up to the next outer step."""

    def __init__(self, problem: NestedProblem) -> None:
        self.problem = problem
        self._sums: list[Tensor | None] = [None] * len(problem.parameters)

    @abstractmethod
    def add(self, batch: Any, *, remaining: int) -> Tensor:
        """Evaluate one batch of the current inner step, which is ``remaining`` steps before the outer one."""

    @abstractmethod
    def step(self, *, closes: bool) -> OuterReport | FloatingPointError | None:
        """Make an inner step; if it closes the cycle, return the report of the hypergradient or the error."""

    def drop(self) -> None:
        """Free all graphs; the next batch begins a new cycle."""
        self._sums = [None] * len(self._sums)

    def close(self) -> None:
        """Free all graphs, and leave the module as it was."""
        self.drop()

    def _accumulate(self, gradients: tuple[Tensor | None, ...]) -> None:
        self._sums = [
            b if a is None else a if b is None else a + b for a, b in zip(self._sums, gradients, strict=True)
        ]

    def _take(self) -> tuple[Tensor | None, ...]:
        """Return the step's gradient, the mean over processes."""
        sums, self._sums = self._sums, [None] * len(self._sums)
        problem = self.problem
        return average_gradients(sums, list(problem.parameters.values()), reduction(problem.module.trainer))


class ImplicitCycle(Cycle):
    """Cycle of plain steps that keeps the graph of the last one for implicit differentiation."""

    def __init__(self, problem: NestedProblem, curvature: Curvature | None) -> None:
        super().__init__(problem)
        self._keeps_graph = needs_graph(problem.plan, curvature)
        self._graph = InnerGraph(
            problem.module, curvature, accumulate=problem.accumulate, method="inner_loss"
        )
        self._graph.unhook()

    @override
    def add(self, batch: Any, *, remaining: int) -> Tensor:
        problem, closes = self.problem, remaining == 1
        problem.plan.pause(False, batch)
        if closes:
            again = problem.plan.looks_ahead or problem.check.is_due
            self._graph.observe(
                lambda: problem.inner_loss(batch) / problem.accumulate,
                again=again and problem.check.may_repeat(problem.module),
            )
        loss = check_loss("inner_loss", problem.module, problem.inner_loss(batch)) / problem.accumulate
        expect_loss(problem.plan.forecast, loss, problem.accumulate)
        if closes:
            self._graph.add(loss)
            self._graph.unhook()
        with problem.full_precision():
            parameters, keeps = tuple(problem.parameters.values()), closes and self._keeps_graph
            with explain_double_backward() if keeps else nullcontext():
                self._accumulate(torch.autograd.grad(loss, parameters, retain_graph=keeps, allow_unused=True))
        problem.plan.pause(True)
        return loss.detach() * problem.accumulate

    @override
    def step(self, *, closes: bool) -> OuterReport | FloatingPointError | None:
        problem = self.problem
        outcome = self._find_hypergradient() if closes else None
        self._graph.clear()
        problem.put_gradients(self._take())
        if not problem.plan.decoupled:
            problem.plan.add_decays(problem.parameters, 1.0)
        problem.plan.observe_gradient(problem.module.trainer, scale=1.0, hook_scale=1.0)
        problem.real_step(problem.limit([p.grad for p in problem.parameters.values()]))
        return outcome

    @override
    def drop(self) -> None:
        super().drop()
        self._graph.clear()

    @override
    def close(self) -> None:
        super().close()
        self._graph.close()

    def _find_hypergradient(self) -> OuterReport | FloatingPointError:
        problem = self.problem
        try:
            with problem.full_precision():
                return find_hypergradient(
                    problem.module,
                    problem.plan,
                    self._graph,
                    problem.parameters,
                    partial(problem.evaluate_outer, lambda loss, batch: loss(batch)),
                    check=problem.check,
                )
        except FloatingPointError as error:
            return error


class UnrolledCycle(Cycle):
    """Cycle whose last ``truncate`` steps are made on fast weights, which keep their graph."""

    def __init__(self, problem: NestedProblem, truncate: int) -> None:
        super().__init__(problem)
        self._truncate = truncate
        self._fast: FastWeights | None = None
        # Refuse an optimizer at the start of fit, not after the first plain steps.
        self._start()

    def _start(self) -> FastWeights:
        problem = self.problem
        return FastWeights(problem.module, problem.optimizer.optimizer, problem.parameters)

    @override
    def add(self, batch: Any, *, remaining: int) -> Tensor:
        problem = self.problem
        if self._fast is None and remaining <= self._truncate:
            self._fast = self._start()
        fast = self._fast
        raw = problem.inner_loss(batch) if fast is None else fast.evaluate(problem.inner_loss, batch)
        loss = check_loss("inner_loss", problem.module, raw) / problem.accumulate
        with problem.full_precision():
            if fast is not None:
                self._accumulate(fast.gradient(loss))
            else:
                parameters = tuple(problem.parameters.values())
                self._accumulate(torch.autograd.grad(loss, parameters, allow_unused=True))
        return loss.detach() * problem.accumulate

    @override
    def step(self, *, closes: bool) -> OuterReport | FloatingPointError | None:
        problem, fast = self.problem, self._fast
        with problem.full_precision():
            gradients = self._decayed(list(self._take()), fast)
            limited = problem.limit(gradients)
            if fast is not None:
                rates = (h.rates() for h in problem.outer.hyperparameters)
                decays = [d.decays() for d in problem.outer.decays] if problem.plan.decoupled else []
                fast.step(limited, next((r for r in rates if r is not None), None), decays)
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
        super().drop()
        self._fast = None

    def _decayed(self, gradients: list[Tensor | None], fast: FastWeights | None) -> list[Tensor | None]:
        """Add dᵢwᵢ to the gradients, with its graph to both, unless the decay is decoupled."""
        problem = self.problem
        if problem.plan.decoupled:
            return gradients
        values: dict[str, Tensor] = dict(problem.parameters) if fast is None else fast.values
        by_name = dict(zip(problem.parameters, gradients, strict=True))
        with torch.set_grad_enabled(fast is not None):
            for decay in problem.outer.decays:
                for name, d in decay.decays().items():
                    gradient = by_name[name]
                    if gradient is not None:
                        by_name[name] = gradient + d.to(gradient.dtype) * values[name]
        return list(by_name.values())
