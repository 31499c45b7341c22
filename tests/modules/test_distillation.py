"""DistillationModule: its derivative, fresh and warm starts, what it trains and leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.demos import DistillationReport
from lightning_nested.modules import DistillationModule, ImageClassifier
from tests.trainers import trainer

SMALL: dict[str, Any] = {"network_options": {"hidden": [5]}, "unrolled_steps": 3, "inner_rate": 0.5}


def digits() -> DigitsDataModule:
    return DigitsDataModule(train_size=120, val_size=60, batch_size=40)


def fitted(**options: Any) -> tuple[DistillationModule, Any]:
    seed_everything(0, verbose=False)
    module = DistillationModule(**{**SMALL, **options})
    fit = trainer(max_epochs=-1, max_steps=6)
    fit.fit(module, datamodule=digits())
    return module, fit


def test_the_derivative_goes_through_every_inner_step() -> None:
    module = DistillationModule(**SMALL, learn_rate=True).double()
    x, y = torch.rand(20, 1, 8, 8).double(), torch.arange(20) % 10
    start = module.fresh_weights(3)

    def outer() -> torch.Tensor:
        net = copy.deepcopy(module.network)
        net.load_state_dict(start)
        net.requires_grad_(True)
        for _ in range(3):
            loss = cross_entropy(net(module.images), module.labels)
            for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
                p.data -= float(module.inner_rate) * g
        return cross_entropy(net(x), y).detach()

    end = module.trained(start, graph=True)
    loss = cross_entropy(torch.func.functional_call(module.network, end, (x,)), y)
    torch.testing.assert_close(loss.detach(), outer(), rtol=1e-12, atol=0)
    for tensor in (module.images, module.log_rate):
        (found,) = torch.autograd.grad(loss, tensor, retain_graph=True)
        values, step = [], 1e-6
        for by in (step, -2 * step, step):
            tensor.data.view(-1)[0] += by
            values.append(outer())
        expected = float(values[0] - values[1]) / (2 * step)
        # Rounding of a loss of about 2 over 2e-6.
        assert float(found.view(-1)[0]) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_images_and_rate_are_trained_and_the_network_follows_them() -> None:
    module, fit = fitted(learn_rate=True)
    trained = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(module.images), id(module.log_rate)}
    assert module.inner_rate != 0.5
    assert fitted()[0].inner_rate == 0.5
    assert module.images.shape == (10, 1, 8, 8)
    assert module.labels.tolist() == list(range(10))
    # The network that the last step has trained.
    assert cross_entropy(module(module.images), module.labels).item() < 2.3


def test_fresh_starts_are_those_of_the_step_and_warm_ones_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = DistillationModule.fresh_weights
    monkeypatch.setattr(
        DistillationModule, "fresh_weights", lambda self, seed: (seen.append(seed), original(self, seed))[1]
    )

    def drawn(restart_every: int | None) -> int:
        seen.clear()
        fitted(restart_every=restart_every)
        # Each of two epochs validates one more.
        return len(seen) - 2

    assert [drawn(1), drawn(3), drawn(None)] == [6, 2, 0]


def test_validation_logs_a_fresh_network_beside_the_warm_one_and_changes_neither() -> None:
    module, fit = fitted(restart_every=None)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    metrics = fit.validate(module, datamodule=digits(), verbose=False)[0]
    assert set(metrics) == {"val_loss", "val_accuracy", "val_warm_loss", "val_warm_accuracy"}
    assert metrics["val_loss"] != metrics["val_warm_loss"]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_step_whose_inner_training_diverges_moves_nothing() -> None:
    module, _ = fitted(inner_rate=1e30, restart_every=None)
    torch.manual_seed(0)
    seed_everything(0, verbose=False)
    assert torch.equal(module.images, DistillationModule(**SMALL).images)
    assert module.inner_rate == pytest.approx(1e30, rel=1e-5)
    assert all(bool(p.isfinite().all()) for p in module.network.parameters())


def test_the_report_needs_the_module(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="needs a DistillationModule and a datamodule"):
        trainer(DistillationReport(), folder=tmp_path).fit(ImageClassifier(), datamodule=digits())


def test_any_module_can_be_the_network() -> None:
    module, _ = fitted(
        network=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), network_options=None, images_per_class=2
    )
    assert len(module.images) == 20
