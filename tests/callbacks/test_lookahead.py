from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nested.callbacks import Lookahead
from lightning_nested.demos import ZooGame
from lightning_nested.games import Bilinear, QuadraticGame, game_jacobian, lookahead_rate
from lightning_nested.optim import ComplexSGD
from tests.trainers import trainer


def sgd(lr: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def distance(game: Any, steps: int, *callbacks: Any, **options: Any) -> float:
    module = ZooGame(game, update="simultaneous", seed=1, **options)
    trainer(*callbacks, max_epochs=-1, max_steps=steps).fit(module)
    return float(module.distance() / module.distances[0])


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.3), (5, 0.5), (6, 0.5), (4, 1.0)])
def test_the_bilinear_game_contracts_as_predicted(k: int, alpha: float) -> None:
    """On xy every cycle of k steps multiplies the distance by |1 − a + a(1 − αi)ᵏ|."""
    lr = 0.4
    found = distance(Bilinear(), 3 * k, Lookahead(k, alpha=alpha), optimizer=sgd(lr))
    factor = abs(1 - alpha + alpha * complex(1, -lr) ** k)
    assert found == pytest.approx(factor**3, rel=1e-12)
    assert lookahead_rate([1j], lr=lr, every_n_updates=k, alpha=alpha) == pytest.approx(factor ** (1 / k))


def test_what_spirals_outwards_converges() -> None:
    assert distance(Bilinear(), 60, optimizer=sgd(0.4)) > 50
    assert distance(Bilinear(), 60, Lookahead(6), optimizer=sgd(0.4)) < 0.01


def test_any_game_and_any_optimizer() -> None:
    """Against the same steps in a loop of its own, with momentum kept over the steps back."""
    game = QuadraticGame.mixture(4, 0.7, torch.Generator().manual_seed(0))
    module = ZooGame(game, update="simultaneous", seed=1, optimizer=lambda p: ComplexSGD(p, lr=0.1))
    trainer(Lookahead(3, alpha=0.4), max_epochs=-1, max_steps=8).fit(module)
    players = [p.detach().clone().requires_grad_() for p in game.initial(torch.Generator().manual_seed(1))]
    optimizer, slow = ComplexSGD(players, lr=0.1), [p.detach().clone() for p in players]
    for step in range(1, 9):
        for player, loss in zip(players, game.losses(tuple(players)), strict=True):
            (player.grad,) = torch.autograd.grad(loss, player, retain_graph=True)
        optimizer.step()
        if step % 3 == 0:
            for player, kept in zip(players, slow, strict=True):
                kept.add_(0.4 * (player.detach() - kept))
                player.data.copy_(kept)
    found = torch.cat([p.detach() for p in module.parameters()])
    torch.testing.assert_close(found, torch.cat([p.detach() for p in players]), rtol=1e-12, atol=1e-14)
    values = torch.linalg.eigvals(game_jacobian(game.losses, game.initial()))
    rate = lookahead_rate(values, lr=0.1, every_n_updates=3, alpha=0.4)
    plain = max(abs(0.6 + 0.4 * (1 - 0.1 * complex(v)) ** 3) for v in values) ** (1 / 3)
    assert rate == pytest.approx(plain, rel=1e-12)


def test_resuming_between_two_steps_back(tmp_path: Path) -> None:
    def run(steps: int, **options: Any) -> torch.Tensor:
        module = ZooGame(Bilinear(), seed=1, optimizer=sgd(0.4), batches_per_epoch=2)
        fit = trainer(Lookahead(5), max_epochs=-1, max_steps=steps)
        fit.fit(module, **options)
        fit.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return torch.cat([p.detach() for p in module.parameters()])

    whole = run(12)
    run(7)
    assert torch.equal(run(12, ckpt_path=tmp_path / "7.ckpt", weights_only=True), whole)


def test_another_run_begins_afresh() -> None:
    lookahead = Lookahead(5)
    first, second = (distance(Bilinear(), 10, lookahead, optimizer=sgd(0.4)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every_n_updates": 0}, "every_n_updates must be at least 1"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
    ],
)
def test_wrong_options(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Lookahead(**options)
    with pytest.raises(ValueError, match=match):
        lookahead_rate([1j], lr=0.1, **{"every_n_updates": 5, "alpha": 0.5, **options})
