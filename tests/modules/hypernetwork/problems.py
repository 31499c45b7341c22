"""Networks, data and modules that the tests of HypernetworkModule share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.hypernetworks import FactorisedResponse
from lightning_nested.hyperparameters import (
    Categorical,
    DropoutRates,
    InputNoise,
    Integer,
    Interval,
    LabelSmoothing,
    Scalar,
    WeightDecay,
)
from lightning_nested.modules import HypernetworkModule, ResponseLoop, ResponseOptions


def sgd(lr: float, momentum: float = 0.0) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum)


def steps(n: int) -> DataLoader[Any]:
    """n batches whose content does not matter."""
    return DataLoader(TensorDataset(torch.zeros(n, 1, dtype=torch.float64)), batch_size=1)


_RANDOM = torch.Generator().manual_seed(3)


_Q, _ = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64, generator=_RANDOM))


SPECTRUM = torch.tensor([1.0, 1.2, 1.5, 2.0], dtype=torch.float64)


X = _Q * (12 * SPECTRUM).sqrt()  # XᵀX/n = diag(spectrum)


Y = X.sum(1) + torch.randn(12, dtype=torch.float64, generator=_RANDOM)


X_VAL = torch.randn(50, 4, dtype=torch.float64, generator=_RANDOM)


Y_VAL = X_VAL.sum(1) + 2 * torch.randn(50, dtype=torch.float64, generator=_RANDOM)


def closed_form(log_decay: float) -> tuple[Tensor, Tensor, float]:
    """w*, dw*/dλ = −H⁻¹e^λ w*, and dL_V/dλ."""
    decay = math.exp(log_decay)
    H = SPECTRUM + decay
    w = (X.T @ Y / 12) / H
    slope = -decay * w / H
    return w, slope, float((X_VAL.T @ (X_VAL @ w - Y_VAL) / 50) @ slope)


class Ridge(HypernetworkModule):
    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * (self.network(X).squeeze(-1) - Y).square().mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return 0.5 * (self.network(X_VAL).squeeze(-1) - Y_VAL).square().mean()


def ridge(loop: ResponseLoop, log_decay: float, rate: float, response_rate: float, momentum: float) -> Ridge:
    net = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    response = FactorisedResponse(net, 1, rank=1)
    response.encoder.requires_grad_(False).fill_(1.0)  # w(h) = w₀ + b h: linear in its parameters
    return Ridge(
        response, WeightDecay(per="model", init=math.exp(log_decay)), loop=loop,
        weights_optimizer=sgd(rate, momentum), response_optimizer=sgd(response_rate, momentum),
        outer_optimizer=sgd(0.0), scale_optimizer=sgd(0.0), options=ResponseOptions(log_every_n_outer_steps=0),
    )  # fmt: skip


def found(module: Ridge) -> tuple[Tensor, Tensor, float]:
    h = module.vector.flat().detach().requires_grad_()
    w = module.network.weights(h)["weight"][0]
    slope = torch.stack([torch.autograd.grad(w[i], h, retain_graph=True)[0][0] for i in range(4)])
    loss = 0.5 * (X_VAL @ w - Y_VAL).square().mean()
    return w.detach(), slope, float(torch.autograd.grad(loss, h)[0])


def data(seed: int, size: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 1, 4, 4, generator=generator)
    return TensorDataset(x, (x[:, 0, 0, 0] * x[:, 0, 1, 1] > 0).long())


def loader(seed: int, batch: int = 8) -> DataLoader[Any]:
    return DataLoader(data(seed), batch_size=batch)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 2)
    )


def everything() -> list[Any]:
    return [
        DropoutRates(), InputNoise(), LabelSmoothing(), Scalar("factor", 1.0, Interval(lower=0.5, upper=2.0)),
        Integer("count", 1, 4, 2), Categorical("kind", ["a", "b"]),
    ]  # fmt: skip


class Classifier(HypernetworkModule):
    """Uses all of them, those of no consequence too."""

    def __init__(self, hyperparameters: Any = None, net: nn.Module | None = None, **kw: Any) -> None:
        kw = {"outer_optimizer": lambda p: torch.optim.Adam(p, lr=0.05), **kw}
        super().__init__(net or network(), everything() if hyperparameters is None else hyperparameters, **kw)
        self.seen: list[tuple[torch.Size, bool]] = []
        self.finite = True

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        x = batch[0]
        self.seen.append((next(iter(values.values())).shape, self.network.training))
        if "input_noise" in values:
            x = self.input_noise(x)
        logits = self.network(x)
        if "label_smoothing" not in values:
            return functional.cross_entropy(logits, batch[1])
        assert set(torch.as_tensor(values["count"]).flatten().tolist()) <= {1.0, 2.0, 3.0, 4.0}
        assert set(self.kind.choice()) <= {"a", "b"}
        return self.label_smoothing(logits * values["factor"].reshape(-1, 1), batch[1])  # type: ignore[no-any-return]

    def outer_loss(self, batch: Any) -> Tensor:
        loss = functional.cross_entropy(self.network(batch[0]), batch[1])
        return loss if self.finite else loss * torch.nan


def tensors(module: HypernetworkModule) -> list[Tensor]:
    scale = [] if module.scale is None else [module.scale.detach()]
    return [*module.network.state_dict().values(), *(t.detach() for t in module.vector.tensors), *scale]


def same(a: list[Tensor], b: list[Tensor], rtol: float = 0.0) -> None:
    assert len(a) == len(b)
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=rtol, atol=rtol)


def examples(number: int = 1, size: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(2, (size,), generator=generator))
        for _ in range(number)
    ]


def as_loader(given: list[Any]) -> DataLoader[Any]:
    return DataLoader(given, batch_size=None)  # type: ignore[arg-type]


def batches(number: int = 3, size: int = 8) -> DataLoader[Any]:
    return as_loader(examples(number, size))


def small_network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 2))


class Small(HypernetworkModule):
    def __init__(self, net: nn.Module | None = None, tuned: Any = None, **options: Any) -> None:
        options = {"outer_optimizer": lambda p: torch.optim.Adam(p, lr=0.05), **options}
        super().__init__(net or small_network(), tuned or [DropoutRates(), LabelSmoothing()], **options)

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        logits = self.network(batch[0])
        if "label_smoothing" not in values:
            return functional.cross_entropy(logits, batch[1])
        return self.label_smoothing(logits, batch[1])  # type: ignore[no-any-return]

    def outer_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])
