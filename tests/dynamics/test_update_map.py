"""The optimizer as a map: equal to its step, its derivative right, its exponents those of the theory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_nested.dynamics import UpdateRule, lyapunov_exponents, lyapunov_spectrum, update_map
from lightning_nested.games import Bilinear, IteratedPrisonersDilemma, MatchingPennies, QuadraticGame
from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    Extragradient,
    ExtrapolationFromThePast,
    NuPI,
    OptimisticAdam,
    OptimisticSGD,
)
from tests.cases import DOUBLE, cubic_roots
from tests.conftest import Normal

Make = Callable[[list[Tensor]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.02),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.02),
    "adam": lambda p: Adam(p, lr=0.02, weight_decay=0.02),
    "adamw": lambda p: AdamW(p, lr=0.02, betas=(0.7, 0.95), weight_decay=0.1),
    "complex": lambda p: ComplexSGD(p, lr=0.1, weight_decay=0.02),
    "real": lambda p: ComplexSGD(p, lr=0.1, phase=0.0),
    "complex adam": lambda p: ComplexAdam(p, lr=0.02),
    "complex adam, debiased": lambda p: ComplexAdam(p, lr=0.02, debias=True, weight_decay=0.02),
    "extragradient": lambda p: Extragradient(p, lr=0.1, weight_decay=0.02),
    "past": lambda p: ExtrapolationFromThePast(p, lr=0.1, weight_decay=0.02),
    "nupi": lambda p: NuPI(p, lr=0.05, proportional=2.0, nu=0.3, weight_decay=0.02),
    "optimistic": lambda p: OptimisticSGD(p, lr=0.1, weight_decay=0.02),
    "optimistic adam": lambda p: OptimisticAdam(p, lr=0.02),
    "maximize": lambda p: SGD(p, lr=0.01, momentum=0.5, maximize=True, weight_decay=0.02),
}


def loss(params: Sequence[Tensor]) -> Tensor:
    a, b = params
    return ((a @ b).tanh() ** 2).sum() + 0.3 * (a**4).mean() + (b.cos() * b).sum() * 0.2


def game(players: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    x, y = players
    both = (x.tanh() * y).sum() + 0.1 * (x * y**2).sum()
    return both + 0.2 * (x**2).sum(), 0.1 * (y**4).sum() - both


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.clone().requires_grad_(True) for t in tensors]


def set_gradients(losses: Sequence[Tensor], players: Sequence[Sequence[Tensor]]) -> None:
    for value, own in zip(losses, players, strict=True):
        for p, g in zip(own, torch.autograd.grad(value, list(own), retain_graph=True), strict=True):
            p.grad = g


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_map_is_the_step_of_one_loss(name: str, normal: Normal) -> None:
    params = leaves(normal(2, 3), normal(3))
    optimizer = OPTIMIZERS[name](params)
    training = update_map(optimizer, loss)
    state = training.initial()
    for _ in range(7):
        state = training.step(state)

        def closure() -> float:
            set_gradients([loss(params)], [params])
            return 0.0

        if isinstance(optimizer, Extragradient):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        for ours, torchs in zip(training.parameters(state), params, strict=True):
            torch.testing.assert_close(ours, torchs.detach(), rtol=1e-12, atol=1e-13)
    resumed = update_map(optimizer, loss).initial()
    for ours, torchs in zip(state, resumed, strict=True):
        if ours.ndim:  # optimizers without moments do not count their steps beyond the first
            torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-13)
    for ours, torchs in zip(
        training.step(state)[:2], update_map(optimizer, loss).step(resumed)[:2], strict=True
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_map_is_the_step_of_a_game(name: str, alternating: bool, normal: Normal) -> None:
    x, y = leaves(normal(3), normal(3))
    optimizers = [OPTIMIZERS[name]([x]), OPTIMIZERS["momentum" if name != "extragradient" else name]([y])]
    if name == "extragradient" and alternating:
        with pytest.raises(ValueError, match=r"all players at once\. Got it with alternating=True"):
            update_map(optimizers, game, alternating=True)
        return
    training = update_map(optimizers, game, alternating=alternating)
    state = training.initial()
    for _ in range(6):
        state = training.step(state)
        if alternating:
            for i, optimizer in enumerate(optimizers):
                set_gradients(game((x, y))[i : i + 1], [[(x, y)[i]]])
                optimizer.step()
        else:
            set_gradients(game((x, y)), [[x], [y]])
            if name == "extragradient":
                for optimizer in optimizers:
                    optimizer.extrapolate()  # type: ignore[attr-defined]
                set_gradients(game((x, y)), [[x], [y]])
            for optimizer in optimizers:
                optimizer.step()
        for ours, torchs in zip(training.parameters(state), (x, y), strict=True):
            torch.testing.assert_close(ours, torchs.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["loss", "simultaneous", "alternating"])
def test_the_derivative_is_that_of_central_differences(name: str, kind: str, normal: Normal) -> None:
    params = leaves(normal(3, 3), normal(3)) if kind == "loss" else leaves(normal(3), normal(3))
    if name == "extragradient" and kind == "alternating":
        pytest.skip("extragradient is simultaneous")
    training = update_map(
        OPTIMIZERS[name](params), loss if kind == "loss" else game, alternating=kind == "alternating"
    )
    state = training.initial()
    for _ in range(3):
        state = training.step(state)
    coordinates = training.coordinates(state)
    frame = tuple(a.abs() * normal(2, *a.shape) for a in coordinates)  # v is small, and must stay positive
    value, pushed = training.push(state, frame)
    for ours, direct in zip(value, training.step(state), strict=True):
        torch.testing.assert_close(ours, direct, rtol=1e-14, atol=1e-14)

    def moved(row: int, size: float) -> tuple[Tensor, ...]:
        shifted = [a + size * v[row] for a, v in zip(coordinates, frame, strict=True)]
        return training.coordinates(training.step((*shifted, *state[len(coordinates) :])))

    for row in range(2):
        difference = [(a - b) / 2e-5 for a, b in zip(moved(row, 1e-5), moved(row, -1e-5), strict=True)]
        for ours, numerical in zip(pushed, difference, strict=True):
            torch.testing.assert_close(ours[row], numerical, rtol=1e-6, atol=1e-7)


def test_closed_forms_are_the_derivative_by_forward_mode(normal: Normal) -> None:
    w, g, *slots = (normal(4) for _ in range(5))
    dw, dg, *dslots = (normal(4) for _ in range(5))
    t = torch.tensor(5.0, dtype=DOUBLE)
    params = [torch.zeros(4, dtype=DOUBLE)]
    for name, make in OPTIMIZERS.items():
        (r,) = update_map(make(params), lambda p: p[0].sum()).rules
        if r.num_gradients == 2:
            continue
        size = len(r.start(w))
        buffers = tuple(s.abs() for s in slots[:size])
        ours = r.tangent(w, g, buffers, t, dw, dg, tuple(dslots[:size]))
        theirs = UpdateRule.tangent(r, w, g, buffers, t, dw, dg, tuple(dslots[:size]))
        for a, b in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=name)


def test_adam_has_a_derivative_where_a_gradient_has_always_been_zero() -> None:
    params = leaves(torch.tensor([1.0, 2.0], dtype=DOUBLE))
    training = update_map(Adam(params, lr=0.1), lambda p: p[0][0] ** 2)
    _, pushed = training.push(training.initial(), tuple(torch.eye(6, dtype=DOUBLE).split(2, dim=1)))
    assert all(bool(torch.isfinite(p).all()) for p in pushed)


# --- the theory's exponents


@pytest.mark.parametrize(
    ("lr", "momentum", "phase"), [(0.1, 0.8, math.pi / 8), (0.8, 0.7, math.pi / 2), (0.1, 0.9, math.pi / 8)]
)
def test_complex_momentum_on_a_bilinear_game_has_the_roots_of_the_cubic(
    lr: float, momentum: float, phase: float, normal: Normal
) -> None:
    x, y = leaves(normal(1), normal(1))
    training = update_map(ComplexSGD([x, y], lr=lr, momentum=momentum, phase=phase), Bilinear().losses)
    exact = torch.cat([cubic_roots(e, lr, momentum, phase) for e in (1j, -1j)]).abs().log()
    found = lyapunov_exponents(training, training.initial(), k=6, num_steps=900, burn_in=600, window="bump")
    torch.testing.assert_close(found, exact.sort(descending=True).values, rtol=0, atol=1e-6)


def test_complex_momentum_on_quadratic_games_has_the_roots_of_the_cubic(normal: Normal) -> None:
    eigenvalues = [0.5 + 1j, 0.1 + 0.4j]
    zoo = QuadraticGame.from_eigenvalues(eigenvalues)
    players = [p.detach().requires_grad_(True) for p in zoo.initial(torch.Generator().manual_seed(0))]
    training = update_map([ComplexSGD([p], lr=0.3) for p in players], zoo.losses)
    both = [*eigenvalues, *(e.conjugate() for e in eigenvalues)]
    exact = torch.cat([cubic_roots(e, 0.3, 0.8, math.pi / 8) for e in both]).abs().log()
    found = lyapunov_exponents(
        training, training.initial(), k=12, num_steps=2000, burn_in=1500, window="bump"
    )
    torch.testing.assert_close(found, exact.sort(descending=True).values, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "rate"),
    [
        (lambda p: Extragradient(p, lr=0.3), math.sqrt(1 - 0.09 + 0.0081)),
        (lambda p: OptimisticSGD(p, lr=0.3), math.sqrt((1 + math.sqrt(1 - 0.36)) / 2)),
        (lambda p: ExtrapolationFromThePast(p, lr=0.3), math.sqrt((1 + math.sqrt(1 - 0.36)) / 2)),
        (lambda p: SGD(p, lr=0.1), math.sqrt(1.01)),
    ],
)
def test_rates_on_a_bilinear_game(make: Make, rate: float, normal: Normal) -> None:
    training = update_map(make(leaves(normal(1), normal(1))), Bilinear().losses)
    found = lyapunov_spectrum(training, training.initial(), num_steps=400, burn_in=100, window="bump")
    assert float(found.exponents[0]) == pytest.approx(math.log(rate), abs=1e-8)


def test_alternating_steps_on_a_bilinear_game_neither_grow_nor_shrink(normal: Normal) -> None:
    training = update_map(SGD(leaves(normal(1), normal(1)), lr=0.1), Bilinear().losses, alternating=True)
    found = lyapunov_exponents(training, training.initial(), k=2, num_steps=800, window="bump")
    torch.testing.assert_close(found, torch.zeros(2, dtype=DOUBLE), rtol=0, atol=1e-8)


def test_matching_pennies_at_the_equilibrium() -> None:
    training = update_map(SGD(leaves(*[torch.zeros(1, dtype=DOUBLE)] * 2), lr=0.4), MatchingPennies().losses)
    found = lyapunov_exponents(training, training.initial(), k=2, num_steps=50)
    exact = torch.full((2,), 0.5 * math.log(1 + 0.16 / 16), dtype=DOUBLE)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


def test_heavy_ball_and_its_determinant(normal: Normal) -> None:
    curvature = torch.tensor([0.2, 1.0], dtype=DOUBLE)
    training = update_map(
        SGD(leaves(normal(2)), lr=0.5, momentum=0.6), lambda p: 0.5 * (curvature * p[0] ** 2).sum()
    )
    found = lyapunov_exponents(training, training.initial(), k=4, num_steps=900, burn_in=300, window="bump")
    # w and b together: z² − (1 + μ − αh)z + μ = 0, and |det J| = μ per coordinate.
    assert float(found.sum()) == pytest.approx(2 * math.log(0.6), abs=1e-10)
    roots = []
    for h in curvature.tolist():
        half = (1.6 - 0.5 * h) / 2
        root = torch.tensor(half**2 - 0.6, dtype=torch.complex128).sqrt()
        roots += [abs(half + complex(root)), abs(half - complex(root))]
    exact = torch.tensor(sorted(roots, reverse=True), dtype=DOUBLE).log()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


# --- other optimizers, refusals


@dataclass(frozen=True, kw_only=True)
class RMSpropRule(UpdateRule):
    """RMSprop without momentum, re-stated."""

    lr: float
    alpha: float
    eps: float
    slots: ClassVar[tuple[str, ...]] = ("square_avg",)

    def step(self, w: Tensor, g: Tensor, slots: Any, t: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        v = self.alpha * slots[0] + (1 - self.alpha) * g * g
        return w - self.lr * g / (v.sqrt() + self.eps), (v,)


def test_an_unknown_optimizer_takes_a_restatement(normal: Normal) -> None:
    params = leaves(normal(2, 3), normal(3))
    optimizer = RMSprop(params, lr=0.01)
    with pytest.raises(ValueError, match=r"Got RMSprop; pass rule="):
        update_map(optimizer, loss)
    training = update_map(optimizer, loss, rule=RMSpropRule(lr=0.01, alpha=0.99, eps=1e-8))
    state = training.initial()
    for _ in range(5):
        state = training.step(state)
        set_gradients([loss(params)], [params])
        optimizer.step()
    torch.testing.assert_close(state[0], params[0].detach(), rtol=1e-12, atol=1e-13)
    assert bool(torch.isfinite(lyapunov_exponents(training, state, k=3, num_steps=20)).all())


def test_groups_keep_their_own_options(normal: Normal) -> None:
    a, b = leaves(normal(2, 3), normal(3))
    training = update_map(SGD([{"params": [a]}, {"params": [b], "lr": 0.0}], lr=0.1), loss)
    after = training.step(training.initial())
    assert torch.equal(after[1], b.detach())
    assert not torch.equal(after[0], a.detach())


def test_start_points_come_in_batches(normal: Normal) -> None:
    training = update_map([ComplexSGD(leaves(normal(1)), lr=0.1) for _ in range(2)], Bilinear().losses)
    starts = torch.vmap(lambda x, y: training.start((x, y)))(normal(3, 1), normal(3, 1))
    found = lyapunov_exponents(training, starts, k=1, num_steps=300, burn_in=200, batched=True, window="bump")
    torch.testing.assert_close(found, torch.full((3, 1), math.log(0.977430), dtype=DOUBLE), rtol=0, atol=1e-6)


def test_batches_of_frames_agree_with_single_ones_through_linear_solves(generator: torch.Generator) -> None:
    """Nested vmaps of a derivative of torch.linalg.solve are silently wrong in torch 2.14.1."""
    zoo = IteratedPrisonersDilemma()
    starts = [tuple(p.detach() for p in zoo.initial(generator)) for _ in range(4)]
    training = update_map(SGD(leaves(*starts[0]), lr=1.0), zoo.losses)
    states = [training.start(s) for s in starts]
    frame = tuple(torch.randn(3, 5, generator=generator, dtype=DOUBLE) for _ in range(2))
    together = tuple(torch.stack(parts) for parts in zip(*states, strict=True))
    _, pushed = training.push_batch(together, tuple(f.expand(4, 3, 5) for f in frame))
    for i, state in enumerate(states):
        _, one = training.push(state, frame)
        torch.testing.assert_close(tuple(p[i] for p in pushed), one, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: update_map(Adam([x, y], amsgrad=True), loss), "amsgrad=True"),
        (lambda x, y: update_map(SGD([x, y], lr=0.1), lambda p: (p[0].sum(),)), "Got 1 losses and 2 players"),
        (lambda x, y: update_map(SGD([x, y], lr=0.1), lambda p: p[0].sum(), alternating=True), "single loss"),
        (lambda x, y: update_map([SGD([x], lr=0.1), Extragradient([y], lr=0.1)], game), "other optimizers"),
    ],
)
def test_what_does_not_fit_is_refused(
    call: Callable[[Tensor, Tensor], Any], message: str, normal: Normal
) -> None:
    with pytest.raises(ValueError, match=message):
        call(*leaves(normal(3), normal(3)))
