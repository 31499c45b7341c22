"""Losses of the two players of a GAN, penalties on the discriminator's gradient, and image augmentation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_nested.anneal import Anneal, ends, number
from lightning_nested.arguments import at_least, checked, positive, within

Score = Callable[[Tensor], Tensor]
"""From images to one number each, at labels that are fixed."""

GANLoss = Literal["hinge", "non_saturating", "relativistic", "wasserstein"]
"""Losses by name; see :func:`adversarial_loss`."""


@dataclass(frozen=True)
class AdversarialLoss(ABC):
    """Losses of both players from the discriminator's scores ``(N,)`` or, of patches, ``(N, P)``; means over them.

    Attributes:
        paired: True if the generator's loss compares each fake with a real example. It is then called with the real
            scores too, and a conditional model gives each pair one label.
    """

    paired: ClassVar[bool] = False

    @abstractmethod
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the discriminator's loss, a scalar."""

    @abstractmethod
    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """Return the generator's loss, a scalar; ``real`` is given if the loss is ``paired``."""

    def generator_beside(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the generator's loss where the real scores are known, whether the loss is paired or not."""
        return self.generator(fake, real) if self.paired else self.generator(fake)


@dataclass(frozen=True)
class Hinge(AdversarialLoss):
    """Hinge loss L_D = E max(0, 1 − D(x)) + E max(0, 1 + D(G(z))), L_G = −E D(G(z)).

    Lim & Ye (2017), arXiv 1705.02894; the loss of BigGAN.

    >>> Hinge().discriminator(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])).item()
    1.5
    """

    @override
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return functional.relu(1.0 - real).mean() + functional.relu(1.0 + fake).mean()

    @override
    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return -fake.mean()


@dataclass(frozen=True)
class NonSaturating(AdversarialLoss):
    """Original loss L_D = E softplus(−D(x)) + E softplus(D(G(z))), L_G = E softplus(−D(G(z))).

    Goodfellow et al. (2014), NeurIPS, section 3.

    >>> round(NonSaturating().generator(torch.zeros(3)).item(), 4)
    0.6931
    """

    @override
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return functional.softplus(-real).mean() + functional.softplus(fake).mean()

    @override
    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return functional.softplus(-fake).mean()


@dataclass(frozen=True)
class Wasserstein(AdversarialLoss):
    """Wasserstein loss L_D = E D(G(z)) − E D(x), L_G = −E D(G(z)); D must bound its slope.

    Add :class:`GradientPenalty`.

    Arjovsky, Chintala & Bottou (2017), ICML, PMLR 70:214-223.

    >>> Wasserstein().discriminator(torch.tensor([2.0]), torch.tensor([-1.0])).item()
    -3.0
    """

    @override
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean() - real.mean()

    @override
    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return -fake.mean()


@dataclass(frozen=True)
class RelativisticPairing(AdversarialLoss):
    """Relativistic pairing loss L_D = E softplus(D(G(z)) − D(x)), L_G = E softplus(D(x) − D(G(z))), over pairs (x, z).

    Each fake is judged against a real example, of the same class in a conditional model, so that a mode that the
    generator leaves out still costs it. Add :class:`R1` and :class:`R2`: with both it converges to the data locally.

    Jolicoeur-Martineau (2019), ICLR, arXiv 1807.00734; Sun, Fang & Schwing (2020), NeurIPS, arXiv 2011.04926;
    with both penalties Huang et al. (2024), NeurIPS, arXiv 2501.05441 (R3GAN).

    Raises:
        ValueError: If there are not as many real scores as fake ones.

    >>> real, fake = torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.0])
    >>> round(RelativisticPairing().generator(fake, real).item(), 4)
    0.6931
    """

    paired: ClassVar[bool] = True

    @override
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return functional.softplus(fake - _paired(real, fake)).mean()

    @override
    def generator(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        return functional.softplus(_paired(real, fake) - fake).mean()


def _paired(real: Tensor | None, fake: Tensor) -> Tensor:
    """Return the real scores if there is one for each fake."""
    if real is None or real.shape != fake.shape:
        got = "none" if real is None else tuple(real.shape)
        raise ValueError(
            f"RelativisticPairing needs a real score for each fake one. Got {got} beside {tuple(fake.shape)}; give "
            "as many of both: loss.generator(fake, real)."
        )
    return real


_BY_NAME: dict[str, AdversarialLoss] = {
    "hinge": Hinge(),
    "non_saturating": NonSaturating(),
    "relativistic": RelativisticPairing(),
    "wasserstein": Wasserstein(),
}


def adversarial_loss(loss: GANLoss | AdversarialLoss) -> AdversarialLoss:
    """Return the loss of that name; return a loss object unchanged.

    Example:
        >>> adversarial_loss("hinge")
        Hinge()
    """
    if isinstance(loss, AdversarialLoss):
        return loss
    if loss not in _BY_NAME:
        raise ValueError(f"loss must be one of {sorted(_BY_NAME)} or an AdversarialLoss. Got {loss!r}.")
    return _BY_NAME[loss]


@checked
@dataclass(frozen=True, kw_only=True)
class GradientRegularizer(ABC):
    """Penalty on ∂D/∂x, added to the discriminator's loss; differentiable twice.

    Args:
        weight: Factor of the penalty; an :class:`Anneal` moves it during training.
        every: Batches of the discriminator from one penalty to the next; each is then ``every`` times as
            large (lazy regularization, Karras et al. 2020).

    Attributes:
        at_fakes: True if ``score`` is to judge fakes, with the labels that they were made with.
    """

    weight: float | Anneal = 10.0
    every: int = 1
    at_fakes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # An annealed penalty may begin or end at none.
        if isinstance(self.weight, Anneal):
            at_least(0, weight=ends(self.weight))
        else:
            positive(weight=self.weight)
        at_least(1, every=self.every)

    @abstractmethod
    def penalty(
        self, score: Score, real: Tensor, fake: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the penalty of a batch, a scalar with its graph, without the factor ``every``."""


@checked
@dataclass(frozen=True, kw_only=True)
class R1(GradientRegularizer):
    """R1 penalty (weight/2) E ‖∂D/∂x‖² at real images x.

    Mescheder, Geiger & Nowozin (2018), ICML, PMLR 80:3481-3490.
    """

    @override
    def penalty(
        self, score: Score, real: Tensor, fake: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return 0.5 * number(self.weight) * _squared_gradient_norm(score, real).mean()


@checked
@dataclass(frozen=True, kw_only=True)
class R2(GradientRegularizer):
    """R2 penalty (weight/2) E ‖∂D/∂x‖² at generated images x; beside :class:`R1`, with a weight and a pause of its own.

    Mescheder, Geiger & Nowozin (2018), ICML, PMLR 80:3481-3490.
    """

    at_fakes: ClassVar[bool] = True

    @override
    def penalty(
        self, score: Score, real: Tensor, fake: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return 0.5 * number(self.weight) * _squared_gradient_norm(score, fake.to(real.dtype)).mean()


@checked
@dataclass(frozen=True, kw_only=True)
class GradientPenalty(GradientRegularizer):
    """Gradient penalty weight · E (‖∂D/∂x‖ − 1)² at x = ε·real + (1 − ε)·fake, ε uniform per example.

    Gulrajani et al. (2017), NeurIPS, arXiv 1704.00028.
    """

    @override
    def penalty(
        self, score: Score, real: Tensor, fake: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        shape = len(real), *[1] * (real.ndim - 1)
        mix = torch.rand(shape, generator=generator, device=real.device, dtype=real.dtype)
        norm = (_squared_gradient_norm(score, torch.lerp(fake.to(real.dtype), real, mix)) + 1e-12).sqrt()
        return number(self.weight) * (norm - 1.0).square().mean()


def _squared_gradient_norm(score: Score, images: Tensor) -> Tensor:
    # Where a spectrum is taken they depend on the generator, and stay in its graph.
    if not images.requires_grad:
        images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(score(images).sum(), images, create_graph=True)
    return widened(gradient).square().flatten(1).sum(dim=1)


def widened(x: Tensor) -> Tensor:
    """Convert half precision to float32, for sums and means; return anything else unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


Policy = Literal["color", "translation", "cutout"]


@checked
@dataclass(frozen=True)
class DiffAugment:
    """Differentiable random changes of every image the discriminator sees, real or generated.

    Colour: brightness ± 0.5, saturation × [0, 2], contrast × [0.5, 1.5]; translation by up to an eighth of the
    side; cutout of a square of half the side. Zhao et al. (2020), NeurIPS, arXiv 2006.10738.

    Args:
        policy: Changes to make, in this order.
        probability: Probability of each change, drawn for each image; an :class:`Anneal` moves it during training.

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> changed = DiffAugment(("cutout",))(images, torch.Generator().manual_seed(0))
        >>> bool((changed == 0).any()), tuple(changed.shape)
        (True, (2, 3, 32, 32))
    """

    policy: tuple[Policy, ...] = ("color", "translation", "cutout")
    probability: float | Anneal = 1.0

    def __post_init__(self) -> None:
        within(0, 1, probability=ends(self.probability))

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Change images ``(N, C, H, W)``; random numbers come from ``generator``."""
        if images.ndim != 4:
            raise ValueError(f"DiffAugment changes images (N, C, H, W). Got shape {tuple(images.shape)}.")
        steps = {"color": _color, "translation": _translation, "cutout": _cutout}
        probability = number(self.probability)
        for name in self.policy:
            changed = steps[name](images, generator)
            if probability < 1.0:
                chosen = _uniform(images, 0.0, 1.0, generator) < probability
                changed = torch.where(chosen, changed, images)
            images = changed
        return images


def _uniform(images: Tensor, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    draw = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device, dtype=images.dtype)
    return low + (high - low) * draw


def _color(images: Tensor, generator: torch.Generator | None) -> Tensor:
    images = images + _uniform(images, -0.5, 0.5, generator)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * _uniform(images, 0.0, 2.0, generator)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * _uniform(images, 0.5, 1.5, generator)


def _positions(images: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of rows ``(1, H, 1)`` and columns ``(1, 1, W)``."""
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device).view(1, -1, 1)
    return rows, torch.arange(width, device=images.device).view(1, 1, -1)


def _shifts(images: Tensor, low: int, high: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(low, high + 1, (len(images), 1, 1), generator=generator, device=images.device)


def _translation(images: Tensor, generator: torch.Generator | None) -> Tensor:
    n, _, height, width = images.shape
    rows, columns = _positions(images)
    rows = rows + _shifts(images, -(height // 8), height // 8, generator)
    columns = columns + _shifts(images, -(width // 8), width // 8, generator)
    # A border of zeros on every side, read wherever a shift brings in pixels from outside.
    padded = functional.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    example = torch.arange(n, device=images.device).view(-1, 1, 1)
    moved = padded[example, (rows + 1).clamp(0, height + 1), (columns + 1).clamp(0, width + 1)]
    return moved.permute(0, 3, 1, 2)


def _cutout(images: Tensor, generator: torch.Generator | None) -> Tensor:
    height, width = images.shape[2:]
    top = _shifts(images, -(height // 4), height - height // 4, generator)
    left = _shifts(images, -(width // 4), width - width // 4, generator)
    rows, columns = _positions(images)
    hole = (rows >= top) & (rows < top + height // 2) & (columns >= left) & (columns < left + width // 2)
    return images.masked_fill(hole.unsqueeze(1), 0.0)
