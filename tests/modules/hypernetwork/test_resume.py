"""Resumed runs are bit-identical to whole ones, from an epoch's end and from its middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_nested.hyperparameters import DropConnect, DropoutRates, LabelSmoothing, WeightDecay
from lightning_nested.modules import STN, DeltaSTN, Global, ResponseLoop
from tests.modules.hypernetwork.problems import (
    Classifier,
    Small,
    batches,
    data,
    examples,
    loader,
    same,
    tensors,
)
from tests.trainers import trainer


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Classifier(loop=DeltaSTN(train_steps=2)),
        lambda: Classifier([WeightDecay(), DropoutRates(), DropConnect()], loop=STN(valid_steps=2)),
        lambda: Classifier(loop=Global(response_steps=5)),
    ],
    ids=["Delta-STN", "one point", "global"],
)
def test_resume_is_bit_exact(make: Callable[[], Classifier], tmp_path: Path) -> None:
    """With dropout, noise and perturbations: each step's random stream follows from its number."""

    def run(folder: str, epochs: int, ckpt: Path | None = None) -> tuple[Classifier, Trainer]:
        save = ModelCheckpoint(
            tmp_path / folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        torch.manual_seed(0)
        module = make()
        torch.manual_seed(7)
        fit = trainer(save, limit_val_batches=0, max_epochs=epochs, enable_checkpointing=True)
        fit.fit(module, loader(1), loader(2, batch=5), ckpt_path=ckpt, weights_only=True)
        return module, fit

    whole, whole_fit = run("whole", 4)
    run("first", 2)
    module, fit = run("second", 4, tmp_path / "first" / "epoch=1.ckpt")
    same(tensors(module), tensors(whole))
    assert (module.inner_steps, module.outer_steps) == (whole.inner_steps, whole.outer_steps)
    optimizers = [(fit.optimizers[0], whole_fit.optimizers[0]), (fit.optimizers[1], whole_fit.optimizers[1])]
    optimizers.append((module.outer.optimizer, whole.outer.optimizer))
    for a, b in optimizers:
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    plain, x = module.export().eval(), data(5).tensors[0]
    torch.testing.assert_close(plain(x), whole.eval()(x), rtol=1e-6, atol=1e-6)


class Stateful:
    """A loader that goes on where it stood."""

    def __init__(self) -> None:
        self.batches, self.position = examples(6), 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:(?s)Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize(
    "loop", [DeltaSTN(train_steps=2), STN(train_steps=1, valid_steps=2), Global(response_steps=7)],
    ids=lambda loop: type(loop).__name__,
)  # fmt: skip
def test_resume_in_the_middle_of_an_epoch_is_bit_exact(loop: ResponseLoop, tmp_path: Path) -> None:
    def run(ckpt: Path | None = None) -> Small:
        torch.manual_seed(0)
        module = Small(loop=loop)
        torch.manual_seed(7)
        folder = tmp_path if ckpt is None else tmp_path / "second"
        save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
        fit = trainer(save, limit_val_batches=0, folder=folder, max_epochs=2, enable_checkpointing=True)
        fit.fit(module, Stateful(), batches(2, size=5), ckpt_path=ckpt, weights_only=True)
        return module

    whole = run()
    resumed = run(tmp_path / "step=3.ckpt")
    assert (resumed.inner_steps, resumed.outer_steps) == (whole.inner_steps, whole.outer_steps)
    torch.testing.assert_close(tensors(resumed), tensors(whole), rtol=0, atol=0)


def test_another_range_is_refused_for_the_response_answers_to_unconstrained_tensors(tmp_path: Path) -> None:
    fit = trainer(limit_val_batches=0)
    fit.fit(Small(tuned=[LabelSmoothing(upper=0.3)]), batches(), batches())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    other = Small(tuned=[LabelSmoothing(upper=0.9)])
    with pytest.raises(
        ValueError, match="label_smoothing must have the range and transform it was saved with"
    ):
        trainer(max_epochs=2).fit(
            other, batches(), batches(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )


def test_another_optimizer_of_the_scales_is_reported_and_missing_keys_are_named(tmp_path: Path) -> None:
    fit = trainer(limit_val_batches=0)
    fit.fit(Classifier(), loader(1), loader(2, batch=5))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    other = Classifier(scale_optimizer=lambda t: torch.optim.SGD(t, lr=0.1))
    with pytest.warns(UserWarning, match="perturbation's scale is SGD, and was Adam"):
        trainer(max_epochs=2, limit_val_batches=0).fit(
            other, loader(1), loader(2, batch=5), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["hypernetwork"]["scale"]
    with pytest.raises(ValueError, match="state of HypernetworkModule must have 'scale'"):
        Classifier().on_load_checkpoint(checkpoint)
