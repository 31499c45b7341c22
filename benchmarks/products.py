"""What a product with the curvature costs on networks of every common kind, and how wrong it is.

Hessian, Gauss-Newton matrix, and differences of gradients, one-sided and central, in float32 and under bfloat16
autocast. Time is in units of one forward and backward of the same loss in the same precision; memory is the peak of
live bytes of the preparation and one product, in units of the gradient's; the error is that of a product with the outer
gradient, to the same product in float64. ``--solves`` times whole hypergradients of decays in place of products.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from _measuring import interleave, live_memory, load, parser, print_table, report, start
from _networks import NETWORKS, Case
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.hypergradient import (
    Curvature,
    FiniteDifference,
    FiniteDifferenceOperator,
    GaussNewton,
    Hessian,
    Neumann,
    Solution,
    SolverState,
)
from lightning_nested.hypergradient.implicit import implicit_result
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.vectors import Vector, norm


@dataclass
class Problem:
    """The loss of a network, and the gradient of an outer one."""

    net: nn.Module
    x: Tensor
    y: Tensor
    half: bool = False
    outer_x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Other examples of the same kind: noise, or the same tokens elsewhere.
        self.outer_x = torch.randn_like(self.x) if self.x.is_floating_point() else self.x.flip(0, 1)

    @property
    def params(self) -> Vector:
        """The weights."""
        return tuple(self.net.parameters())

    def double(self) -> Problem:
        """The same in float64."""
        result = copy.copy(self)
        result.net, result.half = copy.deepcopy(self.net).double(), False
        result.x, result.outer_x = (
            t.double() if t.is_floating_point() else t for t in (self.x, self.outer_x)
        )
        return result

    def logits(self, x: Tensor) -> Tensor:
        """Outputs of the network."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            out: Tensor = self.net(x)
        return out

    def loss(self) -> Tensor:
        """The inner loss."""
        return functional.cross_entropy(self.logits(self.x), self.y)

    def gradient(self) -> Vector:
        """The unit of time and memory."""
        return torch.autograd.grad(self.loss(), self.params)

    def outer_gradient(self) -> Vector:
        """The direction of all products."""
        return torch.autograd.grad(functional.cross_entropy(self.logits(self.outer_x), self.y), self.params)

    def operator(self, curvature: str, v: Vector) -> LinearOperator:
        """Prepare products; differences measure their length along v."""
        logits = self.logits(self.x)
        loss = functional.cross_entropy(logits, self.y)
        kinds: dict[str, Callable[[], Curvature]] = {
            "Hessian": Hessian,
            "GaussNewton": lambda: GaussNewton(outputs=logits),
            "one-sided": lambda: FiniteDifference(sides=1),
            "central": lambda: FiniteDifference(sides=2),
            "default": FiniteDifference,
        }
        kind = kinds[curvature]()
        differences = isinstance(kind, FiniteDifference)
        operator = kind.linearize(self.loss if differences else loss, self.params).curvature
        if isinstance(operator, FiniteDifferenceOperator):
            operator.calibrate(v)
            # Of the measurement itself the first product is made.
            operator.matvec(v)
        return operator


KINDS = ("Hessian", "GaussNewton", "one-sided", "central")


def distance(found: Vector, exact: Vector) -> float:
    """Return the relative error."""
    return float(norm(tuple(a.double() - b for a, b in zip(found, exact, strict=True)))) / float(norm(exact))


def measure(case: Case, half: bool, arguments: object) -> dict[str, dict[str, object]]:
    """Measure every kind of product with the curvature of one network in one precision."""
    problem = Problem(*case)
    v = problem.outer_gradient()
    wide = tuple(a.double() for a in v)
    # Differences approximate the Hessian.
    exact = {kind: problem.double().operator(kind, wide) @ wide for kind in KINDS[:2]}
    problem.half = half
    operators = {kind: problem.operator(kind, v) for kind in KINDS}
    errors = {kind: distance(o @ v, exact.get(kind, exact["Hessian"])) for kind, o in operators.items()}
    memory = {kind: live_memory(lambda k=kind: problem.operator(k, v) @ v) for kind in KINDS}  # type: ignore[misc]
    unit = live_memory(problem.gradient)
    times = interleave(
        {kind: lambda o=o: o @ v for kind, o in operators.items()},  # type: ignore[misc]
        {"gradient": problem.gradient},
        rounds=arguments.rounds,  # type: ignore[attr-defined]
        threads=arguments.threads,  # type: ignore[attr-defined]
    )
    default = problem.operator("default", v)
    assert isinstance(default, FiniteDifferenceOperator)
    return {
        kind: {
            "gradients": times[kind].units["gradient"],
            "memory_in_gradients": memory[kind] / unit,
            "error": errors[kind],
            "error_estimated": getattr(operators[kind], "error", None),
            "sides_by_default": default.sides,
        }
        for kind in KINDS
    }


def measure_solves(case: Case, half: bool, arguments: object) -> dict[str, dict[str, object]]:
    """Measure hypergradients of one decay for each tensor, by five terms of the series."""
    problem = Problem(*case, half=half)
    named = dict(problem.net.named_parameters())
    decay = WeightDecay(init=0.01, include=["*"])
    decay.build(named)

    def solve(curvature: Curvature, state: SolverState | None = None) -> Solution:
        outer = functional.cross_entropy(problem.logits(problem.outer_x), problem.y)
        return implicit_result(
            problem.loss if isinstance(curvature, FiniteDifference) else problem.loss(),
            outer,
            problem.params,
            (),
            solver=Neumann(num_terms=5, step_size=0.1),
            curvature=curvature,
            penalties=[decay.linearize(named)],
            state=state,
        ).solution

    # The third solve takes the length of the second; lengths are measured at solves 1, 2, 4, 8 and so on.
    state = solve(FiniteDifference(), solve(FiniteDifference()).state).state
    calls = {
        SOLVES[0]: lambda: solve(Hessian()),
        SOLVES[1]: lambda: solve(FiniteDifference()),
        SOLVES[2]: lambda: solve(FiniteDifference(), state),
    }
    times = interleave(
        calls,
        {"gradient": problem.gradient},
        rounds=arguments.rounds,  # type: ignore[attr-defined]
        threads=arguments.threads,  # type: ignore[attr-defined]
    )
    return {
        name: {"gradients": times[name].units["gradient"], "products": calls[name]().iterations}
        for name in calls
    }


SOLVES = ("exact", "differences, first outer step", "differences, later ones")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, object]]:
    options = parser(__doc__, rounds=5)
    options.add_argument("--only", nargs="*", default=list(NETWORKS), help="networks to measure")
    options.add_argument("--precision", nargs="*", default=["float32", "bfloat16"])
    options.add_argument("--solves", action="store_true", help="Neumann 5 in place of products")
    arguments = options.parse_args(argv)
    start(arguments)
    before, results, rows = load(), {}, []
    for name in arguments.only:
        for precision in arguments.precision:
            torch.manual_seed(0)
            if arguments.solves:
                found = measure_solves(NETWORKS[name](), precision == "bfloat16", arguments)
                results |= {f"{name}, {precision}, {kind}": entry for kind, entry in found.items()}
                rows.append([name, precision, *(found[kind]["gradients"].text() for kind in SOLVES)])  # type: ignore[attr-defined]
                print(*rows[-1], sep=" | ", flush=True)
                continue
            found = measure(NETWORKS[name](), precision == "bfloat16", arguments)
            results |= {f"{name}, {precision}, {kind}": entry for kind, entry in found.items()}
            sides = found["central"]["sides_by_default"]
            rows.append([name, precision, *(_cell(found[kind]) for kind in KINDS), str(sides)])
            print(*rows[-1], sep=" | ", flush=True)  # the table takes minutes
    print_table(
        ["network", "precision", *(SOLVES if arguments.solves else (*KINDS, "sides by default"))], rows
    )
    if not arguments.solves:
        print("\nEach: gradients [quartiles], memory in gradients, error to float64.")
    report(arguments, results, load_before=before)
    return results


def _cell(entry: dict[str, object]) -> str:
    return f"{entry['gradients'].text()}, {entry['memory_in_gradients']:.1f}, {entry['error']:.1e}"  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
