"""Hyperparameters: decay, dropout, augmentation, smoothing, weights, any tensor or submodule. torch only."""

from lightning_nested.hyperparameters.augmentation import Brightness, Contrast, Cutout, InputNoise, Saturation
from lightning_nested.hyperparameters.dropout import DropConnect, DropoutRates
from lightning_nested.hyperparameters.feature_decay import FeatureDecay
from lightning_nested.hyperparameters.geometry import Hue, Rotation, Scaling, Shear, Translation
from lightning_nested.hyperparameters.group_weights import GroupSampler, GroupWeights
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.learning_rate import LearningRate
from lightning_nested.hyperparameters.module_tensors import ModuleTensors
from lightning_nested.hyperparameters.optimizer_options import Betas, Momentum
from lightning_nested.hyperparameters.outer_report import OuterReport
from lightning_nested.hyperparameters.outer_step import OuterStep
from lightning_nested.hyperparameters.saved_values import tuned_values
from lightning_nested.hyperparameters.scalar import Categorical, Integer, LabelSmoothing, Scalar
from lightning_nested.hyperparameters.shared_adam import SharedAdam
from lightning_nested.hyperparameters.transforms import (
    Exp,
    Interval,
    Simplex,
    Softplus,
    Transform,
    Unconstrained,
)
from lightning_nested.hyperparameters.vector import HyperparameterVector
from lightning_nested.hyperparameters.weight_decay import DecayPenalty, WeightDecay
from lightning_nested.hyperparameters.weight_network import WeightNetwork
from lightning_nested.hyperparameters.weights import BoundHyperparameter, ExampleWeights, LossWeights

__all__ = [
    "Betas",
    "BoundHyperparameter",
    "Brightness",
    "Categorical",
    "Contrast",
    "Cutout",
    "DecayPenalty",
    "DropConnect",
    "DropoutRates",
    "ExampleWeights",
    "Exp",
    "FeatureDecay",
    "GroupSampler",
    "GroupWeights",
    "Hue",
    "Hyperparameter",
    "HyperparameterVector",
    "InputNoise",
    "Integer",
    "Interval",
    "LabelSmoothing",
    "LearningRate",
    "LossWeights",
    "ModuleTensors",
    "Momentum",
    "OuterReport",
    "OuterStep",
    "Rotation",
    "Saturation",
    "Scalar",
    "Scaling",
    "SharedAdam",
    "Shear",
    "Simplex",
    "Softplus",
    "Transform",
    "Translation",
    "Unconstrained",
    "WeightDecay",
    "WeightNetwork",
    "tuned_values",
]
