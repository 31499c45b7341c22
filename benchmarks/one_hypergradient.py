"""The cost of one hypergradient, beside Betty, torchopt, curvlinops and higher.

An MLP 784-500-500-10 (tanh), one weight decay per weight (648 010 of them), a batch of 256. Time is in
units of one forward and backward of the same loss: cross-entropy and decay ½ Σ e^λ w², with gradients for
the weights and for λ. Every answer is compared, in the same run, with what its solver should give and with
the converged solution of the same system, both computed in float64 by code that shares nothing with the
library.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from _measuring import Call, interleave, live_memory, load, parser, print_table, report, start
from _problem import Hypergradient, Problem
from torch import nn

from lightning_nested.hypergradient import ConjugateGradient, GaussNewton, Hessian, InverseSolver, Neumann
from lightning_nested.hypergradient.implicit import implicit_result

MatVec = Callable[[Hypergradient], Hypergradient]


def units(problem: Problem) -> dict[str, Call]:
    """U, and the same without the decays' share."""
    return {
        "U": lambda: torch.autograd.grad(problem.decayed_loss(), (*problem.params, *problem.decays)),
        "plain": lambda: torch.autograd.grad(problem.loss(), problem.params),
    }


def ours(problem: Problem) -> dict[tuple[str, str], Callable[[], Hypergradient]]:
    def closed(solver: InverseSolver, gauss_newton: bool = False) -> Hypergradient:
        logits = problem.network(problem.inputs)
        result = implicit_result(
            nn.functional.cross_entropy(logits, problem.labels),
            problem.outer_loss(),
            problem.params,
            (),
            solver=solver,
            curvature=GaussNewton(outputs=logits) if gauss_newton else Hessian(),
            penalties=[problem.weight_decay.linearize(problem.named)],
        )
        return result.penalties[0]

    def graph(solver: InverseSolver) -> Hypergradient:
        inner, outer = problem.decayed_loss(), problem.outer_loss()
        return implicit_result(inner, outer, problem.params, problem.decays, solver=solver).hypergradient

    solvers: dict[str, InverseSolver] = {
        f"Neumann {terms}": Neumann(num_terms=terms, step_size=problem.step_size) for terms in (5, 20)
    }
    solvers["CG 10"] = ConjugateGradient(max_iterations=10, tolerance=0.0)
    result: dict[tuple[str, str], Callable[[], Hypergradient]] = {}
    for name, solver in solvers.items():
        result[name, "ours"] = lambda s=solver: closed(s)  # type: ignore[misc]
        result[name, "ours, Gauss-Newton"] = lambda s=solver: closed(s, True)  # type: ignore[misc]
        result[name, "ours, decay in the graph"] = lambda s=solver: graph(s)  # type: ignore[misc]
    return result


class Reference:
    """What each solver should give, and the converged answer, in float64 and in the plainest code."""

    def __init__(self, widths: Sequence[int], batch: int) -> None:
        self.problem = problem = Problem(widths, batch, torch.float64)
        self.step_size = problem.step_size
        self.b = torch.autograd.grad(problem.outer_loss(), problem.params)
        gradient = torch.autograd.grad(problem.decayed_loss(), problem.params, create_graph=True)
        self.products: dict[str, MatVec] = {
            "Hessian": lambda v: torch.autograd.grad(gradient, problem.params, v, retain_graph=True),
            "Gauss-Newton": self._gauss_newton,
        }
        self.answers: dict[tuple[str, str], Hypergradient] = {}
        for curvature, product in self.products.items():
            self.answers["converged", curvature] = self._mixed(self._cg(product, 300, 1e-12))
            self.answers["CG 10", curvature] = self._mixed(self._cg(product, 10, 0.0))
            for terms in (5, 20):
                self.answers[f"Neumann {terms}", curvature] = self._mixed(self._series(product, terms))

    def _gauss_newton(self, v: Hypergradient) -> Hypergradient:
        params = tuple(p.detach() for p in self.problem.params)
        outputs, pushed = torch.func.jvp(
            lambda p: self.problem.functional(p, self.problem.inputs), (params,), (v,)
        )
        p = outputs.softmax(dim=-1)
        pushed = (p * pushed - p * (p * pushed).sum(-1, keepdim=True)) / len(p)
        _, pull = torch.func.vjp(lambda p: self.problem.functional(p, self.problem.inputs), params)
        return tuple(
            a + d.detach().exp() * u for a, d, u in zip(pull(pushed)[0], self.problem.decays, v, strict=True)
        )

    def _series(self, product: MatVec, terms: int) -> Hypergradient:
        v, total = self.b, self.b
        for _ in range(terms):
            v = tuple(a - self.step_size * h for a, h in zip(v, product(v), strict=True))
            total = tuple(t + a for t, a in zip(total, v, strict=True))
        return tuple(self.step_size * t for t in total)

    def _cg(self, product: MatVec, iterations: int, tolerance: float) -> Hypergradient:
        x = tuple(torch.zeros_like(a) for a in self.b)
        r = p = self.b
        rr = start = _dot(r, r)
        for _ in range(iterations):
            if rr <= tolerance**2 * start:
                break
            q = product(p)
            step = rr / _dot(p, q)
            x = tuple(a + step * d for a, d in zip(x, p, strict=True))
            r = tuple(a - step * d for a, d in zip(r, q, strict=True))
            rr, previous = _dot(r, r), rr
            p = tuple(a + (rr / previous) * d for a, d in zip(r, p, strict=True))
        return x

    def _mixed(self, x: Hypergradient) -> Hypergradient:
        pairs = zip(x, self.problem.decays, self.problem.params, strict=True)
        return tuple(-(a * d.detach().exp() * p.detach()) for a, d, p in pairs)


def _dot(u: Hypergradient, v: Hypergradient) -> float:
    return sum(float((a * b).sum()) for a, b in zip(u, v, strict=True))


def compare(answer: Hypergradient, reference: Hypergradient) -> tuple[float, float]:
    """Relative error and cosine."""
    answer = tuple(a.detach().double() for a in answer)
    error = tuple(a - r for a, r in zip(answer, reference, strict=True))
    size = math.sqrt(_dot(reference, reference))
    return (
        math.sqrt(_dot(error, error)) / size,
        _dot(answer, reference) / size / math.sqrt(max(_dot(answer, answer), 1e-300)),
    )


# Beyond this error to its own solver's float64 answer, a contestant computes something else.
WRONG = 1e-2
LIMITS = {"Neumann 5": 8.0, "Neumann 20": 26.0, "CG 10": 14.0}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, object]]:
    options = parser(__doc__)
    options.add_argument(
        "--only", nargs="*", default=[""], help="contestants whose name contains one of these"
    )
    options.add_argument(
        "--unchecked", action="store_true", help="skip the answers in float64, which take minutes"
    )
    options.add_argument("--widths", type=int, nargs="+", default=[784, 500, 500, 10])
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--no-memory", action="store_true", help="skip the measurement of live memory")
    arguments: argparse.Namespace = options.parse_args(argv)
    start(arguments)
    before = load()
    problem = Problem(arguments.widths, arguments.batch)
    from _peers import peers

    contestants = {
        key: call
        for key, call in {**ours(problem), **peers(problem)}.items()
        if any(only in " ".join(key) for only in arguments.only)
    }
    reference = None if arguments.unchecked else Reference(arguments.widths, arguments.batch)
    unit = units(problem)
    errors = {}
    for (solver, library), call in contestants.items():
        curvature = "Gauss-Newton" if "Gauss-Newton" in library else "Hessian"
        if reference is None:
            errors[solver, library] = (math.nan,) * 4
            continue
        answer = call()
        errors[solver, library] = (
            *compare(answer, reference.answers[solver, curvature]),
            *compare(answer, reference.answers["converged", "Hessian"]),
        )
    del reference
    one = {name: live_memory(call) for name, call in unit.items()} if not arguments.no_memory else {}
    memory = {key: live_memory(call) for key, call in contestants.items()} if not arguments.no_memory else {}
    names = {" / ".join(key): call for key, call in contestants.items()}
    times = interleave(names, unit, rounds=arguments.rounds, threads=arguments.threads)

    results: dict[str, dict[str, object]] = {}
    rows = []
    for solver, library in sorted(contestants, key=lambda k: (list(LIMITS).index(k[0]), "ours" not in k[1])):
        time = times[f"{solver} / {library}"]
        own, own_cosine, converged, cosine = errors[solver, library]
        ratio = memory[solver, library] / one["U"] if memory else math.nan
        wrong = own > WRONG
        rows.append(
            [
                solver,
                library,
                time.units["U"].text(),
                time.units["plain"].text(),
                f"{1e3 * time.seconds.median:.0f}",
                f"{own:.1e}" + (" WRONG" if wrong else ""),
                f"{converged:.1e}",
                f"{cosine:.4f}",
                f"{ratio:.2f}",
            ]
        )
        results[f"{solver} / {library}"] = {
            "seconds": time.seconds,
            "U": time.units["U"],
            "plain": time.units["plain"],
            "error_to_own_solver": own,
            "cosine_to_own_solver": own_cosine,
            "error_to_converged": converged,
            "cosine_to_converged": cosine,
            "memory_bytes": memory.get((solver, library)),
            "memory_in_gradients": ratio,
            "memory_in_plain_gradients": memory[solver, library] / one["plain"] if memory else math.nan,
            "wrong": wrong,
        }
    print_table(
        [
            "solver",
            "library",
            "U [quartiles]",
            "without decay [quartiles]",
            "ms",
            "error to own solver",
            "error to converged",
            "cosine",
            "memory / gradient's",
        ],
        rows,
    )
    limits = ", ".join(f"{solver} <= {limit:g} U" for solver, limit in LIMITS.items())
    print(f"\nReach: {limits}; memory <= 3.5, the same at 5 and 20.")
    packages = ("betty-ml", "torchopt", "curvlinops-for-pytorch", "higher")
    results["gradient"] = {"memory_bytes": one}
    report(arguments, results, packages=packages, load_before=before)
    return results


if __name__ == "__main__":
    main()
