"""Tuned options where a window is broken off: steps not made, skipped outer steps, restarts, exceptions, other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import Current, Identity
from lightning_nested.hyperparameters import LearningRate, WeightDecay
from lightning_nested.hyperparameters.transforms import Exp
from tests.callbacks.test_hypergradient_options import RATES, Given, loaders
from tests.callbacks.tuned_regression import data, sgd, values
from tests.trainers import trainer


def plain(params: Any) -> torch.optim.Optimizer:
    """Return SGD without a decay of its own."""
    return torch.optim.SGD(params, lr=0.1)


def flat(found: Any) -> list[Tensor]:
    """Return all tensors of a nested state."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return [tensor for part in found for tensor in flat(part)]
    return [found] if isinstance(found, Tensor) else []


@pytest.mark.filterwarnings("ignore:HypergradientCallback made no outer step")
def test_the_products_of_a_window_are_not_in_the_curvature_of_the_decays() -> None:
    def factors(horizon: int) -> list[Tensor]:
        callback = HypergradientCallback(
            [WeightDecay(init=0.1), LearningRate(transform=Exp(), horizon=horizon)],
            every_n_steps=7,
            warmup_steps=7,
            optimizer=sgd(0.0),
            self_check=False,
        )
        trainer(callback, max_steps=7).fit(Given(plain), *loaders({}))
        return flat(callback.plan._kept["fisher"])

    for one, four in zip(factors(1), factors(5), strict=True):
        torch.testing.assert_close(one, four, rtol=0, atol=0)


def test_losses_of_a_step_that_is_not_made_do_not_count() -> None:
    """As in a run without the batch of that step."""
    x, y = data(36, 1).tensors

    def derivative(skip: bool) -> tuple[list[Any], Tensor]:
        class Module(Given):
            def optimizer_step(
                self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
            ) -> None:
                if skip and batch_idx == 5:
                    optimizer_closure()
                else:
                    optimizer.step(closure=optimizer_closure)

        found: list[Any] = []

        class Watched(HypergradientCallback):
            def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
                if self.outer._pending is not None:
                    found[:] = [p.clone() for p in self.outer._pending]
                super().on_after_backward(trainer, pl_module)

        keep = torch.ones(36, dtype=torch.bool)
        if not skip:
            keep[20:24] = False
        callback = Watched(
            LearningRate(transform=Exp(), horizon=4 if skip else 3),
            every_n_steps=10**6,
            warmup_steps=8 if skip else 7,
            optimizer=sgd(0.0),
            self_check=False,
        )
        module = Module(RATES["momentum"])
        trainer(callback).fit(
            module, DataLoader(TensorDataset(x[keep], y[keep]), 4), DataLoader(data(9, 2), 9)
        )
        return found, torch.cat([p.detach().flatten() for p in module.parameters()])

    (left, right), (ours, theirs) = zip(derivative(True), derivative(False), strict=True)
    torch.testing.assert_close(ours, theirs)
    assert left
    torch.testing.assert_close(left, right, rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:HypergradientCallback skipped the outer step")
def test_a_skipped_outer_step_moves_nothing() -> None:
    """The decays' derivative is held when that of the rate turns out not to be finite."""

    class Module(Given):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for p in self.parameters():
                assert p.grad is not None
                p.grad.nan_to_num_(0.0, 0.0, 0.0)

    class Once(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 2:
                for p in pl_module.parameters():
                    assert p.grad is not None
                    p.grad.fill_(torch.inf)

    callback = HypergradientCallback(
        [WeightDecay(init=0.1), LearningRate()],
        at=Current(),
        solver=Identity(),
        every_n_steps=100,
        warmup_steps=3,
        optimizer=sgd(1.0),
        self_check=False,
    )
    trainer(Once(), callback, max_steps=5).fit(Module(plain), *loaders({}))
    assert (callback.skipped_steps, callback.outer_steps) == (1, 0)
    torch.testing.assert_close(values(callback), torch.full_like(values(callback), 0.1))


@pytest.mark.filterwarnings(r"ignore:`?\.fit\(ckpt_path")
def test_a_checkpoint_of_an_exception_has_the_users_rate(tmp_path: Path) -> None:
    class Module(Given):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.trainer.global_step == 3:
                raise KeyError("guard")

    callback = HypergradientCallback(
        LearningRate(init=0.2, transform=Exp()), every_n_steps=2, warmup_steps=2, optimizer=sgd(0.0)
    )
    fit = trainer(callback, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    module = Module(RATES["sgd"])
    with pytest.raises(KeyError, match="guard"):
        fit.fit(module, *loaders({}))
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=False)
    (group,) = saved["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.1


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_run_that_is_resumed_with_another_rate_keeps_the_tuned_one(tmp_path: Path) -> None:
    """Lightning restores the optimizer's own rate, so that the tuned one is relative to that."""
    used: list[float] = []

    def watched(rate: float) -> Any:
        def make(params: Any) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(params, lr=rate)
            optimizer.register_step_post_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
            return optimizer

        return make

    def callback() -> HypergradientCallback:
        rate = LearningRate(init=0.2, transform=Exp())
        return HypergradientCallback(rate, every_n_steps=1, warmup_steps=1, optimizer=sgd(0.0))

    first = trainer(callback(), max_epochs=-1, max_steps=3)
    first.fit(Given(watched(0.1)), *loaders({}))
    first.save_checkpoint(tmp_path / "first.ckpt")
    used.clear()
    trainer(callback(), max_epochs=-1, max_steps=5).fit(
        Given(watched(0.05)), *loaders({}), ckpt_path=tmp_path / "first.ckpt"
    )
    assert used == [0.2, 0.2]


def test_another_class_of_a_known_name_is_refused_at_the_start() -> None:
    class SGD(torch.optim.SGD):
        pass

    fit = trainer(HypergradientCallback(LearningRate(), every_n_steps=2, warmup_steps=5))
    with pytest.raises(MisconfigurationException, match=r"must be known: .*\. Got tests\..*\.SGD"):
        fit.fit(Given(lambda p: SGD(p, lr=0.1)), *loaders({}))


def test_a_restart_ends_the_window() -> None:
    callback = HypergradientCallback(
        LearningRate(transform=Exp(), horizon=3),
        every_n_steps=2,
        warmup_steps=1,
        restart_every=1,
        optimizer=sgd(0.0),
        self_check=False,
    )
    seen: list[Any] = []

    class Look(Callback):
        made = 0

        def on_train_batch_start(self, *_: Any) -> None:
            if callback.outer_steps > self.made:
                self.made = callback.outer_steps
                assert callback._options._tangents is not None
                seen.append(callback._options._tangents.frame)

    trainer(callback, Look(), max_epochs=3).fit(Given(RATES["sgd"]), *loaders({}))
    assert len(seen) > 5
    assert all(frame is None for frame in seen)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("odd", [0, 1])
def test_a_step_without_a_loss_is_no_fault_of_the_default(odd: int) -> None:
    class Module(Given):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 == odd else super().training_step(batch, batch_idx)

    callback = HypergradientCallback(WeightDecay(), every_n_steps=1, warmup_steps=1)
    trainer(callback, max_steps=7).fit(Module(plain), *loaders({}))
    assert callback.outer_steps > 1
