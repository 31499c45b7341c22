"""Derivatives of a run's weights and optimizer buffers by options of the optimizer, over its last few steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nested.dynamics.tangents import Clip, Tangents
from lightning_nested.linalg.curvature import HessianOperator
from lightning_nested.linalg.vectors import Vector, flatten, unflatten, zeros_where_none
from lightning_nested.optim.registry import known_rule

# torch has no annotations for these.
_DUAL: Any = forward_ad.make_dual
_PARTS: Any = forward_ad.unpack_dual

Slopes: TypeAlias = Sequence[Mapping[str, Tensor]]
"""For each group, by the name of the option, its derivative along each tangent, (k,)."""


class OptionTangents(Tangents):
    """Pushes Z = ∂(w, buffers)/∂h along: Z ← (∂Φ/∂(w, buffers)) Z + (∂Φ/∂options) ∂options/∂h.

    h are k numbers that the options of the optimizer's groups are functions of, Φ the optimizer's step. At each step
    call :meth:`observe` with every loss of the step, then :meth:`advance` just before ``optimizer.step()``. From Z = 0
    the first step needs no products, and no :meth:`observe`.

    Args:
        params: Parameters of the optimizer that require gradients, in their order.
        k: Number of tangents.
        **options: ``reduce``, see :class:`Tangents`.

    Attributes:
        gradient: Gradient of the last observed loss.
    """

    gradient: Vector = ()

    def __init__(self, params: Sequence[Tensor], *, k: int, **options: Any) -> None:
        self._products: Tensor | None = None
        self._begun = False  # whether Z has been through a step
        super().__init__(params, k=k, align=0, **options)

    def clear(self) -> None:
        """Begin at Z = 0."""
        self.frame, self.slots, self._products, self._begun = None, [], None, False

    def forget_losses(self) -> None:
        """Drop the products of losses whose step was not made."""
        self._products = None

    @property
    def needs_losses(self) -> bool:
        """True if :meth:`observe` must be called before the coming :meth:`advance`."""
        return self._begun

    def observe(self, loss: Tensor) -> None:
        """Add the products of a loss's Hessian with every tangent; do nothing where Z = 0."""
        if not self._begun or self.frame is None:
            return
        operator = HessianOperator(loss, self.params)
        self.gradient = tuple(g.detach() for g in operator.gradient)
        products = torch.stack([flatten(operator.matvec(unflatten(z, self.params))) for z in self.frame])
        self._products = products if self._products is None else self._products.add_(products)

    @torch.no_grad()
    def shrink(self, optimizer: Optimizer, slopes: Slopes, decays: Mapping[int, Tensor]) -> None:
        """Push Z through w ← (1 − αd)w, before it; ``decays`` are d by the parameter's ``id``."""
        frame = self._frame()
        for group, along in zip(optimizer.param_groups, slopes, strict=True):
            for p in group["params"]:
                if id(p) in decays and id(p) in self._columns and p.grad is not None:
                    columns, decay = self._columns[id(p)], decays[id(p)].expand_as(p).reshape(-1)
                    frame[:, columns] *= 1 - float(group["lr"]) * decay
                    if "lr" in along:
                        frame[:, columns] -= torch.outer(
                            along["lr"].to(frame), decay * p.detach().reshape(-1)
                        )

    @torch.no_grad()
    def advance(
        self,
        optimizer: Optimizer,
        slopes: Slopes,
        *,
        clip: Clip | None = None,
        decays: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Push Z through the optimizer's coming step, and add what the step itself has of the options.

        Call it before the optimizer's step, with gradients in ``.grad`` that are not clipped yet.

        Args:
            optimizer: The optimizer, with the options of the coming step.
            slopes: Derivatives of the options along each tangent.
            clip: Clipping of the gradient that follows.
            decays: d of terms d·w in ``.grad`` that no observed loss has, by the parameter's ``id``.

        Raises:
            RuntimeError: Z is not 0, and no loss of this step was observed.
            FloatingPointError: A tangent is not finite.
        """
        # As after a training_step that returned None: the optimizer makes no step.
        if all(p.grad is None for p in self.params):
            self.forget_losses()
            return
        begun, self._begun, frame = self._begun, True, self._frame()
        gradient = flatten(zeros_where_none([p.grad for p in self.params], self.params))
        direct = self._direct(optimizer, slopes, gradient if clip is None else clip.value(gradient))
        if begun:
            products, self._products = self._products, None
            if products is None:
                raise RuntimeError(
                    "advance() needs the losses of this step. Got none; call observe(loss) before."
                )
            dg = products if self.reduce is None else self.reduce(products)
            for p in self.params:
                if decays and id(p) in decays:
                    columns = self._columns[id(p)]
                    dg[:, columns] += decays[id(p)].expand_as(p).reshape(-1) * frame[:, columns]
            self.push(optimizer, dg, gradient=gradient, clip=clip)
        for columns, (weights, *buffers) in direct:
            frame[:, columns] += weights
            while len(self.slots) < len(buffers):
                self.slots.append(torch.zeros_like(frame))
            for slot, buffer in zip(self.slots, buffers, strict=False):
                slot[:, columns] += buffer
        if not bool(torch.isfinite(frame.sum())):
            raise FloatingPointError(
                "Derivatives by the optimizer's options must be finite. Got one that is not."
            )

    def along(self, v: Vector) -> Tensor:
        """Return vᵀZ, (k,); zeros where Z = 0."""
        if self.frame is None:
            return torch.zeros(self.k, dtype=self.dtype, device=self.params[0].device)
        return self.frame @ flatten(v).to(self.frame)

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._begun = self.frame is not None

    def _frame(self) -> Tensor:
        if self.frame is None:
            self.frame = torch.zeros(self.k, self.n, dtype=self.dtype, device=self.params[0].device)
        return self.frame

    def _direct(
        self, optimizer: Optimizer, slopes: Slopes, gradient: Tensor
    ) -> list[tuple[slice, list[Tensor]]]:
        """Return (∂Φ/∂options) ∂options/∂h of each parameter, as rows of its weights and its buffers."""
        found = []
        for group, along in zip(optimizer.param_groups, slopes, strict=True):
            rule = known_rule(optimizer, group)
            for p in group["params"]:
                # torch passes over those without a gradient
                if id(p) not in self._columns or p.grad is None:
                    continue
                columns, w = self._columns[id(p)], p.detach().to(self.dtype)
                slots, taken = rule.resume(w, optimizer.state.get(p, {}))
                t = torch.tensor(taken + 1, dtype=torch.float64, device=p.device)
                slots = tuple(slot.to(self.dtype) for slot in slots)
                given = (w, gradient[columns].view_as(p).to(self.dtype), slots, t)
                rows = [
                    _derivative(rule, {name: x[i] for name, x in along.items() if bool(x[i])}, given)
                    for i in range(self.k)
                ]
                found.append(
                    (columns, [torch.stack(each).to(self.dtype) for each in zip(*rows, strict=True)])
                )
        return found


def _derivative(rule: Any, slopes: Mapping[str, Tensor], given: tuple[Any, ...]) -> list[Tensor]:
    """Return the derivative of a step along options of its rule, flat: of the weights, then of each buffer."""
    others = {name: x for name, x in slopes.items() if name != "lr"}
    found = (
        _along_others(rule, others, given) if others else [torch.zeros_like(x) for x in (given[0], *given[2])]
    )
    if "lr" in slopes:
        # Every rule is affine in the rate.
        one, zero = (replace(rule, lr=lr).step(*given) for lr in (1.0, 0.0))
        pairs = zip(found, (one[0], *one[1]), (zero[0], *zero[1]), strict=True)
        found = [f.add_((a - b) * slopes["lr"].to(a.dtype)) for f, a, b in pairs]
    return [f.reshape(-1) for f in found]


def _along_others(rule: Any, slopes: Mapping[str, Tensor], given: tuple[Any, ...]) -> list[Tensor]:
    """Return the derivative by dual numbers, whose first use in a process imports for half a second."""
    with forward_ad.dual_level():
        moved = {
            name: _DUAL(torch.as_tensor(getattr(rule, name), dtype=x.dtype), x) for name, x in slopes.items()
        }
        after, buffers = replace(rule, **moved).step(*given)
        tangents = [_PARTS(x).tangent for x in (after, *buffers)]
    return [
        torch.zeros_like(x) if dx is None else dx.detach().clone()
        for x, dx in zip((after, *buffers), tangents, strict=True)
    ]
