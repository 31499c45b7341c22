"""Images from a class-conditional generator: truncation, statistics of batch norm, interpolation."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.modules.gan.biggan_options import Sampling
from lightning_nested.networks import Generator, frozen_power_iteration, standing_statistics
from lightning_nested.networks.adversarial import widened
from lightning_nested.networks.biggan.tables import check_labels
from lightning_nested.trainer.isolation import untouched_buffers
from lightning_nested.trainer.stand_ins import StandIns


def seeded(device: torch.device | str, *place: int | str) -> torch.Generator:
    """A stream of random numbers of its own for a place such as ``(seed, "grid", rank)``.

    Example:
        >>> first, again = (torch.randn(2, generator=seeded("cpu", 0, "z")) for _ in range(2))
        >>> bool(torch.equal(first, again))
        True
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    # torch's CPU generator looks at the low 32 bits of a seed only: hence a hash, and no arithmetic.
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def truncated_normal(
    *shape: int, bound: float | None, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal float32 numbers given that each lies within ± ``bound``; None: plain normal.

    Drawn by the inverse distribution function, so their number does not depend on luck.

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
def sampling_mode(network: Generator, sampling: Sampling, generator: torch.Generator) -> Iterator[None]:
    """Inside, the network makes images as ``sampling.batch_norm`` says; it comes back as it was.

    A batch's statistics are those of this process's own batch, of synchronised batch norm too: processes may make
    different numbers of batches, and would wait for each other for ever.
    """
    modes = {layer: layer.training for layer in network.modules()}

    def batch() -> Tensor:
        images: Tensor = network(*draw(network, sampling.batch_size, sampling, generator))
        return images

    try:
        with torch.no_grad(), untouched_buffers(network), frozen_power_iteration(network), _alone(network):
            if sampling.batch_norm == "standing":
                standing_statistics(network, batch, num_batches=sampling.standing_batches)
            network.train(sampling.batch_norm == "batch")
            yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


@contextmanager
def _alone(network: nn.Module) -> Iterator[None]:
    """Inside, synchronised batch norms compute as plain ones do, without a message."""
    stand_ins = StandIns()
    for layer in network.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            stand_ins.put(layer, "forward", partial(nn.BatchNorm2d.forward, layer))
    try:
        yield
    finally:
        stand_ins.put_back()


def draw(
    network: Generator, count: int, sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """z ``(count, latent_dim)`` and uniform labels ``(count,)``, where and as precise as the network is."""
    z = latents(network, count, sampling, generator)
    return z, torch.randint(network.num_classes, (count,), generator=generator, device=z.device)


def latents(network: Generator, count: int, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """z ``(count, latent_dim)``."""
    like = next(network.parameters())
    z = truncated_normal(
        count, network.latent_dim, bound=sampling.truncation, generator=generator, device=like.device
    )
    return z.to(like.dtype)


def sample_images(
    network: Generator,
    labels: Tensor,
    sampling: Sampling,
    *,
    generator: torch.Generator,
    z: Tensor | None = None,
) -> Tensor:
    """Images of the classes ``labels``, ``(N, C, side, side)`` in [−1, 1], without a graph, at least float32.

    Args:
        network: The generator; its mode, buffers and spectral vectors are as before afterwards.
        labels: ``(N,)`` classes or ``(N, num_classes)`` mixtures of them.
        sampling: Truncation, statistics, batch size.
        generator: Where z comes from, on the network's device.
        z: ``(N, latent_dim)`` to be used instead.

    Raises:
        ValueError: If a label is out of range.
    """
    device = next(network.parameters()).device
    check_labels(labels.cpu(), network.num_classes)  # here also of another device: sampling may wait
    labels = labels.to(device)
    if not len(labels):  # the share of a process when there are more of them than images
        return torch.empty(0, network.image_channels, *2 * (network.resolution,), device=device)
    with sampling_mode(network, sampling, generator):
        if z is None:
            z = latents(network, len(labels), sampling, generator)
        size = sampling.batch_size
        parts = [network(*part) for part in zip(torch.split(z, size), torch.split(labels, size), strict=True)]
    return widened(torch.cat(parts))


def interpolate(
    network: Generator,
    start: tuple[Tensor, int],
    end: tuple[Tensor, int],
    steps: int,
    sampling: Sampling,
    *,
    generator: torch.Generator,
) -> Tensor:
    """Images on the line from one (z, class) to another, ``(steps, C, side, side)``; classes are mixed linearly.

    Raises:
        ValueError: If ``steps`` is below 2 or a class is out of range.
    """
    if steps < 2:
        raise ValueError(f"An interpolation needs at least 2 steps. Got {steps}.")
    classes = torch.tensor([start[1], end[1]])
    check_labels(classes, network.num_classes)
    first, last = functional.one_hot(classes, network.num_classes).float()
    t = torch.linspace(0, 1, steps).unsqueeze(1)
    like = next(network.parameters())
    z = torch.lerp(start[0].cpu().float().expand(steps, -1), end[0].cpu().float().expand(steps, -1), t)
    return sample_images(network, torch.lerp(first, last, t), sampling, generator=generator, z=z.to(like))
