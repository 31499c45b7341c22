"""Training loops of a hypernetwork beside its hyperparameters: global, local, simplified, STN, Delta-STN."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightning_nested.arguments import at_least, checked
from lightning_nested.hypernetworks.perturbation import (
    FixedScale,
    GlobalNormal,
    LearnedScale,
    NoPerturbation,
    Perturbation,
)
from lightning_nested.hypernetworks.response import Mode, Response

Leaves = Sequence[Tensor]
Gradients = tuple[Tensor | None, ...]


class TrainingLoss(Protocol):
    """Inner loss with its penalties."""

    @property
    def response(self) -> Response:
        """Response under training."""

    @property
    def inner_steps(self) -> int:
        """Training steps made before this one."""

    def __call__(self, batch: Any, h: Tensor, mode: Mode = "response", *, repeated: bool = False) -> Tensor:
        """Return a scalar with its graph at h; if ``repeated``, running statistics do not move."""


@checked
@dataclass(frozen=True, kw_only=True)
class ResponseLoop(ABC):
    """Order of the steps, distribution of h in training, and the gradients that train w₀ and φ.

    Args:
        perturbation: Distribution of h in training.
        train_steps: Steps on training data, then
        valid_steps: steps of the hyperparameters on validation data.
        warmup_steps: Steps on training data before the first of these rounds.
    """

    perturbation: Perturbation
    train_steps: int = 1
    valid_steps: int = 1
    warmup_steps: int = 0

    centred: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(1, train_steps=self.train_steps, valid_steps=self.valid_steps)
        at_least(0, warmup_steps=self.warmup_steps)

    def trains(self, inner_steps: int) -> bool:
        """Return True if the next batch is used for a training step, after ``inner_steps`` of them."""
        return True

    def outer_steps(self, inner_steps: int) -> int:
        """Count the steps of the hyperparameters that follow the training step of number ``inner_steps``."""
        rounds = inner_steps - self.warmup_steps
        return self.valid_steps if rounds > 0 and rounds % self.train_steps == 0 else 0

    def gradients(
        self, loss: TrainingLoss, batch: Any, center: Tensor, h: Tensor, general: Leaves, phi: Leaves
    ) -> tuple[Tensor, Gradients, Gradients]:
        """Return the loss, its gradients for w₀ and those for φ: all of the loss at the perturbed h."""
        value = loss(batch, h)
        found = torch.autograd.grad(value, [*general, *phi], allow_unused=True)
        return value.detach(), found[: len(general)], found[len(general) :]


@checked
@dataclass(frozen=True, kw_only=True)
class Global(ResponseLoop):
    """First the response everywhere, h ~ p(λ), for ``response_steps``; then only steps of the hyperparameters.

    Lorraine & Duvenaud (2018), arXiv 1802.09419, algorithm 2. ``max_steps`` of the Trainer counts training steps, which
    end with the first phase: let ``max_epochs`` end the second.

    Args:
        response_steps: Steps on training data.
        perturbation: p(λ).
    """

    response_steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, response_steps=self.response_steps)

    perturbation: Perturbation = GlobalNormal()  # noqa: RUF009 - frozen

    def trains(self, inner_steps: int) -> bool:
        """Return True in the first phase."""
        return inner_steps < self.response_steps

    def outer_steps(self, inner_steps: int) -> int:
        """Return 0 in the first phase, ``valid_steps`` for each batch in the second."""
        return 0 if self.trains(inner_steps) else self.valid_steps


@checked
@dataclass(frozen=True, kw_only=True)
class Local(ResponseLoop):
    """Alternating steps, h ~ N(λ, σ²) of fixed scale. Lorraine & Duvenaud (2018), algorithm 3."""

    perturbation: Perturbation = FixedScale()  # noqa: RUF009 - frozen


@checked
@dataclass(frozen=True, kw_only=True)
class Simplified(ResponseLoop):
    """Alternating steps at h = λ. The response learns its slope only from λ's own movement."""

    perturbation: Perturbation = field(default=NoPerturbation(), init=False)


@checked
@dataclass(frozen=True, kw_only=True)
class STN(ResponseLoop):
    """Self-Tuning Networks: alternating steps, h ~ N(λ, σ²) with σ learned against an entropy bonus.

    MacKay, Vicol, Lorraine, Duvenaud & Grosse (2019), ICLR, arXiv 1903.03088.
    """

    train_steps: int = 2
    perturbation: Perturbation = LearnedScale()  # noqa: RUF009 - frozen


@checked
@dataclass(frozen=True, kw_only=True)
class DeltaSTN(STN):
    """Delta-STN: w(h) = w₀ + Δ(h − λ); w₀ is trained at the unperturbed λ, Δ on the output linearized in it.

    The two no longer disturb each other, which makes the problem better conditioned. With one h for the batch, the
    first-order effect of the perturbation through w₀'s gradient, which is noise, is subtracted from the response's
    loss. When λ moves, w₀ moves along the response, so that w(·) stays the same function. The response's curvature is
    σ² times that of the weights: give ``response_optimizer`` a rate of about the weights' over σ², or Adam. Bae &
    Grosse (2020), NeurIPS, arXiv 2010.13514.

    Args:
        response_every: The response is trained in every n-th training step, w₀ in each: the response's loss costs twice
            as much as that of w₀. 1: in each, as in the paper.
        linearized: Train the response on f(w₀) + J·Δ; False: on f(w₀ + Δ), which needs no forward mode.
    """

    train_steps: int = 5
    response_every: int = 3
    linearized: bool = True

    centred: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, response_every=self.response_every)

    def gradients(
        self, loss: TrainingLoss, batch: Any, center: Tensor, h: Tensor, general: Leaves, phi: Leaves
    ) -> tuple[Tensor, Gradients, Gradients]:
        """Return the loss at λ, its gradients for w₀, and those of the linearized loss at h for φ."""
        value = loss(batch, center, "general")
        for_general = torch.autograd.grad(value, general, allow_unused=True)
        if loss.inner_steps % self.response_every:
            return value.detach(), for_general, (None,) * len(phi)
        moved = loss(batch, h, "linearized" if self.linearized else "response", repeated=True)
        if h.dim() == 1:
            # ⟨Δ(h), ∂L/∂w₀⟩, a control variate. Its derivative for φ has mean zero over perturbations, as w₀'s gradient
            # does not know of them, and vanishes at w₀'s optimum. Without it, noise of size σ·|∂L/∂w₀| hides what is
            # to be learned, of size σ².
            gradients = dict(zip(loss.response.general_parameters(), for_general, strict=True))
            moved = moved - loss.response.first_order(h - loss.response.center, gradients)
        for_phi = torch.autograd.grad(moved, phi, allow_unused=True)
        return value.detach(), for_general, for_phi
