"""GameSpectrumCallback in real fits: closed forms, an independent Jacobian, no side effects, two processes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_nested.callbacks import GameSpectrumCallback
from lightning_nested.demos import ZooGame
from lightning_nested.demos.game_report import measured_rate
from lightning_nested.figures.game_spectrum import spectrum_figure
from lightning_nested.games import Bilinear, QuadraticGame, joint_step
from lightning_nested.modules import GANModule
from lightning_nested.optim import (
    ComplexAdam,
    ComplexSGD,
    Extragradient,
    ExtrapolationFromThePast,
    OptimisticSGD,
)
from tests.callbacks.running_games import GAN, Optimizer, loader, points, trainer, zoo


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
    trainer(callback, max_steps=200 if known > 1 else 300).fit(module)
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
    assert [name for name, value in without[0].items() if not torch.equal(value, with_it[0][name])] == []
    assert torch.equal(without[1], with_it[1])
    assert without[2] == with_it[2]
    again = GameSpectrumCallback(2, k=3)
    run(again)
    for a, b in zip(callback.history, again.history, strict=True):
        assert torch.equal(a.eigenvalues, b.eigenvalues)


def test_the_last_spectra_are_drawn() -> None:
    callback = GameSpectrumCallback(2, k=None)
    with pytest.raises(ValueError, match=r"Got an empty history; call plot after trainer.fit"):
        callback.plot()
    trainer(callback, max_steps=4).fit(zoo(QuadraticGame.from_eigenvalues([0.5 + 1j])))
    titles = [axes.get_title(loc="left").splitlines()[0] for axes in callback.plot(last=2).axes]
    assert titles == ["after 2 game updates", "after 4 game updates"]
    with pytest.raises(ValueError, match=r"last must be at least 1. Got 0"):
        callback.plot(last=0)


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
