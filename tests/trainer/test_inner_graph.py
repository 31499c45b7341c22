"""Losses with their graphs, repeated evaluations and named outputs, without a training run."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_nested.hypergradient import Curvature, FiniteDifference, GaussNewton, Hessian
from lightning_nested.trainer.inner_graph import InnerGraph
from tests.trainers import trainer


class Noisy(LightningModule):
    """A loss with dropout and a counter among its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)

    def loss(self) -> Tensor:
        x = nn.functional.dropout(torch.arange(12.0).reshape(4, 3), 0.5)
        return self.norm(self.net(x)).square().mean() + self.net.weight.square().sum()


def inner_graph(curvature: Curvature | None, accumulate: int = 1) -> tuple[InnerGraph, Noisy]:
    module = Noisy()
    module.trainer = trainer()
    return InnerGraph(module, curvature, accumulate=accumulate, method="loss"), module


@pytest.mark.parametrize("curvature", [None, Hessian()])
def test_losses_add_up(curvature: Curvature | None) -> None:
    graph, module = inner_graph(curvature, accumulate=2)
    assert not graph.observes
    losses = [module.loss(), module.loss()]
    for loss in losses:
        graph.add(loss)
    total = graph.loss()
    assert isinstance(total, Tensor)
    assert torch.equal(total, losses[0] + losses[1])
    assert graph.curvature() is curvature
    graph.clear()
    assert graph.losses == []


def test_a_single_loss_is_returned_itself() -> None:
    graph, module = inner_graph(None)
    loss = module.loss()
    graph.add(loss)
    assert graph.loss() is loss


def test_repeated_evaluations_have_the_same_masks_and_no_side_effects() -> None:
    torch.manual_seed(0)
    graph, module = inner_graph(FiniteDifference(), accumulate=2)
    assert graph.observes
    losses = []
    for _ in range(2):
        graph.observe(module.loss)
        losses.append(module.loss())
        graph.add(losses[-1])
    assert not torch.equal(losses[0], losses[1])
    batches = int(module.norm.num_batches_tracked)
    numbers = torch.get_rng_state()
    total = graph.loss()
    assert callable(total)
    torch.testing.assert_close(total(), losses[0] + losses[1], rtol=0, atol=0)
    torch.testing.assert_close(total(), losses[0] + losses[1], rtol=0, atol=0)
    assert int(module.norm.num_batches_tracked) == batches
    assert torch.equal(numbers, torch.get_rng_state())


def test_named_outputs_are_those_of_the_observed_evaluation() -> None:
    graph, module = inner_graph(GaussNewton(outputs="net"))
    module.loss()
    outputs: list[Tensor] = []
    module.net.register_forward_hook(lambda _, __, output: outputs.append(output))
    graph.observe(module.loss)
    graph.add(module.loss())
    module.loss()
    curvature = graph.curvature()
    assert isinstance(curvature, GaussNewton)
    assert curvature.outputs is outputs[0]


def test_named_outputs_must_be_unique() -> None:
    graph, module = inner_graph(GaussNewton(outputs="net"))
    graph.observe(module.loss)
    graph.add(module.loss() + module.loss())
    with pytest.raises(MisconfigurationException, match=r"that loss calls once .* Got 2 outputs in 1 batch"):
        graph.curvature()


def test_a_closed_graph_leaves_no_hook() -> None:
    graph, module = inner_graph(GaussNewton(outputs="net"))
    assert len(module.net._forward_hooks) == 1
    graph.observe(module.loss)
    graph.add(module.loss())
    graph.close()
    assert len(module.net._forward_hooks) == 0
    assert graph.losses == []


@pytest.mark.parametrize(
    ("name", "accumulate", "message"),
    [
        ("head", 1, "'head'; Noisy has net, norm"),
        ("net", 2, "accumulate_grad_batches=2; use Hessian"),
    ],
)
def test_refuses(name: str, accumulate: int, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        inner_graph(GaussNewton(outputs=name), accumulate)
