"""Searches for a setting, which train before ``on_fit_start``; dev runs; and modules that are complete late."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import GameSpectrumCallback, GeneratorEMA, HypergradientCallback, SampleGrid
from lightning_nested.hypergradient import FiniteDifference, GaussNewton, Identity
from lightning_nested.hyperparameters import (
    Categorical,
    Cutout,
    DropoutRates,
    ExampleWeights,
    Integer,
    LossWeights,
    Scalar,
    WeightDecay,
)
from lightning_nested.modules import GANModule, HypernetworkModule, NestedModule
from lightning_nested.modules.game import GameLoop
from lightning_nested.modules.nested import GradientStrategy, Implicit, LoopOptions, Unrolled
from tests.callbacks.exact import decay_all, exact
from tests.trainers import trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You passed in a `val_dataloader`", "ignore:Checkpoint directory", "ignore:.*weights_only"
)

X = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()


class Data(lightning.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(X, Y, torch.arange(24)), self.batch_size)

    val_dataloader = train_dataloader


class Weighted(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.lr = nn.Linear(2, 2), 0.1
        self.example_weights: Any = None
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        loss = (losses if self.example_weights is None else losses * self.example_weights(batch[2])).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class Cleaner(NestedModule):
    def __init__(self, gradient: GradientStrategy = Implicit(), **options: Any) -> None:  # noqa: B008
        torch.manual_seed(0)
        super().__init__([ExampleWeights(24), WeightDecay()], gradient=gradient, **options)
        self.net, self.lr = nn.Linear(2, 2), 0.1

    def inner_loss(self, batch: Any) -> Tensor:
        losses = functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return (losses * self.example_weights(batch[2])).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.inner_parameters(), self.lr)


class Responding(HypernetworkModule):
    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 2), WeightDecay())

    def inner_loss(self, batch: Any, values: Any) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def outer_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])


def gan(**options: Any) -> GANModule:
    return GANModule(
        nn.Linear(3, 2),
        nn.Linear(2, 1),
        latent_dim=3,
        optimizer=lambda p: torch.optim.Adam(p, 0.01),
        steps_per_player={"discriminator": 4},
        **options,
    )


def tuner(**options: Any) -> HypergradientCallback:
    return exact([ExampleWeights(24), decay_all()], solver=Identity(), **options)


# ---- searches


@pytest.mark.parametrize("order", [1, -1])
def test_a_search_for_the_learning_rate_sees_the_start_values(order: int, tmp_path: Path) -> None:
    module, plain = Weighted(), Weighted()
    callbacks = [tuner(), LearningRateFinder(num_training_steps=8)][::order]
    trainer(*callbacks, folder=tmp_path).fit(module, datamodule=Data())
    trainer(LearningRateFinder(num_training_steps=8), folder=tmp_path).fit(plain, datamodule=Data())
    # Example weights of 0.5 halve the loss at the weights both begin with.
    assert module.losses[0] == pytest.approx(0.5 * plain.losses[0], rel=1e-6)
    assert module.example_weights is None


def test_the_tuner_leaves_nothing_behind(tmp_path: Path) -> None:
    callback, module = tuner(), Weighted()
    fit = trainer(callback, folder=tmp_path)
    Tuner(fit).lr_find(module, datamodule=Data(), num_training=8, update_attr=False)
    assert module.example_weights is None
    assert not callback.use.is_open
    fit.fit(module, datamodule=Data())
    assert callback.outer_steps == 12


@pytest.mark.parametrize("gradient", [Implicit(), Unrolled(num_steps=3)])
@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_a_search_does_not_move_a_nested_module(
    finder: Any, gradient: GradientStrategy, tmp_path: Path
) -> None:
    options = {"num_training_steps": 5, "update_attr": False}
    if finder is BatchSizeFinder:
        options = {"max_trials": 1, "steps_per_trial": 2}
    module, plain = Cleaner(gradient), Cleaner(gradient)
    data = Data()
    trainer(finder(**options), folder=tmp_path).fit(module, datamodule=data)
    same = Data()
    same.batch_size = data.batch_size
    trainer(folder=tmp_path).fit(plain, datamodule=same)
    assert module.inner_steps == plain.inner_steps == 24 // data.batch_size
    assert module.outer_steps == plain.outer_steps
    for name, value in plain.values().items():
        torch.testing.assert_close(module.values()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("make", [gan, Responding])
def test_a_search_for_the_batch_size_trains_what_has_several_optimizers(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    data, module = Data(), make()
    fit = trainer(BatchSizeFinder(max_trials=1, steps_per_trial=2), folder=tmp_path)
    fit.fit(module, datamodule=data)
    batches = 24 // data.batch_size
    assert getattr(module, "game_updates", None) in (None, batches // 5)
    assert getattr(module, "inner_steps", batches) == batches


def test_hyperparameters_have_start_values_before_they_are_built() -> None:
    assert ExampleWeights(3)(torch.tensor([0, 2])).tolist() == pytest.approx([0.5, 0.5])
    assert float(LossWeights(["a", "b"])({"a": torch.ones(()), "b": torch.ones(())})) == pytest.approx(2.0)
    assert float(Scalar("s", 3.0).value()) == 3.0
    assert float(Integer("n", 0, 4, 2).value()) == 2.0
    assert Categorical("c", ["x", "y"], 1).choice() == "y"
    assert float(DropoutRates(init=0.25).rate()) == pytest.approx(0.25)
    assert Cutout(2)(torch.ones(1, 1, 4, 4)).shape == (1, 1, 4, 4)
    assert not ExampleWeights(3).built


def test_a_loaded_module_reads_its_saved_values(tmp_path: Path) -> None:
    module = Cleaner()
    fit = trainer()
    fit.fit(module, datamodule=Data())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Cleaner.load_from_checkpoint(tmp_path / "a.ckpt")
    batch = X, Y, torch.arange(24)
    torch.testing.assert_close(loaded.inner_loss(batch), module.inner_loss(batch), rtol=0, atol=0)


# ---- dev runs


@pytest.mark.parametrize("count", [True, 3, 7])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Cleaner(inner_steps_per_outer=20),
        lambda: Cleaner(loop=LoopOptions(warmup_steps=50)),
        lambda: Cleaner(Unrolled(num_steps=20, truncate=2), loop=LoopOptions(warmup_steps=50)),
        Responding,
    ],
    ids=["implicit", "warmup", "unrolled", "hypernetwork"],
)
def test_a_dev_run_makes_one_outer_step(make: Callable[[], Any], count: Any) -> None:
    module = make()
    trainer(fast_dev_run=count).fit(module, datamodule=Data())
    assert (module.inner_steps, module.outer_steps) == (int(count), 1)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_dev_run_makes_one_outer_step_of_the_callback(count: int, batches: int) -> None:
    for curvature in (None, FiniteDifference(), GaussNewton(outputs="net")):
        if batches > 1 and isinstance(curvature, GaussNewton):
            continue
        callback, module, data = tuner(warmup_steps=100, curvature=curvature), Weighted(), Data()
        for steps in (1, 2):  # in every fit
            fit = trainer(callback, fast_dev_run=count, accumulate_grad_batches=batches)
            fit.fit(module, datamodule=data)
            assert callback.outer_steps == steps


@pytest.mark.parametrize(("count", "updates"), [(True, 1), (3, 1), (7, 1)])
@pytest.mark.parametrize(
    "loop",
    [GameLoop(), GameLoop(reuse_batch=True), GameLoop(accumulate_grad_batches=2)],
    ids=["fresh", "reused", "accumulated"],
)
def test_a_dev_run_makes_one_game_update(loop: GameLoop, count: Any, updates: int) -> None:
    module = gan(loop=loop)
    before = [p.detach().clone() for p in module.parameters()]
    fit = trainer(fast_dev_run=count)
    fit.fit(module, datamodule=Data())
    assert module.game_updates == fit.global_step == updates
    assert not any(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_dev_run_leaves_no_files(tmp_path: Path) -> None:
    class Drawn(GANModule):
        def sample_for_metrics(self, labels: Tensor, **_: Any) -> Tensor:
            return torch.zeros(len(labels), 1, 2, 2)

    module = Drawn(nn.Linear(3, 2), nn.Linear(2, 1), latent_dim=3, optimizer=torch.optim.Adam)
    module.num_classes = 1
    module.real_data = lambda batch: (batch[0], None)  # type: ignore[method-assign]
    module.sample_labels = lambda count: None  # type: ignore[method-assign]
    trainer(SampleGrid(1), folder=tmp_path, fast_dev_run=True).fit(module, datamodule=Data())
    assert module.game_updates == 1
    assert list(tmp_path.iterdir()) == []


# ---- modules that are complete late


class InSetup(Weighted):
    def setup(self, stage: str) -> None:
        self.head, self.my_weights = nn.Linear(2, 2), None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = functional.cross_entropy(self.head(batch[0]), batch[1], reduction="none")
        return (losses if self.my_weights is None else losses * self.my_weights(batch[2])).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.head(batch[0]), batch[1])


class InConfigureModel(InSetup):
    def setup(self, stage: str) -> None:
        self.my_weights = None

    def configure_model(self) -> None:
        self.head = nn.Linear(2, 2)


class AtStart(InSetup):
    """Its attribute is set after the callback's own ``setup`` has replaced it."""

    def __init__(self) -> None:
        super().__init__()
        self.my_weights = None


@pytest.mark.parametrize("make", [InSetup, InConfigureModel, AtStart])
def test_names_are_those_of_the_complete_module(make: Callable[[], Any]) -> None:
    weights = ExampleWeights(24, name="my_weights")
    module = make()
    callback = exact([weights, "head.bias"], curvature=GaussNewton(outputs="head"), solver=Identity())
    trainer(callback).fit(module, datamodule=Data())
    assert callback.outer_steps == 12
    assert float(callback.values()["my_weights"].std()) > 0
    assert module.my_weights is None


def test_a_missing_name_is_still_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"'their_weights'\. Got InSetup without it"):
        trainer(HypergradientCallback(ExampleWeights(24, name="their_weights"))).fit(
            InSetup(), datamodule=Data()
        )


class Lazy(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LazyLinear(2)  # type: ignore[assignment]


# The first step begins before the hyperparameters are built, so no gradient reaches them there.
@pytest.mark.filterwarnings(
    "ignore:Lazy modules",
    "ignore:.*UninitializedParameter",
    "ignore:A layer with",
    "ignore:.*No gradient reaches",
)
@pytest.mark.parametrize("checks", [0, 1])
def test_lazy_parameters_are_tuned_once_they_have_a_shape(checks: int) -> None:
    callback = tuner()
    trainer(callback, num_sanity_val_steps=checks).fit(Lazy(), datamodule=Data())
    assert callback.outer_steps == 12
    assert "weight_decay/net.weight" in callback.values() or "weight_decay" in callback.values()


class Spare(Weighted):
    """Has a lazy layer, which it calls from a step on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.spare, self.first = nn.LazyLinear(2), first

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if self.global_step < self.first else loss + self.spare(batch[0]).square().mean()


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*UninitializedParameter", "ignore:A layer with")
@pytest.mark.parametrize(
    ("first", "include", "names"),
    [
        (5, None, {"net.weight", "spare.weight"}),
        (99, None, {"net.weight"}),
        (99, ["net.*"], {"net.weight", "net.bias"}),
        (5, ["net.*", "spare.bias"], {"net.weight", "net.bias", "spare.bias"}),
        (99, ["net.*", "spare.*"], {"net.weight", "net.bias"}),
    ],
)
def test_a_lazy_layer_is_decayed_from_its_first_batch_on(
    first: int, include: list[str] | None, names: set[str]
) -> None:
    decay = WeightDecay(include=include, init=1e-3)
    callback = exact(decay, solver=Identity())
    trainer(callback).fit(Spare(first), datamodule=Data())
    assert callback.outer_steps == 12
    assert set(decay.parameter_names) == names
    # Those of the first layer are moved from the first step on.
    assert float(decay.decays()["net.weight"].detach()) != pytest.approx(1e-3)


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*UninitializedParameter", "ignore:A layer with")
def test_a_pattern_that_only_a_lazy_layer_may_match_is_no_excuse_for_another() -> None:
    callback = exact(WeightDecay(include=["net.*", "spare.*", "sqare.*"]), solver=Identity())
    with pytest.raises(ValueError, match=r"Got 'sqare\.\*', which matches none; close names: spare"):
        trainer(callback).fit(Spare(99), datamodule=Data())


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*UninitializedParameter", "ignore:A layer with")
@pytest.mark.parametrize("first", [99, 5])
def test_a_second_fit_goes_on_where_a_lazy_layer_had_no_batch(first: int) -> None:
    decay, module, datamodule = WeightDecay(), Spare(99), Data()
    callback = HypergradientCallback(decay, every_n_steps=1, warmup_steps=0)
    for made, reached in ((12, False), (24, first == 5)):
        trainer(callback).fit(module, datamodule=datamodule)
        assert callback.outer_steps == made
        assert decay.parameter_names == (("net.weight", "spare.weight") if reached else ("net.weight",))
        module.first = first


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*UninitializedParameter", "ignore:A layer with")
@pytest.mark.parametrize("first", [99, 15])
def test_a_run_is_resumed_where_a_lazy_layer_had_no_batch(first: int, tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    for epochs, saved, reached in ((1, None, False), (2, file, first == 15)):
        decay = WeightDecay()
        callback = HypergradientCallback(decay, every_n_steps=1, warmup_steps=0)
        run = trainer(callback, max_epochs=epochs)
        run.fit(Spare(first), datamodule=Data(), ckpt_path=saved, weights_only=False)
        run.save_checkpoint(file)
        assert callback.outer_steps == 12 * epochs
        assert decay.parameter_names == (("net.weight", "spare.weight") if reached else ("net.weight",))


def test_a_nested_module_refuses_lazy_layers() -> None:
    class Nested(Cleaner):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.LazyLinear(2)

    with pytest.raises(MisconfigurationException, match=r"Got lazy ones: spare\.weight, spare\.bias; call"):
        trainer().fit(Nested(), datamodule=Data())


class LateGame(GANModule):
    def __init__(self) -> None:
        super().__init__(
            nn.Identity(), nn.Identity(), latent_dim=3, optimizer=lambda p: torch.optim.Adam(p, 0.01)
        )

    def configure_model(self) -> None:
        self.generator, self.discriminator = nn.Linear(3, 2), nn.Linear(2, 1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def test_players_may_be_made_in_configure_model() -> None:
    ema, spectrum, module = GeneratorEMA(0.5, start=0), GameSpectrumCallback(4, k=2), LateGame()
    trainer(ema, spectrum).fit(module, datamodule=Data())
    assert module.game_updates == ema.updates == 6
    assert [found.game_updates for found in spectrum.history] == [1, 4]
    assert isinstance(ema.averaged(), nn.Linear)


class Pictures(Weighted):
    """A tensor of the module that is not trained: a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0] + self.shift), batch[1])


class Fails(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        raise RuntimeError("interrupted")


@pytest.mark.parametrize("fails", [False, True])
def test_a_tuned_tensor_is_frozen_again_after_the_fit(fails: bool) -> None:
    module = Pictures()
    callback = exact("shift", solver=Identity())
    if fails:
        with pytest.raises(RuntimeError, match="interrupted"):
            trainer(callback, Fails()).fit(module, datamodule=Data())
    else:
        for _ in range(2):
            trainer(callback).fit(module, datamodule=Data())
        assert callback.values()["shift"].abs().max() > 0
    assert not module.shift.requires_grad  # type: ignore[union-attr]
