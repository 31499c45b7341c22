"""Differentiable games: joint gradient, Jacobian, spectrum, convergence rates and advice on momentum. PyTorch only."""

from lightning_nested.games.advice import MomentumSuggestion, suggest_momentum
from lightning_nested.games.constraints import ConstrainedLoss, Multipliers, augmented_lagrangian
from lightning_nested.games.experience import Rollout, generalized_advantages
from lightning_nested.games.jacobian import JacobianOperator, game_jacobian, joint_gradient
from lightning_nested.games.measured_spectrum import MeasuredSpectrum
from lightning_nested.games.rates import (
    consensus_rate,
    convergence_rate,
    eigenvalue_rates,
    extragradient_rate,
    lookahead_rate,
    momentum_map,
    optimistic_rate,
    proximal_rate,
)
from lightning_nested.games.spectrum import game_spectrum
from lightning_nested.games.zoo.dirac import DiracGAN
from lightning_nested.games.zoo.game import Game
from lightning_nested.games.zoo.gaussians import GaussiansGAN
from lightning_nested.games.zoo.iterated import (
    IteratedPrisonersDilemma,
    MatchingPennies,
    PenniesAndDilemma,
    SmallIPD,
    policy_losses,
)
from lightning_nested.games.zoo.modes import high_quality, modes_covered, ring
from lightning_nested.games.zoo.quadratic import Bilinear, QuadraticGame
from lightning_nested.games.zoo.subspace import RandomSubspace
from lightning_nested.linalg.eigenvalues import Spectrum, SpectrumError, leading_eigenvalues

__all__ = [
    "Bilinear",
    "ConstrainedLoss",
    "DiracGAN",
    "Game",
    "GaussiansGAN",
    "IteratedPrisonersDilemma",
    "JacobianOperator",
    "MatchingPennies",
    "MeasuredSpectrum",
    "MomentumSuggestion",
    "Multipliers",
    "PenniesAndDilemma",
    "QuadraticGame",
    "RandomSubspace",
    "Rollout",
    "SmallIPD",
    "Spectrum",
    "SpectrumError",
    "augmented_lagrangian",
    "consensus_rate",
    "convergence_rate",
    "eigenvalue_rates",
    "extragradient_rate",
    "game_jacobian",
    "game_spectrum",
    "generalized_advantages",
    "high_quality",
    "joint_gradient",
    "leading_eigenvalues",
    "lookahead_rate",
    "modes_covered",
    "momentum_map",
    "optimistic_rate",
    "policy_losses",
    "proximal_rate",
    "ring",
    "suggest_momentum",
]
