"""Everything that the registry says of an optimizer, against the optimizer's real steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nested.hypergradient.fast_weights import FastWeights
from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    Extragradient,
    ExtrapolationFromThePast,
    NuPI,
    OptimisticAdam,
    OptimisticSGD,
)
from lightning_nested.optim.registry import KNOWN, find_rule, known_rule
from lightning_nested.optim.step_dynamics import coupled_decay, step_dynamics
from lightning_nested.optim.update_rules import Momentum
from tests.cases import DOUBLE

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

WITH_RULE: tuple[tuple[type[Optimizer], dict[str, Any]], ...] = (
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (Adam, {"lr": 0.1}),
    (Adam, {"lr": 0.1, "amsgrad": True, "betas": (0.5, 0.6)}),
    (Adam, {"lr": 0.1, "betas": (0.0, 0.9)}),
    (AdamW, {"lr": 0.1, "betas": (0.7, 0.95)}),
    (AdamW, {"lr": 0.1, "amsgrad": True, "betas": (0.5, 0.6)}),
    (ComplexSGD, {"lr": 0.1}),
    (ComplexSGD, {"lr": 0.1, "phase": 0.0}),
    (ComplexSGD, {"lr": 0.1, "momentum": 0.6, "phase": -2.0}),
    (ComplexAdam, {"lr": 0.1}),
    (ComplexAdam, {"lr": 0.1, "debias": True}),
    (ComplexAdam, {"lr": 0.1, "debias": True, "phase": 0.0}),
    (Extragradient, {"lr": 0.1}),
    (ExtrapolationFromThePast, {"lr": 0.1}),
    (NuPI, {"lr": 0.1}),
    (NuPI, {"lr": 0.1, "proportional": 3.0, "nu": 0.4}),
    (OptimisticSGD, {"lr": 0.1}),
    (OptimisticAdam, {"lr": 0.1}),
    (OptimisticAdam, {"lr": 0.1, "betas": (0.0, 0.9)}),
)
with_rule = pytest.mark.parametrize(("kind", "options"), WITH_RULE)


def weights(seed: int = 0, size: int = 5) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)))


def gradient(w: Tensor, t: int) -> Tensor:
    """One that depends on w, so that errors would be carried on; never near 0."""
    return (w + 0.3 * t).sin() + 1.5 * (-1) ** t


def real_step(optimizer: Optimizer, w: nn.Parameter, g: Tensor, second: Callable[[], Tensor]) -> None:
    """One whole step with gradient g, and ``second()`` at the extrapolated point where one is asked for."""
    w.grad = g.detach().clone()
    if isinstance(optimizer, Extragradient):
        optimizer.extrapolate()
        w.grad = second().detach().clone()
    optimizer.step()


def after_steps(optimizer: Optimizer, w: nn.Parameter, steps: int) -> None:
    for t in range(steps):
        real_step(optimizer, w, gradient(w.detach(), t), lambda t=t: gradient(w.detach(), t))  # type: ignore[misc]


def test_every_known_rule_is_tested() -> None:
    assert {kind for kind, _ in WITH_RULE} == {k for k, known in KNOWN.items() if known.rule is not None}


def test_every_optimizer_of_torch_is_entered() -> None:
    here = {k for k in vars(torch.optim).values() if isinstance(k, type) and issubclass(k, Optimizer)}
    assert here - {Optimizer} <= set(KNOWN)


# ---- the rule, and the unrolled steps that are made with it


@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.2}, {"weight_decay": 0.2, "maximize": True}])
@with_rule
def test_the_rule_is_the_real_step(
    kind: type[Optimizer], options: dict[str, Any], more: dict[str, Any]
) -> None:
    w = weights()
    optimizer: Any = kind([w], **options, **more)  # type: ignore[call-arg]
    rule = find_rule(optimizer, optimizer.param_groups[0])
    assert rule is not None
    assert rule.num_gradients == getattr(optimizer, "num_gradients", 1)
    value, (slots, taken) = w.detach().clone(), rule.resume(w.detach(), {})
    assert taken == 0
    for t in range(5):
        count = torch.tensor(t + 1, dtype=DOUBLE)
        if rule.num_gradients == 2:  # the second gradient with its decay, from where the first was taken
            ahead, _ = rule.step(value, rule.ascent(value, gradient(value, t)), (), count)
            value, slots = rule.step(value, rule.ascent(ahead, gradient(ahead, t)), (), count)
        else:
            value, slots = rule.step(value, gradient(value, t), slots, count)
        real_step(optimizer, w, gradient(w.detach(), t), lambda t=t: gradient(w.detach(), t))
        torch.testing.assert_close(value, w.detach(), rtol=1e-12, atol=1e-13)
        resumed, taken = rule.resume(w.detach(), optimizer.state.get(w, {}))
        assert taken == (0 if not slots else t + 1 if "step" in optimizer.state[w] else 1)
        for ours, torchs in zip(slots, resumed, strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.2}, {"weight_decay": 0.2, "maximize": True}])
@with_rule
def test_fast_weights_make_the_real_steps(
    kind: type[Optimizer], options: dict[str, Any], more: dict[str, Any]
) -> None:
    """From a state in the middle of a run; and their graph holds the derivative by the learning rate."""
    w = weights()
    optimizer: Any = kind([w], **options, **more)  # type: ignore[call-arg]
    after_steps(optimizer, w, 3)
    if kind is Extragradient:
        with pytest.raises(
            TypeError, match=r"SGD, Adam, AdamW, ComplexSGD.*Got Extragradient; use one of these"
        ):
            FastWeights(nn.ParameterDict({"w": w}), optimizer, {"w": w})
        return

    def unrolled(rate: Tensor | None) -> Tensor:
        fast = FastWeights(nn.ParameterDict({"w": w}), optimizer, {"w": w})
        for t in range(3, 7):
            fast.step([gradient(fast.values["w"], t)], None if rate is None else [rate])
        return fast.values["w"]

    fast = unrolled(None)
    rate = torch.tensor(options["lr"], dtype=DOUBLE, requires_grad=True)
    (derivative,) = torch.autograd.grad(unrolled(rate).sum(), rate)
    ends = [float(unrolled(rate.detach() + h).detach().sum()) for h in (1e-6, -1e-6)]
    # central differences: h² of truncation and 1e-16/h of rounding
    assert float(derivative) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6, abs=1e-8)
    for t in range(3, 7):
        real_step(optimizer, w, gradient(w.detach(), t), lambda: w)
    torch.testing.assert_close(fast.detach(), w.detach(), rtol=1e-12, atol=1e-13)


# ---- momentum and scale


def impulse_response(momentum: Momentum, steps: int) -> list[float]:
    """Σ of what one gradient has moved the weights after each step, in units of −D."""
    if momentum.kind == "optimistic":
        return [2.0] + [1.0] * (steps - 1)
    beta = momentum.momentum * complex(math.cos(momentum.phase), math.sin(momentum.phase))
    return [sum((beta**j).real for j in range(k + 1)) for k in range(steps)]


@pytest.mark.parametrize("maximize", [False, True])
@with_rule
def test_scale_and_momentum_are_the_response_to_one_gradient(
    kind: type[Optimizer], options: dict[str, Any], maximize: bool
) -> None:
    """The derivative of the following weights by the coming gradient, at gradients of 0, where v̂ does not react."""
    if "betas" in options or "Adam" in kind.__name__:  # a v̂ that stands still over the steps below
        options = {**options, "betas": (options.get("betas", (0.8,))[0], 1 - 1e-9)}
    w = weights()
    optimizer: Any = kind([w], **options, weight_decay=0.0, maximize=maximize)  # type: ignore[call-arg]
    after_steps(optimizer, w, 3)
    if "step" in optimizer.state.get(w, {}):  # long after the start, where all bias corrections are 1
        optimizer.state[w]["step"].fill_(1e12)
        for name in {"exp_avg_sq", "max_exp_avg_sq"} & set(optimizer.state[w]):
            optimizer.state[w][name].mul_(1e9)  # as large as after so many steps
    found = step_dynamics(optimizer, [w])
    rule = find_rule(optimizer, optimizer.param_groups[0])
    assert rule is not None
    assert found.momentum == rule.momentum_kind()
    assert found.sign == (-1 if maximize else 1)
    assert found.momentum is not None
    if found.momentum.kind == "extragradient":  # both halves step by −D
        torch.testing.assert_close(w.detach() - found.scale[0], rule.step(w, torch.ones_like(w), (), w)[0])
        assert rule.num_gradients == 2
        return

    start, taken = rule.resume(w.detach(), optimizer.state[w] if optimizer.state else {})

    def follow(size: float) -> list[Tensor]:
        value, slots, path = w.detach(), start, []
        for k in range(5):
            g = torch.full_like(value, size if k == 0 else 0.0)
            value, slots = rule.step(value, g, slots, torch.tensor(taken + k + 1, dtype=DOUBLE))
            path.append(value)
        return path

    size = 1e-3
    responses = [(a - b) / (2 * size) for a, b in zip(follow(size), follow(-size), strict=True)]
    if found.momentum.kind == "unknown":
        fits = [impulse_response(Momentum("momentum", b), 5) for b in (0.0, 0.8, 0.9)]
        fits.append(impulse_response(Momentum("optimistic"), 5))
        seen = [float(r[0] / responses[0][0]) for r in responses]
        assert all(max(abs(a - b / f[0]) for a, b in zip(seen, f, strict=True)) > 0.01 for f in fits)
        return
    for response, units in zip(responses, impulse_response(found.momentum, 5), strict=True):
        torch.testing.assert_close(response, -found.sign * units * found.scale[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("taken", [0, 1, 4])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Adam, {"amsgrad": True}),
        (AdamW, {}),
        (ComplexAdam, {"debias": True, "phase": 0.0}),
        (ComplexAdam, {}),
    ],
)
def test_scales_near_the_start(kind: type[Optimizer], options: Mapping[str, Any], taken: int) -> None:
    """D = α(1 − β₁)/(1 − β₁ᵗ)/(√v̂ + ε), with ε = 0.1, written out; before the first step without the quotient."""
    w = weights()
    optimizer: Any = kind([w], lr=0.1, betas=(0.8, 0.9), eps=0.1, **options)  # type: ignore[call-arg]
    v = largest = torch.zeros_like(w)
    for t in range(taken):
        g = gradient(w.detach(), t) / (t + 1)
        v = 0.9 * v + 0.1 * g * g
        largest = torch.maximum(largest, v) if options.get("amsgrad") else v
        real_step(optimizer, w, g, lambda: w)
    averaged = kind is not ComplexAdam or options
    expected = torch.full_like(w, 0.1 * (0.2 / (1 - 0.8 ** (taken or math.inf)) if averaged else 1.0))
    if taken:
        expected = expected / ((largest / (1 - 0.9**taken)).sqrt() + 0.1)
    torch.testing.assert_close(step_dynamics(optimizer, [w]).scale[0], expected, rtol=1e-12, atol=0)


# ---- weight decay


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("kind", KNOWN)
def test_a_coupled_decay_is_a_part_of_the_gradient(kind: type[Optimizer], decoupled: bool) -> None:
    """A decay is coupled if steps with it are steps without it on g + λw, and moves the weights otherwise as well."""
    shaped = [nn.Parameter(weights(size=6).detach().view(2, 3)) for _ in range(3)]  # Muon takes matrices only
    try:
        settings = {"lr": 0.1, **({"decoupled_weight_decay": True} if decoupled else {})}
        without, penalty, with_decay = (
            kind([w], **settings, weight_decay=decay)  # type: ignore[call-arg]
            for w, decay in zip(shaped, (0.0, 0.0, 0.3), strict=True)
        )
    except TypeError:
        # no such option: there is nothing to say, and nothing is said
        assert not any(coupled_decay(kind([shaped[0]], lr=0.1)))  # type: ignore[call-arg]
        return
    for t in range(3):
        for optimizer, w in zip((without, penalty, with_decay), shaped, strict=True):
            extra = 0.3 if optimizer is penalty else 0.0
            real_step(
                optimizer,
                w,
                gradient(w.detach(), t) + extra * w.detach(),
                lambda w=w, t=t, extra=extra: gradient(w.detach(), t) + extra * w.detach(),  # type: ignore[misc]
            )
    change = float((shaped[0] - shaped[2]).detach().abs().max())
    assert change > 1e-5
    is_coupled = torch.allclose(shaped[1], shaped[2], rtol=1e-12, atol=1e-13)
    assert coupled_decay(with_decay) == [0.3 if is_coupled else 0.0]


def test_an_optimizer_that_is_not_known() -> None:
    class Mine(torch.optim.RMSprop):
        pass

    w = weights()
    with pytest.warns(
        UserWarning, match=r"Whether the weight_decay of Mine is part of the gradient is not known"
    ):
        assert coupled_decay(Mine([w], weight_decay=0.1)) == [0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert coupled_decay(Mine([w])) == [0.0]
    found = step_dynamics(Mine([w], lr=0.3), [w])
    assert found.momentum == Momentum("unknown")
    assert bool((found.scale[0] == 0.3).all())
    for optimizer in (Mine([w]), type("Sub", (SGD,), {})([w], lr=0.1)):
        with pytest.raises(
            ValueError, match=r"SGD, Adam, .* and OptimisticAdam\. Got (Mine|Sub); pass rule="
        ):
            known_rule(optimizer, optimizer.param_groups[0])
    assert step_dynamics(type("Sub", (SGD,), {})([w], lr=0.1, momentum=0.5), [w]).momentum == Momentum(
        "momentum", 0.5
    )
