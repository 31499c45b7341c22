"""HypergradientCallback in two processes equals one on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import (
    ConjugateGradient,
    DenseSolve,
    Identity,
    InverseSolver,
    Neumann,
    Nystrom,
)
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.tuned_regression import Regression, data, sgd, smooth, values
from tests.trainers import trainer

SOLVERS: list[InverseSolver] = [
    Identity(),
    Neumann(num_terms=5),
    ConjugateGradient(max_iterations=8, damping=1.0),
    Nystrom(rank=6, damping=0.5),
    DenseSolve(damping=1.0),
]


def _fit_all_solvers(folder: Path, devices: int, index: int) -> None:
    callback = exact(decay_all("parameter", init=1e-2), optimizer=sgd(1.0), solver=SOLVERS[index])
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
