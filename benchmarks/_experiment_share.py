"""How much of the data should validate: few decays and many, trained again on everything, and remedies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from _arms import Column, Experiment, Numbers
from _fits import plain_trainer
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested import FashionMNISTDataModule, HypergradientCallback, WeightDecay

SHARES = (0.1, 0.3, 0.6, 0.9)
BATCH = 50
Pair = tuple[Tensor, Tensor]


class Network(LightningModule):
    """An MLP on images of 14×14 pixels, with decays that are held fixed if there are any."""

    def __init__(self, decays: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(196, 50), nn.ReLU(), nn.Linear(50, 10))
        self.decays = dict(decays or {})
        self.left_out: Tensor | None = None  # rows that are not trained on now

    def loss(self, pair: Pair) -> Tensor:
        """Return the mean cross-entropy."""
        return functional.cross_entropy(self.network(pair[0]), pair[1])

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of the rows that are not left out."""
        x, y, rows = batch
        if self.left_out is None:
            return self.loss((x, y))
        used = ~torch.isin(rows, self.left_out)
        return functional.cross_entropy(self.network(x), y, reduction="none")[
            used
        ].sum() / used.sum().clamp_min(1)

    def validation_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """Return the mean loss."""
        return self.loss(batch)

    @torch.no_grad()
    def on_after_backward(self) -> None:
        """Add the decays that are held fixed, as the callback adds those that are tuned."""
        for name, decay in self.decays.items():
            weight = self.get_parameter(name)
            assert weight.grad is not None
            weight.grad.add_(decay * weight)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Rotating(HypergradientCallback):
    """Leaves out another share of the rows until each outer step, which takes its loss on them."""

    def __init__(self, hyperparameters: Any, data: Pair, share: float, seed: int) -> None:
        super().__init__(hyperparameters)
        self.data, self.share = data, share
        self._generator = torch.Generator().manual_seed(seed)
        self._seen = -1  # outer steps when rows were drawn

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Draw other rows after an outer step."""
        if self._seen != self.outer_steps:
            self._seen, size = self.outer_steps, len(self.data[1])
            order = torch.randperm(size, generator=self._generator)
            pl_module.left_out = order[: round(self.share * size)]
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def outer_loss(self, trainer: Trainer, pl_module: Any, batch: Any) -> Tensor:
        """Return the loss of the rows that are left out."""
        loss: Tensor = pl_module.loss((self.data[0][pl_module.left_out], self.data[1][pl_module.left_out]))
        return loss


class Stopped(HypergradientCallback):
    """Stops tuning at the best values by a second split, once five outer steps have not improved on them."""

    def __init__(self, hyperparameters: Any, second: Pair) -> None:
        super().__init__(hyperparameters)
        self.second = second
        self._best: tuple[float, list[Tensor]] = (float("inf"), [])
        self._worse = self._seen = 0

    def should_update(self, trainer: Trainer, step: int) -> bool:
        """Return False once it has stopped."""
        return self._worse < 5 and super().should_update(trainer, step)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        """Compare the second split's loss after an outer step."""
        super().on_train_batch_end(trainer, pl_module, *rest)
        if self._seen == self.outer_steps or self._worse == 5:
            return
        self._seen, loss = self.outer_steps, float(pl_module.loss(self.second))
        tensors = [t for h in self.outer.hyperparameters for t in h.tensors.values()]
        if loss < self._best[0]:
            self._best, self._worse = (loss, [t.detach().clone() for t in tensors]), 0
            return
        self._worse += 1
        if self._worse == 5:
            for tensor, best in zip(tensors, self._best[1], strict=True):
                tensor.copy_(best)


Tuned = tuple[Network, dict[str, Tensor], float]  # with the CPU time of the fit


@dataclass
class Given:
    """Rows of one seed, all fits on them, and what was tuned."""

    rows: Pair
    test: Pair
    seed: int
    steps: int
    tuned: dict[tuple[str, float], Tuned] = field(default_factory=dict)

    def part(self, share: float) -> tuple[Pair, Pair]:
        """Return the rows to train on and those to validate on."""
        edge = round((1 - share) * len(self.rows[1]))
        x, y = self.rows
        return (x[:edge], y[:edge]), (x[edge:], y[edge:])

    def fit(
        self, train: Pair, val: Pair, callback: Any = None, decays: Mapping[str, Tensor] | None = None
    ) -> tuple[Network, float]:
        """Return a trained network, and the CPU time of the fit."""
        seed_everything(self.seed, verbose=False)
        module = Network(decays)
        data = TensorDataset(*train, torch.arange(len(train[1])))
        loader = DataLoader(data, min(BATCH, len(data)), shuffle=True, drop_last=True)
        validation = DataLoader(TensorDataset(*val), min(100, len(val[1])), shuffle=True)
        before = time.process_time()
        plain_trainer(self.steps, [] if callback is None else [callback]).fit(module, loader, validation)
        return module, time.process_time() - before

    @torch.no_grad()
    def score(self, module: Network) -> float:
        """Return the test loss."""
        return float(module.loss(self.test))


def prepare(seed: int, size: str) -> Given:
    """Return 600 images of clothes to divide, and 10 000 to test."""
    smoke = size == "smoke"
    data = FashionMNISTDataModule(train_size=60 if smoke else 600, val_size=1, seed=seed)
    data.setup()
    mean, scale = data.train_images.mean(), data.train_images.std()

    def small(x: Tensor) -> Tensor:
        return functional.avg_pool2d((x - mean) / scale, 2).flatten(1)

    rows, test = (small(data.train_images), data.train_labels), (small(data.test_images), data.test_labels)
    return Given(rows, test, seed, 20 if smoke else 500)


def shares(given: Given) -> tuple[float, ...]:
    """Return the shares that are tried."""
    return SHARES if given.steps > 100 else (0.6,)


def by_share(given: Given, fit: Callable[[float], tuple[Network, float]]) -> Numbers:
    """Return the test loss of each share's network, and the mean CPU time of one."""
    fits = {share: fit(share) for share in shares(given)}
    scores = {str(share): given.score(module) for share, (module, _) in fits.items()}
    return scores | {"seconds": statistics.mean(seconds for _, seconds in fits.values())}


def plain(given: Given) -> Numbers:
    """Train on everything, without a decay, once for all shares."""
    found = given.fit(given.rows, given.rows)
    return by_share(given, lambda share: found)


def part_alone(given: Given) -> Numbers:
    """Train on the training part, without a decay."""
    return by_share(given, lambda share: given.fit(*given.part(share)))


def tune(kind: str, given: Given, share: float) -> Tuned:
    """Return the network, the decays and the CPU time of one tuned fit, made once."""
    if (kind, share) in given.tuned:
        return given.tuned[kind, share]
    train, val = given.part(share)
    decay = (
        WeightDecay()
        if kind == "few"
        else WeightDecay(per="parameter", shrink=None if kind == "prior" else 0.0)
    )
    callback = HypergradientCallback(decay)
    if kind == "rotating":
        train, val = given.rows, given.rows
        callback = Rotating(decay, given.rows, share, given.seed)
    elif kind == "stopped":
        edge = max(1, round(0.7 * len(val[1])))
        val, second = (val[0][:edge], val[1][:edge]), (val[0][edge:], val[1][edge:])
        callback = Stopped(decay, second)
    module, seconds = given.fit(train, val, callback)
    module.left_out = None
    found = {name: value.detach() for name, value in decay.decays().items()}
    given.tuned[kind, share] = module, found, seconds
    return given.tuned[kind, share]


def tuned(kind: str) -> Callable[[Given], Numbers]:
    """Return the arm that tunes decays of this kind, and tests the network of the same fit."""

    def arm(given: Given) -> Numbers:
        def fit(share: float) -> tuple[Network, float]:
            module, _, seconds = tune(kind, given, share)
            return module, seconds

        return by_share(given, fit)

    return arm


def again(kind: str, *, scaled: bool = False) -> Callable[[Given], Numbers]:
    """Return the arm that trains again on everything with the decays found; its cost includes that of finding them.

    Args:
        kind: What was tuned.
        scaled: Whether decays are multiplied by the share of the rows that they were found for: a penalty has the same
            size beside the sum of the losses, and the loss is a mean.
    """

    def arm(given: Given) -> Numbers:
        def fit(share: float) -> tuple[Network, float]:
            factor = 1 - share if scaled else 1.0
            _, found, tuning = tune(kind, given, share)
            decays = {name: factor * value for name, value in found.items()}
            module, training = given.fit(given.rows, given.rows, decays=decays)
            return module, tuning + training

        return by_share(given, fit)

    return arm


VALIDATION_SHARE = Experiment(
    question="600 images of Fashion-MNIST, 14×14, a share of them to validate; MLP 196-50-10, 500 steps of Adam; test "
    "loss by share; costs are of one share",
    prepare=prepare,
    arms={
        "everything, no decay": plain,
        "the training part, no decay": part_alone,
        "few (a decay per tensor)": tuned("few"),
        "few, trained again on everything": again("few"),
        "many (a decay per weight)": tuned("many"),
        "many, trained again on everything": again("many"),
        "many, again, decays scaled": again("many", scaled=True),
        "many, second split": tuned("stopped"),
        "many, prior (shared steps)": tuned("prior"),
        "many, prior, again": again("prior"),
        "many, rotating hold-outs": tuned("rotating"),
    },
    columns={str(share): Column(title=f"{share:.0%}") for share in SHARES},
    across="share of the images that validates",
    measure="test loss",
)
