"""GameSpectrumCallback in real fits: closed forms, an independent Jacobian, no trace, two processes, adapting."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import GameSpectrumCallback
from lightning_nested.demos import ZooGame
from lightning_nested.demos.game_report import GameReport, measured_rate
from lightning_nested.figures.game_report import _predicted
from lightning_nested.figures.game_spectrum import spectrum_figure
from lightning_nested.games import Bilinear, QuadraticGame, convergence_rate, joint_step
from lightning_nested.games.adaptation import better_momenta, better_momentum
from lightning_nested.games.joint_step import JointStep
from lightning_nested.modules import GANModule
from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    Extragradient,
    ExtrapolationFromThePast,
    OptimisticAdam,
    OptimisticSGD,
)
from lightning_nested.optim.step_dynamics import step_dynamics
from lightning_nested.optim.update_rules import Momentum

Optimizer = Callable[[Any], torch.optim.Optimizer]


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    options = {"max_epochs": -1, "max_steps": 4, "logger": False, "devices": 1, **options}
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def zoo(game: Any = None, optimizer: Optimizer | None = None, **options: Any) -> ZooGame:
    options = {"update": "simultaneous", "start": [[1.0], [1.0]], **options}
    return ZooGame(game or Bilinear(), optimizer=optimizer or (lambda p: ComplexSGD(p, lr=0.1)), **options)


# ---- closed forms


def test_the_spectrum_of_the_bilinear_game() -> None:
    callback = GameSpectrumCallback(2, k=None)
    trainer(callback).fit(zoo())
    assert [s.game_updates for s in callback.history] == [1, 2, 4]
    for spectrum in callback.history:
        expected = torch.tensor([0.1j, -0.1j], dtype=torch.complex128)
        torch.testing.assert_close(spectrum.eigenvalues, expected, rtol=1e-14, atol=1e-16)
        assert spectrum.rate == pytest.approx(0.977430, abs=1e-6)
        torch.testing.assert_close(spectrum.shares, torch.full((2, 2), 0.5, dtype=torch.float64))
        assert spectrum.own.keys() == {"first", "second"}
        assert all(float(own.abs().max()) == 0 for own in spectrum.own.values())


RATES: dict[str, tuple[Optimizer, float]] = {
    "ComplexSGD": (lambda p: ComplexSGD(p, lr=0.1), 0.977430),
    "negative momentum in turns": (lambda p: ComplexSGD(p, lr=0.5, momentum=0.5, phase=math.pi), 0.962544),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8), 1.149445),
    "Extragradient": (lambda p: Extragradient(p, lr=0.1), math.sqrt(1 - 0.1**2 + 0.1**4)),
    "OptimisticSGD": (lambda p: OptimisticSGD(p, lr=0.1), math.sqrt((1 + math.sqrt(1 - 0.04)) / 2)),
    "past": (lambda p: ExtrapolationFromThePast(p, lr=0.1), math.sqrt((1 + math.sqrt(1 - 0.04)) / 2)),
}


@pytest.mark.parametrize("name", RATES)
def test_predicted_measured_and_known_rates_agree(name: str) -> None:
    optimizer, known = RATES[name]
    callback = GameSpectrumCallback(1000, k=None)
    module = zoo(optimizer=optimizer, update="alternating" if "turns" in name else "simultaneous")
    trainer(callback, max_steps=200 if known > 1 else 500).fit(module)
    assert callback.history[0].rate == pytest.approx(known, abs=1e-6)
    assert measured_rate(module.distances) == pytest.approx(known, abs=1e-3)
    per_update = 4 if name == "Extragradient" else 2
    assert module.gradient_evaluations == per_update * module.game_updates


def test_different_learning_rates_are_in_the_spectrum() -> None:
    """With α₁ and α₂ the eigenvalues of DJ are ± i√(α₁α₂), and the rate is again that of the training."""
    callback = GameSpectrumCallback(1000, k=None)
    module = ZooGame(
        Bilinear(),
        start=[[1.0], [1.0]],
        update="simultaneous",
        optimizers={
            "first": lambda p: ComplexSGD(p, lr=0.2),
            "second": lambda p: ComplexSGD(p, lr=0.05),
        },
    )
    trainer(callback, max_steps=500).fit(module)
    spectrum = callback.history[0]
    assert float(spectrum.eigenvalues[0].imag) == pytest.approx(0.1, rel=1e-14)
    assert measured_rate(module.distances) == pytest.approx(spectrum.rate, abs=1e-3)


class Uneven(Bilinear):
    """xy, to which the first player adds a curvature that the second one lacks."""

    def losses(self, players: Any) -> tuple[Tensor, ...]:
        first, second = super().losses(players)
        return first + players[0].square().sum(), second


def test_the_rate_of_alternating_players_whose_curvatures_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(k: int | None) -> tuple[GameSpectrumCallback, float | None]:
        callback = GameSpectrumCallback(1000, k=k)
        module = zoo(Uneven(), lambda p: ComplexSGD(p, lr=0.2, momentum=0.5), update="alternating")
        trainer(callback, max_steps=200).fit(module)
        return callback, measured_rate(module.distances)

    exact, measured = run(1)  # of a small game all is known, however few eigenvalues are asked for
    monkeypatch.setattr(joint_step, "EXACT_LIMIT", 1)
    assuming, _ = run(None)
    assert exact.history[0].rate == pytest.approx(measured, abs=1e-3)
    assert assuming.history[0].rate != pytest.approx(measured, abs=0.1)
    assert [c.history[0].equal_curvatures for c in (exact, assuming)] == [False, True]
    assert [c.history[0].exact for c in (exact, assuming)] == [True, False]
    titles = [
        spectrum_figure([c.history[0]], ["first", "second"]).axes[0].get_title(loc="left")
        for c in (exact, assuming)
    ]
    assert ["equal curvatures" in title for title in titles] == [False, True]


@pytest.mark.parametrize("steps", [{}, {"second": 3}])
@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_the_rate_of_players_with_momenta_of_their_own(update: Any, steps: dict[str, int]) -> None:
    """Their learning rates, |β|, phases, kinds of optimizer and numbers of steps differ."""
    if steps and update == "simultaneous":
        pytest.skip("every player steps once")
    callback = GameSpectrumCallback(1000, k=None)
    module = ZooGame(
        QuadraticGame(*(torch.tensor([x], dtype=torch.float64) for x in (0.3, 1.0, 0.1))),
        start=[[1.0], [1.0]],
        update=update,
        steps_per_player=steps,
        optimizers={
            "first": lambda p: ComplexSGD(p, lr=0.1, momentum=0.7, phase=0.6),
            "second": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.2),
        },
    )
    trainer(callback, max_steps=300).fit(module)
    found = callback.history[0]
    assert (found.exact, found.momentum) == (True, None)
    assert {name: m.phase for name, m in found.momenta.items() if m} == {"first": 0.6, "second": 0.0}
    # The distance swings around its line: between two points of 150 by a factor of up to 2.
    assert found.rate == pytest.approx(measured_rate(module.distances), rel=math.log(2) / 100)
    title = spectrum_figure([found], ["first", "second"]).axes[0].get_title(loc="left")
    assert "|β| = 0.7, 0.2" in title


def test_products_find_what_the_dense_matrix_has() -> None:
    game = QuadraticGame.from_eigenvalues([0.5 + 0.1j * k for k in range(1, 31)])
    options = {"game": game, "start": None, "optimizer": lambda p: ComplexSGD(p, lr=0.01)}
    few, every = GameSpectrumCallback(k=4), GameSpectrumCallback(k=None)
    trainer(few, every, max_steps=1).fit(zoo(**options))
    torch.testing.assert_close(
        few.history[0].eigenvalues, every.history[0].eigenvalues[:4], rtol=1e-9, atol=0
    )
    assert abs(few.history[0].eigenvalues[0]) == pytest.approx(0.01 * abs(0.5 + 3j), rel=1e-9)
    assert few.history[0].own["first"][0] == pytest.approx(0.005, rel=1e-9)


# ---- an independent Jacobian


def mlp(inputs: int, outputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


class GAN(GANModule):
    """Latents come with the batch."""

    def __init__(self, optimizer: Optimizer | None = None, hidden: int = 4, **options: Any) -> None:
        torch.manual_seed(0)
        optimizer = optimizer or (lambda p: ComplexAdam(p, lr=0.01, betas=(0.7, 0.9)))
        super().__init__(mlp(2, 2, hidden), mlp(2, 1, hidden), latent_dim=2, optimizer=optimizer, **options)

    def player_loss(self, name: str, batch: Any) -> Tensor:
        self.latents = batch[0][:, 2:]
        return super().player_loss(name, (batch[0][:, :2],))

    def sample_latents(self, count: int) -> Tensor:
        return self.latents


def points(n: int = 40) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def loader(size: int = 10) -> DataLoader[Any]:
    return DataLoader(TensorDataset(points()), size)


def jacobian_by_hand(module: GAN, batch: Tensor) -> Tensor:
    """Of the written-out losses, row by row, with no code of the package."""
    real, latents = batch[:, :2], batch[:, 2:]
    d, g = list(module.discriminator.parameters()), list(module.generator.parameters())
    fake = module.discriminator(module.generator(latents))
    softplus = nn.functional.softplus
    loss_d = softplus(-module.discriminator(real)).mean() + softplus(fake).mean()
    gradient = [
        *torch.autograd.grad(loss_d, d, create_graph=True),
        *torch.autograd.grad(softplus(-fake).mean(), g, create_graph=True),
    ]
    flat = torch.cat([x.reshape(-1) for x in gradient])
    rows = [torch.autograd.grad(entry, [*d, *g], retain_graph=True, materialize_grads=True) for entry in flat]
    return torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows])


@pytest.mark.parametrize("name", ["ComplexAdam", "Adam", "SGD"])
def test_the_spectrum_of_a_gan_is_that_of_the_preconditioned_jacobian(name: str) -> None:
    optimizers: dict[str, Optimizer] = {
        "ComplexAdam": lambda p: ComplexAdam(p, lr=0.01, betas=(0.7, 0.9)),
        "Adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.0, 0.9)),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    }
    module, callback = GAN(optimizers[name]), GameSpectrumCallback(3, k=None)
    trainer(callback, max_steps=3).fit(module, loader())
    scale = []
    for player in ("discriminator", "generator"):
        optimizer = module.running_players[player].optimizer.optimizer
        for p in module.players()[player].parameters():
            state = optimizer.state[p]
            v = state["exp_avg_sq"] / (1 - 0.9**3) if "exp_avg_sq" in state else None
            scale.append(
                torch.full((p.numel(),), 0.01) if v is None else 0.01 / (v.sqrt() + 1e-8).reshape(-1)
            )
    jacobian = torch.cat(scale).double()[:, None] * jacobian_by_hand(module, points()[:10])
    expected = torch.linalg.eigvals(jacobian)
    found = callback.history[-1].eigenvalues
    # Each has a partner: eigenvalues of unsymmetric matrices are known to about √ε where they nearly coincide.
    distance = (found[:, None] - expected[None]).abs()
    assert float(distance.min(dim=1).values.max()) < 1e-7 * float(expected.abs().max())
    assert float(distance.min(dim=0).values.max()) < 1e-7 * float(expected.abs().max())
    assert float(found.imag.abs().max()) > 0.01 * float(found.abs().max()), "the players are coupled"


def test_two_processes_see_the_spectrum_of_the_global_batch(tmp_path: Path) -> None:
    class Half(GAN):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            return super().player_loss(name, [batch[0][self.trainer.global_rank :: self.trainer.world_size]])

    class Save(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            torch.save(spectrum.history[-1].eigenvalues, tmp_path / f"{trainer.global_rank}.pt")

    spectrum = GameSpectrumCallback(2, k=4)
    options = {"use_distributed_sampler": False, "max_steps": 2}
    trainer(spectrum, Save(), devices=2, strategy="ddp_fork", **options).fit(Half(), loader())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    one = GameSpectrumCallback(2, k=4)
    trainer(one, **options).fit(Half(), loader())
    torch.testing.assert_close(first, one.history[-1].eigenvalues, rtol=1e-8, atol=1e-10)


# ---- no trace


class Stateful(GANModule):
    """Batch norm, spectral norm, dropout and latents from the global stream."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        discriminator = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(2, 4)),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Linear(4, 1),
        )
        super().__init__(
            generator, discriminator, latent_dim=2, optimizer=lambda p: ComplexAdam(p, lr=0.01), **options
        )

    def player_loss(self, name: str, batch: Any) -> Tensor:
        self.log("seen", float(batch[0][0, 0]))
        return super().player_loss(name, batch[0][:, :2].float())


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_training_is_the_same_to_the_last_bit(update: Any) -> None:
    def run(*callbacks: Callback) -> tuple[dict[str, Tensor], Tensor, dict[str, Any]]:
        module = Stateful(update=update, reuse_fakes=True)
        torch.manual_seed(1)
        fit = trainer(*callbacks, max_steps=6)
        fit.fit(module, loader())
        metrics = {name: float(v) for name, v in fit.callback_metrics.items() if "spectrum" not in name}
        return module.state_dict(), torch.rand(4), metrics

    callback = GameSpectrumCallback(2, k=3)
    without, with_it = run(), run(callback)
    assert len(callback.history) == 4
    assert without[0].keys() == with_it[0].keys()
    assert all(torch.equal(value, with_it[0][name]) for name, value in without[0].items())
    assert torch.equal(without[1], with_it[1])
    assert without[2] == with_it[2]
    again = GameSpectrumCallback(2, k=3)
    run(again)
    for a, b in zip(callback.history, again.history, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)


# ---- adapting


def test_adapting_makes_a_diverging_run_converge_within_its_bounds() -> None:
    module = zoo(optimizer=lambda p: ComplexSGD(p, lr=0.1, momentum=0.8, phase=0.0))
    callback = GameSpectrumCallback(10, k=None, adapt=True, max_change=(0.05, 0.2))
    trainer(callback, max_steps=400).fit(module)
    settings = [(s.momentum.momentum, s.momentum.phase) for s in callback.history if s.momentum]
    assert settings[0] == (0.8, 0.0)
    for (m0, p0), (m1, p1) in pairwise(settings):
        assert abs(m1 - m0) <= 0.05 + 1e-12
        assert abs(p1 - p0) <= 0.2 + 1e-12
        assert m1 <= 0.95
    assert callback.history[0].rate is not None
    assert callback.history[0].rate > 1.1
    last = callback.history[-1].rate
    assert last is not None
    assert last < 0.95, "better than the first guess of 0.8 and π/8, which is 0.977"
    # At the best momentum roots coincide, so that the distance swings: by a factor of up to 10 in some 200 updates.
    assert measured_rate(module.distances) == pytest.approx(last, rel=math.log(10) / 200)


UNEQUAL = QuadraticGame(*(torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.1, 0.02)))


def best_common_rate(step: JointStep) -> float:
    """Of one momentum for all players, on a fine grid."""
    grid = [
        (m, p) for m in torch.linspace(0, 0.95, 40).tolist() for p in torch.linspace(0, math.pi, 25).tolist()
    ]
    return min(step.where(dict.fromkeys(range(len(step.sizes)), settings)).rate() for settings in grid)


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_each_player_gets_its_own_momentum(update: Any) -> None:
    """A stiff player wants little momentum, a flat one much: together no common one is as good."""
    callback = GameSpectrumCallback(10, k=None, adapt=True)
    module = zoo(UNEQUAL, lambda p: ComplexSGD(p, lr=1.0, momentum=0.3, phase=0.0), update=update)
    trainer(callback, max_steps=200).fit(module)
    first, last = callback.history[0], callback.history[-1]
    assert first.rate is not None
    assert last.rate is not None
    step = JointStep(
        matrix=UNEQUAL.jacobian().numpy(),
        sizes=(1, 1),
        steps=(1, 1) if update == "alternating" else None,
        momentum=np.full(2, 0.3),
        phase=np.zeros(2),
    )
    assert first.rate == pytest.approx(step.rate(), rel=1e-9)
    common, measured = best_common_rate(step), measured_rate(module.distances)
    assert last.rate < common - 0.02
    assert measured is not None
    assert measured < common - 0.01
    assert measured == pytest.approx(last.rate, rel=math.log(4) / 60)  # as above, in 60 updates
    settings = [s.momenta["first"] != s.momenta["second"] for s in callback.history]
    assert (settings[0], settings[-1]) == (False, True)
    for a, b in pairwise(callback.history):
        for name in ("first", "second"):
            old, new = a.momenta[name], b.momenta[name]
            assert old is not None
            assert new is not None
            assert abs(new.momentum - old.momentum) <= 0.1 + 1e-12
            assert abs(new.phase - old.phase) <= math.pi / 8 + 1e-12
        assert b.rate is not None
        assert a.rate is not None
        assert b.rate <= a.rate + 1e-9


def test_alternating_players_are_adapted_by_their_own_polynomial(monkeypatch: pytest.MonkeyPatch) -> None:
    """On curvatures 1 and 0 the formula for equal ones leads astray."""

    def run(limit: int) -> float:
        monkeypatch.setattr(joint_step, "ADAPT_LIMIT", limit)
        game = QuadraticGame(*(torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.5, 0.0)))
        module = zoo(game, lambda p: ComplexSGD(p, lr=1.0, momentum=0.5, phase=0.2), update="alternating")
        trainer(GameSpectrumCallback(5, k=None, adapt=True), max_steps=100).fit(module)
        found = measured_rate(module.distances)
        assert found is not None
        return found

    assert run(60) < run(1) - 0.01


def test_players_of_other_optimizers_keep_their_momentum() -> None:
    callback = GameSpectrumCallback(5, k=None, adapt=True)
    module = ZooGame(
        UNEQUAL,
        start=[[1.0], [1.0]],
        update="simultaneous",
        optimizers={
            "first": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5),
            "second": lambda p: ComplexSGD(p, lr=1.0, momentum=0.5, phase=0.0),
        },
    )
    with pytest.warns(UserWarning, match="Others keep theirs: SGD for 'first'") as told:
        trainer(callback, max_steps=100).fit(module)
    assert len([w for w in told if "adapt=True" in str(w.message)]) == 1
    rates = [s.rate for s in callback.history]
    assert rates[-1] < rates[0] - 0.02  # type: ignore[operator]
    first, second = (player.optimizer.param_groups[0] for player in module.running_players.values())
    assert first["momentum"] == 0.5
    assert second["momentum"] > 0.6


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_a_large_game_has_one_momentum_for_all(
    momentum: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for limit in ("EXACT_LIMIT", "ADAPT_LIMIT"):
        monkeypatch.setattr(joint_step, limit, 1)
    callback = GameSpectrumCallback(5, k=None, adapt=True)
    module = zoo(UNEQUAL, lambda p: ComplexSGD(p, lr=1.0, momentum=momentum, phase=0.0))
    fit = trainer(callback, max_steps=100)
    with caplog.at_level("INFO"):
        fit.fit(module)
    last = callback.history[-1]
    assert len([r for r in caplog.records if "adapts one momentum for all players" in r.message]) == 1
    assert fit.callback_metrics["spectrum/adapts_each_player"] == 0
    assert fit.callback_metrics["spectrum/rate_is_exact"] == 0
    assert last.momentum is not None
    assert last.momentum.momentum != momentum


def test_directions_that_run_away_do_not_hide_the_others() -> None:
    """Beside a direction of negative curvature the turning ones are adapted as without it."""
    now = {i: Momentum("momentum", 0.8, 0.0) for i in range(2)}
    turn, whole, beta = np.array([[0.0, 0.1], [-0.1, 0.0]]), np.zeros((3, 3)), np.full(3, 0.8)
    whole[:2, :2], whole[2, 2] = turn, -0.05
    alone = JointStep(matrix=turn, sizes=(1, 1), steps=None, momentum=beta[:2], phase=0 * beta[:2])
    beside = JointStep(matrix=whole, sizes=(1, 2), steps=None, momentum=beta, phase=0 * beta)
    assert better_momenta(beside, now) == better_momenta(alone, now) != now
    away = JointStep(matrix=-np.eye(2), sizes=(1, 1), steps=None, momentum=beta[:2], phase=beta[:2])
    assert better_momenta(away, now) == now


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"steps_per_player": {"second": 2}}, "several steps"),
        ({"optimizer": lambda p: ComplexAdam(p, lr=0.1, debias=True)}, "debias=True and a phase"),
        (
            {
                "optimizer": None,
                "optimizers": {
                    "first": lambda p: ComplexSGD(p, lr=0.1, phase=0.1),
                    "second": lambda p: ComplexSGD(p, lr=0.1, phase=0.2),
                },
            },
            "differ in momentum",
        ),
        ({"optimizer": lambda p: ComplexAdam(p, lr=0.1, phase=0.0, debias=True)}, "have debias=False"),
    ],
)
def test_nothing_is_adapted_without_a_predicted_rate(
    options: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("EXACT_LIMIT", "ADAPT_LIMIT"):  # as in a game too large for its joint step
        monkeypatch.setattr(joint_step, limit, 1)

    def settings(module: ZooGame) -> list[Any]:
        groups = [player.optimizer.param_groups[0] for player in module.running_players.values()]
        return [(g.get("momentum"), g.get("betas"), g["phase"]) for g in groups]

    options = {"optimizer": lambda p: ComplexSGD(p, lr=0.1), "update": "alternating", **options}
    module, plain = (ZooGame(Bilinear(), start=[[1.0], [1.0]], **options) for _ in range(2))
    with pytest.warns(UserWarning, match=why) as told:
        trainer(GameSpectrumCallback(1, k=None, adapt=True), max_steps=6).fit(module)
    trainer(max_steps=6).fit(plain)
    assert len([w for w in told if "adapt=True" in str(w.message)]) == 1
    assert settings(module) == settings(plain)
    assert module.distances == plain.distances


def test_better_momentum_leaves_alone_what_it_cannot_help() -> None:
    now = Momentum("momentum", 0.5, 0.3)
    assert better_momentum(torch.tensor([-0.1 + 0j]), now) == now  # repelled whatever the momentum
    some = torch.tensor([-0.1 + 0j, 0.1j, -0.1j])
    better = better_momentum(some, now)
    worst = [convergence_rate([0.1j], lr=1.0, momentum=m.momentum, phase=m.phase) for m in (now, better)]
    assert worst[1] < worst[0] - 1e-3
    assert better_momentum(some, better, max_change=(0.0, 0.0)) == better


def test_a_momentum_above_the_bound_comes_down_by_no_more_than_max_change() -> None:
    for now, lowest in ((Momentum("momentum", 0.99, 0.0), 0.98), (Momentum("momentum", 0.96, 0.0), 0.95)):
        # λ = 1 wants far less momentum.
        better = better_momentum(torch.tensor([1.0 + 0j]), now, max_momentum=0.95, max_change=(0.01, 0.1))
        assert lowest - 1e-12 <= better.momentum <= now.momentum
        assert better.phase <= 0.1 + 1e-12
        assert better != now


def test_an_adapted_run_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def run(steps: int, path: Path | None = None, save: Path | None = None) -> GAN:
        # Small: an adaptation takes the eigenvalues of the joint step, of 3n numbers, some 170 times.
        module = GAN(lambda p: ComplexAdam(p, lr=0.01, betas=(0.7, 0.9)), hidden=2)
        callback = GameSpectrumCallback(6, k=4, adapt=True)
        fit = trainer(callback, max_steps=steps)
        torch.manual_seed(steps)
        fit.fit(module, loader(), ckpt_path=path, weights_only=True)
        if save is not None:
            fit.save_checkpoint(save)
        return module

    whole = run(12)
    run(4, save=tmp_path / "some.ckpt")  # 8 batches: two epochs
    resumed = run(12, tmp_path / "some.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    groups = [
        [(g["betas"], g["phase"]) for p in m.running_players.values() for g in p.optimizer.param_groups]
        for m in (whole, resumed)
    ]
    assert groups[0] == groups[1]
    assert groups[0][0] != ((0.7, 0.9), math.pi / 8)


# ---- pictures, reports


def test_metrics_and_the_figure_go_to_the_logger() -> None:
    class Recorder(Logger):
        name, version = "recorder", 0

        def __init__(self) -> None:
            super().__init__()
            self.metrics: dict[int, dict[str, float]] = {}
            self.figures: list[tuple[str, int, Any]] = []
            self.experiment = SimpleNamespace(add_figure=lambda *a: self.figures.append((a[0], a[2], a[1])))

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.metrics.setdefault(step or 0, {}).update(metrics)

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    recorder = Recorder()
    fit = trainer(GameSpectrumCallback(3, k=None), logger=recorder, max_steps=3, log_every_n_steps=50)
    fit.fit(
        zoo(QuadraticGame.from_eigenvalues([0.5 + 1j])),
    )
    found = recorder.metrics[3]
    assert found["spectrum/max_imaginary"] == pytest.approx(0.1)
    assert found["spectrum/max_real"] == pytest.approx(0.05)
    assert found["spectrum/own/first"] == pytest.approx(0.05)
    assert found["spectrum/adversarial"] == 1.0
    assert found["spectrum/predicted_rate"] < 1
    assert fit.callback_metrics["spectrum/predicted_rate"] == pytest.approx(found["spectrum/predicted_rate"])
    assert [(tag, step) for tag, step, _ in recorder.figures] == [("spectrum", 1), ("spectrum", 3)]
    (axes,) = recorder.figures[0][2].axes
    offsets = [
        tuple(map(float, o)) for c in axes.collections for o in c.get_offsets() if c.get_offsets().size
    ]
    expected = (math.log10(0.1 * abs(0.5 + 1j)), math.atan2(1.0, 0.5))
    assert any(o == pytest.approx(expected, abs=1e-9) for o in offsets)


def test_the_report_of_a_zoo_game(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = GameReport("xy")
    fit = trainer(GameSpectrumCallback(k=None), report, max_steps=300, default_root_dir=tmp_path)
    fit.fit(zoo())
    assert report.results["measured_rate"] == pytest.approx(report.results["predicted_rate"], abs=1e-4)
    assert "measured 0.9774" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "xy.png"}


@pytest.mark.parametrize(
    ("start", "lr", "momentum", "steps"),
    [(1.0, 0.1, 0.8, 600), (0.0, 0.1, 0.8, 4), (1.0, 5.0, 0.0, 200)],
)
def test_a_report_of_a_run_that_diverges_or_stands_still(
    start: float, lr: float, momentum: float, steps: int, tmp_path: Path
) -> None:
    report = GameReport()
    module = zoo(
        optimizer=lambda p: ComplexSGD(p, lr=lr, momentum=momentum, phase=0.0), start=[[start], [start]]
    )
    spectrum = GameSpectrumCallback(10_000, k=None)
    trainer(spectrum, report, max_steps=steps, default_root_dir=tmp_path).fit(module)
    assert (tmp_path / "game.png").stat().st_size > 10_000


def test_the_measured_rate_of_a_run_that_diverges() -> None:
    assert measured_rate([1.5**t for t in range(200)]) == pytest.approx(1.5, rel=1e-12)
    assert measured_rate([0.0] * 9) is None
    assert measured_rate([]) is None


@pytest.mark.parametrize("rate", [0.0, 1e-200, 0.9, 1.0, 10.0, 1e200])
def test_a_prediction_that_no_float_can_hold(rate: float) -> None:
    for distances in ([1.0] * 1001, [0.0] * 5, [1.0, math.inf, math.nan], [1e300, 1e-300, 0.0]):
        found = _predicted(distances, rate)
        assert all(0 < d < math.inf for d in found)
    assert _predicted([1.0, 0.9, 0.81], 0.9) == pytest.approx([1.0, 0.9, 0.81])


# ---- what optimizers do


def test_step_dynamics_of_groups_that_differ() -> None:
    a, b = (nn.Parameter(torch.ones(n)) for n in (1, 2))
    groups = [{"params": [a], "phase": 0.1}, {"params": [b], "lr": 0.5}]
    found = step_dynamics(ComplexSGD(groups, lr=0.2), [a, b])
    assert found.momentum is None
    assert [d.tolist() for d in found.scale] == [pytest.approx([0.2]), [0.5, 0.5]]


def test_a_player_that_ascends() -> None:
    """Both players of xy, which the first descends and the second ascends, are the bilinear game."""

    class Common(Bilinear):
        def losses(self, players: Any) -> tuple[Tensor, ...]:
            first, second = super().losses(players)
            return first, -second

    def optimizers(phase: float) -> dict[str, Optimizer]:
        options: dict[str, Any] = {"lr": 0.1, "phase": phase}
        return {
            "first": lambda p: ComplexSGD(p, **options),
            "second": lambda p: ComplexSGD(p, **options, maximize=True),
        }

    callback = GameSpectrumCallback(1000, k=None)
    module = ZooGame(
        Common(), start=[[1.0], [1.0]], update="simultaneous", optimizers=optimizers(math.pi / 8)
    )
    trainer(callback, max_steps=300).fit(module)
    expected = torch.tensor([0.1j, -0.1j], dtype=torch.complex128)
    torch.testing.assert_close(callback.history[0].eigenvalues, expected, rtol=1e-14, atol=1e-16)
    assert callback.history[0].rate == pytest.approx(measured_rate(module.distances), abs=1e-3)


def test_groups_that_ascend_and_descend_are_refused() -> None:
    a, b = (nn.Parameter(torch.ones(n)) for n in (1, 2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "maximize": True}], lr=0.1)
    assert step_dynamics(optimizer, [b]).sign == -1
    with pytest.raises(ValueError, match="must have the same maximize"):
        step_dynamics(optimizer, [a, b])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Rprop(p, lr=0.1),
        lambda p: ComplexAdam(p, lr=0.1, debias=True),
        lambda p: OptimisticAdam(p, lr=0.1),
    ],
)
def test_no_rate_is_predicted_for_updates_of_another_form(optimizer: Optimizer) -> None:
    callback = GameSpectrumCallback(k=None)
    trainer(callback, max_steps=1).fit(zoo(optimizer=optimizer))
    assert callback.history[0].rate is None


# ---- wrong input


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_updates": 0},
        {"k": 0},
        {"which": "foo"},
        {"max_products": 0},
        {"max_momentum": 1.0},
        {"max_momentum": -0.1},
        {"max_change": (-0.1, 0.1)},
    ],
)
def test_wrong_arguments(options: Any) -> None:
    with pytest.raises(ValueError, match="Got"):
        GameSpectrumCallback(**options)


def test_all_eigenvalues_of_a_game_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_nested.callbacks.game_spectrum.DENSE_LIMIT", 1)
    module = zoo()
    with pytest.raises(MisconfigurationException, match=r"at most 1 numbers. Got players of 2; use k=20"):
        trainer(GameSpectrumCallback(k=None)).fit(module)
    assert module.game_updates == 0
    trainer(GameSpectrumCallback(k=1), max_steps=1).fit(zoo())


def test_a_jacobian_that_overflows_is_told_and_training_goes_on() -> None:
    class Steep(Bilinear):
        def losses(self, players: Any) -> tuple[Tensor, ...]:
            first, second = super().losses(players)
            return first + players[0].pow(1.5).sum(), second  # at 0 its second derivative is infinite

    callback = GameSpectrumCallback(2, k=None)
    with pytest.warns(
        UserWarning, match=r"measured nothing after \d game updates: The Jacobian must be finite"
    ):
        trainer(callback, max_steps=2).fit(zoo(Steep(), start=[[0.0], [0.0]]))
    assert callback.history == []


def test_modules_and_optimizers_that_do_not_fit() -> None:
    with pytest.raises(MisconfigurationException, match=r"of a GameModule. Got BoringModel"):
        trainer(GameSpectrumCallback()).fit(BoringModel(), loader())
    with pytest.raises(MisconfigurationException, match="Got SGD for 'first'"):
        trainer(GameSpectrumCallback(adapt=True)).fit(zoo(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)))


def test_a_detached_coupling_is_told() -> None:
    class Detached(GAN):
        def discriminator_loss(self, batch: Any) -> Tensor:
            with torch.no_grad():
                fake = self.generator(self.latents)
            return (self.discriminator(fake) - self.discriminator(batch[0])).mean()

    with pytest.warns(UserWarning, match="'discriminator' has no graph to the parameters of 'generator'"):
        trainer(GameSpectrumCallback(k=2), max_steps=1).fit(Detached(), loader())


def test_eigenvalues_that_do_not_converge_are_told_and_training_goes_on() -> None:
    callback = GameSpectrumCallback(2, k=3, max_products=1)
    module = zoo(QuadraticGame.from_eigenvalues([1 + 0.001j * k for k in range(100)]), start=None)
    with pytest.warns(UserWarning, match=r"measured nothing after \d game updates.*max_products=1"):
        trainer(callback).fit(module)
    assert (callback.history, module.game_updates) == ([], 4)
