"""Loop of NestedModule: counts, epochs' ends, restarts, schedulers, skipped steps, precision."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.hypergradient import Identity, Neumann
from lightning_nested.hyperparameters import LossWeights
from lightning_nested.modules import GradientStrategy, Implicit, LoopOptions, Unrolled
from tests.modules.nested.problems import BATCH, Classifier, data, loader, network, sgd
from tests.trainers import trainer


@pytest.mark.filterwarnings("ignore:num_steps must not be larger")
@pytest.mark.parametrize(
    ("gradient", "k", "expected"),
    [
        (Implicit(solver=Identity()), 2, 6),
        (Unrolled(num_steps=2), None, 8),
        (Unrolled(num_steps=5, truncate=2), None, 4),
    ],
    ids=["implicit", "unrolled", "truncated"],
)  # fmt: skip
def test_nothing_is_evaluated_twice(gradient: GradientStrategy, k: int | None, expected: int) -> None:
    """4 epochs of 3 batches: Implicit counts across epochs, Unrolled closes at their ends."""
    module = Classifier(gradient=gradient, inner_steps_per_outer=k)
    fit = trainer(limit_val_batches=0, max_epochs=4)
    fit.fit(module, loader(1), loader(2))
    assert module.calls == {"inner": 12, "outer": expected}
    assert (module.inner_steps, module.outer_steps) == (12, expected)
    assert fit.global_step == 12


def test_max_steps_closes_the_cycle() -> None:
    module = Classifier(gradient=Unrolled(num_steps=3))
    trainer(limit_val_batches=0, max_epochs=9, max_steps=2).fit(module, loader(1), loader(2))
    assert (module.inner_steps, module.outer_steps) == (2, 1)


@pytest.mark.parametrize(("num_steps", "accumulate", "fits"), [(20, 1, 3), (4, 1, 3), (3, 2, 2)])
def test_an_epoch_shorter_than_a_cycle_is_told(num_steps: int, accumulate: int, fits: int) -> None:
    loop = LoopOptions(accumulate_grad_batches=accumulate)
    module = Classifier(gradient=Unrolled(num_steps=num_steps), loop=loop)
    advice = rf"\(steps={num_steps * accumulate}\)"
    match = rf"with {fits}: .* through {fits} inner steps\. .*{advice}.* set num_steps={fits}\."
    with pytest.warns(UserWarning, match=match) as told:
        trainer(limit_val_batches=0, max_epochs=2).fit(module, loader(1), loader(2))
    assert sum("num_steps" in str(warning.message) for warning in told) == 1
    assert (module.inner_steps, module.outer_steps) == (2 * fits, 2)


def test_nothing_is_told_where_cycles_fit_or_do_not_close_with_an_epoch() -> None:
    """All warnings are errors here."""
    for gradient, options in (
        (Unrolled(num_steps=3), {}),
        (Unrolled(num_steps=20), {"fast_dev_run": 2}),
        (Implicit(solver=Identity()), {}),
    ):
        module = Classifier(gradient=gradient, inner_steps_per_outer=gradient.length or 20)
        trainer(limit_val_batches=0, max_epochs=7, **options).fit(module, loader(1), loader(2))
        assert module.outer_steps > 0


@pytest.mark.parametrize(
    "gradient", [Implicit(solver=Identity()), Unrolled(num_steps=2)], ids=["implicit", "unrolled"]
)
def test_restart_brings_new_weights_and_an_empty_optimizer(gradient: GradientStrategy) -> None:
    module = Classifier(gradient=gradient, loop=LoopOptions(restart_every=1), inner_steps_per_outer=2)
    before = [p.detach().clone() for p in module.net.parameters()]
    fit = trainer(limit_val_batches=0, limit_train_batches=2)
    fit.fit(module, loader(1), loader(2))
    after = [p.detach() for p in module.net.parameters()]
    assert all((a - b).abs().max() > 0.05 for a, b in zip(before, after, strict=True))
    assert not fit.optimizers[0].state


def test_schedulers_step() -> None:
    halve = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)  # noqa: E731
    module = Classifier(
        gradient=Unrolled(num_steps=3), inner_scheduler=halve, outer_scheduler=halve, outer_optimizer=sgd(1.0)
    )
    fit = trainer(limit_val_batches=0, max_epochs=2)
    fit.fit(module, loader(1), loader(2))
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert module.outer.optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def test_a_plateau_scheduler_steps_on_the_metric_it_names() -> None:
    module = Classifier(
        inner_scheduler=lambda o: ReduceLROnPlateau(
            o, monitor="hypergradient/outer_loss", patience=0, threshold=1e9, threshold_mode="abs", factor=0.5
        )
    )
    fit = trainer(limit_val_batches=0, max_epochs=3)
    fit.fit(module, loader(1), loader(2))
    start = module.configure_optimizers()[0][0].param_groups[0]["lr"]  # type: ignore[call-overload,index]
    # No epoch improves by the threshold: the first sets the mark, each later one halves.
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(start / 4, rel=1e-12)


def test_bf16_runs() -> None:
    for gradient in (Implicit(solver=Neumann(num_terms=3)), Unrolled(num_steps=3)):
        module = Classifier(net=network().float(), gradient=gradient)
        dataset = TensorDataset(data(1).tensors[0].float(), *data(1).tensors[1:])
        batches = DataLoader(dataset, batch_size=BATCH)
        trainer(limit_val_batches=0, precision="bf16-mixed", max_epochs=2).fit(module, batches, batches)
        assert module.outer_steps >= 2


def test_loss_weights_and_the_default_validation_step() -> None:
    class Two(Classifier):
        def inner_loss(self, batch: Any) -> Tensor:
            out = self.net(batch[0])
            return self.loss_weights(
                {"ce": functional.cross_entropy(out, batch[1]), "small": (out**2).mean()}
            )  # type: ignore[no-any-return]

    module = Two([LossWeights(["ce", "small"])], gradient=Unrolled(num_steps=3))
    fit = trainer(limit_val_batches=1)
    fit.fit(module, loader(1), loader(2))
    assert "val_loss" in fit.callback_metrics
    assert set(module.values()) == {"loss_weights/ce", "loss_weights/small"}
    assert (module.values()["loss_weights/small"] - 1).abs() > 0.01


def test_a_submodule_by_name_is_trained_by_the_outer_optimizer() -> None:
    module = Classifier("net.2", gradient=Unrolled(num_steps=3), outer_optimizer=sgd(0.0))
    before = [p.detach().clone() for p in module.net.parameters()]
    trainer(limit_val_batches=0).fit(module, loader(1), loader(2))
    moved = [bool((a != b.detach()).any()) for a, b in zip(before, module.net.parameters(), strict=True)]
    assert moved == [True, True, False, False]


@pytest.mark.parametrize("gradient", [Implicit(), Unrolled(num_steps=1)], ids=["implicit", "unrolled"])
def test_non_finite_outer_losses_are_skipped_then_raise(gradient: GradientStrategy) -> None:
    module = Classifier(gradient=gradient, loop=LoopOptions(max_skipped=3))
    module.finite = False
    before = [p.detach().clone() for p in module.net.parameters()]
    with pytest.warns(UserWarning, match="skipped the outer step"):
        trainer(limit_val_batches=0).fit(module, loader(1), loader(2))
    assert (module.inner_steps, module.outer_steps, module.skipped_steps) == (3, 0, 3)
    assert all((a != b).any() for a, b in zip(before, module.net.parameters(), strict=True))
    with pytest.raises(FloatingPointError, match="max_skipped=3"):
        trainer(limit_val_batches=0).fit(module, loader(1), loader(2))


def test_the_example_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[3] / "scripts" / "nested_example.py"
    monkeypatch.setattr("sys.argv", [str(script), "--epochs", "3"])
    runpy.run_path(str(script), run_name="__main__")
    lines = {
        line.split()[0]: float(line.split()[1])
        for line in capsys.readouterr().out.splitlines()
        if line[:1] in "ut"
    }
    assert lines["tuned"] > lines["untuned"]


def test_options_replaced_before_fit_count() -> None:
    module = Classifier()
    module.loop = LoopOptions(max_skipped=3, restart_every=2, log_every_n_outer_steps=0)
    fit = trainer(limit_val_batches=0)
    fit.fit(module, loader(1), loader(2))
    assert (module.outer_loop.max_skipped, module.outer_loop.restart_every) == (3, 2)
    assert not any(name.startswith("hypergradient") for name in fit.logged_metrics)
