"""HypergradientCallback with parameters in shards (FSDP2): two processes equal one, and what needs more is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed import fsdp
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import (
    ConjugateGradient,
    Current,
    FiniteDifference,
    Hessian,
    Identity,
    KroneckerFactored,
    LookAhead,
    Neumann,
    implicit_hypergradient,
)
from lightning_nested.hyperparameters import Hyperparameter, WeightDecay
from lightning_nested.hyperparameters.scalar import Scalar
from lightning_nested.trainer.outer_defaults import point_and_solver
from lightning_nested.trainer.requirements import refuse_strategy
from lightning_nested.trainer.shards import check_shards, curvature_of_run
from tests.callbacks.test_hypergradient_processes import _dealt
from tests.callbacks.tuned_regression import Regression, data, sgd, smooth, values
from tests.trainers import trainer

if not hasattr(fsdp, "fully_shard"):
    pytest.skip("FSDP2 needs torch 2.6", allow_module_level=True)

# Forking, and loaders of another kind, are commented on by the Trainer.
pytestmark = pytest.mark.filterwarnings("default")


def in_two_processes(run: Callable[..., None], *arguments: Any) -> None:
    """Run a function in two processes that Lightning takes for a launcher's: by itself it restarts the script."""
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
            fsdp.fully_shard(self.net[0], mesh=mesh)  # type: ignore[index]
            fsdp.fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if self.factor is None else loss * self.factor.value()


class Adam(Sharded):
    """Trained by AdamW with a decay of its own."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class Frozen(Sharded):
    """Its first layer is not trained, but in shards."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.net[0].requires_grad_(False)  # type: ignore[index]


class Kept(Sharded):
    """All layers stay gathered after forward passes."""

    def configure_model(self) -> None:
        super().configure_model()
        for module in self.net.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.set_reshard_after_forward(False)


def decay() -> list[Hyperparameter]:
    return [WeightDecay(init=1e-2, include=("*",))]


def both() -> list[Hyperparameter]:
    return [*decay(), Scalar("factor", 1.0)]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is made on one process and on two.

    Attributes:
        module: Function that makes the module.
        hyperparameters: Function that makes what is tuned.
        options: Arguments of the callback, beside those that stand for the defaults in shards.
        trainer: Arguments of the Trainer.
        dtype: Precision of the weights.
        relative: How far both may be apart.
    """

    module: Callable[[Any], Regression] = Sharded
    hyperparameters: Callable[[], list[Hyperparameter]] = decay
    options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    relative: float = 1e-7


FEW = Neumann(num_terms=2)
STEEP = {"solver": ConjugateGradient(max_iterations=3, damping=1.0), "optimizer": sgd(1.0)}
RUNS = {
    # Chosen on one process, the default on two.
    "default": Run(hyperparameters=lambda: [WeightDecay()]),
    # Differences in float32 are right to about 1e-3, and rounding differs between one process and two.
    "float32": Run(options={"solver": FEW}, dtype=torch.float32, relative=1e-4),
    "identity": Run(options={"solver": Identity(), "optimizer": sgd(1.0)}),
    "in the graph": Run(hyperparameters=both, options=STEEP),
    "adamw": Run(module=Adam, hyperparameters=both, options={"solver": FEW}),
    "frozen": Run(module=Frozen, options=STEEP),
    "kept": Run(
        module=Kept,
        options=STEEP,
        trainer={"accumulate_grad_batches": 2, "max_epochs": 2, "gradient_clip_val": 0.5},
    ),
}


def tune(folder: Path, name: str, devices: int) -> None:
    run = RUNS[name]
    options = dict(run.options)
    if devices == 1:
        options = {"at": Current(), "solver": Neumann(), "curvature": FiniteDifference(), **options}
    callback = HypergradientCallback(run.hyperparameters(), every_n_steps=2, warmup_steps=1, **options)
    train = DataLoader(data(40, 1, run.dtype), 8 // devices)
    val = DataLoader(data(16, 2, run.dtype), 16 // devices)
    if devices == 2:
        train, val = _dealt(train), _dealt(val)
    keep = Keep(folder / f"{name}_{devices}", callback)
    processes = {"devices": 2, "strategy": strategy()} if devices == 2 else {}
    fit = trainer(callback, keep, use_distributed_sampler=False, **processes, **run.trainer)
    fit.fit(run.module(smooth(run.dtype)), train, val)


def tune_all(folder: Path, devices: int) -> None:
    for name in RUNS:
        tune(folder, name, devices)


class Keep(Callback):
    """Saves tuned values, weights, the last report and the number of outer steps of each process."""

    def __init__(self, path: Path, callback: HypergradientCallback) -> None:
        self.path, self.callback = path, callback

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = self.callback.outer_loop
        assert loop.skipped_steps == 0
        assert loop.last_report is not None
        report = torch.tensor(list(loop.last_report.metrics().values()), dtype=torch.float64)
        found = values(self.callback), whole(pl_module), report, torch.tensor(loop.outer_steps)
        torch.save(found, f"{self.path}_{trainer.global_rank}.pt")


def whole(module: LightningModule) -> Tensor:
    """Return all weights; on all processes together."""
    weights = [getattr(p, "full_tensor", lambda p=p: p)() for p in module.parameters()]
    return torch.cat([w.detach().flatten() for w in weights])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with what all runs found."""
    made = tmp_path_factory.mktemp("runs")
    in_two_processes(tune_all, made, 2)
    tune_all(made, 1)
    return made


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_with_shards_equal_one(folder: Path, name: str) -> None:
    one, first, second = (torch.load(folder / f"{name}_{file}.pt") for file in ("1_0", "2_0", "2_1"))
    assert int(first[3]) > 1
    assert not torch.allclose(one[0], torch.full_like(one[0], 1e-2), rtol=1e-3)  # the values moved
    assert first[2][0] == first[2][0]  # the report begins with a number
    relative = RUNS[name].relative
    # Of the report a Rayleigh quotient is not averaged over weights.
    for joined, a, b, tolerance in zip(
        one, first, second, (relative, relative, 100 * relative, 0.0), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(a, joined, rtol=tolerance, atol=1e-9, equal_nan=True)


def resume(folder: Path) -> None:
    """Train two epochs at once, and in two halves."""
    found = []
    for epochs, path in ((2, None), (1, None), (2, folder / "half.ckpt")):
        callback = HypergradientCallback(decay(), every_n_steps=2, warmup_steps=1, optimizer=sgd(1.0))
        module = Adam(smooth())
        loaders = DataLoader(data(32, 1), 4), DataLoader(data(8, 2), 4)
        fit = trainer(callback, devices=2, strategy=strategy(), max_epochs=epochs)
        fit.fit(module, *loaders, ckpt_path=path)
        fit.save_checkpoint(folder / "half.ckpt")
        found.append((values(callback), whole(module)))
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")


def test_a_run_in_shards_resumes_bit_for_bit(tmp_path: Path) -> None:
    in_two_processes(resume, tmp_path)
    for rank in range(2):
        straight, half, resumed = torch.load(tmp_path / f"{rank}.pt")
        assert not torch.equal(half[0], straight[0])
        for a, b in zip(straight, resumed, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": Hessian()}, r"differences of gradients\. Got curvature=Hessian\(\)"),
        ({"at": LookAhead()}, "current weights. Got at=LookAhead"),
        ({"solver": KroneckerFactored()}, "sums over shards. Got solver=KroneckerFactored"),
        ({"solver": ConjugateGradient(preconditioner=torch.eye(2))}, "without a preconditioner"),
        ({"hyperparameters": WeightDecay(per="parameter")}, r'Got WeightDecay\(per="parameter"\)'),
        ({"restart_every": 3}, "Got restart_every=3; leave it out"),
        ({"train_batches": 2}, "Got train_batches=2; set it to 0"),
    ],
    ids=lambda x: "" if isinstance(x, str) else next(iter(x)),
)
def test_what_cannot_be_had_in_shards_is_refused(options: dict[str, Any], message: str) -> None:
    options = {"hyperparameters": WeightDecay(), **options}
    callback, fit = HypergradientCallback(**options), trainer()
    fit._accelerator_connector.strategy = strategy()
    callback.setup(fit, Sharded(smooth()), "fit")  # the strategy itself is not refused
    plan = callback.plan
    plan.point, plan.solver = point_and_solver(callback.outer, *plan._given, in_shards=True)
    with pytest.raises(MisconfigurationException, match=message):
        curvature_of_run(fit, plan, callback.outer_loop, callback.curvature)


def test_other_owners_of_a_loop_refuse_shards() -> None:
    fit = trainer()
    fit._accelerator_connector.strategy = strategy()
    with pytest.raises(MisconfigurationException, match="Got ModelParallelStrategy; use"):
        refuse_strategy(fit, "NestedModule")


def test_whole_parameters_beside_shards_are_named() -> None:
    with pytest.raises(MisconfigurationException, match=r"Got net\.0\.weight, net\.0\.bias, .* whole"):
        check_shards(dict(Sharded(smooth()).named_parameters()))


class Pretended(Tensor):
    """Has what makes a tensor a shard."""

    device_mesh = placements = ()


def test_the_function_refuses_shards() -> None:
    w, h = torch.ones(2).as_subclass(Pretended).requires_grad_(), torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="Got DTensors"):
        implicit_hypergradient((w * h).sum(), w.sum(), [w], [h])
