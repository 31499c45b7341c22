"""NestedModule with Unrolled against the plain optimizer, unrolled_hypergradient and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.hypergradient.unrolled import unrolled_hypergradient
from lightning_nested.hyperparameters import ExampleWeights, LearningRate, Unconstrained, WeightDecay
from lightning_nested.modules import LoopOptions, Unrolled
from lightning_nested.optim import ComplexSGD
from tests.modules.nested.problems import (
    SIZE,
    Classifier,
    Closed,
    data,
    loader,
    network,
    ridge,
    same,
    sgd,
    steps,
    weighted,
)
from tests.trainers import trainer


def test_learning_rate_of_one_step() -> None:
    rate = LearningRate(transform=Unconstrained())
    module = Closed(
        lambda w, _: 0.5 * (w**2).sum(), lambda w, _: 0.5 * (w**2).sum(), [1.0], [0.0],
        hyperparameters=rate, gradient=Unrolled(num_steps=1), outer_optimizer=sgd(0.5),
        inner_optimizer=lambda params: torch.optim.SGD([params[0]], lr=0.1),
    )  # fmt: skip
    trainer(limit_val_batches=0).fit(module, steps(1), steps(1))
    assert rate.tensors["rates"].item() == pytest.approx(0.1 + 0.5 * 0.9, abs=1e-12)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.55, abs=1e-12)


def test_learning_rate_starts_where_it_is_told() -> None:
    rate = LearningRate(init=0.03)
    module = ridge(w=0.0, hyperparameters=["lam", rate], gradient=Unrolled(num_steps=1))
    trainer(limit_val_batches=0).fit(module, steps(1), steps(1))
    assert module.w.item() == pytest.approx(0.03 * 3.0)


def test_learning_rate_is_refused_by_implicit() -> None:
    with pytest.raises(ValueError, match="Unrolled"):
        ridge(hyperparameters=LearningRate())


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


@pytest.mark.filterwarnings("ignore:num_steps must not be larger")
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

    trainer(Read(), limit_val_batches=0).fit(module, loader(1), loader(2))
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
    trainer(limit_val_batches=0, max_epochs=2).fit(module, loader(1), loader(2))
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
    trainer(limit_val_batches=0).fit(module, loader(1), loader(2))
    assert module.outer_steps == 1
    assert module.net.norm.num_batches_tracked == 3
    assert module.last_report is not None
    assert module.last_report.hypergradient_norm > 0
    x = data(1).tensors[0]
    module.net.lstm.weight_ih_l0.data.zero_()  # still the weights that the LSTM reads
    module.net.lstm.bias_ih_l0.data.zero_()
    module.net.lstm.bias_hh_l0.data.zero_()
    assert module.net.lstm(x.unsqueeze(-1))[0].abs().max() == 0
