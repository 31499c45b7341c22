"""HypergradientCallback leaves the run as it was: buffers, metrics, attributes, logs, random numbers."""

from __future__ import annotations

import copy
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from lightning_nested.hypergradient import FiniteDifference, LookAhead, Neumann
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.tuned_regression import Checkpointed, Regression, data, noisy, sgd, weights
from tests.trainers import trainer


def test_a_callback_whose_hyperparameters_do_nothing_leaves_no_trace() -> None:
    def run(*callbacks: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        seed_everything(3, verbose=False)
        module, fit = Regression(noisy()), trainer(*callbacks, max_epochs=3)
        train, val = data(64, 1, torch.float32), data(32, 2, torch.float32)
        fit.fit(module, DataLoader(train, 16, shuffle=True), DataLoader(val, 8))
        return module.state_dict(), fit.callback_metrics, torch.get_rng_state()

    callback = exact(decay_all("parameter", init=1e-30), optimizer=sgd(0.0), solver=Neumann(num_terms=3))
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

    callback = exact(decay_all("parameter", init=1e-30), optimizer=sgd(0.0), solver=Neumann(num_terms=2))
    plain, tuned = run(), run(callback)
    assert callback.outer_steps == 8
    assert torch.equal(plain[0], tuned[0])
    assert torch.equal(plain[3], tuned[3])
    for before, after in ((plain[1], tuned[1]), (plain[2], tuned[2])):
        assert all(torch.equal(value, after[key]) for key, value in before.items())


class Deep(Regression):
    """Collects in every way, in training and in validation, and trains with teachers that follow the network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.teacher = copy.deepcopy(net).requires_grad_(False)
        self.teachers = [copy.deepcopy(net).requires_grad_(False), copy.deepcopy(net)]
        self.centre, self.array, self.kept = (
            torch.zeros(1),
            np.zeros(1),
            {"outputs": [[], {}], "sum": [SumMetric()]},
        )

    def collect(self, loss: Tensor) -> None:
        with torch.no_grad():
            for k, teacher in enumerate([self.teacher, *self.teachers]):
                for p, q in zip(self.net.parameters(), teacher.parameters(), strict=True):
                    (q.data if k == 1 else q).mul_(0.9).add_(p, alpha=0.1)
            self.centre.mul_(0.9).add_(loss.detach())
        self.array += 1.0
        self.kept["outputs"][0].append(1)
        self.kept["outputs"][1][len(self.kept["outputs"][1])] = 1
        self.kept["sum"][0].update(1.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch[0] += self.centre
        loss = super().training_step(batch, batch_idx)
        self.collect(loss)
        return loss + sum(
            ((self.net(batch[0]) - t(batch[0])) ** 2).mean() for t in [self.teacher, *self.teachers]
        )

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        self.collect(loss)
        (self.net(batch[0]).mean() * 0.0 + self.centre).backward()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)

    def found(self) -> list[Any]:
        networks = [self.net, self.teacher, *self.teachers]
        numbers = [p.detach().tolist() for net in networks for p in net.state_dict().values()]
        return [
            numbers,
            self.centre.tolist(),
            self.array.tolist(),
            self.kept["outputs"],
            self.kept["sum"][0].sum_value,
        ]


@pytest.mark.parametrize("curvature", [None, FiniteDifference()], ids=["graph", "repeats"])
def test_isolation_is_deep(curvature: Any) -> None:
    def run(*callbacks: Any) -> list[Any]:
        seed_everything(3, verbose=False)
        module = Deep(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)))
        train, val = data(32, 1, torch.float32), data(16, 2, torch.float32)
        # no_grad of the Trainer's own validation would refuse backward
        trainer(*callbacks, max_epochs=2, limit_val_batches=0).fit(
            module, DataLoader(train, 8), DataLoader(val, 8)
        )
        return module.found()

    callback = exact(
        decay_all("parameter", init=1e-30),
        optimizer=sgd(0.0),
        solver=Neumann(num_terms=2, step_size=1e-3),
        curvature=curvature,
    )
    plain, tuned = run(), run(callback)
    assert callback.outer_steps == 8
    assert plain == tuned


class Reports(Regression):
    """Writes what it sees of the Trainer, by every way around ``self.log``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.seen: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.logger is not None
        assert isinstance(self.logger, CSVLogger)
        folder = Path(self.trainer.log_dir or "")
        self.see([batch_idx, folder, Path(self.logger.log_dir), self.logger.version, self.trainer.validating])
        self.logger.log_metrics({"outside": float(batch_idx)}, step=batch_idx)
        self.logger.experiment.log_metrics({"outside": 1.0}, 0)
        self.logger.save()
        self.trainer.should_stop = True
        return super().validation_step(batch, batch_idx)

    def see(self, what: list[Any]) -> None:
        SEEN.append(what)


SEEN: list[list[Any]] = []  # where no isolation reaches


def test_an_outer_evaluation_sees_the_trainer_and_writes_nothing(tmp_path: Path) -> None:
    SEEN.clear()
    callback = exact(decay_all(), log_every_n_outer_steps=0)
    train, val = data(32, 1, torch.float32), data(24, 2, torch.float32)
    fit = trainer(
        callback,
        folder=tmp_path,
        limit_val_batches=0,
        logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1),
        max_epochs=2,
    )
    fit.fit(Reports(noisy()), DataLoader(train, 8), DataLoader(val, 8))
    assert callback.outer_steps == 8
    folder = tmp_path / "lightning_logs" / "version_0"
    assert [[i % 3, folder, folder, 0, True] for i in range(8)] == SEEN
    metrics = folder / "metrics.csv"
    assert not metrics.exists() or "outside" not in metrics.read_text()


class Fails(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 2:
            raise KeyError("outputs")
        return super().validation_step(batch, batch_idx)


def test_an_exception_says_that_the_callback_called() -> None:
    train, val = data(32, 1, torch.float32), data(16, 2, torch.float32)
    with pytest.raises(KeyError) as caught:
        trainer(exact(decay_all())).fit(Fails(noisy()), DataLoader(train, 8), DataLoader(val, 8))
    text = "".join(traceback.format_exception(caught.value))
    assert "Called by HypergradientCallback at inner step 2, for the outer loss of batch 0" in text


class FailsAgain(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.calls == 1:
            raise KeyError("outputs")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"curvature": FiniteDifference()}, "FiniteDifference"), ({"at": LookAhead()}, "the outer step")],
)
def test_an_exception_says_that_a_step_was_repeated(options: Any, what: str) -> None:
    train, val = data(32, 1, torch.float32), data(16, 2, torch.float32)
    callback = exact(decay_all(), **options)
    with pytest.raises(KeyError) as caught:
        trainer(callback).fit(FailsAgain(noisy()), DataLoader(train, 8), DataLoader(val, 8))
    text = "".join(traceback.format_exception(caught.value))
    assert f"Called again for {what} at training step 0, on a batch that training_step has seen" in text
