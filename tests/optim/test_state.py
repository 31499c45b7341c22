"""What every optimizer owes to torch.optim: what it keeps, and what other tools of torch do with it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler, swa_utils

from lightning_nested.optim import ComplexAdam, GameOptimizer
from tests.capabilities import named_parameters
from tests.optim.cases import OptimizerCase, Quadratic, close, equal, every, follow, game_step


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


class Net(nn.Module):
    """A small network in float64, with a fixed batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.x = torch.randn(8, 3, dtype=torch.float64)

    def gradients(self) -> None:
        self.zero_grad()
        self.layers(self.x).square().mean().backward()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters()]


@pytest.mark.parametrize("flatten", [False, True])
@every
def test_distributed_checkpoint_saves_and_loads(case: OptimizerCase, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    trained, fresh = Net(), Net()
    optimizer, other = case.make(trained.parameters()), case.make(fresh.parameters(), lr=9.0)
    before = fresh.values()
    get_optimizer_state_dict(fresh, other, options=options)  # it makes a step of zero gradients
    equal(fresh.values(), before)
    assert [group["lr"] for group in other.param_groups] == [9.0]
    follow(optimizer, trained.gradients, 3)
    saved = get_optimizer_state_dict(trained, optimizer, options=options)
    fresh.load_state_dict(trained.state_dict())
    set_optimizer_state_dict(fresh, other, copy.deepcopy(saved), options=options)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    follow(optimizer, trained.gradients, 3)
    follow(other, fresh.gradients, 3)
    equal(fresh.values(), trained.values())


@every
def test_a_step_without_gradients_changes_nothing(case: OptimizerCase) -> None:
    problem = Quadratic()
    before = problem.values()
    assert case.make(problem.params).step() is None
    equal(problem.values(), before)


@every
def test_hooks_of_state_dicts(case: OptimizerCase) -> None:
    problem, seen = Quadratic(), []
    optimizer, other = case.make(problem.params), case.make(problem.params, lr=9.0)
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": "saved"})
    other.register_load_state_dict_pre_hook(lambda o, state: seen.append(state["note"]))

    def replace(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 7.0} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    other.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "saved", 7.0]


def test_a_hook_may_bring_the_state_of_adam() -> None:
    problem, adams = Quadratic(), Quadratic()
    adam = torch.optim.Adam(adams.params, lr=0.01, betas=(0.8, 0.99))
    for _ in range(3):
        adams.gradients()
        adam.step()
    with torch.no_grad():
        for p, q in zip(problem.params, adams.params, strict=True):
            p.copy_(q)
    optimizer = ComplexAdam(problem.params, phase=0.0, debias=True)
    optimizer.register_load_state_dict_pre_hook(lambda o, state: copy.deepcopy(adam.state_dict()))
    optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert all("exp_avg" not in optimizer.state[p] for p in problem.params)
    follow(optimizer, problem.gradients, 1)
    adams.gradients()
    adam.step()
    close(problem.values(), adams.values())


@named_parameters
@every
def test_names_of_parameters_are_saved(case: OptimizerCase) -> None:
    net = Net()
    optimizer = case.make(net.named_parameters())
    names = [name for name, _ in net.named_parameters()]
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == names
    other = case.make(Net().named_parameters())
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == names


SCHEDULERS: dict[str, Any] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=cycles(o)),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=cycles(o)),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "swa": lambda o: swa_utils.SWALR(o, swa_lr=0.02, anneal_epochs=3),
}


def cycles(optimizer: GameOptimizer) -> bool:
    """Return True for those with a momentum, which these schedulers move against the rate."""
    return bool({"momentum", "betas"} & optimizer.defaults.keys())


@pytest.mark.parametrize("name", SCHEDULERS)
@every
# torch 2.5 warns of its own SequentialLR.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_every_scheduler_sets_the_same_rates_as_for_adam(case: OptimizerCase, name: str) -> None:
    problem, adams = Quadratic(), Quadratic()
    optimizer, adam = case.make(problem.params), torch.optim.Adam(adams.params, lr=case.options["lr"])
    ours, theirs = SCHEDULERS[name](optimizer), SCHEDULERS[name](adam)
    for _ in range(6):
        game_step([optimizer], problem.gradients)
        adams.gradients()
        adam.step()
        ours.step()
        theirs.step()
        assert optimizer.param_groups[0]["lr"] == adam.param_groups[0]["lr"]
        if cycles(optimizer) and name in ("one cycle", "cyclic"):
            group = optimizer.param_groups[0]
            momentum = group["betas"][0] if "betas" in group else group["momentum"]
            assert momentum == adam.param_groups[0]["betas"][0]
    assert all(p.isfinite().all() for p in problem.params)


@every
def test_a_plateau_scheduler(case: OptimizerCase) -> None:
    problem = Quadratic()
    optimizer = case.make(problem.params)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(case.options["lr"] / 4)


@every
def test_averaged_weights(case: OptimizerCase) -> None:
    net = Net()
    optimizer, average = case.make(net.parameters()), swa_utils.AveragedModel(net)
    points: list[list[Tensor]] = []
    for _ in range(3):
        game_step([optimizer], net.gradients)
        average.update_parameters(net)
        points.append(net.values())
    expected = [torch.stack(column).mean(0) for column in zip(*points, strict=True)]
    close([p.detach() for p in average.parameters()], expected)
