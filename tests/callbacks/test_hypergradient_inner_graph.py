"""HypergradientCallback differentiates the training loss that the optimizer steps on: masks, windows, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import (
    ConjugateGradient,
    DenseSolve,
    FiniteDifference,
    GaussNewton,
    Neumann,
    implicit_hypergradient,
)
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.tuned_regression import (
    Checkpointed,
    Regression,
    data,
    noisy,
    sgd,
    smooth,
    values,
    weights,
)
from tests.cases import DOUBLE
from tests.trainers import trainer


@pytest.mark.parametrize("curvature", [None, FiniteDifference()])
def test_accumulated_halves_equal_the_whole_batch(curvature: Any) -> None:
    def run(batch: int, accumulate: int) -> tuple[Tensor, Tensor]:
        callback = exact(
            decay_all("tensor", init=1e-2),
            optimizer=sgd(1.0),
            solver=Neumann(num_terms=5, step_size=0.1),
            curvature=curvature,
        )
        module = Regression(smooth())
        fit = trainer(callback, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
        fit.fit(module, DataLoader(data(32, 1), batch), DataLoader(data(16, 2), 16))
        assert callback.outer_steps == 4
        return values(callback), torch.cat([p.detach().flatten() for p in module.parameters()])

    # The same sums in another order; finite differences lose a third of the digits to cancellation.
    tolerance = 1e-10 if curvature is None else 1e-6
    for whole, halves in zip(run(8, 1), run(4, 2), strict=True):
        torch.testing.assert_close(halves, whole, rtol=tolerance, atol=1e-12)


class Independent(Callback):
    """Before the tuned step: the hypergradient of the same graphs, by the public function and a dense solve."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        (tuner,) = (c for c in trainer.callbacks if isinstance(c, HypergradientCallback))  # type: ignore[attr-defined]
        (decay,) = tuner.outer.decays
        parameters = dict(pl_module.named_parameters())
        raws = tuple(decay.tensors.values())
        training = [m for m in pl_module.modules() if m.training]
        pl_module.eval()
        outer = pl_module.outer_loss(self.batch)
        for m in training:
            m.training = True
        found = implicit_hypergradient(
            loss + decay.penalty(parameters), outer, tuple(parameters.values()), raws, solver=DenseSolve()
        )
        self.found.append(torch.cat([g.flatten() for g in found]))

    batch: Any


class OneBatch(Regression):
    def outer_loss(self, batch: Any) -> Tensor:
        return 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean()


def test_dropout_and_batch_norm_are_those_of_the_training_loss() -> None:
    """The reference uses the loss's own graph, so a second mask or other statistics would show."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)
    ).double()
    module, independent = OneBatch(net, rate=0.01), Independent()
    independent.batch = next(iter(DataLoader(data(16, 2), 16)))
    callback = exact(
        decay_all("parameter", init=100.0),
        optimizer=sgd(1.0),
        solver=ConjugateGradient(max_iterations=200, tolerance=1e-13),
    )
    before = torch.full((len(weights(module)),), 100.0, dtype=DOUBLE).log()
    fit = trainer(independent, callback, limit_train_batches=1)
    fit.fit(module, DataLoader(data(8, 1), 8), DataLoader(data(16, 2), 16))
    (expected,) = independent.found
    assert callback.last_report is not None
    assert not callback.last_report.negative_curvature
    moved = torch.cat([t.detach().flatten() for t in callback.outer.tensors]) - before
    assert float(expected.norm()) > 1e-3
    # Conjugate gradients to 1e-13, then a difference of numbers near 1.
    torch.testing.assert_close(moved, -expected, rtol=1e-8, atol=1e-13)


def test_a_checkpointed_network_has_the_hypergradient_of_the_plain_one() -> None:
    def run(net: nn.Module) -> Tensor:
        callback = exact(decay_all("parameter", init=0.1), optimizer=sgd(1.0), solver=Neumann())
        fit = trainer(callback, limit_train_batches=1)
        seed_everything(0, verbose=False)
        fit.fit(Regression(net), DataLoader(data(16, 1), 16), DataLoader(data(16, 2), 16))
        assert callback.outer_steps == 1
        return values(callback)

    # The same numbers; the forward is run again with the same masks.
    torch.testing.assert_close(run(Checkpointed(noisy().double())), run(noisy().double()), rtol=1e-12, atol=0)


class Twice(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.5 * (self.net(-batch[0]) ** 2).mean()


def test_gauss_newton_of_outputs_computed_twice_is_refused() -> None:
    callback = exact(decay_all(), curvature=GaussNewton(outputs="net"))
    with pytest.raises(MisconfigurationException, match=r"calls once .* Got 2 outputs"):
        trainer(callback).fit(Twice(smooth()), DataLoader(data(16, 1), 8), DataLoader(data(8, 2), 8))


class Draw(Callback):
    """Draws random numbers after the tuned callback's own hook, before the step."""

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.rand(3)


def test_finite_differences_see_the_masks_of_the_step() -> None:
    def run(curvature: Any) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)).double()
        callback = exact(
            decay_all("parameter", init=0.5),
            optimizer=sgd(1.0),
            solver=Neumann(num_terms=3),
            curvature=curvature,
        )
        fit = trainer(callback, Draw(), limit_train_batches=1)
        fit.fit(Regression(net), DataLoader(data(8, 1), 8), DataLoader(data(8, 2), 8))
        return values(callback)

    # Central differences in float64 keep two thirds of the digits.
    torch.testing.assert_close(run(FiniteDifference()), run(None), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("curvature", [None, GaussNewton(outputs="net")])
def test_an_outer_step_may_be_decided_in_the_training_step(curvature: Any) -> None:
    class Deciding(HypergradientCallback):
        def should_update(self, trainer: Trainer, step: int) -> bool:
            return float(trainer.callback_metrics.get("train", 0.0)) > 0.0

    callback = exact(decay_all(), Deciding, curvature=curvature, solver=Neumann(num_terms=2))
    trainer(callback).fit(Regression(smooth()), DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
    assert callback.outer_steps == 4
