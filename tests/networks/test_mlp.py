import pytest
import torch

from lightning_nested.networks import MLP
from tests.conftest import Normal


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_forward_is_the_formula(activation: str, normal: Normal) -> None:
    network = MLP(12, hidden=(5,), num_classes=3, activation=activation).double()
    first, second = (layer for layer in network.layers if isinstance(layer, torch.nn.Linear))
    x = normal(4, 3, 2, 2)
    sigma = getattr(torch, activation)
    expected = sigma(x.reshape(4, 12) @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(network(x), expected)


def test_no_hidden_layer_is_a_linear_model() -> None:
    network = MLP(6, hidden=(), num_classes=2, flatten=False)
    assert [type(layer) for layer in network.layers] == [torch.nn.Linear]
    assert sum(p.numel() for p in network.parameters()) == 6 * 2 + 2


def test_dropout_acts_in_train_mode_only() -> None:
    network = MLP(6, hidden=(50,), num_classes=2, dropout=0.5)
    x = torch.ones(1, 6)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "rleu"}, "'relu' or 'tanh'. Got 'rleu'"),
        ({"dropout": 1.0}, r"\[0, 1\)\. Got 1\.0"),
        ({"hidden": (3, 0)}, r"hidden must be at least 1\. Got \(3, 0\)"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(4, **options)  # type: ignore[arg-type]
