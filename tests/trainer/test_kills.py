"""Runs that are killed at any moment go on from their last checkpoint, bit for bit, and leave no half file."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from lightning_nested.callbacks import (
    GameSpectrumCallback,
    GenerativeMetrics,
    GeneratorEMA,
    LyapunovCallback,
    ModuleEvaluator,
    SampleGrid,
)
from lightning_nested.cli.main import main
from lightning_nested.files import append_line, replace_figure
from lightning_nested.hypergradient import Neumann, Nystrom
from lightning_nested.modules import DeltaSTN
from tests.callbacks import tuned_regression
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.generative_metrics.test_callback import Pool
from tests.modules.game.games import GAN, points
from tests.modules.gan import tiny
from tests.modules.hypernetwork.problems import Classifier, loader
from tests.trainers import trainer

pytestmark = pytest.mark.slow
EPOCHS = 4
Parts = tuple[LightningModule, list[Callback], tuple[Any, ...], dict[str, Any]]


def regression(*callbacks: Callback) -> Parts:
    # Three outer batches a round against four steps an epoch: the position matters.
    data = DataLoader(tuned_regression.data(32, 1), 8), DataLoader(tuned_regression.data(12, 2), 4)
    return tuned_regression.Regression(tuned_regression.smooth()), list(callbacks), data, {}


def hypergradient(solver: Any) -> Parts:
    return regression(exact(decay_all("parameter", init=1e-2), solver=solver))


def game() -> Parts:
    spectrum = GameSpectrumCallback(every_n_updates=3, k=None)
    # Seven batches an epoch and five a round: every epoch ends inside a round.
    return GAN(), [spectrum], (DataLoader(points(70, 2), batch_size=10, shuffle=True),), {}


def hypernetwork() -> Parts:
    torch.manual_seed(0)
    return Classifier(loop=DeltaSTN(train_steps=2)), [], (loader(1), loader(2, batch=5)), {}


def gan() -> Parts:
    score = GenerativeMetrics(
        ModuleEvaluator(module=Pool(), label="pool"), num_samples=8, scores=("frechet",)
    )
    callbacks = [GeneratorEMA(decay=0.9, start=0), score, SampleGrid(1, per_class=1)]
    return tiny.module(), callbacks, (), {"limit_train_batches": 5, "limit_val_batches": 1}


RUNS: dict[str, tuple[int, Callable[[], Parts]]] = {
    "neumann": (20, lambda: hypergradient(Neumann(num_terms=3))),
    "nystrom": (10, lambda: hypergradient(Nystrom(rank=3, damping=0.5))),
    "game": (20, game),
    "hypernetwork": (20, hypernetwork),
    "gan": (10, gan),
    "lyapunov": (10, lambda: regression(LyapunovCallback(2, figure=True))),
}


class Begun(Callback):
    """Notes the epochs that have begun; the checkpoint of the one before is complete by then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        append_line(self.folder / "begun", str(trainer.current_epoch))


def saved(folder: Path) -> dict[int, Path]:
    """Return the checkpoints by their epoch."""
    return {int(path.stem.partition("=")[2]): path for path in folder.glob("saved/*.ckpt")}


def fit(name: str, folder: Path) -> None:
    """Run to the end, from the last checkpoint if there is one."""
    last = max(saved(folder).items(), default=(0, None))[1]
    # A resumed run must not depend on the seed it is started with.
    seed_everything(5 if last is None else 6, verbose=False)
    module, callbacks, data, options = RUNS[name][1]()
    # Validation comes first: what it scores is then part of the checkpoint.
    save = ModelCheckpoint(folder / "saved", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    given = {
        "enable_checkpointing": True,
        "folder": folder,
        "logger": CSVLogger(folder),
        "log_every_n_steps": 1,
    }
    run = trainer(*callbacks, Begun(folder), save, max_epochs=EPOCHS, **{**given, **options})
    run.fit(module, *data, datamodule=None if data else tiny.data(40), ckpt_path=last, weights_only=True)


def ride(folder: Path) -> None:
    quick = ["--rider.ride_steps=400", "--rider.branching.horizon=3", "--rider.branching.ascent_steps=1"]
    small = ["--starts=2", "--rider.branching.candidates=2", "--rider.distances=[0.5,1.0,2.0,4.0]"]
    options = ["--executor.batch_size=2", "--figure=true", "--output", str(folder / "ride")]
    main(["ride", "--config", "small_ipd", *quick, *small, *options])


def figure(n: int) -> Figure:
    drawn = Figure()
    drawn.add_subplot().plot(range(n + 2))
    return drawn


KINDS: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}


def draw(folder: Path, *, endless: bool) -> None:
    """Write two figures of each kind, or one file of each kind again and again."""
    # No date and no random names: equal figures are then equal files.
    with mpl.rc_context({"svg.hashsalt": "same"}):
        for n in count() if endless else range(2):
            for kind, metadata in KINDS.items():
                path = folder / "figures" / f"{'figure' if endless else n}.{kind}"
                replace_figure(path, figure(n % 2), metadata=metadata)


def _inside(job: Callable[[Path], None], folder: Path) -> None:
    """Do the job in a process of its own, silently; an error's text is left in ``error``."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    (folder / "temporary").mkdir(exist_ok=True)
    tempfile.tempdir = str(folder / "temporary")  # what a killed process leaves there goes with the folder
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            job(folder)
    except BaseException:
        (folder / "error").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def begin(job: Callable[[Path], None], folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forking a process that has threads
        process = multiprocessing.get_context("fork").Process(target=_inside, args=(job, folder))
        process.start()
    return process


def ended(process: Any, folder: Path, seconds: float | None = None) -> bool:
    """Return True if the process ended by itself, else kill it after the time given."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert not (folder / "error").exists(), (folder / "error").read_text(encoding="utf-8")
    return bool(process.exitcode == 0)


def kill_often(
    kills: int, job: Callable[[Path], None], folder: Path, check: Callable[[Path, Path, bool], None]
) -> None:
    """Kill the job and go on, again and again; when one comes to its end, begin another.

    Args:
        kills: Times that a process is killed.
        job: What is run in a folder, to the end.
        folder: Where the jobs get folders.
        check: Called after every kill and every end with the folder, that of a whole job, and True at the end.
    """
    whole, began = folder / "whole", time.monotonic()
    folder.mkdir(exist_ok=True)
    assert ended(begin(job, whole), whole)
    length, draws, jobs = time.monotonic() - began, random.Random(0), count()
    here, done = folder / f"{next(jobs)}", 0
    while done < kills:
        if ended(begin(job, here), here, draws.uniform(0.0, length)):
            check(here, whole, True)
            here = folder / f"{next(jobs)}"
        else:
            done += 1
            check(here, whole, False)
    assert ended(begin(job, here), here)
    check(here, whole, True)
    print(f"{done} kills in {next(jobs)} jobs of {length:.1f} s, {time.monotonic() - began:.0f} s in all")


def content(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of the run, without paths and Lightning's own counts of batches."""
    found: dict[str, Any] = torch.load(path, weights_only=True)
    found["callbacks"] = {k: v for k, v in found["callbacks"].items() if "ModelCheckpoint" not in k}
    del found["loops"]
    return found


def differences(a: Any, b: Any, at: str = "") -> Iterator[str]:
    """Yield the places in which two states differ by a bit or more."""
    if type(a) is not type(b):
        yield f"{at}: {type(a)} and {type(b)}"
    elif isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield f"{at}: {a} and {b}"
    elif isinstance(a, dict | list | tuple) and len(a) == len(b):
        for key in a if isinstance(a, dict) else range(len(a)):
            yield from differences(a[key], b[key], f"{at}/{key}")
    elif a != b:
        yield f"{at}: {a} and {b}"


def check_run(here: Path, whole: Path, at_end: bool) -> None:
    begun = [int(line) for line in (here / "begun").read_text().split()] if (here / "begun").exists() else [0]
    found, expected = saved(here), saved(whole)
    assert set(found) >= set(range(max(begun)))  # what was complete is there
    if at_end:
        assert set(found) == set(expected) == set(range(EPOCHS))
    for epoch, path in found.items():
        assert list(differences(content(path), content(expected[epoch]))) == []
    for pattern in ("grids/*.png", "**/lyapunov.png"):
        pictures = {path.name: path.read_bytes() for path in here.glob(pattern)}
        others = {path.name: path.read_bytes() for path in whole.glob(pattern)}
        assert pictures.items() <= others.items()
        assert not at_end or pictures.keys() == others.keys()
    if at_end:
        # An epoch that is run again is scored again, and equally.
        assert scores(here) == scores(whole)


def scores(folder: Path) -> set[str]:
    lines = [line for path in folder.glob("**/scores.jsonl") for line in path.read_text().splitlines()]
    return {json.dumps(json.loads(line), sort_keys=True) for line in lines}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_fit_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    kill_often(RUNS[name][0], partial(fit, name), tmp_path, check_run)


def check_ride(here: Path, whole: Path, at_end: bool) -> None:
    found = {path.name: path.read_bytes() for path in here.glob("ride/branches/[!.]*")}
    assert (
        found.items() <= {path.name: path.read_bytes() for path in whole.glob("ride/branches/[!.]*")}.items()
    )
    for name in ("solutions.json", "branches.csv", "ride.png"):
        if at_end or (here / "ride" / name).exists():
            assert (here / "ride" / name).read_bytes() == (whole / "ride" / name).read_bytes()


def test_a_killed_ride_goes_on_bit_for_bit(tmp_path: Path) -> None:
    kill_often(10, ride, tmp_path, check_ride)


def test_a_killed_process_leaves_no_half_figure(tmp_path: Path) -> None:
    # In this process: what it imports, those that are killed have from their beginning.
    draw(tmp_path, endless=False)
    expected = {kind: {(tmp_path / "figures" / f"{n}.{kind}").read_bytes() for n in (0, 1)} for kind in KINDS}
    assert all(len(files) == 2 for files in expected.values())
    draws, kills = random.Random(0), 25
    for _ in range(kills):
        assert not ended(begin(partial(draw, endless=True), tmp_path), tmp_path, draws.uniform(0.1, 1.0))
        for kind, files in expected.items():
            path = tmp_path / "figures" / f"figure.{kind}"
            assert not path.exists() or path.read_bytes() in files
    assert (tmp_path / "figures" / "figure.svg").exists()
    print(f"{kills} kills")
