"""NestedModule that looks ahead, with solvers that read the run and decoupled decays: as HypergradientCallback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import (
    AdamDiagonal,
    Current,
    KroneckerFactored,
    LookAhead,
    implicit_hypergradient,
)
from lightning_nested.hypergradient.evaluation_point import placed_at
from lightning_nested.hyperparameters import ExampleWeights, Hyperparameter, WeightDecay
from lightning_nested.modules import GradientStrategy, Implicit, LoopOptions, Unrolled
from lightning_nested.modules.hypernetwork import ResponseMonitor
from tests.modules.nested.problems import (
    SIZE,
    Classifier,
    Optimizer,
    loader,
    network,
    same,
    sgd,
    tensors,
    weighted,
)
from tests.modules.nested.test_processes import Save, Split
from tests.trainers import trainer

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": sgd(0.2, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
}
AHEAD = Implicit(solver=KroneckerFactored(), at=LookAhead(refresh_every=2))
STRATEGIES: dict[str, Implicit] = {
    "look ahead": AHEAD,
    "look ahead, diagonal": Implicit(solver=AdamDiagonal(), at=LookAhead()),
    "current, factored": Implicit(solver=KroneckerFactored(damping=0.1)),
}


def outer_optimizer(tensors: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(tensors, lr=0.1)


class Automatic(LightningModule):
    """The classifier in automatic optimization, for the callback."""

    def __init__(self, inner_optimizer: Optimizer) -> None:
        super().__init__()
        self.net, self.make = network(), inner_optimizer
        self.example_weights: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return weighted(self.example_weights, self.net(batch[0]), batch)

    def outer_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def is_the_callback(
    hyperparameters: Any, gradient: Implicit, make: Optimizer, *, every: int = 1, accumulate: int = 1
) -> None:
    """Train both on the same data, and compare weights and tuned values."""
    module = Classifier(
        hyperparameters(), gradient=gradient, inner_optimizer=make, outer_optimizer=outer_optimizer,
        inner_steps_per_outer=every, loop=LoopOptions(accumulate_grad_batches=accumulate, warmup_steps=3),
    )  # fmt: skip
    options: dict[str, Any] = {"limit_val_batches": 0, "max_epochs": 5}
    trainer(**options).fit(module, loader(1), loader(2, batch=5))
    # A module's first outer step ends its first cycle.
    callback = HypergradientCallback(
        hyperparameters(), optimizer=outer_optimizer, solver=gradient.solver, at=gradient.at,
        every_n_steps=every, warmup_steps=3 + every - 1, train_batches=0,
    )  # fmt: skip
    plain = Automatic(make)
    trainer(callback, accumulate_grad_batches=accumulate, **options).fit(plain, loader(1), loader(2, batch=5))
    expected = [*(p.detach() for p in plain.net.parameters()), *(t.detach() for t in callback.outer.tensors)]
    assert module.outer_steps == callback.outer_steps >= 3
    same(tensors(module), expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:The inner optimizer has a weight_decay of its own")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_it_is_the_callback(name: str, optimizer: str) -> None:
    """Decays that start from the length of the run."""
    is_the_callback(lambda: [WeightDecay()], STRATEGIES[name], OPTIMIZERS[optimizer])


@pytest.mark.filterwarnings("ignore:The inner optimizer has a weight_decay of its own")
@pytest.mark.parametrize("gradient", [AHEAD, Implicit(at=Current())], ids=["look ahead", "current"])
def test_it_is_the_callback_with_cycles_and_accumulated_batches(gradient: Implicit) -> None:
    def tuned() -> list[Hyperparameter]:
        return [ExampleWeights(SIZE), WeightDecay(init=1e-2)]

    is_the_callback(tuned, gradient, OPTIMIZERS["adamw"], every=2, accumulate=2)


def test_the_default_differentiates_at_the_current_weights_and_keeps_the_initial_decay() -> None:
    assert Implicit().at == Current()
    module = Classifier([WeightDecay(include=["*"])], gradient=Implicit(), outer_optimizer=sgd(0.0))
    trainer(limit_val_batches=0).fit(module, loader(1), loader(2))
    assert [float(d.detach()) for d in module.outer.decays[0].decays().values()] == pytest.approx([1e-4] * 4)


# ---- decoupled decays


class Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step, self.seen = step, -1.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen = trainer.optimizers[0].param_groups[0]["weight_decay"]
        if trainer.global_step == self.step:
            raise RuntimeError("interrupted")


@pytest.mark.parametrize(
    "gradient", [Implicit(), AHEAD, Unrolled(num_steps=2)], ids=["implicit", "ahead", "unrolled"]
)
def test_decoupled_decays_are_those_of_adamw(gradient: GradientStrategy) -> None:
    """With decays that stay at 0.3, in place of the optimizer's own 0.1; it has that again in the end."""
    module = Classifier(
        [WeightDecay(init=0.3, include=["*"])], gradient=gradient, outer_optimizer=sgd(0.0),
        inner_optimizer=lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    )  # fmt: skip
    fit = trainer(watch := Stop(-1), limit_val_batches=0, max_epochs=2)
    fit.fit(module, loader(1), loader(2))
    net = network()
    plain = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.3)
    for _ in range(2):
        for batch in loader(1):
            plain.zero_grad()
            weighted(None, net(batch[0]), batch).backward()  # type: ignore[no-untyped-call]
            plain.step()
    same([p.detach() for p in module.net.parameters()], [p.detach() for p in net.parameters()], rtol=1e-12)
    assert watch.seen == 0.0
    assert fit.optimizers[0].param_groups[0]["weight_decay"] == 0.1


def test_the_optimizer_has_its_own_decay_again_after_an_exception() -> None:
    module = Classifier([WeightDecay()], gradient=AHEAD, inner_optimizer=OPTIMIZERS["adamw"])
    fit = trainer(watch := Stop(2), limit_val_batches=0)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit.fit(module, loader(1), loader(2))
    assert watch.seen == 0.0
    assert fit.optimizers[0].param_groups[0]["weight_decay"] == 0.3


def test_unrolled_decoupled_decays_are_what_autograd_says() -> None:
    decay = WeightDecay(init=0.3, include=["*"])
    module = Classifier(
        [decay], gradient=Unrolled(num_steps=3), outer_optimizer=sgd(1.0),
        inner_optimizer=lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    )  # fmt: skip
    net, names = network(), [n for n, _ in network().named_parameters()]
    trainer(limit_val_batches=0).fit(module, loader(1), loader(2))
    raw = torch.full((4,), 0.3, dtype=torch.float64)
    raw = decay.transform.inverse(raw).requires_grad_()
    d = decay.transform.forward(raw)
    values: list[Tensor] = list(net.parameters())
    m, v = [torch.zeros_like(p) for p in values], [torch.zeros_like(p) for p in values]

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))  # type: ignore[no-any-return]

    for t, batch in enumerate(loader(1), start=1):
        gradients = torch.autograd.grad(weighted(None, call(batch[0]), batch), values, create_graph=True)
        m = [0.9 * a + 0.1 * g for a, g in zip(m, gradients, strict=True)]
        v = [0.999 * a + 0.001 * g**2 for a, g in zip(v, gradients, strict=True)]
        values = [
            p * (1 - 0.05 * d[i]) - 0.05 * (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            for i, p in enumerate(values)
        ]
    outer_batch = next(iter(loader(2)))
    outer = functional.cross_entropy(call(outer_batch[0]), outer_batch[1])
    moved = raw.detach() - decay.tensors["tensor"].detach()
    torch.testing.assert_close(moved, torch.autograd.grad(outer, raw)[0], rtol=1e-9, atol=1e-12)


# ---- checkpoints, processes, precision


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_is_bit_exact(optimizer: str, tmp_path: Path) -> None:
    def run(folder: str, epochs: int, ckpt: Path | None = None) -> tuple[Classifier, Trainer, list[Any]]:
        save = ModelCheckpoint(
            tmp_path / folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )
        # Planned from a run of one length, as the decays start from it.
        fit = trainer(save, Pause(epochs), max_epochs=4, enable_checkpointing=True, limit_val_batches=0)
        module = Classifier(
            [WeightDecay()], gradient=AHEAD, inner_optimizer=OPTIMIZERS[optimizer],
            loop=LoopOptions(warmup_steps=2), inner_steps_per_outer=2,
        )  # fmt: skip
        fit.fit(module, loader(1), loader(2, batch=5), ckpt_path=ckpt, weights_only=True)
        saved = torch.load(tmp_path / folder / f"epoch={epochs - 1}.ckpt", weights_only=True)["nested"][
            "plan"
        ]
        return module, fit, flat(saved)

    whole, whole_fit, expected = run("whole", 4)
    run("first", 2)
    module, fit, state = run("second", 4, tmp_path / "first" / "epoch=1.ckpt")
    assert whole.outer_steps > 3
    same(tensors(module), tensors(whole))
    torch.testing.assert_close(
        fit.optimizers[0].state_dict(), whole_fit.optimizers[0].state_dict(), rtol=0, atol=0
    )
    # radius, running means, factors and their inverses
    assert len(state) == len(expected) > 10
    for a, b in zip(state, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


class Pause(Callback):
    """Ends the run after an epoch."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def flat(state: Any) -> list[Any]:
    """Return the leaves of nested containers."""
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in flat(value)]
    return [leaf for value in state for leaf in flat(value)] if isinstance(state, list | tuple) else [state]


def test_two_processes_are_one(tmp_path: Path) -> None:
    def run(*callbacks: Callback, **options: Any) -> Split:
        module = Split([WeightDecay()], gradient=AHEAD, inner_optimizer=OPTIMIZERS["adamw"])
        options = {"max_epochs": 2, "limit_val_batches": 0, "use_distributed_sampler": False, **options}
        trainer(*callbacks, **options).fit(module, loader(1), loader(2))
        return module

    run(Save(tmp_path), devices=2, strategy="ddp_fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    same(first, second)
    same(first, tensors(run()), rtol=1e-9)


def test_the_weights_ahead_are_used_inside_autocast() -> None:
    """Autocast keeps its casts of the weights up to the end of a training step."""
    layer, x = nn.Linear(3, 2), torch.ones(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with placed_at(list(layer.parameters()), [torch.zeros_like(p) for p in layer.parameters()]):
            assert not layer(x).any()
        assert torch.equal(layer(x), before)


# ---- solvers without a run


@pytest.mark.parametrize("solver", [KroneckerFactored(), AdamDiagonal()], ids=["factored", "diagonal"])
def test_a_solver_that_reads_the_run_is_refused_where_there_is_none(solver: Any) -> None:
    name = type(solver).__name__
    with pytest.raises(ValueError, match=f"predicted weights have none. Got {name}; use ConjugateGradient"):
        ResponseMonitor(solver=solver)
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    h = torch.ones(2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match=f"{name} must be bound to a running training.*NestedModule"):
        implicit_hypergradient(((w - h) ** 2).sum(), (w**2).sum(), [w], [h], solver=solver)
    with pytest.raises(TypeError, match="solver"):
        Unrolled(num_steps=2, solver=solver)  # type: ignore[call-arg]
