"""The first outer step of a fit is checked, in both loops; what never happened is told; and no bit of a run changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import (
    AdamDiagonal,
    ConjugateGradient,
    Current,
    Identity,
    KroneckerFactored,
    Neumann,
    Nystrom,
)
from lightning_nested.hyperparameters import DropConnect, ExampleWeights, LabelSmoothing, Scalar, WeightDecay
from lightning_nested.modules import Implicit, NestedModule, Unrolled
from lightning_nested.modules.nested import LoopOptions
from tests.callbacks.exact import decay_all, exact
from tests.trainers import trainer


def loader(seed: int, size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 5, generator=generator), torch.randint(3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y, torch.arange(32)), batch_size=size)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))


class Plain(LightningModule):
    """Classifier for HypergradientCallback."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.calls, self.example_weights = net or network(), 0, None
        self.label_smoothing = self.drop_connect = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Nested(NestedModule):
    """The same classifier with a loop of its own."""

    def __init__(self, net: nn.Module | None = None, **options: Any) -> None:
        hyperparameters = options.pop("hyperparameters", decay_all())
        super().__init__(hyperparameters, inner_optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options)
        self.net = net or network()

    def inner_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def outer_loss(self, batch: Any) -> Tensor:
        return self.inner_loss(batch)


class DetachedFactor(nn.Module):
    """A scale of which the derivative is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        return out * out.detach().abs()


class Reentrant(nn.Module):
    """A network whose first layer is checkpointed in the old way."""

    def __init__(self, call: Any = checkpoint) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside, self.call = nn.Linear(5, 8), nn.Linear(8, 3), call

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outside(self.call(self.inside, x.clone().requires_grad_(), use_reentrant=True))
        return out


class CallsBackward(torch.autograd.Function):
    """Reentrant checkpointing by another name."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            out: Tensor = module(x)
        return out

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), g[0])
        return None, x.grad


def fit(which: str, net: nn.Module | None = None, *, check: bool = True, **options: Any) -> Any:
    """Train in either loop; return what holds the outer loop, and the module."""
    seed_everything(0, verbose=False)
    if which == "callback":
        module: LightningModule = Plain(net)
        callback = exact(
            options.pop("hyperparameters", decay_all()),
            solver=ConjugateGradient(damping=1.0),
            self_check=check,
            **options,
        )
        trainer(callback).fit(module, loader(1), loader(2))
        return callback, module
    steps, warmup = options.pop("every_n_steps", 1), options.pop("warmup_steps", 0)
    loop = LoopOptions(self_check=check, warmup_steps=warmup)
    strategy = Implicit(solver=ConjugateGradient(damping=1.0))
    nested = Nested(net, gradient=strategy, inner_steps_per_outer=steps, loop=loop, **options)
    trainer(limit_val_batches=0).fit(nested, loader(1), loader(2))
    return nested, nested


@pytest.mark.parametrize("which", ["callback", "nested"])
@pytest.mark.parametrize(
    "options", [{}, {"warmup_steps": 2}, {"every_n_steps": 2}], ids=["at once", "warm-up", "seldom"]
)
def test_the_check_changes_no_bit_of_the_run(which: str, options: dict[str, int]) -> None:
    def run(check: bool) -> tuple[list[Tensor], list[Tensor], Tensor, int]:
        owner, module = fit(which, check=check, **options)
        values = [v.clone() for v in owner.values().values()]
        assert (owner.outer_loop.check.result is not None) is check
        state = [t.clone() for t in module.state_dict().values()]
        return state, values, torch.get_rng_state(), getattr(module, "calls", 0)

    with_check, without = run(True), run(False)
    for a, b in zip(itertools.chain(*with_check[:2]), itertools.chain(*without[:2]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(with_check[2], without[2])
    assert with_check[3] == without[3]


@pytest.mark.filterwarnings("ignore:.*Products with the curvature:UserWarning")
@pytest.mark.parametrize("solver", [ConjugateGradient(damping=1.0), Neumann(num_terms=3), Nystrom(rank=3)])
@pytest.mark.parametrize(
    ("net", "most"), [(network, 1), (lambda: DetachedFactor(), 2)], ids=["right", "wrong"]
)
def test_the_check_takes_no_product_and_at_most_two_gradients(
    solver: Any, net: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(check: bool) -> tuple[int, int]:
        passes: list[Any] = []
        grad = torch.autograd.grad
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "grad", lambda *a, **k: (passes.append(a), grad(*a, **k))[1])
            steps: list[int] = []

            class Counts(Plain):
                def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                    steps.append(batch_idx)
                    return super().training_step(batch, batch_idx)

            seed_everything(0, verbose=False)
            trainer(exact(decay_all(), solver=solver, self_check=check)).fit(
                Counts(net()), loader(1), loader(2)
            )
        return len(passes), len(steps)

    (passes, steps), (plain_passes, plain_steps) = count(True), count(False)
    assert steps - plain_steps == passes - plain_passes
    assert 1 <= passes - plain_passes <= most


def test_a_zero_outer_gradient_is_told_where_no_product_is_formed() -> None:
    class Flat(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0.0 * super().validation_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="gradient of exactly zero at the weights") as told:
        trainer(HypergradientCallback(decay_all(), every_n_steps=1, warmup_steps=0)).fit(
            Flat(), loader(1), loader(2)
        )
    assert sum("exactly zero at the weights" in str(warning.message) for warning in told) == 1


@pytest.mark.parametrize("which", ["callback", "nested"])
def test_wrong_products_are_told_once(which: str) -> None:
    with pytest.warns(
        UserWarning, match=r"not the derivative of the training gradient.*FiniteDifference"
    ) as told:
        owner, _ = fit(which, DetachedFactor())
    assert sum("training gradient" in str(warning.message) for warning in told) == 1
    assert owner.outer_loop.check.result.wrong
    assert owner.outer_steps == 4


class Weighted(torch.autograd.Function):
    """The product of losses and weights; its gradient by the losses takes the weights as constants."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(losses, weights)
        return losses * weights

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        losses, weights = ctx.saved_tensors
        return g[0] * weights.detach(), g[0] * losses


def weighted_mean(module: Any, logits: Tensor, batch: Any, product: Any) -> Tensor:
    """Return a loss with two hyperparameters in its graph."""
    losses = functional.cross_entropy(logits, batch[1], reduction="none")
    smooth = losses.mean() if module.label_smoothing is None else module.label_smoothing(logits, batch[1])
    weights = torch.ones_like(losses) if module.example_weights is None else module.example_weights(batch[2])
    mean: Tensor = product(losses, weights).mean() + smooth
    return mean


class WeightedPlain(Plain):
    """The classifier with hyperparameters in its training loss."""

    def __init__(self, product: Any) -> None:
        super().__init__()
        self.product = product

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        return weighted_mean(self, self(batch[0]), batch, self.product)


class WeightedNested(Nested):
    """The same with a loop of its own."""

    label_smoothing: Any = None
    example_weights: Any = None

    def __init__(self, product: Any, **options: Any) -> None:
        super().__init__(**options)
        self.product = product

    def inner_loss(self, batch: Any) -> Tensor:
        return weighted_mean(self, self.net(batch[0]), batch, self.product)

    def outer_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])


def fit_weighted(which: str, product: Any, solver: Any, *, check: bool = True) -> Any:
    """Tune both in either loop; return what holds the outer loop, and the module."""
    seed_everything(0, verbose=False)
    tuned = [LabelSmoothing(), ExampleWeights(32)]
    if which == "callback":
        module = WeightedPlain(product)
        # In the loss's graph, not by differences.
        callback = exact(tuned, solver=solver, self_check=check, train_batches=0)
        trainer(callback).fit(module, loader(1), loader(2))
        return callback, module
    strategy, loop = Implicit(solver=solver), LoopOptions(self_check=check, warmup_steps=0)
    nested = WeightedNested(product, hyperparameters=tuned, gradient=strategy, loop=loop)
    trainer(limit_val_batches=0).fit(nested, loader(1), loader(2))
    return nested, nested


FORM_NO_PRODUCT = [Identity(), KroneckerFactored(), AdamDiagonal()]


@pytest.mark.parametrize("which", ["callback", "nested"])
@pytest.mark.parametrize("solver", [*FORM_NO_PRODUCT, Neumann(num_terms=2, step_size=0.1)], ids=repr)
def test_a_wrong_mixed_derivative_is_told_once_by_name(solver: Any, which: str) -> None:
    with pytest.warns(UserWarning, match="by the weights and example_weights is not the derivative") as told:
        owner, _ = fit_weighted(which, Weighted.apply, solver)
    assert sum("is not the derivative" in str(warning.message) for warning in told) == 1
    assert owner.outer_steps > 0


@pytest.mark.parametrize("which", ["callback", "nested"])
@pytest.mark.parametrize("solver", [*FORM_NO_PRODUCT, Neumann(num_terms=2, step_size=0.1)], ids=repr)
def test_a_right_mixed_derivative_passes_and_the_check_changes_no_bit(solver: Any, which: str) -> None:
    def run(check: bool) -> list[Tensor]:
        owner, module = fit_weighted(which, torch.mul, solver, check=check)
        state = [t.clone() for t in (*module.state_dict().values(), *owner.values().values())]
        return [*state, torch.get_rng_state(), torch.tensor(getattr(module, "calls", 0))]

    # Warnings are errors here.
    assert all(map(torch.equal, run(True), run(False)))


@pytest.mark.filterwarnings(
    "ignore:.*(second derivative|No gradient reaches|exactly zero in every):UserWarning"
)
@pytest.mark.parametrize("product", [torch.mul, Weighted.apply], ids=["right", "wrong"])
@pytest.mark.parametrize("solver", FORM_NO_PRODUCT, ids=repr)
def test_mixed_derivatives_are_checked_by_at_most_two_evaluations(
    solver: Any, product: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluations(check: bool) -> int:
        calls, step = [], WeightedPlain.training_step
        with monkeypatch.context() as patch:
            # Not in the module: what it holds is as before after an evaluation without side effects.
            patch.setattr(WeightedPlain, "training_step", lambda *a: (calls.append(1), step(*a))[1])
            fit_weighted("callback", product, solver, check=check)
        return len(calls)

    assert 1 <= evaluations(True) - evaluations(False) <= 2


def test_a_module_that_draws_from_an_iterator_is_not_evaluated_again() -> None:
    class Draws(Plain):
        def __init__(self) -> None:
            super().__init__(DetachedFactor())
            self.unlabelled: Iterator[int] = iter(range(4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            next(self.unlabelled)
            return super().training_step(batch, batch_idx)

    callback = exact(decay_all(), solver=ConjugateGradient(damping=1.0))
    trainer(callback).fit(Draws(), loader(1), loader(2))
    assert callback.outer_loop.check.result is not None
    assert not callback.outer_loop.check.result.wrong


def test_reentrant_checkpointing_is_refused_by_nested_modules() -> None:
    with pytest.raises(MisconfigurationException, match="use_reentrant=False"):
        fit("nested", Reentrant())


def test_layers_that_only_backward_reaches_are_named() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"Got net\.inside\.weight, net\.inside\.bias, which only"
    ):
        fit("callback", Reentrant(lambda module, x, use_reentrant: CallsBackward.apply(module, x)))


@pytest.mark.parametrize(
    "hyperparameter", [LabelSmoothing(), DropConnect(), ExampleWeights(32)], ids=lambda h: h.name
)
def test_a_hyperparameter_that_nothing_reaches_is_named(hyperparameter: Any) -> None:
    with pytest.warns(
        UserWarning, match=rf"No gradient reaches {type(hyperparameter).__name__} '{hyperparameter.name}'"
    ):
        callback, _ = fit("callback", hyperparameters=hyperparameter)
    assert callback.outer_steps == 4


def test_the_line_that_reads_a_hyperparameter_is_shown_with_its_own_name() -> None:
    class Unread(Plain):
        temperature: Any = None

    callback = exact(Scalar("temperature", init=1.0))
    with pytest.raises(MisconfigurationException, match=r"add:\nself\.temperature = None"):
        trainer(callback).fit(Plain(), loader(1), loader(2))
    with pytest.warns(UserWarning, match=r"No gradient reaches Scalar 'temperature'") as told:
        trainer(callback).fit(Unread(), loader(1), loader(2))
    assert any("loss = loss * self.temperature.value()" in str(warning.message) for warning in told)


def test_an_attribute_that_was_replaced_is_named() -> None:
    class Resets(Plain):
        def on_train_start(self) -> None:
            self.example_weights = None

    callback = exact(ExampleWeights(32))
    with pytest.warns(UserWarning, match=r"self\.example_weights is no longer the hyperparameter"):
        trainer(callback).fit(Resets(), loader(1), loader(2))


def test_a_hypergradient_that_is_always_zero_is_told() -> None:
    class Zero(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            weights = 1 if self.example_weights is None else self.example_weights(batch[2])
            losses = functional.cross_entropy(self(batch[0]), batch[1], reduction="none")
            return (losses * (1 + 0 * weights)).mean()

    with pytest.warns(UserWarning, match="example_weights was exactly zero in every outer step"):
        trainer(exact(ExampleWeights(32))).fit(Zero(), loader(1), loader(2))


@pytest.mark.parametrize(
    ("which", "options", "reason"),
    [
        ("callback", {"warmup_steps": 100}, r"made no outer step in 4 inner steps.*lower warmup_steps=100"),
        ("callback", {"warmup_steps": 4}, r"lower warmup_steps=4"),
        ("nested", {"warmup_steps": 100}, r"lower warmup_steps=100"),
        ("nested", {"every_n_steps": 50}, r"lower inner_steps_per_outer=50"),
    ],
)
def test_a_fit_without_an_outer_step_says_why(which: str, options: dict[str, int], reason: str) -> None:
    with pytest.warns(UserWarning, match=reason):
        fit(which, **options)


def test_should_update_that_never_does_is_told() -> None:
    class Never(HypergradientCallback):
        def should_update(self, trainer: Any, step: int) -> bool:
            return False

    with pytest.warns(UserWarning, match="should_update returned False"):
        trainer(exact(decay_all(), Never)).fit(Plain(), loader(1), loader(2))


def test_a_second_fit_counts_its_own_steps() -> None:
    callback, module = exact(decay_all(), solver=Identity()), Plain()
    trainer(callback).fit(module, loader(1), loader(2))
    callback.warmup_steps = 1000
    with pytest.warns(UserWarning, match="made no outer step in 4 inner steps"):
        trainer(callback).fit(module, loader(1), loader(2))


class Blind(Plain):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().validation_step(batch, batch_idx).detach()


class BlindNested(Nested):
    def outer_loss(self, batch: Any) -> Tensor:
        return self.inner_loss(batch).detach()


@pytest.mark.parametrize("which", ["callback", "implicit", "unrolled"])
def test_an_outer_loss_without_a_graph_is_told_before_the_warm_up(which: str) -> None:
    if which == "callback":
        module: LightningModule = Blind()
        fit = trainer(exact(decay_all(), warmup_steps=3), limit_val_batches=0)
    else:
        gradient = Implicit() if which == "implicit" else Unrolled(num_steps=4)
        module, fit = (
            BlindNested(gradient=gradient, loop=LoopOptions(warmup_steps=3)),
            trainer(limit_val_batches=0),
        )
    with pytest.raises(MisconfigurationException, match="tensor with its graph"):
        fit.fit(module, loader(1), loader(2))
    assert fit.global_step == 0


def test_an_outer_loss_of_no_inner_parameter_is_told() -> None:
    class Elsewhere(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.zeros(()))

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.other**2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    for options in ({}, {"warmup_steps": 1}):
        callback = exact(decay_all(), solver=Identity(), **options)
        with pytest.warns(UserWarning, match="gradient of exactly zero at the weights"):
            trainer(callback).fit(Elsewhere(), loader(1), loader(2))


def test_complex_parameters_are_named() -> None:
    class Complex(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 3, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.cfloat) @ self.w).abs()

    with pytest.raises(ValueError, match=r"must be real\. Got w \(torch\.complex64\)"):
        trainer(exact(decay_all())).fit(Complex(), loader(1), loader(2))


def test_unrolled_steps_apply_the_hooks_of_the_parameters() -> None:
    def run(gradient: Any) -> Tensor:
        seed_everything(0, verbose=False)
        module = Nested(gradient=gradient, outer_optimizer=lambda t: torch.optim.SGD(t, lr=0.0))
        module.net[0].weight.register_hook(lambda g: 0.1 * g)
        trainer(limit_val_batches=0).fit(module, loader(1), loader(2))
        return module.net[0].weight.detach()

    torch.testing.assert_close(
        run(Unrolled(num_steps=2)), run(Implicit(solver=Identity())), rtol=1e-5, atol=1e-7
    )


def test_a_batch_that_was_looked_at_is_still_the_next_one() -> None:
    seed_everything(0, verbose=False)
    callback = exact(decay_all(), solver=Identity(), warmup_steps=2)
    seen: list[float] = []

    class Sees(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(float(batch[0][0, 0]))
            return super().validation_step(batch, batch_idx)

    trainer(callback, limit_val_batches=0).fit(Sees(), loader(1), loader(2))
    first = [float(batch[0][0, 0]) for batch in loader(2)]
    # The probe, and two outer steps.
    assert seen == [first[0], first[0], first[1]]
    assert callback.outer_loop.state_dict()["batches"]["position"] == 2


class Saddle(Plain):
    """A loss that curves down in one direction."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.5 * (self.net.weight - 1).square().sum() - 0.05 * self.net.bias.square().sum()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net.weight - 2).square().sum() + (self.net.bias - 3).square().sum()


def test_negative_curvature_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    callback = HypergradientCallback(
        WeightDecay(), solver=ConjugateGradient(), at=Current(), every_n_steps=1, warmup_steps=0
    )
    with caplog.at_level("INFO"):
        trainer(callback).fit(Saddle(), loader(0), loader(1))
    assert callback.outer_steps == 4
    (message,) = [m for m in caplog.messages if "negative curvature" in m]
    assert "ConjugateGradient(damping=...)" in message
    assert "= -0." in message
