"""Influence of training examples on the validation loss: closed forms, training without each example, wrong labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.datamodules.in_memory import TensorBatches
from lightning_nested.hypergradient import (
    AdamDiagonal,
    ConjugateGradient,
    DenseSolve,
    KroneckerFactored,
    influence,
)
from tests.conftest import Normal

DECAY, SIZE = 0.02, 60


def logistic(x: Tensor, y: Tensor, kept: Tensor | None = None) -> nn.Linear:
    """Logistic regression with a decay, trained by Newton's method; ``kept`` examples have the weight 1/n."""
    mask = torch.ones(len(x), dtype=x.dtype) if kept is None else kept.to(x.dtype)
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)

    def objective(w: Tensor) -> Tensor:
        losses = functional.cross_entropy(ones @ w.view(2, -1).T, y, reduction="none")
        return (mask * losses).sum() / len(x) + DECAY / 2 * w.square().sum()

    w = torch.zeros(2 * ones.shape[1], dtype=x.dtype)
    for _ in range(8):  # quadratic convergence: the last step is rounding
        w -= torch.linalg.solve(torch.func.hessian(objective)(w), torch.func.grad(objective)(w))
    layer = nn.Linear(x.shape[1], 2).double()
    with torch.no_grad():
        layer.weight.copy_(w.view(2, -1)[:, :-1])
        layer.bias.copy_(w.view(2, -1)[:, -1])
    return layer


@pytest.fixture
def data(normal: Normal) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, x_val, truth = normal(SIZE, 4), normal(50, 4), normal(4)
    return x, (x @ truth + normal(SIZE) > 0).long(), x_val, (x_val @ truth > 0).long()


def test_it_is_what_training_without_each_example_gives(data: tuple[Tensor, ...]) -> None:
    x, y, x_val, y_val = data
    trained = logistic(x, y)
    batches = [(x[:25], y[:25]), (x[25:], y[25:])]
    found = influence(
        trained, batches, [(x_val, y_val)], solver=ConjugateGradient(max_iterations=50, tolerance=1e-12),
        weight_decay=DECAY,
    )  # fmt: skip
    before = functional.cross_entropy(trained(x_val), y_val).item()
    again = []
    for i in range(0, SIZE, 3):
        kept = torch.arange(SIZE) != i
        again.append(functional.cross_entropy(logistic(x, y, kept)(x_val), y_val).item() - before)
    left_out = torch.tensor(again, dtype=torch.float64)
    found = found[::3]
    # To first order a change is too small by 1 - h; the leverage h is 10 weights for 60 examples on average.
    assert float((found - left_out).norm() / left_out.norm()) < 10 / (SIZE - 10)
    assert float(torch.corrcoef(torch.stack([found, left_out]))[0, 1]) > 0.99


def test_it_is_the_derivative_by_the_weight_of_an_example(data: tuple[Tensor, ...]) -> None:
    x, y, x_val, y_val = data
    found = influence(
        logistic(x, y), [(x, y)], [(x_val, y_val)], solver=DenseSolve(damping=DECAY), weight_decay=0.0
    )
    step = 1e-4
    for i in (0, 17, 42):
        value = []
        for sign in (1, -1):
            weights = torch.ones(SIZE, dtype=torch.float64)
            weights[i] -= sign * step
            value.append(functional.cross_entropy(logistic(x, y, weights)(x_val), y_val).item())
        # Rounding of losses of a few 0.1, over 2e-4; the third order of the step is less.
        assert float(found[i]) == pytest.approx((value[0] - value[1]) / (2 * step), rel=1e-6, abs=1e-11)


def test_kronecker_factors_and_conjugate_gradient_find_wrong_labels_better_than_chance() -> None:
    source = DigitsDataModule(train_size=300, val_size=200, wrong_label_fraction=0.3)
    source.setup()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(net(source.train_images), source.train_labels).backward()
        optimizer.step()
    train = DataLoader(TensorDataset(source.train_images, source.train_labels), 100)
    state = [p.clone() for p in net.parameters()]
    for solver in (None, KroneckerFactored(damping=0.1), ConjugateGradient(damping=0.1)):
        found = influence(net, train, [(source.val_images, source.val_labels)], solver=solver)
        order = found.argsort()
        # Of 300, 90 are wrong: chance would give 27 ± 4.
        assert int(source.wrong[order[:90]].sum()) > 55, solver
    assert all(torch.equal(a, b) for a, b in zip(state, net.parameters(), strict=True))
    assert net.training


def test_other_losses_and_sequences(normal: Normal) -> None:
    layer = nn.Linear(3, 2).double()
    batch = (normal(5, 4, 3), normal(5, 4, 2))
    found = influence(layer, [batch], [batch], solver=DenseSolve(damping=0.1))
    explicit = influence(
        layer,
        [batch],
        [batch],
        solver=DenseSolve(damping=0.1),
        loss=lambda o, y: 0.5 * (o - y).square().mean((1, 2)),
    )
    torch.testing.assert_close(found, explicit, rtol=1e-9, atol=1e-12)


FOUR = TensorDataset(torch.arange(8.0).view(4, 2), torch.ones(4, 1))


def test_samplers_in_order_are_taken() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 1)
    whole = [FOUR.tensors]
    loaders = (
        DataLoader(FOUR, batch_size=3),
        DataLoader(FOUR, batch_size=2, sampler=range(4)),
        DataLoader(FOUR, batch_sampler=BatchSampler(SequentialSampler(FOUR), 3, False)),
        DataLoader(FOUR, batch_sampler=[[0, 1], [2, 3]]),
        TensorBatches(*FOUR.tensors).loader(batch_size=3),
    )
    solver = DenseSolve(damping=0.1)
    expected = influence(layer, whole, whole, solver=solver)
    for loader in loaders:
        # Differences in single precision.
        torch.testing.assert_close(
            influence(layer, loader, whole, solver=solver), expected, rtol=1e-2, atol=1e-3
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": functional.mse_loss}, r"an entry for each of 4 examples. Got shape \(\)"),
        ({"solver": AdamDiagonal()}, "Got AdamDiagonal"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"training_data": DataLoader(FOUR, shuffle=True)}, "order .* Got a loader with RandomSampler"),
        (
            {"training_data": DataLoader(FOUR, batch_sampler=BatchSampler(RandomSampler(FOUR), 2, False))},
            "RandomSampler",
        ),
        ({"training_data": DataLoader(FOUR, sampler=SubsetRandomSampler(range(4)))}, "SubsetRandomSampler"),
        (
            {"training_data": DataLoader(FOUR, batch_size=None, sampler=WeightedRandomSampler([1.0] * 4, 4))},
            "WeightedRandomSampler",
        ),
        (
            {"training_data": (batch for batch in DataLoader(FOUR))},
            "Got generator, which can be read only once",
        ),
        ({"training_data": []}, "training_data must hold examples"),
        ({"validation_data": []}, "validation_data must hold examples"),
        ({"training_data": [{"x": torch.ones(4, 2), "y": torch.ones(4, 1)}]}, r"Got a dict of \['x', 'y'\]"),
        ({"validation_data": [torch.ones(4, 2)]}, "two tensors first. Got Tensor of shape"),
        ({"module": LightningModule()}, "Got LightningModule without a forward"),
    ],
)
def test_what_cannot_be_done_is_refused(options: Any, message: str) -> None:
    batches = [(torch.ones(4, 2), torch.ones(4, 1))]
    with pytest.raises((ValueError, TypeError), match=message):
        influence(
            **{"module": nn.Linear(2, 1), "training_data": batches, "validation_data": batches, **options}
        )
