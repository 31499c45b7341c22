"""Images from a class-conditional generator: truncation, statistics of batch norm, interpolation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.extras import require_package
from lightning_nested.files import replacing
from lightning_nested.modules.gan.biggan_options import BatchNormMode, Sampling
from lightning_nested.networks import Generator, frozen_power_iteration, standing_statistics
from lightning_nested.networks.adversarial import widened
from lightning_nested.networks.biggan.tables import check_labels
from lightning_nested.networks.conditional_batch_norm import batch_norms, restored_modes
from lightning_nested.trainer.isolation import untouched_buffers
from lightning_nested.trainer.stand_ins import StandIns


def seeded(device: torch.device | str, *place: int | str) -> torch.Generator:
    """Return a generator with random numbers of its own for a place such as ``(seed, "grid", rank)``.

    Example:
        >>> first, again = (torch.randn(2, generator=seeded("cpu", 0, "z")) for _ in range(2))
        >>> bool(torch.equal(first, again))
        True
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    # A hash, not arithmetic: torch's CPU generator uses only the low 32 bits of a seed.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def truncated_normal(
    *shape: int, bound: float | None, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw standard normal float32 numbers given that each lies within ± ``bound``; None: plain normal.

    Drawn by the inverse distribution function: the count of random numbers used does not depend on their values.

    Example:
        >>> z = truncated_normal(1000, bound=0.5, generator=torch.Generator().manual_seed(0))
        >>> bool(z.abs().max() <= 0.5), round(z.std().item(), 1)
        (True, 0.3)
    """
    if bound is None:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    inside = math.erf(bound / 2**0.5)
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
    z = 2**0.5 * torch.special.erfinv((2.0 * uniform - 1.0) * inside)
    return torch.clamp(z, -bound, bound)


@contextmanager
def sampling_mode(
    network: nn.Module, batch_norm: BatchNormMode, batch: Callable[[], object], standing_batches: int
) -> Iterator[None]:
    """Let a generator make samples with these statistics, all other layers in evaluation mode; restore it on exit.

    Synchronized batch norm too uses this process's own batch alone: processes may make different numbers of
    batches, and would wait for each other forever.

    Args:
        network: The generator.
        batch_norm: Statistics of its batch norms, see :class:`Sampling`.
        batch: Make a batch, for standing statistics.
        standing_batches: Batches for them.
    """
    with (
        torch.no_grad(),
        restored_modes(network),
        untouched_buffers(network),
        frozen_power_iteration(network),
        _alone(network),
    ):
        if batch_norm == "standing":
            standing_statistics(network, batch, num_batches=standing_batches)
        network.eval()
        if batch_norm == "batch":
            for norm in batch_norms(network):
                norm.train()
        yield


@contextmanager
def _alone(network: nn.Module) -> Iterator[None]:
    """Let synchronized batch norms compute as plain ones do, without messages."""
    stand_ins = StandIns()
    for layer in network.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            stand_ins.put(layer, "forward", partial(nn.BatchNorm2d.forward, layer))
    try:
        yield
    finally:
        stand_ins.put_back()


def latents(network: Generator, count: int, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw z ``(count, latent_dim)`` in the network's precision and on its device."""
    like = next(network.parameters())
    shape = count, network.latent_dim
    return truncated_normal(*shape, bound=sampling.truncation, generator=generator, device=like.device).to(
        like.dtype
    )


def guided(labels: Tensor, num_classes: int, guidance: float) -> Tensor:
    """Return mixtures y + γ(y − 1/n) of classes ``(N,)`` or mixtures ``(N, n)``; at γ = 0 the labels themselves.

    Example:
        >>> guided(torch.tensor([0]), 2, 0.5).tolist()
        [[1.25, -0.25]]
    """
    if not guidance:
        return labels
    y = labels if labels.is_floating_point() else functional.one_hot(labels, num_classes).float()
    return y + guidance * (y - 1 / num_classes)


def sample_images(
    network: Generator,
    labels: Tensor,
    sampling: Sampling,
    *,
    generator: torch.Generator,
    z: Tensor | None = None,
) -> Tensor:
    """Return images of the classes ``labels``, ``(N, C, side, side)`` in [−1, 1], without a graph, at least float32.

    Args:
        network: The generator; its modes, buffers and spectral vectors are restored.
        labels: ``(N,)`` classes or ``(N, num_classes)`` mixtures of them.
        sampling: Truncation, statistics, batch size.
        generator: Random numbers for z, on the network's device.
        z: ``(N, latent_dim)`` in place of random ones.
    """
    device = next(network.parameters()).device
    # Labels on a GPU are checked too: sampling may wait.
    check_labels(labels.cpu(), network.num_classes)
    labels = labels.to(device)
    # With more processes than images some have none to make.
    if not len(labels):
        return torch.empty(0, network.image_channels, *2 * (network.resolution,), device=device)

    def make(z: Tensor, y: Tensor) -> Tensor:
        made: Tensor = network(z, guided(y, network.num_classes, sampling.guidance))
        return made

    def batch() -> Tensor:
        z = latents(network, sampling.batch_size, sampling, generator)
        return make(z, torch.randint(network.num_classes, (len(z),), generator=generator, device=z.device))

    with sampling_mode(network, sampling.batch_norm, batch, sampling.standing_batches):
        if z is None:
            z = latents(network, len(labels), sampling, generator)
        size = sampling.batch_size
        parts = [make(*part) for part in zip(torch.split(z, size), torch.split(labels, size), strict=True)]
    return widened(torch.cat(parts))


def save_images(images: Tensor, labels: Tensor, folder: Path, prefix: str) -> None:
    """Write ``<folder>/class_<label>/<prefix>_<position>.png`` for each image; of mixtures ``<folder>/mixtures/…``."""
    require_package("torchvision")
    from torchvision.utils import save_image  # here, because it costs a second

    names = ["mixtures"] * len(labels) if labels.ndim > 1 else [f"class_{y}" for y in labels.tolist()]
    for position, (name, image) in enumerate(zip(names, images, strict=True)):
        with replacing(folder / name / f"{prefix}_{position:04d}.png") as file:
            save_image(image, file, format="png", normalize=True, value_range=(-1, 1))


def interpolate(
    network: Generator,
    start: tuple[Tensor, int],
    end: tuple[Tensor, int],
    steps: int,
    sampling: Sampling,
    *,
    generator: torch.Generator,
) -> Tensor:
    """Return images on the line from one (z, class) to another, ``(steps, C, side, side)``, with mixed classes."""
    if steps < 2:
        raise ValueError(f"An interpolation needs at least 2 steps. Got {steps}.")
    classes = torch.tensor([start[1], end[1]])
    check_labels(classes, network.num_classes)
    first, last = functional.one_hot(classes, network.num_classes).float()
    t = torch.linspace(0, 1, steps).unsqueeze(1)
    like = next(network.parameters())
    z = torch.lerp(start[0].cpu().float().expand(steps, -1), end[0].cpu().float().expand(steps, -1), t)
    return sample_images(network, torch.lerp(first, last, t), sampling, generator=generator, z=z.to(like))
