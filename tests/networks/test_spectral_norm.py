import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_nested.networks import (
    SpectralNormConv2d,
    SpectralNormEmbedding,
    SpectralNormLinear,
    frozen_power_iteration,
)
from lightning_nested.networks.spectral_norm import iterate_spectral_norms

CASES: list[tuple[Callable[[], nn.Module], nn.Module, Tensor]] = [
    (lambda: SpectralNormConv2d(3, 5, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 6, 6)),
    (lambda: SpectralNormLinear(4, 7), nn.Linear(4, 7), torch.randn(3, 4)),
    (lambda: SpectralNormEmbedding(10, 6), nn.Embedding(10, 6), torch.tensor([0, 9, 3])),
]


@pytest.fixture(params=range(3), ids=["conv", "linear", "embedding"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """Ours and torch's with the same weights and vectors, and an input, in float64."""
    make, theirs, x = CASES[request.param]
    ours, theirs = make().double(), copy.deepcopy(theirs).double()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            value.copy_(ours.get_parameter(name))
    theirs = nn.utils.spectral_norm(theirs, eps=1e-8)  # v first, then u, as in the paper
    theirs.weight_u.copy_(ours.u)  # type: ignore[operator]
    theirs.weight_v.copy_(ours.v)  # type: ignore[operator]
    return ours, theirs, x.double() if x.is_floating_point() else x


def gradient(module: nn.Module, x: Tensor) -> Tensor:
    loss = module(x).sin().sum()
    weight = next(p for name, p in module.named_parameters() if "weight" in name)
    (g,) = torch.autograd.grad(loss, weight)
    return g


def test_equals_torch_over_train_and_evaluation(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    ours, theirs, x = pair
    for mode in (True, True, False, True, False, False):
        ours.train(mode)
        theirs.train(mode)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(ours, x), gradient(theirs, x), rtol=1e-11, atol=1e-13)


def test_equals_torch_parametrization_with_the_same_vectors(
    pair: tuple[nn.Module, nn.Module, Tensor],
) -> None:
    """The parametrization iterates u first, then v, so the two agree where vectors are given."""
    ours, _, x = pair
    ours(x)
    plain = {
        SpectralNormConv2d: nn.Conv2d,
        SpectralNormLinear: nn.Linear,
        SpectralNormEmbedding: nn.Embedding,
    }
    theirs = plain[type(ours)].__new__(plain[type(ours)])
    theirs.__dict__.update(copy.deepcopy(ours).__dict__)
    theirs = parametrizations.spectral_norm(theirs, eps=1e-8)
    parametrization = theirs.parametrizations.weight[0]  # type: ignore[union-attr,index]
    parametrization._u.copy_(ours.u)  # type: ignore[operator,union-attr]
    parametrization._v.copy_(ours.v)  # type: ignore[operator,union-attr]
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(ours, x), gradient(theirs, x), rtol=1e-11, atol=1e-13)


def test_converges_to_the_largest_singular_value(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    ours, _, x = pair
    for _ in range(2000):
        ours(x)
    exact = torch.linalg.svdvals(ours.weight.detach().flatten(1))[0]
    torch.testing.assert_close(ours.singular_value(), exact, rtol=1e-6, atol=0)
    ours.eval()
    largest = torch.linalg.svdvals(ours.normalized_weight().detach().flatten(1))[0]
    torch.testing.assert_close(largest, torch.ones((), dtype=torch.float64), rtol=1e-6, atol=0)


def test_frozen_it_is_one_function_of_the_weight(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    ours, _, x = pair
    ours(x)
    before = {name: value.clone() for name, value in ours.named_buffers()}
    with frozen_power_iteration(ours):
        assert ours.training
        first, second = ours(x), ours(x)
        torch.testing.assert_close(
            gradient(ours, x), torch.autograd.grad(first.sin().sum(), ours.weight)[0], rtol=0, atol=0
        )
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in ours.named_buffers())
    assert not torch.equal(ours(x), first)  # and afterwards the iteration goes on


def test_gradcheck_of_the_frozen_function() -> None:
    layer = SpectralNormLinear(3, 2).double()
    x = torch.randn(2, 3, dtype=torch.float64)

    def f(weight: Tensor) -> Tensor:
        with frozen_power_iteration(layer):
            return torch.func.functional_call(layer, {"weight": weight}, (x,))

    weight = layer.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(f, weight)
    assert torch.autograd.gradgradcheck(f, weight)


def test_a_graph_survives_later_iterations() -> None:
    layer = SpectralNormLinear(3, 2)
    x = torch.randn(2, 3)
    first = layer(x).sum()
    (expected,) = torch.autograd.grad(first, layer.weight, retain_graph=True)
    layer(x)
    layer.eval()
    layer(x)
    (again,) = torch.autograd.grad(first, layer.weight)
    assert torch.equal(again, expected)


def test_frozen_comes_back_after_an_error() -> None:
    layer = SpectralNormLinear(3, 2)
    with pytest.raises(RuntimeError, match="inside"), frozen_power_iteration(layer):
        raise RuntimeError("inside")
    assert not layer.frozen


def test_autocast_leaves_the_iteration_in_full_precision() -> None:
    layer = SpectralNormLinear(64, 64)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    twin(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(layer.u, twin.u)


# ---- the spectral norms of torch


class UnitSize(nn.Module):
    """A parametrization of a user's own: weight / r, where r follows the weight's size in train mode."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("r", weight.detach().norm())
        self.r: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.r = 0.5 * self.r + 0.5 * weight.norm()
        return weight / self.r


def own_parametrization(layer: nn.Linear) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", UnitSize(layer.weight))
    return layer


NORMS = [parametrizations.spectral_norm, nn.utils.spectral_norm, own_parametrization]


@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_other_kinds_are_frozen(norm: Callable[..., nn.Module]) -> None:
    layer = norm(nn.Linear(4, 7).double())
    with torch.no_grad():
        for value in layer.parameters():
            value.mul_(1.5)
            value[0].mul_(3.0)
    x = torch.randn(3, 4, dtype=torch.float64)
    layer(x)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    with frozen_power_iteration(nn.Sequential(layer)):
        assert layer.training
        first, second = layer(x), layer(x)
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in layer.named_buffers())
    assert all(part.training for part in layer.modules())
    assert not torch.equal(layer(x), first)
    first.sum().backward()  # the later iteration has not changed what this graph holds


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_norms_of_other_kinds_are_matched_to_changed_weights(
    norm: Callable[..., nn.Module], training: bool
) -> None:
    layer = norm(nn.Linear(4, 7).double()).train(training)
    with torch.no_grad():
        next(p for name, p in layer.named_parameters() if "weight" in name).copy_(torch.eye(7, 4) * 3)
    iterate_spectral_norms(layer, times=60, of_training_only=not training)
    order = "fro" if norm is own_parametrization else 2
    size = torch.linalg.matrix_norm(layer.weight, ord=order).item()  # type: ignore[arg-type]
    # In evaluation mode a forward would not have iterated: nothing is done on request.
    assert (abs(size - 1) < 1e-6) == training
    assert all(part.training == training for part in layer.modules())
