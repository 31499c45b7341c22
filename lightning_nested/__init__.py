"""Nested optimization inside the Lightning Trainer you already have.

Every public name can be imported from here or from its package. Nothing is loaded before it is asked for
(PEP 562): the core must not pay for importing Lightning, nor `lightning-nested --help` for importing torch.

>>> from lightning_nested import Neumann
>>> Neumann.__module__.startswith("lightning_nested.hypergradient")
True
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lightning_nested import _clock as _clock  # first: the clock starts before anything heavy is imported

__version__ = "0.1.0"

# Package -> the names it gives to the root. The imports below say the same to type checkers and editors,
# which cannot see through a module's __getattr__; tests/test_package.py keeps the two equal.
_EXPORTS: dict[str, tuple[str, ...]] = {
    "hypergradient": (
        "ConjugateGradient",
        "DenseSolve",
        "FiniteDifference",
        "GaussNewton",
        "Hessian",
        "Identity",
        "Neumann",
        "Nystrom",
        "check_hypergradient",
        "implicit_hypergradient",
        "unrolled_hypergradient",
    ),
    "hyperparameters": (
        "Brightness",
        "Categorical",
        "Contrast",
        "Cutout",
        "DropConnect",
        "DropoutRates",
        "ExampleWeights",
        "InputNoise",
        "Integer",
        "LabelSmoothing",
        "LearningRate",
        "LossWeights",
        "ModuleTensors",
        "Saturation",
        "Scalar",
        "WeightDecay",
    ),
    "hypernetworks": (
        "DenseResponse",
        "DiagonalResponse",
        "FactorisedResponse",
        "FixedScale",
        "GlobalNormal",
        "GlobalUniform",
        "HyperConv1d",
        "HyperConv2d",
        "HyperEmbedding",
        "HyperLSTM",
        "HyperLinear",
        "LearnedScale",
        "NoPerturbation",
        "best_response",
    ),
    "optim": (
        "ComplexAdam",
        "ComplexSGD",
        "Extragradient",
        "ExtrapolationFromThePast",
        "OptimisticAdam",
        "OptimisticSGD",
    ),
    "games": (
        "Bilinear",
        "DiracGAN",
        "GaussiansGAN",
        "IteratedPrisonersDilemma",
        "MatchingPennies",
        "PenniesAndDilemma",
        "QuadraticGame",
        "RandomSubspace",
        "SmallIPD",
        "convergence_rate",
        "game_jacobian",
        "game_spectrum",
        "joint_gradient",
        "modes_covered",
        "suggest_momentum",
    ),
    "dynamics": (
        "GeneralizedRidgeRider",
        "LyapunovSpectrum",
        "RidgeRider",
        "kaplan_yorke_dimension",
        "lyapunov_exponents",
        "lyapunov_spectrum",
        "rk4_step",
        "update_map",
    ),
    "callbacks": (
        "GameReport",
        "GameSpectrumCallback",
        "GenerativeMetrics",
        "GeneratorEMA",
        "HypergradientCallback",
        "LyapunovCallback",
        "ModeCoverage",
        "SampleGrid",
    ),
    "modules": (
        "BigGAN",
        "DeltaSTN",
        "GANModule",
        "GameLoop",
        "GameModule",
        "Global",
        "HypernetworkModule",
        "ImageClassifier",
        "Local",
        "NestedModule",
        "ResponseMonitor",
        "ResponseOptions",
        "STN",
        "Simplified",
        "TunedImageClassifier",
        "ZooGame",
    ),
    "datamodules": (
        "CIFAR10DataModule",
        "DigitsDataModule",
        "FashionMNISTDataModule",
        "MixtureOfGaussiansDataModule",
    ),
}
_PACKAGE_OF = {name: package for package, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *_PACKAGE_OF]

if TYPE_CHECKING:
    from lightning_nested.callbacks import GameReport as GameReport
    from lightning_nested.callbacks import GameSpectrumCallback as GameSpectrumCallback
    from lightning_nested.callbacks import GenerativeMetrics as GenerativeMetrics
    from lightning_nested.callbacks import GeneratorEMA as GeneratorEMA
    from lightning_nested.callbacks import HypergradientCallback as HypergradientCallback
    from lightning_nested.callbacks import LyapunovCallback as LyapunovCallback
    from lightning_nested.callbacks import ModeCoverage as ModeCoverage
    from lightning_nested.callbacks import SampleGrid as SampleGrid
    from lightning_nested.datamodules import CIFAR10DataModule as CIFAR10DataModule
    from lightning_nested.datamodules import DigitsDataModule as DigitsDataModule
    from lightning_nested.datamodules import FashionMNISTDataModule as FashionMNISTDataModule
    from lightning_nested.datamodules import MixtureOfGaussiansDataModule as MixtureOfGaussiansDataModule
    from lightning_nested.dynamics import GeneralizedRidgeRider as GeneralizedRidgeRider
    from lightning_nested.dynamics import LyapunovSpectrum as LyapunovSpectrum
    from lightning_nested.dynamics import RidgeRider as RidgeRider
    from lightning_nested.dynamics import kaplan_yorke_dimension as kaplan_yorke_dimension
    from lightning_nested.dynamics import lyapunov_exponents as lyapunov_exponents
    from lightning_nested.dynamics import lyapunov_spectrum as lyapunov_spectrum
    from lightning_nested.dynamics import rk4_step as rk4_step
    from lightning_nested.dynamics import update_map as update_map
    from lightning_nested.games import Bilinear as Bilinear
    from lightning_nested.games import DiracGAN as DiracGAN
    from lightning_nested.games import GaussiansGAN as GaussiansGAN
    from lightning_nested.games import IteratedPrisonersDilemma as IteratedPrisonersDilemma
    from lightning_nested.games import MatchingPennies as MatchingPennies
    from lightning_nested.games import PenniesAndDilemma as PenniesAndDilemma
    from lightning_nested.games import QuadraticGame as QuadraticGame
    from lightning_nested.games import RandomSubspace as RandomSubspace
    from lightning_nested.games import SmallIPD as SmallIPD
    from lightning_nested.games import convergence_rate as convergence_rate
    from lightning_nested.games import game_jacobian as game_jacobian
    from lightning_nested.games import game_spectrum as game_spectrum
    from lightning_nested.games import joint_gradient as joint_gradient
    from lightning_nested.games import modes_covered as modes_covered
    from lightning_nested.games import suggest_momentum as suggest_momentum
    from lightning_nested.hypergradient import ConjugateGradient as ConjugateGradient
    from lightning_nested.hypergradient import DenseSolve as DenseSolve
    from lightning_nested.hypergradient import FiniteDifference as FiniteDifference
    from lightning_nested.hypergradient import GaussNewton as GaussNewton
    from lightning_nested.hypergradient import Hessian as Hessian
    from lightning_nested.hypergradient import Identity as Identity
    from lightning_nested.hypergradient import Neumann as Neumann
    from lightning_nested.hypergradient import Nystrom as Nystrom
    from lightning_nested.hypergradient import check_hypergradient as check_hypergradient
    from lightning_nested.hypergradient import implicit_hypergradient as implicit_hypergradient
    from lightning_nested.hypergradient import unrolled_hypergradient as unrolled_hypergradient
    from lightning_nested.hypernetworks import DenseResponse as DenseResponse
    from lightning_nested.hypernetworks import DiagonalResponse as DiagonalResponse
    from lightning_nested.hypernetworks import FactorisedResponse as FactorisedResponse
    from lightning_nested.hypernetworks import FixedScale as FixedScale
    from lightning_nested.hypernetworks import GlobalNormal as GlobalNormal
    from lightning_nested.hypernetworks import GlobalUniform as GlobalUniform
    from lightning_nested.hypernetworks import HyperConv1d as HyperConv1d
    from lightning_nested.hypernetworks import HyperConv2d as HyperConv2d
    from lightning_nested.hypernetworks import HyperEmbedding as HyperEmbedding
    from lightning_nested.hypernetworks import HyperLinear as HyperLinear
    from lightning_nested.hypernetworks import HyperLSTM as HyperLSTM
    from lightning_nested.hypernetworks import LearnedScale as LearnedScale
    from lightning_nested.hypernetworks import NoPerturbation as NoPerturbation
    from lightning_nested.hypernetworks import best_response as best_response
    from lightning_nested.hyperparameters import Brightness as Brightness
    from lightning_nested.hyperparameters import Categorical as Categorical
    from lightning_nested.hyperparameters import Contrast as Contrast
    from lightning_nested.hyperparameters import Cutout as Cutout
    from lightning_nested.hyperparameters import DropConnect as DropConnect
    from lightning_nested.hyperparameters import DropoutRates as DropoutRates
    from lightning_nested.hyperparameters import ExampleWeights as ExampleWeights
    from lightning_nested.hyperparameters import InputNoise as InputNoise
    from lightning_nested.hyperparameters import Integer as Integer
    from lightning_nested.hyperparameters import LabelSmoothing as LabelSmoothing
    from lightning_nested.hyperparameters import LearningRate as LearningRate
    from lightning_nested.hyperparameters import LossWeights as LossWeights
    from lightning_nested.hyperparameters import ModuleTensors as ModuleTensors
    from lightning_nested.hyperparameters import Saturation as Saturation
    from lightning_nested.hyperparameters import Scalar as Scalar
    from lightning_nested.hyperparameters import WeightDecay as WeightDecay
    from lightning_nested.modules import STN as STN
    from lightning_nested.modules import BigGAN as BigGAN
    from lightning_nested.modules import DeltaSTN as DeltaSTN
    from lightning_nested.modules import GameLoop as GameLoop
    from lightning_nested.modules import GameModule as GameModule
    from lightning_nested.modules import GANModule as GANModule
    from lightning_nested.modules import Global as Global
    from lightning_nested.modules import HypernetworkModule as HypernetworkModule
    from lightning_nested.modules import ImageClassifier as ImageClassifier
    from lightning_nested.modules import Local as Local
    from lightning_nested.modules import NestedModule as NestedModule
    from lightning_nested.modules import ResponseMonitor as ResponseMonitor
    from lightning_nested.modules import ResponseOptions as ResponseOptions
    from lightning_nested.modules import Simplified as Simplified
    from lightning_nested.modules import TunedImageClassifier as TunedImageClassifier
    from lightning_nested.modules import ZooGame as ZooGame
    from lightning_nested.optim import ComplexAdam as ComplexAdam
    from lightning_nested.optim import ComplexSGD as ComplexSGD
    from lightning_nested.optim import Extragradient as Extragradient
    from lightning_nested.optim import ExtrapolationFromThePast as ExtrapolationFromThePast
    from lightning_nested.optim import OptimisticAdam as OptimisticAdam
    from lightning_nested.optim import OptimisticSGD as OptimisticSGD
else:  # hidden from type checkers: with a __getattr__ in sight they would accept any misspelt name

    def __getattr__(name: str) -> object:
        if name in _EXPORTS:  # `import lightning_nested as ln; ln.hypergradient`
            return import_module(f"{__name__}.{name}")
        if name not in _PACKAGE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_PACKAGE_OF[name]}"), name)
        globals()[name] = value  # the next access does not come here
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_EXPORTS})
