"""What every optimizer owes to torch.optim: what it refuses, before anything has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nested.optim import Extragradient, GameOptimizer
from tests.capabilities import named_parameters
from tests.optim.cases import BAD, OptimizerCase, Quadratic, equal, every


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


@pytest.mark.parametrize("option", ["amsgrad", "capturable", "differentiable", "nesterov"])
@every
def test_options_of_torch_that_would_change_a_step(case: OptimizerCase, option: str) -> None:
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        case.make([p], **{option: True})
    optimizer = case.make([{"params": [p], option: False, "foreach": True, "fused": None}])
    with pytest.raises(ValueError, match=rf"has no option {option}\. Got {option}=True; leave it out"):
        optimizer.add_param_group({"params": [q], option: True})
    assert len(optimizer.param_groups) == 1


@named_parameters
@every
def test_groups_with_and_without_names_and_parameters_twice(case: OptimizerCase) -> None:
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = case.make([("p", p)])
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [q]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [("p", p)]})
    assert len(optimizer.param_groups) == 1
