from math import exp, log

import pytest
import torch
from torch import Tensor

from lightning_nested.anneal import annealed
from lightning_nested.modules import (
    R1,
    R2,
    AdversarialLoss,
    Anneal,
    DiffAugment,
    GradientPenalty,
    Hinge,
    NonSaturating,
    RelativisticPairing,
    Wasserstein,
)


@pytest.mark.parametrize(
    ("loss", "discriminator", "generator"),
    [
        (Hinge(), (0.5 + 0.0) / 2 + (1.0 + 3.0) / 2, -1.0),
        (NonSaturating(), None, None),
        (Wasserstein(), 1.0 - 1.25, -1.0),
    ],
)
def test_values(loss: AdversarialLoss, discriminator: float | None, generator: float | None) -> None:
    real = torch.tensor([0.5, 2.0], dtype=torch.float64)
    fake = torch.tensor([0.0, 2.0], dtype=torch.float64)
    if discriminator is None or generator is None:  # from the sigmoid's logarithms

        def log_sigmoid(x: Tensor) -> float:
            return sum(-log(1 + torch.exp(-v).item()) for v in x) / len(x)

        discriminator, generator = -log_sigmoid(real) - log_sigmoid(-fake), -log_sigmoid(fake)
    assert loss.discriminator(real, fake).item() == pytest.approx(discriminator, abs=1e-12)
    assert loss.generator(fake).item() == pytest.approx(generator, abs=1e-12)


def test_the_pairing_loss_compares_each_fake_with_a_real_example() -> None:
    """Pairs (½, 0) and (2, 3): D(x) − D(G(z)) = ½ and −1."""
    loss = RelativisticPairing()
    real = torch.tensor([0.5, 2.0], dtype=torch.float64)
    fake = torch.tensor([0.0, 3.0], dtype=torch.float64)

    def softplus(x: float) -> float:
        return log(1 + exp(x))

    expected = (softplus(-0.5) + softplus(1.0)) / 2, (softplus(0.5) + softplus(-1.0)) / 2
    assert loss.discriminator(real, fake).item() == pytest.approx(expected[0], abs=1e-12)
    assert loss.generator(fake, real).item() == pytest.approx(expected[1], abs=1e-12)
    # Only differences count.
    assert loss.generator(fake + 7, real + 7).item() == pytest.approx(expected[1], abs=1e-12)
    for missing in (None, real[:1]):
        with pytest.raises(
            ValueError, match=r"needs a real score for each fake one. Got (none|\(1,\)) beside \(2,\)"
        ):
            loss.generator(fake, missing)


def quadratic(images: Tensor) -> Tensor:
    """½‖x‖² per example: its gradient is x."""
    return 0.5 * images.square().flatten(1).sum(dim=1)


def test_penalties_of_a_quadratic() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    norms = real.flatten(1).norm(dim=1)
    r1 = R1(weight=6.0).penalty(quadratic, real, real, generator)
    assert r1.item() == pytest.approx(3.0 * norms.square().mean().item())
    fake = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    r2 = R2(weight=6.0).penalty(quadratic, real, fake, generator)
    assert r2.item() == pytest.approx(3.0 * fake.flatten(1).square().sum(dim=1).mean().item())
    # Between equal images every mix is the image itself.
    gp = GradientPenalty(weight=2.0).penalty(quadratic, real, real, generator)
    assert gp.item() == pytest.approx(2.0 * (norms - 1).square().mean().item(), rel=1e-9)


def test_penalties_have_gradients_in_the_parameters() -> None:
    scale = torch.tensor(1.5, requires_grad=True)
    real = torch.randn(4, 1, 2, 2)
    penalty = R1(weight=2.0).penalty(lambda x: scale * quadratic(x), real, real)
    (found,) = torch.autograd.grad(penalty, scale)
    # d/ds s² E‖x‖² = 2 s E‖x‖²
    assert found.item() == pytest.approx(3.0 * real.square().flatten(1).sum(dim=1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("policy", [("color",), ("translation",), ("cutout",), DiffAugment().policy])
def test_augmentation_keeps_shape_and_gradients(policy: tuple[str, ...]) -> None:
    images = torch.rand(5, 3, 32, 32, requires_grad=True)
    changed = DiffAugment(policy)(images, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert changed.shape == images.shape
    assert not torch.equal(changed, images)
    (gradient,) = torch.autograd.grad(changed.sum(), images)
    assert gradient.abs().sum() > 0
    again = DiffAugment(policy)(images, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert torch.equal(again, changed)


def test_translation_moves_whole_pixels_and_fills_with_zero() -> None:
    image = torch.zeros(200, 1, 32, 32)
    image[:, :, 16, 16] = 1
    moved = DiffAugment(("translation",))(image, torch.Generator().manual_seed(0))
    where = moved.flatten(1).argmax(dim=1)
    rows, columns = where // 32 - 16, where % 32 - 16
    assert torch.equal(moved.sum(dim=(1, 2, 3)), torch.ones(200))
    for shift in (rows, columns):
        assert shift.min() == -4
        assert shift.max() == 4
    ones = DiffAugment(("translation",))(torch.ones(50, 1, 32, 32), torch.Generator().manual_seed(0))
    assert ones.min() == 0
    assert set(ones.unique().tolist()) == {0.0, 1.0}


def test_cutout_removes_at_most_a_quarter() -> None:
    changed = DiffAugment(("cutout",))(torch.ones(50, 1, 32, 32), torch.Generator().manual_seed(0))
    removed = (changed == 0).sum(dim=(1, 2, 3))
    assert removed.max() == 256
    assert removed.min() > 0


def test_augmentation_changes_a_share_of_images() -> None:
    images = torch.ones(4000, 1, 8, 8)
    for probability in (0.0, 0.3, 1.0):
        augment = DiffAugment(("cutout",), probability)
        changed = augment(images, torch.Generator().manual_seed(0)) != images
        share = changed.flatten(1).any(dim=1).double().mean().item()
        # Five standard deviations of a mean of 4 000 draws.
        assert share == pytest.approx(probability, abs=5 * (probability * (1 - probability) / 4000) ** 0.5)
    both = DiffAugment(("translation", "cutout"), 0.0)(images)
    assert torch.equal(both, images)
    moving = DiffAugment(probability=Anneal(0.0, 0.5, 10))
    assert annealed(moving, 5).probability == 0.25
    with pytest.raises(ValueError, match=r"no value without an update. Got Anneal"):
        moving(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: R1(weight=Anneal(1.0, -1.0, 5)), r"weight must be at least 0. Got \(1.0, -1.0\)"),
        (lambda: DiffAugment(probability=1.5), r"probability must lie in \[0, 1\]"),
        (
            lambda: DiffAugment(("rotation",)),
            "policy must be a list, each 'color', 'translation' or 'cutout'",
        ),  # type: ignore[arg-type]
        (lambda: R1(weight=0.0), "weight must be positive"),
        (lambda: GradientPenalty(every=0), "every must be at least 1"),
    ],
)
def test_wrong_options(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
