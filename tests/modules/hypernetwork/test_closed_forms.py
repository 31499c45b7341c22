"""Ridge regression: value, slope and outer gradient of every loop are the closed form's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_nested.hypernetworks import DiagonalResponse, FixedScale, GlobalNormal, LearnedScale
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.modules import STN, DeltaSTN, Global, Local, ResponseLoop, ResponseOptions, Simplified
from tests.modules.hypernetwork.problems import (
    SPECTRUM,
    X_VAL,
    Y_VAL,
    Ridge,
    X,
    Y,
    closed_form,
    found,
    ridge,
    sgd,
    steps,
)
from tests.trainers import trainer

# The loops' fixed points differ from the closed form by O(σ), as the response is not linear.
SMALL, NEAR = 1e-6, 3e-6


@pytest.mark.parametrize(
    ("loop", "log_decay", "number"),
    [
        (DeltaSTN(perturbation=LearnedScale(init=SMALL, signs=True)), -0.5, 100),
        # The others learn w₀ + b h with h not centred: σ and |h| must be of comparable size to converge.
        (STN(perturbation=LearnedScale(init=SMALL, signs=True)), NEAR, 500),
        (Local(perturbation=FixedScale(scale=SMALL, signs=True)), NEAR, 500),
        (
            Global(response_steps=500, perturbation=GlobalNormal(mean=NEAR, scale=SMALL, signs=True)),
            NEAR,
            501,
        ),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, ResponseLoop) else "",
)
def test_ridge_is_the_closed_form(loop: ResponseLoop, log_decay: float, number: int) -> None:
    centred = isinstance(loop, DeltaSTN)
    square = SMALL**2 if centred else SMALL**2 + log_decay**2
    rate, momentum = (0.4, 0.0) if centred else (0.15, 0.8)
    module = ridge(loop, log_decay, rate, rate / square, momentum)
    trainer(limit_val_batches=0).fit(module, steps(number), steps(1))
    w, slope, outer = closed_form(log_decay)
    assert (outer, float(slope.abs().max())) != pytest.approx((0.0, 0.0), abs=0.01)
    for got, expected in zip(found(module), (w, slope, outer), strict=True):
        torch.testing.assert_close(
            torch.as_tensor(got), torch.as_tensor(expected), rtol=0, atol=1e-6, check_dtype=False
        )
    assert module.last_report is not None
    assert module.last_report.hypergradient_norm == pytest.approx(abs(outer), abs=1e-5)


def test_simplified_learns_the_value_and_no_slope() -> None:
    module = ridge(Simplified(), -0.5, 0.4, 0.0, 0.0)
    trainer(limit_val_batches=0).fit(module, steps(100), steps(1))
    torch.testing.assert_close(found(module)[0], closed_form(-0.5)[0], rtol=0, atol=1e-12)
    assert found(module)[2] == 0.0


def test_delta_stn_needs_fewer_steps_than_stn() -> None:
    """To within 5 % of the slope at λ = −0.5, σ = 0.1, each with heavy ball tuned to its condition number."""

    class UntilClose(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            slope = closed_form(-0.5)[1]
            trainer.should_stop = float((found(pl_module)[1] - slope).norm() / slope.norm()) < 0.05

    def number(loop: ResponseLoop, square: float, momentum: float) -> int:
        module = ridge(loop, -0.5, 0.4, 0.4 / square, momentum)
        trainer(UntilClose(), limit_val_batches=0, max_epochs=-1).fit(module, steps(1), steps(1))
        return module.inner_steps

    perturbation = LearnedScale(init=0.1, signs=True)
    delta = number(DeltaSTN(perturbation=perturbation), 0.01, 0.0)
    assert 4 * delta <= min(number(STN(perturbation=perturbation), 0.26, m) for m in (0.6, 0.7, 0.8))


def test_one_decay_per_weight_of_an_orthogonal_design_is_the_closed_form() -> None:
    """XᵀX is diagonal, and so is the response."""
    net = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    module = Ridge(
        DiagonalResponse(net, 4), WeightDecay(per="parameter"),
        loop=DeltaSTN(perturbation=LearnedScale(init=SMALL, signs=True)),
        weights_optimizer=sgd(0.4), response_optimizer=sgd(0.4 / SMALL**2), outer_optimizer=sgd(0.0),
        scale_optimizer=sgd(0.0), options=ResponseOptions(log_every_n_outer_steps=0),
    )  # fmt: skip
    log_decays = torch.tensor([[-3.0, -2.0, -0.5, -0.1]], dtype=torch.float64)
    with torch.no_grad():
        module.vector.tensors[0].copy_(log_decays)
    trainer(limit_val_batches=0).fit(module, steps(100), steps(1))
    H = SPECTRUM + log_decays.exp()
    w = (X.T @ Y / 12) / H
    slopes = -log_decays.exp() * w / H
    torch.testing.assert_close(module.network.general_parameters()["weight"].detach(), w, rtol=0, atol=1e-6)
    torch.testing.assert_close(module.network.slopes[0].detach(), slopes, rtol=0, atol=1e-6)
    outer = (X_VAL.T @ (X_VAL @ w[0] - Y_VAL) / 50) * slopes[0]
    assert module.last_report is not None
    assert module.last_report.hypergradient_norm == pytest.approx(float(outer.norm()), abs=1e-5)


def test_the_outer_steps_find_the_optimum() -> None:
    module = ridge(DeltaSTN(perturbation=LearnedScale(init=1e-2, signs=True)), -0.5, 0.4, 0.4e4, 0.0)
    module.outer.optimizer.param_groups[0]["lr"] = 3.0
    trainer(limit_val_batches=0).fit(module, steps(600), steps(1))
    assert abs(closed_form(float(module.vector.flat().detach()))[2]) < 1e-3 < abs(closed_form(-0.5)[2])
