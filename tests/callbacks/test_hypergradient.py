"""HypergradientCallback: closed forms, schedule, decays, what it tunes and logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.hypergradient import ConjugateGradient, GaussNewton, Identity, Neumann
from lightning_nested.hyperparameters import ExampleWeights
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.tuned_regression import Regression, data, noisy, sgd, smooth, values, weights
from tests.cases import DOUBLE, ridge_data, ridge_solution
from tests.trainers import trainer


def test_one_outer_step_on_ridge_is_the_closed_form() -> None:
    xt, yt, xv, yv = ridge_data()
    log_decay = torch.tensor(-2.0, dtype=DOUBLE)
    net = nn.Linear(8, 1, bias=False).to(DOUBLE)
    net.weight.data = ridge_solution(log_decay).reshape(1, 8).clone()
    callback = exact(
        decay_all("model", init=float(log_decay.exp())),
        optimizer=sgd(0.5),
        solver=ConjugateGradient(tolerance=1e-13),
    )
    module = Regression(net, rate=1e-9)
    train, val = TensorDataset(xt, yt[:, None]), TensorDataset(xv, yv[:, None])
    trainer(callback).fit(module, DataLoader(train, 12), DataLoader(val, 200))
    assert module.calls == 1
    # The value has ten digits; decay is exp(raw).
    expected = torch.exp(log_decay - 0.5 * 0.4007387704)
    torch.testing.assert_close(values(callback)[0], expected, rtol=1e-9, atol=0)


def test_training_step_runs_once_a_batch_and_outer_steps_follow_the_schedule() -> None:
    callback = exact(decay_all(), solver=Identity(), every_n_steps=3, warmup_steps=4)
    module = Regression(smooth())
    trainer(callback, max_epochs=2).fit(module, DataLoader(data(64, 1), 8), DataLoader(data(8, 2), 8))
    assert module.calls == 16
    assert callback.inner_steps == 16
    assert callback.outer_steps == 4  # at steps 4, 7, 10, 13


def test_a_submodule_by_name_leaves_the_inner_optimizer() -> None:
    callback = exact("net.2", optimizer=sgd(0.1), solver=Identity())
    module, fit = Regression(smooth()), trainer(callback)
    before = module.net[2].weight.detach().clone()  # type: ignore[index,union-attr]
    fit.fit(module, DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
    inner = {id(p) for g in fit.optimizers[0].param_groups for p in g["params"]}
    assert id(module.net[2].weight) not in inner  # type: ignore[index]
    assert not torch.equal(before, module.net[2].weight.detach())  # type: ignore[index,union-attr]


@pytest.mark.filterwarnings("ignore:HypergradientCallback skipped")
def test_non_finite_outer_losses_are_skipped_counted_and_limited() -> None:
    class Broken(Regression):
        def outer_loss(self, batch: Any) -> Tensor:
            return self.net(batch[0]).mean() * float("nan")

    train, val = DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8)
    callback = exact(decay_all())
    trainer(callback).fit(Broken(smooth()), train, val)
    assert callback.skipped_steps == 4
    assert callback.outer_steps == 0
    with pytest.raises(FloatingPointError, match="max_skipped=2"):
        trainer(exact(decay_all(), max_skipped=2)).fit(Broken(smooth()), train, val)


class Grouped(Regression):
    """Two parameter groups of different rates with a scheduler, and one frozen tensor."""

    penalty: float | None = None

    def configure_optimizers(self) -> Any:
        self.net[0].bias.requires_grad_(False)  # type: ignore[index,union-attr]
        groups = [
            {"params": self.net[2].parameters(), "lr": 0.02},  # type: ignore[index,union-attr]
            {"params": self.net[0].parameters(), "lr": 0.05},  # type: ignore[index,union-attr]
        ]
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.penalty is None:
            return loss
        squares = [(p**2).sum() for p in self.parameters() if p.requires_grad]
        return loss + 0.5 * self.penalty * torch.stack(squares).sum()


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_decay_is_the_written_out_penalty_under_clipping_groups_and_schedulers(
    clip: float | None,
) -> None:
    def run(*callbacks: Any, penalty: float | None) -> tuple[Tensor, Tensor]:
        module = Grouped(smooth())
        module.penalty = penalty
        fit = trainer(*callbacks, max_epochs=2, gradient_clip_val=clip)
        fit.fit(module, DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
        return weights(module), module.net[0].bias.detach()  # type: ignore[index,union-attr,return-value]

    untuned = exact(decay_all("model", init=0.5), optimizer=sgd(0.0), every_n_steps=3)
    ours, frozen = run(untuned, penalty=None)
    expected, _ = run(penalty=0.5)
    plain, _ = run(penalty=None)
    # Eight steps of the same sums in another order.
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(ours, plain, rtol=1e-3)  # the decay did something
    assert torch.equal(frozen, smooth()[0].bias.detach())  # type: ignore[index]


def test_what_is_logged(tmp_path: Path) -> None:
    callback = exact(
        [decay_all("model", init=1e-2), decay_all("parameter", name="second")],
        solver=Neumann(num_terms=2),
        log_every_n_outer_steps=2,
    )
    fit = trainer(callback, logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    fit.fit(Regression(smooth()), DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
    events = EventAccumulator(str(fit.logger.log_dir), size_guidance={"histograms": 0})  # type: ignore[union-attr,arg-type]
    events.Reload()
    scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for name in (
        "hypergradient_norm",
        "residual",
        "iterations",
        "identity_cosine",
        "outer_loss",
        "skipped_steps",
    ):
        assert len(scalars[f"hypergradient/{name}"]) == 2, name  # outer steps 1 and 3
    assert all(-1 <= c <= 1 for c in scalars["hypergradient/identity_cosine"])
    assert all(v > 0 for v in scalars["hyperparameters/weight_decay"])
    assert any(tag.startswith("hyperparameters/second") for tag in events.Tags()["histograms"])


class Classified(LightningModule):
    """Weighted examples, a dropout and batch statistics; the index comes third."""

    example_weights: ExampleWeights | None = None

    def __init__(self) -> None:
        super().__init__()
        self.net = noisy()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = ((self.net(batch[0]) - batch[1]) ** 2).flatten()
        if self.example_weights is not None:
            losses = losses * self.example_weights(batch[2])
        return losses.mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return ((self.net(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("curvature", [None, GaussNewton(outputs="net")])
def test_example_weights_reach_the_module_that_reads_them(curvature: Any, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    x, y = data(32, 1, torch.float32).tensors
    train = torch.utils.data.TensorDataset(x, y, torch.arange(32))
    callback = exact(
        ExampleWeights(32),
        curvature=curvature,
        warmup_steps=2,
        outer_dataloader=lambda: DataLoader(data(16, 2, torch.float32), 16),
    )
    module, fit = Classified(), trainer(callback, max_epochs=3, logger=CSVLogger(tmp_path))
    fit.fit(module, DataLoader(train, 8, shuffle=True))
    assert callback.outer_steps == 10
    moved = callback.values()["example_weights"] != 0.5
    assert moved.all()  # every example was seen by a step
    assert module.example_weights is None  # a later fit without the callback is a plain one


class Unfreeze(Callback):
    """What a finetuning callback does: new parameters for the optimizer after the first epoch."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.net[0].requires_grad_(False)  # type: ignore[index,union-attr]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            pl_module.net[0].requires_grad_(True)  # type: ignore[index,union-attr]


@pytest.mark.parametrize("per", ["model", "tensor", "parameter"])
def test_parameters_unfrozen_during_training_are_decayed_and_part_of_the_curvature(per: Any) -> None:
    callback = exact(decay_all(per, init=0.1), optimizer=sgd(0.1), solver=Neumann(num_terms=2))
    module = Regression(smooth())
    first = module.net[0].weight.detach().clone()  # type: ignore[index,union-attr]
    fit = trainer(Unfreeze(), callback, max_epochs=2)
    fit.fit(module, DataLoader(data(32, 1), 8), DataLoader(data(16, 2), 16))
    assert callback.outer_steps == 8
    assert len(callback.outer_loop.parameters) == 4
    assert not torch.equal(first, module.net[0].weight.detach())  # type: ignore[index,union-attr]
    if per != "model":
        names = callback.values()
        (new,) = (v for key, v in names.items() if key.endswith("net.0.weight"))
        assert (new != 0.1).any()


class Newton(Regression):
    """A closure that is called many times a step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    def outer_loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).mean() * float("nan")


@pytest.mark.filterwarnings("ignore:HypergradientCallback skipped")
def test_a_closure_called_many_times_is_one_attempt() -> None:
    callback = exact(decay_all())
    trainer(callback).fit(Newton(smooth()), DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
    assert callback.skipped_steps == callback.inner_steps == 4
