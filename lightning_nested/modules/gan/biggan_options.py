"""Options of BigGAN that are not its optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_nested.arguments import at_least, checked
from lightning_nested.networks.adversarial import AdversarialLoss, DiffAugment, GradientRegularizer, Hinge
from lightning_nested.networks.biggan.tables import Initialization

BatchNormMode = Literal["running", "batch", "standing"]


@checked
@dataclass(frozen=True, kw_only=True)
class BigGANNetworks:
    """Sizes of both networks, as :class:`~lightning_nested.networks.Generator` names them.

    Args:
        width: Base number of channels of both networks.
        latent_dim: Numbers in z.
        num_classes: Classes of the data.
        resolution: 32, 64, 128 or 256.
        image_channels: 3, or 1 for grey images.
        attention: Sides with self-attention, in both networks.
        shared_dim: Width of a class embedding shared by all layers of the generator; 0: one per layer.
        hierarchical: Give each generator block its own slice of z.
        initialization: ``"normal"`` or ``"orthogonal"``.
        minibatch_group: Successive examples that the discriminator compares with one another, a divisor of the batch
            size; 0: it judges each alone.
    """

    width: int = 64
    latent_dim: int = 128
    num_classes: int = 10
    resolution: int = 32
    image_channels: int = 3
    attention: tuple[int, ...] = ()
    shared_dim: int = 0
    hierarchical: bool = False
    initialization: Initialization = "normal"
    minibatch_group: int = 0

    def __post_init__(self) -> None:
        at_least(1, width=self.width, latent_dim=self.latent_dim, num_classes=self.num_classes)
        at_least(1, resolution=self.resolution, image_channels=self.image_channels, attention=self.attention)
        at_least(0, shared_dim=self.shared_dim, minibatch_group=self.minibatch_group)


@checked
@dataclass(frozen=True, kw_only=True)
class BigGANObjective:
    """Losses that the players minimize.

    Args:
        loss: ``Hinge()``, ``NonSaturating()``, ``RelativisticPairing()`` or ``Wasserstein()``.
        regularizers: ``R1(...)``, ``R2(...)``, ``GradientPenalty(...)``, added to the discriminator's loss.
        augment: Random changes of all images that the discriminator sees, or None.
        reuse_fakes: Let the generator's step take the images of the round's last discriminator step, which saves
            a forward; the reference draws new ones.
    """

    loss: AdversarialLoss = Hinge()  # noqa: RUF009 - frozen
    regularizers: tuple[GradientRegularizer, ...] = ()
    augment: DiffAugment | None = None
    reuse_fakes: bool = False


@checked
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of images made outside training.

    Args:
        truncation: z is normal given that every entry lies within ± this; None: plain normal.
        guidance: γ ≥ 0; a class y of n is sampled as the mixture y + γ(y − 1/n), further from what all classes share.
            As a smaller truncation it trades variety for images that look like their class.
        batch_norm: Statistics of the generator: ``"running"`` averages, those of the ``"batch"``, or
            ``"standing"`` ones, the mean over ``standing_batches`` batches with the current weights.
        standing_batches: Batches for standing statistics.
        batch_size: Images per forward.
        seed: Seed of z.
    """

    truncation: float | None = None
    guidance: float = 0.0
    batch_norm: BatchNormMode = "running"
    standing_batches: int = 16
    batch_size: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.truncation is not None and not self.truncation > 0:
            raise ValueError(f"truncation must be positive, or None for none. Got {self.truncation}.")
        at_least(0, guidance=self.guidance)
        at_least(1, standing_batches=self.standing_batches, batch_size=self.batch_size)
        at_least(0, seed=self.seed)


@checked
@dataclass(frozen=True, kw_only=True)
class Execution:
    """Options of speed, memory and logging; they do not change the game.

    Args:
        channels_last: Keep images and weights with the channel as the last index in memory: +30 % on CPU,
            and what tensor cores want.
        compile: ``torch.compile`` both networks where only first derivatives are taken; penalties on the
            discriminator's gradient and spectra use the plain ones, since compiled ones have no double
            backward.
        flush_denormal: On CPU, treat vanishing weights and moments as zero during ``fit``; they would slow
            every product.
        log_details: Log gradient norms, scores, images per second and singular values beside the losses.
    """

    channels_last: bool = True
    compile: bool = False
    flush_denormal: bool = True
    log_details: bool = True
