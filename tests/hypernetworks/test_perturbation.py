"""Distributions of the perturbed hyperparameters: moments, entropy, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_nested.hypernetworks import (
    FixedScale,
    GlobalNormal,
    GlobalUniform,
    LearnedScale,
    NoPerturbation,
    Perturbation,
)

CENTER = torch.tensor([0.5, -2.0], dtype=torch.float64)


def drawn(perturbation: Perturbation, size: int = 40_000) -> torch.Tensor:
    noise = perturbation.draw(CENTER, size, torch.Generator().manual_seed(0))
    return perturbation.sample(CENTER, perturbation.initial(CENTER), noise)


@pytest.mark.parametrize(
    ("perturbation", "mean", "std"),
    [
        (LearnedScale(init=0.3), CENTER, 0.3),
        (FixedScale(scale=0.2), CENTER, 0.2),
        (FixedScale(scale=0.2, antithetic=True), CENTER, 0.2),
        (GlobalNormal(mean=1.0, scale=0.5), torch.ones(2).double(), 0.5),
        (GlobalNormal(mean=(1.0, 3.0), scale=0.5), torch.tensor([1.0, 3.0]).double(), 0.5),
        (GlobalUniform(low=-1.0, high=3.0), torch.ones(2).double(), 4 / math.sqrt(12)),
        (NoPerturbation(), CENTER, 0.0),
    ],
    ids=str,
)
def test_moments(perturbation: Perturbation, mean: torch.Tensor, std: float) -> None:
    h = drawn(perturbation)
    assert h.shape == (40_000, 2)
    error = 5 * max(std, 1e-9) / math.sqrt(40_000)  # five standard errors
    torch.testing.assert_close(h.mean(0), mean, rtol=0, atol=error)
    torch.testing.assert_close(h.std(0), torch.full((2,), std).double(), rtol=0, atol=error)


def test_the_learned_scale_has_a_gradient_and_the_entropy_its_closed_form() -> None:
    perturbation = LearnedScale(init=0.3, entropy_weight=0.1)
    scale = perturbation.initial(CENTER)
    assert scale is not None
    scale.requires_grad_()
    bonus = perturbation.bonus(scale)
    assert bonus is not None
    entropy = 2 * 0.5 * math.log(2 * math.pi * math.e * 0.3**2)
    assert bonus.item() == pytest.approx(0.1 * entropy, rel=1e-12)
    noise = torch.tensor([1.0, -1.0], dtype=torch.float64)
    perturbation.sample(CENTER, scale, noise).sum().backward()
    torch.testing.assert_close(scale.grad, noise * torch.sigmoid(scale.detach()))
    assert FixedScale().bonus(None) is None
    assert LearnedScale(entropy_weight=0.0).bonus(scale) is None


def test_antithetic_pairs() -> None:
    noise = FixedScale(antithetic=True).draw(CENTER, 5, torch.Generator())
    torch.testing.assert_close(noise[3:], -noise[:2], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"batch of at least 2 examples. Got 1"):
        FixedScale(antithetic=True).draw(CENTER, 1, torch.Generator())


def test_refusals() -> None:
    for wrong in (
        lambda: LearnedScale(init=0.0), lambda: LearnedScale(entropy_weight=-1.0), lambda: FixedScale(scale=-1.0),
        lambda: GlobalNormal(scale=0.0), lambda: GlobalUniform(low=1.0, high=1.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"Got"):
            wrong()
    with pytest.raises(ValueError, match=r"one number, or 2. Got 3"):
        drawn(GlobalNormal(mean=(1.0, 2.0, 3.0)))
