"""HypergradientCallback across runs: checkpoints, restarts, interruptions, a second fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import Identity, Neumann
from tests.callbacks.exact import decay_all, exact
from tests.callbacks.tuned_regression import Regression, data, sgd, smooth, values, weights
from tests.trainers import trainer


def test_resuming_at_an_epochs_end_is_bit_exact(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> tuple[Trainer, HypergradientCallback, Regression]:
        callback = exact(decay_all("parameter", init=1e-2), solver=Neumann(num_terms=3))
        module = Regression(smooth())
        fit = trainer(callback, max_epochs=epochs)
        # Three outer batches a round against four steps an epoch: the position matters.
        fit.fit(module, DataLoader(data(32, 1), 8), DataLoader(data(12, 2), 4), ckpt_path=resume)
        return fit, callback, module

    path = tmp_path / "half.ckpt"
    run(2)[0].save_checkpoint(path)
    torch.load(path, weights_only=True)
    _, whole, module = run(4)
    _, resumed, again = run(4, path)
    assert torch.equal(values(whole), values(resumed))
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        whole.outer.optimizer.state.values(), resumed.outer.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_restart_brings_new_weights_and_an_optimizer_without_memory() -> None:
    seen: list[Tensor] = []

    class Watch(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, module: LightningModule, batch: Any, idx: int
        ) -> None:
            seen.append(weights(module))
            self.memory = len(trainer.optimizers[0].state)
            if idx in (0, 2):  # after restarts at outer steps 2 and 4, and before the first step
                assert self.memory == 0

    callback = exact(decay_all(), restart_every=2, solver=Neumann(num_terms=2))
    trainer(Watch(), callback).fit(
        Regression(smooth()), DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8)
    )
    assert len(seen) == 4
    # A restart moves every weight, and to other values than the first ones.
    assert not torch.isclose(seen[2], seen[0]).any()
    assert not torch.isclose(seen[2], seen[1]).any()


def test_no_restart_leaves_an_untrained_network_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = []
    monkeypatch.setattr(
        "lightning_nested.trainer.outer_loop.reinitialize",
        lambda *_: made.append(callback.outer_loop.outer_steps),
    )
    callback = HypergradientCallback(
        decay_all(), restart_every=6, every_n_steps=10, warmup_steps=20, solver=Identity()
    )
    with caplog.at_level("INFO"):
        trainer(callback, max_steps=200, max_epochs=None).fit(
            Regression(smooth()), DataLoader(data(16, 1), 8), DataLoader(data(8, 2), 8)
        )
    # At inner steps 70 and 130; the next would be at 190 of 200.
    assert (callback.outer_loop.outer_steps, made) == (18, [6, 12])
    assert "makes no restart after outer step 18" in caplog.text


def test_a_run_without_outer_steps_is_told_before_it_begins(caplog: pytest.LogCaptureFixture) -> None:
    callback = HypergradientCallback(decay_all(), warmup_steps=2000)
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="made no outer step in 4 inner steps"):
        trainer(callback, max_epochs=2).fit(
            Regression(smooth()), DataLoader(data(16, 1), 8), DataLoader(data(8, 2), 8)
        )
    assert "The run has 4 inner steps, so that nothing will be tuned: lower warmup_steps=2000" in caplog.text


def test_restart_leaves_frozen_layers_alone() -> None:
    module = Regression(smooth())
    module.net[0].requires_grad_(False)  # type: ignore[index,union-attr]
    frozen, moving = (module.net[i].weight.detach().clone() for i in (0, 2))  # type: ignore[index,union-attr]
    callback = exact(decay_all(), restart_every=1, solver=Identity())
    trainer(callback).fit(module, DataLoader(data(16, 1), 8), DataLoader(data(8, 2), 8))
    assert torch.equal(frozen, module.net[0].weight.detach())  # type: ignore[index,union-attr]
    assert not torch.equal(moving, module.net[2].weight.detach())  # type: ignore[index,union-attr]


class Break(Callback):
    """Interrupts the run between the hypergradient and its use."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 1:
            raise RuntimeError("interrupted")


def test_an_interrupted_window_does_not_reach_the_next_fit() -> None:
    loaders = DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8)
    callback = exact(decay_all(), optimizer=sgd(0.1), solver=Identity(), every_n_steps=2)
    module = Regression(smooth())
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(callback, Break()).fit(module, *loaders)
    assert not callback.outer.pending
    assert callback._graph is not None
    assert callback._graph.losses == []
    before = callback.outer_steps
    trainer(callback).fit(module, *loaders)
    assert callback.outer_steps == before + 2


def test_a_second_fit_with_another_module_begins_anew() -> None:
    loaders = DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8)
    callback = exact(decay_all("parameter"), warmup_steps=2, solver=Neumann(num_terms=2))
    trainer(callback).fit(Regression(smooth()), *loaders)
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    for net in (other, smooth(), smooth()):  # other sizes, and twice the same names and shapes
        trainer(callback).fit(Regression(net), *loaders)
        assert callback.inner_steps == 4
        assert callback.outer_steps == 2
        fresh = exact(decay_all("parameter"), warmup_steps=2, solver=Neumann(num_terms=2))
        if net is not other:
            trainer(fresh).fit(Regression(smooth()), *loaders)
            assert torch.equal(values(callback), values(fresh))


def test_resuming_after_a_fit_that_failed_restores_the_position_of_the_outer_batches(tmp_path: Path) -> None:
    """The same objects, as in a notebook: the failed fit has left its stream of outer batches."""
    path = tmp_path / "half.ckpt"
    loaders = DataLoader(data(32, 1), 8), DataLoader(data(12, 2), 4)

    def build() -> tuple[HypergradientCallback, Regression]:
        return exact(decay_all(), solver=Identity()), Regression(smooth())

    callback, module = build()
    fit = trainer(callback)
    fit.fit(module, *loaders)
    fit.save_checkpoint(path)
    whole, other = build()
    trainer(whole, max_epochs=2).fit(other, *loaders)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(callback, Break()).fit(module, *loaders)
    trainer(callback, max_epochs=2).fit(module, *loaders, ckpt_path=path)
    assert callback.state_dict()["batches"] == whole.state_dict()["batches"]
    assert torch.equal(values(callback), values(whole))


def test_a_resumed_fit_counts_its_own_outer_steps(tmp_path: Path) -> None:
    loaders = DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8)
    fit = trainer(exact(decay_all(), solver=Identity()))
    fit.fit(Regression(smooth()), *loaders)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    resumed = exact(decay_all(), solver=Identity(), warmup_steps=1000)
    with pytest.warns(UserWarning, match="made no outer step in 4 inner steps"):
        trainer(resumed, max_epochs=2).fit(Regression(smooth()), *loaders, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.outer_steps == 4
