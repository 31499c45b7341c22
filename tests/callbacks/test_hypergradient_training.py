"""HypergradientCallback beside what a user's training already does: decay, clipping, groups, precision, restarts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import (
    ConjugateGradient,
    DenseSolve,
    GaussNewton,
    Neumann,
    implicit_hypergradient,
)
from lightning_nested.hyperparameters import ExampleWeights, WeightDecay
from tests.callbacks.test_hypergradient_fit import Regression, data, noisy, sgd, smooth, trainer, values
from tests.cases import DOUBLE


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Grouped(Regression):
    """Two parameter groups of different rates with a scheduler, and one frozen tensor."""

    penalty: float | None = None

    def configure_optimizers(self) -> Any:
        self.net[0].bias.requires_grad_(False)  # type: ignore[index,union-attr]
        groups = [
            {"params": self.net[2].parameters(), "lr": 0.02},  # type: ignore[index,union-attr]
            {"params": self.net[0].parameters(), "lr": 0.05},  # type: ignore[index,union-attr]
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.penalty is None:
            return loss
        squares = [(p**2).sum() for p in self.parameters() if p.requires_grad]
        return loss + 0.5 * self.penalty * torch.stack(squares).sum()


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_decay_is_the_written_out_penalty_under_clipping_groups_and_schedulers(
    clip: float | None,
) -> None:
    def run(*callbacks: Any, penalty: float | None) -> tuple[Tensor, Tensor]:
        module = Grouped(smooth())
        module.penalty = penalty
        fit = trainer(*callbacks, max_epochs=2, gradient_clip_val=clip)
        fit.fit(module, DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
        return weights(module), module.net[0].bias.detach()  # type: ignore[index,union-attr,return-value]

    untuned = HypergradientCallback(WeightDecay("model", init=0.5), optimizer=sgd(0.0), every_n_steps=3)
    ours, frozen = run(untuned, penalty=None)
    expected, _ = run(penalty=0.5)
    plain, _ = run(penalty=None)
    # Eight steps of the same sums in another order.
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(ours, plain, rtol=1e-3)  # the decay did something
    assert torch.equal(frozen, smooth()[0].bias.detach())  # type: ignore[index]


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
    callback = HypergradientCallback(
        WeightDecay("parameter", init=100.0),
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


class ScalerAlone(MixedPrecision):
    """The gradient scaler of fp16 without its autocast, so that float64 can tell whether the scale cancels."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))

    def forward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_scale_of_fp16_cancels(accumulate: int) -> None:
    def run(*, plugins: Any = None) -> tuple[Tensor, Tensor]:
        callback = HypergradientCallback(
            WeightDecay("tensor", init=1e-2), optimizer=sgd(1.0), solver=Neumann(num_terms=5)
        )
        module = Regression(smooth())
        fit = trainer(callback, plugins=plugins, gradient_clip_val=0.5, accumulate_grad_batches=accumulate)
        fit.fit(module, DataLoader(data(32, 1), 8), DataLoader(data(16, 2), 16))
        assert callback.outer_steps == 4 // accumulate
        assert callback.skipped_steps == 0
        return values(callback), weights(module)

    # A power of two scales without rounding; the power iteration's stopping rule sees other digits.
    for plain, scaled in zip(run(), run(plugins=ScalerAlone()), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-13)


def test_bf16_gives_the_hypergradient_to_bf16() -> None:
    def run(precision: Any) -> Tensor:
        callback = HypergradientCallback(
            WeightDecay("tensor", init=0.5), optimizer=sgd(1.0), solver=Neumann(num_terms=3)
        )
        module = Regression(smooth(torch.float32), rate=1e-3)
        fit = trainer(callback, precision=precision, limit_train_batches=1)
        fit.fit(
            module, DataLoader(data(64, 1, torch.float32), 64), DataLoader(data(64, 2, torch.float32), 64)
        )
        return values(callback).log() - torch.tensor(0.5).log()

    full, half = run("32-true"), run("bf16-mixed")
    assert float(full.norm()) > 1e-2
    # bf16 keeps 8 bits: 2⁻⁸ a rounding, and a product passes about ten of them.
    assert float((half - full).norm() / full.norm()) < 0.05


def test_restart_brings_new_weights_and_an_optimizer_without_memory() -> None:
    seen: list[Tensor] = []

    class Watch(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, module: LightningModule, batch: Any, idx: int
        ) -> None:
            seen.append(weights(module))
            self.memory = len(trainer.optimizers[0].state)
            if idx in (0, 2):  # after restarts at outer steps 2 and 4, and before the first step
                assert self.memory == 0

    callback = HypergradientCallback(WeightDecay(), restart_every=2, solver=Neumann(num_terms=2))
    trainer(Watch(), callback).fit(
        Regression(smooth()), DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8)
    )
    assert len(seen) == 4
    # A restart moves every weight, and to other values than the first ones.
    assert not torch.isclose(seen[2], seen[0]).any()
    assert not torch.isclose(seen[2], seen[1]).any()


def test_what_is_logged(tmp_path: Path) -> None:
    callback = HypergradientCallback(
        [WeightDecay("model", init=1e-2), WeightDecay("parameter", name="second")],
        solver=Neumann(num_terms=2),
        log_every_n_outer_steps=2,
    )
    fit = trainer(callback, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    fit.fit(Regression(smooth()), DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
    events = EventAccumulator(str(fit.logger.log_dir), size_guidance={"histograms": 0})  # type: ignore[union-attr,arg-type]
    events.Reload()
    scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for name in (
        "hypergradient_norm",
        "residual",
        "iterations",
        "identity_cosine",
        "outer_loss",
        "skipped_steps",
    ):
        assert len(scalars[f"hypergradient/{name}"]) == 2, name  # outer steps 1 and 3
    assert all(-1 <= c <= 1 for c in scalars["hypergradient/identity_cosine"])
    assert all(v > 0 for v in scalars["hyperparameters/weight_decay"])
    assert any(tag.startswith("hyperparameters/second") for tag in events.Tags()["histograms"])


class Classified(LightningModule):
    """Weighted examples, a dropout and batch statistics; the index comes third."""

    example_weights: ExampleWeights | None = None

    def __init__(self) -> None:
        super().__init__()
        self.net = noisy()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = ((self.net(batch[0]) - batch[1]) ** 2).flatten()
        if self.example_weights is not None:
            losses = losses * self.example_weights(batch[2])
        return losses.mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return ((self.net(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("curvature", [None, GaussNewton(outputs="net")])
def test_example_weights_reach_the_module_that_reads_them(curvature: Any, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    x, y = data(32, 1, torch.float32).tensors
    train = torch.utils.data.TensorDataset(x, y, torch.arange(32))
    callback = HypergradientCallback(
        ExampleWeights(32),
        curvature=curvature,
        warmup_steps=2,
        outer_dataloader=lambda: DataLoader(data(16, 2, torch.float32), 16),
    )
    module, fit = Classified(), trainer(callback, max_epochs=3, logger=CSVLogger(tmp_path))
    fit.fit(module, DataLoader(train, 8, shuffle=True))
    assert callback.outer_steps == 10
    moved = callback.values()["example_weights"] != 0.5
    assert moved.all()  # every example was seen by a step
    assert module.example_weights is None  # a later fit without the callback is a plain one
