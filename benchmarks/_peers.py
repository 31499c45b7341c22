"""The published libraries as contestants: each through its own solver, on the problem of one_hypergradient.

Where a library differentiates the inner loss itself (Betty, torchopt, higher), the decay is part of that
loss; curvlinops gives inverse products only, and gets the decay as a diagonal operator and the mixed
derivative by hand.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from _problem import Problem
from torch import Tensor

Hypergradient = tuple[Tensor, ...]


def peers(problem: Problem) -> dict[tuple[str, str], Callable[[], Hypergradient]]:
    """Contestants by (solver, library), for the libraries that are installed."""
    found: dict[tuple[str, str], Callable[[], Hypergradient]] = {}
    for module, make in (
        ("betty", _betty),
        ("torchopt", _torchopt),
        ("curvlinops", _curvlinops),
        ("higher", _higher),
    ):
        if find_spec(module) is None:
            print(f"{module} is not installed: left out. See benchmarks/requirements.txt.")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(module)
        found.update({(solver, module): _quiet(call) for solver, call in make(problem).items()})
    return found


def _quiet(call: Callable[[], Hypergradient]) -> Callable[[], Hypergradient]:
    """Without the deprecation warnings of the libraries' own code, which would bury the table."""

    @functools.wraps(call)
    def quiet() -> Hypergradient:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()

    return quiet


def _betty(problem: Problem) -> dict[str, Callable[[], Hypergradient]]:
    from betty.hypergradient.cg import cg
    from betty.hypergradient.neumann import neumann

    def run(function: Any, **options: float) -> Hypergradient:
        inner = SimpleNamespace(
            paths=[],
            config=SimpleNamespace(**options),
            cur_batch=None,
            training_step_exec=lambda _: problem.decayed_loss(),
            trainable_parameters=lambda: problem.params,
            parameters=lambda: problem.params,
        )
        outer = SimpleNamespace(trainable_parameters=lambda: problem.decays)
        vector = torch.autograd.grad(problem.outer_loss(), problem.params)
        return tuple(function(vector, inner, outer, sync=False))

    rate = problem.step_size
    return {
        "Neumann 5": lambda: run(neumann, neumann_iterations=5, neumann_alpha=rate),
        "Neumann 20": lambda: run(neumann, neumann_iterations=20, neumann_alpha=rate),
        "CG 10": lambda: run(cg, cg_iterations=10, cg_alpha=1.0),
    }


def _torchopt(problem: Problem) -> dict[str, Callable[[], Hypergradient]]:
    import torchopt

    count = len(problem.params)

    def loss(params: Hypergradient, decays: Hypergradient) -> Tensor:
        logits = problem.functional(params, problem.inputs)
        return torch.nn.functional.cross_entropy(logits, problem.labels) + problem.penalty(params, decays)

    def run(solve: Any) -> Hypergradient:
        root = torchopt.diff.implicit.custom_root(torch.func.grad(loss), argnums=1, solve=solve)
        solution = root(lambda params, decays: params)(problem.params, problem.decays)
        logits = problem.functional(solution[:count], problem.outer_inputs)
        outer = torch.nn.functional.cross_entropy(logits, problem.outer_labels)
        return torch.autograd.grad(outer, problem.decays)

    inverse, rate = torchopt.linear_solve.solve_inv, problem.step_size
    return {
        "Neumann 5": lambda: run(inverse(ns=True, maxiter=5, alpha=rate)),
        "Neumann 20": lambda: run(inverse(ns=True, maxiter=20, alpha=rate)),
        "CG 10": lambda: run(torchopt.linear_solve.solve_cg(maxiter=10, rtol=0.0)),
    }


def _curvlinops(problem: Problem) -> dict[str, Callable[[], Hypergradient]]:
    from curvlinops import CGInverseLinearOperator, HessianLinearOperator, NeumannInverseLinearOperator
    from curvlinops._torch_base import PyTorchLinearOperator

    shapes = [tuple(p.shape) for p in problem.params]

    class Diagonal(PyTorchLinearOperator):
        SELF_ADJOINT = True
        dtype, device = problem.params[0].dtype, problem.params[0].device

        def __init__(self, diagonal: Hypergradient) -> None:
            super().__init__(shapes, shapes)
            self._diagonal = diagonal

        def _matmat(self, matrix: list[Tensor]) -> list[Tensor]:
            return [m * d.unsqueeze(-1) for m, d in zip(matrix, self._diagonal, strict=True)]

        def _adjoint(self) -> Diagonal:
            return self

    def run(inverse: Any, **options: Any) -> Hypergradient:
        data = [(problem.inputs, problem.labels)]
        hessian = HessianLinearOperator(
            problem.network,
            torch.nn.CrossEntropyLoss(),
            list(problem.params),
            data,
            check_deterministic=False,
        )
        decay = tuple(d.detach().exp() for d in problem.decays)
        vector = torch.autograd.grad(problem.outer_loss(), problem.params)
        solution = inverse(hessian + Diagonal(decay), **options) @ list(vector)
        return tuple(-(s * d * p.detach()) for s, d, p in zip(solution, decay, problem.params, strict=True))

    neumann, rate = NeumannInverseLinearOperator, problem.step_size
    return {
        "Neumann 5": lambda: run(neumann, num_terms=5, scale=rate),
        "Neumann 20": lambda: run(neumann, num_terms=20, scale=rate),
        "CG 10": lambda: run(CGInverseLinearOperator, max_iter=10, max_tridiag_iter=0, tolerance=1e-12),
    }


def _higher(problem: Problem) -> dict[str, Callable[[], Hypergradient]]:
    import higher

    def run(terms: int) -> Hypergradient:
        # From a stationary point, K + 1 steps of gradient descent are the series with K products.
        optimizer = torch.optim.SGD(problem.network.parameters(), lr=problem.step_size)
        with higher.innerloop_ctx(problem.network, optimizer) as (network, inner):
            for _ in range(terms + 1):
                params = tuple(network.parameters())
                loss = torch.nn.functional.cross_entropy(network(problem.inputs), problem.labels)
                inner.step(loss + problem.penalty(params, problem.decays) - problem.tilt(params))
            outer = torch.nn.functional.cross_entropy(network(problem.outer_inputs), problem.outer_labels)
            return torch.autograd.grad(outer, problem.decays)

    return {"Neumann 5": lambda: run(5), "Neumann 20": lambda: run(20)}
