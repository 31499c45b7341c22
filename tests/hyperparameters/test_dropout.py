"""Dropout and drop-connect: equal to torch's layers, per example, relaxed, copied."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nested.hyperparameters import (
    DropConnect,
    DropoutRates,
    HyperparameterVector,
)
from lightning_nested.networks import LSTMNetwork, SequenceDropout, WordDropout
from tests.hyperparameters.built import DOUBLE, built


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Dropout2d(0.2), nn.Flatten(), nn.Dropout(0.4), nn.Linear(144, 2)
    )


def test_installed_dropout_is_that_of_torch() -> None:
    net, rates = network().double(), DropoutRates()
    rates.install(net)
    rates.build(DOUBLE)
    torch.testing.assert_close(rates.values()["rates"], torch.tensor([0.2, 0.4], dtype=torch.float64))
    x = torch.ones(400, 4, 6, 6, dtype=torch.float64)
    channels = net[1](x)
    assert bool((channels.amax(dim=(2, 3)) == channels.amin(dim=(2, 3))).all())
    assert channels.unique().tolist() == pytest.approx([0.0, 1 / 0.8])
    units = net[3](x.flatten(1))
    assert float((units == 0).double().mean()) == pytest.approx(0.4, abs=0.01)  # 57 600 units: ± 0.002
    assert float(units.mean()) == pytest.approx(1.0, abs=0.02)
    net.eval()
    assert torch.equal(net[3](x), x)


def test_each_example_has_its_own_rate() -> None:
    net, rates = network().double(), DropoutRates(per="model", init=0.3)
    rates.install(net)
    rates.build(DOUBLE)
    vector = HyperparameterVector([rates])
    h = torch.tensor([[-30.0], [0.0]], dtype=torch.float64)
    with vector.bound(h):
        out = net[3](torch.ones(2, 5_000, dtype=torch.float64))
    dropped = (out == 0).double().mean(dim=1)
    assert float(dropped[0]) == 0.0
    assert float(dropped[1]) == pytest.approx(0.45, abs=0.03)  # half of upper=0.9; standard error 0.007


def test_relaxed_dropout_has_a_derivative_and_hard_dropout_none() -> None:
    x = torch.ones(3000, 4, dtype=torch.float64)
    hard = built(DropoutRates(init=0.3))
    assert not hard(x).requires_grad
    soft = built(DropoutRates(init=0.3, temperature=0.05))
    out = soft(x)
    assert float(out.detach().mean()) == pytest.approx(1.0, abs=0.03)
    assert float(((out > 0.05) & (out < 1.3)).double().mean()) < 0.2  # nearly a mask
    (found,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), soft.tensors["rates"])
    assert float(found.abs()) > 0


def test_rates_survive_copies_and_revert() -> None:
    net, rates = network(), DropoutRates()
    rates.install(net)
    rates.build({"w": torch.zeros(1)})
    rates.tensors["rates"].data.fill_(0.0)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    for layer in (twin[1], twin[3]):
        layer.revert()
    assert (type(twin[1]), type(twin[3])) == (nn.Dropout2d, nn.Dropout)
    assert (twin[1].p, twin[3].p) == pytest.approx((0.45, 0.45))
    assert twin[3](torch.ones(5)).shape == (5,)


def test_drop_connect_drops_matrices() -> None:
    drop = built(DropConnect(init=0.25, include=["*.weight"]))
    weights = {"a.weight": torch.ones(200, 50), "a.bias": torch.ones(200), "other": torch.ones(3, 3)}
    out = drop(weights)
    assert float((out["a.weight"] == 0).float().mean()) == pytest.approx(0.25, abs=0.02)  # ± 0.004
    assert float(out["a.weight"].max()) == pytest.approx(1 / 0.75)
    assert torch.equal(out["a.bias"], weights["a.bias"])
    assert torch.equal(out["other"], weights["other"])


def test_layers_for_sequences_are_tuned_as_they_drop() -> None:
    network, rates = (
        LSTMNetwork(9, width=200, word_dropout=0.2, input_dropout=0.4, output_dropout=0.3),
        DropoutRates(),
    )
    rates.install(network)
    rates.build(DOUBLE)
    assert rates.layer_names == ("dropouts.words", "dropouts.input", "dropouts.output")
    x, words = torch.ones(3, 5, 200, dtype=torch.float64), torch.tensor([[0, 1, 2, 1, 0]] * 3)
    units = network.dropouts["input"](x)
    assert torch.equal(units, units[:, :1].expand_as(units))
    assert units.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    whole = network.dropouts["words"](x, words)
    assert all(len(whole[words == w].unique()) == 1 for w in range(3))
    network.eval()
    assert network.dropouts["words"](x, words) is x


def test_a_module_s_layers_are_found_for_a_fit_and_are_plain_after_it() -> None:
    net, rates = nn.Sequential(nn.Dropout(0.2), SequenceDropout(0.3), WordDropout(0.4)), DropoutRates()
    for _ in range(2):
        rates.attach_module(net)
        rates.build(DOUBLE)
        assert [type(layer).__name__ for layer in net] == [
            "TunedDropout", "TunedSequenceDropout", "TunedWordDropout",
        ]  # fmt: skip
        rates.tensors["rates"].data.fill_(0.0)
        rates.detach_module()
        assert [type(layer) for layer in net] == [nn.Dropout, SequenceDropout, WordDropout]
        assert [layer.p for layer in net] == pytest.approx([0.45] * 3)
    # Those that were installed by hand stay.
    rates = DropoutRates()
    rates.install(net)
    rates.attach_module(net)
    rates.detach_module()
    assert type(net[0]).__name__ == "TunedDropout"


@pytest.mark.parametrize(("per", "count"), [("model", 1), ("tensor", 2), ("parameter", 10_100)])
def test_drop_connect_has_rates_of_tensors_or_weights(per: Any, count: int) -> None:
    parameters = {
        "net.a.weight": torch.ones(100, 100),
        "net.b.weight": torch.ones(10, 10),
        "net.a.bias": torch.ones(9),
    }
    drop = DropConnect(0.25, include="*.weight", per=per, temperature=0.1)
    drop.build(parameters)
    assert sum(t.numel() for t in drop.tensors.values()) == count
    out = drop({name.removeprefix("net."): p for name, p in parameters.items()})
    assert float(out["a.weight"].detach().mean()) == pytest.approx(1.0, abs=0.05)
    assert out["a.bias"] is parameters["net.a.bias"]
    found = torch.autograd.grad(
        out["a.weight"].square().sum() + out["b.weight"].sum(), list(drop.tensors.values())
    )
    assert all(float(g.abs().max()) > 0 for g in found)
    if per != "model":
        drop.tensors["net.a.weight"].data.fill_(-8.0)
        kept = drop({"a.weight": torch.ones(100, 100)})["a.weight"].detach()
        # Three of 10 000 weights are dropped at 3e-4.
        assert float((kept - 1).abs().mean()) < 0.005


def test_weights_without_a_rate_of_their_own_are_refused() -> None:
    parameters = {"a.weight": torch.ones(3, 3), "b.weight": torch.ones(3, 3)}
    with pytest.raises(
        ValueError, match=r"include must match.*Got \('gone',\), which matches none of a.weight"
    ):
        DropConnect(include="gone", per="tensor").build(parameters)
    drop = DropConnect(per="tensor")
    # Before a fit has built them: as a first look at the loss does.
    assert drop({"c": torch.ones(3, 3)})["c"].shape == (3, 3)
    drop.build(parameters)
    for name in ("c", "weight"):
        with pytest.raises(ValueError, match=rf"must be one of \['a.weight', 'b.weight'\].*Got '{name}'"):
            drop({name: torch.ones(3, 3)})
    with pytest.raises(ValueError, match="temperature must be positive"):
        DropConnect(temperature=0.0)


def test_layers_stay_plain_where_one_of_them_cannot_be_tuned() -> None:
    network = nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2), nn.Dropout(0.0))
    rates = DropoutRates()
    with pytest.raises(ValueError, match=r"Got 0.0 of dropout layer '2'; give init="):
        rates.attach_module(network)
    assert [type(network[i]) for i in (0, 2)] == [nn.Dropout, nn.Dropout]
    DropoutRates(init=0.3).attach_module(network)
    assert nn.Dropout not in [type(network[i]) for i in (0, 2)]
