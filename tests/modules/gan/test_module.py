"""GANModule: losses against written-out formulas, conditional models, sampling; ZooGame against its game."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_nested.demos import ZooGame
from lightning_nested.games import Bilinear, DiracGAN
from lightning_nested.modules import (
    R1,
    R2,
    Anneal,
    DiffAugment,
    GameLoop,
    GANModule,
    GradientPenalty,
    GradientRegularizer,
    Hinge,
    RelativisticPairing,
)
from lightning_nested.optim import ComplexSGD, Extragradient
from tests.trainers import trainer


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
        ({"loss": "minimax"}, "loss must be 'hinge', .* Got 'minimax'"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1. Got 0"),
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
    fit = trainer(max_epochs=-1, max_steps=30, log_every_n_steps=10)
    fit.fit(module)
    assert module.path[-1] == [p.item() for p in players]
    assert module.distances == pytest.approx(distances, rel=1e-14)
    assert float(fit.callback_metrics["distance"]) == pytest.approx(distances[-1])


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


# ---- penalties and augmentation


@dataclass(frozen=True, kw_only=True)
class Noted(GradientRegularizer):
    """A penalty of zero that remembers the batch it was asked for."""

    seen: list[float] = field(default_factory=list)

    def penalty(
        self, score: Any, real: Tensor, fake: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        self.seen.append(float(real[0, 0]))
        return 0.0 * score(real).sum()


def fit(module: GANModule, data: Tensor, **options: Any) -> None:
    trainer(**options).fit(module, torch.utils.data.DataLoader(data, batch_size=1))


@pytest.mark.parametrize(
    ("every", "options", "batches"),
    [
        (5, {"loop": GameLoop(reuse_batch=True)}, [0, 5, 10, 15]),
        # Batch 4, 9 and 14 are the generator's; every second of the others.
        (2, {}, [0, 2, 5, 7, 10, 12, 15, 17]),
        (3, {"optimizer": lambda p: Extragradient(p, lr=0.1)}, [0, 0, 3, 3, 7, 7, 11, 11, 15, 15, 18, 18]),
    ],
)
def test_a_lazy_penalty_counts_batches_of_the_discriminator(
    every: int, options: dict[str, Any], batches: list[int]
) -> None:
    noted = Noted(every=every)
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), **options}
    module = GANModule(
        Fixed(),
        First(),
        latent_dim=2,
        regularizers=(noted,),
        steps_per_player={"discriminator": 4},
        **options,
    )
    fit(module, torch.arange(20.0).repeat_interleave(2).view(20, 2), max_epochs=1)
    assert noted.seen == batches


def test_a_lazy_penalty_is_as_large_as_its_pause_and_plain_in_a_spectrum() -> None:
    plain = Known(Fixed(), First(), latent_dim=2)
    lazy = Known(Fixed(), First(), latent_dim=2, regularizers=(R1(weight=6.0, every=4),))
    real = torch.ones(3, 2)
    # D(x) = s x₀ with s = 1: (weight/2) ‖∂D/∂x‖² = 3.
    first = lazy.player_loss("discriminator", real) - plain.player_loss("discriminator", real)
    assert first.item() == pytest.approx(4 * 3.0)
    lazy.player_batches["discriminator"] = 1
    second = lazy.player_loss("discriminator", real) - plain.player_loss("discriminator", real)
    assert second.item() == 0
    with lazy.joint_evaluation(["discriminator"]):
        joint = lazy.player_loss("discriminator", real) - plain.player_loss("discriminator", real)
    assert joint.item() == pytest.approx(3.0)


def test_the_generator_of_a_pairing_loss_sees_the_real_scores() -> None:
    module = Known(Fixed(), First(), latent_dim=2, loss="relativistic")
    real = torch.tensor([[0.5, 9.0], [-2.0, 9.0], [3.0, 9.0]])
    margins = [0.5 + 2.0, -2.0 - 0.0, 3.0 - 2.0]  # fakes are −2, 0, 2
    for player, sign in (("discriminator", -1), ("generator", 1)):
        expected = sum(softplus(sign * margin) for margin in margins) / 3
        assert module.player_loss(player, real).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reuse", [False, True])
def test_pairs_are_of_one_class(reuse: bool) -> None:
    """D(x, y) = x₀ + 10y and G(z, y) = 2z + y: 10y cancels in a pair of one class, whatever sample_labels draws."""

    class Judge(First):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            assert y is not None
            return self.scale * x[:, :1] + 10.0 * y[:, None].float()

    module = Known(
        Fixed(), Judge(), latent_dim=2, num_classes=3, loss="relativistic", reuse_fakes=reuse,
        loop=GameLoop(reuse_batch=reuse),
    )  # fmt: skip
    module.batch_players = ("discriminator", "generator")
    real, labels = torch.zeros(3, 2), torch.tensor([2, 0, 1])
    margins = [0 - (-2 + 2), 0 - (0 + 0), 0 - (2 + 1)]
    for player, sign in (("discriminator", -1), ("generator", 1)):
        expected = sum(softplus(sign * margin) for margin in margins) / 3
        assert module.player_loss(player, (real, labels)).item() == pytest.approx(expected, rel=1e-6)


def test_fakes_are_penalized_with_their_own_labels() -> None:
    """D(x, y) = (1 + y)‖x‖²/2, so ∂D/∂x = (1 + y)x: at fakes 2z + y with their y, at real ones with theirs."""

    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return 0.5 * self.scale * (1 + y) * x.square().sum(dim=1)

    real, labels = torch.full((3, 2), 0.5), torch.tensor([2, 2, 0])

    def loss(*regularizers: GradientRegularizer) -> float:
        module = Known(Fixed(), Judge(), latent_dim=2, num_classes=3, regularizers=regularizers)
        module.sample_labels = lambda count: torch.arange(count) % 3  # type: ignore[method-assign]
        return module.player_loss("discriminator", (real, labels)).item()

    at_real = sum((1 + y) ** 2 * 0.5 for y in (2, 2, 0)) / 3
    at_fakes = sum((1 + y) ** 2 * 2 * (2 * z + y) ** 2 for y, z in ((0, -1), (1, 0), (2, 1))) / 3
    assert loss(R1(weight=2.0)) - loss() == pytest.approx(at_real, rel=1e-5)
    assert loss(R2(weight=2.0)) - loss() == pytest.approx(at_fakes, rel=1e-5)
    both = loss(R1(weight=2.0), R2(weight=2.0, every=4)) - loss()
    assert both == pytest.approx(at_real + 4 * at_fakes, rel=1e-5)


@pytest.mark.parametrize("penalties", [1, 2])
def test_penalties_make_the_pairing_loss_converge(penalties: int) -> None:
    """Data at 0, fakes at θ, D(x) = ψx: v = (−θ/2 − γψ, ψ/2), whose eigenvalues are (−γ ± √(γ² − 1))/2.

    γ is the sum of the weights: both penalties are (weight/2)ψ². Without them the eigenvalues are ±i/2.
    """

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(1, 1))

        def forward(self, z: Tensor) -> Tensor:
            return self.theta.expand(len(z), 1)

    judge = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(judge.weight)
    module = GANModule(
        Constant(), judge, latent_dim=1, loss=RelativisticPairing(),
        regularizers=(R1(weight=0.3, every=4), R2(weight=0.3))[:penalties],
    ).double()  # fmt: skip
    players = [judge.weight, module.generator.theta]
    rows = []
    with module.joint_evaluation(["discriminator", "generator"]):
        for name, player in zip(module.players(), players, strict=True):
            loss = module.player_loss(name, torch.zeros(4, 1, dtype=torch.float64))
            (gradient,) = torch.autograd.grad(loss, player, create_graph=True)
            row = torch.autograd.grad(-gradient.sum(), players, allow_unused=True)
            rows.append(torch.cat([torch.zeros(1, 1) if g is None else g for g in row], dim=1))
    found = torch.linalg.eigvals(torch.cat(rows))
    gamma = 0.3 * penalties
    root = (1 - gamma**2) ** 0.5
    expected = torch.tensor([complex(-gamma, -root), complex(-gamma, root)], dtype=torch.complex128) / 2
    torch.testing.assert_close(found[found.imag.argsort()], expected)


def test_a_penalty_is_annealed_over_game_updates() -> None:
    plain = Known(Fixed(), First(), latent_dim=2)
    moving = Known(Fixed(), First(), latent_dim=2, regularizers=(R1(weight=Anneal(6.0, 0.0, 4)),))
    real = torch.ones(3, 2)
    found = []
    for updates in range(6):
        moving.game_updates = updates
        found.append(
            (moving.player_loss("discriminator", real) - plain.player_loss("discriminator", real)).item()
        )
    assert found == pytest.approx([3.0, 2.25, 1.5, 0.75, 0.0, 0.0], abs=1e-6)


def test_augmentation_is_annealed_over_game_updates() -> None:
    module = images(augment=DiffAugment(("cutout",), Anneal(0.0, 1.0, 10)), discriminator=Patches())
    real = torch.ones(200, 1, 4, 4)
    shares = []
    for updates in (0, 5, 10):
        module.game_updates = updates
        shares.append((module._augmented(real) == 0).flatten(1).any(dim=1).double().mean().item())
    assert shares[0] == 0.0
    assert shares[2] == 1.0
    assert abs(shares[1] - 0.5) < 5 * (0.25 / 200) ** 0.5


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.scale * x.flatten(1).square().sum(dim=1)


def test_a_spectrum_sees_that_the_penalty_depends_on_the_generator() -> None:
    module = Known(
        Fixed(), Squared(), latent_dim=2, loss="wasserstein", regularizers=(GradientPenalty(weight=2.0),)
    )
    real = torch.full((3, 2), 0.5)
    torch.manual_seed(0)
    with module.joint_evaluation(["discriminator"]):
        loss = module.player_loss("discriminator", real)
    (found,) = torch.autograd.grad(loss, module.generator.scale)
    torch.manual_seed(0)
    mix = torch.rand(3, 1)
    s, z = torch.tensor(2.0, requires_grad=True), module.sample_latents(3)
    x = mix * real + (1 - mix) * s * z  # ∂D/∂x = x
    penalty = 2.0 * (x.norm(dim=1) - 1).square().mean()
    (expected,) = torch.autograd.grad(penalty + 0.5 * (s * z).square().sum(dim=1).mean(), s)
    torch.testing.assert_close(found, expected)
    loss = module.player_loss("discriminator", real)  # in training it does not
    assert torch.autograd.grad(loss, module.generator.scale, allow_unused=True) == (None,)


def test_the_penalty_is_taken_where_the_discriminator_looks() -> None:
    """∂/∂x of ½‖A x‖² is AᵀA x: 3 where it is seen, nothing where it is not."""

    class Masked(DiffAugment):
        def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return images * torch.tensor([1.0, 0.0])

    module = Known(Fixed(), Squared(), latent_dim=2, regularizers=(R1(weight=2.0),), augment=Masked())
    without = Known(Fixed(), Squared(), latent_dim=2, augment=Masked())
    real = torch.tensor([[3.0, 4.0]])
    penalty = module.player_loss("discriminator", real) - without.player_loss("discriminator", real)
    assert penalty.item() == pytest.approx(9.0)


def test_losses_as_objects() -> None:
    named, given = (
        Known(Fixed(), First(), latent_dim=2, loss=loss)
        for loss in ("hinge", Hinge())  # type: ignore[arg-type]
    )
    real = torch.randn(5, 2)
    for player in ("discriminator", "generator"):
        assert torch.equal(named.player_loss(player, real), given.player_loss(player, real))


def test_resuming_keeps_the_penaltys_turn(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if pl_module.player_batches["discriminator"] == 10:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    def run(**options: Any) -> tuple[Noted, GANModule]:
        noted = Noted(every=3)
        module = GANModule(
            Fixed(), First(), latent_dim=2, regularizers=(noted,), loop=GameLoop(reuse_batch=True),
            steps_per_player={"discriminator": 4}, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        )  # fmt: skip
        data = torch.arange(10.0).repeat_interleave(2).view(10, 2)
        trainer(Stop(), max_epochs=2).fit(module, torch.utils.data.DataLoader(data, batch_size=1), **options)
        return noted, module

    whole, module = run()
    assert whole.seen == [0, 3, 6, 9, 2, 5, 8]
    resumed, again = run(ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert resumed.seen == [2, 5, 8]
    assert again.player_batches == module.player_batches == {"discriminator": 20, "generator": 5}


# ---- what the networks and the data must be


class Patches(nn.Module):
    """Logits of the four quarters of an image (n, 1, 4, 4), each the mean of its pixels times a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.avg_pool2d(x, 2)


def images(
    generator: nn.Module | None = None, discriminator: nn.Module | None = None, **options: Any
) -> GANModule:
    made = generator or nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4)))
    return GANModule(
        made, discriminator or nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), latent_dim=2,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options,
    )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_means_over_patches(loss: Any) -> None:
    module, real = images(discriminator=Patches(), loss=loss), torch.randn(3, 1, 4, 4)
    of_d, of_g = LOSSES[loss]
    with torch.random.fork_rng():
        found = module.player_loss("discriminator", real).item()
    with torch.random.fork_rng():
        found_g = module.player_loss("generator", real).item()
    with torch.random.fork_rng():
        fake = module(3)
    r, f = (module.discriminator(x).flatten().tolist() for x in (real, fake))
    assert found == pytest.approx(sum(map(of_d, r, f)) / 12, rel=1e-5)
    assert found_g == pytest.approx(sum(map(of_g, f)) / 12, rel=1e-5)


def test_a_penalty_is_on_the_mean_over_patches() -> None:
    """D is 2 · the mean of 16 pixels: ‖∂D/∂x‖² = 4/16, and R1 half of that."""
    real = torch.randn(3, 1, 4, 4)
    values = []
    for regularizers in ((), (R1(weight=1.0),)):
        module = images(discriminator=Patches(), regularizers=regularizers)
        module.sample_latents = lambda count: torch.ones(count, 2)  # type: ignore[method-assign]
        module.generator[0].weight.data.zero_()  # type: ignore[union-attr,index,operator]
        module.generator[0].bias.data.zero_()  # type: ignore[union-attr,index,operator]
        values.append(module.player_loss("discriminator", real).item())
    assert values[1] - values[0] == pytest.approx(0.125, rel=1e-4)


X = torch.randn(4, 1, 4, 4)


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.name, self.head = nn.Embedding(3, 4), nn.Linear(16, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(x.flatten(1)) + self.name(y).sum(dim=-1, keepdim=True)


class Painter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.draw = nn.Linear(2, 16)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.draw(z).view(-1, 1, 4, 4)


@pytest.mark.parametrize(
    ("networks", "batch", "match"),
    [
        ({}, {"image": X}, r"Got a dict with \['image'\]; .* override real_data"),
        ({}, ["a"], "must be a tensor of data, or a sequence"),
        ({}, [], "must be a tensor of data, or a sequence"),
        ({}, X.to(torch.uint8), "must be floating point.* Got torch.uint8; scale it"),
        ({"generator": nn.Linear(2, 16)}, X, r"Got \(16,\) and data \(1, 4, 4\)"),
        (
            {"discriminator": nn.Sequential(nn.Flatten(), nn.Linear(16, 2))},
            X,
            r"one logit per example.*Got \(8, 2\) for 8 examples",
        ),
        ({"discriminator": nn.Conv2d(1, 2, 3)}, X, r"Got \(8, 2, 2, 2\) for 8"),
        ({"discriminator": nn.Flatten(0, 1)}, X, r"Got \(8, 4, 4\) for 8"),
        ({"discriminator": nn.Flatten(0)}, X, r"Got \(128,\) for 8"),
    ],
)
def test_data_and_logits_that_do_not_fit(networks: Any, batch: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        images(**networks).player_loss("discriminator", batch)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (torch.tensor([1, 2, 3, 1]), r"labels must lie in 0 … 2. Got 3. Number the classes from 0"),
        (torch.tensor([0, 1, 2, -1]), "Got -1"),
        (
            torch.tensor([[0], [1], [2], [0]]),
            r"Got torch.int64 \(4, 1\) for 4 examples, and torch.int64 \(4,\) of sample_labels; flatten",
        ),
        (torch.eye(4, 3), r"Got torch.float32 \(4, 3\) for 4"),
        (torch.tensor([0, 1, 2]), r"Got torch.int64 \(3,\) for 4 examples"),
        (torch.tensor([0.0, 1.0, 2.0, 0.0]), r"Got torch.float32 \(4,\) for 4 .*; .* as integers"),
        (["cat", "dog", "cat", "dog"], "Got labels of type list"),
    ],
)
def test_labels_that_do_not_fit(labels: Any, match: str) -> None:
    module = images(Painter(), Conditional(), num_classes=3)
    module.player_loss("discriminator", (X, torch.tensor([0, 1, 2, 0], dtype=torch.uint8)))
    for updates in (0, 5):
        module.game_updates = updates
        with pytest.raises(ValueError, match=match):
            module.player_loss("discriminator", (X, labels))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"optimizer": torch.optim.SGD([X.clone()], lr=0.1)},
            "optimizer must be a function .*Got a finished SGD; give lambda",
        ),
        ({"optimizers": {"generator": torch.optim.Adam([X.clone()])}}, r"optimizers\['generator'\] must be"),
        ({"optimizers": [torch.optim.SGD]}, "optimizers must be a dictionary .* Got a list"),
        (
            {"scheduler": torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([X.clone()]))},
            "finished ConstantLR",
        ),
    ],
)
def test_finished_optimizers_in_place_of_functions(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GANModule(Fixed(), First(), latent_dim=2, **options)


def test_a_function_that_returns_no_optimizer() -> None:
    module = GANModule(Fixed(), First(), latent_dim=2, optimizer=lambda p: [torch.optim.SGD(p)])  # type: ignore[arg-type,return-value]
    with pytest.raises(
        MisconfigurationException, match="Got a list for 'discriminator'; return the optimizer"
    ):
        fit(module, torch.ones(2, 2))
