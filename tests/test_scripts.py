"""The scripts simulate the game itself, and write what they promise."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nested.games import DiracGAN, QuadraticGame, Rollout, joint_gradient
from lightning_nested.modules import ActorCritic

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # Scripts import their shared parts from their own folder.
    monkeypatch.syspath_prepend(SCRIPTS)
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def robustness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("momentum_robustness", monkeypatch)


@pytest.fixture
def dirac(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("dirac_gan_map", monkeypatch)


@pytest.mark.parametrize("method", ["momentum", "alternating", "optimistic", "extragradient"])
def test_evaluations_are_those_of_the_game(robustness: ModuleType, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    game = QuadraticGame.mixture(4, 0.7, generator)
    players = tuple(p.detach() for p in game.initial(generator))
    lr, beta, tolerance = 0.4, 0.4 * np.exp(0.6j), 1e-3
    memory = [torch.zeros(4, dtype=torch.complex128) for _ in range(2)]
    last, count = joint_gradient(game.losses, players), 0
    first = torch.cat(players).norm()
    while torch.cat(players).norm() > tolerance * first:
        gradient = joint_gradient(game.losses, players)
        count += 1
        if method == "optimistic":
            players, last = (
                tuple(p - lr * (2 * g - o) for p, g, o in zip(players, gradient, last, strict=True)),
                gradient,
            )
        elif method == "extragradient":
            ahead = tuple(p - lr * g for p, g in zip(players, gradient, strict=True))
            gradient = joint_gradient(game.losses, ahead)
            count += 1
            players = tuple(p - lr * g for p, g in zip(players, gradient, strict=True))
        else:
            moved = list(players)
            for i in range(2):
                if method == "alternating":
                    gradient = joint_gradient(game.losses, tuple(moved))
                memory[i] = complex(beta) * memory[i] - gradient[i]
                moved[i] = players[i] + lr * memory[i].real
            players = tuple(moved)

    settings = robustness.Settings(
        lr=np.array([lr, lr / 2]),
        beta=np.array([beta, beta]),
        alternating=np.array([method == "alternating"] * 2),
        method="momentum" if method == "alternating" else method,
    )
    start = tuple(p.detach().numpy() for p in _start(0))
    field = robustness.quadratic(game.first.diagonal().numpy(), game.coupling.diagonal().numpy())
    found = robustness.evaluations(field, start, settings, tolerance, 1000)
    assert found[0] == count
    assert found[1] != count
    assert robustness.evaluations(field, start, settings, tolerance, count - 1)[0] == math.inf


def _start(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return QuadraticGame.mixture(4, 0.7, generator).initial(generator)


@pytest.mark.parametrize("alternating", [False, True])
def test_the_dirac_gan_is_played_as_it_is(dirac: ModuleType, alternating: bool) -> None:
    lr, beta = 0.5, 0.6 * np.exp(0.8j)
    game = DiracGAN()
    players = [torch.full((1,), 0.1, dtype=torch.float64) for _ in range(2)]
    memory = [torch.zeros(1, dtype=torch.complex128) for _ in range(2)]
    sizes = []
    for _ in range(20):
        gradient = joint_gradient(game.losses, tuple(players))
        seen = list(players)
        for i in range(2):
            if alternating:
                gradient = joint_gradient(game.losses, tuple(seen))
            memory[i] = complex(beta) * memory[i] - gradient[i]
            seen[i] = players[i] + lr * memory[i].real
        players = seen
        parts = [*players, *(lr * m.abs() for m in memory)]
        sizes.append(float(torch.cat(parts).norm()))
    found = dirac.play(np.array([lr]), np.array([beta]), alternating, 20)
    assert found[:, 0].tolist() == pytest.approx([sizes[9], sizes[19]], rel=1e-12)


def test_map_is_written(dirac: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["dirac_gan_map.py", "--size", "9", "--steps", "640", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    dirac.main()
    found = json.loads((tmp_path / "dirac_gan_map.json").read_text(encoding="utf-8"))
    assert found["alternating"]["converge"] > found["simultaneous"]["converge"] > 0
    assert found["simultaneous"]["measured minus predicted"]["median"] < 1e-3
    assert len((tmp_path / "dirac_gan_map.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 * 81
    assert (tmp_path / "dirac_gan_map.png").stat().st_size > 10_000


def test_robustness_is_written(
    robustness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--mixtures", "2", "--seeds", "2", "--size", "3", "--noisy-seeds", "1", "--candidates", "4"]
    monkeypatch.setattr(sys, "argv", ["momentum_robustness.py", *arguments, "--output", str(tmp_path)])
    robustness.main()
    found = json.loads((tmp_path / "momentum_robustness.json").read_text(encoding="utf-8"))
    assert found["cases"] == len(found["suggestions"]) == 4
    ours = found["ours"]["ours"]
    assert ours["cases"] == 4
    assert ours["no more than any method with its fixed setting"] >= 0.75
    assert ours["no more than any method tuned in hindsight"] <= 1
    assert found["ours"]["ours, 10 % noise"]["cases"] == 2
    assert len((tmp_path / "momentum_robustness.csv").read_text(encoding="utf-8").splitlines()) == 5
    assert (tmp_path / "momentum_robustness.png").stat().st_size > 10_000


def test_no_seed_of_the_ring_chooses_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = load("gaussians_seeds", monkeypatch)

    def end(modes: list[int], quality: float) -> dict[str, object]:
        return {"after": {"4000": {"modes": modes, "quality": [quality] * 4}}}

    # The first half prefers the large rate, the second the small one: each gets the other's choice.
    found = {"a method": {"0.1": end([8, 8, 2, 8], 0.9), "0.01": end([8, 2, 8, 8], 0.5)}}
    row = ring.crossed(found).splitlines()[-1]
    assert row == "| a method | 0.01, 0.1 | 2 of 4 | 5 [2, 8] | 70.0 [50.0, 90.0] |"


def test_a_stage_of_the_gpu_check_that_hangs_or_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    verify = load("verify_gpu", monkeypatch)
    assert sum(verify.LIMITS.values()) < verify.TOTAL < 480
    assert set(verify.LIMITS) == set(verify.STAGES)
    late = verify.run_stage("tests", True, 0.05)
    assert late["failed"] == "longer than its limit of 0 s"
    results = {
        "tests": late,
        "main job": {"seconds": 1.0, "failed": "Traceback\nValueError: no"},
        "BigGAN": {"seconds": 2.5, "figures": {"ms an update": 12.34567, "note": "x"}},
    }
    rows = verify.table(results).splitlines()
    assert rows[3].endswith("longer than its limit of 0 s |")
    assert "| main job | FAILED | ValueError: no |" in rows
    assert rows[-2:] == ["| BigGAN | ms an update | 12.35 |", "| BigGAN | note | x |"]


@pytest.mark.parametrize("name", ["bilinear", "Dirac-GAN", "mixed (γ ≤ 1)"])
def test_small_games_have_the_gradients_of_the_zoo(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load("_small_games", monkeypatch)
    case = small.GAMES[name](3)
    x, y = case.start
    expected = joint_gradient(case.game.losses, tuple(torch.from_numpy(v).requires_grad_() for v in (x, y)))
    for gradient, value in zip(case.field, expected, strict=True):
        np.testing.assert_allclose(gradient(x, y), value.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_what_adapt_needs_is_counted_by_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    small = load("_small_games", monkeypatch)
    monkeypatch.setattr(small, "TOLERANCE", 0.5)
    case = small.GAMES["agreement (γ ≤ 0.3)"](0)
    assert 1 < small.adapted(case, 0.3, limit=30) < 30
    assert small.adapted(case, 1e-4, limit=3) == math.inf


def test_networks_of_one_seed_do_not_touch_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    games, which = (load(name, monkeypatch) for name in ("_network_games", "which_momentum"))

    def trained(seeds: list[int]) -> torch.Tensor:
        game = games.Digits(seeds, which.RelativisticPairing())
        games.train(game, lambda params: which.complex_adam(0.5, 1 / 8)(params, 1e-2), 5)
        return game.samples(3)

    torch.testing.assert_close(trained([4, 9])[:, 1:], trained([9]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trained([4]), trained([9]), atol=0.1)


@pytest.mark.parametrize(("kind", "least"), [("ActorCriticGame", 8), ("PendulumGame", -2000)])
def test_environments_of_one_seed_do_not_touch_those_of_another(
    monkeypatch: pytest.MonkeyPatch, kind: str, least: float
) -> None:
    pytest.importorskip("gymnasium")
    games, which = (load(name, monkeypatch) for name in ("_network_games", "which_momentum"))

    def trained(seeds: list[int]) -> Any:
        game = getattr(which, kind)(seeds)
        games.train(game, lambda params: torch.optim.Adam(params, lr=1e-3), 3)
        return game

    both, alone = trained([4, 9]), trained([9])
    torch.testing.assert_close(both.seen[:, :, 1], alone.seen[:, :, 0], rtol=1e-4, atol=1e-4)
    assert both.scores()[1] == pytest.approx(alone.scores()[0], rel=1e-4)
    assert least < both.scores()[1] != pytest.approx(both.scores()[0], rel=1e-3)


def test_pendulums_move_as_the_one_of_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    copies = load("_actor_critic_game", monkeypatch).Pendulums([3])
    place = int(copies.lengths.argmin())
    alone = gymnasium.make("Pendulum-v1", disable_env_checker=True)
    alone.reset()
    alone.unwrapped.state = np.array([copies.angles[place], copies.speeds[place]])
    generator = torch.Generator().manual_seed(0)
    # Beyond the limit of 2, too.
    torques = 5 * torch.rand(201, copies.each, 1, dtype=torch.float64, generator=generator) - 2.5
    total = 0.0
    for torque in torques[:200]:
        rewards, terminated, ended, moved = copies.step(torque)
        seen, reward, _, truncated, _ = alone.step(torque[place].numpy())
        total += float(reward)
        # Rounding errors grow in the swings of a pendulum.
        at = [copies.angles[place], copies.speeds[place], float(rewards[place])]
        np.testing.assert_allclose(at, [*alone.unwrapped.state, reward], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(copies.observations()[place, 0], seen, rtol=1e-5, atol=1e-5)
        assert bool(ended[place]) == truncated
        assert moved[place]
        assert not terminated[place]
    assert copies.returns[0][-1] == pytest.approx(total)
    rewards, _, _, moved = copies.step(torques[200])
    assert not moved[place]
    assert rewards[place] == 0
    assert abs(copies.speeds[place]) <= 1


@pytest.mark.parametrize("kind", ["ActorCriticGame", "PendulumGame"])
def test_the_losses_of_the_stacked_actor_critic_are_those_of_the_module(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pytest.importorskip("gymnasium")
    game = getattr(load("which_momentum", monkeypatch), kind)([4])
    for _ in range(2):  # some episodes end in the second
        game.resample()

    class Alone(torch.nn.Module):
        def __init__(self, stacked: torch.nn.Module) -> None:
            super().__init__()
            self.stacked = stacked

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.stacked(x[:, None])[:, 0]
            return out

    class OfTorques(ActorCritic):
        def policy(self, observations: torch.Tensor) -> torch.distributions.Distribution:
            return torch.distributions.Normal(self.actor(observations)[:, 0], game.log_std.exp())

    form = OfTorques if kind == "PendulumGame" else ActorCritic
    options = {"entropy": game.entropy, "discount": game.discount}
    module = form(Alone(game.actor), Alone(game.critic), **options)
    batch = Rollout(
        observations=game.seen[:, :, 0],
        actions=game.actions[:, :, 0],
        rewards=game.rewards[:, :, 0],
        terminated=game.terminated[:, :, 0],
        ended=game.ended[:, :, 0],
        counts=game.weight[:, :, 0] > 0,
        returns=torch.zeros(0),
    )
    assert not batch["counts"].all()
    for name in game.players:
        torch.testing.assert_close(game.loss(name), module.player_loss(name, batch))


def test_returns_of_the_actor_critic_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gymnasium")
    (found,) = load("cartpole_seeds", monkeypatch).main(["--seeds", "1", "2", "--updates", "2"])
    assert len(found) == 2
    assert all(8 < score < 60 for score in found)
    assert "| 0 of 2 |" in capsys.readouterr().out


def test_the_perturbation_of_adversarial_training_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    games = load("_network_games", monkeypatch)
    game = games.AdversarialTraining([0], images=20)
    found = games.train(game, lambda params: torch.optim.SGD(params, lr=100.0), 2)
    assert float(game.moved.detach().abs().max()) == pytest.approx(game.radius)
    assert 0 <= found[0] <= 1


def test_frechet_distance_is_that_of_normal_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    games = load("_network_games", monkeypatch)
    x = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert games.frechet(x, x) == pytest.approx(0, abs=1e-6)
    # Twice as wide and moved by 1 in each coordinate: ‖μ‖² + tr A(1 − 2)².
    moved = games.frechet(x, 2 * x - x.mean(0) + 1)
    assert moved == pytest.approx(3 + float(torch.cov(x.T).trace()), rel=1e-9)
    assert games.frechet(x, x * math.nan) == math.inf


def test_tables_and_map_of_momenta_are_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    which = load("which_momentum", monkeypatch)
    monkeypatch.setattr(sys.modules["_small_games"], "LIMIT", 40)
    monkeypatch.setattr(which, "SIZES", (0.8,))
    monkeypatch.setattr(which, "TURNS", (1 / 8, 1.0))
    games = ["agreement (γ ≤ 0.3)", "adversarial training"]
    options = ["--tuning-seeds", "100", "--seeds", "10", "11", "--gradients", "2", "--adapt-rates"]
    found = which.main(["--games", *games, *options, "--output", str(tmp_path)])
    assert list(found) == games
    assert len(found["adversarial training"]["0.8 at 0.125π"]["found"]) == 2
    printed = capsys.readouterr().out
    assert "| complex, best of the grid |" in printed
    assert (tmp_path / "which_momentum.png").stat().st_size > 10_000
    # What is in the file is not played again.
    monkeypatch.setattr(which, "play", None)
    monkeypatch.setattr(which, "play_networks", None)
    assert which.main(["--games", *games, *options, "--output", str(tmp_path)]) == found
    # Nor is it taken for an answer to another question.
    for other in (["--seeds", "12"], ["--tuning-seeds", "9"], ["--gradients", "4"], ["--adapt-rates", "0.1"]):
        with pytest.raises(SystemExit):
            which.main(["--games", *games, *options, *other, "--output", str(tmp_path)])
        assert "give another --output" in capsys.readouterr().err


def test_digits_are_played_without_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch adds anything to the loss, whichever player's turn it is."""
    games, which = (load(name, monkeypatch) for name in ("_network_games", "which_momentum"))
    for loss in (which.Hinge(), which.NonSaturating(), which.RelativisticPairing()):
        game = games.Digits([3, 4], loss)
        for _ in range(8):
            game.resample()
            fake = game.generator(game.latents)
            scores = game.score_of(game.real), game.score_of(fake)
            torch.testing.assert_close(game.loss("discriminator"), 2 * loss.discriminator(*scores))
            torch.testing.assert_close(game.loss("generator"), 2 * loss.generator_beside(*scores))
