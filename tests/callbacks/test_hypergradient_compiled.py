"""HypergradientCallback with networks that torch.compile made: their graphs are walked once, and they run no hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import DoubleBackwardError, InverseSolver, KroneckerFactored, Neumann
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.modules import Implicit, NestedModule
from tests.callbacks.tuned_regression import Regression, ScalerAlone, data, smooth, values
from tests.trainers import trainer

# Compiling warns on its own behalf.
pytestmark = pytest.mark.filterwarnings("ignore")


def loaders(dtype: torch.dtype = torch.float64) -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(data(48, 1, dtype), 8), DataLoader(data(16, 2, dtype), 8)


def compiled(net: nn.Module, backend: str = "aot_eager") -> Any:
    torch.compiler.reset()
    # One graph, so that nothing of ours can break it in two.
    return torch.compile(net, backend=backend, fullgraph=True)


def tuned(net: Any, solver: InverseSolver | None = None, **options: Any) -> Tensor:
    """Return the decays of a short run with an outer step at its second and fourth step."""
    callback = HypergradientCallback(WeightDecay(), solver=solver, every_n_steps=2, warmup_steps=1)
    module = Regression(net)
    dtype = next(module.parameters()).dtype
    trainer(callback, max_epochs=2, **options).fit(module, *loaders(dtype))
    assert callback.outer_loop.outer_steps > 0
    assert not callback.outer_loop.skipped_steps
    return values(callback)


@pytest.mark.parametrize("batches", [1, 3])
def test_a_compiled_network_is_tuned(batches: int) -> None:
    """As the plain network without factors; layers are observed from the first step, while they are compiled."""

    class Linear(nn.Linear):
        """Not a layer that has factors, which compiled ones do not have either."""

    plain = smooth()
    for layer in plain:
        if isinstance(layer, nn.Linear):
            layer.__class__ = Linear
    expected = tuned(plain, accumulate_grad_batches=batches)
    found = tuned(compiled(smooth()), accumulate_grad_batches=batches)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_compiled_network_whose_loss_is_scaled() -> None:
    """The outer loss carries the scale of fp16 too, and its graph is walked once."""
    found = tuned(compiled(smooth().float()), plugins=[ScalerAlone()])
    assert bool(found.isfinite().all())


def test_a_graph_that_cannot_be_kept_is_explained() -> None:
    with pytest.raises(DoubleBackwardError, match=r"no torch\.compile.*FiniteDifference\(\)"):
        tuned(compiled(smooth()), Neumann(), accumulate_grad_batches=3)


@pytest.mark.parametrize("solver", [KroneckerFactored(), Neumann()])
def test_a_nested_module_with_a_compiled_network(solver: InverseSolver) -> None:
    """Its own loop keeps the graph of a step only for products."""

    class Nested(NestedModule):
        def __init__(self) -> None:
            super().__init__(
                WeightDecay(),
                inner_optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
                gradient=Implicit(solver=solver),
            )
            self.net = compiled(smooth())

        def inner_loss(self, batch: Any) -> Tensor:
            return ((self.net(batch[0]) - batch[1]) ** 2).mean()

        def outer_loss(self, batch: Any) -> Tensor:
            return self.inner_loss(batch)

    module = Nested()
    if not solver.needs_operator:
        trainer(max_epochs=2).fit(module, *loaders())
        assert module.outer_loop.outer_steps > 0
        return
    with pytest.raises(DoubleBackwardError, match=r"no torch\.compile"):
        trainer(max_epochs=2).fit(module, *loaders())
