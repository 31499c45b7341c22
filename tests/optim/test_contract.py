"""What every optimizer owes to torch.optim: one suite over all of them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_nested.optim import Extragradient, GameOptimizer
from lightning_nested.optim.kernels import walk
from tests.optim.cases import BAD, CASES, OptimizerCase, Quadratic, follow, game_step

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def close(left: Sequence[Tensor], right: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def run(case: OptimizerCase, steps: int = 5, **options: Any) -> list[Tensor]:
    problem = Quadratic()
    follow(case.make(problem.params, **options), problem.gradients, steps)
    return problem.values()


# --- what it does


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


# --- what it keeps


@every
def test_a_saved_state_continues_bit_for_bit(case: OptimizerCase) -> None:
    problem, resumed = Quadratic(), Quadratic()
    optimizer = case.make([{"params": problem.params[:1]}, {"params": problem.params[1:], **case.group}])
    follow(optimizer, problem.gradients, 4)
    file = io.BytesIO()
    torch.save({"params": problem.values(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        for p, value in zip(resumed.params, saved["params"], strict=True):
            p.copy_(value)
    other = case.make([{"params": resumed.params[:1], "lr": 9.0}, {"params": resumed.params[1:]}])
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    follow(optimizer, problem.gradients, 4)
    follow(other, resumed.gradients, 4)
    equal(problem.values(), resumed.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@every
def test_a_state_of_another_dtype_is_converted(case: OptimizerCase, dtype: torch.dtype) -> None:
    exact, other = Quadratic(), Quadratic(dtype=dtype)
    options = {"eps": 1e-3} if "Adam" in case.name else {}
    optimizer, resumed = case.make(exact.params, **options), case.make(other.params)
    follow(optimizer, exact.gradients, 4)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, value in zip(other.params, exact.params, strict=True):
            p.copy_(value)
    for p in other.params:
        kept = resumed.state.get(p, {}).items()
        assert all(a.dtype is dtype for name, a in kept if name != "step")
    follow(optimizer, exact.gradients, 4)
    follow(resumed, other.gradients, 4)
    close([p.double() for p in other.values()], exact.values(), 50 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@every
def test_copies_and_pickles_continue_alone(case: OptimizerCase, copy_of: Any) -> None:
    problem = Quadratic()
    optimizer = case.make(problem.params)
    follow(optimizer, problem.gradients, 3)
    params, other = copy_of((problem.params, optimizer))
    twin = Quadratic()
    twin.params = params
    assert other.param_groups[0]["params"][0] is params[0]
    follow(optimizer, problem.gradients, 3)
    follow(other, twin.gradients, 3)
    equal(problem.values(), twin.values())


@every
def test_states_of_older_versions_get_the_options_they_lack(case: OptimizerCase) -> None:
    problem = Quadratic()
    optimizer = case.make(problem.params)
    state = optimizer.__getstate__()
    state = {
        **state,
        "param_groups": [{k: v for k, v in g.items() if k != "maximize"} for g in state["param_groups"]],
    }
    older = case.kind.__new__(case.kind)
    older.__setstate__(state)
    assert older.param_groups[0]["maximize"] is False
    follow(older, problem.gradients, 1)
    assert case.name in repr(older) or case.kind.__name__ in repr(older)


@every
def test_schedulers_change_the_rate(case: OptimizerCase) -> None:
    problem, by_hand = Quadratic(), Quadratic()
    optimizer = case.make(problem.params)
    schedulers = [
        lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
        lr_scheduler.LinearLR(optimizer, total_iters=4),
    ]
    manual = case.make(by_hand.params)
    start = manual.param_groups[0]["lr"]
    for k in range(6):
        manual.param_groups[0]["lr"] = start * 0.5 ** (k // 2) * (1 / 3 + 2 / 3 * min(k, 4) / 4)
        game_step([manual], by_hand.gradients)
        game_step([optimizer], problem.gradients)
        for scheduler in schedulers:
            scheduler.step()
    close(problem.values(), by_hand.values())


# --- kinds of tensors


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


# --- what it refuses


@pytest.mark.parametrize(("case", "options", "message"), BAD, ids=lambda x: getattr(x, "name", str(x)))
def test_bad_options(case: OptimizerCase, options: Mapping[str, Any], message: str) -> None:
    problem = Quadratic()
    with pytest.raises(ValueError, match=message):
        case.make(problem.params, **options)
    optimizer = case.make(problem.params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": problem.params[1:], **options})
    assert len(optimizer.param_groups) == 1
    problem.gradients()
    if isinstance(optimizer, Extragradient):
        optimizer.extrapolate()
    before = problem.values()
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    equal(problem.values(), before)


@every
def test_integers_and_tensors_are_converted(case: OptimizerCase) -> None:
    problem = Quadratic()
    options: dict[str, Any] = {"betas": [0, 0.999]} if "Adam" in case.name else {"lr": torch.tensor(1)}
    group = case.make(problem.params, weight_decay=0, **options).param_groups[0]
    assert isinstance(group["lr"], float)
    assert isinstance(group["weight_decay"], float)
    if "betas" in group:
        assert group["betas"] == (0.0, 0.999)
        assert all(isinstance(b, float) for b in group["betas"])


@every
def test_sparse_gradients_are_refused_before_anything_moves(case: OptimizerCase) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    dense = torch.ones(2, requires_grad=True)
    optimizer = case.make([dense, *table.parameters()])
    (table(torch.tensor([1])).sum() + dense.sum()).backward()
    with pytest.raises(RuntimeError, match=r"needs dense gradients\. Got one of layout torch\.sparse_coo"):
        optimizer.extrapolate() if isinstance(optimizer, Extragradient) else optimizer.step()
    equal([dense.detach()], [torch.ones(2)])


@every
def test_complex_parameters_are_refused(case: OptimizerCase) -> None:
    p = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    for params in ([p], [("p", p)], p, [{"params": p}]):
        with pytest.raises(ValueError, match=r"needs real parameters\. Got one of torch\.complex64"):
            case.make(params if isinstance(params, list) else [{"params": params}])


@every
def test_what_torch_refuses(case: OptimizerCase) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        case.make([])
    with pytest.raises(TypeError):
        case.make(torch.ones(2))
    with pytest.raises(TypeError, match="ordered collections"):
        case.make([{"params": {torch.ones(2, requires_grad=True)}}])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        case.make(["weights"])
    optimizer = case.make([torch.ones(2, requires_grad=True)])
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([torch.ones(2)])  # type: ignore[arg-type]


def test_the_base_makes_no_optimizer() -> None:
    with pytest.raises(TypeError, match="abstract"):
        GameOptimizer([torch.ones(1)], {})  # type: ignore[abstract]
