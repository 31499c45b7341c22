"""Normalization layers whose weights respond to hyperparameters."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from lightning_nested.hypernetworks.layers.arithmetic import linearly_moved, moved, total, unpack_dual
from lightning_nested.hypernetworks.layers.base import HyperLayer, check_examples, placement


class _HyperNorm(HyperLayer):
    """Normalization layers: gain and shift respond entry by entry, the statistics are those of the batch."""

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        dim, row = (self._batch_dim, -1) if isinstance(self, nn.LayerNorm) else (0, 1)
        check_examples(x, delta, dim, type(self).__name__)
        place = placement(x.dim(), dim, row)
        gain, shift = self._parameters["weight"], self._parameters["bias"]
        self._parameters["weight"] = self._parameters["bias"] = None
        try:
            y = cast("Tensor", self.plain.forward(self, x))
        finally:
            self._parameters["weight"], self._parameters["bias"] = gain, shift
        of_gain, of_shift = self._shift(delta, "weight"), self._shift(delta, "bias")
        if not linearized:
            coefficient, added = (
                None if t is None else place(t) for t in (total(gain, of_gain), total(shift, of_shift))
            )
            if coefficient is None:
                return y if added is None else y + added.to(y.dtype)
            return moved(None, coefficient, y, added)
        value, tangent = unpack_dual(y)
        normal = value.detach()
        if gain is not None:
            fixed = place(gain.detach()).to(y.dtype)
            value = value * fixed
            tangent = None if tangent is None else tangent * fixed
        elif tangent is not None:
            tangent = tangent.clone()  # it is not ours to change
        if shift is not None:
            value = value + place(shift.detach()).to(y.dtype)
        of_gain, of_shift = (None if t is None else place(t) for t in (of_gain, of_shift))
        return linearly_moved(value, tangent, of_gain, None if of_gain is None else normal, of_shift)


class HyperLayerNorm(_HyperNorm, nn.LayerNorm):
    """``nn.LayerNorm`` whose gain and shift respond; made by :func:`best_response`."""

    plain = nn.LayerNorm


class HyperGroupNorm(_HyperNorm, nn.GroupNorm):
    """``nn.GroupNorm`` whose gain and shift respond; made by :func:`best_response`."""

    plain = nn.GroupNorm


class HyperBatchNorm1d(_HyperNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose gain and shift respond; made by :func:`best_response`."""

    plain = nn.BatchNorm1d


class HyperBatchNorm2d(_HyperNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose gain and shift respond; made by :func:`best_response`."""

    plain = nn.BatchNorm2d
