"""HypergradientCallback with its defaults: it looks ahead, keeps its pace, and leaves the training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import InverseSolver, Neumann
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.trainer import isolation
from tests.callbacks.test_hypergradient_processes import _Dealt
from tests.callbacks.tuned_regression import Regression, ScalerAlone, data, noisy, smooth, values, weights
from tests.trainers import trainer

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


class Trained(Regression):
    """A regression with the optimizer that it is given."""

    def __init__(self, net: nn.Module, optimizer: str = "sgd") -> None:
        super().__init__(net)
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


def loaders(dtype: torch.dtype = torch.float64) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Eight steps an epoch, three outer batches a round."""
    return DataLoader(data(64, 1, dtype), 8), DataLoader(data(12, 2, dtype), 4)


def frequent(per: Any = "tensor", **options: Any) -> HypergradientCallback:
    """The defaults, with an outer step at every third of these short fits."""
    return HypergradientCallback(WeightDecay(per), overhead=10.0, every_n_steps=3, **options)


class SaveAfter(Callback):
    """Writes a checkpoint at the end of an epoch."""

    def __init__(self, path: Path, epoch: int = 1) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def equal(a: Any, b: Any) -> bool:
    """Compare nested states bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(
    ("optimizer", "per"), [*((name, "tensor") for name in OPTIMIZERS), ("adamw", "parameter")]
)
def test_resuming_at_an_epochs_end_is_bit_exact(optimizer: str, per: str, tmp_path: Path) -> None:
    """Weights, decays, radius, mean gradient and factors."""

    def run(*callbacks: Callback, resume: Path | None = None) -> tuple[HypergradientCallback, Trained]:
        callback, module = frequent(per), Trained(smooth(), optimizer)
        trainer(callback, *callbacks, max_epochs=4).fit(module, *loaders(), ckpt_path=resume)
        return callback, module

    path = tmp_path / "half.ckpt"
    whole, module = run(SaveAfter(path))
    torch.load(path, weights_only=True)
    resumed, again = run(resume=path)
    assert whole.outer_steps == resumed.outer_steps == 10
    assert torch.equal(weights(module), weights(again))
    assert equal(whole.state_dict(), resumed.state_dict())
    forecast = whole.state_dict()["plan"]["forecast"]
    assert forecast["radius"] != 0.1
    assert forecast["fisher"]["observations"] > 5


def test_a_checkpoint_written_after_the_fit_has_the_statistics(tmp_path: Path) -> None:
    def fit(*callbacks: Callback, epochs: int, resume: Any = None) -> tuple[Trainer, HypergradientCallback]:
        callback, found = frequent(), trainer(*callbacks, max_epochs=epochs)
        found.callbacks.append(callback)  # type: ignore[attr-defined]
        found.fit(Trained(smooth()), *loaders(), ckpt_path=resume)
        return found, callback

    during, after = tmp_path / "during.ckpt", tmp_path / "after.ckpt"
    fit(SaveAfter(during), epochs=2)[0].save_checkpoint(after)
    states = [torch.load(p, weights_only=True)["callbacks"] for p in (during, after)]
    (first,), (second,) = ([s for key, s in state.items() if "Hyper" in key] for state in states)
    assert equal(first["plan"], second["plan"])
    assert second["plan"]["forecast"]["mean"] is not None


def test_a_run_that_is_resumed_for_longer_goes_on_tuning(tmp_path: Path) -> None:
    """The rate of the outer optimizer ends at zero with the run, not with the run that was saved."""
    path = tmp_path / "short.ckpt"
    short = trainer(frequent(), max_epochs=2)
    short.fit(Trained(smooth()), *loaders())
    short.save_checkpoint(path)
    callback = frequent()
    trainer(callback, max_epochs=4).fit(Trained(smooth()), *loaders(), ckpt_path=path)
    before = torch.load(path, weights_only=True)["callbacks"]
    (saved,) = (s for key, s in before.items() if "Hyper" in key)
    assert saved["outer"]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.0, abs=0.1)
    fresh = frequent()
    trainer(fresh, max_epochs=4).fit(Trained(smooth()), *loaders())
    rates = [c.outer.optimizer.param_groups[0]["lr"] for c in (callback, fresh)]
    assert rates[0] == pytest.approx(rates[1], abs=0.05)
    assert not torch.allclose(
        values(callback), saved["outer"]["hyperparameters"]["weight_decay"]["tensor"].exp()
    )


class Dropped(Callback):
    """Freezes the first layer, and unfreezes it after two epochs, in the optimizer's own group or in a new one."""

    def __init__(self, group: bool) -> None:
        self.group = group

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.net[0].requires_grad_(False)  # type: ignore[index,union-attr]
        if self.group:
            inner = trainer.optimizers[0].param_groups[0]
            inner["params"] = [p for p in inner["params"] if p.requires_grad]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 2:
            pl_module.net[0].requires_grad_(True)  # type: ignore[index,union-attr]
            if self.group:
                trainer.optimizers[0].add_param_group({"params": pl_module.net[0].parameters()})  # type: ignore[index,union-attr]


def deep() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("group", [False, True], ids=["same group", "new group"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_layers_unfrozen_in_the_middle_are_tuned(optimizer: str, group: bool) -> None:
    callback, module = frequent(), Trained(deep(), optimizer)
    fit = trainer(Dropped(group), callback, max_epochs=4)
    fit.fit(module, *loaders())
    assert callback.outer_steps == 10
    found = callback.values()
    assert len(found) == 3
    assert callback.plan.units.keys() >= {"net.2.weight", "net.4.weight"}
    # The new decay starts from the run as well, not at 1e-4.
    assert all(0.01 < float(v) < 30 for v in found.values()) or optimizer == "sgd"
    own = 0.1 if optimizer == "adamw" else 0.0
    assert [g["weight_decay"] for g in fit.optimizers[0].param_groups] == [own] * (1 + group)


def test_a_run_with_layers_unfrozen_is_resumed_bit_exactly(tmp_path: Path) -> None:
    def run(*callbacks: Callback, resume: Path | None = None) -> tuple[HypergradientCallback, Trained]:
        callback, module = frequent(), Trained(deep(), "adamw")
        trainer(Dropped(False), callback, *callbacks, max_epochs=5).fit(module, *loaders(), ckpt_path=resume)
        return callback, module

    class Again(Dropped):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.net[0].requires_grad_(True)  # type: ignore[index,union-attr]

    path = tmp_path / "late.ckpt"
    whole, module = run(SaveAfter(path, epoch=3))
    callback, again = frequent(), Trained(deep(), "adamw")
    trainer(Again(False), callback, max_epochs=5).fit(again, *loaders(), ckpt_path=path)
    assert torch.equal(weights(module), weights(again))
    assert equal(whole.state_dict()["plan"], callback.state_dict()["plan"])


def _fit_in_processes(folder: Path, devices: int, optimizer: str, per: str) -> None:
    callback, module = frequent(per), Trained(smooth(), optimizer)
    processes = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
    train, val = DataLoader(data(64, 1), 8 // devices), DataLoader(data(16, 2), 8 // devices)

    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            state = callback.state_dict()["plan"]["forecast"]
            kept = values(callback), weights(pl_module), state, str(callback.plan.pace)
            torch.save(kept, folder / f"{devices}_{trainer.global_rank}.pt")

    fit = trainer(callback, Keep(), use_distributed_sampler=False, max_epochs=2, **processes)
    dealt = (_Dealt(train), _Dealt(val)) if devices == 2 else (train, val)
    fit.fit(module, *dealt)


@pytest.mark.filterwarnings(
    "default"
)  # forking, and loaders of another kind, are commented on by the Trainer
@pytest.mark.parametrize(
    ("optimizer", "per"), [("sgd", "tensor"), ("adamw", "tensor"), ("adamw", "parameter")]
)
def test_two_processes_equal_one_on_the_joined_batch(optimizer: str, per: str, tmp_path: Path) -> None:
    _fit_in_processes(tmp_path, 1, optimizer, per)
    _fit_in_processes(tmp_path, 2, optimizer, per)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert equal(first, second)
    assert one[2]["radius"] == first[2]["radius"] != 0.1
    assert one[2]["fisher"]["observations"] == first[2]["fisher"]["observations"] > 2
    for a, joined in zip(first[:2], one[:2], strict=True):
        torch.testing.assert_close(a, joined, rtol=1e-10, atol=1e-13)


@pytest.mark.filterwarnings("ignore:HypergradientCallback skipped")
def test_an_outer_batch_that_is_not_finite_is_skipped() -> None:
    x, y = data(12, 2).tensors
    x[5] = float("nan")  # in the second of three batches
    callback, module = frequent(), Trained(smooth())
    trainer(callback, max_epochs=3, limit_val_batches=0).fit(
        module, loaders()[0], DataLoader(TensorDataset(x, y), 4)
    )
    # steps 2, 5, 8, …, 23; the second of three batches in each round
    assert (callback.outer_steps, callback.skipped_steps) == (5, 3)
    assert weights(module).isfinite().all()


class Reports(Regression):
    """Logs, counts its buffers and draws random numbers in training."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("drawn", torch.rand(()))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("outer_steps", [1, 8])
def test_evaluations_of_the_training_loss_leave_no_trace(outer_steps: int) -> None:
    """Weights, buffers, logs and random numbers are those of plain training, with decays too small to matter."""

    def run(*callbacks: Any) -> list[Any]:
        seed_everything(3, verbose=False)
        module, fit = Reports(noisy()), trainer(*callbacks, max_epochs=3)
        train, val = data(64, 1, torch.float32), data(32, 2, torch.float32)
        fit.fit(module, DataLoader(train, 8, shuffle=True), DataLoader(val, 8))
        return [dict(module.state_dict()), dict(fit.callback_metrics), torch.get_rng_state(), module.calls]

    options: dict[str, Any] = {"every_n_steps": 3} if outer_steps == 8 else {"overhead": 1e-9}
    callback = HypergradientCallback(
        WeightDecay(init=1e-30), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **options
    )
    plain, tuned = run(), run(callback)
    assert callback.outer_steps == outer_steps
    tuned[1] = {key: value for key, value in tuned[1].items() if "hyper" not in key}
    assert equal(plain, tuned)


class Counted(Trained):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        COUNTS.append(self.trainer.global_step)
        return super().training_step(batch, batch_idx)


COUNTS: list[int] = []  # where no isolation reaches


def test_the_training_loss_is_evaluated_once_more_in_an_outer_step() -> None:
    COUNTS.clear()
    callback = frequent(self_check=False)
    trainer(callback, max_epochs=2).fit(Counted(smooth()), *loaders())
    outer = [step for step in set(COUNTS) if COUNTS.count(step) > 1]
    assert sorted(outer) == [1, 4, 7, 10, 13]
    assert len(COUNTS) == 16 + callback.outer_steps


def test_accumulated_batches_are_one_batch() -> None:
    """Two batches of four a step are one of eight."""

    def run(size: int, accumulate: int) -> tuple[HypergradientCallback, Trained]:
        callback, module = frequent(), Trained(smooth(), "adamw")
        train = DataLoader(data(64, 1), size)
        fit = trainer(callback, max_epochs=2, accumulate_grad_batches=accumulate)
        fit.fit(module, train, DataLoader(data(16, 2), 16))
        return callback, module

    (one, module), (two, again) = run(8, 1), run(4, 2)
    assert one.outer_steps == two.outer_steps == 5
    torch.testing.assert_close(values(two), values(one), rtol=1e-9, atol=0)
    torch.testing.assert_close(weights(again), weights(module), rtol=1e-9, atol=1e-12)
    forecasts = [c.state_dict()["plan"]["forecast"] for c in (one, two)]
    for a, b in zip(*(f["fisher"]["factors"] for f in forecasts), strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-14)


def test_clipping_clips_the_decayed_gradient() -> None:
    callback, module = frequent(), Trained(smooth())
    rate, clip, before = 0.05, 1e-3, weights(module)
    trainer(callback, max_epochs=2, gradient_clip_val=clip).fit(module, *loaders())
    assert callback.outer_steps == 5
    # Sixteen steps of momentum 0.9, none longer than rate · clip/(1 − 0.9).
    assert float((weights(module) - before).norm()) <= 16 * rate * clip * 10


class Newton(Regression):
    """A closure that is called many times a step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


def test_lbfgs_trains_and_is_tuned() -> None:
    callback, module = frequent(), Newton(smooth())
    trainer(callback, max_epochs=2).fit(module, *loaders())
    assert (callback.inner_steps, callback.outer_steps, callback.skipped_steps) == (16, 5, 0)
    assert weights(module).isfinite().all()
    assert values(callback).isfinite().all()


class Penalized(Trained):
    """Differentiates within the training step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].requires_grad_()
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        loss: Tensor = ((self.net(x) - batch[1]) ** 2).mean() + 0.1 * slope.square().mean()
        return loss


def test_a_step_that_differentiates_is_evaluated_again() -> None:
    callback = frequent()
    trainer(callback, max_epochs=2).fit(Penalized(smooth()), *loaders())
    assert callback.outer_steps == 5
    assert callback.state_dict()["plan"]["forecast"]["radius"] != 0.1


def test_validation_data_is_needed() -> None:
    class Outer(Trained):
        validation_step = LightningModule.validation_step  # type: ignore[assignment]

        def outer_loss(self, batch: Any) -> Tensor:
            return self.training_step(batch, 0)

    with pytest.raises(MisconfigurationException, match="The outer loss needs validation data"):
        trainer(HypergradientCallback(WeightDecay())).fit(Outer(smooth()), loaders()[0])


def test_a_second_fit_goes_on_and_another_module_starts_again() -> None:
    callback = frequent()
    module = Trained(smooth())
    trainer(callback, max_epochs=2).fit(module, *loaders())
    before = callback.state_dict()["plan"]["forecast"]["fisher"]["observations"]
    trainer(callback, max_epochs=2).fit(module, *loaders())
    assert callback.state_dict()["plan"]["forecast"]["fisher"]["observations"] > before
    fresh, other, same = frequent(), Trained(smooth(), "adam"), Trained(smooth(), "adam")
    trainer(callback, max_epochs=2).fit(other, *loaders())
    trainer(fresh, max_epochs=2).fit(same, *loaders())
    assert torch.equal(values(callback), values(fresh))
    assert torch.equal(weights(other), weights(same))


def test_the_scale_of_fp16_cancels() -> None:
    def run(**options: Any) -> tuple[HypergradientCallback, Trained]:
        callback, module = frequent(), Trained(smooth(), "adamw")
        trainer(callback, max_epochs=2, **options).fit(module, *loaders())
        return callback, module

    (plain, module), (scaled, again) = run(), run(plugins=[ScalerAlone()])
    torch.testing.assert_close(values(scaled), values(plain), rtol=1e-10, atol=0)
    torch.testing.assert_close(weights(again), weights(module), rtol=1e-10, atol=1e-13)
    assert scaled.outer_steps == 5


@pytest.mark.parametrize("solver", [None, Neumann(num_terms=1)])
def test_the_module_is_searched_only_where_its_graph_is_needed(
    solver: InverseSolver | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products run checkpointed forwards again; the default solver makes none."""
    searches, search = [], isolation.untouched_networks
    monkeypatch.setattr(
        isolation, "untouched_networks", lambda *a, **k: searches.append(1) or search(*a, **k)
    )
    callback = frequent(solver=solver, warmup_steps=0)
    trainer(callback, folder=tmp_path, max_epochs=1).fit(Trained(smooth()), *loaders())
    assert callback.outer_steps == 3
    assert len(searches) == (0 if solver is None else 3)
