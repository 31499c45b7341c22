"""The inner optimizer's learning rate, tuned by differentiating through the optimizer's own steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.arguments import checked
from lightning_nested.hyperparameters.hyperparameter import Hyperparameter
from lightning_nested.hyperparameters.transforms import Exp, Transform


@checked
class LearningRate(Hyperparameter):
    """One learning rate per parameter group of the inner optimizer.

    No loss depends on a rate, so implicit differentiation cannot tune it: use ``NestedModule(gradient=Unrolled(...))``.
    The groups' ``lr`` follows the tuned value; a scheduler of the inner optimizer would set the same number and is
    refused. Over a few steps the best rate is a greedy one, too small for a long training: unroll over as many steps
    as memory allows. Wu, Ren, Liao & Grosse (2018), ICLR.

    Args:
        init: Initial rate; None: the optimizer's own.
        transform: Map from the unconstrained tensor to the rate; default ``Exp`` within [1e-8, 10].
        name: Key in logs and checkpoints.
    """

    sets_rate = True

    def __init__(
        self, init: float | None = None, transform: Transform | None = None, name: str = "learning_rate"
    ) -> None:
        super().__init__()
        if init is not None and not init > 0:
            raise ValueError(f"init must be positive and finite. Got {init}.")
        self.init, self.name = init, name
        self.transform = transform or Exp(lower=1e-8, upper=max(10.0, 2 * (init or 0)))
        if init is not None:
            self._use(self.transform, init)
        self._rates: tuple[float, ...] = ()

    def attach(self, rates: Sequence[float]) -> None:
        """Take the starting values of the optimizer's groups."""
        self._rates = tuple(rates if self.init is None else [self.init] * len(rates))

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Take the starting values of the optimizer's groups."""
        self.attach([float(group["lr"]) for group in optimizer.param_groups])

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        if not self._rates:
            raise ValueError(
                "LearningRate must know the inner optimizer's groups. Got none: it is tuned through unrolled "
                "steps, by NestedModule(gradient=Unrolled(...)); elsewhere call attach([lr, ...]) first."
            )
        return {"rates": torch.tensor(self._rates, dtype=dtype)}

    def rates(self) -> tuple[Tensor, ...]:
        """Return the rate of each group, 0-dimensional, with its graph."""
        return self.transform.forward(self.tensors["rates"]).unbind()
