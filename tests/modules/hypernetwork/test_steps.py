"""Training steps and outer steps against the same computation written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_nested.hypernetworks import FactorisedResponse, FixedScale, LearnedScale
from lightning_nested.hyperparameters import DropConnect, LabelSmoothing, WeightDecay
from lightning_nested.modules import STN, DeltaSTN, HypernetworkModule, ResponseOptions
from tests.callbacks.exact import decay_all
from tests.modules.hypernetwork.problems import (
    SPECTRUM,
    X_VAL,
    Y_VAL,
    Classifier,
    Small,
    X,
    Y,
    as_loader,
    batches,
    examples,
    loader,
    ridge,
    sgd,
    steps,
)
from tests.trainers import trainer


@pytest.mark.parametrize("per", ["model", "tensor", "parameter"])
def test_decay_is_in_the_inner_loss(per: Any) -> None:
    """Against the penalty written out, in both of Delta-STN's losses."""
    module = Classifier([decay_all(per=per, init=0.1)])
    response = module.network
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.1)
    batch = next(iter(loader(1)))
    h = module.vector.flat().detach()
    moved = h + 0.1
    response.center.copy_(h)
    module.eval()
    for at, mode in ((h, "general"), (moved, "response"), (moved, "linearized")):
        with response.at(at, mode):  # type: ignore[arg-type]
            plain = module.inner_loss(batch, {"x": h})
        weights = response.weights(at)
        decay = 0.1 * math.exp(0.1 if at is moved else 0.0)
        expected = plain + 0.5 * decay * sum(w.square().sum() for w in weights.values())
        torch.testing.assert_close(module.training_loss(batch, at, mode), expected)  # type: ignore[arg-type]


def test_drop_connect_drops_in_training_only() -> None:
    module = Classifier([DropConnect(init=0.5), WeightDecay(per="model")], loop=STN())
    trainer(limit_val_batches=0, max_epochs=2).fit(module, loader(1), loader(2))
    assert module.seen[0][0] == torch.Size([])
    batch = next(iter(loader(1)))
    h = module.vector.flat().detach()
    a, b = (float(module.training_loss(batch, h).detach()) for _ in range(2))
    assert a != b
    module.eval()
    assert torch.equal(module(batch[0]), module(batch[0]))


def test_refining_moves_the_predicted_weights_by_real_steps() -> None:
    """One outer step by hand: ∂L_V/∂w at the refined weights, times the response's slope."""
    module = ridge(DeltaSTN(train_steps=1, perturbation=FixedScale(scale=1e-3)), -0.5, 0.0, 0.0, 0.0)
    module.options = ResponseOptions(refine_steps=3)
    module._make = (sgd(0.2), sgd(0.0))
    nn.init.normal_(module.network.decoder)
    trainer(limit_val_batches=0, limit_train_batches=1).fit(module, steps(2), steps(1))
    w, slope = torch.zeros(4).double(), module.network.decoder.detach().squeeze(-1)
    start = w.clone()
    # The weights' optimizer made its own step before: undone by its rate, which the inner step had too.
    H, b = SPECTRUM + math.exp(-0.5), X.T @ Y / 12
    start = start - 0.2 * (H * start - b)
    refined = start
    for _ in range(3):
        refined = refined - 0.2 * (H * refined - b)
    expected = abs(float((X_VAL.T @ (X_VAL @ refined - Y_VAL) / 50) @ slope))
    assert module.last_report is not None
    assert module.last_report.hypergradient_norm == pytest.approx(expected, rel=1e-9)


def test_the_response_is_trained_every_third_step_and_the_weights_in_each() -> None:
    moved: list[tuple[bool, bool]] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            groups = (pl_module.network.general_parameters(), pl_module.network.response_parameters())
            self.before = [[p.detach().clone() for p in g.values()] for g in groups]

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            groups = (pl_module.network.general_parameters(), pl_module.network.response_parameters())
            moved.append(
                tuple(  # type: ignore[arg-type]
                    any(bool((a != b).any()) for a, b in zip(old, g.values(), strict=True))
                    for old, g in zip(self.before, groups, strict=True)
                )
            )

    for loop, expected in (
        (DeltaSTN(warmup_steps=99), [True, False, False, True]),
        (DeltaSTN(warmup_steps=99, response_every=2), [True, False, True, False]),
        (DeltaSTN(warmup_steps=99, response_every=1, linearized=False), [True] * 4),
    ):
        moved.clear()
        trainer(Watch(), limit_val_batches=0).fit(Small(loop=loop), batches(4), batches())
        assert moved == [(True, e) for e in expected]


def test_the_response_of_one_point_learns_without_first_order_noise() -> None:
    """On ridge, far from w₀'s optimum: ε·(g(w₀ + bε; λ + ε) − g(w₀; λ)), not ε·g(w₀ + bε; λ + ε)."""
    generator = torch.Generator().manual_seed(0)
    x, y, w, b = (
        torch.randn(n, dtype=torch.float64, generator=generator) for n in ((6, 3), (6, 1), (1, 3), (1, 3))
    )

    class Ridge(HypernetworkModule):
        def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
            return 0.5 * (self.network(x) - y).square().mean()

        def outer_loss(self, batch: Any) -> Tensor:
            return self.inner_loss(batch, {})

    net = nn.Linear(3, 1, bias=False).double()
    response = FactorisedResponse(net, 1, rank=1)
    response.encoder.requires_grad_(False).fill_(1.0)
    module = Ridge(response, WeightDecay(per="model", init=0.1))
    with torch.no_grad():
        response.module.weight.copy_(w)
        response.decoder.copy_(b.T)
    h, epsilon = module.vector.flat().detach(), 0.3
    value, for_general, for_phi = DeltaSTN().gradients(
        module._loss(), None, h, h + epsilon, [response.module.weight], [response.decoder]
    )

    def gradient(w: Tensor, shift: float) -> Tensor:
        return (w @ x.T - y.T) @ x / 6 + 0.1 * math.exp(shift) * w

    torch.testing.assert_close(for_general[0], gradient(w, 0.0))
    expected = epsilon * (gradient(w + epsilon * b, epsilon) - gradient(w, 0.0))
    torch.testing.assert_close(for_phi[0], expected.T)
    assert float(value) == pytest.approx(
        float(0.5 * (w @ x.T - y.T).square().mean() + 0.05 * w.square().sum())
    )


def test_without_linearising_the_response_sees_the_perturbed_network_and_the_weights_do_not() -> None:
    """Its gradients against autograd of the losses written out, running statistics counted once."""
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)
    ).double()
    found: dict[str, list[Tensor]] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            found.setdefault(self.defaults["lr"], []).extend(  # type: ignore[arg-type]
                p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None
            )

    module = Small(
        net, [LabelSmoothing()], loop=DeltaSTN(linearized=False, perturbation=LearnedScale(signs=True)),
        weights_optimizer=lambda p: Keep(p, lr=1.0), response_optimizer=lambda p: Keep(p, lr=2.0),
        options=ResponseOptions(per_example=False),
    )  # fmt: skip
    for p in module.network.response_parameters().values():
        nn.init.normal_(p, std=0.1)
    twin = copy.deepcopy(module.network)
    (batch,) = examples()
    batch = (batch[0].double(), batch[1])
    trainer(limit_val_batches=0).fit(module, as_loader([batch]), as_loader([batch]))
    assert int(module.network.module[2].num_batches_tracked) == 1
    center = module.vector.flat().detach()

    def loss(h: Tensor, wanted: Any) -> tuple[Tensor, ...]:
        smoothing = 0.5 * torch.sigmoid(h[0])
        with twin.at(h):
            log = twin(batch[0]).log_softmax(-1)
        value = -((1 - smoothing) * log.gather(1, batch[1][:, None])[:, 0] + smoothing * log.mean(-1)).mean()
        return torch.autograd.grad(value, list(wanted.values()), allow_unused=True)

    expected = [g for g in loss(center, twin.general_parameters()) if g is not None]
    torch.testing.assert_close(found[1.0], expected, rtol=1e-9, atol=1e-12)  # type: ignore[index]

    def of_response(h: Tensor) -> list[Tensor]:
        phi = twin.response_parameters()
        by_name = zip(twin.changes(h - center).values(), expected, strict=True)
        first_order = torch.stack([(c * g).sum() for c, g in by_name]).sum()
        taken_off = torch.autograd.grad(first_order, list(phi.values()), allow_unused=True)
        pairs = zip(loss(h, phi), taken_off, strict=True)
        return [g - t for g, t in pairs if g is not None and t is not None]

    signs = [of_response(center + s * 0.5) for s in (1, -1)]
    assert any(
        all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(found[2.0], e, strict=True))  # type: ignore[index]
        for e in signs
    )


class Counting(Classifier):
    """Counts the evaluations of its inner loss in a buffer, and keeps what it read there."""

    def __init__(self, **kw: Any) -> None:
        super().__init__([WeightDecay(per="model")], loop=STN(), **kw)
        self.register_buffer("count", torch.zeros(()))
        self.read: list[float] = []

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        self.read.append(float(self.count))
        self.count = self.count + 1
        return super().inner_loss(batch, values)


def test_buffers_move_from_one_refining_step_to_the_next() -> None:
    module = Counting(options=ResponseOptions(refine_steps=3))
    trainer(limit_val_batches=0, limit_train_batches=10).fit(module, loader(1, 2), loader(2))
    assert module.outer_steps > 0
    # The run itself counts its training steps alone.
    assert float(module.count) == module.inner_steps
    assert len(module.read) == module.inner_steps + 3 * module.outer_steps
    # The first refinement begins where training is, and training goes on from there.
    start = next(i for i, value in enumerate(module.read) if module.read.count(value) > 1)
    count = module.read[start]
    assert module.read[start : start + 4] == [count, count + 1, count + 2, count]
