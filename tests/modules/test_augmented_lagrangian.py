"""Training under constraints finds the solutions of problems that have one in closed form."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.games import ConstrainedLoss
from lightning_nested.modules import AugmentedLagrangian
from tests.cases import DOUBLE
from tests.trainers import trainer


class Program(AugmentedLagrangian):
    """½wᵀQw − bᵀw subject to Aw ≤ a and Ew = e, made so that w, λ and ν solve it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(num_inequalities=2, num_equalities=1, penalty=2.0, **options)
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
        root = 0.3 * draw(4, 4)
        self.quadratic = torch.eye(4, dtype=DOUBLE) + root @ root.mT
        self.rows = nn.functional.normalize(draw(3, 4), dim=1)
        self.answer, self.prices = draw(4), torch.tensor([0.7, 0.0, -0.4], dtype=DOUBLE)
        self.linear = self.quadratic @ self.answer + self.rows.mT @ self.prices
        # The second inequality has room: its multiplier is 0.
        self.bounds = self.rows @ self.answer + torch.tensor([0.0, 0.5, 0.0], dtype=DOUBLE)
        self.point = nn.Parameter(torch.zeros(4, dtype=DOUBLE))
        self.multipliers.double()

    def constrained_loss(self, batch: Any) -> ConstrainedLoss:
        w: Tensor = self.point
        rest = self.rows @ w - self.bounds
        value = 0.5 * w @ self.quadratic @ w - self.linear @ w
        return ConstrainedLoss(loss=value, inequalities=rest[:2], equalities=rest[2:])


def data(steps: int) -> Any:
    return DataLoader(TensorDataset(torch.zeros(steps, 1)), batch_size=1)


def descent(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.25)


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_a_quadratic_program(update: Any) -> None:
    ascent = {"multipliers": partial(torch.optim.SGD, lr=0.5)}
    module = Program(optimizer=descent, optimizers=ascent, update=update)
    fit = trainer(max_steps=300, max_epochs=-1)
    fit.fit(module, data(300))
    torch.testing.assert_close(module.point.detach(), module.answer, rtol=0, atol=1e-8)
    inequality, equality = (p.detach() for p in module.multipliers.parameters())
    torch.testing.assert_close(torch.cat([inequality, equality]), module.prices, rtol=0, atol=1e-8)
    assert float(fit.callback_metrics["violation"]) < 1e-8
    assert float(fit.callback_metrics["multiplier"]) == pytest.approx(0.7, abs=1e-7)


def test_multipliers_of_inequalities_never_fall_below_zero() -> None:
    """Momentum would carry them there."""
    momentum = {"multipliers": partial(torch.optim.SGD, lr=1.0, momentum=0.9)}
    lowest = []

    class Watched(Program):
        def on_game_update(self) -> None:
            assert self.multipliers.inequality is not None
            lowest.append(float(self.multipliers.inequality.detach().min()))

    trainer(max_steps=30, max_epochs=-1).fit(Watched(optimizer=descent, optimizers=momentum), data(30))
    assert min(lowest) == 0.0
    assert max(lowest) > 0.0 or len(lowest) == 30


class SmallWeights(AugmentedLagrangian):
    """Linear regression with ‖w‖² ≤ r: ridge regression, whose decay is the multiplier."""

    def __init__(self, limit: float) -> None:
        super().__init__(
            num_inequalities=1,
            optimizer=descent,
            optimizers={"multipliers": partial(torch.optim.SGD, lr=0.2)},
        )
        self.network, self.limit = nn.Linear(3, 1, bias=False).double(), limit
        self.multipliers.double()

    def constrained_loss(self, batch: Any) -> ConstrainedLoss:
        x, y = batch
        loss = 0.5 * (self.network(x) - y).square().mean()
        return ConstrainedLoss(loss=loss, inequalities=self.network.weight.square().sum() - self.limit)


def test_a_limit_on_the_norm_is_ridge_regression_with_the_multiplier_as_decay() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator, dtype=DOUBLE)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=DOUBLE)
    module = SmallWeights(limit=1.0)
    loader = DataLoader(TensorDataset(x, y), batch_size=40)
    trainer(max_steps=400, max_epochs=-1).fit(module, loader)
    assert module.multipliers.inequality is not None
    decay = 2 * module.multipliers.inequality.detach()  # of ½‖w‖²
    ridge = torch.linalg.solve(x.mT @ x / 40 + decay * torch.eye(3, dtype=DOUBLE), x.mT @ y / 40)
    torch.testing.assert_close(module.network.weight.detach().mT, ridge, rtol=0, atol=1e-8)
    assert float(ridge.square().sum()) == pytest.approx(1.0, abs=1e-8)


def test_a_resumed_run_has_its_multipliers(tmp_path: Path) -> None:
    module = Program(optimizer=descent)
    first = trainer(max_steps=10, max_epochs=-1, folder=tmp_path)
    first.fit(module, data(10))
    first.save_checkpoint(tmp_path / "last.ckpt")
    again = Program(optimizer=descent)
    trainer(max_steps=10, max_epochs=-1).fit(
        again, data(10), ckpt_path=tmp_path / "last.ckpt", weights_only=False
    )
    for before, after in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after)


def test_a_wrong_number_of_constraints() -> None:
    class Wrong(SmallWeights):
        def constrained_loss(self, batch: Any) -> ConstrainedLoss:
            return ConstrainedLoss(loss=self.network.weight.sum(), equalities=self.network.weight.sum())

    with pytest.raises(ValueError, match="num_inequalities=0"):
        trainer().fit(Wrong(1.0), data(1))


def test_weights_without_an_optimizer() -> None:
    with pytest.raises(MisconfigurationException, match="weights"):
        trainer().fit(Program(), data(1))
