"""HypergradientCallback leaves the run as it was: buffers, metrics, attributes, logs, random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import Neumann
from lightning_nested.hyperparameters import WeightDecay
from tests.callbacks.tuned_regression import Checkpointed, Regression, data, noisy, sgd, weights
from tests.trainers import trainer


def test_a_callback_whose_hyperparameters_do_nothing_leaves_no_trace() -> None:
    def run(*callbacks: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        seed_everything(3, verbose=False)
        module, fit = Regression(noisy()), trainer(*callbacks, max_epochs=3)
        train, val = data(64, 1, torch.float32), data(32, 2, torch.float32)
        fit.fit(module, DataLoader(train, 16, shuffle=True), DataLoader(val, 8))
        return module.state_dict(), fit.callback_metrics, torch.get_rng_state()

    callback = HypergradientCallback(
        WeightDecay("parameter", init=1e-30), optimizer=sgd(0.0), solver=Neumann(num_terms=3)
    )
    plain, tuned = run(), run(callback)
    assert callback.outer_steps == 12
    for key, value in plain[0].items():
        assert torch.equal(value, tuned[0][key]), key
    for key, value in plain[1].items():
        assert torch.equal(value, tuned[1][key]), key
    assert torch.equal(plain[2], tuned[2])


class Collecting(Regression):
    """Gathers the outputs of an epoch, counts, and keeps the last batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.outputs: list[Tensor] = []
        self.seen = {"batches": 0}

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        self.outputs.append(loss)
        self.seen["batches"] += 1
        self.last = batch
        return loss

    def on_validation_epoch_end(self) -> None:
        self.log("collected", torch.stack(self.outputs).sum())
        self.log("batches", float(self.seen["batches"]))
        self.outputs.clear()


class Augmented(Regression):
    """Augments on the device, and only in training."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            batch[0] = batch[0] + torch.randn_like(batch[0])
        return batch


class OtherSignature(Regression):
    def validation_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().validation_step(batch, 0)


class SharedGenerator(Regression):
    """The recipe for reproducible loaders: one generator for all of them."""

    def setup(self, stage: str) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def train_dataloader(self) -> Any:
        return DataLoader(data(32, 1, torch.float32), 8, shuffle=True, generator=self.generator)

    def val_dataloader(self) -> Any:
        return DataLoader(data(16, 2, torch.float32), 8, shuffle=True, generator=self.generator)


AWKWARD: dict[str, Any] = {
    "checkpointed batch norm and dropout": lambda: Regression(Checkpointed(noisy())),
    "collected outputs": lambda: Collecting(noisy()),
    "augmentation on the device": lambda: Augmented(noisy()),
    "validation_step without batch_idx": lambda: OtherSignature(noisy()),
    "one generator": lambda: SharedGenerator(noisy()),
}


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("name", AWKWARD)
def test_no_trace_is_left(name: str) -> None:
    def run(*callbacks: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        seed_everything(3, verbose=False)
        module, fit = AWKWARD[name](), trainer(*callbacks, max_epochs=2)
        loaders: tuple[Any, ...] = ()
        if name != "one generator":
            loaders = (
                DataLoader(data(32, 1, torch.float32), 8, shuffle=True),
                DataLoader(data(16, 2, torch.float32), 8),
            )
        fit.fit(module, *loaders)
        return weights(module), dict(module.named_buffers()), fit.callback_metrics, torch.get_rng_state()

    callback = HypergradientCallback(
        WeightDecay("parameter", init=1e-30), optimizer=sgd(0.0), solver=Neumann(num_terms=2)
    )
    plain, tuned = run(), run(callback)
    assert callback.outer_steps == 8
    assert torch.equal(plain[0], tuned[0])
    assert torch.equal(plain[3], tuned[3])
    for before, after in ((plain[1], tuned[1]), (plain[2], tuned[2])):
        assert all(torch.equal(value, after[key]) for key, value in before.items())
