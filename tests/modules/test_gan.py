"""GANModule: losses against written-out formulas, conditional models, sampling; ZooGame against its game."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_nested.games import Bilinear, DiracGAN
from lightning_nested.modules import GANModule, ZooGame
from lightning_nested.optim import ComplexSGD


class First(nn.Module):
    """Logit: the first coordinate, shifted by the label where there is one."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.scale * x[:, :1] + (0.0 if y is None else y[:, None].float())


class Fixed(nn.Module):
    """Samples: the latents times a parameter, shifted by the label where there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.scale * z + (0.0 if y is None else y[:, None].float())


class Known(GANModule):
    def sample_latents(self, count: int) -> Tensor:
        return torch.linspace(-1, 1, count)[:, None].expand(count, 2)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


LOSSES: dict[str, tuple[Any, Any]] = {
    "non_saturating": (lambda r, f: softplus(-r) + softplus(f), lambda f: softplus(-f)),
    "hinge": (lambda r, f: max(0.0, 1 - r) + max(0.0, 1 + f), lambda f: -f),
    "wasserstein": (lambda r, f: f - r, lambda f: -f),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: Any) -> None:
    module = Known(Fixed(), First(), latent_dim=2, loss=loss, optimizer=None)
    real = torch.tensor([[0.5, 9.0], [-2.0, 9.0], [3.0, 9.0]])
    of_d, of_g = LOSSES[loss]
    fakes = [-2.0, 0.0, 2.0]
    expected = sum(of_d(r, f) for r, f in zip(real[:, 0].tolist(), fakes, strict=True)) / 3
    assert module.player_loss("discriminator", real).item() == pytest.approx(expected, rel=1e-6)
    assert module.player_loss("discriminator", [real]).item() == pytest.approx(expected, rel=1e-6)
    expected = sum(map(of_g, fakes)) / 3
    assert module.player_loss("generator", real).item() == pytest.approx(expected, rel=1e-6)


def test_the_generator_is_cut_off_from_the_discriminators_loss_except_on_request() -> None:
    module = Known(Fixed(), First(), latent_dim=2)
    scale = module.generator.scale
    loss = module.player_loss("discriminator", torch.ones(3, 2))
    assert torch.autograd.grad(loss, scale, allow_unused=True) == (None,)
    with module.joint_evaluation(["discriminator"]):
        loss = module.player_loss("discriminator", torch.ones(3, 2))
    assert torch.autograd.grad(loss, scale)[0] != 0
    assert not module.joint_graph


def test_a_conditional_model_calls_its_networks_with_labels() -> None:
    module = Known(Fixed(), First(), latent_dim=2, num_classes=3, loss="wasserstein")
    module.sample_labels = lambda count: torch.arange(count) % 3  # type: ignore[method-assign]
    real, labels = torch.zeros(3, 2), torch.tensor([2, 2, 2])
    # Fakes: 2z + y, and the discriminator adds y once more: (−2, 0, 2) + 2·(0, 1, 2), mean 2; real: 2.
    assert module.player_loss("discriminator", (real, labels)).item() == pytest.approx(0.0, abs=1e-6)
    assert module.player_loss("generator", (real, labels)).item() == pytest.approx(-2.0)
    drawn = GANModule(Fixed(), First(), latent_dim=2, num_classes=3).sample_labels(1000)
    assert drawn is not None
    assert set(drawn.tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match=r"needs batches \(data, labels\). Got 1"):
        module.player_loss("discriminator", real)


def test_samples_are_of_the_evaluation_mode() -> None:
    generator = nn.Sequential(nn.BatchNorm1d(2), Fixed())
    module = GANModule(generator, First(), latent_dim=2)
    before = generator[0].running_mean.clone()
    samples = module.sample(5)
    assert samples.shape == (5, 2)
    assert not samples.requires_grad
    assert torch.equal(generator[0].running_mean, before)
    assert generator.training
    assert module(5).requires_grad


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": "minimax"}, "loss must be one of .* Got 'minimax'"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"num_classes": 0}, "Got 2 and 0"),
    ],
)
def test_wrong_arguments(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GANModule(Fixed(), First(), **{"latent_dim": 2, **options})


# ---- the zoo


def test_a_zoo_game_is_trained_by_its_own_losses() -> None:
    """Against the same optimizer in a loop of its own, to the last bit."""
    module = ZooGame(DiracGAN(), update="simultaneous", optimizer=lambda p: ComplexSGD(p, lr=0.2), seed=3)
    players = DiracGAN().initial(torch.Generator().manual_seed(3))
    optimizer = ComplexSGD(players, lr=0.2)
    distances = [math.hypot(*(p.item() for p in players))]
    for _ in range(30):
        for player, loss in zip(players, DiracGAN().losses(players), strict=True):
            (player.grad,) = torch.autograd.grad(loss, player, retain_graph=True)
        optimizer.step()
        distances.append(math.hypot(*(p.item() for p in players)))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=30,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(module)
    assert module.path[-1] == [p.item() for p in players]
    assert module.distances == pytest.approx(distances, rel=1e-14)
    assert float(trainer.callback_metrics["distance"]) == pytest.approx(distances[-1])


def test_a_solution_elsewhere() -> None:
    module = ZooGame(Bilinear(), start=[[3.0], [4.0]], solution=[[3.0], [3.0]])
    assert module.distance().item() == 1.0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": [[1.0]]}, r"start must have \[1, 1\] numbers.*Got \[1\]"),
        ({"solution": [[1.0, 2.0], [1.0]]}, r"solution must have \[1, 1\].*Got \[2, 1\]"),
        ({"batches_per_epoch": 0}, "at least 1. Got 0"),
    ],
)
def test_wrong_zoo_games(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ZooGame(Bilinear(), **options)


def test_sampling_leaves_each_modules_mode() -> None:
    generator = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    module = GANModule(generator, nn.Linear(2, 1), latent_dim=2)
    generator[1].eval()  # frozen statistics
    sample = module.sample(5)
    assert [m.training for m in generator] == [True, False, True, True]
    assert generator.training
    assert not sample.requires_grad
    assert generator[1].num_batches_tracked == 0
