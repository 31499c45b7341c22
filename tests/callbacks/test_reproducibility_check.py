"""ReproducibilityCheck: a convex training, a chaotic one, and one that draws numbers of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import LyapunovCallback, ReproducibilityCheck
from tests.trainers import trainer

STEPS = 60


class Descent(LightningModule):
    """Gradient steps on ½ a w², which contract by 1 − lr a."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(1.0, 2.0, 50))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * self.w.square().sum() + 0 * batch[0].sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Logistic(Descent):
    """Gradient steps that are the logistic map w ← 4w(1 − w), whose exponent is log 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.1, 0.7, 50))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        w = self.w
        return ((4 * w**3 - 4.5 * w**2) / 3 / 0.1).sum() + 0 * batch[0].sum()


class Drawn(Descent):
    """Noise from a stream that no seed sets."""

    stream = torch.Generator().manual_seed(0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (
            super().training_step(batch, batch_idx) + (torch.randn(50, generator=self.stream) * self.w).sum()
        )


def run(kind: type[Descent], folder: Path, *callbacks: Any, **options: Any) -> ReproducibilityCheck:
    check = ReproducibilityCheck(**options)
    fit = trainer(check, *callbacks, max_epochs=-1, max_steps=STEPS, folder=folder)
    module = kind()
    fit.fit(module, DataLoader(TensorDataset(torch.zeros(4, 1))))
    assert fit.global_step == STEPS
    return check


def test_a_contraction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = run(Descent, tmp_path)
    assert check.results["verdict"] == "reproducible"
    # In float32 each step also rounds: the weights shrink with their difference.
    assert check.results["growth"] == pytest.approx(math.log(0.9), abs=0.05)
    assert json.loads((tmp_path / "reproducibility.json").read_text()) == check.results
    assert "Is this training reproducible? Yes: a repeat ends in the same bits" in capsys.readouterr().out


def test_chaos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = run(Logistic, tmp_path, LyapunovCallback(align=0))
    assert check.results["verdict"] == "on this machine"
    assert check.results["same_bits"]
    assert check.results["difference"] > 0.1
    assert check.results["exponent"] == pytest.approx(math.log(2), abs=0.1)
    said = capsys.readouterr().out
    assert "On this machine only" in said
    assert "the first Lyapunov exponent is +0.6" in said


def test_a_short_repeat_of_chaos_shows_its_exponent(tmp_path: Path) -> None:
    """Before the difference is as large as the weights."""
    check = run(Logistic, tmp_path, length=0.2, tolerance=1e-12)
    assert check.results["steps"] == 12
    # Mean over 50 orbits; the largest differences count more than the mean logarithm does.
    assert check.results["growth"] == pytest.approx(math.log(2), abs=0.25)


def test_random_numbers_that_no_seed_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = run(Drawn, tmp_path)
    assert check.results["verdict"] == "not reproducible"
    assert "ends in other bits" in capsys.readouterr().out


def test_the_run_itself_is_unchanged(tmp_path: Path) -> None:
    def fitted(*callbacks: Any) -> Tensor:
        torch.manual_seed(0)
        module = Descent()
        data = DataLoader(TensorDataset(torch.randn(8, 1)), shuffle=True)
        trainer(*callbacks, folder=tmp_path).fit(module, data)
        return torch.cat([module.w.detach(), torch.rand(3)])

    assert torch.equal(fitted(), fitted(ReproducibilityCheck()))


class Shuffled(Descent):
    """Its end depends on the order of the examples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (batch[0].sum() * self.w).sum()


def test_a_loader_with_a_generator_of_its_own_gives_each_repeat_the_same_order(tmp_path: Path) -> None:
    loader = DataLoader(
        TensorDataset(torch.arange(8.0)), shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    check = ReproducibilityCheck()
    trainer(check, max_epochs=-1, max_steps=12, folder=tmp_path).fit(Shuffled(), loader)
    assert check.results["same_bits"]
    assert check.results["verdict"] == "reproducible"


class Diverging(Descent):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e30)


def test_weights_that_are_not_finite_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = run(Diverging, tmp_path)
    assert check.results["same_bits"]
    assert check.results["verdict"] == "not finite"
    assert "Lower the learning rate" in capsys.readouterr().out

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (path,) = tmp_path.rglob("reproducibility.json")
    assert json.loads(path.read_text(), parse_constant=refuse)["difference"] is None
