"""What the self-check at the first outer step costs, in gradients.

One optimizer step of a real ``fit`` with an outer step in it, with the check and without, in the same rounds, beside
one forward and backward pass of the same batch. The solver is short, so that its own time hides nothing.
"""

from __future__ import annotations

import gc
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _measuring import Spread, clock, load, parser, print_table, report, start
from _networks import gpt, group_norm, mlp, wide_mlp
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import Current, InverseSolver, KroneckerFactored, Neumann
from lightning_nested.hyperparameters import Hyperparameter, LabelSmoothing, WeightDecay


class Model(LightningModule):
    """A classifier of one batch; in training its labels can be smoothed by a hyperparameter."""

    label_smoothing: Any = None

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        logits = self.net(batch[0])
        if self.label_smoothing is None or logits.dim() > 2:
            return functional.cross_entropy(logits, batch[1])
        smoothed: Tensor = self.label_smoothing(logits, batch[1])
        return smoothed

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The same without the hyperparameter."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


def seconds(
    model: Model,
    batch: Any,
    solver: InverseSolver,
    now: Callable[[], float],
    hyperparameters: Sequence[Hyperparameter],
    *,
    check: bool,
) -> float:
    """Time of the hypergradient of the first outer step."""
    taken: list[float] = []

    class Timed(HypergradientCallback):
        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
            begin = now()
            super().on_before_backward(trainer, pl_module, loss)
            taken.append(now() - begin)

    callback = Timed(
        hyperparameters,
        solver=solver,
        at=Current(),
        every_n_steps=1,
        warmup_steps=0,
        self_check=check,
    )
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[callback],
    )
    loader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader)
    found = callback.outer_loop.check.result
    if check and solver.needs_operator:
        assert found is not None, "the products must have been checked"
        assert not found.wrong, f"right products must pass. Got {found}"
        assert not found.asymmetric, f"right products must pass. Got {found}"
    return taken[0]


def main(argv: Sequence[str] | None = None) -> dict[str, Spread]:
    options = parser(__doc__, rounds=9)
    options.add_argument("--only", nargs="*", help="networks to measure")
    arguments = options.parse_args(argv)
    start(arguments)
    before = load()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    now = clock(arguments.threads)
    makers = {"MLP 500-500": mlp, "MLP 1000-150": wide_mlp, "GroupNorm": group_norm, "GPT": gpt}
    solvers: dict[str, InverseSolver] = {
        "Neumann": Neumann(num_terms=2, step_size=1e-3),
        "KroneckerFactored": KroneckerFactored(),
    }
    # The mixed derivative is checked where a hyperparameter is in the loss's graph.
    tuned: dict[str, Callable[[], list[Hyperparameter]]] = {
        "a decay": lambda: [WeightDecay(per="model")],
        "a decay and label smoothing": lambda: [WeightDecay(per="model"), LabelSmoothing()],
    }
    results = {}
    for name, make in makers.items():
        if arguments.only and name not in arguments.only:
            continue
        torch.manual_seed(0)
        net, *batch = make()
        model = Model(net)
        costs: dict[str, list[float]] = {}

        def gradient(model: Model = model, batch: Any = batch) -> float:
            begin = now()
            loss = model.training_step(batch, 0)
            torch.autograd.grad(loss, tuple(model.parameters()))
            return now() - begin

        for round_ in range(arguments.rounds + 1):
            for which, hyperparameters in tuned.items():
                for label, solver in solvers.items():
                    model.label_smoothing = None
                    unit = statistics.median(gradient() for _ in range(3))
                    times = [
                        seconds(model, batch, solver, now, hyperparameters(), check=check)
                        for check in (False, True, True, False)
                    ]
                    if round_:  # the first one warms up
                        cost = (times[1] + times[2] - times[0] - times[3]) / 2 / unit
                        costs.setdefault(f"{name}, {label}, {which}", []).append(cost)
            gc.collect()
        results |= {which: Spread.of(found) for which, found in costs.items()}
    print_table(
        ["network, solver, tuned", "gradients [quartiles]"], [[n, s.text()] for n, s in results.items()]
    )
    print("\nReach: at most 3 gradients.")
    report(arguments, results, packages=(), load_before=before)
    return results


if __name__ == "__main__":
    main()
