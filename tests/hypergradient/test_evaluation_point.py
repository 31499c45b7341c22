"""LookAhead: closed forms of the predicted weights and of the trust radius; weights that are placed for a while."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_nested.hypergradient import LookAhead
from lightning_nested.hypergradient.evaluation_point import placed_at
from tests.cases import DOUBLE
from tests.conftest import Normal


def test_weights_move_along_z_within_the_radius_of_each_tensor() -> None:
    w = torch.tensor([3.0, 4.0], dtype=DOUBLE), torch.tensor([[2.0]], dtype=DOUBLE)
    z = torch.tensor([0.0, 10.0], dtype=DOUBLE), torch.tensor([[0.1]], dtype=DOUBLE)
    far, near = LookAhead().weights(w, z, 0.2)
    assert far.tolist() == pytest.approx([3.0, 3.0])  # a step of 0.2 · 5 of the 10 asked for
    assert near.tolist() == [[pytest.approx(1.9)]]  # all of it: 0.1 < 0.2 · 2
    assert w[0].tolist() == [3.0, 4.0]


def test_weights_of_zero_and_directions_of_zero_stay_where_they_are(normal: Normal) -> None:
    w = torch.zeros(3, dtype=DOUBLE), normal(2)
    z = normal(3), torch.zeros(2, dtype=DOUBLE)
    moved = LookAhead().weights(w, z, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(moved, w, strict=True))


def test_the_radius_grows_by_a_half_and_halves_within_its_bounds() -> None:
    point = LookAhead(start_radius=0.1, min_radius=0.04, max_radius=0.2)
    grown = [point.next_radius(0.1, fell=True)]
    grown.append(point.next_radius(grown[-1], fell=True))
    assert grown == pytest.approx([0.15, 0.2])
    shrunk = [point.next_radius(0.1, fell=False)]
    shrunk.append(point.next_radius(shrunk[-1], fell=False))
    assert shrunk == pytest.approx([0.05, 0.04])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_radius": 0.0}, "start_radius must be"),
        ({"min_radius": math.nan}, "min_radius must be"),
        ({"start_radius": 2.0}, "Got 0.02, 2.0, 1.0"),
        ({"refresh_every": 0}, "refresh_every must be"),
    ],
)
def test_bad_arguments(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LookAhead(**options)  # type: ignore[arg-type]


def test_placed_weights_are_there_for_a_while_and_leave_graphs_whole(normal: Normal) -> None:
    """A graph of w that was made before is differentiated at w afterwards, once and twice."""
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DOUBLE), normal(5, 3)
    parameters = tuple(net.parameters())
    kept = [p.detach().clone() for p in parameters]
    storage = [p.data_ptr() for p in parameters]
    moved, v = tuple(normal(*p.shape) for p in parameters), tuple(normal(*p.shape) for p in parameters)

    def products(disturb: bool) -> tuple[torch.Tensor, ...]:
        loss = net(x).square().mean()
        if disturb:
            with placed_at(parameters, moved):
                assert all(torch.equal(p, m) for p, m in zip(parameters, moved, strict=True))
                elsewhere = net(x).square().mean()
                torch.autograd.grad(elsewhere, parameters)
            assert not torch.equal(elsewhere, loss)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        return (*gradient, *torch.autograd.grad(gradient, parameters, v))

    plain, disturbed = products(False), products(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, disturbed, strict=True))
    assert all(torch.equal(p, k) for p, k in zip(parameters, kept, strict=True))
    assert [p.data_ptr() for p in parameters] == storage


def test_placed_weights_go_back_after_an_exception(normal: Normal) -> None:
    p = nn.Parameter(normal(3))
    before = p.detach().clone()
    with pytest.raises(KeyError), placed_at([p], [normal(3)]):
        raise KeyError("outputs")
    assert torch.equal(p, before)
