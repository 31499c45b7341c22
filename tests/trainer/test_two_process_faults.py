"""A process that raises, or computes NaN, never lets the other one wait: every run ends, and both ends agree."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nested.callbacks import (
    GameSpectrumCallback,
    GenerativeMetrics,
    GeneratorEMA,
    LyapunovCallback,
    ModuleEvaluator,
    SampleGrid,
)
from lightning_nested.hypergradient import ConjugateGradient, DenseSolve, Identity, Neumann, Nystrom
from lightning_nested.modules import GameLoop, GradientStrategy, Implicit, NestedModule, Unrolled
from lightning_nested.optim import Extragradient
from tests.callbacks import tuned_regression
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.generative_metrics.test_callback import Pool
from tests.modules.game.games import Bilinear, sgd, steps
from tests.modules.gan import tiny
from tests.trainers import trainer

SECONDS = 90  # a run takes about five; torch itself gives a process 30 to end


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong, and how the run must end.

    Attributes:
        run: Name of the run in ``RUNS``.
        where: Place in it.
        kind: ``"raises"``, or the number that a loss is multiplied by.
        rank: Process in which it happens, the second time that it comes there.
        ends: Part of the error's text; empty: the run is finished, with equal weights in both processes.
    """

    run: str
    where: str
    kind: str = "nan"
    rank: int = 1
    ends: str = ""

    def __str__(self) -> str:
        return "-".join((self.run, self.where, self.kind, str(self.rank)))


class Trip:
    """Counts how often a place was reached, and lets the fault happen there."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.reached = fault, Counter[str]()

    def __call__(self, where: str) -> float:
        self.reached[where] += 1
        here = (where, torch.distributed.get_rank(), self.reached[where])
        if here != (self.fault.where, self.fault.rank, 2):
            return 1.0
        if self.fault.kind == "raises":
            raise ArithmeticError(f"fault at {where}")
        return float(self.fault.kind)


class Hooks(Callback):
    """Trips in the Trainer's hooks, and saves what each process ends with."""

    def __init__(self, trip: Trip, folder: Path) -> None:
        self.trip, self.folder = trip, folder

    def on_train_batch_start(self, *_: Any) -> None:
        self.trip("batch start")

    def on_train_batch_end(self, *_: Any) -> None:
        self.trip("batch end")

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.trip("optimizer step")

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.trip("validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        self.trip("epoch end")

    def on_save_checkpoint(self, *_: Any) -> None:
        self.trip("checkpoint")

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        weights = [p.detach() for p in pl_module.parameters()]
        state = {"weights": weights, "reached": self.trip.reached[self.trip.fault.where]}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


class Game(Bilinear):
    def __init__(self, trip: Trip, **options: Any) -> None:
        super().__init__(**{"optimizer": sgd(0.01), **options})
        self.trip = trip

    def player_loss(self, name: str, batch: Any) -> Tensor:
        ahead = any(getattr(o.optimizer, "is_extrapolated", False) for o in self.optimizers())
        where = "joint loss" if self.joint_graph else "second look" if ahead else "loss"
        loss = super().player_loss(name, batch) * self.trip(where)
        if self.trip("gradient") != 1:  # a finite loss whose gradient is not
            loss = loss + (self.x() * self.y() * 0).sum().sqrt()
        return loss

    def on_player_step(self, name: str) -> None:
        self.trip("player step")

    def on_game_update(self) -> None:
        self.trip("game update")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.trip("validation step")
        self.log("seen", batch[0].mean(), sync_dist=True)


class Tuned(tuned_regression.Regression):
    def __init__(self, trip: Trip) -> None:
        super().__init__(tuned_regression.smooth())
        self.trip = trip

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.trip("loss")

    def outer_loss(self, batch: Any) -> Tensor:
        loss = 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean() * self.trip("outer loss")
        return loss + (loss * 0).sqrt() if self.trip("outer gradient") != 1 else loss


Parts = tuple[LightningModule, list[Callback], Any, dict[str, Any]]


def game(trip: Trip, *callbacks: Callback, **options: Any) -> Parts:
    return Game(trip, **options), list(callbacks), (steps(8), steps(2)), {"max_epochs": 3}


def tuned(trip: Trip, solver: Any, accumulate: int = 1, **options: Any) -> Parts:
    decay = decay_all("parameter", init=1e-2)
    callback = exact(
        decay, optimizer=tuned_regression.sgd(1.0), solver=solver, log_every_n_outer_steps=1, **options
    )
    loaders = DataLoader(tuned_regression.data(32, 1), 4), DataLoader(tuned_regression.data(16, 2), 4)
    return Tuned(trip), [callback], loaders, {"max_epochs": 2, "accumulate_grad_batches": accumulate}


class Nested(NestedModule):
    def __init__(self, trip: Trip, gradient: GradientStrategy) -> None:
        super().__init__(
            decay_all("parameter", init=1e-2), gradient=gradient, inner_optimizer=tuned_regression.sgd(0.05)
        )
        self.net, self.trip = tuned_regression.smooth(), trip

    def inner_loss(self, batch: Any) -> Tensor:
        return 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean() * self.trip("loss")

    def outer_loss(self, batch: Any) -> Tensor:
        return 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean() * self.trip("outer loss")


def nested(trip: Trip, gradient: GradientStrategy) -> Parts:
    loaders = DataLoader(tuned_regression.data(32, 1), 4), DataLoader(tuned_regression.data(16, 2), 4)
    return Nested(trip, gradient), [], loaders, {"max_epochs": 2, "limit_val_batches": 1}


def saved(trip: Trip, folder: Path, *callbacks: Callback) -> Parts:
    options = {
        "enable_checkpointing": True,
        "folder": folder,
        "logger": CSVLogger(folder),
        "log_every_n_steps": 1,
    }
    save = ModelCheckpoint(folder / "saved", every_n_train_steps=1, save_top_k=-1)
    module, found, loaders, given = game(trip, save, *callbacks, loop=GameLoop(accumulate_grad_batches=2))
    return module, found, loaders, given | options


def gan(trip: Trip, folder: Path) -> Parts:
    module = tiny.module()
    sample, loss = module.sample_for_metrics, module.player_loss

    def sampled(*args: Any, **kwargs: Any) -> Tensor:
        return sample(*args, **kwargs) * trip("sample")

    module.sample_for_metrics = sampled  # type: ignore[method-assign]
    module.player_loss = lambda name, batch: loss(name, batch) * trip("loss")  # type: ignore[method-assign]
    score = GenerativeMetrics(
        ModuleEvaluator(module=Pool(), label="pool"), num_samples=8, scores=("frechet",)
    )
    callbacks = [GeneratorEMA(decay=0.9, start=0), score, SampleGrid(1, per_class=1)]
    options = {"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 1, "folder": folder}
    return module, callbacks, (tiny.data(40),), options


RUNS: dict[str, Callable[[Trip, Path], Parts]] = {
    "game": lambda trip, _: game(trip, steps_per_player={"x": 2}),
    "together": lambda trip, _: game(trip, update="simultaneous"),
    "accumulated": lambda trip, _: game(trip, loop=GameLoop(accumulate_grad_batches=2)),
    "clipped": lambda trip, _: game(trip, loop=GameLoop(gradient_clip_val=0.1)),
    "extragradient": lambda trip, _: game(
        trip, update="simultaneous", optimizer=lambda p: Extragradient(p, lr=0.01)
    ),
    "spectrum": lambda trip, _: game(trip, GameSpectrumCallback(1, k=None)),
    "lyapunov": lambda trip, _: game(trip, LyapunovCallback(1), update="simultaneous"),
    "saved": saved,
    "rescued": lambda trip, folder: saved(trip, folder, OnExceptionCheckpoint(folder / "rescued")),
    "gan": gan,
    "implicit": lambda trip, _: nested(
        trip, Implicit(solver=ConjugateGradient(max_iterations=3, damping=1.0))
    ),
    "unrolled": lambda trip, _: nested(trip, Unrolled(num_steps=2)),
    "identity": lambda trip, _: tuned(trip, Identity()),
    "neumann": lambda trip, _: tuned(trip, Neumann(num_terms=3)),
    "neumann-power": lambda trip, _: tuned(trip, Neumann(num_terms=3, step_size=None)),
    "conjugate": lambda trip, _: tuned(trip, ConjugateGradient(max_iterations=4, damping=1.0)),
    "nystrom": lambda trip, _: tuned(trip, Nystrom(rank=3, damping=0.5)),
    "dense": lambda trip, _: tuned(trip, DenseSolve(damping=1.0)),
    "window": lambda trip, _: tuned(trip, Neumann(num_terms=3), accumulate=2),
    "strict": lambda trip, _: tuned(trip, Neumann(num_terms=3), max_skipped=0),
}
_FINITE, _SKIPPED = "must be finite", "More than max_skipped=0"
FAULTS = (
    # a loss or a gradient of one process: the mean of both is not finite, and both see it
    *(Fault(run="game", where=where, ends=_FINITE) for where in ("loss", "gradient")),
    Fault(run="game", where="loss", kind="inf", rank=0, ends=_FINITE),
    Fault(run="together", where="loss", ends=_FINITE),
    Fault(run="together", where="gradient", rank=0, ends=_FINITE),
    Fault(run="accumulated", where="loss", ends=_FINITE),
    Fault(run="clipped", where="gradient", ends=_FINITE),
    *(Fault(run="extragradient", where=where, ends=_FINITE) for where in ("loss", "second look")),
    Fault(run="lyapunov", where="loss", ends=_FINITE),
    Fault(run="gan", where="loss", ends=_FINITE),
    # what is only measured ends no run
    *(Fault(run="spectrum", where="joint loss", rank=rank) for rank in (0, 1)),
    Fault(run="spectrum", where="joint loss", kind="inf"),
    # an outer step that one process cannot make is skipped by both
    *(
        Fault(run=run, where="outer loss")
        for run in ("identity", "neumann", "neumann-power", "conjugate", "nystrom", "dense", "window")
    ),
    Fault(run="neumann", where="outer loss", kind="inf", rank=0),
    Fault(run="neumann", where="outer gradient"),
    Fault(run="strict", where="outer loss", ends=_SKIPPED),
    Fault(run="strict", where="loss", rank=0, ends=_SKIPPED),
    *(Fault(run=run, where="loss") for run in ("conjugate", "nystrom", "dense")),
    *(Fault(run=run, where="outer loss") for run in ("implicit", "unrolled")),
    *(Fault(run=run, where="loss", rank=0) for run in ("implicit", "unrolled")),
    # an error of one process ends both
    *(
        Fault(run=run, where=where, kind="raises", rank=rank, ends=f"fault at {where}")
        for run, where, rank in (
            ("saved", "checkpoint", 0),
            ("saved", "checkpoint", 1),
            ("rescued", "loss", 1),
            ("rescued", "loss", 0),
            ("implicit", "outer loss", 1),
            ("unrolled", "loss", 0),
        )
    ),
    *(
        Fault(run="game", where=where, kind="raises", ends=f"fault at {where}")
        for where in (
            "loss",
            "player step",
            "game update",
            "validation step",
            "batch start",
            "batch end",
            "optimizer step",
            "validation",
            "epoch end",
        )
    ),
    Fault(run="game", where="loss", kind="raises", rank=0, ends="fault at loss"),
    Fault(run="extragradient", where="second look", kind="raises", ends="fault at second look"),
    Fault(run="spectrum", where="joint loss", kind="raises", ends="fault at joint loss"),
    *(Fault(run="gan", where="sample", kind="raises", rank=rank, ends="fault at sample") for rank in (0, 1)),
    *(
        Fault(run="neumann", where=where, kind="raises", rank=rank, ends=f"fault at {where}")
        for where, rank in (("loss", 0), ("outer loss", 1), ("optimizer step", 1), ("batch end", 0))
    ),
    Fault(run="window", where="outer loss", kind="raises", rank=0, ends="fault at outer loss"),
)


def _run(fault: Fault, folder: Path) -> None:
    """Run in a process of its own, and write how it ended."""
    os.setsid()  # so that a run that hangs is ended with its processes
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trip = Trip(fault)
    module, callbacks, data, options = RUNS[fault.run](trip, folder)
    fit = trainer(*callbacks, Hooks(trip, folder), devices=2, strategy="ddp_fork", **options)
    try:
        if len(data) == 1:
            fit.fit(module, datamodule=data[0])
        else:
            fit.fit(module, *data)
        end = ""
    except BaseException as error:
        # with what came before: a checkpoint on an exception may fail in its turn
        end = "".join(traceback.format_exception(error))
    (folder / "end").write_text(end or "finished", encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_no_process_waits_for_ever(fault: Fault, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking a process that has threads
        process = multiprocessing.get_context("fork").Process(target=_run, args=(fault, tmp_path))
        process.start()
    process.join(SECONDS)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        pytest.fail(f"The run has not ended after {SECONDS} seconds: {fault}.")
    end = (tmp_path / "end").read_text(encoding="utf-8")
    if fault.ends:
        assert fault.ends in end
        return
    assert end == "finished", end
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert states[fault.rank]["reached"] >= 2
    for a, b in zip(*(state["weights"] for state in states), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
