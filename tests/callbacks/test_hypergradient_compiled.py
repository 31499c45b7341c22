"""HypergradientCallback with networks that torch.compile made: their graphs are walked once, and they run no hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.callbacks.hypergradient.outer_step import backward_again
from lightning_nested.hypergradient import (
    Curvature,
    DoubleBackwardError,
    FiniteDifference,
    InverseSolver,
    KroneckerFactored,
    Neumann,
)
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.modules import Implicit, NestedModule
from lightning_nested.modules.nested.cycles import ImplicitCycle
from tests.callbacks.tuned_regression import Regression, data, smooth, values
from tests.trainers import trainer

# Compiling warns on its own behalf.
pytestmark = pytest.mark.filterwarnings("ignore")


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(data(48, 1), 8), DataLoader(data(16, 2), 8)


def compiled(net: nn.Module, backend: str = "aot_eager") -> Any:
    torch.compiler.reset()
    # One graph, so that nothing of ours can break it in two.
    return torch.compile(net, backend=backend, fullgraph=True)


def tuned(net: Any, **options: Any) -> Tensor:
    """Return the decays of a short run with an outer step at its second and fourth step."""
    callback = HypergradientCallback(WeightDecay(), every_n_steps=2, warmup_steps=1)
    module = Regression(net)
    trainer(callback, max_epochs=2, **options).fit(module, *loaders())
    assert callback.outer_loop.outer_steps > 0
    assert callback.outer_loop.skipped_steps == 0
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


class Watched(Regression):
    """Keeps its losses, and how ``backward`` was called."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.kept: list[bool] = []

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.kept.append(bool(kwargs.get("retain_graph")))
        super().backward(loss, *args, **kwargs)


@pytest.mark.parametrize(
    ("solver", "curvature", "kept"),
    [(None, None, 0), (Neumann(), None, 2), (Neumann(), FiniteDifference(), 0)],
)
def test_graphs_of_accumulated_batches_are_kept_for_second_derivatives_alone(
    solver: InverseSolver | None, curvature: Curvature | None, kept: int
) -> None:
    callback = HypergradientCallback(
        WeightDecay(), solver=solver, curvature=curvature, every_n_steps=10, warmup_steps=1
    )
    module = Watched(smooth())
    trainer(callback, accumulate_grad_batches=3).fit(module, *loaders())
    assert callback.outer_steps == 1
    # The last batch of a step is differentiated before its own backward pass.
    assert sum(module.kept) == kept


def test_a_graph_that_cannot_be_kept_is_explained() -> None:
    def backward(loss: Tensor, *, retain_graph: bool) -> None:
        assert retain_graph
        raise RuntimeError("This backward function was compiled with non-empty donated buffers")

    with pytest.raises(DoubleBackwardError, match=r"no torch\.compile.*FiniteDifference\(\)"):
        backward_again(backward, torch.zeros(()))


@pytest.mark.parametrize("solver", [KroneckerFactored(), Neumann()])
def test_a_nested_module_keeps_the_graph_of_a_step_for_second_derivatives_alone(
    solver: InverseSolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    differentiate = torch.autograd.grad

    def grad(*args: Any, **options: Any) -> Any:
        if differentiating:
            kept.append(bool(options.get("retain_graph")))
        return differentiate(*args, **options)

    differentiating: list[bool] = []
    add = ImplicitCycle.add

    def watched(self: ImplicitCycle, *args: Any, **options: Any) -> Tensor:
        differentiating.append(True)
        loss = add(self, *args, **options)
        differentiating.clear()
        return loss

    monkeypatch.setattr(torch.autograd, "grad", grad)
    monkeypatch.setattr(ImplicitCycle, "add", watched)

    class Nested(NestedModule):
        def __init__(self) -> None:
            super().__init__(
                WeightDecay(),
                inner_optimizer=lambda p: torch.optim.SGD(p, lr=0.05),
                gradient=Implicit(solver=solver),
            )
            self.net = smooth()

        def inner_loss(self, batch: Any) -> Tensor:
            return ((self.net(batch[0]) - batch[1]) ** 2).mean()

        def outer_loss(self, batch: Any) -> Tensor:
            return self.inner_loss(batch)

    trainer(max_epochs=2).fit(Nested(), *loaders())
    assert any(kept) == solver.needs_operator
    assert len(kept) == 12
