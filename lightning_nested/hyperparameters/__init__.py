"""What can be tuned: weight decay, example and loss weights, any tensor or submodule. torch only."""

from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.learning_rate import LearningRate
from lightning_nested.hyperparameters.module_tensors import ModuleTensors
from lightning_nested.hyperparameters.outer_step import OuterReport, OuterStep
from lightning_nested.hyperparameters.transforms import (
    Exp,
    Interval,
    Simplex,
    Softplus,
    Transform,
    Unconstrained,
)
from lightning_nested.hyperparameters.weight_decay import DecayPenalty, WeightDecay
from lightning_nested.hyperparameters.weights import BoundHyperparameter, ExampleWeights, LossWeights

__all__ = [
    "BoundHyperparameter",
    "DecayPenalty",
    "ExampleWeights",
    "Exp",
    "Hyperparameter",
    "Interval",
    "LearningRate",
    "LossWeights",
    "ModuleTensors",
    "OuterReport",
    "OuterStep",
    "Simplex",
    "Softplus",
    "Transform",
    "Unconstrained",
    "WeightDecay",
]
