"""LyapunovCallback in real fits of one loss: no side effects, closed forms, brute force, two processes, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import LyapunovCallback
from lightning_nested.dynamics import TrainingTracker, lyapunov_spectrum, update_map
from lightning_nested.dynamics.frames import to_rows
from lightning_nested.optim import ComplexSGD, Extragradient, ExtrapolationFromThePast, OptimisticAdam
from tests.callbacks.perturbed_runs import first_tangent, growth, run
from tests.callbacks.regression import OPTIMIZERS, Regression, data, smooth
from tests.capabilities import TORCH_2_5
from tests.cases import DOUBLE
from tests.trainers import trainer


def noisy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize(
    "options", [{}, {"fixed_batch": True}, {"every_n_steps": 2, "orthonormalize_every": 2}]
)
def test_training_is_bit_for_bit_the_same(options: dict[str, Any]) -> None:
    def run(*callbacks: Any) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        seed_everything(3, verbose=False)
        module, fit = Regression(noisy(), OPTIMIZERS["momentum"]), trainer(*callbacks, max_epochs=2)
        fit.fit(module, DataLoader(data(64, torch.float32), 16, shuffle=True))
        return module.state_dict(), torch.get_rng_state(), fit.callback_metrics

    callback = LyapunovCallback(2, **options)
    plain, followed = run(), run(callback)
    assert callback.follower.backward.is_same is (None if "fixed_batch" in options else True)
    assert len(callback.windows) == (2 if "every_n_steps" in options else 8)
    for key, value in plain[0].items():
        assert torch.equal(value, followed[0][key]), key
    assert torch.equal(plain[1], followed[1])
    assert torch.equal(plain[2]["train"], followed[2]["train"])
    assert "lyapunov/running_1" in followed[2]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exponents_are_those_of_the_optimizer_as_a_map(name: str) -> None:
    """Full batches make the run autonomous: the same frame through update_map gives the same growth."""
    module, whole = Regression(smooth(), OPTIMIZERS[name]), data(32)
    start = [p.detach().clone().requires_grad_(True) for p in module.parameters()]
    names = [n for n, _ in module.net.named_parameters()]
    x, y = whole.tensors

    def loss(params: Any) -> Tensor:
        out = torch.func.functional_call(module.net, dict(zip(names, params, strict=True)), (x,))
        return 0.5 * ((out - y) ** 2).mean()

    training = update_map(OPTIMIZERS[name](start), loss)
    state = training.initial()
    callback = LyapunovCallback(3, align=0)
    trainer(callback, max_epochs=12).fit(module, DataLoader(whole, 32))
    tracker = TrainingTracker(start, k=3, align=0)
    frame = tracker.random_frame()
    coordinates = training.coordinates(state)
    rows = torch.cat(
        [frame, torch.zeros(3, sum(a.numel() for a in coordinates) - frame.shape[1]).to(frame)], 1
    )
    # Buffers of the map lie by parameter, those of the tracker by kind: zeros at first, so the frames agree.
    expected = lyapunov_spectrum(training, state, k=3, num_steps=12, frame=rows)
    torch.testing.assert_close(
        callback.exponents, expected.exponents, rtol=1e-9, atol=1e-12, check_dtype=False
    )
    assert to_rows(tuple(a.unsqueeze(0) for a in coordinates)).shape[1] == rows.shape[1]


class Awkward(Regression):
    """Options by which a run's step is not the plain one."""

    def __init__(self, change: str) -> None:
        super().__init__(smooth())
        self.change = change
        if change == "frozen":
            self.net[0].bias.requires_grad_(False)
        if change == "unused":  # has no gradient: the optimizer passes over it, decay included
            self.spare = nn.Parameter(torch.ones(3, dtype=DOUBLE))

    def configure_optimizers(self) -> Any:
        if self.change == "groups":
            first, second = self.net[0].parameters(), self.net[2].parameters()
            return torch.optim.SGD(
                [{"params": first}, {"params": second, "lr": 0.02, "momentum": 0.5}], lr=0.1, weight_decay=0.1
            )
        make: dict[str, Any] = {
            "scheduler": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5, dampening=0.2),
            "clip norm": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5),
            "clip value": lambda p: torch.optim.Adam(p, lr=0.01),
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
            "extragradient": lambda p: Extragradient(p, lr=0.2, weight_decay=0.1),
            "past": lambda p: ExtrapolationFromThePast(p, lr=0.1),
            "optimistic": lambda p: OptimisticAdam(p, lr=0.01),
            "complex": lambda p: ComplexSGD(p, lr=0.1),
        }
        optimizer = make.get(self.change, OPTIMIZERS["sgd"])(
            [p for p in self.parameters() if p.requires_grad]
        )
        if self.change != "scheduler":
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


AWKWARD: dict[str, dict[str, Any]] = {
    "groups": {},
    "frozen": {},
    "unused": {},
    "scheduler": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clip norm": {"gradient_clip_val": 0.3},
    "clip value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "adamw": {"gradient_clip_val": 0.3},
    "extragradient": {},
    "past": {},
    "optimistic": {},
    "complex": {},
}


@pytest.mark.parametrize("change", AWKWARD)
def test_growth_is_that_of_a_difference_of_two_runs(change: str) -> None:
    """Live batches, and whatever else is a part of the step: the callback against brute force."""

    def make() -> LightningModule:
        return Awkward(change)

    def loader() -> Any:
        return DataLoader(data(48), 8)

    callback = LyapunovCallback(1, align=0)
    run(make, loader, callback, **AWKWARD[change])
    assert callback.tracker is not None
    tangent = first_tangent(callback.tracker.n)
    expected = growth(make, loader, tangent, **AWKWARD[change])
    assert callback.steps == (3 if change == "accumulation" else 6)
    # Central differences of 1e-6: truncation 1e-12 of third derivatives, rounding 1e-16/1e-6 = 1e-10, over a length.
    assert float(callback.tracker.growth.sum()) == pytest.approx(expected, abs=1e-7)
    assert callback.follower.backward.is_same is True


def test_a_quadratic_run_reads_its_rates() -> None:
    module = Regression(nn.Linear(5, 1, bias=False).double(), lambda p: torch.optim.SGD(p, lr=0.3))
    whole = data(64)
    callback = LyapunovCallback(5, align=5)
    trainer(callback, max_epochs=30).fit(module, DataLoader(whole, 64))
    x = whole.tensors[0]
    rates = (1 - 0.3 * torch.linalg.eigvalsh(x.mT @ x / 64)).abs().log().sort(descending=True).values
    torch.testing.assert_close(callback.exponents, rates, rtol=0, atol=1e-10, check_dtype=False)
    assert callback.crossings == []


def test_accumulated_batches_are_one_step() -> None:
    found = []
    for size, window in ((32, 1), (8, 4)):
        callback = LyapunovCallback(2, align=0)
        fit = trainer(callback, max_epochs=5, accumulate_grad_batches=window)
        fit.fit(Regression(smooth(), OPTIMIZERS["adam"]), DataLoader(data(32), size))
        found.append(callback.exponents)
        assert len(callback.windows) == 5
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_two_processes_see_the_global_batch() -> None:
    single = LyapunovCallback(2, align=6)
    trainer(single, max_epochs=4).fit(Regression(smooth()), DataLoader(data(32), 32))

    class Compare(LyapunovCallback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # in the processes: nothing comes back
            torch.testing.assert_close(self.exponents, single.exponents, rtol=1e-9, atol=1e-12)

    fit = trainer(Compare(2, align=6), max_epochs=4, devices=2, strategy="ddp_fork")
    fit.fit(Regression(smooth()), DataLoader(data(32), 16))


def test_resume_is_exact(tmp_path: Path) -> None:
    def fit(epochs: int, ckpt: str | None = None) -> tuple[LyapunovCallback, Trainer]:
        callback = LyapunovCallback(2, align=4)
        run = trainer(callback, max_epochs=epochs)
        run.fit(
            Regression(smooth(), OPTIMIZERS["adam"]),
            DataLoader(data(32), 16),
            ckpt_path=ckpt,
            weights_only=True,
        )
        return callback, run

    whole, _ = fit(4)
    _, half = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(4, str(tmp_path / "half.ckpt"))
    assert torch.equal(whole.local_exponents, resumed.local_exponents)
    assert whole.windows == resumed.windows


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: Any) -> None:
    """Products of a half-precision forward have its three digits; tangents are single precision."""

    def fit(precision: Any) -> LyapunovCallback:
        callback = LyapunovCallback(2, align=0)
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        module = Regression(smooth(torch.float32), OPTIMIZERS["momentum"])
        trainer(callback, max_epochs=6, precision=precision).fit(module, DataLoader(data(32, dtype), 32))
        return callback

    half, single = fit(precision), fit("32-true")
    assert half.tracker is not None
    assert half.tracker.frame is not None
    assert half.tracker.frame.dtype == torch.float32
    # The products of torch 2.5 on a CPU have a digit less.
    atol = 0.1 if TORCH_2_5 else 0.02
    torch.testing.assert_close(half.local_exponents, single.local_exponents, rtol=0, atol=atol)


def test_a_batch_that_is_skipped_moves_no_tangent() -> None:
    class Skips(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    callback = LyapunovCallback(1, align=0)
    with pytest.warns(UserWarning, match="training_step` returned `None`"):
        trainer(callback).fit(Skips(smooth()), DataLoader(data(32), 8))
    assert callback.windows == [0, 2, 3]


def test_tangents_begin_anew_when_parameters_are_unfrozen() -> None:
    class Unfreezes(Regression):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 1)

    module = Unfreezes(smooth())
    callback = LyapunovCallback(2, align=4)
    trainer(callback, max_epochs=4).fit(module, DataLoader(data(32), 32))
    assert callback.tracker is not None
    assert callback.tracker.n == 29
    assert len(callback.windows) == 4


class ReplacesOptimizer(Regression):
    """Goes on with an optimizer of the last layer alone."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.optimizer = lambda _: torch.optim.SGD(self.net[2].parameters(), lr=0.1)
            self.trainer.strategy.setup_optimizers(self.trainer)


def test_an_optimizer_that_is_replaced_is_followed() -> None:
    module, callback = ReplacesOptimizer(smooth()), LyapunovCallback(2, align=4)
    trainer(callback, max_epochs=2).fit(module, DataLoader(data(32), 16))
    assert callback.follower.tracker.holds(module.net[2].parameters())
    assert len(callback.windows) == 4


class TrainsInValidation(Regression):
    """Computes gradients in validation, which no step uses."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad():
            loss = 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean()
            self.trainer.strategy.backward(loss, None)
        self.zero_grad()


def test_gradients_in_validation_belong_to_no_step() -> None:
    def fit(module: LightningModule, **options: Any) -> Tensor:
        callback, loader = LyapunovCallback(2, align=4), DataLoader(data(32), 16)
        trainer(callback, max_epochs=2, inference_mode=False, **options).fit(module, loader, loader)
        return callback.local_exponents

    expected = fit(TrainsInValidation(smooth()), limit_val_batches=0)
    assert torch.equal(fit(TrainsInValidation(smooth()), num_sanity_val_steps=1), expected)


def test_a_callback_that_never_trained_lets_validation_compute_gradients() -> None:
    class Remembers(TrainsInValidation):
        def zero_grad(self, set_to_none: bool = True) -> None:
            self.seen = self.net[0].weight.grad

    module = Remembers(smooth())
    trainer(LyapunovCallback(), inference_mode=False).validate(
        module, DataLoader(data(32), 32), verbose=False
    )
    assert module.seen is not None
