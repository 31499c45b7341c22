"""Optimizers for games: momentum with a complex coefficient, extragradient and optimistic steps. PyTorch only.

All of them follow the contract of ``torch.optim``, and ``torch.compile(optimizer.step)`` works.
``num_gradients`` says how many gradients of the game an update needs: compare methods per gradient.
"""

from lightning_nested.optim.base import GameOptimizer
from lightning_nested.optim.complex_adam import ComplexAdam
from lightning_nested.optim.complex_sgd import ComplexSGD
from lightning_nested.optim.extragradient import Extragradient, ExtrapolationFromThePast
from lightning_nested.optim.nupi import NuPI
from lightning_nested.optim.optimistic import OptimisticAdam, OptimisticSGD

__all__ = [
    "ComplexAdam",
    "ComplexSGD",
    "Extragradient",
    "ExtrapolationFromThePast",
    "GameOptimizer",
    "NuPI",
    "OptimisticAdam",
    "OptimisticSGD",
]
