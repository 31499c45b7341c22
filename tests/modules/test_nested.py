"""NestedModule against closed forms, the functions it stands on, and the callback."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import (
    ConjugateGradient,
    DenseSolve,
    FiniteDifference,
    GaussNewton,
    Identity,
    Neumann,
    implicit_hypergradient,
)
from lightning_nested.hypergradient.unrolled import unrolled_hypergradient
from lightning_nested.hyperparameters import (
    ExampleWeights,
    Exp,
    Hyperparameter,
    LearningRate,
    LossWeights,
    Unconstrained,
    WeightDecay,
)
from lightning_nested.modules import GradientStrategy, Implicit, LoopOptions, NestedModule, Unrolled
from lightning_nested.optim import ComplexSGD

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


@pytest.mark.parametrize("gradient", [Implicit(), Unrolled(num_steps=10)], ids=["implicit", "unrolled"])
def test_the_fixed_point_is_the_optimum(gradient: GradientStrategy) -> None:
    """λ's error halves in every outer step, for which w's, divided by 5 in every inner one, is negligible."""
    rates = {"inner_optimizer": sgd(0.4), "outer_optimizer": sgd(2.0)}
    module = ridge(lam=3.0, gradient=gradient, inner_steps_per_outer=10, **rates)
    trainer().fit(module, steps(400), steps(1))
    assert module.lam.item() == pytest.approx(4.0, abs=1e-8)
    assert module.w.item() == pytest.approx(2.0, abs=1e-8)
    assert (module.inner_steps, module.outer_steps) == (400, 40)


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


def test_learning_rate_starts_where_it_is_told() -> None:
    rate = LearningRate(init=0.03)
    module = ridge(w=0.0, hyperparameters=["lam", rate], gradient=Unrolled(num_steps=1))
    trainer().fit(module, steps(1), steps(1))
    assert module.w.item() == pytest.approx(0.03 * 3.0)


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


def written_complex(lr: float, momentum: float, phase: float) -> tuple[int, Callable[..., Any]]:
    c, s = momentum * math.cos(phase), momentum * math.sin(phase)

    def step(g: Tensor, w: Tensor, state: tuple[Tensor, ...], t: int, lr: Any = lr) -> Any:
        a, b = state
        a, b = c * a - s * b + g, s * a + c * b
        return w - lr * a, (a, b)

    return 2, step


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


OPTIMIZERS["complex sgd"] = (ComplexSGD, {"lr": 0.1, "phase": 0.5}, written_complex(0.1, 0.8, 0.5))


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
    assert torch.equal(module.w, w)  # not even rounding comes between: the real optimizer made the steps

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


# ---- on a network: Implicit against implicit_hypergradient and the callback, Unrolled against autograd

SIZE, BATCH = 24, 8


def data(seed: int, size: int = SIZE) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, dtype=torch.float64, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    return TensorDataset(x, y, torch.arange(size))


def loader(seed: int, batch: int = BATCH, size: int = SIZE) -> DataLoader[Any]:
    return DataLoader(data(seed, size), batch_size=batch)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def weighted(weights: Any, out: Tensor, batch: Sequence[Tensor]) -> Tensor:
    losses = functional.cross_entropy(out, batch[1], reduction="none")
    return losses.mean() if weights is None else (weights(batch[2]) * losses).mean()


class Classifier(NestedModule):
    """Loops of its own around a small network."""

    def __init__(self, hyperparameters: Any = None, net: nn.Module | None = None, **kw: Any) -> None:
        tuned = [ExampleWeights(SIZE), WeightDecay(init=1e-2)] if hyperparameters is None else hyperparameters
        kw = {"inner_optimizer": sgd(0.2, momentum=0.9, weight_decay=1e-3), **kw}
        super().__init__(tuned, **{"outer_optimizer": lambda p: torch.optim.Adam(p, lr=0.1), **kw})
        self.net = net if net is not None else network()
        self.calls = {"inner": 0, "outer": 0}
        self.finite = True

    def inner_loss(self, batch: Any) -> Tensor:
        self.calls["inner"] += 1
        return weighted(getattr(self, "example_weights", None), self.net(batch[0]), batch)

    def outer_loss(self, batch: Any) -> Tensor:
        self.calls["outer"] += 1
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss if self.finite else loss * torch.nan


class Plain(LightningModule):
    """The same in automatic optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.example_weights: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return weighted(self.example_weights, self.net(batch[0]), batch)

    def outer_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)


def tensors(module: Any) -> list[Tensor]:
    return [*(p.detach() for p in module.net.parameters()), *(t.detach() for t in module.outer.tensors)]


def same(a: Sequence[Tensor], b: Sequence[Tensor], rtol: float = 0.0) -> None:
    assert len(a) == len(b)
    for i, (s, t) in enumerate(zip(a, b, strict=True)):
        torch.testing.assert_close(s, t, rtol=rtol, atol=rtol, msg=lambda m, i=i: f"tensor {i}: {m}")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_implicit_is_the_callback(accumulate: int) -> None:
    clip = 0.1
    module = Classifier(
        gradient=Implicit(solver=ConjugateGradient(damping=1.0)),
        loop=LoopOptions(gradient_clip_val=clip, accumulate_grad_batches=accumulate, warmup_steps=1),
    )
    trainer(max_epochs=4).fit(module, loader(1), loader(2, batch=5))
    callback = HypergradientCallback(
        [ExampleWeights(SIZE), WeightDecay(init=1e-2)], optimizer=lambda p: torch.optim.Adam(p, lr=0.1),
        solver=ConjugateGradient(damping=1.0), warmup_steps=1, log_every_n_outer_steps=0,
    )  # fmt: skip
    plain = Plain()
    other = trainer(
        max_epochs=4, callbacks=[callback], gradient_clip_val=clip, accumulate_grad_batches=accumulate
    )
    with pytest.warns(UserWarning, match="weight_decay of its own"):
        other.fit(plain, loader(1), loader(2, batch=5))
    expected = [*(p.detach() for p in plain.net.parameters()), *(t.detach() for t in callback.outer.tensors)]
    assert module.outer_steps == callback.outer_steps > 3
    same(tensors(module), expected, rtol=1e-12)


def test_implicit_is_implicit_hypergradient() -> None:
    """Both the decays' closed form and the graph of the example weights, before the first step."""
    weights, decay = ExampleWeights(SIZE), WeightDecay(init=1e-2)
    solver = Neumann(num_terms=7, step_size=0.3)
    module = Classifier([weights, decay], gradient=Implicit(solver=solver), outer_optimizer=sgd(1.0))
    before: list[Tensor] = []

    class Read(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before.extend(t.detach().clone() for t in module.outer.tensors)

    trainer(callbacks=[Read()], limit_train_batches=1).fit(module, loader(1), loader(2))
    moved = [b - t.detach() for b, t in zip(before, module.outer.tensors, strict=True)]

    net = network()
    params, names = list(net.parameters()), [f"net.{n}" for n, _ in net.named_parameters()]
    weights.tensors["weights"].data.copy_(before[0])
    decay.tensors["tensor"].data.copy_(before[1])
    batch, outer_batch = next(iter(loader(1))), next(iter(loader(2)))
    inner = weighted(weights, net(batch[0]), batch) + decay.penalty(dict(zip(names, params, strict=True)))
    inner = inner + sum(0.5e-3 * (p**2).sum() for p in params)
    outer = functional.cross_entropy(net(outer_batch[0]), outer_batch[1])
    same(moved, implicit_hypergradient(inner, outer, params, module.outer.tensors, solver=solver), rtol=1e-10)


@pytest.mark.parametrize("curvature", [GaussNewton(outputs="net"), FiniteDifference()], ids=["gn", "fd"])
def test_other_curvatures_run(curvature: Any) -> None:
    """On a batch where both are the Hessian up to their own error: linear logits."""
    moves = []
    for chosen in (None, curvature):
        torch.manual_seed(0)
        module = Classifier(
            net=nn.Linear(4, 2).double(), gradient=Implicit(solver=DenseSolve(damping=0.1), curvature=chosen)
        )
        trainer(limit_train_batches=1).fit(module, loader(1), loader(2))
        moves.append(tensors(module))
    same(moves[0], moves[1], rtol=1e-6)


def test_unrolled_decay_clip_and_accumulation_are_what_autograd_says() -> None:
    """Two epochs of 3 batches, 2 a step: 2 steps an epoch, and the second cycle of 3 is cut by the epoch."""
    weights, decay = ExampleWeights(SIZE), WeightDecay(init=0.3)
    module = Classifier(
        [weights, decay], gradient=Unrolled(num_steps=3), outer_optimizer=sgd(1.0), inner_optimizer=sgd(0.2),
        loop=LoopOptions(gradient_clip_val=0.3, accumulate_grad_batches=2),
    )  # fmt: skip
    before: list[Tensor] = []

    class Read(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before.extend(t.detach().clone() for t in module.outer.tensors)

    trainer(callbacks=[Read()]).fit(module, loader(1), loader(2))
    assert (module.inner_steps, module.outer_steps, module.trainer.global_step) == (2, 1, 2)
    moved = [b - t.detach() for b, t in zip(before, module.outer.tensors, strict=True)]

    weights.tensors["weights"].data.copy_(before[0])
    decay.tensors["tensor"].data.copy_(before[1])
    net = network()
    names = [n for n, _ in net.named_parameters()]
    values = [p for _, p in net.named_parameters()]
    batches = list(loader(1))
    for window in (batches[:2], batches[2:]):
        call = lambda x: torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))  # noqa: B023, E731
        loss = sum(weighted(weights, call(b[0]), b) for b in window) / 2
        loss = loss + decay.penalty({f"net.{n}": v for n, v in zip(names, values, strict=True)})
        gradients = torch.autograd.grad(loss, values, create_graph=True)
        size = torch.cat([g.flatten() for g in gradients]).norm()
        assert size > 0.3  # clipped
        values = [v - 0.2 * g * 0.3 / (size + 1e-6) for v, g in zip(values, gradients, strict=True)]
    outer_batch = next(iter(loader(2)))
    call = lambda x: torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))  # noqa: E731
    outer = functional.cross_entropy(call(outer_batch[0]), outer_batch[1])
    same(moved, torch.autograd.grad(outer, module.outer.tensors), rtol=1e-11)
    same([p.detach() for p in module.net.parameters()], [v.detach() for v in values], rtol=1e-13)


# ---- the loop: clock, counts, epochs' ends, options


@pytest.mark.parametrize(
    ("gradient", "k", "expected"),
    [
        (Implicit(solver=Identity()), 2, 6),
        (Unrolled(num_steps=2), None, 8),
        (Unrolled(num_steps=5, truncate=2), None, 4),
    ],
    ids=["implicit", "unrolled", "truncated"],
)  # fmt: skip
def test_nothing_is_evaluated_twice(gradient: GradientStrategy, k: int | None, expected: int) -> None:
    """4 epochs of 3 batches: Implicit counts across epochs, Unrolled closes at their ends."""
    module = Classifier(gradient=gradient, inner_steps_per_outer=k)
    fit = trainer(max_epochs=4)
    fit.fit(module, loader(1), loader(2))
    assert module.calls == {"inner": 12, "outer": expected}
    assert (module.inner_steps, module.outer_steps) == (12, expected)
    assert fit.global_step == 12


def test_max_steps_closes_the_cycle() -> None:
    module = Classifier(gradient=Unrolled(num_steps=3))
    trainer(max_epochs=9, max_steps=2).fit(module, loader(1), loader(2))
    assert (module.inner_steps, module.outer_steps) == (2, 1)


@pytest.mark.parametrize(
    "gradient", [Implicit(solver=Identity()), Unrolled(num_steps=2)], ids=["implicit", "unrolled"]
)
def test_restart_brings_new_weights_and_an_empty_optimizer(gradient: GradientStrategy) -> None:
    module = Classifier(gradient=gradient, loop=LoopOptions(restart_every=1), inner_steps_per_outer=2)
    before = [p.detach().clone() for p in module.net.parameters()]
    fit = trainer(limit_train_batches=2)
    fit.fit(module, loader(1), loader(2))
    after = [p.detach() for p in module.net.parameters()]
    assert all((a - b).abs().max() > 0.05 for a, b in zip(before, after, strict=True))
    assert not fit.optimizers[0].state


def test_schedulers_step() -> None:
    halve = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)  # noqa: E731
    module = Classifier(
        gradient=Unrolled(num_steps=3), inner_scheduler=halve, outer_scheduler=halve, outer_optimizer=sgd(1.0)
    )
    fit = trainer(max_epochs=2)
    fit.fit(module, loader(1), loader(2))
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert module.outer.optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def test_a_plateau_scheduler_steps_on_the_metric_it_names() -> None:
    module = Classifier(
        inner_scheduler=lambda o: ReduceLROnPlateau(
            o, monitor="hypergradient/outer_loss", patience=0, threshold=1e9, threshold_mode="abs", factor=0.5
        )
    )
    fit = trainer(max_epochs=3)
    fit.fit(module, loader(1), loader(2))
    start = module.configure_optimizers()[0][0].param_groups[0]["lr"]  # type: ignore[call-overload,index]
    # No epoch improves by the threshold: the first sets the mark, each later one halves.
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(start / 4, rel=1e-12)


def test_weights_without_gradients_give_no_nan_in_adam() -> None:
    """√v has no derivative at 0: a dead unit must not spoil the hypergradient."""
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    module = Classifier(
        [ExampleWeights(SIZE)],
        net=net,
        gradient=Unrolled(num_steps=3),
        inner_optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
    )
    trainer(max_epochs=2).fit(module, loader(1), loader(2))
    assert module.outer_steps == 2  # the second begins with moments that are exactly 0
    assert module.skipped_steps == 0


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lstm(x.unsqueeze(-1))[0][:, -1]))


def test_unrolled_lstm_and_batch_norm() -> None:
    """Modules that keep references to their weights, or statistics, see the fast weights and stay untouched."""
    torch.manual_seed(0)
    module = Classifier(
        "net.head", net=Recurrent().double(), gradient=Unrolled(num_steps=3), inner_optimizer=sgd(0.1)
    )
    trainer().fit(module, loader(1), loader(2))
    assert module.outer_steps == 1
    assert module.net.norm.num_batches_tracked == 3
    assert module.last_report is not None
    assert module.last_report.hypergradient_norm > 0
    x = data(1).tensors[0]
    module.net.lstm.weight_ih_l0.data.zero_()  # still the weights that the LSTM reads
    module.net.lstm.bias_ih_l0.data.zero_()
    module.net.lstm.bias_hh_l0.data.zero_()
    assert module.net.lstm(x.unsqueeze(-1))[0].abs().max() == 0


def test_bf16_runs() -> None:
    for gradient in (Implicit(solver=Neumann(num_terms=3)), Unrolled(num_steps=3)):
        module = Classifier(net=network().float(), gradient=gradient)
        dataset = TensorDataset(data(1).tensors[0].float(), *data(1).tensors[1:])
        batches = DataLoader(dataset, batch_size=BATCH)
        trainer(precision="bf16-mixed", max_epochs=2).fit(module, batches, batches)
        assert module.outer_steps >= 2


def test_loss_weights_and_the_default_validation_step() -> None:
    class Two(Classifier):
        def inner_loss(self, batch: Any) -> Tensor:
            out = self.net(batch[0])
            return self.loss_weights(
                {"ce": functional.cross_entropy(out, batch[1]), "small": (out**2).mean()}
            )  # type: ignore[no-any-return]

    module = Two([LossWeights(["ce", "small"])], gradient=Unrolled(num_steps=3))
    fit = trainer(limit_val_batches=1)
    fit.fit(module, loader(1), loader(2))
    assert "val_loss" in fit.callback_metrics
    assert set(module.values()) == {"loss_weights/ce", "loss_weights/small"}
    assert (module.values()["loss_weights/small"] - 1).abs() > 0.01


# ---- resume

STRATEGIES: dict[str, Callable[[], dict[str, Any]]] = {
    "implicit": lambda: {
        "gradient": Implicit(solver=ConjugateGradient(damping=0.3)),
        "inner_steps_per_outer": 2,
    },
    "unrolled": lambda: {"gradient": Unrolled(num_steps=2)},
    "adam rate": lambda: {
        "gradient": Unrolled(num_steps=4, truncate=1),
        "inner_optimizer": lambda p: torch.optim.Adam(p, lr=0.01),
        "hyperparameters": [ExampleWeights(SIZE), LearningRate()],
        "loop": LoopOptions(warmup_steps=2),
    },
}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("when", ["train end", "validation end"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_resume_is_bit_exact(name: str, when: str, tmp_path: Path) -> None:
    def run(folder: str, epochs: int, ckpt: Path | None = None) -> tuple[Classifier, Trainer]:
        save = ModelCheckpoint(
            tmp_path / folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=end
        )
        fit = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[save], limit_val_batches=limit)
        module = Classifier(**STRATEGIES[name]())
        fit.fit(module, loader(1), loader(2, batch=5), ckpt_path=ckpt, weights_only=True)
        return module, fit

    end, limit = when == "train end", 0 if when == "train end" else 1
    whole, whole_fit = run("whole", 4)
    run("first", 2)
    module, fit = run("second", 4, tmp_path / "first" / "epoch=1.ckpt")
    same(tensors(module), tensors(whole))
    assert (module.inner_steps, module.outer_steps) == (whole.inner_steps, whole.outer_steps)
    for a, b in (
        (fit.optimizers[0], whole_fit.optimizers[0]),
        (module.outer.optimizer, whole.outer.optimizer),
    ):
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    assert fit.global_step == whole_fit.global_step


# ---- DDP


class Save(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        torch.save(tensors(pl_module), self.folder / f"{trainer.global_rank}.pt")


class Split(Classifier):
    """Each process takes its half of every batch, so that the global batch is the one of a single process."""

    def half(self, batch: Any) -> Any:
        n = self.trainer.world_size
        return [part[self.trainer.global_rank :: n] for part in batch]

    def inner_loss(self, batch: Any) -> Tensor:
        return super().inner_loss(self.half(batch))

    def outer_loss(self, batch: Any) -> Tensor:
        return super().outer_loss(self.half(batch))

    def outer_dataloader(self) -> Any:
        return Whole()


class Whole:
    """Batches that no distributed sampler splits."""

    def __iter__(self) -> Any:
        return iter(loader(2))


@pytest.mark.parametrize(
    "gradient",
    [Implicit(solver=ConjugateGradient(damping=0.1)), Unrolled(num_steps=3)],
    ids=["implicit", "unrolled"],
)
def test_two_processes_are_one(gradient: GradientStrategy, tmp_path: Path) -> None:
    def run(**options: Any) -> Split:
        module = Split(gradient=gradient, loop=LoopOptions(gradient_clip_val=0.2))
        trainer(max_epochs=2, use_distributed_sampler=False, **options).fit(module, loader(1), loader(2))
        return module

    run(devices=2, strategy="ddp_fork", callbacks=[Save(tmp_path)])
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    same(first, second)
    same(first, tensors(run()), rtol=1e-10)


# ---- errors


def test_a_weight_claimed_twice() -> None:
    class Both(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(
        MisconfigurationException, match=r"both for net.2.weight \('net.2'\).*inner_parameters"
    ):
        trainer().fit(Both("net.2"), loader(1), loader(2))


def test_a_submodule_by_name_is_trained_by_the_outer_optimizer() -> None:
    module = Classifier("net.2", gradient=Unrolled(num_steps=3), outer_optimizer=sgd(0.0))
    before = [p.detach().clone() for p in module.net.parameters()]
    trainer().fit(module, loader(1), loader(2))
    moved = [bool((a != b.detach()).any()) for a, b in zip(before, module.net.parameters(), strict=True)]
    assert moved == [True, True, False, False]


@pytest.mark.parametrize("gradient", [Implicit(), Unrolled(num_steps=1)], ids=["implicit", "unrolled"])
def test_non_finite_outer_losses_are_skipped_then_raise(gradient: GradientStrategy) -> None:
    module = Classifier(gradient=gradient, loop=LoopOptions(max_skipped=3))
    module.finite = False
    before = [p.detach().clone() for p in module.net.parameters()]
    with pytest.warns(UserWarning, match="skipped the outer step"):
        trainer().fit(module, loader(1), loader(2))
    assert (module.inner_steps, module.outer_steps, module.skipped_steps) == (3, 0, 3)
    assert all((a != b).any() for a, b in zip(before, module.net.parameters(), strict=True))
    with pytest.raises(FloatingPointError, match="max_skipped=3"):
        trainer().fit(module, loader(1), loader(2))


def errors() -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    def fit(module: NestedModule, **options: Any) -> Any:
        return trainer(**options).fit(module, loader(1), loader(2))

    class Detached(Classifier):
        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss(batch).detach()

    class NoHooks(Classifier):
        def on_train_start(self) -> None: ...

    class Taken(Classifier):
        def example_weights(self) -> None: ...

    rate = [LearningRate()]
    return {
        "no optimizer": (lambda: fit(Classifier(inner_optimizer=None)), MisconfigurationException, "inner_optimizer"),
        "detached": (lambda: fit(Detached()), MisconfigurationException, "Detached.inner_loss.*graph"),
        "no hooks": (lambda: fit(NoHooks()), MisconfigurationException, "super"),
        "taken": (Taken, ValueError, "set another name"),
        "rmsprop": (
            lambda: fit(Classifier(inner_optimizer=torch.optim.RMSprop, gradient=Unrolled(num_steps=2))),
            TypeError,
            "Got RMSprop.*Implicit",
        ),
        "typo": (lambda: fit(Classifier("nett.2")), ValueError, "close names: net"),
        "rate and schedule": (
            lambda: fit(
                Classifier(
                    rate,
                    gradient=Unrolled(num_steps=2),
                    inner_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
                )
            ),
            MisconfigurationException,
            "Either LearningRate or a scheduler",
        ),
        "rate and implicit": (lambda: Classifier(rate), ValueError, "Unrolled"),
        "k": (lambda: Classifier(inner_steps_per_outer=0), ValueError, "at least 1"),
        "two lengths": (
            lambda: Classifier(inner_steps_per_outer=2, gradient=Unrolled(num_steps=3)), ValueError, "leave it out"
        ),
        "steps": (lambda: Unrolled(num_steps=0), ValueError, "num_steps"),
        "options": (lambda: LoopOptions(accumulate_grad_batches=0), ValueError, "accumulate_grad_batches"),
        "unused": (
            lambda: fit(Classifier([LossWeights(["a"])], gradient=Unrolled(num_steps=1))), ValueError, "Got none of"
        ),
        "no data": (
            lambda: trainer(limit_val_batches=1).fit(Classifier(), loader(1)), MisconfigurationException, "validation"
        ),
        "double backward": (
            lambda: fit(Classifier(net=Once(), gradient=Unrolled(num_steps=2))), RuntimeError, "second derivative"
        ),
    }  # fmt: skip


class _OnceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return _OnceFunction.apply(self.linear(x))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("name", errors())
def test_errors(name: str) -> None:
    action, kind, message = errors()[name]
    with pytest.raises(kind, match=message):
        action()


def test_options_are_values() -> None:
    assert Implicit() == Implicit(solver=Neumann())
    assert hash(Unrolled(num_steps=3, truncate=1)) == hash(Unrolled(num_steps=3, truncate=1))
    assert "truncate=2" in repr(Unrolled(num_steps=4, truncate=2))
    assert isinstance(LearningRate(), Hyperparameter)
    assert LearningRate(init=20.0).transform == Exp(lower=1e-8, upper=40.0)


def test_the_example_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "scripts" / "nested_example.py"
    monkeypatch.setattr("sys.argv", [str(script), "--epochs", "3"])
    runpy.run_path(str(script), run_name="__main__")
    lines = {
        line.split()[0]: float(line.split()[1])
        for line in capsys.readouterr().out.splitlines()
        if line[:1] in "ut"
    }
    assert lines["tuned"] > lines["untuned"]
