"""The mixed derivative of the training loss over many training batches, by differences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import Current, Identity, KroneckerFactored, LookAhead, Neumann
from lightning_nested.hyperparameters import ExampleWeights, GroupWeights, Scalar, WeightDecay
from lightning_nested.hyperparameters.outer_optimizer import OuterAdam
from tests.callbacks.test_hypergradient_look_ahead import SaveAfter, equal
from tests.callbacks.test_hypergradient_processes import _Dealt
from tests.callbacks.tuned_regression import ScalerAlone, data, noisy, sgd, smooth
from tests.trainers import trainer


class Weighted(LightningModule):
    """A regression with one weight per example, and what its steps were given."""

    example_weights: Any = None

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        losses = 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).flatten()
        if self.example_weights is not None:
            losses = losses * self.example_weights(batch[2])
        self.log("train", losses.mean())
        return losses.mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loaders(n: int = 32, batch: int = 8) -> tuple[DataLoader[Any], DataLoader[Any]]:
    x, y = data(n, 1).tensors
    indexed = TensorDataset(x, y, torch.arange(n))
    return DataLoader(indexed, batch, shuffle=True), DataLoader(data(16, 2), 16)


class Moves(Callback):
    """Keeps the hypergradient of the first outer step, and the weights it was taken at."""

    def __init__(self, tuner: HypergradientCallback) -> None:
        self.tuner = tuner
        self.found: Tensor | None = None
        self.weights: list[Tensor] = []

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
        if self.tuner.outer.pending and self.found is None:
            assert self.tuner.outer._pending is not None
            (self.found,) = (g.clone() for g in self.tuner.outer._pending)
            self.weights = [p.detach().clone() for p in pl_module.parameters()]


def test_a_pass_over_the_training_set_gives_the_product_with_each_examples_gradient() -> None:
    """−σ′ ⟨v, ∇ℓᵢ⟩/8 for the mean over batches of 8, four of them."""
    tuner = HypergradientCallback(
        ExampleWeights(32), solver=Identity(), at=Current(), train_batches=4, every_n_steps=1, warmup_steps=2
    )
    moves, module = Moves(tuner), Weighted(smooth())
    train, val = loaders()
    trainer(tuner, moves).fit(module, train, val)
    assert moves.found is not None
    net = smooth()
    for p, value in zip(net.parameters(), moves.weights, strict=True):
        p.data = value
    parameters = list(net.parameters())
    x, y = data(16, 2).tensors
    v = torch.autograd.grad(0.5 * ((net(x) - y) ** 2).mean(), parameters)
    x, y = data(32, 1).tensors
    expected = []
    for i in range(32):
        slope = torch.autograd.grad(0.5 * ((net(x[i]) - y[i]) ** 2).sum(), parameters)
        product = sum((a * b).sum() for a, b in zip(v, slope, strict=True))
        # Weights are at their start at the first outer step.
        expected.append(-0.25 * product / 32)
    # Central differences of length 3e-6 in float64: errors of about its square and of eps over it.
    torch.testing.assert_close(moves.found, torch.stack(expected), rtol=1e-6, atol=1e-9)


class Sharp(Weighted):
    """Differentiates by its parameters within the training step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        slopes = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
        return loss + 0.1 * torch.stack([slope.square().sum() for slope in slopes]).sum()


@pytest.mark.parametrize("kind", [Weighted, Sharp])
def test_differences_and_the_graph_agree_on_one_batch(kind: type[Weighted]) -> None:
    def fit(count: int) -> Tensor:
        tuner = HypergradientCallback(
            ExampleWeights(32),
            optimizer=sgd(1.0),
            solver=Neumann(num_terms=3),
            at=Current(),
            train_batches=count,
            every_n_steps=1,
            warmup_steps=0,
            self_check=False,
        )
        trainer(tuner, max_epochs=3).fit(kind(smooth()), *loaders(batch=32))
        return tuner.values()["example_weights"]

    by_graph, by_differences = fit(0), fit(1)
    assert (by_graph - 0.5).abs().min() > 1e-6
    torch.testing.assert_close(by_differences, by_graph, rtol=1e-7, atol=1e-9)


def test_the_factor_of_a_gradient_scaler_cancels() -> None:
    """A power of two: no bit of float64 changes but in the solve's own sums."""

    def fit(**options: Any) -> Tensor:
        # The first outer step comes before any statistics of the curvature.
        tuner = HypergradientCallback(
            ExampleWeights(32), optimizer=sgd(0.1), train_batches=2, every_n_steps=1, warmup_steps=0
        )
        trainer(tuner, **options).fit(Weighted(smooth()), *loaders())
        return tuner.values()["example_weights"]

    torch.manual_seed(0)
    plain = fit()
    torch.manual_seed(0)
    scaled = fit(plugins=ScalerAlone())
    # Neither at their start nor at a bound.
    assert 1e-6 < (plain - 0.5).abs().min() < (plain - 0.5).abs().max() < 0.49
    torch.testing.assert_close(scaled, plain, rtol=1e-8, atol=1e-11)


class Drawn(Weighted):
    """Adds noise to its inputs that is no layer's: it is drawn in evaluation mode too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0] + torch.randn_like(batch[0])
        return super().training_step([x, *batch[1:]], batch_idx)


def test_both_weights_see_the_same_noise() -> None:
    """Differences of losses at other noise, over a length of 3e-6, would be of order 10⁵."""
    tuner = HypergradientCallback(
        ExampleWeights(32), solver=Identity(), at=Current(), train_batches=4, every_n_steps=1
    )
    moves = Moves(tuner)
    trainer(tuner, moves).fit(Drawn(smooth()), *loaders())
    assert moves.found is not None
    assert float(moves.found.abs().max()) < 100


MODES: list[bool] = []  # where no isolation reaches


class Moded(Weighted):
    """Keeps the mode of each call of its step."""

    scale: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        MODES.append(self.training)
        return super().training_step(batch, batch_idx) * (1.0 if self.scale is None else self.scale.value())


@pytest.mark.parametrize("alone", [True, False])
def test_weights_alone_are_evaluated_without_the_noise_of_dropout(alone: bool) -> None:
    """Beside another hyperparameter, which may be a rate of dropout, in training mode."""
    MODES.clear()
    tuned = [ExampleWeights(32), *([] if alone else [Scalar("scale", init=1.0)])]
    tuner = HypergradientCallback(
        tuned, at=Current(), solver=Identity(), train_batches=2, every_n_steps=4, self_check=False
    )
    trainer(tuner).fit(Moded(smooth()), *loaders())
    # Four training steps, and two batches at two weights each.
    assert (MODES.count(True), MODES.count(False)) == ((4, 4) if alone else (8, 0))


def _fit_in_processes(folder: Path, devices: int) -> None:
    """One process sees batches of 8 in order, two see every other example of each."""
    tuner = HypergradientCallback(ExampleWeights(32), every_n_steps=3, train_batches=3, warmup_steps=1)
    module = Weighted(smooth())
    processes = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
    x, y = data(32, 1).tensors
    train = DataLoader(TensorDataset(x, y, torch.arange(32)), 8 // devices)
    val = DataLoader(data(16, 2), 16 // devices)

    class Keep(Callback):
        def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
            weights = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            kept = tuner.values()["example_weights"], weights
            torch.save(kept, folder / f"{devices}_{trainer.global_rank}.pt")

    fit = trainer(tuner, Keep(), use_distributed_sampler=False, max_epochs=3, **processes)
    fit.fit(module, *((_Dealt(train), _Dealt(val)) if devices == 2 else (train, val)))


@pytest.mark.filterwarnings(
    "default"
)  # forking, and loaders of another kind, are commented on by the Trainer
def test_two_processes_equal_one_on_the_joined_batches(tmp_path: Path) -> None:
    """With the default solver, whose damping is relative to factors that all processes share."""
    _fit_in_processes(tmp_path, 1)
    _fit_in_processes(tmp_path, 2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert (one[0] - 0.5).abs().min() > 1e-6
    for joined, a, b in zip(one, first, second, strict=True):
        assert torch.equal(a, b)
        # Sums in another order, over differences of length 3e-6.
        torch.testing.assert_close(a, joined, rtol=1e-8, atol=1e-10)


def test_weights_alone_look_at_the_whole_training_set_by_default() -> None:
    tuner = HypergradientCallback(ExampleWeights(32), overhead=5.0)
    trainer(tuner, max_epochs=20).fit(Weighted(smooth()), *loaders())
    assert tuner.outer_loop.train_batches.count == 4
    assert isinstance(tuner.plan.point, Current)
    assert bool((tuner.values()["example_weights"] != 0.5).all())
    assert tuner.plan.pace is not None
    assert tuner.plan.pace.cost / tuner.plan.pace.every_n_steps <= 5.0


@pytest.mark.parametrize(
    ("options", "point"),
    [({"at": LookAhead()}, LookAhead), ({"solver": Identity()}, LookAhead), ({"at": Current()}, Current)],
)
def test_what_is_given_stays(options: dict[str, Any], point: type) -> None:
    assert isinstance(HypergradientCallback(ExampleWeights(3), **options).plan.point, point)
    both = HypergradientCallback([ExampleWeights(3), WeightDecay()])
    assert isinstance(both.plan.point, LookAhead)


def test_weights_of_groups_alone_are_tuned_at_the_current_weights() -> None:
    plan = HypergradientCallback(GroupWeights(["a", "b"])).plan
    assert isinstance(plan.point, Current)
    assert plan.solver == KroneckerFactored(relative=0.3)
    both = HypergradientCallback([GroupWeights(["a", "b"]), WeightDecay()])
    assert isinstance(both.plan.point, LookAhead)


def test_fewer_batches_where_the_budget_is_short() -> None:
    tuner = HypergradientCallback(ExampleWeights(32), overhead=0.3, every_n_steps=10)
    trainer(tuner, max_epochs=4).fit(Weighted(smooth()), *loaders())
    # 0.3·10 gradients: the outer batch is of two inner ones, and a further batch costs two thirds.
    assert tuner.outer_loop.train_batches.count == 1


def test_the_training_is_left_alone() -> None:
    """Batch statistics, random numbers, order of batches, attributes: as without, at a rate of zero."""

    def fit(*callbacks: Callback) -> Weighted:
        torch.manual_seed(3)
        module = Weighted(noisy().double())
        trainer(*callbacks, max_epochs=2).fit(module, *loaders())
        return module

    def tuner(count: int) -> HypergradientCallback:
        return HypergradientCallback(
            ExampleWeights(32), optimizer=sgd(0.0), train_batches=count, every_n_steps=2, warmup_steps=0
        )

    ours, graph = fit(tuner(3)), fit(tuner(0))
    assert ours.seen == graph.seen == 8
    assert equal(dict(ours.state_dict()), dict(graph.state_dict()))


def test_resuming_is_bit_exact(tmp_path: Path) -> None:
    def run(*callbacks: Callback, resume: Path | None = None) -> tuple[HypergradientCallback, Weighted]:
        tuner = HypergradientCallback(ExampleWeights(32), every_n_steps=3, train_batches=3, warmup_steps=1)
        module, (train, val) = Weighted(smooth()), loaders()
        train = DataLoader(train.dataset, 8)
        trainer(tuner, *callbacks, max_epochs=4).fit(module, train, val, ckpt_path=resume)
        return tuner, module

    path = tmp_path / "half.ckpt"
    whole, module = run(SaveAfter(path))
    resumed, again = run(resume=path)
    assert whole.state_dict()["train_batches"]["position"] > 0
    assert equal(whole.state_dict(), resumed.state_dict())
    assert equal(dict(module.state_dict()), dict(again.state_dict()))


class Once(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        x, y = data(32, 1).tensors
        return iter(zip(x, y, torch.arange(32), strict=True))


def test_data_that_can_be_read_once_take_the_batch_of_the_step() -> None:
    def fit(count: int | None) -> HypergradientCallback:
        tuner = HypergradientCallback(
            ExampleWeights(32), every_n_steps=1, warmup_steps=0, train_batches=count
        )
        batches = iter(DataLoader(Once(), 8))
        trainer(tuner, max_steps=3).fit(Weighted(smooth()), batches, loaders()[1])
        return tuner

    assert fit(None).outer_loop.train_batches.count == 0
    with pytest.raises(
        MisconfigurationException, match=r"train_batches=2 needs .* Got a one-pass .* set train_batches=0"
    ):
        fit(2)


def test_entries_of_long_tensors_share_one_step_size() -> None:
    """Both moves are those of the formula; an entry of many times the mean is cut off."""
    tensor = torch.zeros(400, dtype=torch.float64, requires_grad=True)
    optimizer = OuterAdam([tensor], lr=0.01)
    first = torch.linspace(-1, 1, 400, dtype=torch.float64)
    first[0] = 50.0
    second = first.flip(0) * 0.1
    expected, total = torch.zeros_like(first), 0.0
    for gradient in (first, second):
        total += float(gradient.square().mean())
        expected -= 0.08 * (gradient / total**0.5).clamp(-1, 1)
        tensor.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(tensor.detach(), expected, rtol=1e-12, atol=1e-15)


def test_few_numbers_move_as_under_adam() -> None:
    tensors = [torch.ones(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    kinds = (OuterAdam, torch.optim.Adam)
    for tensor, kind in zip(tensors, kinds, strict=True):
        optimizer = kind([tensor], lr=0.1)
        for k in range(3):
            tensor.grad = torch.arange(5).double() - k
            optimizer.step()
    assert torch.equal(*tensors)
