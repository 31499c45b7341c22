"""Samples of any GANModule with random numbers of their own, for scores, pictures, predict and held-out losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_nested.anneal import annealed
from lightning_nested.modules.gan.biggan_options import BatchNormMode, Sampling
from lightning_nested.modules.gan.sampling import sampling_mode
from lightning_nested.networks.adversarial import AdversarialLoss, widened
from lightning_nested.networks.biggan.tables import check_labels
from lightning_nested.trainer.random_stream import RandomStream

if TYPE_CHECKING:
    from lightning_nested.modules.gan.module import GANModule

_SAMPLING = Sampling()


def draw(
    module: GANModule, labels: Tensor, *, batch_norm: BatchNormMode = "running", generator: torch.Generator
) -> Tensor:
    """Return a sample for each label, without a graph, at least float32.

    Without classes, or where labels are fractions, only their number counts.

    The module's own ``sample_latents``, ``generate`` and, without classes, ``fakes`` make them; the global random
    streams stay as they are.
    """
    device = module.device
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    classes = module.num_classes
    if classes is not None and not labels.is_floating_point():
        check_labels(labels.cpu(), classes)

    def batch() -> Tensor:
        return module.fakes(_SAMPLING.batch_size)[0]

    def part(y: Tensor) -> Tensor:
        if classes is None or y.is_floating_point():
            return module.fakes(len(y))[0]
        return module.generate(module.sample_latents(len(y)), y.to(device))

    # Of equal size: batch norm refuses a batch of one. With more processes than samples some have none to make; two
    # show the shape.
    wanted = labels if len(labels) else labels.new_zeros(2)
    parts = wanted.tensor_split(math.ceil(len(wanted) / _SAMPLING.batch_size))
    with (
        RandomStream(seed, device),
        sampling_mode(module.generator, batch_norm, batch, _SAMPLING.standing_batches),
    ):
        return widened(torch.cat(list(map(part, parts))))[: len(labels)]


def labels_of(module: GANModule, batch: Any) -> Tensor:
    """Return the labels that a batch of ``predict`` asks for; without classes zeros, one for each example.

    Raises:
        ValueError: In a conditional model, if a batch has no labels.
    """
    first = batch[0] if isinstance(batch, Sequence) else batch
    if module.num_classes is None:
        return torch.zeros(len(first), dtype=torch.long)
    labels = batch if isinstance(batch, Tensor) else batch[1] if len(batch) > 1 else None
    if not isinstance(labels, Tensor):
        raise ValueError(
            "predict makes a sample for each label of a batch: a tensor of class numbers, or (data, labels, …). Got "
            f"{type(batch).__name__} without labels; pass DataLoader(torch.arange({module.num_classes}))."
        )
    return labels


def held_out(
    loss: AdversarialLoss, real: Tensor, fake: Tensor, stage: str, updates: int
) -> dict[str, Tensor]:
    """Return both losses and mean scores on held-out data, named for logs."""
    now = annealed(loss, updates)
    return {
        f"{stage}_discriminator_loss": now.discriminator(real, fake),
        f"{stage}_generator_loss": now.generator_beside(real, fake),
        f"{stage}_real_score": real.mean(),
        f"{stage}_fake_score": fake.mean(),
    }
