"""Class-conditional images that are drawn, not read: for tests and for trying a configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.datamodules.in_memory import InMemoryDataModule, LabelledImages


@checked
class SyntheticImagesDataModule(InMemoryDataModule):
    """A coloured disc on a dark ground; the class is where it sits on a circle and its hue.

    The format is that of CIFAR-10 and padded Fashion-MNIST: ``(n, C, side, side)`` in [−1, 1], ten classes.
    Position, radius and ground vary within a class.

    Args:
        channels: 3, or 1 for grey.
        resolution: Side in pixels.
        data_seed: Seed of the images themselves; ``seed`` is that of their split.
        options: Options of :class:`InMemoryDataModule`.

    Example:
        >>> data = SyntheticImagesDataModule(train_size=20, val_size=10)
        >>> data.setup()
        >>> tuple(data.train_images.shape), float(data.train_images.min()) >= -1
        ((20, 3, 32, 32), True)
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        resolution: int = 32,
        data_seed: int = 0,
        train_size: int = 2000,
        val_size: int = 200,
        batch_size: int = 50,
        **options: Any,
    ) -> None:
        super().__init__(
            train_size=train_size, val_size=val_size, batch_size=batch_size, symmetric=True, **options
        )
        if channels not in (1, 3) or resolution < 8:
            raise ValueError(
                f"channels must be 1 or 3, resolution at least 8. Got {channels} and {resolution}."
            )
        self.channels, self.resolution, self.data_seed = channels, resolution, data_seed

    @override
    def load(self) -> tuple[LabelledImages, LabelledImages | None]:
        pool = self._draw(self.train_size + self.val_size, self.data_seed)
        return pool, self._draw(max(self.val_size, self.num_classes), self.data_seed + 1)

    def _draw(self, count: int, seed: int) -> LabelledImages:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % self.num_classes
        angle = 2 * math.pi * labels / self.num_classes
        jitter = torch.randn(2, count, generator=generator) * 0.06
        x, y = 0.5 * torch.cos(angle) + jitter[0], 0.5 * torch.sin(angle) + jitter[1]
        radius = 0.22 + 0.06 * torch.rand(count, generator=generator)
        line = torch.linspace(-1, 1, self.resolution)
        dx, dy = line.view(1, 1, -1) - x.view(-1, 1, 1), line.view(1, -1, 1) - y.view(-1, 1, 1)
        inside = torch.sigmoid((radius.view(-1, 1, 1) - (dx**2 + dy**2).sqrt()) * self.resolution)
        hue = angle.view(-1, 1) + torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3
        colour = (0.5 + 0.5 * torch.cos(hue)) if self.channels == 3 else torch.ones(count, 1)
        ground = 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
        images = ground + (1 - ground) * inside.unsqueeze(1) * colour.view(count, -1, 1, 1)
        return LabelledImages((images * 255).to(torch.uint8), labels)
