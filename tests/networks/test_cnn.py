import pytest
import torch
from torch.nn.functional import cross_entropy

from lightning_nested.networks import SmallCNN
from tests.conftest import Normal


@pytest.mark.parametrize("side", [8, 13, 28])
def test_any_side_from_eight_fits(side: int) -> None:
    assert SmallCNN(in_channels=2, num_classes=7, width=4)(torch.zeros(3, 2, side, side)).shape == (3, 7)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_hessian_product_agrees_with_differences_of_gradients(batch_norm: bool, normal: Normal) -> None:
    network = SmallCNN(width=2, num_classes=3, batch_norm=batch_norm).double()
    x, y = normal(6, 1, 8, 8), torch.arange(6) % 3
    params = tuple(network.parameters())
    vector = [normal(*p.shape) for p in params]

    def gradient() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(cross_entropy(network(x), y), params, create_graph=True)

    product = torch.autograd.grad(gradient(), params, vector)
    step = 1e-6  # error of the central difference: O(step²) + 1e-16 / step
    shifted = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, v in zip(params, vector, strict=True):
                p.add_(v, alpha=sign * step)
        shifted.append([g.detach() for g in gradient()])
        with torch.no_grad():
            for p, v in zip(params, vector, strict=True):
                p.sub_(v, alpha=sign * step)
    for got, plus, minus in zip(product, *shifted, strict=True):
        torch.testing.assert_close(got, (plus - minus) / (2 * step), rtol=1e-5, atol=1e-7)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width must be at least 1\. Got 0"):
        SmallCNN(width=0)
