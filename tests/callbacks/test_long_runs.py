"""A long run holds no more after 2 000 steps than after 200: tensors, files, threads, processes."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nested.callbacks import GameSpectrumCallback, LyapunovCallback
from lightning_nested.hypergradient import (
    AdamDiagonal,
    ConjugateGradient,
    Curvature,
    DenseSolve,
    FiniteDifference,
    GaussNewton,
    GivenInverse,
    Hessian,
    Identity,
    InverseSolver,
    KroneckerFactored,
    Neumann,
    Nystrom,
)
from lightning_nested.hypergradient.inner_curvature import GivenCurvature
from lightning_nested.hyperparameters import Scalar
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.running_games import GAN, loader
from tests.callbacks.tuned_regression import Regression, data, unit
from tests.trainers import trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux lists in /proc"),
]
EARLY, LATE = 200, 2000
NUMBERS = 6  # of the network


class Held(Callback):
    """Counts what the process holds after two numbers of steps."""

    def __init__(self) -> None:
        self.found: dict[int, dict[str, int]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step in (EARLY, LATE):
            self.found[trainer.global_step] = held()


def held() -> dict[str, int]:
    gc.collect()
    # Looking at a class, unlike isinstance, wakes no proxy among the objects.
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    return {
        "tensors": len(tensors),
        "numbers in tensors": sum(t.numel() for t in tensors if t.layout == torch.strided),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "Python threads": threading.active_count(),
        "processes": sum(
            len(task.read_text().split()) for task in Path("/proc/self/task").glob("*/children")
        ),
        "MiB resident": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        >> 20,
    }


def soak(
    module: LightningModule, loaders: Sequence[Any], folder: Path, *callbacks: Callback, results: int = 0
) -> None:
    """Run, and compare; ``results`` numbers more may be held, those that the callback is asked for."""
    watch = Held()
    options: dict[str, Any] = {"max_epochs": -1, "max_steps": LATE, "limit_val_batches": 1, "folder": folder}
    options |= {"logger": CSVLogger(folder), "enable_checkpointing": True}
    trainer(*callbacks, watch, **options).fit(module, *loaders)
    early, late = watch.found[EARLY], watch.found[LATE]
    print(early, late)
    grown = late.pop("MiB resident") - early.pop("MiB resident")
    late["numbers in tensors"] -= results
    assert {name: n for name, n in late.items() if n > early[name]} == {}
    # Graphs that no Python object holds: 1 800 steps of a few kB each would show.
    assert grown <= 8


SOLVERS: list[InverseSolver] = [
    Identity(),
    GivenInverse(inverse=torch.eye(NUMBERS).double()),
    AdamDiagonal(),
    KroneckerFactored(),
    Neumann(num_terms=1, step_size=0.1),
    Neumann(num_terms=3),
    ConjugateGradient(max_iterations=4, damping=10.0),
    Nystrom(rank=3, damping=0.5),
    DenseSolve(damping=1.0),
]
CURVATURES: list[Curvature] = [
    Hessian(),
    GaussNewton(outputs="net"),
    FiniteDifference(),
    GivenCurvature(operator=torch.eye(NUMBERS).double()),
]


def label(part: Any) -> str:
    known = isinstance(part, Neumann) and part.step_size is not None
    return type(part).__name__ + ("WithStepSize" if known else "")


class Shifted(Regression):
    """A regression whose targets are shifted by a hyperparameter, so that its loss has a mixed derivative."""

    def __init__(self) -> None:
        super().__init__(unit())
        self.shift: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((x, y + self.shift.value()), batch_idx)


@pytest.mark.parametrize("curvature", CURVATURES, ids=label)
@pytest.mark.parametrize("solver", SOLVERS, ids=label)
def test_outer_steps_hold_nothing(solver: InverseSolver, curvature: Curvature, tmp_path: Path) -> None:
    tuned = [decay_all("parameter", init=1e-2), Scalar("shift", 0.0)]
    callback = exact(tuned, solver=solver, curvature=curvature)
    loaders = DataLoader(data(400, 1), 4), DataLoader(data(12, 2), 4)
    soak(Shifted(), loaders, tmp_path, callback)
    assert callback.outer_steps == LATE
    assert callback.skipped_steps == 0


class Forgets(GameSpectrumCallback):
    """Keeps one spectrum only: the history, which is asked for, grows with the run."""

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        del self.history[:-1]


@pytest.mark.parametrize("k", [3, None])
def test_measured_spectra_hold_nothing(k: int | None, tmp_path: Path) -> None:
    callback = Forgets(every_n_updates=20, k=k)
    soak(GAN(), (loader(1),), tmp_path, callback)
    assert callback.history[0].game_updates == LATE


@pytest.mark.parametrize("kind", ["training", "game"])
def test_followed_steps_hold_nothing_but_their_exponents(kind: str, tmp_path: Path) -> None:
    # Two exponents a step, in memory that doubles: 256 rows at step 200, 2 048 at step 2 000.
    callback, results = LyapunovCallback(2), 2 * (2048 - 256)
    if kind == "game":
        soak(GAN(), (loader(1),), tmp_path, callback, results=results)
    else:
        loaders = DataLoader(data(400, 1), 4), DataLoader(data(12, 2), 4)
        soak(Regression(unit(), rate=0.01), loaders, tmp_path, callback, results=results)
    assert len(callback.windows) == LATE
