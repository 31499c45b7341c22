"""LyapunovCallback: the edge of chaos, figure and loggers, refusals, and runs that diverge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import LyapunovCallback
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.regression import Regression, data, smooth
from tests.trainers import trainer


def test_chaos_is_flagged_when_the_rate_crosses_the_edge() -> None:
    """Beyond 2/μ a quadratic's step stretches: the smoothed exponent becomes positive when the rate rises there."""

    def optimizer(params: Any) -> Any:
        sgd = torch.optim.SGD(params, lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda epoch: 0.1 if epoch < 10 else 6.0)
        return {"optimizer": sgd, "lr_scheduler": schedule}

    module = Regression(nn.Linear(5, 1, bias=False).double(), optimizer)
    callback = LyapunovCallback(1, smoothing=2)
    run = trainer(callback, max_epochs=16)
    run.fit(module, DataLoader(data(64), 64))
    assert callback.crossings in ([10], [11])
    assert float(run.callback_metrics["lyapunov/edge_of_chaos"]) == 1.0
    assert math.isfinite(float(run.callback_metrics["lyapunov/kaplan_yorke"]))


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    callback = LyapunovCallback(2, figure=True)
    trainer(callback, max_epochs=6, folder=tmp_path).fit(Regression(smooth()), DataLoader(data(32), 32))
    assert (tmp_path / "lyapunov.png").stat().st_size > 10_000
    assert callback.plot().axes[0].get_title(loc="left") == "Lyapunov exponents of the training"


class Manual(Regression):
    automatic_optimization = False


class OwnClipping(Regression):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, 1.0, "norm")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual(smooth()), "automatic_optimization=False"),
        (OwnClipping(smooth()), "overrides configure_gradient_clipping"),
    ],
)
def test_refusals(module: LightningModule, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer(LyapunovCallback()).fit(module, DataLoader(data(8), 8))


def test_hooks_on_gradients_would_act_on_products() -> None:
    module = Regression(smooth())
    handle = next(module.parameters()).register_hook(lambda g: g * 0.5)
    with pytest.raises(MisconfigurationException, match="hook; remove it, or clip by"):
        trainer(LyapunovCallback()).fit(module, DataLoader(data(8), 8))
    handle.remove()

    class Late(Regression):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 2:
                next(self.parameters()).register_hook(lambda g: g * 0.5)

    callback = LyapunovCallback()
    with pytest.warns(UserWarning, match="stops at step 2: .* gradients that nobody changes"):
        trainer(callback).fit(Late(smooth()), DataLoader(data(40), 8))
    assert len(callback.windows) == 2


def test_unknown_optimizers_and_too_many_exponents_are_refused() -> None:
    loader = DataLoader(data(8), 8)
    with pytest.raises(ValueError, match="Got RMSprop"):
        trainer(LyapunovCallback()).fit(Regression(smooth(), lambda p: torch.optim.RMSprop(p)), loader)
    with pytest.raises(ValueError, match="k=30 and n=29"):
        trainer(LyapunovCallback(30)).fit(Regression(smooth()), loader)
    with pytest.raises(ValueError, match=r"k must be at least 1\. Got 0"):
        LyapunovCallback(0)


def test_loggers_are_given_the_last_window_before_their_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = LyapunovCallback(2, align=4, orthonormalize_every=3)
    logger = TensorBoardLogger(str(tmp_path))
    fit = trainer(callback, logger=logger, log_every_n_steps=5, max_epochs=1)
    fit.fit(Regression(smooth()), DataLoader(data(160), 8))
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    names = {"local_0", "local_1", "running_0", "running_1", "kaplan_yorke", "edge_of_chaos", "alignment"}
    assert {f"lyapunov/{name}" for name in names} <= set(events.Tags()["scalars"])
    seen = events.Scalars("lyapunov/local_0")
    assert [e.step for e in seen] == [4, 9, 14, 19]
    # Windows end with steps 3, 6, …, 18: the last before steps 5, 10, 15 and 20 are windows 1, 3, 5 and 6.
    expected = callback.local_exponents[[0, 2, 4, 5], 0]
    torch.testing.assert_close(torch.tensor([e.value for e in seen]), expected.float(), rtol=1e-6, atol=0)


def test_tuned_decays_are_told_to_be_left_out() -> None:
    class Validated(Regression):
        def outer_loss(self, batch: Any) -> Tensor:
            return 0.5 * ((self.net(batch[0]) - batch[1]) ** 2).mean()

        def val_dataloader(self) -> Any:
            return DataLoader(data(8), 8)

        def validation_step(self, batch: Any) -> None:
            pass

    module = Validated(smooth(), lambda p: torch.optim.SGD(p, lr=0.05))
    both = (LyapunovCallback(), exact(decay_all()))
    with pytest.warns(
        UserWarning, match="adds decays to the gradients: the exponents are those without them"
    ):
        trainer(*both, num_sanity_val_steps=2).fit(module, DataLoader(data(16), 8))
    assert both[0].windows == [0, 1]
    assert both[1].outer_steps == 2


def test_a_run_that_diverges_goes_on_without_the_measurement() -> None:
    def fit(*callbacks: Any) -> tuple[LightningModule, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))  # a quartic of the weights
        module = Regression(net, lambda p: torch.optim.SGD(p, lr=1e2))
        run = trainer(*callbacks, max_epochs=20)
        run.fit(module, DataLoader(data(16, torch.float32), 16))
        return module, run

    callback = LyapunovCallback(2, align=4)
    with pytest.warns(UserWarning, match=r"LyapunovCallback stops at step \d+: Tangents must stay finite"):
        followed, run = fit(callback)
    assert run.global_step == 20
    assert 2 <= len(callback.windows) < 20
    assert bool(torch.isfinite(callback.exponents).all())
    plain, _ = fit()
    for a, b in zip(plain.parameters(), followed.parameters(), strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize(
    "option", [{"window": "bump"}, {"orthonormalize_every": 5}, {"warmup_steps": 9}, {"align": 0}]
)
def test_measurements_with_different_options_live_in_one_trainer(option: dict[str, Any]) -> None:
    callbacks: list[Any] = [LyapunovCallback(1), LyapunovCallback(1, **option)]
    fit = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert all(callback in fit.callbacks for callback in callbacks)  # type: ignore[attr-defined]


def test_a_run_that_is_complete_already_shows_what_was_measured(tmp_path: Path) -> None:
    first = LyapunovCallback(2)
    fit, module = trainer(first, folder=tmp_path), Regression(smooth())
    fit.fit(module, DataLoader(data(32), 8))
    fit.save_checkpoint(tmp_path / "whole.ckpt")
    again = LyapunovCallback(2, figure=True)
    trainer(again, folder=tmp_path).fit(
        Regression(smooth()),
        DataLoader(data(32), 8),
        ckpt_path=str(tmp_path / "whole.ckpt"),
        weights_only=True,
    )
    assert torch.equal(again.exponents, first.exponents)
    assert again.windows == [0, 1, 2, 3]
    assert (tmp_path / "lyapunov.png").exists()


def test_a_second_fit_without_steps_has_no_figure(tmp_path: Path) -> None:
    callback = LyapunovCallback(1, figure=True)
    fit, module = trainer(callback, folder=tmp_path), Regression(smooth())
    fit.fit(module, DataLoader(data(32), 8))
    (tmp_path / "lyapunov.png").unlink()
    fit.fit(module, DataLoader(data(32), 8))  # max_epochs is reached
    assert callback.windows == []
    assert not (tmp_path / "lyapunov.png").exists()


def test_unknown_optimizers_and_hooks_are_refused_before_the_sanity_check() -> None:
    class Checked(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError("validation has begun")

    hooked = Checked(smooth())
    hooked.net[0].weight.register_hook(lambda g: g)
    for module, error in (
        (Checked(smooth(), lambda p: torch.optim.Adagrad(p)), ValueError),
        (hooked, MisconfigurationException),
    ):
        loader = DataLoader(data(32), 8)
        with pytest.raises(error, match=r"Got (Adagrad|a parameter with such a hook)"):
            trainer(LyapunovCallback(), num_sanity_val_steps=1).fit(module, loader, loader)
