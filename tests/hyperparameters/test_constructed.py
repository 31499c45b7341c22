"""Hyperparameters and callbacks print as the call that constructs them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from lightning_nested import callbacks, demos, hypergradient, hyperparameters
from lightning_nested.callbacks import (
    GameSpectrumCallback,
    GeneratorEMA,
    HypergradientCallback,
    LyapunovCallback,
)
from lightning_nested.hyperparameters import Hyperparameter, WeightDecay

NAMES: dict[str, Any] = {
    **{k: v for m in (callbacks, demos, hypergradient, hyperparameters) for k, v in vars(m).items()},
    "SGD": torch.optim.SGD,
}
CALLS = [
    "WeightDecay()",
    "WeightDecay(per='model', init=0.01, exclude=['*.bias'], transform=Softplus())",
    "ExampleWeights(num_examples=9, transform=Interval(lower=0.0, upper=3.0, limit=8.0))",
    "LossWeights(names=['a', 'b'], init=[1.0, 2.0])",
    "GroupWeights(names=['a', 'b'], shares=[1, 2])",
    "WeightNetwork(hidden=9)",
    "Scalar(name='x', init=2)",
    "Integer(name='n', lower=1, upper=5, init=3)",
    "Categorical(name='c', options=['p', 'q'])",
    "LabelSmoothing(upper=0.3)",
    "LearningRate(init=0.1)",
    "ModuleTensors(path='net.0')",
    "DropoutRates(per='model', init=0.2)",
    "DropConnect(include=['*.weight'])",
    "Brightness(upper=0.5)",
    "Cutout(length=2)",
    "HypergradientCallback(hyperparameters=[WeightDecay(per='model'), 'net.0'], optimizer=SGD, every_n_steps=5)",
    "LyapunovCallback(k=3, window='bump')",
    "GameSpectrumCallback(every_n_updates=5, k=None)",
    "GeneratorEMA(decay=0.5, module='critic')",
    "RetrainCheck(data='test', seeds=[4])",
    "SampleGrid(per_class=2)",
    "GenerativeMetrics(num_samples=100)",
    "LabelNoiseReport()",
    "GameReport()",
    "ModeCoverage(num_samples=100)",
]


@pytest.mark.parametrize("call", CALLS)
def test_the_text_is_the_call(call: str) -> None:
    assert repr(eval(call, NAMES)) == call


def test_copies_print_the_same_and_positions_get_names() -> None:
    decay = WeightDecay("tensor", 0.5)
    assert repr(decay) == "WeightDecay(init=0.5)"
    for twin in (copy.copy(decay), copy.deepcopy(decay), pickle.loads(pickle.dumps(decay))):
        assert repr(twin) == repr(decay)


def test_classes_of_users_print_too() -> None:
    class Own(Hyperparameter):
        def __init__(self, *sizes: int, **options: float) -> None:
            super().__init__()

    assert repr(Own(1, 2, scale=0.5)) == "Own(1, 2, scale=0.5)"
    assert repr(Own.__new__(Own, 3)) == "Own(3)"


@pytest.mark.parametrize(
    "kind", [HypergradientCallback, LyapunovCallback, GameSpectrumCallback, GeneratorEMA]
)
def test_all_public_callbacks_do(kind: type) -> None:
    assert kind.__repr__ is WeightDecay.__repr__
