"""What the report at the start of fit says of memory is what a run then holds."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hypergradient import (
    ConjugateGradient,
    Current,
    DenseSolve,
    FiniteDifference,
    Identity,
    Neumann,
    Nystrom,
)
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.linalg.graph import graph_bytes
from lightning_nested.trainer.outer_memory import memory_line, outer_memory
from tests.callbacks.tuned_regression import Regression, data
from tests.trainers import trainer


def held(state: Any) -> int:
    """Return the bytes of all tensors in a nested state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(held, parts))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 1)).double()


class Measured(HypergradientCallback):
    """Keeps what is foreseen at the start, and what the statistics and the tuned values hold at the end."""

    foreseen: dict[str, int]
    found: dict[str, int]

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        self.foreseen = outer_memory(self.plan, self.outer_loop.parameters)

    def on_train_end(self, *args: Any) -> None:
        forecast, outer = self.plan.forecast, self.outer
        assert forecast is not None
        state = forecast.state_dict()
        inverses = [inverse for _, inverse in state["inverses"]]
        # Steps of the outer optimizer are single numbers.
        moments = [t for s in outer.optimizer.state.values() for t in s.values() if t.dim()]
        self.found = {
            "Kronecker factors": held(state["fisher"]["factors"]) + held([i["factors"] for i in inverses]),
            "curvature per weight": held(state["fisher"]["squares"])
            + held([i["diagonal"] for i in inverses]),
            "mean gradient": held(state["mean"]),
            "decays": held(list(outer.tensors)) + held(moments),
        }
        super().on_train_end(*args)


@pytest.mark.parametrize("per", ["tensor", "parameter"])
def test_the_report_is_what_is_held(per: Any) -> None:
    callback = Measured(WeightDecay(per), every_n_steps=3, warmup_steps=2)
    trainer(callback, max_epochs=2).fit(
        Regression(net()), DataLoader(data(48, 1), 8), DataLoader(data(16, 2), 8)
    )
    size = sum(p.numel() for p in net().parameters())
    assert callback.foreseen == {**callback.found, "solver": 2 * size * 8}


@pytest.mark.parametrize(
    ("solver", "numbers"),
    [
        (Identity(), lambda n: 2 * n),
        (Neumann(step_size=0.1), lambda n: 5 * n),
        (ConjugateGradient(warm_start=True), lambda n: 7 * n),
        (Nystrom(rank=4), lambda n: 15 * n),
        (DenseSolve(), lambda n: 2 * n * n + 3 * n),
    ],
    ids=lambda x: type(x).__name__,
)
def test_solvers_hold_vectors(solver: Any, numbers: Any) -> None:
    callback = HypergradientCallback(WeightDecay(), solver=solver, at=Current())
    parameters = dict(net().named_parameters())
    callback.outer.build(parameters, torch.device("cpu"))
    size = sum(p.numel() for p in parameters.values())
    found = outer_memory(callback.plan, parameters)
    assert found["solver"] == 8 * numbers(size)
    assert not found["Kronecker factors"] + found["mean gradient"]


def test_nothing_is_said_of_shapes_that_are_not_known_yet() -> None:
    assert memory_line(outer_memory(HypergradientCallback(WeightDecay()).plan, {})) == ""


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({"solver": 3 * 10**9, "decays": 10**9}, "; holds 4 GB: solver 3, decays 1"),
        ({"solver": 500}, "; holds 0.5 kB: solver 0.5"),
    ],
)
def test_units(parts: dict[str, int], line: str) -> None:
    assert memory_line(parts) == line


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"solver": Neumann(num_terms=1)}, True),
        ({"solver": Neumann(num_terms=1), "curvature": FiniteDifference()}, False),
        ({}, False),  # the default solver takes no second derivative
    ],
)
def test_graphs_that_accumulation_keeps_are_told(
    options: dict[str, Any], kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    callback = HypergradientCallback(WeightDecay(), every_n_steps=1, warmup_steps=0, **options)
    fit = trainer(callback, accumulate_grad_batches=4)
    fit.fit(Regression(net()), DataLoader(data(16, 1), 4), DataLoader(data(8, 2), 8))
    assert callback.outer_steps == 1
    assert ("graphs of all 4 accumulated batches" in caplog.text) is kept


@pytest.mark.parametrize("checkpointed", [False, True])
def test_bytes_of_a_graph_are_those_that_autograd_saves(checkpointed: bool) -> None:
    network, x = net(), torch.randn(64, 5, dtype=torch.float64)
    calls, saved = [], {}

    def body(inputs: Tensor) -> Tensor:
        calls.append(1)
        return network(inputs)

    def loss() -> Tensor:
        hidden = checkpoint(body, x, use_reentrant=False) if checkpointed else body(x)
        return hidden.exp().square().mean()

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hooked = loss()
    for p in network.parameters():
        saved.pop(p.data_ptr(), None)
    assert graph_bytes(hooked, network.parameters()) == sum(saved.values())
    calls.clear()
    assert graph_bytes(loss(), network.parameters()) == sum(saved.values())
    # Nothing was computed again to be counted.
    assert len(calls) == 1


def test_bytes_of_kept_graphs_are_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 512), nn.Tanh(), nn.Linear(512, 1)).double()
    callback = HypergradientCallback(
        WeightDecay(), every_n_steps=1, warmup_steps=1, solver=Neumann(num_terms=1), at=Current()
    )
    fit = trainer(callback, accumulate_grad_batches=4, max_epochs=2)
    fit.fit(Regression(network), DataLoader(data(80, 1), 20), DataLoader(data(8, 2), 8))
    # Inputs, outputs of tanh, predictions and labels, and what the loss keeps: of 20 examples in float64.
    told = re.findall(r"derivatives take (\d+) kB, so those of the 4 batches .* about (\d+) kB", caplog.text)
    (one, four) = map(int, *told)
    assert 8 * 20 * (5 + 512) / 1000 <= one <= 8 * 20 * (5 + 512 + 8) / 1000 + 1
    assert four == pytest.approx(4 * one, abs=4)


class Recurrent(nn.Module):
    """An LSTM over the inputs one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])
        return out


@pytest.mark.parametrize(
    ("network", "options", "told"),
    [
        (Recurrent, {"solver": Neumann(num_terms=1)}, True),
        (Recurrent, {"solver": Neumann(num_terms=1), "curvature": FiniteDifference()}, False),
        (Recurrent, {}, False),  # the default forms no products
        (Recurrent, {"at": Current()}, True),  # here Neumann() is
        (net, {"solver": Neumann(num_terms=1)}, False),
    ],
)
def test_the_cheaper_products_of_an_lstm_are_told(
    network: Any, options: dict[str, Any], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    callback = HypergradientCallback(WeightDecay(), every_n_steps=1, warmup_steps=0, **options)
    loaders = DataLoader(data(8, 1), 8), DataLoader(data(8, 2), 8)
    trainer(callback, max_steps=1).fit(Regression(network().double()), *loaders)
    assert ("nn.LSTM" in caplog.text) is told


class NetworkOnly(Regression):
    """Its optimizer moves the network alone."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", ["sparse", "lazy"])
def test_tensors_without_memory_do_not_count(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A graph's adjacency, and a layer that no batch reaches."""
    module = NetworkOnly(net())
    if kind == "sparse":
        module.register_buffer("adjacency", torch.eye(4).to_sparse())
    else:
        module.unused = nn.LazyLinear(3)
    callback = HypergradientCallback(
        WeightDecay(), every_n_steps=1, warmup_steps=0, solver=Neumann(num_terms=1), at=Current()
    )
    fit = trainer(callback, accumulate_grad_batches=2)
    fit.fit(module, DataLoader(data(16, 1), 4), DataLoader(data(8, 2), 8))
    assert callback.outer_steps
    assert "keeps for derivatives" in caplog.text


def test_of_a_slice_its_own_entries_count() -> None:
    w, table = torch.randn(8, requires_grad=True), torch.randn(10_000, 8)
    batch = table[40:44]
    assert graph_bytes((batch @ w).sum(), [w]) == batch.numel() * batch.element_size()
    # Two slices of one tensor are not more than that tensor.
    whole = table[:4]
    product = ((whole @ w) * (whole @ w)).sum()
    assert (graph_bytes(product, [w]) or 0) <= 4 * 8 * 4 + 2 * 4 * 4
