"""The augmentation network: identity at first, random, bounded, and learned by the callback."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_nested import HypergradientCallback, ImageClassifier
from lightning_nested.networks import AugmentationNetwork
from tests.trainers import trainer


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 28, 28), (1, 2, 7, 5)])
def test_it_is_the_identity_until_it_is_trained(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    assert torch.equal(AugmentationNetwork(shape[1], width=2)(images), images)


def test_changes_are_random_bounded_and_of_each_image() -> None:
    network = AugmentationNetwork(width=2, strength=0.25)
    nn.init.normal_(network.out.weight, std=1.0)
    images = torch.rand(1, 1, 8, 8).expand(3, 1, 8, 8)
    first, second = network(images).detach(), network(images).detach()
    assert not torch.allclose(first, second)
    assert not torch.allclose(first[0], first[1])  # the same image twice in a batch
    assert 0.01 < float((first - images).abs().max()) <= 0.25 + 1e-6


def test_the_mixed_derivative_is_a_difference_of_gradients() -> None:
    torch.manual_seed(0)
    network, classifier = AugmentationNetwork(width=2).double(), nn.Linear(64, 3).double()
    nn.init.normal_(network.out.weight, std=0.1)
    images, labels = torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.arange(5) % 3

    def slope() -> torch.Tensor:
        torch.manual_seed(1)
        loss = cross_entropy(classifier(network(images).flatten(1)), labels)
        return torch.autograd.grad(loss, classifier.weight, create_graph=True)[0]

    v, w = torch.randn(3, 64, dtype=torch.float64), network.down[0].weight
    (mixed,) = torch.autograd.grad((slope() * v).sum(), w)
    direction, step = torch.randn_like(w), 1e-5
    values = []
    for sign in (1, -1):
        w.data.add_(direction, alpha=sign * step)
        values.append((slope() * v).sum().detach())
        w.data.sub_(direction, alpha=sign * step)
    difference = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((mixed * direction).sum(), difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_the_callback_learns_it_and_the_training_does_not(rate: float) -> None:
    torch.manual_seed(0)
    augmentation = AugmentationNetwork(width=2)
    module = ImageClassifier("mlp", network_options={"hidden": [8]}, augmentation=augmentation)
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=20)
    sgd = lambda tensors: torch.optim.SGD(tensors, lr=rate)  # noqa: E731
    tuner = HypergradientCallback("augmentation", every_n_steps=1, warmup_steps=0, optimizer=sgd)
    trainer(tuner, max_epochs=2, limit_val_batches=0).fit(module, data, data)
    assert tuner.outer_steps == 4
    assert bool(augmentation.out.weight.any()) == (rate > 0)


def test_evaluation_does_not_augment() -> None:
    module = ImageClassifier(
        "mlp", network_options={"hidden": [8]}, augmentation=AugmentationNetwork(width=2)
    )
    nn.init.normal_(module.augmentation.out.weight, std=1.0)
    batch = torch.rand(4, 1, 8, 8), torch.arange(4)
    assert module.outer_loss(batch) == module.outer_loss(batch)
    assert module.training_loss(batch) != module.training_loss(batch)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"width": 0}, "width"), ({"noise_channels": 0}, "noise_channels"), ({"strength": 0.0}, "strength")],
)
def test_refusals(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AugmentationNetwork(**options)  # type: ignore[arg-type]
