"""The monitor tells trained from untrained responses, and changes no run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_nested.hypernetworks import LearnedScale
from lightning_nested.hyperparameters import LabelSmoothing, WeightDecay
from lightning_nested.modules import DeltaSTN, ResponseMonitor, ResponseOptions
from tests.modules.hypernetwork.problems import Small, batches, ridge, steps, tensors
from tests.trainers import trainer


def test_the_monitor_tells_a_trained_response_from_an_untrained_one() -> None:
    logged: dict[str, float] = {}

    class Read(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            logged.update({k: float(v) for k, v in trainer.callback_metrics.items()})

    for number, trained in ((1, False), (60, True)):
        module = ridge(
            DeltaSTN(train_steps=1, perturbation=LearnedScale(init=1e-3, signs=True)), -0.5, 0.4, 4e5, 0.0
        )
        module.options = ResponseOptions(monitor=ResponseMonitor(every_n_outer_steps=1, num_steps=5))
        nn.init.normal_(module.network.decoder)
        trainer(Read(), limit_val_batches=0).fit(module, steps(number), steps(1))
        gap = logged["response/inner_loss"] - logged["response/refined_inner_loss"]
        assert (gap < 1e-12) == trained
        assert (logged["response/implicit_cosine"] > 0.999) == trained


class Logging(Small):
    """Logs, and counts with a metric, in the inner loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__(tuned=[WeightDecay(per="model", init=1e-2), LabelSmoothing()], **options)
        self.examples = MeanMetric()

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        loss = super().inner_loss(batch, values)
        self.examples.update(float(len(batch[0])))
        self.log("train_loss", loss)
        self.logged.append(float(loss.detach()))
        return loss


def test_a_run_goes_the_same_way_whether_it_is_watched_or_not() -> None:
    """Also what the inner loss logs and counts is that of the training loss at λ alone."""
    runs = []
    for monitor in (None, ResponseMonitor(every_n_outer_steps=1, num_steps=2)):
        torch.manual_seed(0)
        module = Logging(
            loop=DeltaSTN(train_steps=1, response_every=1), options=ResponseOptions(monitor=monitor)
        )
        module.logged = []
        fit = trainer(limit_val_batches=0, max_epochs=2)
        fit.fit(module, batches(), batches())
        assert module.examples.update_count == module.inner_steps == 6
        step = 2 if monitor is None else 2 + 1 + 2 + 1  # both losses; at λ̂, two steps and after them
        assert len(module.logged) == 6 * step
        assert float(fit.callback_metrics["train_loss"]) == pytest.approx(module.logged[-step])
        runs.append(tensors(module))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
