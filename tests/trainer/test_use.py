"""The life of every callback and module: how a fit ends, a second fit, and an object that is in use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import (
    GameSpectrumCallback,
    GenerativeMetrics,
    GeneratorEMA,
    HypergradientCallback,
    LyapunovCallback,
    ModuleEvaluator,
    SampleGrid,
)
from lightning_nested.datamodules import DigitsDataModule
from lightning_nested.demos import GameReport, LabelNoiseReport, ModeCoverage
from lightning_nested.hypergradient import FiniteDifference, GaussNewton, Identity
from lightning_nested.hyperparameters import ExampleWeights, WeightDecay
from lightning_nested.modules import GANModule, HypernetworkModule, ImageClassifier, NestedModule
from lightning_nested.trainer.use import Use
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.running_games import zoo
from tests.trainers import trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:The classifier labels"
)

POINTS = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
CLASSES = (POINTS[:, 0] > 0).long()


def loader(size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(POINTS, CLASSES, torch.arange(24)), size, **options)


class Data(lightning.LightningDataModule):
    """Pairs of points and classes; the mixture that ModeCoverage knows is made up."""

    centres, std = torch.zeros(1, 2), 1.0

    def __init__(self, light: float = 0.0) -> None:
        super().__init__()
        self.light = light

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(POINTS + self.light, CLASSES, torch.arange(24)), 4)

    val_dataloader = test_dataloader = train_dataloader


class Pictures(Data):
    def train_dataloader(self) -> DataLoader[Any]:
        pictures = (POINTS.tanh() * self.light).reshape(-1, 1, 1, 2).expand(-1, 1, 2, 2)
        return DataLoader(TensorDataset(pictures, CLASSES), 4)

    val_dataloader = test_dataloader = train_dataloader


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.head = nn.Sequential(nn.Linear(2, 4), nn.Tanh()), nn.Linear(4, 2)
        self.example_weights: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = functional.cross_entropy(self.head(self.net(batch[0])), batch[1], reduction="none")
        return (losses if self.example_weights is None else losses * self.example_weights(batch[2])).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.head(self.net(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


class Pairs(GANModule):
    """A generator and a discriminator of points of two classes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(3, 2), nn.Linear(2, 1), latent_dim=3, optimizer=lambda p: torch.optim.Adam(p, 0.01)
        )
        self.num_classes = 2

    def real_data(self, batch: Any) -> tuple[Tensor, None]:
        return batch[0], None

    def sample_labels(self, count: int) -> None:
        return None

    def sample_for_metrics(self, labels: Tensor, *, batch_norm: str, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            points: Tensor = self.generator(torch.randn(len(labels), 3, generator=generator))
        return points.tanh().reshape(-1, 1, 1, 2).expand(-1, 1, 2, 2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Cleaner(NestedModule):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            [ExampleWeights(24), WeightDecay()], inner_optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
        )
        self.net = nn.Linear(2, 2)

    def inner_loss(self, batch: Any) -> Tensor:
        losses = functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return (losses * self.example_weights(batch[2])).mean()

    def outer_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])


class Responding(HypernetworkModule):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(2, 2), WeightDecay())

    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def outer_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])


def digits() -> DigitsDataModule:
    return DigitsDataModule(
        batch_size=10,
        val_batch_size=2000,
        train_size=30,
        val_size=10,
        wrong_label_fraction=0.4,
        with_index=True,
    )


def classifier() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier("mlp", optimizer=lambda p: torch.optim.SGD(p, lr=0.01))


def tuner(size: int = 24, **options: Any) -> HypergradientCallback:
    return exact([ExampleWeights(size), decay_all()], solver=Identity(), **options)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures of reports, which take most of their time."""
    for name, figure in {
        "game_report": "game_figure",
        "label_noise_report": "label_noise_figure",
        "mode_coverage": "mode_figure",
    }.items():
        monkeypatch.setattr(f"lightning_nested.demos.{name}.{figure}", lambda *_, **__: None)
    monkeypatch.setattr("lightning_nested.demos.report.write_report", lambda *_, **__: None)


Case = tuple[Callable[[], list[Callback]], Callable[[], LightningModule], Callable[[], Any]]
EVALUATOR = ModuleEvaluator(module=nn.Flatten(), label="pixels")
CALLBACKS: dict[str, Case] = {
    "HypergradientCallback": (lambda: [tuner()], Plain, Data),
    "GaussNewton": (lambda: [tuner(curvature=GaussNewton(outputs="head"))], Plain, Data),
    "FiniteDifference": (lambda: [tuner(curvature=FiniteDifference())], Plain, Data),
    "LyapunovCallback": (lambda: [LyapunovCallback(1)], Plain, Data),
    "LyapunovCallback, game": (lambda: [LyapunovCallback(1, align=2)], Pairs, Data),
    "GameSpectrumCallback": (lambda: [GameSpectrumCallback(2, k=2)], Pairs, Data),
    "GeneratorEMA": (lambda: [GeneratorEMA(0.5, start=0)], Pairs, Data),
    "SampleGrid": (lambda: [SampleGrid(2, per_class=1)], Pairs, Data),
    "GenerativeMetrics": (
        lambda: [GenerativeMetrics(EVALUATOR, num_samples=30, scores=("frechet",), every_n_validations=2)],
        Pairs,
        Data,
    ),
    "ModeCoverage": (lambda: [ModeCoverage(2, num_samples=4)], Pairs, Data),
    "GameReport": (lambda: [GameReport()], lambda: zoo(batches_per_epoch=6), lambda: None),
    "LabelNoiseReport": (lambda: [LabelNoiseReport(), tuner(30)], classifier, digits),
}
MODULES: dict[str, Case] = {
    "NestedModule": (list, Cleaner, Data),
    "HypernetworkModule": (list, Responding, Data),
    "GameModule": (list, lambda: zoo(batches_per_epoch=6), lambda: None),
    "GANModule": (list, Pairs, Data),
}
ALL = {**CALLBACKS, **MODULES}


class At(Callback):
    """Calls a function once, after a batch of training."""

    def __init__(self, action: Callable[[], object], batch: int = 2) -> None:
        self.action, self.batch = action, batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, idx: int
    ) -> None:
        if idx == self.batch:
            self.action()


def failing(kind: type[BaseException] = RuntimeError) -> At:
    def fail() -> None:
        raise kind("interrupted")

    return At(fail)


def left_on(module: nn.Module) -> dict[str, Any]:
    """Return what a fit might leave on a module."""
    found: dict[str, Any] = {}
    for name, m in module.named_modules():
        hooks = len(m._forward_hooks) + len(m._forward_pre_hooks)
        methods = [key for key in ("training_step", "backward", "player_losses", "log") if key in vars(m)]
        frozen = [key for key, p in m.named_parameters(recurse=False) if not p.requires_grad]
        weights = getattr(m, "example_weights", None) if isinstance(m, Plain) else None
        found[name] = hooks, methods, frozen, m.training, weights
    return found


def uses(objects: list[Any]) -> list[Use]:
    return [found for o in objects for found in vars(o).values() if isinstance(found, Use)]


def state(callback: Callback) -> Any:
    return copy.deepcopy(callback.state_dict())


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", ALL)
def test_an_exception_ends_what_teardown_ends(name: str, tmp_path: Path) -> None:
    make, model, data = ALL[name]
    callbacks, module = make(), model()
    before = left_on(module)
    failed = trainer(*callbacks, failing(), folder=tmp_path)
    with pytest.raises(RuntimeError, match="interrupted"):
        failed.fit(module, datamodule=data())
    assert left_on(module) == before
    objects = [*callbacks, *([module] if name in MODULES else [])]
    assert uses(objects)
    assert not any(use.is_open for use in uses(objects))
    assert "on_exception" not in vars(failed.strategy)
    loops = [getattr(o, "outer_loop", None) for o in objects]
    assert all(loop is None or loop.batches is None for loop in loops)
    trainer(*callbacks, folder=tmp_path).fit(module, datamodule=data())
    assert left_on(module) == before


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SIGTERMException])
def test_signals_end_it_too(kind: type[BaseException]) -> None:
    callback, module = tuner(curvature=GaussNewton(outputs="head")), Plain()
    before = left_on(module)
    val = loader(num_workers=1, persistent_workers=True)
    with pytest.raises(SystemExit):
        trainer(callback, failing(kind), limit_val_batches=0).fit(module, loader(), val)
    assert left_on(module) == before
    assert not callback.use.is_open


def test_worker_processes_of_the_outer_loader_end_while_the_exception_lives() -> None:
    class Fragile(Plain):
        def outer_loss(self, batch: Any) -> Tensor:
            if self.trainer.global_step == 2:
                raise RuntimeError("interrupted")
            return self.validation_step(batch, 0)

    found: list[Any] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            batches: Any = callback.outer_loop.batches
            found.append(batches._iterator._workers[0])

    callback = tuner()
    with pytest.raises(RuntimeError, match="interrupted") as held:
        trainer(callback, Watch(), limit_val_batches=0).fit(Fragile(), loader(), loader(num_workers=1))
    assert held.traceback
    assert len(found) == 2
    assert not found[0].is_alive()


def test_a_failed_search_for_the_learning_rate_ends_it() -> None:
    """The Trainer is left without its callbacks."""

    class Fragile(Plain):
        lr = 0.1

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("interrupted")
            return super().training_step(batch, batch_idx)

    callback, module = tuner(), Fragile()
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(callback, LearningRateFinder(num_training_steps=5)).fit(module, loader(), loader())
    assert module.example_weights is None
    assert not callback.use.is_open


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_second_fit_of_another_module_begins_anew(name: str, tmp_path: Path) -> None:
    make, model, data = CALLBACKS[name]

    def fit(callbacks: list[Callback], folder: Path) -> Any:
        module = model()
        torch.manual_seed(0)
        trainer(*callbacks, folder=folder).fit(module, datamodule=data())
        return state(callbacks[0]), sorted(path.name for path in folder.rglob("*.png"))

    callbacks = make()
    first, second = fit(callbacks, tmp_path / "1"), fit(callbacks, tmp_path / "2")
    assert equal(first, second)


def test_the_real_images_are_those_of_the_datamodule_in_use(tmp_path: Path) -> None:
    """Also in validate, which is no fit."""
    make, model, _ = CALLBACKS["GenerativeMetrics"]
    module = model()

    def scores(callback: Any, data: Data) -> dict[str, float]:
        trainer(callback, folder=tmp_path).validate(module, datamodule=data, verbose=False)
        return dict(callback.last)

    (used,), (fresh,) = make(), make()
    first, second = scores(used, Pictures(1.0)), scores(used, Pictures(0.5))
    assert second == scores(fresh, Pictures(0.5)) != first


def test_the_module_of_an_evaluator_comes_back_as_it_was(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Dropout())
    network[2].eval()
    metrics = GenerativeMetrics(
        ModuleEvaluator(module=network, label="pixels"), num_samples=30, scores=("frechet",)
    )
    trainer(metrics, folder=tmp_path).validate(Pairs(), datamodule=Pictures(1.0), verbose=False)
    assert metrics.last
    assert [m.training for m in network.modules()] == [True, True, True, False]
    assert all(p.requires_grad for p in network.parameters())


def test_the_same_module_goes_on_and_another_datamodule_begins_anew() -> None:
    callback, module, data = tuner(), Plain(), Data()
    for expected in (6, 12):
        trainer(callback).fit(module, datamodule=data)
        assert callback.outer_steps == expected
    trainer(callback).fit(module, datamodule=Data())
    assert callback.outer_steps == 6


@pytest.mark.parametrize("name", ALL)
def test_an_object_in_use_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, model, data = ALL[name]
    callbacks, module = make(), model()
    caught: list[str] = []
    again = module if name in MODULES else model()

    def inside() -> None:
        with pytest.raises(MisconfigurationException, match="in use by another Trainer, whose fit") as error:
            trainer(*callbacks, folder=tmp_path).fit(again, datamodule=data())
        caught.append(str(error.value))
        if name in MODULES:
            raise RuntimeError("the module belongs to the other Trainer now")

    fit = trainer(*callbacks, At(inside), folder=tmp_path)
    if name in MODULES:
        with pytest.raises(RuntimeError, match="belongs"):
            fit.fit(module, datamodule=data())
    else:
        torch.manual_seed(0)
        fit.fit(module, datamodule=data())
        undisturbed, module = make(), model()
        torch.manual_seed(0)
        trainer(*undisturbed, At(lambda: None), folder=tmp_path).fit(module, datamodule=data())
        assert equal(state(callbacks[0]), state(undisturbed[0]))
    names = {type(o).__name__ for o in (*callbacks, module)}
    assert caught[0].split()[0] in names


def test_an_evaluation_inside_a_fit_leaves_the_fit_alone() -> None:
    callback, module = tuner(), Plain()
    other = trainer(callback)

    def inside() -> None:
        other.validate(Plain(), loader(), verbose=False)
        assert module.example_weights is not None

    trainer(callback, At(inside)).fit(module, loader(), loader())
    assert callback.outer_steps == 6


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_twin_package_is_named(name: str) -> None:
    twin = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})()
    with pytest.raises(
        MisconfigurationException, match=r"pytorch_lightning.* replace `import pytorch_lightning"
    ):
        CALLBACKS[name][0]()[0].setup(twin, Plain(), "fit")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_begin_unused(duplicate: Callable[[Any], Any]) -> None:
    callback = LyapunovCallback(1)
    open_in = trainer(callback)
    callback.setup(open_in, Plain(), "fit")
    assert callback.use.is_open
    assert not duplicate(callback).use.is_open
