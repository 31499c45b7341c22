"""``torch.compile`` of every optimizer's step: one graph without a break, compiled once, equal to the eager step."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler

from lightning_nested.optim import ComplexAdam, ComplexSGD, Extragradient, GameOptimizer
from tests.capabilities import TORCH_2_5
from tests.optim.cases import CASES, OptimizerCase, Quadratic, follow

COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning"),
    pytest.mark.skipif(TORCH_2_5, reason="the compiler of torch 2.5 takes each learning rate for a constant"),
]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """As in a process that has compiled nothing."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Run:
    """Training of four parameters in two groups, one of them without a gradient, under a scheduler."""

    def __init__(self, case: OptimizerCase, backend: str | None = None, **options: Any) -> None:
        self.problem = Quadratic(shapes=((3,), (2, 2), (), (5,)))
        params = self.problem.params
        self.optimizer = case.make([{"params": params[:1]}, {"params": params[1:], **case.group}], **options)
        self.step: Callable[[], object] = self.optimizer.step
        self.extrapolate: Callable[[], object] = getattr(self.optimizer, "extrapolate", lambda: None)
        if backend is not None:
            self.step = torch.compile(self.step, backend=backend, fullgraph=True)
            if isinstance(self.optimizer, Extragradient):
                self.extrapolate = torch.compile(self.extrapolate, backend=backend, fullgraph=True)
        # after the compilation: a scheduler puts a function around step that torch does not trace
        self.schedule = lr_scheduler.ExponentialLR(self.optimizer, 0.9)

    def gradients(self) -> None:
        self.problem.gradients()
        self.problem.params[2].grad = None

    def update(self, *, schedule: bool = False) -> None:
        self.gradients()
        if isinstance(self.optimizer, Extragradient):
            self.extrapolate()
            self.gradients()
        self.step()
        if schedule:
            self.schedule.step()

    def tensors(self) -> list[Tensor]:
        """Parameters, then the state of each."""
        states = [self.optimizer.state.get(p, {}) for p in self.problem.params]
        return [*self.problem.values(), *(state[name] for state in states for name in sorted(state))]


def same(compiled: Run, eager: Run, ulps: float = 64) -> None:
    """Equal up to the rounding of some ten steps of numbers of size about 1."""
    tolerance = ulps * torch.finfo(torch.float64).eps
    for a, b in zip(compiled.tensors(), eager.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@every
def test_one_graph_that_stays(case: OptimizerCase, backend: str) -> None:
    options = {"weight_decay": 0.1, "maximize": True}
    compiled, eager = Run(case, backend, **options), Run(case, **options)
    both = (compiled, eager)
    for run in both:
        run.update()
    # extragradient has two functions, and its first half makes room for what it saves
    assert graphs() == (2 if case.kind is Extragradient else 1)
    for run in both:
        run.update(schedule=True)
    steady = graphs()
    assert steady <= (3 if case.kind is Extragradient else 1)
    for run in both:
        # the first change of the rate makes it an input of the graph
        run.update(schedule=True)
    assert graphs() == steady + (2 if case.kind is Extragradient else 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            for run in both:
                run.update(schedule=True)
    same(*both)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ComplexSGD, {"lr": 0.05, "phase": math.pi}),
        (ComplexAdam, {"lr": 0.01, "phase": math.pi, "debias": True}),
        (ComplexAdam, {"lr": 0.01, "phase": 0.0, "debias": True}),
        (ComplexAdam, {"lr": 0.01, "phase": 2.0, "betas": (0.0, 0.9), "debias": True}),
    ],
)
def test_momentum_that_is_real_or_absent(kind: type[GameOptimizer], options: dict[str, Any]) -> None:
    case = OptimizerCase(kind.__name__, kind, options, {"lr": 0.02})
    compiled, eager = Run(case, "aot_eager"), Run(case)
    for _ in range(4):
        compiled.update()
        eager.update()
    assert graphs() == 1
    same(compiled, eager)


@every
def test_a_parameter_that_gets_a_gradient_later_counts_its_own_steps(case: OptimizerCase) -> None:
    compiled, eager = Run(case, "eager"), Run(case)
    for run in (compiled, eager):
        run.update()
        run.gradients = run.problem.gradients  # type: ignore[method-assign]
        run.update()
        run.update()
    same(compiled, eager)


@every
def test_eager_and_compiled_steps_share_one_state(case: OptimizerCase) -> None:
    mixed, eager = Run(case, "eager"), Run(case)
    plain = Run(case)
    plain.problem, plain.optimizer = mixed.problem, mixed.optimizer
    plain.step, plain.extrapolate = (
        mixed.optimizer.step,
        getattr(mixed.optimizer, "extrapolate", lambda: None),
    )
    for run in (mixed, plain, mixed, plain):
        run.update()
        eager.update()
    same(mixed, eager)


def test_a_scheduler_made_before_breaks_outside_of_the_step_only() -> None:
    problem, other = Quadratic(), Quadratic()
    optimizer, eager = ComplexAdam(problem.params), ComplexAdam(other.params)
    schedules = [lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, eager)]
    step = torch.compile(optimizer.step, backend="aot_eager")
    for t in range(6):
        problem.gradients()
        other.gradients()
        with torch._dynamo.config.patch(error_on_recompile=t > 1):
            step()
        eager.step()
        for schedule in schedules:
            schedule.step()
    assert graphs() == 2
    for a, b in zip(problem.values(), other.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="Inductor needs a C++ compiler")
@every
def test_inductor(case: OptimizerCase) -> None:
    compiled, eager = Run(case, "inductor"), Run(case)
    for t in range(5):
        with torch._dynamo.config.patch(error_on_recompile=t > 2):
            for run in (compiled, eager):
                run.update(schedule=t > 0)
    same(compiled, eager)


@pytest.mark.parametrize("case", [c for c in CASES if "step" in c.buffers], ids=lambda case: case.name)
def test_states_whose_steps_are_plain_numbers_load(case: OptimizerCase) -> None:
    problem, resumed = Quadratic(), Quadratic()
    optimizer = case.make(problem.params)
    follow(optimizer, problem.gradients, 3)
    older = copy.deepcopy(optimizer.state_dict())
    for kept in older["state"].values():
        kept["step"] = int(kept["step"])
    with torch.no_grad():
        for p, value in zip(resumed.params, problem.params, strict=True):
            p.copy_(value)
    other = case.make(resumed.params)
    other.load_state_dict(older)
    assert all(kept["step"].item() == 3 for kept in other.state.values())
    assert all(kept["step"] == 3 for kept in older["state"].values())
    follow(optimizer, problem.gradients, 2)
    follow(other, resumed.gradients, 2)
    for a, b in zip(problem.values(), resumed.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
