"""Normalization layers whose weights respond to hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from lightning_nested.hypernetworks.layers.arithmetic import linearly_moved, moved, shift_of, unpack_dual
from lightning_nested.hypernetworks.layers.base import HyperLayer, check_examples, placement, total


class _HyperNorm(HyperLayer):
    """Normalisation layers: gain and shift respond entry by entry, the statistics are those of the batch."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """y for one h, or one of each example."""
        return cast("Tensor", self._call(self._per_example, x, h))

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        layer_norm = isinstance(self, nn.LayerNorm)
        dim = self._batch_dim if layer_norm else 0
        check_examples(x, delta, dim, type(self).__name__)
        gain, shift = self._parameters["weight"], self._parameters["bias"]
        self._parameters["weight"] = self._parameters["bias"] = None
        try:
            y = cast("Tensor", self.plain.forward(self, x))
        finally:
            self._parameters["weight"], self._parameters["bias"] = gain, shift
        return self._affine(
            y, gain, shift, delta, placement(x.dim(), dim, -1 if layer_norm else 1), linearized
        )

    def _affine(
        self,
        y: Tensor,
        gain: Tensor | None,
        shift: Tensor | None,
        delta: Tensor,
        place: Callable[[Tensor], Tensor],
        linearized: bool,
    ) -> Tensor:
        """gain(h) ⊙ y + shift(h)."""
        of_gain, of_shift = (shift_of(delta, self.response_of(name)) for name in ("weight", "bias"))
        if not linearized:
            gain, shift = total(gain, of_gain), total(shift, of_shift)
            coefficient, shift = (None if t is None else place(t) for t in (gain, shift))
            if coefficient is None:
                return y if shift is None else y + shift.to(y.dtype)
            return moved(None, coefficient, y, shift)
        value, tangent = unpack_dual(y)
        normal, fixed = value.detach(), None if gain is None else place(gain.detach()).to(y.dtype)
        if fixed is not None:
            value = value * fixed
            tangent = None if tangent is None else tangent * fixed
        elif tangent is not None:
            tangent = tangent.clone()  # it is not ours to change
        if shift is not None:
            value = value + place(shift.detach()).to(y.dtype)
        of_gain, of_shift = (None if t is None else place(t) for t in (of_gain, of_shift))
        return linearly_moved(value, tangent, of_gain, None if of_gain is None else normal, of_shift)


class HyperLayerNorm(_HyperNorm, nn.LayerNorm):
    """Made by :func:`best_response`; see :class:`_HyperNorm`."""

    plain = nn.LayerNorm


class HyperGroupNorm(_HyperNorm, nn.GroupNorm):
    """Made by :func:`best_response`; see :class:`_HyperNorm`."""

    plain = nn.GroupNorm


class HyperBatchNorm1d(_HyperNorm, nn.BatchNorm1d):
    """Made by :func:`best_response`; see :class:`_HyperNorm`."""

    plain = nn.BatchNorm1d


class HyperBatchNorm2d(_HyperNorm, nn.BatchNorm2d):
    """Made by :func:`best_response`; see :class:`_HyperNorm`."""

    plain = nn.BatchNorm2d
