"""HypergradientCallback with parameters in shards (FSDP2): two processes equal one, and what cannot be had is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import ConjugateGradient, Current, FiniteDifference, Identity, Neumann
from lightning_nested.hyperparameters import Hyperparameter, WeightDecay
from lightning_nested.hyperparameters.scalar import Scalar
from tests.callbacks.test_hypergradient_processes import _dealt
from tests.callbacks.tuned_regression import Regression, data, sgd, smooth, values
from tests.trainers import trainer

# Forking, and loaders of another kind, are commented on by the Trainer.
pytestmark = pytest.mark.filterwarnings("default")


def in_two_processes(run: Callable[..., None], *arguments: Any) -> None:
    """Run a function in two processes that Lightning takes for those of a launcher: by itself it restarts the script."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start_processes(_ranked, (run, port, *arguments), nprocs=2, start_method="fork")


def _ranked(rank: int, run: Callable[..., None], port: int, *arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    run(*arguments)


def strategy() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


class Sharded(Regression):
    """Its training loss has a factor that is tuned, if there is one; the outermost layers stay gathered."""

    factor: Any = None

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)  # type: ignore[index]
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if self.factor is None else loss * self.factor.value()


class Adam(Sharded):
    """Trained by AdamW with a decay of its own."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def decay() -> list[Hyperparameter]:
    return [WeightDecay(init=1e-2, include=("*",))]


def both() -> list[Hyperparameter]:
    return [*decay(), Scalar("factor", 1.0)]


RUNS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "by default": (Sharded, lambda: [WeightDecay()], {}),
    "identity": (Sharded, decay, {"solver": Identity(), "optimizer": sgd(1.0)}),
    "neumann": (Sharded, decay, {"solver": Neumann(num_terms=5), "optimizer": sgd(1.0)}),
    "cg": (Sharded, both, {"solver": ConjugateGradient(max_iterations=6, damping=1.0), "optimizer": sgd(1.0)}),
    "adamw": (Adam, both, {}),
}


def fit(folder: Path, name: str, devices: int) -> None:
    make, hyperparameters, options = RUNS[name]
    if devices == 1:
        # Chosen here; in shards by default.
        options = {"at": Current(), "solver": Neumann(), "curvature": FiniteDifference(), **options}
    callback = HypergradientCallback(hyperparameters(), every_n_steps=2, warmup_steps=2, **options)
    processes = {"devices": 2, "strategy": strategy()} if devices == 2 else {}
    train, val = DataLoader(data(96, 1), 8 // devices), DataLoader(data(16, 2), 16 // devices)
    if devices == 2:
        train, val = _dealt(train), _dealt(val)
    keep = Keep(folder / f"{devices}", callback)
    trainer(callback, keep, use_distributed_sampler=False, **processes).fit(make(smooth()), train, val)


class Keep(Callback):
    """Saves tuned values, weights and the last report of each process."""

    def __init__(self, path: Path, callback: HypergradientCallback) -> None:
        self.path, self.callback = path, callback

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = [getattr(p, "full_tensor", lambda p=p: p)() for p in pl_module.parameters()]
        flat = torch.cat([w.detach().flatten() for w in weights])
        loop = self.callback.outer_loop
        assert loop.skipped_steps == 0
        assert loop.last_report is not None
        report = torch.tensor(list(loop.last_report.metrics().values()), dtype=torch.float64)
        found = values(self.callback), flat, report, torch.tensor(loop.outer_steps)
        torch.save(found, f"{self.path}_{trainer.global_rank}.pt")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_shards_equal_one(tmp_path: Path, name: str) -> None:
    fit(tmp_path, name, 1)
    in_two_processes(fit, tmp_path, name, 2)
    one, first, second = (torch.load(tmp_path / f"{file}.pt") for file in ("1_0", "2_0", "2_1"))
    assert int(first[3]) == 5
    assert not torch.allclose(one[0], torch.full_like(one[0], 1e-2), rtol=1e-3)  # the values moved
    for joined, a, b in zip(one, first, second, strict=True):
        assert torch.equal(a, b) or bool((a.isnan() == b.isnan()).all())
        # Central differences in double precision round to about 1e-10 of the gradient.
        torch.testing.assert_close(a, joined, rtol=1e-6, atol=1e-9, equal_nan=True)
