"""OuterBatches: an endless, resumable, sharded stream that leaves the Trainer's own loops alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from lightning_nested.trainer.outer_batches import OuterBatches
from tests.callbacks.tuned_regression import Regression, data, smooth
from tests.trainers import trainer


class Capture(Callback):
    """The stream as a callback sees it, while a fit is running."""

    def __init__(self, use: Any, loader: Any = None) -> None:
        self.use, self.loader, self.result = use, loader, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.result = self.use(lambda seed=0: OuterBatches(trainer, self.loader, seed=seed))


def numbers(n: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(n)))


def during_fit(use: Any, loader: Any = None, val: Any = None, **options: Any) -> Any:
    capture = Capture(use, loader)
    val = val if val is not None else DataLoader(data(8, 2), 8)
    trainer(capture, limit_train_batches=1, limit_val_batches=0, **options).fit(
        Regression(smooth()), DataLoader(data(8, 1), 8), val
    )
    return capture.result


def rounds(batches: OuterBatches, n: int) -> list[list[float]]:
    return [batches.next()[0].tolist() for _ in range(n)]


def test_rounds_follow_each_other_and_shuffle_anew() -> None:
    shuffled = DataLoader(numbers(6), 4, shuffle=True)
    seen = during_fit(lambda make: rounds(make(), 6), shuffled)
    assert [len(b) for b in seen] == [4, 2] * 3  # the loader's own batches, its remainder included
    orders = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_loader_shorter_than_a_batch_gives_all_it_has() -> None:
    seen = during_fit(lambda make: rounds(make(), 2), DataLoader(numbers(3), 8))
    assert seen == [[0.0, 1.0, 2.0]] * 2


def test_a_saved_position_goes_on_with_the_same_batches() -> None:
    def use(make: Any) -> None:
        whole, first = make(), make()
        expected = rounds(whole, 7)
        assert rounds(first, 4) == expected[:4]
        second = make(seed=99)  # the saved seed counts
        second.load_state_dict(first.state_dict())
        assert rounds(second, 3) == expected[4:]

    during_fit(use, DataLoader(numbers(6), 2, shuffle=True))


def test_the_global_random_stream_is_not_drawn_from() -> None:
    def use(make: Any) -> None:
        before = torch.get_rng_state()
        rounds(make(), 5)
        assert torch.equal(before, torch.get_rng_state())

    during_fit(use, DataLoader(numbers(6), 2, shuffle=True))


def test_the_sampler_of_the_loader_is_kept() -> None:
    # Only the examples 1 and 3 have weight.
    sampler = WeightedRandomSampler([0.0, 1.0, 0.0, 1.0], 8)
    seen = during_fit(lambda make: rounds(make(), 4), DataLoader(numbers(4), 4, sampler=sampler))
    assert {x for batch in seen for x in batch} == {1.0, 3.0}


@pytest.mark.filterwarnings("ignore:The `val_dataloader` returned 2 dataloaders")
@pytest.mark.parametrize("kind", ["list", "dict", "function"])
def test_the_first_of_several_loaders(kind: str) -> None:
    first, second = DataLoader(numbers(2), 2), DataLoader(numbers(9), 9)
    loader: Any = {"list": [first, second], "dict": {"a": first, "b": second}, "function": lambda: first}[
        kind
    ]
    assert during_fit(lambda make: rounds(make(), 2), loader) == [[0.0, 1.0]] * 2


def test_the_validation_data_of_fit_and_of_a_datamodule() -> None:
    val = DataLoader(numbers(2), 2)
    assert during_fit(lambda make: rounds(make(), 1), val=val) == [[0.0, 1.0]]

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(data(8, 1), 8)

        def val_dataloader(self) -> Any:
            return val

    capture = Capture(lambda make: rounds(make(), 1))
    trainer(capture, limit_train_batches=1, limit_val_batches=0).fit(Regression(smooth()), datamodule=Data())
    assert capture.result == [[0.0, 1.0]]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(4.0)


def test_an_iterable_dataset() -> None:
    loader = DataLoader(Stream(), 2)
    seen = during_fit(lambda make: [make().next().tolist() for _ in range(1)], loader)
    assert seen == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(numbers(3), 8, drop_last=True), "at least one batch. Got an empty one"),
        ([], "there is none"),
        (7, "must be iterable. Got int"),
    ],
)
def test_what_yields_nothing_is_refused(loader: Any, message: str) -> None:
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        during_fit(lambda make: make().next(), loader)


def test_a_one_pass_iterator_is_refused() -> None:
    one_pass = ([torch.full((1,), float(i))] for i in range(2))
    with pytest.raises(MisconfigurationException, match=r"more than once\. Got a one-pass"):
        during_fit(lambda make: rounds(make(), 1), one_pass)


def _two(batches: OuterBatches) -> list[Any]:
    return [batches.next(), batches.next()]


def test_joined_loaders_give_joined_batches() -> None:
    loader = CombinedLoader(
        {"a": DataLoader(numbers(4), 2), "b": DataLoader(numbers(2), 2)}, "max_size_cycle"
    )
    seen = during_fit(lambda make: _two(make()), loader)
    assert [(b["a"][0].tolist(), b["b"][0].tolist()) for b in seen] == [
        ([0.0, 1.0], [0.0, 1.0]),
        ([2.0, 3.0], [0.0, 1.0]),
    ]


class Named(DataLoader[Any]):
    """A subclass that cannot be built again from its attributes."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize(
    "loader",
    [
        Named("x", numbers(4), batch_size=2),
        DataLoader(numbers(4), batch_sampler=[[0, 1], [2, 3]]),
        DataLoader(numbers(4), batch_size=2, num_workers=1, persistent_workers=True),
    ],
    ids=["subclass", "batch_sampler", "persistent workers"],
)
def test_loaders_of_other_kinds(loader: Any) -> None:
    assert during_fit(lambda make: rounds(make(), 2), loader) == [[0.0, 1.0], [2.0, 3.0]]


def test_a_generator_of_the_loader_is_not_drawn_from() -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(numbers(6), 3, shuffle=True, generator=generator)

    def use(make: Any) -> None:
        before = generator.get_state()
        whole, first, second = make(), make(), make()
        expected = rounds(whole, 5)
        assert torch.equal(before, generator.get_state())
        assert len({tuple(a + b) for a, b in (expected[:2], expected[2:4])}) == 2  # shuffled anew
        rounds(first, 3)
        second.load_state_dict(first.state_dict())
        assert rounds(second, 2) == expected[3:]

    during_fit(use, loader)


def test_the_losss_random_numbers_are_those_of_its_batch() -> None:
    def use(make: Any) -> None:
        def drawn(batches: OuterBatches, n: int) -> list[float]:
            numbers = []
            for _ in range(n):
                batches.next()
                with batches.loss_stream():
                    numbers.append(float(torch.rand(())))
            return numbers

        whole, first, second = make(), make(), make()
        expected = drawn(whole, 5)
        assert len(set(expected)) == 5
        rounds(first, 3)  # without drawing
        second.load_state_dict(first.state_dict())
        assert drawn(second, 2) == expected[3:]

    during_fit(use, DataLoader(numbers(6), 2, shuffle=True))


class ByEpoch(Regression):
    """Validation data that depend on the epoch."""

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.full((4,), float(self.current_epoch))), 2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Take any data."""


@pytest.mark.parametrize(("every", "expected"), [(0, [0, 0, 0, 0]), (1, [0, 1, 2, 3]), (2, [0, 0, 2, 2])])
def test_the_loader_is_asked_for_again_with_the_trainers_own(every: int, expected: list[int]) -> None:
    class Read(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []
            self.indices: list[tuple[int, int]] = []

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.batches = OuterBatches(trainer, seed=0)

        def on_train_batch_end(self, *_: Any) -> None:
            self.seen.append(float(self.batches.next()[0][0]))
            self.indices.append((self.batches.round, self.batches.index))

    read = Read()
    module = ByEpoch(smooth())
    options: dict[str, Any] = {"reload_dataloaders_every_n_epochs": every, "limit_val_batches": 0}
    trainer(read, max_epochs=4, limit_train_batches=1, **options).fit(module, DataLoader(data(8, 1), 8))
    assert read.seen == expected
    started = [0] + [i for i in range(1, 4) if expected[i] != expected[i - 1]]
    if every:
        assert [i for i, (_, index) in enumerate(read.indices) if index == 0] == started
