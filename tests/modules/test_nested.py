"""NestedModule against closed forms, the functions it stands on, and the callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.hypergradient import (
    ConjugateGradient,
    DenseSolve,
    Identity,
    Neumann,
)
from lightning_nested.hypergradient.unrolled import unrolled_hypergradient
from lightning_nested.hyperparameters import (
    LearningRate,
    Unconstrained,
)
from lightning_nested.modules import GradientStrategy, Implicit, NestedModule, Unrolled

Optimizer = Callable[[Any], torch.optim.Optimizer]


def sgd(lr: float, **options: Any) -> Optimizer:
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


def trainer(folder: Path | None = None, **options: Any) -> Trainer:
    options = {
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        **options,
    }
    return Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **{"devices": 1, **options},
    )


def steps(n: int) -> DataLoader[Any]:
    """n batches whose content does not matter."""
    return DataLoader(TensorDataset(torch.zeros(n, 1, dtype=torch.float64)), batch_size=1)


class Closed(NestedModule):
    """Written-out losses of w and λ, both vectors of the module."""

    def __init__(
        self,
        inner: Callable[..., Tensor],
        outer: Callable[..., Tensor],
        w: Sequence[float],
        lam: Sequence[float],
        **kw: Any,
    ) -> None:
        kw = {"outer_optimizer": sgd(1.0), "inner_optimizer": sgd(0.1), **kw}
        super().__init__(kw.pop("hyperparameters", "lam"), **kw)
        self.inner, self.outer_function = inner, outer
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.lam = nn.Parameter(torch.tensor(lam, dtype=torch.float64))
        self.calls = {"inner": 0, "outer": 0}

    def inner_loss(self, batch: Any) -> Tensor:
        self.calls["inner"] += 1
        return self.inner(self.w, self.lam)

    def outer_loss(self, batch: Any) -> Tensor:
        self.calls["outer"] += 1
        return self.outer_function(self.w, self.lam)

    def moved(self, n: int = 1) -> Tensor:
        """−Δλ of a fit of n batches."""
        before = self.lam.detach().clone()
        trainer().fit(self, steps(n), steps(1))
        return before - self.lam.detach()


def ridge(lam: float = 3.0, w: float = 1.5, **kw: Any) -> Closed:
    inner = lambda w, lam: ((w - lam) ** 2 / 2 + w**2 / 2).sum()  # noqa: E731
    return Closed(inner, lambda w, _: ((w - 2) ** 2 / 2).sum(), [w], [lam], **kw)


A = torch.tensor([1.0, 10.0], dtype=torch.float64)


def diagonal(w: Sequence[float], **kw: Any) -> Closed:
    inner = lambda w, lam: (0.5 * A * w * w - lam * w).sum()  # noqa: E731
    return Closed(inner, lambda w, _: ((w - 1) ** 2 / 2).sum(), w, [1.0, 1.0], **kw)


EXACT = [ConjugateGradient(tolerance=1e-12), DenseSolve(), Neumann(num_terms=200, step_size=0.1)]


# ---- closed forms


@pytest.mark.parametrize("solver", EXACT, ids=lambda s: type(s).__name__)
def test_implicit_moves_by_the_closed_form(solver: Any) -> None:
    assert ridge(gradient=Implicit(solver=solver)).moved().item() == pytest.approx(-0.25, abs=1e-9)
    moved = diagonal([1.0, 0.1], gradient=Implicit(solver=solver)).moved()
    torch.testing.assert_close(moved, torch.tensor([0.0, -0.09], dtype=torch.float64), rtol=0, atol=1e-9)


def test_identity_is_the_wrong_one_of_the_closed_form() -> None:
    moved = diagonal([1.0, 0.1], gradient=Implicit(solver=Identity())).moved()
    torch.testing.assert_close(moved, torch.tensor([0.0, -0.9], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(1, (-0.09, -0.09)), (5, (-0.2418115599, -0.09)), (50, (-0.0051272138, -0.09))],
)
def test_unrolled_moves_by_the_closed_form(num_steps: int, expected: tuple[float, float]) -> None:
    moved = diagonal([0.0, 0.0], gradient=Unrolled(num_steps=num_steps)).moved(num_steps)
    torch.testing.assert_close(moved, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("gradient", [Implicit(), Unrolled(num_steps=20)], ids=["implicit", "unrolled"])
def test_the_fixed_point_is_the_optimum(gradient: GradientStrategy) -> None:
    module = ridge(lam=3.0, gradient=gradient, inner_steps_per_outer=20, inner_optimizer=sgd(0.4))
    trainer().fit(module, steps(2000), steps(1))
    assert module.lam.item() == pytest.approx(4.0, abs=1e-8)
    assert module.w.item() == pytest.approx(2.0, abs=1e-8)
    assert (module.inner_steps, module.outer_steps) == (2000, 100)


def test_learning_rate_of_one_step() -> None:
    rate = LearningRate(transform=Unconstrained())
    module = Closed(
        lambda w, _: 0.5 * (w**2).sum(), lambda w, _: 0.5 * (w**2).sum(), [1.0], [0.0],
        hyperparameters=rate, gradient=Unrolled(num_steps=1), outer_optimizer=sgd(0.5),
        inner_optimizer=lambda params: torch.optim.SGD([params[0]], lr=0.1),
    )  # fmt: skip
    trainer().fit(module, steps(1), steps(1))
    assert rate.tensors["rates"].item() == pytest.approx(0.1 + 0.5 * 0.9, abs=1e-12)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.55, abs=1e-12)


def test_learning_rate_is_refused_by_implicit() -> None:
    with pytest.raises(ValueError, match="Unrolled"):
        ridge(hyperparameters=LearningRate())


# ---- Unrolled against the plain optimizer and unrolled_hypergradient

x0 = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
y0 = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def curved_inner(w: Tensor, lam: Tensor) -> Tensor:
    return ((torch.tanh(x0 @ w) - y0) ** 2).mean() + 0.5 * (lam.exp() * w**2).sum()


def curved_outer(w: Tensor, lam: Tensor) -> Tensor:
    return ((x0 @ w + 0.3 * y0) ** 2).mean() + 0.1 * (lam**2).sum()


W0, LAM0 = [0.5, -0.3, 0.8], [-1.0, 0.2, -0.5]


def written_sgd(
    lr: float, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[int, Callable[..., Any]]:  # fmt: skip
    def step(g: Tensor, w: Tensor, state: tuple[Tensor, ...], t: int, lr: Any = lr) -> Any:
        g = g + weight_decay * w
        if momentum:
            buffer = g if t == 0 else momentum * state[0] + (1 - dampening) * g
            return w - lr * (g + momentum * buffer if nesterov else buffer), (buffer,)
        return w - lr * g, state

    return int(momentum > 0), step


def written_adam(
    lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    amsgrad: bool = False, decoupled: bool = False,
) -> tuple[int, Callable[..., Any]]:  # fmt: skip
    def step(g: Tensor, w: Tensor, state: tuple[Tensor, ...], t: int, lr: Any = lr) -> Any:
        m, v, largest = state
        if decoupled:
            w = w * (1 - lr * weight_decay)
        else:
            g = g + weight_decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        largest = torch.maximum(largest, v) if amsgrad else v
        scale = (largest / (1 - betas[1] ** (t + 1))).sqrt() + eps
        return w - lr * m / (1 - betas[0] ** (t + 1)) / scale, (m, v, largest)

    return 3, step


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], tuple[int, Callable[..., Any]]]] = {}
for _options in (
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
):
    _key = "sgd " + " ".join(_options)
    OPTIMIZERS[_key] = (torch.optim.SGD, {"lr": 0.2, **_options}, written_sgd(0.2, **_options))  # type: ignore[arg-type]
OPTIMIZERS["adam"] = (torch.optim.Adam, {"lr": 0.1}, written_adam(0.1))
OPTIMIZERS["adam decay amsgrad"] = (
    torch.optim.Adam,
    {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "betas": (0.5, 0.6)},
    written_adam(0.1, weight_decay=0.1, amsgrad=True, betas=(0.5, 0.6)),
)
OPTIMIZERS["adamw"] = (
    torch.optim.AdamW,
    {"lr": 0.1, "weight_decay": 0.2},
    written_adam(0.1, weight_decay=0.2, decoupled=True),
)


@pytest.mark.parametrize("truncate", [None, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unrolled_is_the_plain_optimizer_and_unrolled_hypergradient(name: str, truncate: int | None) -> None:
    kind, options, (count, update) = OPTIMIZERS[name]
    rate = LearningRate(transform=Unconstrained(), name="rate")
    module = Closed(
        curved_inner, curved_outer, W0, LAM0, hyperparameters=["lam", rate], outer_optimizer=sgd(1.0),
        inner_optimizer=lambda params: kind(params, **options),
        gradient=Unrolled(num_steps=5, truncate=truncate),
    )  # fmt: skip
    moved = module.moved(5)

    w = nn.Parameter(torch.tensor(W0, dtype=torch.float64))
    lam = torch.tensor(LAM0, dtype=torch.float64)
    plain = kind([w], **options)
    for _ in range(5):
        plain.zero_grad()
        curved_inner(w, lam).backward()
        plain.step()
    assert (module.w.detach() - w.detach()).abs().max() < 1e-12

    def step(params: Any, hparams: Any, t: int) -> Any:
        w, *state = params
        (g,) = torch.autograd.grad(curved_inner(w, hparams[0]), w, create_graph=True)
        w, state = update(g, w, tuple(state), t, hparams[1])
        return (w, *state)

    start = torch.tensor(W0, dtype=torch.float64)
    expected = unrolled_hypergradient(
        step, lambda p, h: curved_outer(p[0], h[0]),
        (start, *(torch.zeros_like(start) for _ in range(count))),
        (lam, torch.tensor(float(options["lr"]), dtype=torch.float64)), num_steps=5, truncate=truncate,
    )  # fmt: skip
    torch.testing.assert_close(moved, expected[0], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(
        options["lr"] - rate.tensors["rates"].detach().squeeze(), expected[1], rtol=1e-10, atol=1e-13
    )
