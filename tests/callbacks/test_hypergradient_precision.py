"""HypergradientCallback in half precision: scaled losses, fused optimizers, bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nested.hypergradient import Identity, Neumann
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.tuned_regression import Regression, ScalerAlone, data, sgd, smooth, values, weights
from tests.trainers import trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_scale_of_fp16_cancels(accumulate: int) -> None:
    def run(*, plugins: Any = None) -> tuple[Tensor, Tensor]:
        callback = exact(decay_all("tensor", init=1e-2), optimizer=sgd(1.0), solver=Neumann(num_terms=5))
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
        callback = exact(decay_all("tensor", init=0.5), optimizer=sgd(1.0), solver=Neumann(num_terms=3))
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


class Fused(Regression):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, fused=True)


def test_a_fused_optimizer_takes_the_scale_off_the_decay_too() -> None:
    def run(kind: type[Regression], **options: Any) -> Tensor:
        callback = exact(decay_all(init=0.5), optimizer=sgd(0.0), solver=Identity())
        module = kind(smooth())
        trainer(callback, **options).fit(module, DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
        return weights(module)

    plain, scaled = run(Regression), run(Fused, plugins=ScalerAlone())
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
def test_a_step_that_the_scaler_skips_leaves_the_weights(kind: Any) -> None:
    class Overflows(Regression):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = kind(self.parameters(), lr=0.1)
            return made

        def on_after_backward(self) -> None:
            next(self.parameters()).grad[0, 0] = torch.inf  # type: ignore[index]

    callback = exact(decay_all(init=0.5), optimizer=sgd(0.0), solver=Identity())
    module = Overflows(smooth())
    before = weights(module)
    fit = trainer(callback, plugins=ScalerAlone())
    fit.fit(module, DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
    assert torch.equal(weights(module), before)
    # Not because nothing was tuned.
    assert callback.outer_steps == 4
