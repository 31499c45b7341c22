"""NestedModule resumed from a checkpoint goes on bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_nested.hypergradient import ConjugateGradient, GaussNewton
from lightning_nested.hyperparameters import ExampleWeights, LearningRate
from lightning_nested.modules import Implicit, LoopOptions, Unrolled
from tests.modules.nested.problems import SIZE, Classifier, loader, same, tensors
from tests.trainers import trainer

STRATEGIES: dict[str, Callable[[], dict[str, Any]]] = {
    "implicit": lambda: {
        "gradient": Implicit(solver=ConjugateGradient(damping=0.3)),
        "inner_steps_per_outer": 2,
    },
    "unrolled": lambda: {"gradient": Unrolled(num_steps=2)},
    "adam rate": lambda: {
        "gradient": Unrolled(num_steps=4, truncate=1),
        "inner_optimizer": lambda p: torch.optim.Adam(p, lr=0.01),
        "hyperparameters": [ExampleWeights(SIZE), LearningRate()],
        "loop": LoopOptions(warmup_steps=2),
    },
}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:num_steps must not be larger")
@pytest.mark.parametrize("when", ["train end", "validation end"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_resume_is_bit_exact(name: str, when: str, tmp_path: Path) -> None:
    def run(folder: str, epochs: int, ckpt: Path | None = None) -> tuple[Classifier, Trainer]:
        save = ModelCheckpoint(
            tmp_path / folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=end
        )
        fit = trainer(save, max_epochs=epochs, enable_checkpointing=True, limit_val_batches=limit)
        module = Classifier(**STRATEGIES[name]())
        fit.fit(module, loader(1), loader(2, batch=5), ckpt_path=ckpt, weights_only=True)
        return module, fit

    end, limit = when == "train end", 0 if when == "train end" else 1
    whole, whole_fit = run("whole", 4)
    run("first", 2)
    module, fit = run("second", 4, tmp_path / "first" / "epoch=1.ckpt")
    same(tensors(module), tensors(whole))
    assert (module.inner_steps, module.outer_steps) == (whole.inner_steps, whole.outer_steps)
    for a, b in (
        (fit.optimizers[0], whole_fit.optimizers[0]),
        (module.outer.optimizer, whole.outer.optimizer),
    ):
        torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    assert fit.global_step == whole_fit.global_step


class Break(Callback):
    """Interrupts the run after its second step."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("interrupted")


def test_resuming_after_a_fit_that_failed_restores_the_position_of_the_outer_batches(tmp_path: Path) -> None:
    """The same module, as in a notebook: the failed fit has left its stream and the hook of its cycle."""
    path = tmp_path / "first.ckpt"
    options: dict[str, Any] = {"gradient": Implicit(curvature=GaussNewton(outputs="net"))}
    module, whole = Classifier(**options), Classifier(**options)
    loaders = loader(1), loader(2, batch=5)
    fit = trainer()
    fit.fit(module, *loaders)
    fit.save_checkpoint(path)
    trainer(max_epochs=2).fit(whole, *loaders)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(Break()).fit(module, *loaders)
    trainer(max_epochs=2).fit(module, *loaders, ckpt_path=path)
    assert module.outer_loop.state_dict()["batches"] == whole.outer_loop.state_dict()["batches"]
    same(tensors(module), tensors(whole))
    assert not module.net._forward_hooks


def test_a_cycle_that_is_shorter_than_in_the_saved_run_closes_at_once(tmp_path: Path) -> None:
    def run(length: int, epochs: int, resume: Path | None = None) -> tuple[Trainer, Classifier]:
        module = Classifier(
            gradient=Implicit(solver=ConjugateGradient(damping=0.3)), inner_steps_per_outer=length
        )
        fit = trainer(max_epochs=epochs)
        fit.fit(module, loader(1), loader(2, batch=5), ckpt_path=resume, weights_only=True)
        return fit, module

    with pytest.warns(UserWarning, match="made no outer step in 3 inner steps"):
        fit, saved = run(8, 1)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert (saved.inner_steps, saved.outer_steps) == (3, 0)
    _, module = run(2, 2, tmp_path / "a.ckpt")
    assert (module.inner_steps, module.outer_steps) == (6, 2)  # after steps 4 and 6
