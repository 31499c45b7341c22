"""Consensus optimization: steps by ξ + γJᵀξ, against closed forms and a loop of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nested.demos import ZooGame
from lightning_nested.games import Bilinear, QuadraticGame, consensus_rate, game_jacobian, joint_gradient
from lightning_nested.modules import GameLoop, GANModule
from lightning_nested.networks.spectral_norm import SpectralNormLinear
from tests.trainers import trainer


def sgd(lr: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize("strength", [0.0, 0.2, 1.0])
def test_the_bilinear_game_contracts_as_predicted(strength: float) -> None:
    lr = 0.5
    loop = GameLoop(consensus=strength)
    module = ZooGame(Bilinear(), update="simultaneous", seed=1, optimizer=sgd(lr), loop=loop)
    trainer(max_epochs=-1, max_steps=20).fit(module)
    factor = math.hypot(1 - lr * strength, lr)
    assert module.distances[-1] / module.distances[0] == pytest.approx(factor**20, rel=1e-12)
    assert consensus_rate([1j], lr=lr, strength=strength) == pytest.approx(factor, rel=1e-12)


def test_any_game() -> None:
    """Every step is by ξ + γJᵀξ, with the dense Jacobian."""
    game = QuadraticGame.mixture(4, 0.7, torch.Generator().manual_seed(0))
    module = ZooGame(game, update="simultaneous", seed=1, optimizer=sgd(0.1), loop=GameLoop(consensus=0.3))
    trainer(max_epochs=-1, max_steps=5).fit(module)
    players = tuple(p.detach() for p in game.initial(torch.Generator().manual_seed(1)))
    for _ in range(5):
        gradient = torch.cat(joint_gradient(game.losses, players))
        step = gradient + 0.3 * game_jacobian(game.losses, players).T @ gradient
        moved = torch.cat(players) - 0.1 * step
        players = tuple(moved.split([len(p) for p in players]))
    found = torch.cat([p.detach() for p in module.parameters()])
    torch.testing.assert_close(found, torch.cat(players), rtol=1e-12, atol=1e-14)


def test_a_gan_that_turns_in_circles_converges() -> None:
    """Data at 0, fakes at θ, D(x) = ψx with Wasserstein's loss: the bilinear game ψθ, whose graph training cuts."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.ones(1, 1))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.theta.expand(len(z), 1)

    def size(strength: float) -> float:
        judge = nn.Linear(1, 1, bias=False)
        nn.init.ones_(judge.weight)
        gan = GANModule(
            Constant(), judge, latent_dim=1, loss="wasserstein", update="simultaneous", optimizer=sgd(0.5),
            loop=GameLoop(consensus=strength),
        ).double()  # fmt: skip
        data = torch.utils.data.DataLoader(torch.zeros(40, 1, dtype=torch.float64), batch_size=4)
        trainer().fit(gan, data)
        return float(torch.cat([p.detach().flatten() for p in gan.parameters()]).norm()) / 2**0.5

    assert size(0.0) == pytest.approx(1.25**5, rel=1e-12)
    assert size(1.0) == pytest.approx(0.5**5, rel=1e-12)


def test_spectral_vectors_move_once_a_step() -> None:
    layer = SpectralNormLinear(2, 2)
    gan = GANModule(
        nn.Linear(2, 2), nn.Sequential(layer, nn.Tanh(), nn.Linear(2, 1)), latent_dim=2, update="simultaneous",
        optimizer=sgd(0.05), loop=GameLoop(consensus=0.1),
    )  # fmt: skip
    trainer(max_epochs=10).fit(gan, torch.utils.data.DataLoader(torch.randn(40, 2), batch_size=4))
    with torch.no_grad():
        largest = torch.linalg.matrix_norm(layer.normalized_weight(), 2).item()
    assert largest == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: GameLoop(consensus=-1.0), "consensus must be at least 0. Got -1.0"),
        (
            lambda: GameLoop(consensus=0.1, accumulate_grad_batches=2),
            "accumulation over several is not. Got acc",
        ),
        (
            lambda: ZooGame(Bilinear(), loop=GameLoop(consensus=0.1)),
            "all players at one point. Got update='alternating' with consensus=0.1",
        ),
        (lambda: consensus_rate([1j], lr=0.1, strength=-0.1), "strength must be at least 0"),
    ],
)
def test_refusals(build: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()
