"""NestedModule with Implicit against implicit_hypergradient and the callback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.hypergradient import (
    ConjugateGradient,
    DenseSolve,
    FiniteDifference,
    GaussNewton,
    Neumann,
    implicit_hypergradient,
)
from lightning_nested.hyperparameters import ExampleWeights
from lightning_nested.modules import Implicit, LoopOptions
from tests.callbacks.exact import decay_all, exact
from tests.modules.nested.problems import SIZE, Classifier, loader, network, same, sgd, tensors, weighted
from tests.trainers import trainer


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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_implicit_is_the_callback(accumulate: int) -> None:
    clip = 0.1
    module = Classifier(
        gradient=Implicit(solver=ConjugateGradient(damping=1.0)),
        loop=LoopOptions(gradient_clip_val=clip, accumulate_grad_batches=accumulate, warmup_steps=1),
    )
    trainer(limit_val_batches=0, max_epochs=4).fit(module, loader(1), loader(2, batch=5))
    callback = exact(
        [ExampleWeights(SIZE), decay_all(init=1e-2)], optimizer=lambda p: torch.optim.Adam(p, lr=0.1),
        solver=ConjugateGradient(damping=1.0), warmup_steps=1, log_every_n_outer_steps=0,
    )  # fmt: skip
    plain = Plain()
    other = trainer(
        callback,
        limit_val_batches=0,
        max_epochs=4,
        gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
    )
    with pytest.warns(UserWarning, match="weight_decay of its own"):
        other.fit(plain, loader(1), loader(2, batch=5))
    expected = [*(p.detach() for p in plain.net.parameters()), *(t.detach() for t in callback.outer.tensors)]
    assert module.outer_steps == callback.outer_steps > 3
    same(tensors(module), expected, rtol=1e-12)


def test_implicit_is_implicit_hypergradient() -> None:
    """Both the decays' closed form and the graph of the example weights, before the first step."""
    weights, decay = ExampleWeights(SIZE), decay_all(init=1e-2)
    solver = Neumann(num_terms=7, step_size=0.3)
    module = Classifier([weights, decay], gradient=Implicit(solver=solver), outer_optimizer=sgd(1.0))
    before: list[Tensor] = []

    class Read(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before.extend(t.detach().clone() for t in module.outer.tensors)

    trainer(Read(), limit_val_batches=0, limit_train_batches=1).fit(module, loader(1), loader(2))
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
        trainer(limit_val_batches=0, limit_train_batches=1).fit(module, loader(1), loader(2))
        moves.append(tensors(module))
    same(moves[0], moves[1], rtol=1e-6)


def test_the_hook_of_gauss_newton_is_there_for_its_evaluation_only() -> None:
    """A network that is exported during fit, by TorchScript for example, has no hook."""
    found: list[int] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            found.append(len(pl_module.net._forward_hooks))

    module = Classifier(gradient=Implicit(curvature=GaussNewton(outputs="net")))
    trainer(Watch(), limit_val_batches=0).fit(module, loader(1), loader(2))
    assert module.outer_steps == len(found) > 0
    assert not any(found)
