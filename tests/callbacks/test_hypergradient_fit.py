"""HypergradientCallback in real fits: no trace, closed forms, accumulation, processes, resuming, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import (
    ConjugateGradient,
    DenseSolve,
    FiniteDifference,
    Identity,
    InverseSolver,
    Neumann,
    Nystrom,
)
from lightning_nested.hyperparameters import WeightDecay
from tests.cases import DOUBLE, ridge_data, ridge_solution


class Regression(LightningModule):
    """Half the mean squared error of a small network."""

    def __init__(self, net: nn.Module, rate: float = 0.05) -> None:
        super().__init__()
        self.net, self.rate, self.error = net, rate, MeanSquaredError()
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        loss = 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean()
        self.log("train", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        prediction = self.net(batch[0])
        self.error(prediction, batch[1])
        self.log("error", self.error)
        loss = 0.5 * ((prediction - batch[1]) ** 2).mean()
        self.log("val", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(callbacks=list(callbacks), **{"devices": 1, **defaults, **quiet, **options})


def data(n: int, seed: int, dtype: torch.dtype = DOUBLE) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=dtype)
    return TensorDataset(
        x, x.sum(1, keepdim=True) + 0.5 * torch.randn(n, 1, generator=generator, dtype=dtype)
    )


def smooth(dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def noisy() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)]
    return nn.Sequential(*layers)


def sgd(rate: float) -> Any:
    return lambda tensors: torch.optim.SGD(tensors, lr=rate)


def values(callback: HypergradientCallback) -> Tensor:
    return torch.cat([v.flatten().double() for v in callback.values().values()])


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


def test_one_outer_step_on_ridge_is_the_closed_form() -> None:
    xt, yt, xv, yv = ridge_data()
    log_decay = torch.tensor(-2.0, dtype=DOUBLE)
    net = nn.Linear(8, 1, bias=False).to(DOUBLE)
    net.weight.data = ridge_solution(log_decay).reshape(1, 8).clone()
    callback = HypergradientCallback(
        WeightDecay("model", init=float(log_decay.exp())),
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
    callback = HypergradientCallback(WeightDecay(), solver=Identity(), every_n_steps=3, warmup_steps=4)
    module = Regression(smooth())
    trainer(callback, max_epochs=2).fit(module, DataLoader(data(64, 1), 8), DataLoader(data(8, 2), 8))
    assert module.calls == 16
    assert callback.inner_steps == 16
    assert callback.outer_steps == 4  # at steps 4, 7, 10, 13


@pytest.mark.parametrize("curvature", [None, FiniteDifference()])
def test_accumulated_halves_equal_the_whole_batch(curvature: Any) -> None:
    def run(batch: int, accumulate: int) -> tuple[Tensor, Tensor]:
        callback = HypergradientCallback(
            WeightDecay("tensor", init=1e-2),
            optimizer=sgd(1.0),
            solver=Neumann(num_terms=5, step_size=0.1),
            curvature=curvature,
        )
        module = Regression(smooth())
        fit = trainer(callback, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
        fit.fit(module, DataLoader(data(32, 1), batch), DataLoader(data(16, 2), 16))
        assert callback.outer_steps == 4
        return values(callback), torch.cat([p.detach().flatten() for p in module.parameters()])

    # The same sums in another order; finite differences lose a third of the digits to cancellation.
    tolerance = 1e-10 if curvature is None else 1e-6
    for whole, halves in zip(run(8, 1), run(4, 2), strict=True):
        torch.testing.assert_close(halves, whole, rtol=tolerance, atol=1e-12)


SOLVERS: list[InverseSolver] = [
    Identity(),
    Neumann(num_terms=5),
    ConjugateGradient(max_iterations=8, damping=1.0),
    Nystrom(rank=6, damping=0.5),
    DenseSolve(damping=1.0),
]


def _fit_all_solvers(folder: Path, devices: int, index: int) -> None:
    callback = HypergradientCallback(
        WeightDecay("parameter", init=1e-2), optimizer=sgd(1.0), solver=SOLVERS[index]
    )
    module = Regression(smooth())
    processes = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
    # A distributed sampler deals the examples out in turn: rank 0 takes 0, 2, 4, …; two batches of 4 make one of 8.
    train, val = DataLoader(data(32, 1), 8 // devices), DataLoader(data(16, 2), 16 // devices)
    keep = _keeper(folder / f"{devices}_{index}", callback)
    fit = trainer(callback, keep, use_distributed_sampler=False, **processes)
    if devices == 2:
        train, val = _dealt(train), _dealt(val)
    fit.fit(module, train, val)


def _dealt(loader: DataLoader[Any]) -> Any:
    return _Dealt(loader)


class _Dealt:
    """Every other example of each joined batch, by rank, in order."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset, self.size = loader.dataset, loader.batch_size

    def __len__(self) -> int:
        return len(self.dataset) // (2 * self.size)  # type: ignore[arg-type,operator]

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        for start in range(0, len(self.dataset), 2 * self.size):  # type: ignore[arg-type,operator]
            rows = [self.dataset[i] for i in range(start + rank, start + 2 * self.size, 2)]  # type: ignore[operator]
            yield [torch.stack(column) for column in zip(*rows, strict=True)]


def _keeper(path: Path, callback: HypergradientCallback) -> Any:
    from lightning.pytorch import Callback

    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            torch.save((values(callback), weights), f"{path}_{trainer.global_rank}.pt")

    return Keep()


@pytest.mark.filterwarnings(
    "default"
)  # forking, and loaders of another kind, are commented on by the Trainer
@pytest.mark.parametrize("index", range(len(SOLVERS)), ids=[type(s).__name__ for s in SOLVERS])
def test_two_processes_equal_one_on_the_joined_batch(tmp_path: Path, index: int) -> None:
    _fit_all_solvers(tmp_path, 1, index)
    _fit_all_solvers(tmp_path, 2, index)
    one = torch.load(tmp_path / f"1_{index}_0.pt")
    first, second = (torch.load(tmp_path / f"2_{index}_{rank}.pt") for rank in (0, 1))
    assert not torch.allclose(one[0], torch.full_like(one[0], 1e-2), rtol=1e-6)  # the values moved
    for joined, a, b in zip(one, first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, joined, rtol=1e-10, atol=1e-13)


def test_resuming_at_an_epochs_end_is_bit_exact(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> tuple[Trainer, HypergradientCallback, Regression]:
        callback = HypergradientCallback(WeightDecay("parameter", init=1e-2), solver=Neumann(num_terms=3))
        module = Regression(smooth())
        fit = trainer(callback, max_epochs=epochs)
        # Three outer batches a round against four steps an epoch: the position matters.
        fit.fit(module, DataLoader(data(32, 1), 8), DataLoader(data(12, 2), 4), ckpt_path=resume)
        return fit, callback, module

    path = tmp_path / "half.ckpt"
    run(2)[0].save_checkpoint(path)
    torch.load(path, weights_only=True)
    _, whole, module = run(4)
    _, resumed, again = run(4, path)
    assert torch.equal(values(whole), values(resumed))
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        whole.outer.optimizer.state.values(), resumed.outer.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_submodule_by_name_leaves_the_inner_optimizer() -> None:
    callback = HypergradientCallback("net.2", optimizer=sgd(0.1), solver=Identity())
    module, fit = Regression(smooth()), trainer(callback)
    before = module.net[2].weight.detach().clone()  # type: ignore[index,union-attr]
    fit.fit(module, DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
    inner = {id(p) for g in fit.optimizers[0].param_groups for p in g["params"]}
    assert id(module.net[2].weight) not in inner  # type: ignore[index]
    assert not torch.equal(before, module.net[2].weight.detach())  # type: ignore[index,union-attr]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_bad_input_is_refused_with_a_cure() -> None:
    train, val = DataLoader(data(16, 1), 8), DataLoader(data(8, 2), 8)
    with pytest.raises(ValueError, match="at least one"):
        HypergradientCallback([])
    with pytest.raises(ValueError, match=r"net\.2"):
        trainer(HypergradientCallback("net.22")).fit(Regression(smooth()), train, val)
    with pytest.raises(MisconfigurationException, match="validation"):
        trainer(HypergradientCallback(WeightDecay())).fit(Regression(smooth()), train)

    class NoOuter(Regression):
        validation_step = LightningModule.validation_step  # type: ignore[assignment]

    with pytest.raises(MisconfigurationException, match="def outer_loss"):
        trainer(HypergradientCallback(WeightDecay())).fit(NoOuter(smooth()), train)
    manual = Regression(smooth())
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="NestedModule"):
        trainer(HypergradientCallback(WeightDecay())).fit(manual, train, val)

    class Blind(Regression):
        def outer_loss(self, batch: Any) -> Tensor:
            return torch.zeros(())

    with pytest.raises(MisconfigurationException, match="graph"):
        trainer(HypergradientCallback(WeightDecay())).fit(Blind(smooth()), train, val)


@pytest.mark.filterwarnings("ignore:HypergradientCallback skipped")
def test_non_finite_outer_losses_are_skipped_counted_and_limited() -> None:
    class Broken(Regression):
        def outer_loss(self, batch: Any) -> Tensor:
            return self.net(batch[0]).mean() * float("nan")

    train, val = DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8)
    callback = HypergradientCallback(WeightDecay())
    trainer(callback).fit(Broken(smooth()), train, val)
    assert callback.skipped_steps == 4
    assert callback.outer_steps == 0
    with pytest.raises(FloatingPointError, match="max_skipped=2"):
        trainer(HypergradientCallback(WeightDecay(), max_skipped=2)).fit(Broken(smooth()), train, val)
