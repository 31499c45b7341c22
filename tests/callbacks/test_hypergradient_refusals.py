"""HypergradientCallback refuses what it cannot work with, and says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hyperparameters import ExampleWeights, WeightDecay
from tests.callbacks.tuned_regression import Regression, data, smooth
from tests.trainers import trainer


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_bad_input_is_refused_with_a_cure() -> None:
    train, val = DataLoader(data(16, 1), 8), DataLoader(data(8, 2), 8)
    with pytest.raises(ValueError, match="at least one"):
        HypergradientCallback([])
    with pytest.raises(ValueError, match=r"net\.2"):
        trainer(HypergradientCallback("net.22")).fit(Regression(smooth()), train, val)
    with pytest.raises(MisconfigurationException, match="validation"):
        trainer(HypergradientCallback(WeightDecay())).fit(Regression(smooth()), train)

    class NoOuter(Regression):
        validation_step = LightningModule.validation_step  # type: ignore[assignment]

    with pytest.raises(MisconfigurationException, match="def outer_loss"):
        trainer(HypergradientCallback(WeightDecay())).fit(NoOuter(smooth()), train)
    manual = Regression(smooth())
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="NestedModule"):
        trainer(HypergradientCallback(WeightDecay())).fit(manual, train, val)

    class Blind(Regression):
        def outer_loss(self, batch: Any) -> Tensor:
            return torch.zeros(())

    with pytest.raises(MisconfigurationException, match="graph"):
        trainer(HypergradientCallback(WeightDecay())).fit(Blind(smooth()), train, val)


class OwnBackward(Regression):
    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        loss.backward()


class Taken(Regression):
    example_weights = "something else"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: OwnBackward(smooth()), {"accumulate_grad_batches": 2}, "cannot keep one; give it"),
        (lambda: Regression(smooth()), {"strategy": DDPStrategy(static_graph=True)}, "static_graph=True"),
        (lambda: Regression(smooth()), {"callbacks": 2}, "Got 2; give one of them the list"),
    ],
    ids=["backward", "static graph", "two callbacks"],
)
def test_what_cannot_be_served_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    count = options.pop("callbacks", 1)
    callbacks = [HypergradientCallback(WeightDecay(name=f"decay{i}")) for i in range(count)]
    fit = trainer(*callbacks, **options)
    with pytest.raises(MisconfigurationException, match=message):
        callbacks[0].setup(fit, make(), "fit")


def test_deepspeed_is_not_the_ddp_that_lightning_takes_it_for() -> None:
    class Pretended(DeepSpeedStrategy):
        def __init__(self) -> None:
            pass

    fit = trainer()
    fit._accelerator_connector.strategy = Pretended()
    with pytest.raises(MisconfigurationException, match="Got Pretended; use"):
        HypergradientCallback(WeightDecay()).setup(fit, Regression(smooth()), "fit")


@pytest.mark.parametrize("given", [[3], WeightDecay, [WeightDecay]])
def test_what_is_no_hyperparameter_is_named(given: Any) -> None:
    with pytest.raises(TypeError, match="Got"):
        HypergradientCallback(given)


def test_an_attribute_that_is_taken_is_not_overwritten() -> None:
    with pytest.raises(MisconfigurationException, match=r"must be None\. Got a str in Taken"):
        HypergradientCallback(ExampleWeights(3)).setup(trainer(), Taken(smooth()), "fit")
