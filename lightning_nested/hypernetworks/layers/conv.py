"""Convolutions whose weights respond to hyperparameters."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from lightning_nested.arguments import at_least, checked
from lightning_nested.hypernetworks.layers.base import HyperLayer, OnePointError, check_examples, placement


@checked
class _HyperConv(HyperLayer):
    """Convolutions, with one coefficient per output channel."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, num_hyperparameters: int, **options: Any
    ) -> None:
        at_least(
            1, in_channels=in_channels, out_channels=out_channels, num_hyperparameters=num_hyperparameters
        )
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self.respond(num_hyperparameters)

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        conv = cast("nn.Conv2d", self)
        if x.dim() != conv.weight.dim():
            raise OnePointError(
                f"{type(self).__name__} with one h of each example needs a batch of images. Got {tuple(x.shape)}."
            )
        check_examples(x, delta, 0, type(self).__name__)
        # padding modes included
        convolve = conv._conv_forward
        return self._responded(convolve, x, delta, placement(x.dim(), 0, 1), linearized)


class HyperConv1d(_HyperConv, nn.Conv1d):
    """``nn.Conv1d`` with the response of :class:`HyperLinear` per output channel; see :class:`HyperConv2d`."""

    plain = nn.Conv1d


class HyperConv2d(_HyperConv, nn.Conv2d):
    """``nn.Conv2d`` with the response of :class:`HyperLinear` per output channel.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Sides of the kernel.
        num_hyperparameters: n.
        **options: The other arguments of ``nn.Conv2d``.

    >>> import torch
    >>> layer = HyperConv2d(1, 4, 3, num_hyperparameters=2)
    >>> tuple(layer(torch.zeros(5, 1, 8, 8), torch.zeros(5, 2)).shape)
    (5, 4, 6, 6)
    """

    plain = nn.Conv2d
