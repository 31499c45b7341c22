"""Differentiable games: joint gradient, Jacobian, spectrum, convergence rates and advice on momentum. PyTorch only."""

from lightning_nested.games.dirac import DiracGAN
from lightning_nested.games.game import Game
from lightning_nested.games.gaussians import GaussiansGAN
from lightning_nested.games.iterated import (
    IteratedPrisonersDilemma,
    MatchingPennies,
    PenniesAndDilemma,
    SmallIPD,
    policy_losses,
)
from lightning_nested.games.jacobian import JacobianOperator, game_jacobian, joint_gradient
from lightning_nested.games.modes import high_quality, modes_covered, ring
from lightning_nested.games.quadratic import Bilinear, QuadraticGame
from lightning_nested.games.spectrum import Spectrum, SpectrumError, game_spectrum, leading_eigenvalues
from lightning_nested.games.subspace import RandomSubspace

__all__ = [
    "Bilinear",
    "DiracGAN",
    "Game",
    "GaussiansGAN",
    "IteratedPrisonersDilemma",
    "JacobianOperator",
    "MatchingPennies",
    "PenniesAndDilemma",
    "QuadraticGame",
    "RandomSubspace",
    "SmallIPD",
    "Spectrum",
    "SpectrumError",
    "game_jacobian",
    "game_spectrum",
    "high_quality",
    "joint_gradient",
    "leading_eigenvalues",
    "modes_covered",
    "policy_losses",
    "ring",
]
