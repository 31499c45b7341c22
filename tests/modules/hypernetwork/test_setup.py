"""Refusals of HypernetworkModule, and responses over time and batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.hypernetworks import LearnedScale, best_response
from lightning_nested.hyperparameters import (
    DropoutRates,
    InputNoise,
    LabelSmoothing,
    LearningRate,
    WeightDecay,
)
from lightning_nested.modules import STN, HypernetworkModule, ResponseMonitor, ResponseOptions
from tests.modules.hypernetwork.problems import Classifier, Small, as_loader, batches, loader, network
from tests.trainers import trainer


class NoHooks(Classifier):
    def on_train_start(self) -> None: ...


class Detached(Classifier):
    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        return super().inner_loss(batch, values).detach()


class Taken(Classifier):
    def kind(self) -> None: ...


def fitted(module: HypernetworkModule, batches: DataLoader[Any] | None = None, **options: Any) -> None:
    trainer(limit_val_batches=0, **options).fit(module, batches or loader(1), loader(2))


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "penalty with one λ of each example": (
        lambda: Classifier([WeightDecay(), InputNoise()], options=ResponseOptions(per_example=True)),
        ValueError, r"Got: weight_decay acts on the whole batch",
    ),
    "refined examples": (
        lambda: Classifier([InputNoise()], options=ResponseOptions(per_example=True, refine_steps=1)),
        ValueError, "refine_steps",
    ),
    "outside its interval": (lambda: LabelSmoothing(init=0.6), ValueError, r"inside \(0.0, 0.5\). Got 0.6"),
    "nothing to convert": (lambda: Classifier([LabelSmoothing()], nn.Flatten()), ValueError, "must have a parameter"),
    "no dropout": (lambda: Classifier(net=nn.Linear(16, 2)), ValueError, "Got none in Linear"),
    "learning rate": (lambda: Classifier([LearningRate()]), ValueError, "NestedModule"),
    "another n": (
        lambda: Classifier(net=best_response(network(), 3)), ValueError, r"num_hyperparameters=\d+.*response with 3"
    ),
    "batch of one": (
        lambda: fitted(
            Classifier([InputNoise()], loop=STN(perturbation=LearnedScale(antithetic=True))), loader(1, batch=1)
        ),
        ValueError, "batch of at least 2 examples. Got 1",
    ),
    "taken": (Taken, ValueError, "set another name"),
    "no hooks": (lambda: fitted(NoHooks()), MisconfigurationException, "super"),
    "detached": (lambda: fitted(Detached()), MisconfigurationException, "Detached.inner_loss.*graph"),
    "plateau": (
        lambda: fitted(Classifier(weights_scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o))),
        MisconfigurationException, "ReduceLROnPlateau",
    ),
    "steps": (lambda: STN(train_steps=0), ValueError, "train_steps"),
    "options": (lambda: ResponseOptions(refine_steps=-1), ValueError, "refine_steps must be at least 0"),
    "clip": (lambda: ResponseOptions(gradient_clip_val=0.0), ValueError, "positive"),
    "monitor": (lambda: ResponseMonitor(every_n_outer_steps=0), ValueError, "at least 1"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*ReduceLROnPlateau.*")
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        call()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_without_validation_data_the_error_names_the_cure() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"outer loss needs validation data.*outer_dataloader\(\)"
    ):
        trainer(limit_val_batches=0).fit(Small(), batches())


def test_freezing_after_the_conversion_is_refused() -> None:
    module = Small()
    module.network.module[0].weight.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"Got 0.weight frozen since; freeze it before"):
        trainer(limit_val_batches=0).fit(module, batches(), batches())


def test_dropout_over_time_and_batch_has_the_rate_of_the_example() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drop = nn.Linear(500, 500, bias=False), nn.Dropout(0.2)
            nn.init.eye_(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.layer(x))

    class Mean(HypernetworkModule):
        def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
            return self.network(batch).mean()

        def outer_loss(self, batch: Any) -> Tensor:
            return self.network(batch).mean()

    module = Mean(best_response(Model(), 1, batch_dim=1), [DropoutRates()], loop=STN()).train()
    x = torch.ones(4, 4, 500)  # as many steps as examples: the dimensions must not be taken for each other
    assert module.num_examples(torch.ones(5, 4, 2)) == 4
    h = torch.tensor([[-9.0], [9.0], [-9.0], [9.0]])
    with module.vector.bound(h), module.network.at(h):
        dropped = (module.network(x) == 0).float().mean((0, 2))
    # Rates 0.9·σ(±9); three standard deviations of 2000 draws.
    torch.testing.assert_close(dropped, torch.tensor([0.0, 0.9, 0.0, 0.9]), rtol=0, atol=0.021)
    trainer(limit_val_batches=0).fit(
        module, as_loader([torch.rand(5, 4, 500)] * 3), as_loader([torch.rand(5, 4, 500)])
    )
    assert module.export().drop.p == pytest.approx(float(module.values()["dropout"]))
