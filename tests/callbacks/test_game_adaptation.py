"""GameSpectrumCallback(adapt=True) in real fits: within its bounds, for each player or for all, and resumed."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nested.callbacks import GameSpectrumCallback
from lightning_nested.demos import ZooGame
from lightning_nested.demos.game_report import measured_rate
from lightning_nested.games import Bilinear, QuadraticGame, joint_step
from lightning_nested.games.joint_step import JointStep
from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
)
from tests.callbacks.running_games import GAN, loader, trainer, zoo


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
