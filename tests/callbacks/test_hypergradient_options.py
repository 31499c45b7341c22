"""Learning rates, momenta and betas of an unchanged module's optimizer, tuned by HypergradientCallback."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hyperparameters import Betas, Exp, LearningRate, Momentum, WeightDecay
from lightning_nested.optim import ComplexAdam, ComplexSGD, Extragradient, OptimisticAdam, OptimisticSGD
from tests.callbacks.test_hypergradient_processes import _dealt, _keeper
from tests.callbacks.tuned_regression import Regression, ScalerAlone, data, sgd, smooth, values, weights
from tests.trainers import trainer

STEPS = 7


class Given(Regression):
    """The regression with a given optimizer, and scheduler."""

    def __init__(self, make: Any, schedule: Any = None) -> None:
        super().__init__(smooth())
        self.make, self.schedule = make, schedule

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        scheduler = self.schedule(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Shift(Callback):
    """Changes options of one group in the last steps of a run, as a tuned value would."""

    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]], group: int, horizon: int) -> None:
        self.change, self.group, self.horizon = change, group, horizon

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if trainer.global_step < STEPS - self.horizon:
            return
        group = optimizer.param_groups[self.group]
        changed = self.change(group)
        own = {key: group[key] for key in changed}
        group.update(changed)
        handle = optimizer.register_step_post_hook(lambda *_: (group.update(own), handle.remove()))


def loaders(options: dict[str, Any]) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return batches for one step more than the run has, and validation data in one batch."""
    batches = (STEPS + 1) * options.get("accumulate_grad_batches", 1)
    return DataLoader(data(4 * batches, 1), batch_size=4), DataLoader(VALIDATION, batch_size=9)


VALIDATION = data(9, 2)


def final_loss(make: Any, schedule: Any, options: dict[str, Any], *callbacks: Callback) -> float:
    """Return the outer loss after a plain run."""
    module = Given(make, schedule)
    trainer(*callbacks, max_steps=STEPS, **options).fit(module, *loaders(options))
    with torch.no_grad():
        x, y = VALIDATION.tensors
        return float(0.5 * ((module.net(x) - y) ** 2).mean())


def found(
    make: Any, option: Any, schedule: Any = None, others: tuple[Any, ...] = (), **options: Any
) -> Tensor:
    """Return the hypergradient of the option at step 7, by the unconstrained tensor."""
    callback = HypergradientCallback(
        [option, *others], optimizer=sgd(1.0), every_n_steps=10**6, warmup_steps=STEPS, self_check=False
    )
    module = Given(make, schedule)
    before = {}

    class Read(Callback):
        def on_train_start(self, *_: Any) -> None:
            (before["raw"],) = (t.detach().clone() for t in option.tensors.values())

    trainer(callback, Read(), max_steps=STEPS + 1, **options).fit(module, *loaders(options))
    assert callback.outer_steps == 1
    (raw,) = option.tensors.values()
    return before["raw"] - raw.detach()


def log_rate(epsilon: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda group: {"lr": group["lr"] * math.exp(epsilon)}


def logit(value: float, epsilon: float) -> float:
    return 1 / (1 + math.exp(-(math.log(value / (1 - value)) + epsilon)))


RATES: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.03, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1),
    "complex_sgd": lambda p: ComplexSGD(p, lr=0.1),
    "complex_adam": lambda p: ComplexAdam(p, lr=0.03),
    "optimistic_sgd": lambda p: OptimisticSGD(p, lr=0.1),
    "optimistic_adam": lambda p: OptimisticAdam(p, lr=0.03),
}


def differences(
    make: Any,
    change: Callable[[float], Callable[[dict[str, Any]], dict[str, Any]]],
    horizon: int,
    *callbacks: Callable[[], Callback],
    group: int = 0,
    schedule: Any = None,
    **options: Any,
) -> float:
    """Return the central difference of the outer loss, of runs with other options in the last steps."""
    ends = [
        final_loss(make, schedule, options, Shift(change(e), group, horizon), *(c() for c in callbacks))
        for e in (EPSILON, -EPSILON)
    ]
    return (ends[0] - ends[1]) / (2 * EPSILON)


# The error of a central difference is of order ε², and rounding/ε.
EPSILON, RELATIVE = 1e-4, 1e-6


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("name", RATES)
def test_rates_are_those_of_runs_with_other_rates(name: str, horizon: int) -> None:
    gradient = found(RATES[name], LearningRate(transform=Exp(), horizon=horizon))
    expected = differences(RATES[name], log_rate, horizon)
    assert gradient.tolist() == pytest.approx([expected], rel=RELATIVE)


def two_groups(parameters: Any) -> Optimizer:
    weights = list(parameters)
    groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "lr": 0.01}]
    return torch.optim.AdamW(groups, lr=0.03, betas=(0.8, 0.9))


def warm_up_and_cosine(optimizer: Optimizer) -> Any:
    factor = lambda t: min(1.0, (t + 1) / 4) * 0.5 * (1 + math.cos(math.pi * t / 10))  # noqa: E731
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def test_each_group_has_its_own_rate_and_the_schedule_stays() -> None:
    rate = LearningRate(transform=Exp(), horizon=3)
    gradient = found(two_groups, rate, warm_up_and_cosine)
    expected = [differences(two_groups, log_rate, 3, group=i, schedule=warm_up_and_cosine) for i in (0, 1)]
    assert gradient.tolist() == pytest.approx(expected, rel=RELATIVE)
    # In units of the optimizer, not of the first step of the warm-up.
    assert torch.stack(rate.rates()).detach() == pytest.approx([0.03, 0.01], rel=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.2},
        {"gradient_clip_val": 0.03, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
    ],
)
def test_clipping_and_accumulation_are_parts_of_the_step(options: dict[str, Any]) -> None:
    gradient = found(RATES["momentum"], LearningRate(transform=Exp(), horizon=3), **options)
    expected = differences(RATES["momentum"], log_rate, 3, **options)
    assert gradient.tolist() == pytest.approx([expected], rel=RELATIVE)


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("name", ["momentum", "nesterov", "complex_sgd"])
def test_momentum_is_that_of_runs_with_another_one(name: str, horizon: int) -> None:
    gradient = found(RATES[name], Momentum(horizon=horizon))
    change = lambda e: lambda group: {"momentum": logit(group["momentum"], e)}  # noqa: E731
    assert gradient.tolist() == pytest.approx([differences(RATES[name], change, horizon)], rel=RELATIVE)


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("name", ["adam", "adamw", "complex_adam"])
def test_betas_are_those_of_runs_with_others(name: str, horizon: int) -> None:
    gradient = found(RATES[name], Betas(horizon=horizon))

    def change(index: int) -> Callable[[float], Callable[[dict[str, Any]], dict[str, Any]]]:
        def changed(group: dict[str, Any], e: float) -> dict[str, Any]:
            betas = [logit(b, e) if i == index else b for i, b in enumerate(group["betas"])]
            return {"betas": tuple(betas)}

        return lambda e: lambda group: changed(group, e)

    expected = [differences(RATES[name], change(i), horizon) for i in (0, 1)]
    assert gradient[0].tolist() == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.filterwarnings("ignore:HypergradientCallback made no outer step")
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_tuned_decays_are_parts_of_the_step(name: str) -> None:
    make: Any = {
        "momentum": RATES["momentum"],
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.0),
    }[name]

    def decay() -> WeightDecay:
        return WeightDecay(init=0.3, include=["*.weight"])

    rate = LearningRate(transform=Exp(), horizon=3)
    gradient = found(make, rate, others=(decay(),))
    never = lambda: HypergradientCallback(decay(), every_n_steps=10**6, warmup_steps=10**6)  # noqa: E731
    assert gradient.tolist() == pytest.approx([differences(make, log_rate, 3, never)], rel=RELATIVE)


class Seen(Callback):
    """Keeps the rates that the optimizer's steps were made with, and those that are seen between them."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.between: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        self.between.append(optimizer.param_groups[0]["lr"])

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self.steps.append(optimizer.param_groups[0]["lr"])


def recursive(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # from the rate before


def test_the_users_schedule_goes_on_as_if_nothing_were_tuned() -> None:
    rate, seen = LearningRate(init=0.2, transform=Exp()), Seen()
    callback = HypergradientCallback(rate, every_n_steps=2, warmup_steps=2, optimizer=sgd(1.0))
    module = Given(RATES["sgd"], recursive)
    trainer(callback, seen).fit(module, *loaders({}))
    users = [0.1 * 0.9**t for t in range(8)]
    assert seen.between == pytest.approx(users)
    factors = [step / own for step, own in zip(seen.steps, users, strict=True)]
    # Outer steps at 2, 4 and 6, after the inner ones.
    assert factors[:3] == pytest.approx([2.0] * 3)
    assert len({round(f, 6) for f in factors[3:]}) == 3
    assert factors[-1] == pytest.approx(10 * float(rate.rates()[0].detach()))


def test_the_default_tunes_late_often_and_at_a_constant_outer_rate() -> None:
    callback = HypergradientCallback(LearningRate())
    train, val = DataLoader(data(200, 1), 2), DataLoader(data(8, 2), 2)
    trainer(callback).fit(Given(RATES["adam"]), train, val)
    assert callback.warmup_steps == 70
    assert callback.every_n_steps == 2
    assert callback.outer_steps == 15
    assert callback.outer.scheduler is None
    assert callback.plan.forecast is None


class Steps(Callback):
    """Inner steps of a run at which there was an outer step."""

    def __init__(self, tuner: HypergradientCallback, save_at: int = -1, path: Path | None = None) -> None:
        self.tuner, self.save_at, self.path = tuner, save_at, path
        self.found: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.tuner.last_report is not None and self.tuner.outer_steps > self.made:
            self.found.append(trainer.global_step - 1)
        self.made = self.tuner.outer_steps
        if self.path is not None and trainer.global_step == self.save_at:
            trainer.save_checkpoint(self.path)

    def on_train_start(self, *_: Any) -> None:
        self.made = self.tuner.outer_steps


# Batches are in a fixed order.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("saved_at", [1, 9])
def test_a_second_fit_of_a_rate_starts_late_too_and_so_when_it_is_resumed(
    saved_at: int, tmp_path: Path
) -> None:
    def fit(callback: HypergradientCallback, module: Given, resume: Path | None = None) -> list[int]:
        steps = Steps(callback, saved_at, path if callback.outer_steps and resume is None else None)
        train, val = DataLoader(data(40, 1), 4), DataLoader(data(9, 2), 9)
        trainer(callback, steps, max_steps=10).fit(module, train, val, ckpt_path=resume)
        return steps.found

    path = tmp_path / "second.ckpt"
    callback, module = HypergradientCallback(LearningRate(), every_n_steps=1), Given(RATES["sgd"])
    assert fit(callback, module) == [7, 8, 9]
    assert fit(callback, module) == [7, 8, 9]
    assert callback.warmup_steps == 17
    resumed = HypergradientCallback(LearningRate(), every_n_steps=1)
    assert fit(resumed, Given(RATES["sgd"]), path) == [n for n in (7, 8, 9) if n >= saved_at]
    assert torch.equal(values(resumed), values(callback))


def test_a_warm_up_of_the_users_is_counted_from_the_first_fit() -> None:
    callback, module = (
        HypergradientCallback(LearningRate(), every_n_steps=1, warmup_steps=8),
        Given(RATES["sgd"]),
    )
    for expected in (2, 12):
        train, val = DataLoader(data(40, 1), 4), DataLoader(data(9, 2), 9)
        trainer(callback, max_steps=10).fit(module, train, val)
        assert callback.outer_steps == expected


def test_a_run_resumed_inside_a_window_is_bit_exact(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> tuple[Tensor, Tensor, Any]:
        callback = HypergradientCallback(
            [LearningRate(transform=Exp(), horizon=4), Betas(horizon=2)],
            every_n_steps=5,
            warmup_steps=3,
            optimizer=sgd(1.0),
        )
        module = Given(RATES["adamw"], warm_up_and_cosine)
        fit = trainer(callback, max_epochs=epochs)
        fit.fit(module, DataLoader(data(12, 1), 4), DataLoader(data(9, 2), 3), ckpt_path=resume)
        return values(callback), weights(module), fit

    path = tmp_path / "inside.ckpt"
    # After 12 steps of three an epoch, one before an outer step.
    run(4)[2].save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    (state,) = (s for s in saved["callbacks"].values() if "options" in s)
    assert state["options"]["frame"].any()
    whole, resumed = run(6), run(6, path)
    assert torch.equal(whole[0], resumed[0])
    assert torch.equal(whole[1], resumed[1])


def _fit_two(folder: Path, devices: int) -> None:
    options = [LearningRate(transform=Exp(), horizon=3), Momentum()]
    callback = HypergradientCallback(options, every_n_steps=2, warmup_steps=1, optimizer=sgd(1.0))
    train, val = DataLoader(data(64, 1), 8 // devices), DataLoader(data(16, 2), 16 // devices)
    processes: dict[str, Any] = {}
    if devices == 2:
        processes = {"devices": 2, "strategy": "ddp_fork"}
        train, val = _dealt(train), _dealt(val)
    fit = trainer(
        callback, _keeper(folder / f"{devices}", callback), use_distributed_sampler=False, **processes
    )
    fit.fit(Given(RATES["momentum"]), train, val)


@pytest.mark.filterwarnings("default")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    _fit_two(tmp_path, 1)
    _fit_two(tmp_path, 2)
    alone = torch.load(tmp_path / "1_0.pt")
    both = [torch.load(tmp_path / f"2_{rank}.pt") for rank in (0, 1)]
    assert not torch.allclose(alone[0], torch.tensor([0.1, 0.8]).double())
    for one, first, second in zip(alone, *both, strict=True):
        assert torch.equal(first, second)
        assert torch.allclose(first, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", [None, Exp()])
def test_a_rate_only_falls_unless_a_transform_lets_it_rise(transform: Any) -> None:
    # Far too low: every derivative asks for more.
    rate = LearningRate(transform=transform)
    callback = HypergradientCallback(rate, every_n_steps=1, warmup_steps=1)
    make = lambda p: torch.optim.SGD(p, lr=1e-5)  # noqa: E731
    trainer(callback).fit(Given(make), *loaders({}))
    (value,) = rate.values()["rates"].tolist()
    assert value == pytest.approx(1e-5) if transform is None else value > 2e-5


@pytest.mark.filterwarnings("ignore:HypergradientCallback skipped the outer step")
def test_a_gradient_that_is_not_finite_skips_the_outer_step() -> None:
    class Once(Callback):
        def on_after_backward(self, trainer: Any, module: LightningModule) -> None:
            if trainer.global_step == 1:
                for p in module.parameters():
                    p.grad.fill_(torch.inf)  # type: ignore[union-attr]

        def on_train_batch_end(self, trainer: Any, module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                module.load_state_dict(Given(RATES["sgd"]).state_dict())

    callback = HypergradientCallback(LearningRate(), every_n_steps=2, warmup_steps=2)
    trainer(Once(), callback).fit(Given(RATES["sgd"]), *loaders({}))
    assert (callback.skipped_steps, callback.outer_steps) == (1, 2)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_and_half_precision() -> None:
    class Lazy(Given):
        def __init__(self) -> None:
            super().__init__(RATES["adamw"])
            self.net = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    options = [LearningRate(horizon=3), Betas()]
    callback = HypergradientCallback(options, every_n_steps=2, warmup_steps=1)
    train, val = (DataLoader(data(n, 1, torch.float32), 4) for n in (32, 8))
    trainer(callback, precision="bf16-true").fit(Lazy(), train, val)
    assert callback.outer_steps == 4
    assert callback.last_report is not None
    assert 0 < callback.last_report.hypergradient_norm < 10


class OwnClipping(Given):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        pass


def one_cycle(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)


@pytest.mark.parametrize(
    ("module", "option", "options", "message"),
    [
        (Given(lambda p: torch.optim.LBFGS(p, lr=0.1)), LearningRate(), {}, "Got LBFGS; use one"),
        (Given(lambda p: torch.optim.RMSprop(p)), LearningRate(), {}, "Got RMSprop; use one"),
        (Given(lambda p: torch.optim.Adam(p, amsgrad=True)), LearningRate(), {}, r"amsgrad=True\); use"),
        (Given(lambda p: Extragradient(p, lr=0.1)), LearningRate(), {}, "Got Extragradient; use one"),
        (OwnClipping(RATES["sgd"]), LearningRate(), {}, "configure_gradient_clipping; use"),
        (Given(RATES["sgd"]), LearningRate(), {"plugins": [ScalerAlone()]}, "bf16-mixed"),
        (Given(RATES["momentum"], one_cycle), Momentum(), {}, "cycle_momentum=False"),
        (Given(RATES["sgd"]), Momentum(), {}, "give the optimizer momentum=0.9"),
        (Given(RATES["adam"]), Momentum(), {}, r"use Betas\(\) for Adam"),
        (Given(RATES["sgd"]), Betas(), {}, r"use Momentum\(\) for SGD"),
    ],
)
def test_what_cannot_be_differentiated_is_refused_with_a_cure(
    module: LightningModule, option: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer(HypergradientCallback(option), **options).fit(module, *loaders({}))


def test_an_option_is_tuned_once() -> None:
    with pytest.raises(ValueError, match="Got learning_rate, other; leave one out"):
        HypergradientCallback([LearningRate(), LearningRate(name="other")])


def test_a_group_that_comes_later_is_refused() -> None:
    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == 2:
                trainer.optimizers[0].add_param_group({"params": [module.late]})

    module = Given(lambda p: torch.optim.SGD([w for w in p if w.dim() < 3], lr=0.1))
    module.late = torch.nn.Parameter(torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match=r"1 group\(s\).* Got 2 now; give the optimizer all its groups"):
        trainer(Unfreeze(), HypergradientCallback(LearningRate(), warmup_steps=0)).fit(module, *loaders({}))


def test_a_dry_run_makes_an_outer_step() -> None:
    callback = HypergradientCallback(LearningRate(transform=Exp(), horizon=3))
    trainer(callback, fast_dev_run=3).fit(Given(RATES["adam"]), *loaders({}))
    assert callback.outer_steps == 1
    assert callback.last_report is not None
    assert callback.last_report.hypergradient_norm > 0
