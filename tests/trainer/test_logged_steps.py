"""One clock in a run of nested optimization: outer steps are logged at the steps of everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.hypergradient import Neumann
from lightning_nested.modules import Implicit, LoopOptions, NestedModule
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.tuned_regression import Regression, data, sgd, smooth
from tests.modules.game.test_logged_steps import Rows
from tests.trainers import trainer

LOADERS = DataLoader(data(24, 1), batch_size=4), DataLoader(data(8, 2), batch_size=4)
WINDOW = {"val_check_interval": 3, "log_every_n_steps": 1, "max_epochs": 2}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_outer_steps_of_the_callback_stand_at_optimizer_steps(accumulate: int) -> None:
    class Counts(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("mine", float(self.global_step))
            return super().training_step(batch, batch_idx)

    logger, solver = Rows(), Neumann(num_terms=2)
    callback = exact(decay_all("model"), optimizer=sgd(0.1), solver=solver, log_every_n_outer_steps=1)
    fit = trainer(
        callback, LearningRateMonitor(), logger=logger, accumulate_grad_batches=accumulate, **WINDOW
    )
    fit.fit(Counts(smooth()), *LOADERS)
    steps = list(range(12 // accumulate))
    assert logger.points("mine") == [(k, k) for k in steps]
    assert logger.steps("hypergradient/skipped_steps") == steps
    assert set(logger.steps("error")) | set(logger.steps("lr-SGD")) <= set(steps)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_outer_steps_of_the_module_stand_at_its_batches(accumulate: int) -> None:
    class Nested(NestedModule):
        def __init__(self) -> None:
            super().__init__(
                [decay_all("model")],
                gradient=Implicit(solver=Neumann(num_terms=2)),
                inner_optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
                outer_optimizer=sgd(0.1),
                loop=LoopOptions(accumulate_grad_batches=accumulate, log_every_n_outer_steps=1),
            )
            self.net: nn.Module = smooth()

        def inner_loss(self, batch: Any) -> Tensor:
            return 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean()

        outer_loss = inner_loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.log("mine", float(6 * self.current_epoch + batch_idx))

    logger = Rows()
    fit = trainer(LearningRateMonitor("step"), logger=logger, **WINDOW)
    fit.fit(Nested(), *LOADERS)
    assert logger.points("mine") == [(k, k) for k in range(12)]
    assert logger.steps("lr-SGD") == list(range(12))
    assert logger.steps("hypergradient/skipped_steps") == list(range(accumulate - 1, 12, accumulate))
    assert logger.steps("val_loss") == [2, 5, 8, 11]


def test_a_metric_of_the_modules_own_keeps_its_value() -> None:
    """The progress bar's outer_loss is no metric: the module may log, and monitor, one of that name."""

    class Logs(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("outer_loss", 7.0)
            return super().training_step(batch, batch_idx)

    callback = exact(decay_all("model"), optimizer=sgd(0.1), solver=Neumann(num_terms=2))
    fit = trainer(callback, max_epochs=1)
    fit.fit(Logs(smooth()), *LOADERS)
    assert float(fit.callback_metrics["outer_loss"]) == 7.0
    assert callback.last_report is not None
    shown = fit.progress_bar_metrics
    assert set(shown) >= {"outer_loss", "weight_decay"}
    assert shown["outer_loss"] != 7.0
