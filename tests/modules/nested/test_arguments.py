"""Arguments and settings of NestedModule: values, and what is refused with a cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_nested.hypergradient import Neumann
from lightning_nested.hyperparameters import Exp, Hyperparameter, LearningRate, LossWeights
from lightning_nested.modules import Implicit, LoopOptions, NestedModule, Unrolled
from tests.modules.nested.problems import Classifier, loader
from tests.trainers import trainer


def test_a_weight_claimed_twice() -> None:
    class Both(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(
        MisconfigurationException, match=r"both for net.2.weight \('net.2'\).*inner_parameters"
    ):
        trainer(limit_val_batches=0).fit(Both("net.2"), loader(1), loader(2))


def errors() -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    def fit(module: NestedModule, **options: Any) -> Any:
        return trainer(limit_val_batches=0, **options).fit(module, loader(1), loader(2))

    class Detached(Classifier):
        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss(batch).detach()

    class NoHooks(Classifier):
        def on_train_start(self) -> None: ...

    class Taken(Classifier):
        def example_weights(self) -> None: ...

    rate = [LearningRate()]
    return {
        "no optimizer": (lambda: fit(Classifier(inner_optimizer=None)), MisconfigurationException, "inner_optimizer"),
        "detached": (lambda: fit(Detached()), MisconfigurationException, "Detached.inner_loss.*graph"),
        "no hooks": (lambda: fit(NoHooks()), MisconfigurationException, "super"),
        "taken": (Taken, ValueError, "set another name"),
        "rmsprop": (
            lambda: fit(Classifier(inner_optimizer=torch.optim.RMSprop, gradient=Unrolled(num_steps=2))),
            TypeError,
            "Got RMSprop.*Implicit",
        ),
        "typo": (lambda: fit(Classifier("nett.2")), ValueError, "close names: net"),
        "rate and schedule": (
            lambda: fit(
                Classifier(
                    rate,
                    gradient=Unrolled(num_steps=2),
                    inner_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
                )
            ),
            MisconfigurationException,
            "Either LearningRate or a scheduler",
        ),
        "rate and implicit": (lambda: Classifier(rate), ValueError, "Unrolled"),
        "k": (lambda: Classifier(inner_steps_per_outer=0), ValueError, "at least 1"),
        "two lengths": (
            lambda: Classifier(inner_steps_per_outer=2, gradient=Unrolled(num_steps=3)), ValueError, "leave it out"
        ),
        "steps": (lambda: Unrolled(num_steps=0), ValueError, "num_steps"),
        "options": (lambda: LoopOptions(accumulate_grad_batches=0), ValueError, "accumulate_grad_batches"),
        "unused": (
            lambda: fit(Classifier([LossWeights(["a"])], gradient=Unrolled(num_steps=1))), ValueError, "Got none of"
        ),
        "no data": (
            lambda: trainer(limit_val_batches=1).fit(Classifier(), loader(1)), MisconfigurationException, "validation"
        ),
        "double backward": (
            lambda: fit(Classifier(net=Once(), gradient=Unrolled(num_steps=2))), RuntimeError, "second derivative"
        ),
    }  # fmt: skip


class _OnceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return _OnceFunction.apply(self.linear(x))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("name", errors())
def test_errors(name: str) -> None:
    action, kind, message = errors()[name]
    with pytest.raises(kind, match=message):
        action()


def test_options_are_values() -> None:
    assert Implicit() == Implicit(solver=Neumann())
    assert hash(Unrolled(num_steps=3, truncate=1)) == hash(Unrolled(num_steps=3, truncate=1))
    assert "truncate=2" in repr(Unrolled(num_steps=4, truncate=2))
    assert isinstance(LearningRate(), Hyperparameter)
    assert LearningRate(init=20.0).transform == Exp(lower=1e-8, upper=40.0)
