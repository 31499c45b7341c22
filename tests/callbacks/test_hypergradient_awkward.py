"""HypergradientCallback on projects that do unusual but legitimate things."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import FiniteDifference, GaussNewton, Identity, Neumann
from lightning_nested.hyperparameters import ExampleWeights, WeightDecay
from tests.callbacks.test_hypergradient_fit import Regression, data, noisy, sgd, smooth, trainer, values
from tests.callbacks.test_hypergradient_training import ScalerAlone, weights


class Checkpointed(nn.Module):
    """Runs its network again in the backward pass."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.net, x, use_reentrant=False)
        return y


class Collecting(Regression):
    """Gathers the outputs of an epoch, counts, and keeps the last batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.outputs: list[Tensor] = []
        self.seen = {"batches": 0}

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        self.outputs.append(loss)
        self.seen["batches"] += 1
        self.last = batch
        return loss

    def on_validation_epoch_end(self) -> None:
        self.log("collected", torch.stack(self.outputs).sum())
        self.log("batches", float(self.seen["batches"]))
        self.outputs.clear()


class Augmented(Regression):
    """Augments on the device, and only in training."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            batch[0] = batch[0] + torch.randn_like(batch[0])
        return batch


class OtherSignature(Regression):
    def validation_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().validation_step(batch, 0)


class SharedGenerator(Regression):
    """The recipe for reproducible loaders: one generator for all of them."""

    def setup(self, stage: str) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def train_dataloader(self) -> Any:
        return DataLoader(data(32, 1, torch.float32), 8, shuffle=True, generator=self.generator)

    def val_dataloader(self) -> Any:
        return DataLoader(data(16, 2, torch.float32), 8, shuffle=True, generator=self.generator)


AWKWARD: dict[str, Any] = {
    "checkpointed batch norm and dropout": lambda: Regression(Checkpointed(noisy())),
    "collected outputs": lambda: Collecting(noisy()),
    "augmentation on the device": lambda: Augmented(noisy()),
    "validation_step without batch_idx": lambda: OtherSignature(noisy()),
    "one generator": lambda: SharedGenerator(noisy()),
}


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("name", AWKWARD)
def test_no_trace_is_left(name: str) -> None:
    def run(*callbacks: Any) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        seed_everything(3, verbose=False)
        module, fit = AWKWARD[name](), trainer(*callbacks, max_epochs=2)
        loaders: tuple[Any, ...] = ()
        if name != "one generator":
            loaders = (
                DataLoader(data(32, 1, torch.float32), 8, shuffle=True),
                DataLoader(data(16, 2, torch.float32), 8),
            )
        fit.fit(module, *loaders)
        return weights(module), dict(module.named_buffers()), fit.callback_metrics, torch.get_rng_state()

    callback = HypergradientCallback(
        WeightDecay("parameter", init=1e-30), optimizer=sgd(0.0), solver=Neumann(num_terms=2)
    )
    plain, tuned = run(), run(callback)
    assert callback.outer_steps == 8
    assert torch.equal(plain[0], tuned[0])
    assert torch.equal(plain[3], tuned[3])
    for before, after in ((plain[1], tuned[1]), (plain[2], tuned[2])):
        assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_checkpointed_network_has_the_hypergradient_of_the_plain_one() -> None:
    def run(net: nn.Module) -> Tensor:
        callback = HypergradientCallback(
            WeightDecay("parameter", init=0.1), optimizer=sgd(1.0), solver=Neumann()
        )
        fit = trainer(callback, limit_train_batches=1)
        seed_everything(0, verbose=False)
        fit.fit(Regression(net), DataLoader(data(16, 1), 16), DataLoader(data(16, 2), 16))
        assert callback.outer_steps == 1
        return values(callback)

    # The same numbers; the forward is run again with the same masks.
    torch.testing.assert_close(run(Checkpointed(noisy().double())), run(noisy().double()), rtol=1e-12, atol=0)


class Unfreeze(Callback):
    """What a finetuning callback does: new parameters for the optimizer after the first epoch."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.net[0].requires_grad_(False)  # type: ignore[index,union-attr]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            pl_module.net[0].requires_grad_(True)  # type: ignore[index,union-attr]


@pytest.mark.parametrize("per", ["model", "tensor", "parameter"])
def test_parameters_unfrozen_during_training_are_decayed_and_part_of_the_curvature(per: Any) -> None:
    callback = HypergradientCallback(
        WeightDecay(per, init=0.1), optimizer=sgd(0.1), solver=Neumann(num_terms=2)
    )
    module = Regression(smooth())
    first = module.net[0].weight.detach().clone()  # type: ignore[index,union-attr]
    fit = trainer(Unfreeze(), callback, max_epochs=2)
    fit.fit(module, DataLoader(data(32, 1), 8), DataLoader(data(16, 2), 16))
    assert callback.outer_steps == 8
    assert len(callback.outer_loop.parameters) == 4
    assert not torch.equal(first, module.net[0].weight.detach())  # type: ignore[index,union-attr]
    if per != "model":
        names = callback.values()
        (new,) = (v for key, v in names.items() if key.endswith("net.0.weight"))
        assert (new != 0.1).any()


def test_restart_leaves_frozen_layers_alone() -> None:
    module = Regression(smooth())
    module.net[0].requires_grad_(False)  # type: ignore[index,union-attr]
    frozen, moving = (module.net[i].weight.detach().clone() for i in (0, 2))  # type: ignore[index,union-attr]
    callback = HypergradientCallback(WeightDecay(), restart_every=1, solver=Identity())
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
    callback = HypergradientCallback(WeightDecay(), optimizer=sgd(0.1), solver=Identity(), every_n_steps=2)
    module = Regression(smooth())
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(callback, Break()).fit(module, *loaders)
    assert not callback.outer.pending
    assert callback._graph is not None
    assert callback._graph.losses == []
    before = callback.outer_steps
    trainer(callback).fit(module, *loaders)
    assert callback.outer_steps == before + 2


class Fused(Regression):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, fused=True)


def test_a_fused_optimizer_takes_the_scale_off_the_decay_too() -> None:
    def run(kind: type[Regression], **options: Any) -> Tensor:
        callback = HypergradientCallback(WeightDecay(init=0.5), optimizer=sgd(0.0), solver=Identity())
        module = kind(smooth())
        trainer(callback, **options).fit(module, DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
        return weights(module)

    plain, scaled = run(Regression), run(Fused, plugins=ScalerAlone())
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-12)


class Twice(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0.5 * (self.net(-batch[0]) ** 2).mean()


def test_gauss_newton_of_outputs_computed_twice_is_refused() -> None:
    callback = HypergradientCallback(WeightDecay(), curvature=GaussNewton(outputs="net"))
    with pytest.raises(MisconfigurationException, match=r"calls once .* Got 2 outputs"):
        trainer(callback).fit(Twice(smooth()), DataLoader(data(16, 1), 8), DataLoader(data(8, 2), 8))


class Draw(Callback):
    """Draws random numbers after the tuned callback's own hook, before the step."""

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.rand(3)


def test_finite_differences_see_the_masks_of_the_step() -> None:
    def run(curvature: Any) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)).double()
        callback = HypergradientCallback(
            WeightDecay("parameter", init=0.5),
            optimizer=sgd(1.0),
            solver=Neumann(num_terms=3),
            curvature=curvature,
        )
        fit = trainer(callback, Draw(), limit_train_batches=1)
        fit.fit(Regression(net), DataLoader(data(8, 1), 8), DataLoader(data(8, 2), 8))
        return values(callback)

    # Central differences in float64 keep two thirds of the digits.
    torch.testing.assert_close(run(FiniteDifference()), run(None), rtol=1e-7, atol=1e-10)


def test_a_second_fit_with_another_module_begins_anew() -> None:
    loaders = DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8)
    callback = HypergradientCallback(WeightDecay("parameter"), warmup_steps=2, solver=Neumann(num_terms=2))
    trainer(callback).fit(Regression(smooth()), *loaders)
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    for net in (other, smooth(), smooth()):  # other sizes, and twice the same names and shapes
        trainer(callback).fit(Regression(net), *loaders)
        assert callback.inner_steps == 4
        assert callback.outer_steps == 2
        fresh = HypergradientCallback(WeightDecay("parameter"), warmup_steps=2, solver=Neumann(num_terms=2))
        if net is not other:
            trainer(fresh).fit(Regression(smooth()), *loaders)
            assert torch.equal(values(callback), values(fresh))


class Newton(Regression):
    """A closure that is called many times a step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    def outer_loss(self, batch: Any) -> Tensor:
        return self.net(batch[0]).mean() * float("nan")


@pytest.mark.filterwarnings("ignore:HypergradientCallback skipped")
def test_a_closure_called_many_times_is_one_attempt() -> None:
    callback = HypergradientCallback(WeightDecay())
    trainer(callback).fit(Newton(smooth()), DataLoader(data(32, 1), 8), DataLoader(data(8, 2), 8))
    assert callback.skipped_steps == callback.inner_steps == 4


class OwnBackward(Regression):
    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        loss.backward()


class Taken(Regression):
    example_weights = "something else"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: OwnBackward(smooth()), {"accumulate_grad_batches": 2}, "cannot keep one; give it"),
        (lambda: Regression(smooth()), {"strategy": DDPStrategy(static_graph=True)}, "static_graph=True"),
        (lambda: Regression(smooth()), {"callbacks": 2}, "Got 2; give one of them the list"),
    ],
    ids=["backward", "static graph", "two callbacks"],
)
def test_what_cannot_be_served_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    count = options.pop("callbacks", 1)
    callbacks = [HypergradientCallback(WeightDecay(name=f"decay{i}")) for i in range(count)]
    fit = trainer(*callbacks, **options)
    with pytest.raises(MisconfigurationException, match=message):
        callbacks[0].setup(fit, make(), "fit")


def test_deepspeed_is_not_the_ddp_that_lightning_takes_it_for() -> None:
    class Pretended(DeepSpeedStrategy):
        def __init__(self) -> None:
            pass

    fit = trainer()
    fit._accelerator_connector.strategy = Pretended()
    with pytest.raises(MisconfigurationException, match="Got Pretended; use"):
        HypergradientCallback(WeightDecay()).setup(fit, Regression(smooth()), "fit")


@pytest.mark.parametrize("given", [[3], WeightDecay, [WeightDecay]])
def test_what_is_no_hyperparameter_is_named(given: Any) -> None:
    with pytest.raises(TypeError, match="Got"):
        HypergradientCallback(given)


def test_an_attribute_that_is_taken_is_not_overwritten() -> None:
    with pytest.raises(MisconfigurationException, match=r"must be None\. Got a str in Taken"):
        HypergradientCallback(ExampleWeights(3)).setup(trainer(), Taken(smooth()), "fit")
