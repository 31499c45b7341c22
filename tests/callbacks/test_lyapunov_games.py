"""LyapunovCallback on games in real fits: the theory's roots, brute force, no trace, two processes, resuming."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import LyapunovCallback
from lightning_nested.demos import ZooGame
from lightning_nested.games import Bilinear, QuadraticGame
from lightning_nested.modules import GameLoop, GameModule, GANModule
from lightning_nested.networks.spectral_norm import SpectralNormLinear
from lightning_nested.optim import ComplexAdam, ComplexSGD, Extragradient, ExtrapolationFromThePast
from tests.callbacks.perturbed_runs import first_tangent, growth, run
from tests.cases import DOUBLE, cubic_roots
from tests.trainers import trainer

# ---- the theory


@pytest.mark.parametrize(
    ("lr", "momentum", "phase", "steps"),
    [
        (0.3, 0.8, math.pi / 4, 250),
        pytest.param(0.1, 0.9, math.pi / 8, 300, marks=pytest.mark.slow),
        pytest.param(0.1, 0.8, math.pi / 8, 500, marks=pytest.mark.slow),
    ],
)
def test_complex_momentum_on_the_bilinear_game_reads_the_roots_of_the_cubic(
    lr: float, momentum: float, phase: float, steps: int
) -> None:
    module = ZooGame(
        Bilinear(),
        start=[[1.0], [0.5]],
        update="simultaneous",
        optimizer=lambda p: ComplexSGD(p, lr=lr, momentum=momentum, phase=phase),
    )
    callback = LyapunovCallback(2, window="bump")
    fit = trainer(callback, max_epochs=-1, max_steps=steps, log_every_n_steps=50)
    fit.fit(module)
    exact = float(cubic_roots(1j, lr, momentum, phase).abs().max().log())
    for i in range(2):  # a conjugate pair
        assert float(fit.callback_metrics[f"lyapunov/running_{i}"]) == pytest.approx(exact, abs=1e-6)
    assert len(callback.windows) == callback.steps + 1 == steps


def test_complex_momentum_on_a_quadratic_game_reads_the_roots_of_the_cubic() -> None:
    eigenvalues = [0.1 + 1.5j, 1.0 + 0.5j]
    module = ZooGame(
        QuadraticGame.from_eigenvalues(eigenvalues),
        update="simultaneous",
        optimizer=lambda p: ComplexSGD(p, lr=0.2),
    )
    callback = LyapunovCallback(2, window="bump", orthonormalize_every=2)
    trainer(callback, max_epochs=-1, max_steps=500).fit(module)
    exact = torch.cat([cubic_roots(e, 0.2, 0.8, math.pi / 8) for e in eigenvalues]).abs().log()
    expected = exact.max().expand(2)
    torch.testing.assert_close(callback.exponents, expected, rtol=0, atol=1e-6)
    assert callback.tracker is not None
    assert callback.tracker.alignment == pytest.approx(1.0, abs=1e-12)


def test_alternating_players_neither_grow_nor_shrink() -> None:
    callback = LyapunovCallback(2, window="bump")
    module = ZooGame(Bilinear(), start=[[1.0], [0.5]], optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    trainer(callback, max_epochs=-1, max_steps=250).fit(module)
    torch.testing.assert_close(callback.exponents, torch.zeros(2, dtype=DOUBLE), rtol=0, atol=1e-6)


def test_extragradient_reads_its_rate() -> None:
    callback = LyapunovCallback(2, window="bump")
    module = ZooGame(
        Bilinear(), start=[[1.0], [0.5]], update="simultaneous", optimizer=lambda p: Extragradient(p, lr=0.3)
    )
    trainer(callback, max_epochs=-1, max_steps=60).fit(module)
    expected = torch.full((2,), math.log(math.sqrt(1 - 0.09 + 0.0081)), dtype=DOUBLE)
    torch.testing.assert_close(callback.exponents, expected, rtol=0, atol=1e-10)


# ---- brute force


def networks(dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype),
        nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype),
    )


def real(n: int, dtype: torch.dtype = DOUBLE) -> TensorDataset:
    return TensorDataset(torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=dtype))


def sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.2, momentum=0.5)


GAMES: dict[str, dict[str, Any]] = {
    "together": {"update": "simultaneous", "optimizer": sgd},
    "in turns": {"optimizer": lambda p: torch.optim.Adam(p, lr=0.01)},
    "several steps": {"steps_per_player": {"discriminator": 2}, "optimizer": lambda p: ComplexSGD(p, lr=0.1)},
    "accumulated": {"optimizer": sgd, "loop": GameLoop(accumulate_grad_batches=2)},
    "clipped by norm": {"optimizer": sgd, "loop": GameLoop(gradient_clip_val=0.1)},
    "clipped by value": {
        "optimizer": lambda p: ComplexAdam(p, lr=0.01),
        "loop": GameLoop(gradient_clip_val={"discriminator": 0.02}, gradient_clip_algorithm="value"),
    },
    "look ahead": {
        "update": "simultaneous",
        "optimizer": lambda p: Extragradient(p, lr=0.2, weight_decay=0.1),
        "loop": GameLoop(gradient_clip_val=0.1),
    },
    "look ahead in turns": {"optimizer": lambda p: Extragradient(p, lr=0.2)},
    "from the past": {"optimizer": lambda p: ExtrapolationFromThePast(p, lr=0.2)},
    "same batch and fakes": {"optimizer": sgd, "reuse_fakes": True, "loop": GameLoop(reuse_batch=True)},
    "same fakes together": {"optimizer": sgd, "reuse_fakes": True, "update": "simultaneous"},
    "different optimizers": {
        "optimizers": {"discriminator": lambda p: torch.optim.Adam(p, lr=0.01), "generator": sgd}
    },
    "schedule": {
        "optimizer": sgd,
        "scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    },
}


@pytest.mark.parametrize("name", GAMES)
def test_growth_is_that_of_a_difference_of_two_runs(name: str) -> None:
    """Live batches and latents, and whatever else is a part of the round: the callback against brute force."""

    def make() -> LightningModule:
        return GANModule(*networks(), latent_dim=2, **GAMES[name])

    def loader() -> Any:
        return DataLoader(real(48), 4)

    callback = LyapunovCallback(1, align=0)
    module, _ = run(make, loader, callback)
    assert isinstance(module, GANModule)
    assert callback.tracker is not None
    assert len(callback.windows) == module.game_updates >= 3
    expected = growth(make, loader, first_tangent(callback.tracker.n))
    # Central differences of 1e-6, as for a single loss.
    assert float(callback.tracker.growth.sum()) == pytest.approx(expected, abs=1e-7)


# ---- no trace


def noisy_networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)),
        nn.Sequential(SpectralNormLinear(2, 8), nn.Dropout(0.3), nn.Tanh(), SpectralNormLinear(8, 1)),
    )


@pytest.mark.parametrize("options", [{}, {"fixed_batch": True}, {"every_n_steps": 2}], ids=str)
@pytest.mark.parametrize("name", ["together", "several steps", "look ahead", "same batch and fakes"])
def test_training_is_bit_for_bit_the_same(name: str, options: dict[str, Any]) -> None:
    def make() -> LightningModule:
        return GANModule(*noisy_networks(), latent_dim=2, **GAMES[name])

    def loader() -> Any:
        return DataLoader(real(48, torch.float32), 8, shuffle=True)

    callback = LyapunovCallback(2, align=3, **options)
    followed, state = run(make, loader, callback)
    numbers = torch.get_rng_state()
    plain, expected = run(make, loader)
    assert torch.equal(state, expected)
    assert torch.equal(numbers, torch.get_rng_state())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, followed.state_dict()[key]), key
    assert "player_losses" not in vars(followed)
    assert bool(torch.isfinite(callback.exponents).all())


def test_fixed_batches_make_a_game_that_stands_still_repeat_itself() -> None:
    def local(fixed: bool) -> Tensor:
        module = GANModule(
            *networks(), latent_dim=2, optimizer=lambda p: torch.optim.SGD(p, lr=1e-9, weight_decay=0.0)
        )
        callback = LyapunovCallback(1, align=0, fixed_batch=fixed)
        trainer(callback).fit(module, DataLoader(real(48), 4))
        return callback.local_exponents[:, 0] / 1e-9

    assert float(local(True).std()) < 1e-4 * float(local(False).std())


# ---- processes, resuming, freezing


class Deterministic(GameModule):
    """Two networks against each other on data, without noise."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"optimizer": lambda p: torch.optim.Adam(p, lr=0.02), **options})
        self.first, self.second = networks()

    def players(self) -> dict[str, nn.Module]:
        return {"first": self.first, "second": self.second}

    def player_loss(self, name: str, batch: Any) -> Tensor:
        value = (self.second(self.first(batch[0])) ** 2).mean() + 0.1 * self.second(batch[0]).mean()
        return value if name == "first" else -value


@pytest.mark.parametrize("update", ["simultaneous", "alternating"])
def test_two_processes_see_the_global_batch(update: str) -> None:
    loop = GameLoop(gradient_clip_val=0.05)
    single = LyapunovCallback(2, align=4)
    trainer(single, max_epochs=4).fit(Deterministic(update=update, loop=loop), DataLoader(real(32), 32))

    class Compare(LyapunovCallback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # in the processes: nothing comes back
            torch.testing.assert_close(self.local_exponents, single.local_exponents, rtol=1e-8, atol=1e-11)

    fit = trainer(Compare(2, align=4), max_epochs=4, devices=2, strategy="ddp_fork")
    fit.fit(Deterministic(update=update, loop=loop), DataLoader(real(32), 16))


@pytest.mark.parametrize("options", [{}, {"fixed_batch": True}], ids=str)
def test_resume_is_exact_from_inside_a_round(tmp_path: Path, options: dict[str, Any]) -> None:
    def fit(epochs: int, ckpt: str | None = None) -> tuple[LyapunovCallback, Any]:
        torch.manual_seed(3)
        module = GANModule(*networks(), latent_dim=2, **GAMES["several steps"])
        module.loop = GameLoop(accumulate_grad_batches=2)
        callback = LyapunovCallback(2, align=4, **options)
        run = trainer(callback, max_epochs=epochs)
        run.fit(module, DataLoader(real(32), 4), ckpt_path=ckpt, weights_only=True)
        return callback, run

    whole, _ = fit(4)
    _, half = fit(2)  # 16 batches: two rounds of 6 and two thirds of another
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, str(tmp_path / "half.ckpt"))
    assert len(whole.windows) == 5
    assert torch.equal(whole.local_exponents, resumed.local_exponents)
    assert whole.windows == resumed.windows


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.first[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2 and optimizer is pl_module.running_players["first"].optimizer.optimizer:
            self.unfreeze_and_add_param_group(pl_module.first[0], optimizer)


def test_tangents_begin_anew_when_a_player_is_unfrozen() -> None:
    callback = LyapunovCallback(2, align=4)
    module = Deterministic(update="simultaneous")
    trainer(callback, Unfreeze(), max_epochs=4).fit(module, DataLoader(real(32), 32))
    assert callback.tracker is not None
    assert callback.tracker.n == sum(p.numel() for p in module.parameters())
    assert len(callback.windows) == 4
    assert bool(torch.isfinite(callback.exponents).all())


def test_a_detached_coupling_is_told() -> None:
    class Detached(Deterministic):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            return (self.second(self.first(batch[0]).detach()) ** 2).mean() + (
                self.first(batch[0]) ** 2
            ).mean()

    class Half(Detached):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            if name == "second":
                return (self.second(self.first(batch[0]).detach()) ** 2).mean()
            return super().player_loss(name, batch)

    with pytest.warns(UserWarning, match="'second' has no graph to the parameters of 'first'"):
        trainer(LyapunovCallback(), max_epochs=1).fit(Half(), DataLoader(real(32), 16))


def test_unknown_optimizers_of_players_are_refused() -> None:
    module = Deterministic(optimizer=lambda p: torch.optim.RMSprop(p))
    with pytest.raises(ValueError, match="Got RMSprop"):
        trainer(LyapunovCallback()).fit(module, DataLoader(real(8), 8))


@pytest.mark.parametrize("fails", [False, True])
def test_several_measurements_leave_the_module_as_it_was(fails: bool) -> None:
    class Fails(Deterministic):
        def on_train_batch_end(self, *_: Any) -> None:
            if fails:
                raise KeyError("a bug of the user's")

    module, callbacks = (
        Fails(update="simultaneous"),
        [LyapunovCallback(1, align=4), LyapunovCallback(2, align=4)],
    )
    with pytest.raises(KeyError) if fails else nullcontext():
        trainer(*callbacks).fit(module, DataLoader(real(16), 16))
    assert "player_losses" not in vars(module)
    assert [len(c.windows) for c in callbacks] == [1, 1]


def test_hooks_on_gradients_of_players_are_refused_if_frozen_too() -> None:
    module = Deterministic()
    weight = next(module.first.parameters())
    weight.register_hook(lambda g: 2 * g)
    weight.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="Got a parameter with such a hook"):
        trainer(LyapunovCallback()).fit(module, DataLoader(real(8), 8))


def test_a_hook_that_comes_later_ends_the_measurement() -> None:
    class Hooks(Deterministic):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                next(self.first.parameters()).register_hook(lambda g: 2 * g)

    callback = LyapunovCallback(1, align=4)
    with pytest.warns(
        UserWarning, match="stops at step 2: LyapunovCallback needs gradients that nobody changes"
    ):
        trainer(callback, max_epochs=4).fit(Hooks(update="simultaneous"), DataLoader(real(16), 16))
    assert len(callback.windows) == 2


@pytest.mark.parametrize("align", [0, 4])
def test_first_products_that_are_not_finite_end_the_measurement_alone(align: int) -> None:
    class Spoilt(Deterministic):
        def player_loss(self, name: str, batch: Any) -> Tensor:
            return super().player_loss(name, batch) * (math.nan if self.joint_graph else 1.0)

    module, callback = Spoilt(update="simultaneous"), LyapunovCallback(1, align=align)
    with pytest.warns(UserWarning, match="LyapunovCallback stops at step 0"):
        trainer(callback, max_epochs=3).fit(module, DataLoader(real(16), 16))
    assert module.game_updates == 3
    assert callback.windows == []


def test_validation_of_a_game_may_compute_gradients_before_training() -> None:
    class Tunes(Deterministic):
        computed = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with torch.enable_grad():
                self.manual_backward(self.player_loss("first", batch))
            self.computed += 1
            self.zero_grad()

    module, loader = Tunes(), DataLoader(real(16), 16)
    trainer(LyapunovCallback(align=0), num_sanity_val_steps=1, inference_mode=False).fit(
        module, loader, loader
    )
    assert module.computed == 2
