"""OuterStep: what it computes, that it moves nothing before `apply`, and what it saves."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_nested.hypergradient import ConjugateGradient, Neumann
from lightning_nested.hyperparameters import ExampleWeights, ModuleTensors, OuterStep, WeightDecay
from lightning_nested.hyperparameters.outer_optimizer import default_outer_optimizer
from tests.cases import DOUBLE, ridge_data, ridge_solution

LOG_DECAY = torch.tensor(-2.0, dtype=DOUBLE)
SLOPE, VALUE = 0.4007387704, 3.8537734400  # of the log-decay reference at r = −2, ten digits


def ridge() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Parameters at the inner optimum, the inner loss without decay, and the outer loss."""
    xt, yt, xv, yv = ridge_data()
    w = ridge_solution(LOG_DECAY).clone().requires_grad_(True)
    return {"w": w}, 0.5 * ((xt @ w - yt) ** 2).mean(), 0.5 * ((xv @ w - yv) ** 2).mean()


def step(**options: Any) -> OuterStep:
    decay = WeightDecay("model", init=math.exp(-2.0))
    defaults = {
        "solver": ConjugateGradient(tolerance=1e-13),
        "optimizer": lambda t: torch.optim.SGD(t, lr=0.5),
    }
    return OuterStep([decay], **{**defaults, **options})


def test_compute_finds_the_closed_form_and_apply_moves_along_it() -> None:
    outer = step()
    parameters, inner, loss = ridge()
    outer.build(parameters, "cpu")
    report = outer.compute(inner, loss, parameters, compare_identity=True)
    assert report.outer_loss == pytest.approx(VALUE, rel=1e-9)
    assert report.hypergradient_norm == pytest.approx(SLOPE, rel=1e-8)
    assert report.inner_gradient_norm < 1e-12  # at the optimum, penalty included
    assert report.residual < 1e-12
    assert not report.negative_curvature
    assert abs(report.identity_cosine) == pytest.approx(1.0, rel=1e-12)  # of one number
    assert outer.pending
    raw = outer.tensors[0].data
    assert float(raw) == pytest.approx(-2.0, abs=1e-15)  # nothing has moved yet
    outer.apply()
    assert not outer.pending
    assert float(raw) == pytest.approx(-2.0 - 0.5 * SLOPE, rel=1e-9)
    assert outer.tensors[0].grad is None
    outer.apply()  # nothing is held: nothing moves
    assert float(raw) == pytest.approx(-2.0 - 0.5 * SLOPE, rel=1e-9)


def test_the_loss_scale_cancels() -> None:
    sizes = []
    for scale in (1.0, 2.0**16):
        outer = step()
        parameters, inner, loss = ridge()
        outer.build(parameters, "cpu")
        sizes.append(outer.compute(inner * scale, loss, parameters, inner_scale=scale).hypergradient_norm)
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-12)


def test_a_given_curvature_carries_no_loss_scale() -> None:
    sizes = []
    for scale in (1.0, 2.0**16):
        parameters, inner, loss = ridge()
        xt = ridge_data()[0]
        outer = step(curvature=xt.T @ xt / len(xt))  # the Hessian of the loss without scale and decay
        outer.build(parameters, "cpu")
        sizes.append(outer.compute(inner * scale, loss, parameters, inner_scale=scale).hypergradient_norm)
    assert sizes == pytest.approx([SLOPE, SLOPE], rel=1e-8)


def test_a_fixed_decay_is_part_of_the_curvature() -> None:
    # Two decays of half the size, one tuned and one of the optimizer's own: the same optimum and half the slope.
    half = WeightDecay("model", init=math.exp(-2.0) / 2)
    outer = OuterStep([half], solver=ConjugateGradient(tolerance=1e-13))
    parameters, inner, loss = ridge()
    outer.build(parameters, "cpu")
    report = outer.compute(inner, loss, parameters, fixed_decay=[math.exp(-2.0) / 2])
    assert report.inner_gradient_norm < 1e-12
    assert report.hypergradient_norm == pytest.approx(SLOPE / 2, rel=1e-8)


def test_a_number_for_logs_is_no_message_unless_asked_for() -> None:
    """The norm of the inner gradient takes one message as long as the parameters."""
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for measured, sent in sizes.items():
        outer = step()
        parameters, inner, loss = ridge()
        outer.build(parameters, "cpu")

        def reduce(tensor: Tensor, sent: list[int] = sent) -> Tensor:
            sent.append(tensor.numel())
            return tensor

        report = outer.compute(inner, loss, parameters, reduce=reduce, measure_gradient=measured)
        assert math.isnan(report.inner_gradient_norm) is not measured
    long = parameters["w"].numel()
    assert sizes[True].count(long) == sizes[False].count(long) + 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_outer_loss_changes_nothing(bad: float) -> None:
    outer = step()
    parameters, inner, loss = ridge()
    outer.build(parameters, "cpu")
    with pytest.raises(FloatingPointError, match="outer loss must be finite"):
        outer.compute(inner, loss * bad, parameters)
    assert not outer.pending
    assert float(outer.tensors[0].data) == pytest.approx(-2.0, abs=1e-15)


def test_the_state_continues_bit_for_bit_and_loads_weights_only() -> None:
    def options() -> dict[str, Any]:
        return {
            "optimizer": lambda t: torch.optim.Adam(t, lr=0.1),
            "scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
            "solver": Neumann(num_terms=7, warm_start=True),
        }

    def advance(outer: OuterStep, times: int) -> None:
        for _ in range(times):
            parameters, inner, loss = ridge()
            outer.compute(inner, loss, parameters)
            outer.apply()

    whole, first, second = (step(**options()) for _ in range(3))
    parameters = ridge()[0]
    for outer in (whole, first, second):
        outer.build(parameters, "cpu")
    advance(whole, 4)
    advance(first, 2)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second.load_state_dict(torch.load(saved, weights_only=True), parameters)
    advance(second, 2)
    assert torch.equal(whole.tensors[0], second.tensors[0])
    assert not torch.equal(whole.tensors[0], first.tensors[0])
    with pytest.raises(ValueError, match="written with others"):
        OuterStep([ExampleWeights(3)]).load_state_dict(whole.state_dict(), parameters)


def test_bad_sets_of_hyperparameters() -> None:
    with pytest.raises(ValueError, match=r"at least one\. Got none"):
        OuterStep([])
    with pytest.raises(ValueError, match="different names"):
        OuterStep([WeightDecay(), WeightDecay()])
    assert set(OuterStep([WeightDecay(), WeightDecay(name="second")]).values()) == set()


def test_values_are_named_after_their_hyperparameter() -> None:
    outer = OuterStep([WeightDecay("model"), ExampleWeights(3)])
    outer.build({"w": torch.zeros(2)}, "cpu")
    assert list(outer.values()) == ["weight_decay", "example_weights"]
    assert outer.values()["example_weights"].shape == (3,)


def named(*names: str, size: int = 2) -> dict[str, Tensor]:
    return {name: torch.ones(size, dtype=DOUBLE, requires_grad=True) for name in names}


def moved(per: Any, *names: str) -> OuterStep:
    """After three outer steps in which the decay of each parameter saw another gradient."""
    outer = OuterStep(
        [ExampleWeights(3), WeightDecay(per, init=0.1)],
        optimizer=lambda t: torch.optim.Adam(t, lr=0.1),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        solver=Neumann(num_terms=2, warm_start=True),
    )
    outer.build(named(*names), "cpu")
    for _ in range(3):
        parameters = named(*names)
        inner = torch.stack([(p**2).sum() for p in parameters.values()]).sum()
        loss = torch.stack([i * p.sum() for i, p in enumerate(parameters.values(), 1)]).sum()
        outer.compute(inner, loss, parameters)
        outer.apply()
    return outer


@pytest.mark.parametrize("per", ["model", "tensor", "parameter"])
def test_the_same_parameters_again_change_nothing(per: Any) -> None:
    outer = moved(per, "a", "b")
    before = (outer.tensors, outer.optimizer, outer.scheduler, outer.solver_state)
    outer.build(named("a", "b"), "cpu")
    after = (outer.tensors, outer.optimizer, outer.scheduler, outer.solver_state)
    assert all(x is y for x, y in zip(before[0], after[0], strict=True))
    assert all(x is y for x, y in zip(before[1:], after[1:], strict=True))


@pytest.mark.parametrize("per", ["model", "tensor", "parameter"])
@pytest.mark.parametrize("now", [("new", "a", "b"), ("b",), ("b", "a"), ("b", "new")])
def test_parameters_that_stay_keep_decay_and_momentum(per: Any, now: tuple[str, ...]) -> None:
    outer = moved(per, "a", "b")
    decays, weights = outer.decays[0].decays(), outer.hyperparameters[0].values()["weights"]
    momenta = momentum_by_name(outer)
    outer.build(named(*now), "cpu")
    assert torch.equal(outer.hyperparameters[0].values()["weights"], weights)
    for name, decay in outer.decays[0].decays().items():
        fresh = torch.full_like(decay, 0.1)
        expected = decays[name] if name in decays else decays["a"] if per == "model" else fresh
        torch.testing.assert_close(decay, expected, rtol=1e-14, atol=0)
        kept = momentum_by_name(outer)[name]
        if name in decays:
            assert torch.equal(kept, momenta[name])
            assert kept.all()
        elif per != "model":
            assert not kept.any()
    assert outer.scheduler is not None
    assert outer.scheduler.get_last_lr() == [0.1 * 0.5**3]
    assert outer.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3
    assert outer.solver_state.solution is None  # of another space
    parameters = named(*now)
    loss = torch.stack([p.sum() for p in parameters.values()]).sum()
    outer.compute((loss - 3) ** 2, loss, parameters)
    outer.apply()
    assert not torch.equal(next(iter(outer.decays[0].decays().values())), next(iter(decays.values())))


def momentum_by_name(outer: OuterStep) -> dict[str, Tensor]:
    (decay,) = outer.decays
    found = {
        key: outer.optimizer.state[t]["exp_avg"] if t in outer.optimizer.state else torch.zeros_like(t)
        for key, t in decay.tensors.items()
    }
    if decay.per == "parameter":
        return found
    each = (
        found[decay.per].unbind() if decay.per == "tensor" else [found["model"]] * len(decay.parameter_names)
    )
    return dict(zip(decay.parameter_names, each, strict=True))


@pytest.mark.parametrize("others", [named("c"), named("a", "b", size=3)])
def test_parameters_of_another_model_begin_anew(others: dict[str, Tensor]) -> None:
    outer = moved("tensor", "a", "b")
    outer.build(others, "cpu")
    torch.testing.assert_close(
        torch.stack(list(outer.decays[0].values().values())),
        torch.full((len(others),), 0.1, dtype=DOUBLE),
        rtol=1e-14,
        atol=0,
    )
    assert not outer.optimizer.state
    assert outer.optimizer.param_groups[0]["lr"] == 0.1
    assert outer.solver_state.eigenvalue is None


def test_reset_forgets_and_discard_drops_the_held_step() -> None:
    outer = step()
    parameters, inner, loss = ridge()
    outer.build(parameters, "cpu")
    outer.compute(inner, loss, parameters)
    outer.discard()
    assert not outer.pending
    outer.apply()
    assert float(outer.tensors[0].data) == pytest.approx(-2.0, abs=1e-15)
    with torch.no_grad():
        outer.tensors[0].fill_(3.0)
    outer.reset()
    assert outer.values() == {}
    outer.build(parameters, "cpu")
    assert float(outer.tensors[0].data) == pytest.approx(-2.0, abs=1e-15)


def test_a_pattern_may_match_nothing_once_its_layer_is_frozen() -> None:
    outer = OuterStep([WeightDecay(exclude=["b.*"])])
    outer.build(named("a.w", "b.w"), "cpu")
    outer.build(named("a.w"), "cpu")
    assert list(outer.values()) == ["weight_decay"]


def halved(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda outer: pickle.loads(pickle.dumps(outer))])
def test_a_copy_goes_on_by_itself(twin_of: Any) -> None:
    def advance(outer: OuterStep) -> Tensor:
        parameters, inner, loss = ridge()
        outer.compute(inner, loss, parameters)
        outer.apply()
        return outer.tensors[0].detach().clone()

    outer = step(optimizer=default_outer_optimizer, scheduler=halved)
    fresh = twin_of(outer)
    assert fresh.values() == {}
    outer.build(ridge()[0], "cpu")
    start = advance(outer)
    twin = twin_of(outer)
    assert torch.equal(twin.tensors[0].detach(), start)
    moved_to = advance(twin)  # with the momentum and the rate of the original, whose own value stays
    assert not torch.equal(moved_to, start)
    assert torch.equal(outer.tensors[0].detach(), start)
    assert torch.equal(advance(outer), moved_to)


def test_tensors_of_a_module_are_copied_with_it() -> None:
    module = torch.nn.ModuleDict({"augmenter": torch.nn.Linear(2, 1)})
    given = ModuleTensors("augmenter")
    given.attach(module)
    outer = OuterStep([given])
    outer.build({"w": torch.zeros(2)}, "cpu")
    for twin, twin_module in (
        copy.deepcopy((outer, module)),
        pickle.loads(pickle.dumps((outer, module))),
    ):
        assert all(t is p for t, p in zip(twin.tensors, twin_module.parameters(), strict=True))
        assert all(
            t is p for t, p in zip(twin.optimizer.param_groups[0]["params"], twin.tensors, strict=True)
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OuterStep([3]), "must be Hyperparameter objects.*Got int 3"),  # type: ignore[list-item]
        (lambda: OuterStep([WeightDecay]), r"class WeightDecay; write WeightDecay\("),  # type: ignore[list-item]
        (lambda: OuterStep(WeightDecay), r"must be a list.*write WeightDecay\("),  # type: ignore[arg-type]
        (lambda: OuterStep("augmenter"), "must be a list.*'augmenter'"),  # type: ignore[arg-type]
        (lambda: step(solver="cg"), r"solver must be an object such as Neumann\(\).*'cg'"),
        (lambda: step(solver=Neumann), "the class Neumann"),
        (lambda: step(curvature=Neumann()), "curvature must be"),
        (lambda: step(optimizer=0.1), "must be functions.*Got float 0.1"),
        (lambda: step(scheduler=0.1), "must be functions.*Got float 0.1"),
        (lambda: step(optimizer=list).build(ridge()[0], "cpu"), "returns list"),
    ],
)
def test_arguments_of_the_wrong_kind(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_optimizers_and_schedulers_that_need_more_than_a_gradient() -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    for options, message in (
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
        ({"scheduler": plateau}, "Plateau"),
    ):
        with pytest.raises(ValueError, match=message):
            step(**options).build(ridge()[0], "cpu")


def test_an_outer_loss_must_be_a_scalar() -> None:
    outer = step()
    parameters, inner, _ = ridge()
    outer.build(parameters, "cpu")
    with pytest.raises(ValueError, match=r"scalar. Got shape \(2,\)"):
        outer.compute(inner, torch.ones(2), parameters)
    with pytest.raises(ValueError, match=r"scalar. Got shape \(2,\)"):
        outer.compute_unrolled(torch.ones(2))


def test_a_checkpointed_submodule_in_unrolled_steps_is_named() -> None:
    outer = step()
    outer.build(ridge()[0], "cpu")
    w = torch.ones(2, dtype=DOUBLE)
    loss = (checkpoint(lambda x: (x * w * w.clone()).sin(), outer.tensors[0], use_reentrant=False)).sum()
    held = outer.tensors[0].sin() * w.requires_grad_(False) + loss
    w.add_(1.0)
    with pytest.raises(RuntimeError, match=r"checkpointed submodule.*or use Implicit\(\)"):
        outer.compute_unrolled(held.sum())
