"""What every optimizer owes to torch.optim: the steps it makes, on every kind of tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.optim import Extragradient
from lightning_nested.optim.kernels import walk
from tests.capabilities import named_parameters
from tests.optim.cases import OptimizerCase, Quadratic, close, equal, every, follow, game_step
from tests.trainers import trainer


def run(case: OptimizerCase, steps: int = 5, **options: Any) -> list[Tensor]:
    problem = Quadratic()
    follow(case.make(problem.params, **options), problem.gradients, steps)
    return problem.values()


@every
def test_a_quadratic_converges(case: OptimizerCase) -> None:
    problem = Quadratic()
    follow(case.make(problem.params), problem.gradients, 800)
    # Adam's step does not vanish with the gradient: it comes to about lr of the minimum
    adam = "Adam" in case.name
    assert problem.loss().item() < (1e-3 if adam else 1e-8)


@every
def test_the_state_after_a_step(case: OptimizerCase) -> None:
    problem = Quadratic()
    optimizer = case.make(problem.params)
    follow(optimizer, problem.gradients, 2)
    if not case.buffers:
        assert not optimizer.state
    for p in problem.params if case.buffers else []:
        assert tuple(sorted(optimizer.state[p])) == case.buffers
        for name, value in optimizer.state[p].items():
            assert value == 2 if name == "step" else value.shape == p.shape


@every
def test_num_gradients_is_what_a_step_with_a_closure_takes(case: OptimizerCase) -> None:
    problem, calls = Quadratic(), 0
    optimizer = case.make(problem.params)

    def closure() -> float:
        nonlocal calls
        calls += 1
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss.item()

    before = problem.loss().item()
    assert optimizer.step(closure) == before
    assert calls == optimizer.num_gradients
    assert torch.is_grad_enabled()
    other = Quadratic()
    follow(case.make(other.params), other.gradients, 1)
    close(problem.values(), other.values())


@every
def test_maximize_ascends(case: OptimizerCase) -> None:
    problem, mirrored = Quadratic(), Quadratic()

    def negated() -> None:
        mirrored.gradients()
        for p in mirrored.params:
            p.grad.neg_()

    follow(case.make(problem.params), problem.gradients, 5)
    follow(case.make(mirrored.params, maximize=True), negated, 5)
    close(problem.values(), mirrored.values())


@pytest.mark.parametrize("maximize", [False, True])
@every
def test_weight_decay_is_part_of_the_gradient_and_gradients_are_not_changed(
    case: OptimizerCase, maximize: bool
) -> None:
    problem, written_out = Quadratic(), Quadratic()

    def with_decay() -> None:
        written_out.gradients()
        for p in written_out.params:
            # as in torch: the loss is ascended, the decay still decays
            p.grad.add_(p.detach(), alpha=-0.3 if maximize else 0.3)

    optimizer = case.make(problem.params, weight_decay=0.3, maximize=maximize)
    follow(optimizer, problem.gradients, 5)
    follow(case.make(written_out.params, maximize=maximize), with_decay, 5)
    close(problem.values(), written_out.values())
    problem.gradients()
    before = [p.grad.clone() for p in problem.params]
    if isinstance(optimizer, Extragradient):
        optimizer.extrapolate()
    optimizer.step()
    equal([p.grad for p in problem.params], before)


@every
def test_groups_have_options_of_their_own(case: OptimizerCase) -> None:
    problem, separate = Quadratic(), Quadratic()
    first, *rest = problem.params
    optimizer = case.make([{"params": [first]}, {"params": rest, **case.group}, {"params": []}])
    follow(optimizer, problem.gradients, 5)
    parts = [case.make(separate.params[:1]), case.make(separate.params[1:], **case.group)]
    for _ in range(5):
        game_step(parts, separate.gradients)
    equal(problem.values(), separate.values())


@every
def test_a_group_that_joins_late_starts_afresh(case: OptimizerCase) -> None:
    problem, separate = Quadratic(), Quadratic()
    first, *rest = problem.params
    optimizer = case.make([first])
    follow(optimizer, problem.gradients, 3)
    optimizer.add_param_group({"params": rest, **case.group})
    follow(optimizer, problem.gradients, 3)
    parts = [case.make(separate.params[:1])]
    follow(parts[0], separate.gradients, 3)
    parts.append(case.make(separate.params[1:], **case.group))
    for _ in range(3):
        game_step(parts, separate.gradients)
    equal(problem.values(), separate.values())


@named_parameters
@every
def test_named_parameters(case: OptimizerCase) -> None:
    module = nn.Linear(2, 1)
    optimizer = case.make(module.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


@every
def test_parameters_without_a_gradient_are_left_alone(case: OptimizerCase) -> None:
    problem, fewer = Quadratic(), Quadratic()
    frozen = problem.params[1]

    def all_but_one() -> None:
        problem.gradients()
        frozen.grad = None

    before = frozen.detach().clone()
    optimizer = case.make(problem.params)
    follow(optimizer, all_but_one, 3)
    follow(case.make([fewer.params[0], fewer.params[2]]), fewer.gradients, 3)
    equal([frozen.detach()], [before])
    assert frozen not in optimizer.state
    equal(problem.values(), fewer.values())
    # and when it gets one again (requires_grad is switched back on), it starts afresh
    follow(optimizer, problem.gradients, 3)
    alone = Quadratic()
    follow(case.make(alone.params[1:2]), alone.gradients, 3)
    equal([frozen.detach()], [alone.params[1].detach()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every
def test_dtypes(case: OptimizerCase, dtype: torch.dtype) -> None:
    problem, exact = Quadratic(dtype=dtype), Quadratic()
    options = {"eps": 1e-3} if "Adam" in case.name else {}  # 1e-8 is 0 in float16, as it is for torch
    follow(case.make(problem.params, **options), problem.gradients, 5)
    follow(case.make(exact.params, **options), exact.gradients, 5)
    assert all(p.dtype == dtype for p in problem.params)
    # five steps, each of up to ten roundings of numbers of size about 1
    close([p.double() for p in problem.values()], exact.values(), 50 * torch.finfo(dtype).eps)


@every
def test_layouts_and_sizes(case: OptimizerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "TILE", 5)  # so that these tensors are cut, unevenly
    monkeypatch.setattr(walk, "SMALL", 3)
    shapes = ((3, 4), (2, 3, 2, 2), (0,), (), (11,))
    problem, plain = Quadratic(shapes=shapes), Quadratic(shapes=shapes)
    with torch.no_grad():
        problem.params[0] = problem.params[0].T.contiguous().T.requires_grad_()
        problem.params[1] = problem.params[1].to(memory_format=torch.channels_last).requires_grad_()
    assert not problem.params[0].is_contiguous()
    assert not problem.params[1].is_contiguous()
    optimizer = case.make(problem.params, weight_decay=0.1, maximize=True)
    follow(optimizer, problem.gradients, 3)
    monkeypatch.undo()
    follow(case.make(plain.params, weight_decay=0.1, maximize=True), plain.gradients, 3)
    close(problem.values(), plain.values())


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}])
@every
def test_the_way_of_accelerators_gives_the_same(
    case: OptimizerCase, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "SMALL", 0)
    here = run(case, **options)
    monkeypatch.setattr(walk, "on_cpu", lambda tensors: False)
    close(run(case, **options), here)


@every
def test_step_hooks_and_the_profiler_see_a_step(case: OptimizerCase) -> None:
    problem, calls = Quadratic(), []
    optimizer = case.make(problem.params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        follow(optimizer, problem.gradients, 1)
    assert calls == ["before", "after"]
    assert any(e.key == f"Optimizer.step#{case.kind.__name__}.step" for e in record.key_averages())


# --- closures


@pytest.mark.parametrize("to_none", [True, False])
@every
def test_a_closure_may_clear_in_either_way(case: OptimizerCase, to_none: bool) -> None:
    problem, other = Quadratic(), Quadratic()
    optimizer = case.make(problem.params)

    def closure() -> float:
        optimizer.zero_grad(set_to_none=to_none)
        loss = problem.loss()
        loss.backward()
        return loss.item()

    for _ in range(3):
        optimizer.step(closure)
    follow(case.make(other.params), other.gradients, 3)
    close(problem.values(), other.values())


@every
def test_a_closure_may_leave_clearing_to_its_caller(case: OptimizerCase) -> None:
    problem, other = Quadratic(), Quadratic()
    optimizer = case.make(problem.params)

    def closure() -> Tensor:
        loss = problem.loss()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step(closure)
    follow(case.make(other.params), other.gradients, 3)
    close(problem.values(), other.values())


class Line(LightningModule):
    """Least squares in float64."""

    def __init__(self, case: OptimizerCase) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map, self.case = nn.Linear(3, 1).double(), case

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        # some modules differentiate before the Trainer clears the gradients
        penalty = torch.autograd.grad(self.map(x).square().mean(), self.map.weight, create_graph=True)[0]
        return (self.map(x) - x.sum(1, keepdim=True)).square().mean() + 1e-3 * penalty.sum()

    def configure_optimizers(self) -> Any:
        return self.case.make(self.map.parameters())


@every
def test_accumulation_in_the_trainer_is_right_or_refused(case: OptimizerCase) -> None:
    x = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def fitted(size: int, *callbacks: Callback, **options: Any) -> list[Tensor]:
        module = Line(case)
        before = [p.detach().clone() for p in module.parameters()]
        try:
            fit = trainer(*callbacks, max_epochs=2, **options)
            fit.fit(module, DataLoader(TensorDataset(x), batch_size=size))
        except RuntimeError:
            equal([p.detach() for p in module.parameters()], before)
            raise
        return [p.detach() for p in module.parameters()]

    whole = fitted(32)
    if case.kind.num_gradients == 1:
        close(fitted(16, accumulate_grad_batches=2), whole)
        return
    message = (
        r"must clear the gradients before its backward pass\. Got one that adds .*accumulate_grad_batches=1"
    )
    with pytest.raises(RuntimeError, match=message):
        fitted(16, accumulate_grad_batches=2)
    with pytest.raises(RuntimeError, match=message):
        fitted(16, GradientAccumulationScheduler({0: 2}))
