"""The plan of outer steps: from the length of the run and a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hyperparameters import GroupWeights, WeightDecay
from lightning_nested.trainer.pace import _LONGEST, _TRAVEL, Pace, batch_ratio, plan, total_steps
from tests.callbacks.tuned_regression import Regression, data, smooth
from tests.trainers import trainer


class Length:
    """A Trainer that knows the steps of its run."""

    accumulate_grad_batches = 2

    def __init__(self, steps: float, batches: float = 100.0) -> None:
        self.estimated_stepping_batches, self.num_training_batches = steps, batches


def planned(steps: float, **options: Any) -> Pace:
    defaults: dict[str, Any] = {"cost": 2.0, "overhead": 0.3, "every_n_steps": None, "warmup_steps": None}
    return plan(Length(steps), **{**defaults, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "every", "warmup", "outer"),
    [
        (1, 7, 0, 1),
        (10, 7, 1, 2),
        (100, 7, 10, 13),
        (1000, 36, 100, 25),  # 900 // 25: more outer steps buy nothing
        (4000, 40, 400, 90),
        (100_000, 900, 10_000, 100),
    ],
)
def test_plans_of_known_lengths(steps: int, every: int, warmup: int, outer: int) -> None:
    pace = planned(steps)
    assert (pace.total_steps, pace.every_n_steps, pace.warmup_steps) == (steps, every, warmup)
    assert pace.outer_steps == outer == len(range(warmup, steps, every))
    # Rates that fall to zero in a line have half their number times the first as their sum.
    assert pace.rate == pytest.approx(min(_LONGEST, 2 * _TRAVEL / outer))


@pytest.mark.parametrize("cost", [0.5, 2.0, 41.0])
@pytest.mark.parametrize("overhead", [0.01, 0.3, 1.0, 100.0])
@pytest.mark.parametrize("steps", [float("inf"), 7, 300, 50_000])
def test_the_budget_is_kept(cost: float, overhead: float, steps: float) -> None:
    pace = planned(steps, cost=cost, overhead=overhead)
    assert pace.cost / pace.every_n_steps <= overhead
    assert pace.outer_steps is None or pace.outer_steps <= 102  # a hundred, and a remainder


class Shuffled(Sampler[int]):
    """A sampler of the user's own."""

    def __init__(self, source: range) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(self)).tolist())


def shared_out(sampler: Sampler[int]) -> DistributedSamplerWrapper:
    return DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)


def test_passes_are_counted_in_batches_and_unknown_for_streams() -> None:
    options: dict[str, Any] = {"cost": 2.0, "overhead": 0.3, "every_n_steps": None, "warmup_steps": None}
    for steps, batches, accumulate, expected in (
        (1000.0, 100.0, None, 20.0),
        (1000.0, 100.0, 1, 10.0),
        (1000.0, 0.0, None, math.inf),
        (1000.0, math.inf, None, math.inf),
        (math.inf, 100.0, None, math.inf),
    ):
        trainer = Length(steps, batches)
        trainer.max_epochs, trainer.max_steps = -1, -1  # type: ignore[attr-defined]
        assert plan(trainer, accumulate=accumulate, **options).passes == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loader", "options", "expected"),
    [
        ({}, {}, 4.0),
        ({"shuffle": True}, {}, 4.0),
        # The same 8 examples in each epoch, or 8 of 32.
        ({}, {"limit_train_batches": 2}, 4.0),
        ({"shuffle": True}, {"limit_train_batches": 2}, 1.0),
        ({"shuffle": True}, {"limit_train_batches": 0.25, "accumulate_grad_batches": 2}, 1.0),
        ({"sampler": RandomSampler(range(32), num_samples=8)}, {}, 1.0),
        ({"sampler": RandomSampler(range(32), replacement=True, num_samples=64)}, {}, 8.0),
        ({"sampler": WeightedRandomSampler([1.0] * 32, 16)}, {"limit_train_batches": 2}, 1.0),
        (
            {"batch_sampler": BatchSampler(RandomSampler(range(32)), 4, False)},
            {"limit_train_batches": 2},
            1.0,
        ),
        ({"sampler": GroupWeights(["a", "b"]).sampler(torch.arange(32) % 2, 8)}, {}, 1.0),
        ({"sampler": DistributedSampler(range(32), 2, 0)}, {"limit_train_batches": 1}, 1.0),
        ({"sampler": DistributedSampler(range(32), 2, 0, shuffle=False)}, {"limit_train_batches": 1}, 4.0),
        # The sampler knows what it draws from, whatever the dataset has.
        ({"sampler": RandomSampler(range(8))}, {}, 4.0),
        ({"sampler": SubsetRandomSampler(range(16))}, {"limit_train_batches": 2}, 2.0),
        # As the Trainer wraps samplers on one of two processes.
        ({"sampler": shared_out(WeightedRandomSampler([1.0] * 32, 16))}, {}, 2.0),
        ({"sampler": shared_out(Shuffled(range(32)))}, {"limit_train_batches": 2}, 4.0),
        ({"sampler": Shuffled(range(32))}, {"limit_train_batches": 2}, 4.0),
    ],
)
def test_passes_are_through_all_the_data_that_epochs_draw_from(
    loader: dict[str, Any], options: dict[str, Any], expected: float
) -> None:
    batches = DataLoader(data(32, 1), **({} if "batch_sampler" in loader else {"batch_size": 4}), **loader)
    assert passes_of_four_epochs(Regression(smooth()), batches, **options) == expected


def passes_of_four_epochs(module: LightningModule, loader: Any, **options: Any) -> float:
    callback = HypergradientCallback(WeightDecay())
    trainer(callback, max_epochs=4, **options).fit(module, loader, DataLoader(data(8, 2), 8))
    assert callback.plan.pace is not None
    return callback.plan.pace.passes


def test_passes_of_a_dataset_without_a_length_are_counted_by_its_sampler() -> None:
    class Endless(Dataset[Any]):
        examples = data(32, 1)

        def __getitem__(self, index: int) -> Any:
            return self.examples[index]

    loader = DataLoader(Endless(), 4, sampler=RandomSampler(range(32)))
    assert passes_of_four_epochs(Regression(smooth()), loader) == 4.0


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
def test_passes_through_several_loaders_are_epochs(mode: Any) -> None:
    class First(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["first"], batch_idx)

    loaders = {"first": DataLoader(data(8, 1), 4, shuffle=True), "other": DataLoader(data(32, 1), 4)}
    assert passes_of_four_epochs(First(smooth()), CombinedLoader(loaders, mode)) == 4.0


def test_a_run_without_an_end_is_planned_by_the_budget() -> None:
    for steps in (float("inf"), -1):
        pace = planned(steps)
        assert (pace.total_steps, pace.every_n_steps, pace.warmup_steps, pace.outer_steps) == (
            None,
            7,
            0,
            None,
        )
        assert pace.rate == _LONGEST


def test_weights_of_examples_get_all_steps_that_the_budget_allows() -> None:
    assert planned(100_000, limited=False).every_n_steps == 7


def test_options_of_the_optimizer_are_tuned_late_on_the_budget_of_the_whole_run() -> None:
    options = {"limited": False, "warmup_share": 0.7}
    assert planned(1000, **options, late=True, cost=10.0).every_n_steps == 10
    assert planned(1000, **options, cost=10.0).every_n_steps == 34
    assert planned(1000, **options).warmup_steps == 700
    assert planned(float("inf"), **options, late=True, cost=10.0).every_n_steps == 34


def test_what_the_user_gives_is_taken() -> None:
    pace = planned(1000, every_n_steps=1, warmup_steps=0)
    assert (pace.every_n_steps, pace.warmup_steps, pace.outer_steps) == (1, 0, 1000)
    assert planned(10, warmup_steps=20).outer_steps == 0


def test_batch_sizes_make_the_ratio() -> None:
    loaders = [DataLoader(data(32, 1), size) for size in (4, 8)]
    assert batch_ratio(*loaders) == 2.0
    assert (
        batch_ratio(loaders[0], None) == batch_ratio(None, loaders[0]) == batch_ratio([1], loaders[0]) == 1.0
    )


class Stream(IterableDataset[tuple[Tensor, ...]]):
    """Examples without a number."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        x, y = data(64, 1).tensors
        yield from zip(x, y, strict=True)


def paced(train: Any, val: int = 8, **options: Any) -> Pace:
    callback = HypergradientCallback(WeightDecay())
    trainer(callback, **options).fit(Regression(smooth()), train, DataLoader(data(16, 2), val))
    assert callback.plan.pace is not None
    assert callback.outer_steps == len(
        range(callback.plan.pace.warmup_steps, callback.inner_steps, callback.plan.pace.every_n_steps)
    )
    return callback.plan.pace


def test_the_trainer_says_how_long_its_run_is() -> None:
    train = DataLoader(data(64, 1), 8)
    assert paced(train, max_epochs=3).total_steps == 24
    assert paced(train, max_epochs=3, accumulate_grad_batches=2).total_steps == 12
    assert paced(train, max_epochs=-1, max_steps=5).total_steps == 5
    assert paced(train, max_epochs=3, limit_train_batches=2).total_steps == 6
    assert paced(train, fast_dev_run=1).total_steps == 1
    assert paced(DataLoader(Stream(), 8), max_epochs=2).total_steps is None


def test_large_outer_batches_cost_more() -> None:
    small, large = (paced(DataLoader(data(64, 1), 2), val) for val in (2, 16))
    assert (small.cost, large.cost) == (2.0, 9.0)
    assert (small.every_n_steps, large.every_n_steps) == (7, 30)


@pytest.mark.filterwarnings("default")  # forking is commented on by the Trainer
def test_every_process_has_the_same_plan(tmp_path: Path) -> None:
    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save(str(callback.plan.pace), tmp_path / f"{trainer.global_rank}.pt")

    callback = HypergradientCallback(WeightDecay())
    fit = trainer(callback, Keep(), devices=2, strategy="ddp_fork", max_epochs=2)
    fit.fit(Regression(smooth()), DataLoader(data(37, 1), 4), DataLoader(data(16, 2), 8))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second


@pytest.mark.parametrize(("max_steps", "steps"), [(-1, 10), (7, 7)])
def test_a_module_that_accumulates_batches_itself_makes_fewer_steps(max_steps: int, steps: int) -> None:
    """Three batches an epoch, two a step, five epochs; the Trainer counts batches."""
    run: Any = SimpleNamespace(
        estimated_stepping_batches=15, num_training_batches=3, max_epochs=5, max_steps=max_steps
    )
    assert total_steps(run, 2) == steps
    assert total_steps(run) == 15
