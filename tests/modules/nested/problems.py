"""Nested modules that the tests train: with closed-form answers, and a small network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.hyperparameters import ExampleWeights
from lightning_nested.modules import NestedModule
from tests.callbacks.exact import decay_all
from tests.trainers import trainer

Optimizer = Callable[[Any], torch.optim.Optimizer]


def sgd(lr: float, **options: Any) -> Optimizer:
    return lambda params: torch.optim.SGD(params, lr=lr, **options)


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
        trainer(limit_val_batches=0).fit(self, steps(n), steps(1))
        return before - self.lam.detach()


def ridge(lam: float = 3.0, w: float = 1.5, **kw: Any) -> Closed:
    inner = lambda w, lam: ((w - lam) ** 2 / 2 + w**2 / 2).sum()  # noqa: E731
    return Closed(inner, lambda w, _: ((w - 2) ** 2 / 2).sum(), [w], [lam], **kw)


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
        tuned = [ExampleWeights(SIZE), decay_all(init=1e-2)] if hyperparameters is None else hyperparameters
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


def tensors(module: Any) -> list[Tensor]:
    return [*(p.detach() for p in module.net.parameters()), *(t.detach() for t in module.outer.tensors)]


def same(a: Sequence[Tensor], b: Sequence[Tensor], rtol: float = 0.0) -> None:
    assert len(a) == len(b)
    for i, (s, t) in enumerate(zip(a, b, strict=True)):
        torch.testing.assert_close(s, t, rtol=rtol, atol=rtol, msg=lambda m, i=i: f"tensor {i}: {m}")
