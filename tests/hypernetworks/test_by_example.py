"""One point of each example where layers have no rule of their own: each example alone, at its point."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_nested.hypernetworks import best_response
from lightning_nested.hyperparameters import DropoutRates
from lightning_nested.hyperparameters.vector import HyperparameterVector
from tests.hypernetworks.networks import BATCH, ONE_POINT, WHOLE, N, made, point


class ImageTransformer(nn.Module):
    """Patches, a class token, positional embeddings, attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


def case(name: str) -> tuple[Any, Tensor]:
    if name != "image transformer":
        response, _, x = made(name)
        return response, x
    torch.manual_seed(0)
    response = best_response(ImageTransformer().double(), N)
    for p in response.response_parameters().values():
        nn.init.normal_(p, std=0.3)
    return response.eval(), torch.randn(BATCH, 1, 4, 4, dtype=torch.float64)


# Torch has no batching rule for weight norm, and runs a loop over the examples.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("mode", ["response", "linearized"])
@pytest.mark.parametrize("name", ["image transformer", *ONE_POINT, *WHOLE])
def test_each_example_is_at_its_point(name: str, mode: Any) -> None:
    response, x = case(name)
    assert response.one_point_only()
    h = point(BATCH)
    if (name, mode) == ("weight norm", "linearized"):
        with pytest.raises(ValueError, match=r"Got: .*forward AD"), response.at(h, mode):
            response(x)
        return
    with response.at(h, mode):
        together = response(x)
    parts = []
    for i in range(BATCH):
        with response.at(h[i], mode):
            parts.append(response(x[i : i + 1]))
    alone = torch.cat(parts)
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)
    u = torch.randn_like(alone)
    parameters = list(response.parameters())
    for p, q in zip(
        torch.autograd.grad((u * together).sum(), parameters, allow_unused=True, materialize_grads=True),
        torch.autograd.grad((u * alone).sum(), parameters, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_without_graph_in_evaluation_mode() -> None:
    """Torch's own fused transformer layer, which runs there, is no obstacle."""
    response, x = case("image transformer")
    h = point(BATCH)
    expected = response(x, h)
    with torch.no_grad():
        torch.testing.assert_close(response(x, h), expected, rtol=1e-12, atol=1e-12)
    assert torch.backends.mha.get_fastpath_enabled()


class Time(nn.Module):
    """Over (time, batch, …), with a number that all examples share and a mask by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, power: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = (self.scale * x) ** power * mask.unsqueeze(-1)
        return y, y.sum(0, keepdim=True)


def test_another_dimension_of_examples_and_several_arguments() -> None:
    response = best_response(Time().double(), N, batch_dim=1)
    for p in response.response_parameters().values():
        nn.init.normal_(p)
    x, mask, h = torch.randn(2, BATCH, 3).double(), torch.rand(2, BATCH).double(), point(BATCH)
    power = torch.tensor(2.0)
    with response.at(h):
        found, totals = response(x, power, mask=mask)
    for i in range(BATCH):
        with response.at(h[i]):
            expected, total = response(x[:, i : i + 1], power, mask=mask[:, i : i + 1])
        torch.testing.assert_close(found[:, i : i + 1], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(totals[:, i : i + 1], total, rtol=1e-12, atol=1e-12)


def test_dropout_differs_between_examples() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(100))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.scale * x, 0.5)

    masks = best_response(Dropped(), N)(torch.ones(2, 100), torch.zeros(2, N)) > 0
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize(("shape", "layer"), [((4000,), nn.Dropout(0.5)), ((4000, 1, 1), nn.Dropout2d(0.5))])
@pytest.mark.parametrize("per", ["layer", "model"])
def test_each_example_has_its_own_tuned_dropout(shape: tuple[int, ...], layer: nn.Module, per: Any) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.drop, self.last = (
                nn.Parameter(torch.ones(1)),
                copy.deepcopy(layer),
                nn.Dropout(0.5),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.drop(self.scale * x))

    rates, response = DropoutRates(per=per), best_response(Dropped(), N)
    rates.install(response)
    rates.build({})
    wanted = torch.tensor([[0.1, 0.2], [0.8, 0.5]])[:, : rates.raw("rates").numel()]
    vector = HyperparameterVector([rates])
    with vector.bound(rates.transform.inverse(wanted)), response.at(torch.zeros(2, N)):
        found = response(torch.ones(2, *shape))
    keep = (1 - wanted).expand(2, 2).prod(dim=1)
    kept = (found != 0).double().flatten(1).mean(dim=1)
    # Five standard deviations of a mean of 4000 zeros and ones.
    assert ((kept - keep).abs() < 5 * (keep * (1 - keep) / 4000).sqrt()).all()
    values = found.flatten(1).amax(dim=1)
    torch.testing.assert_close(values, 1 / keep, rtol=1e-5, atol=0)
    assert rates.raw("rates").dim() == 1


def test_what_couples_examples_is_refused() -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.norm = nn.Parameter(torch.ones(3)), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.scale * x)

    response, x = best_response(Coupled(), N), torch.randn(BATCH, 3)
    with pytest.raises(ValueError, match="BatchNorm1d 'norm' with statistics of the batch"):
        response(x, torch.zeros(BATCH, N))
    assert response.eval()(x, torch.zeros(BATCH, N)).shape == (BATCH, 3)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: (self.scale * x).sum(), r"outputs with the examples in dimension 0\. Got \(\)"),
        (lambda self, x: self.scale * x * float(x.sum() > 0), r"runs under torch\.vmap\. Got: .*vmap"),
    ],
    ids=["a mean", "a branch on values"],
)
def test_modules_that_cannot_run_one_example_at_a_time(forward: Any, message: str) -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    Bad.forward = forward
    with pytest.raises(ValueError, match=message):
        best_response(Bad(), N)(torch.randn(BATCH, 3), torch.zeros(BATCH, N))


def test_an_input_of_another_number_of_examples() -> None:
    response, x = case("image transformer")
    with pytest.raises(ValueError, match=r"as h has rows, 7\. Got shapes \[\(4, 1, 4, 4\)\]"):
        response(x, point(7))


class Masked(nn.Module):
    """Sums over the places that a mask lets through; a layer without a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return mask @ (x * self.weight)


@pytest.mark.parametrize("length", [BATCH, BATCH + 1])
def test_a_mask_as_long_as_the_batch_is_not_taken_for_examples(length: int) -> None:
    response = best_response(Masked().double(), N)
    x, mask = torch.randn(BATCH, length, 3).double(), torch.ones(length, length).double()
    with response.at(point(BATCH)):
        if length == BATCH:
            with pytest.raises(ValueError, match="which may be a mask for all"):
                response(x, mask)
        else:
            assert response(x, mask).shape == x.shape
