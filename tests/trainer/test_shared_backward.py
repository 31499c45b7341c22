"""The run's backward pass is spared only where that changes no bit of the training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import LyapunovCallback
from tests.callbacks.perturbed_runs import run


class Checkpointed(nn.Module):
    """Its forward runs again in every backward pass, and moves the statistics of batch norm each time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return y


class Careless(Checkpointed):
    """Its backward pass draws random numbers of the run."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)
        return y


class DrawsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        np.random.rand()
        return g * 1.0


class NumPyNumbers(nn.Linear):
    """Its backward pass draws numbers of NumPy, its forward depends on them."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = DrawsInBackward.apply(super().forward(x * np.random.rand()))
        return y


class Detour(nn.Module):
    """A leaf that is no parameter, with a gradient of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.other = torch.ones(6, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.other


FRONTS: dict[str, tuple[Any, bool | None]] = {
    "linear": (lambda: nn.Linear(6, 8), True),
    "normalised": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2)), True),
    "convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Flatten()),
        True,
    ),
    "group norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.SiLU()), False),
    "checkpointed": (Checkpointed, False),
    "careless": (Careless, False),
    "numbers of NumPy": (lambda: NumPyNumbers(6, 8), False),
    "another leaf": (Detour, None),
}


class Step(LightningModule):
    def __init__(self, front: nn.Module, *, own_backward: bool = False) -> None:
        super().__init__()
        self.net, self.backwards = nn.Sequential(front, nn.LazyLinear(1)), 0
        self.net(torch.zeros(4, 6))

    def training_step(self, batch: Any) -> Tensor:
        return ((self.net(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Changes(Step):
    """At its fourth step an operation that torch writes out for second derivatives, with other bits."""

    def training_step(self, batch: Any) -> Tensor:
        h = self.net[0](batch[0])
        h = nn.functional.group_norm(h, 2) if self.global_step == 3 else h.tanh()
        return ((self.net[1](h) - batch[1]) ** 2).mean()


class OwnBackward(Step):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.backwards += 1
        loss.backward(*args, **kwargs)


def loader() -> Any:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 6, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), 8, shuffle=True)


@pytest.mark.parametrize("name", FRONTS)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulated"])
def test_the_run_is_the_same_to_the_last_bit(name: str, options: dict[str, Any]) -> None:
    front, same = FRONTS[name]

    def make() -> LightningModule:
        torch.manual_seed(0)
        return Step(front())

    callback = LyapunovCallback(2, align=2)
    with_it, state = run(make, loader, callback, **options)
    numbers = torch.get_rng_state()
    without, plain = run(make, loader, **options)
    assert torch.equal(state, plain)
    assert torch.equal(numbers, torch.get_rng_state())
    for key, value in without.state_dict().items():
        assert torch.equal(value, with_it.state_dict()[key]), key
    assert callback.follower.backward.is_same is same
    assert "backward" not in vars(with_it)
    assert bool(torch.isfinite(callback.exponents).all())


def test_a_loss_of_other_operations_is_compared_again() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        return Changes(nn.Linear(6, 8))

    callback = LyapunovCallback(2, align=2)
    with_it, _ = run(make, loader, callback)
    without, _ = run(make, loader)
    for key, value in without.state_dict().items():
        assert torch.equal(value, with_it.state_dict()[key]), key
    assert callback.follower.backward.is_same is False


def test_the_backward_pass_is_spared() -> None:
    """Only the comparisons at uses 1, 2, 4, … take a plain gradient; the run itself takes none."""
    passes = 0

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            nonlocal passes
            passes += 1
            return g * 1.0

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = Count.apply(super().forward(x))
            return y

    def make() -> LightningModule:
        torch.manual_seed(0)
        return Step(Counted(6, 8))

    callback = LyapunovCallback(1, align=0)
    run(make, loader, callback)
    # Five steps: a gradient with its graph each, comparisons at the first three and the fifth (uses 0, 1, 2, 4).
    followed, passes = passes, 0
    run(make, loader, LyapunovCallback(1, align=0, warmup_steps=100))
    assert passes == 5
    # Five gradients with their graphs, five products, comparisons at uses 0, 1, 2 and 4: no pass of the run itself.
    assert callback.follower.backward._uses == 5
    assert followed == 5 + 5 + 4


def test_an_overridden_backward_is_called() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        return OwnBackward(nn.Linear(6, 8))

    callback = LyapunovCallback(1, align=0)
    module, _ = run(make, loader, callback)
    assert module.backwards == 5
    assert callback.follower.backward.is_same is None


def test_two_processes_spare_it_too() -> None:
    """DDP averages what is handed over, as it does what a backward pass brings."""

    def make() -> LightningModule:
        torch.manual_seed(0)
        return Step(nn.Linear(6, 8))

    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 2}

    class Check(LyapunovCallback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert self.follower.backward.is_same is True
            assert self.follower.backward._uses == 6

    followed, _ = run(make, loader, Check(1, align=2), **options)
    plain, _ = run(make, loader, **options)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, followed.state_dict()[key]), key


class Power(nn.Linear):
    """max(Wx, 0)^1.5, whose second derivative passes NaN at 0, which the mask of the maximum takes out."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x).relu() ** 1.5
        return y


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_the_search_for_anomalies_is_the_run_s_own() -> None:
    def make() -> LightningModule:
        torch.manual_seed(0)
        return Step(Power(6, 8))

    callback = LyapunovCallback(2, align=2)
    _, state = run(make, loader, callback, detect_anomaly=True)
    _, plain = run(make, loader, detect_anomaly=True)
    assert torch.equal(state, plain)
    assert callback.follower.backward.is_same is None
