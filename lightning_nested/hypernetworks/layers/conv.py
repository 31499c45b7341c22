"""Convolutions whose weights respond to hyperparameters."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lightning_nested.hypernetworks.layers.arithmetic import respond_to, shift_of
from lightning_nested.hypernetworks.layers.base import HyperLayer, OnePointError, check_examples, placement


class _HyperConv(HyperLayer):
    """Convolutions, with one coefficient per output channel."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """y for one h, or one of each example."""
        return cast("Tensor", self._call(self._per_example, x, h))

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        conv = cast("nn.Conv2d", self)
        if x.dim() != conv.weight.dim():
            raise OnePointError(
                f"{type(self).__name__} with one h of each example needs a batch of images. Got {tuple(x.shape)}."
            )
        check_examples(x, delta, 0, type(self).__name__)
        return respond_to(
            conv._conv_forward,  # padding modes included
            x, conv.weight, self.response_of("weight"), delta, placement(x.dim(), 0, 1), linearized,
            conv.bias, shift_of(delta, self.response_of("bias")),
        )  # fmt: skip


class HyperConv1d(_HyperConv, nn.Conv1d):
    """``nn.Conv1d`` with the response of :class:`HyperLinear` per output channel.

    Args:
        in_channels: Of x.
        out_channels: Of y.
        kernel_size: Width of the kernel.
        num_hyperparameters: n.
        **options: The other arguments of ``nn.Conv1d``.
    """

    plain = nn.Conv1d

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, num_hyperparameters: int, **options: Any
    ) -> None:
        nn.Conv1d.__init__(self, in_channels, out_channels, kernel_size, **options)
        self.respond(num_hyperparameters)


class HyperConv2d(_HyperConv, nn.Conv2d):
    """``nn.Conv2d`` with the response of :class:`HyperLinear` per output channel.

    Args:
        in_channels: Of x.
        out_channels: Of y.
        kernel_size: Sides of the kernel.
        num_hyperparameters: n.
        **options: The other arguments of ``nn.Conv2d``.

    >>> import torch
    >>> layer = HyperConv2d(1, 4, 3, num_hyperparameters=2)
    >>> tuple(layer(torch.zeros(5, 1, 8, 8), torch.zeros(5, 2)).shape)
    (5, 4, 6, 6)
    """

    plain = nn.Conv2d

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, num_hyperparameters: int, **options: Any
    ) -> None:
        nn.Conv2d.__init__(self, in_channels, out_channels, kernel_size, **options)
        self.respond(num_hyperparameters)
