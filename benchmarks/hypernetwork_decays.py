"""7 850 decays of a linear softmax: hypernetworks, implicit, unrolled gradients, TPE and random search.

500 Fashion-MNIST images to train, 500 to tune, 10 000 test images. Cost counts gradient evaluations of the training
loss: a step is 1, a Delta-STN step that trains the response 3 (two losses, one with a tangent), an outer step 1; a
hypergradient with ten steps of conjugate gradients 12; an unrolled step 3. Searches train from scratch in each trial.
At the end of the budget the model with the lowest validation loss so far is judged. With ``--hidden 50`` or ``--hidden
50 50`` the network has hidden layers (tanh), and as many decays as weights: the depths of Lorraine & Duvenaud (2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from _fits import quiet
from _linear_softmax import HIGHEST, LOWEST, Data, decay
from _measuring import Spread, load, parser, print_table, report, start
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_nested.hypergradient import ConjugateGradient
from lightning_nested.hypernetworks import DiagonalResponse, FixedScale
from lightning_nested.modules import (
    DeltaSTN,
    HypernetworkModule,
    Implicit,
    LoopOptions,
    NestedModule,
    ResponseOptions,
    Unrolled,
)
from lightning_nested.networks import MLP

START, RATE = -4.0, 0.05
SIGMA = 0.3  # of the perturbation, in log decay
RANDOM, TPE = "random search", "TPE"
SAMPLERS = {RANDOM: "RandomSampler", TPE: "TPESampler"}  # of Optuna
GRID = "grid of one decay"
DIAGONAL, ROWS = "hypernetwork, one slope per weight", "hypernetwork, one direction per class"
Losses = tuple[float, float]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of every training."""
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9)


def response_sgd(parameters: Any) -> torch.optim.Optimizer:
    """At the weights' rate over σ²: the curvature of the slopes is σ² times the weights'."""
    return torch.optim.SGD(parameters, lr=RATE / SIGMA**2, momentum=0.9)


def network(hidden: Sequence[int]) -> nn.Module:
    """A linear model from zero, as a convex problem may, or an MLP from random weights."""
    if hidden:
        return MLP(784, hidden=hidden, num_classes=10, activation="tanh")
    net = nn.Linear(784, 10)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


def judge(net: nn.Module, data: Data) -> Losses:
    """Validation and test loss."""
    with torch.no_grad():
        return tuple(float(functional.cross_entropy(net(x), y)) for x, y in (data.val, data.test))  # type: ignore[return-value]


def train(data: Data, decays: Sequence[Tensor], steps: int, hidden: Sequence[int] = ()) -> Losses:
    """One training with a fixed decay, or decays, of each tensor."""
    net = network(hidden)
    optimizer = sgd(net.parameters())
    best = (float("inf"), float("inf"))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        functional.cross_entropy(net(data.train[0]), data.train[1]).backward()
        for p, d in zip(net.parameters(), decays, strict=True):
            p.grad.add_(d * p.detach())  # type: ignore[union-attr]
        optimizer.step()
        if step % max(1, steps // 10) == 0:
            best = min(best, judge(net, data))
    return best


class Record(Callback):
    """The best model so far, and the end of the budget."""

    def __init__(self, data: Data, cost: Callable[[Any], float], budget: float) -> None:
        self.data, self.cost, self.budget, self.best = data, cost, budget, (float("inf"), float("inf"))
        self.looks = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A look every fortieth of the budget."""
        spent = self.cost(pl_module)
        trainer.should_stop = spent >= self.budget
        if spent >= self.budget * (self.looks + 1) / 40:
            self.looks += 1
            net: Any = pl_module.net if isinstance(pl_module, Nested) else pl_module.network
            self.best = min(self.best, judge(net, self.data))


class Tuned(HypernetworkModule):
    """Whole batches."""

    data: Data

    def inner_loss(self, batch: Any, values: Any) -> Tensor:
        """Cross-entropy of the training images."""
        return functional.cross_entropy(self.network(self.data.train[0]), self.data.train[1])

    def outer_loss(self, batch: Any) -> Tensor:
        """Cross-entropy of the validation images."""
        return functional.cross_entropy(self.network(self.data.val[0]), self.data.val[1])


class Nested(NestedModule):
    """The same with hypergradients."""

    data: Data

    def __init__(self, hidden: Sequence[int] = (), **options: Any) -> None:
        super().__init__(decay("parameter", START), inner_optimizer=sgd, **options)
        self.net = network(hidden)

    def inner_loss(self, batch: Any) -> Tensor:
        """Cross-entropy of the training images."""
        return functional.cross_entropy(self.net(self.data.train[0]), self.data.train[1])

    def outer_loss(self, batch: Any) -> Tensor:
        """Cross-entropy of the validation images."""
        return functional.cross_entropy(self.net(self.data.val[0]), self.data.val[1])


def adam(rate: float) -> Any:
    """From tensors to Adam."""
    return lambda tensors: torch.optim.Adam(tensors, lr=rate)


def tune(
    data: Data, name: str, budget: float, steps: int, rate: float, hidden: Sequence[int] = ()
) -> tuple[Losses, Losses]:
    """One run of ours: the best model in it, and a fresh training with its last decays."""
    module: Any
    hyper = name.startswith("hypernetwork")
    if hyper:
        diagonal, net = name == DIAGONAL, network(hidden)
        module = Tuned(
            DiagonalResponse(net, sum(p.numel() for p in net.parameters())) if diagonal else net,
            decay("parameter", START),
            loop=DeltaSTN(train_steps=5, warmup_steps=50, perturbation=FixedScale(scale=SIGMA, signs=True)),
            weights_optimizer=sgd, response_optimizer=response_sgd if diagonal else adam(1e-3),
            outer_optimizer=adam(rate), options=ResponseOptions(log_every_n_outer_steps=0),
        )  # fmt: skip
        every = module.loop.response_every
        cost = lambda m: m.inner_steps + 2.0 * math.ceil(m.inner_steps / every) + m.outer_steps  # noqa: E731
    elif name == "implicit":
        module = Nested(
            hidden, gradient=Implicit(solver=ConjugateGradient(max_iterations=10)), inner_steps_per_outer=10,
            outer_optimizer=adam(rate), loop=LoopOptions(warmup_steps=50, log_every_n_outer_steps=0),
        )  # fmt: skip
        cost = lambda m: m.inner_steps + 12.0 * m.outer_steps  # noqa: E731
    elif name == "unrolled":
        module = Nested(
            hidden,
            gradient=Unrolled(num_steps=10),
            outer_optimizer=adam(rate),
            loop=LoopOptions(log_every_n_outer_steps=0),
        )
        cost = lambda m: 3.0 * m.inner_steps + m.outer_steps  # noqa: E731
    else:
        raise ValueError(f"name must be that of a hypernetwork, implicit or unrolled. Got {name!r}.")
    module.data = data
    record = Record(data, cost, budget - steps)
    trainer = Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[record],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    batches: DataLoader[Any] = DataLoader(torch.zeros(100, 1), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, batches, batches)
    with torch.no_grad():
        values = [v.exp() for v in (module.vector.tensors if hyper else module.outer.tensors)]
    fresh = train(data, values, steps, hidden)
    return min(record.best, fresh), fresh


def grid(data: Data, trainings: int, steps: int, hidden: Sequence[int] = ()) -> Losses:
    """One decay for all weights."""
    values = torch.linspace(LOWEST, HIGHEST, trainings).exp()
    return min(train(data, [value] * 2 * (len(hidden) + 1), steps, hidden) for value in values)


def drawn(data: Data, seed: int, trainings: int, steps: int, hidden: Sequence[int]) -> Losses:
    """Random search without Optuna, which is asked for each decay alone."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [p.shape for p in network(hidden).parameters()]
    best = (float("inf"), float("inf"))
    for _ in range(trainings):
        logs = [LOWEST + (HIGHEST - LOWEST) * torch.rand(shape, generator=generator) for shape in shapes]
        best = min(best, train(data, [log.exp() for log in logs], steps, hidden))
    return best


def search(data: Data, sampler: str, seed: int, budget: float, steps: int) -> Losses:
    """Trials of a training of the linear model each."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=getattr(optuna.samplers, SAMPLERS[sampler])(seed=seed))
    best = (float("inf"), float("inf"))
    for _ in range(int(budget / steps)):
        trial = study.ask()
        values = torch.tensor([trial.suggest_float(f"d{i}", LOWEST, HIGHEST) for i in range(7850)]).exp()
        losses = train(data, [values[:7840].view(10, 784), values[7840:]], steps)
        study.tell(trial, losses[0])
        best = min(best, losses)
    return best


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, rounds=3)
    options.add_argument("--size", type=int, default=500)
    options.add_argument("--steps", type=int, default=300, help="gradients of one training")
    options.add_argument("--trainings", type=int, default=24, help="budget in trainings")
    options.add_argument("--rate", type=float, default=0.03, help="outer rate of Adam on log decays")
    options.add_argument(
        "--hidden", type=int, nargs="*", default=[], help="units of hidden layers; none: linear"
    )
    names = [DIAGONAL, "implicit", "unrolled", GRID, ROWS, RANDOM, TPE]
    options.add_argument("--methods", nargs="+", choices=names, help="rows of the table; default: all")
    arguments = options.parse_args(argv)
    hidden = arguments.hidden
    if hidden and TPE in (arguments.methods or ()):
        options.error(f"TPE must go without --hidden: it searches the linear model. Got --hidden {hidden}.")
    start(arguments)
    before = load()
    quiet()
    budget = float(arguments.steps * arguments.trainings)
    found: dict[str, list[Losses]] = {}
    fresh: dict[str, list[Losses]] = {}
    if find_spec("optuna") is None:
        names = [name for name in names if name not in SAMPLERS]
    if hidden:
        names = [name for name in names if name != TPE]
    data = [Data(seed, arguments.size) for seed in range(arguments.rounds)]
    for name in arguments.methods or names:
        for seed in range(arguments.rounds):
            torch.manual_seed(seed)
            if name == GRID:
                best = grid(data[seed], arguments.trainings, arguments.steps, hidden)
            elif hidden and name == RANDOM:
                best = drawn(data[seed], seed, arguments.trainings, arguments.steps, hidden)
            elif name in SAMPLERS:
                best = search(data[seed], name, seed, budget, arguments.steps)
            else:
                best, again = tune(data[seed], name, budget, arguments.steps, arguments.rate, hidden)
                fresh.setdefault(name, []).append(again)
            found.setdefault(name, []).append(best)
            print(f"{name}, seed {seed}: validation {best[0]:.4f}, test {best[1]:.4f}", flush=True)
    rows = []
    for name, losses in found.items():
        again = Spread.of([x[1] for x in fresh[name]]).text(3) if name in fresh else ""
        rows.append([name, *(Spread.of([x[i] for x in losses]).text(3) for i in (0, 1)), again])
    print_table(["method", "validation loss", "test loss", "test loss of a fresh training"], rows)
    report(arguments, {"found": found, "fresh": fresh}, packages=("optuna",), load_before=before)
    return {"found": found, "fresh": fresh}


if __name__ == "__main__":
    main()
