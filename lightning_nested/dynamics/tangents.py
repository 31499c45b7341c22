"""Tangents of parameters and optimizer buffers, pushed through the optimizer steps of a training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.arguments import at_least, checked
from lightning_nested.dynamics.frames import Product, krylov, orthonormalize, window_weights
from lightning_nested.linalg.processes import Reduce
from lightning_nested.linalg.vectors import Vector
from lightning_nested.optim.registry import SGDRule, known_rule
from lightning_nested.optim.update_rules import Descent, LinearRule, UpdateRule


@checked
@dataclass(frozen=True, kw_only=True)
class Clip:
    """Clipping of an optimizer's gradient, differentiated as a part of its step.

    By norm g ↦ g·c, c = min(1, limit/(‖g‖ + 1e-6)), whose derivative is c·dg − g·(gᵀdg)·c²/(limit·‖g‖) where c < 1;
    by value each entry, with derivative 0 where it is cut.

    Args:
        limit: Bound on the norm over all of the optimizer's gradients, or on each entry.
        algorithm: ``"norm"`` or ``"value"``.

    >>> g, dg = torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 0.0]])
    >>> [round(x, 4) for x in Clip(limit=1.0).tangent(g, dg)[0].tolist()]  # (1 − 9/25, −12/25)/5
    [0.128, -0.096]
    """

    limit: float
    algorithm: Literal["norm", "value"] = "norm"

    def factor(self, g: Tensor) -> Tensor:
        """Compute c for a flat gradient as ``torch.nn.utils.clip_grad_norm_`` does."""
        factor: Tensor = (self.limit / (torch.linalg.vector_norm(g) + 1e-6)).clamp(max=1.0)
        return factor

    def value(self, g: Tensor) -> Tensor:
        """Clip a flat gradient."""
        return g.clamp(-self.limit, self.limit) if self.algorithm == "value" else g * self.factor(g)

    def tangent(self, g: Tensor, dg: Tensor) -> Tensor:
        """Differentiate the clipping at the flat gradient ``g``, along each row of ``dg`` (k, n)."""
        if self.algorithm == "value":
            return torch.where(g.abs() <= self.limit, dg, 0.0)
        factor = self.factor(g)
        if float(factor) >= 1.0:
            return dg
        shrink = factor.square() / (self.limit * torch.linalg.vector_norm(g))
        return torch.addr(factor * dg, -shrink * (dg @ g), g)


@checked
class Tangents:
    """Base class of trackers: pushes k tangents through optimizer steps, and records how fast they grow.

    :class:`TrainingTracker` and :class:`GameTracker` add the products that a push needs.

    Args:
        params: Parameters of the optimizers that require gradients, in their order.
        k: Number of exponents.
        align: Krylov iterations that align the first frame, each one product; 0: random directions.
        orthonormalize_every: Steps between orthonormalisations.
        window: Weights by which :meth:`running` averages: ``"uniform"`` or ``"bump"``, see :class:`SpectrumOptions`.
        seed: Seed of the random frame.
        reduce: Function that averages a tensor over processes.

    Raises:
        ValueError: k is not in 1..n, or an option is out of range.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        k: int = 1,
        align: int = 20,
        orthonormalize_every: int = 1,
        window: Literal["uniform", "bump"] = "uniform",
        seed: int = 0,
        reduce: Reduce | None = None,
    ) -> None:
        at_least(0, align=align, seed=seed)
        at_least(1, orthonormalize_every=orthonormalize_every)
        self.k, self.align, self.every, self.seed, self.reduce = k, align, orthonormalize_every, seed, reduce
        self.window = window
        self.alignment, self.steps = math.nan, 0
        self._history = torch.empty(0, k, dtype=torch.float64)  # twice as long whenever it is full
        self._windows = 0
        self.follow(params)

    def follow(self, params: Sequence[Tensor]) -> None:
        """Follow these parameters from now on, with new tangents; the growth so far is kept."""
        self.params: Vector = tuple(params)
        self.n = sum(p.numel() for p in self.params)
        if not 1 <= self.k <= self.n:
            raise ValueError(f"k must be in 1..n, the number of parameters. Got k={self.k} and n={self.n}.")
        ends = accumulate(p.numel() for p in self.params)
        self._columns = {id(p): slice(e - p.numel(), e) for p, e in zip(self.params, ends, strict=True)}
        self.frame: Tensor | None = None  # (k, n), tangents of the parameters
        self.slots: list[Tensor] = []  # (k, n) each, tangents of the optimizer's buffers
        self._anchor: Tensor | None = None  # tangents before an extrapolation
        self._since = self.steps  # where the windows of this frame began

    def holds(self, params: Iterable[Tensor]) -> bool:
        """Return True if these are the parameters that are followed, in this order."""
        return [id(p) for p in params] == [id(p) for p in self.params]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tangents: single precision at least."""
        found = self.params[0].dtype
        return torch.float32 if found in (torch.float16, torch.bfloat16) else found

    @property
    def growth(self) -> Tensor:
        """(T, k), the logarithmic growth in each window."""
        return self._history[: self._windows]

    # ---- the first frame

    def random_frame(self) -> Tensor:
        """Return (k, n) orthonormal random tangents, the same on every device and process."""
        generator = torch.Generator().manual_seed(self.seed)
        random = torch.randn(self.k, self.n, generator=generator, dtype=torch.float32)
        return orthonormalize(random.to(dtype=self.dtype, device=self.params[0].device))[0].contiguous()

    def begin(self, product: Product, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Set the first frame from ``align`` Krylov vectors of a step's derivative, filled up with random tangents.

        ``product`` is averaged over processes; ``choose(basis, images)``, both (m, n), returns the coordinates (≤ k, m)
        of the first directions in that basis. Raises FloatingPointError if a product is not finite.
        """
        frame = random = self.random_frame()
        if self.align:
            basis, images = krylov(product, random[0], min(max(self.align, self.k), self.n), tolerance=1e-6)
            if not math.isfinite(float(images.sum())):
                raise FloatingPointError(
                    "The first products must be finite. Got a number that is not: the run diverges."
                )
            coordinates = orthonormalize(choose(basis, images))[0].to(basis)
            frame, pushed = coordinates @ basis, coordinates @ images
            tiny = torch.finfo(frame.dtype).tiny
            inside = (pushed @ frame.mT).norm(dim=1) / pushed.norm(dim=1).clamp_min(tiny)
            self.alignment = float(inside.min()) if bool(pushed.any()) else math.nan
            frame = orthonormalize(torch.cat([frame, random[len(frame) :]]))[0].contiguous()
        self.frame = frame
        return frame

    # ---- through a step

    @torch.no_grad()
    def push(
        self,
        optimizer: Optimizer,
        dg: Tensor,
        *,
        gradient: Tensor | None = None,
        rule: UpdateRule | None = None,
        clip: Clip | None = None,
        ahead: bool | None = None,
    ) -> bool:
        """Push the tangents through the optimizer's coming step; see :meth:`GameTracker.advance`.

        Before the step, gradients are in ``.grad``, options and buffers as the step will use them. ``dg`` (k, n) holds
        derivatives of the gradient along each tangent, of which this optimizer's columns are read; ``gradient`` (n,) is
        the gradient before clipping, only needed with ``clip``. ``ahead`` is True for the first half of an
        :class:`Extragradient` step; None: True unless the optimizer has extrapolated.
        """
        assert self.frame is not None
        entries = [
            (p, rule if rule is not None else known_rule(optimizer, group))
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self._columns and p.grad is not None  # torch passes over those without a gradient
        ]
        if not entries:
            return True
        if clip is not None:
            assert gradient is not None
            gradients = self._clip([p for p, _ in entries], gradient, dg, clip)
        else:
            gradients = [p.grad for p, _ in entries]
        only, columns = entries[0][1], [self._columns[id(p)] for p, _ in entries]
        if only.num_gradients == 2:
            if ahead is None:
                ahead = not getattr(optimizer, "is_extrapolated", False)
            self._extrapolate(entries, dg, ahead)
            return not ahead
        adjacent = all(a.stop == b.start for a, b in pairwise(columns))
        alike = all(r == only for _, r in entries)
        if adjacent and alike and isinstance(only, SGDRule) and not only.momentum:
            # Plain SGD on all its parameters at once: v ← (1 − αλ)v − αHv, one pass over the frame.
            whole = slice(columns[0].start, columns[-1].stop)
            block = self.frame[:, whole]
            if only.weight_decay:
                block.mul_(1 - only.lr * only.weight_decay)
            block.add_(dg[:, whole], alpha=only.lr if only.maximize else -only.lr)
            return True
        for (p, r), g in zip(entries, gradients, strict=True):
            self._push_one(p, r, g, optimizer.state.get(p, {}), dg)
        return True

    def _clip(self, params: Sequence[Tensor], gradient: Tensor, dg: Tensor, clip: Clip) -> list[Tensor]:
        """Return the clipped gradients of one optimizer, and turn ``dg`` into their derivative, in place."""
        columns, sizes = [self._columns[id(p)] for p in params], [p.numel() for p in params]
        mine = torch.cat([gradient[c] for c in columns])
        pushed = clip.tangent(mine, torch.cat([dg[:, c] for c in columns], dim=1))
        for c, piece in zip(columns, torch.split(pushed, sizes, dim=1), strict=True):
            dg[:, c] = piece
        return [g.view(p.shape) for g, p in zip(torch.split(clip.value(mine), sizes), params, strict=True)]

    def _push_one(self, p: Tensor, r: UpdateRule, g: Tensor, state: Mapping[str, Any], dg: Tensor) -> None:
        """Push one parameter's columns by its rule's derivative."""
        assert self.frame is not None
        while len(self.slots) < len(r.slots):
            self.slots.append(torch.zeros_like(self.frame))
        columns, w = self._columns[id(p)], p.detach()

        def rows(matrix: Tensor) -> Tensor:
            return matrix[:, columns].reshape(self.k, *p.shape)

        slots, taken = r.resume(w, state)
        dw = rows(self.frame)
        # A buffer that begins as a linear function of the parameter begins with that function's tangent.
        linear = isinstance(r, LinearRule) and not taken
        dslots = r.start(dw) if linear else tuple(rows(s) for s in self.slots[: len(slots)])
        t = torch.tensor(taken + 1, dtype=self.dtype, device=p.device)
        if isinstance(r, Descent):  # closed forms broadcast over the frame
            after, buffers = r.tangent(w, g, slots, t, dw, rows(dg), dslots)
        else:
            after, buffers = _one_by_one(r, w, g, slots, t, dw, rows(dg), dslots)
        self.frame[:, columns] = after.reshape(self.k, -1)
        for target, new in zip(self.slots, buffers, strict=False):
            target[:, columns] = new.reshape(self.k, -1)

    def _extrapolate(self, entries: Sequence[tuple[Tensor, UpdateRule]], dg: Tensor, ahead: bool) -> None:
        """Push through half an extragradient step: ahead from here, or from where the first half began."""
        assert self.frame is not None
        if self._anchor is None:
            self._anchor = torch.empty_like(self.frame)
        for p, r in entries:
            assert isinstance(r, Descent)
            columns = self._columns[id(p)]
            e = r.ascent(self.frame[:, columns], dg[:, columns])
            if ahead:
                self._anchor[:, columns] = self.frame[:, columns]
            torch.sub(self._anchor[:, columns], e, alpha=r.lr, out=self.frame[:, columns])

    def end_step(self) -> bool:
        """Count a step; if that ends a window, record its growth and return True.

        Raises:
            FloatingPointError: A tangent is not finite.
        """
        self.steps += 1
        if self.frame is None or (self.steps - self._since) % self.every:
            return False
        whole = torch.cat([self.frame, *self.slots], dim=1) if self.slots else self.frame
        if not math.isfinite(float(whole.sum())):
            raise FloatingPointError(
                f"Tangents must stay finite. Got a number that is not after {self.steps} steps: the run diverges, or "
                "they need orthonormalize_every to be smaller."
            )
        rows, lower = orthonormalize(whole)
        self._record(lower.diagonal().log().double().cpu())
        if not self.slots:
            self.frame = rows.contiguous()
            return True
        pieces = torch.split(rows, self.n, dim=1)
        self.frame.copy_(pieces[0])
        for slot, piece in zip(self.slots, pieces[1:], strict=True):
            slot.copy_(piece)
        return True

    def _record(self, growth: Tensor) -> None:
        if self._windows == len(self._history):
            longer = torch.empty(max(64, 2 * self._windows), self.k, dtype=torch.float64)
            longer[: self._windows] = self.growth
            self._history = longer
        self._history[self._windows] = growth
        self._windows += 1

    # ---- results, state

    def running(self) -> Tensor:
        """(k,), the mean exponents per step so far, largest first; NaN before the first window."""
        if not self._windows:
            return torch.full((self.k,), math.nan)
        mean = window_weights(self.window, self.growth) @ self.growth
        return (mean / self.every).sort(descending=True).values

    def local(self) -> Tensor:
        """(k,), the exponents per step of the last window, in the frame's order."""
        return self.growth[-1] / self.every if self._windows else torch.full((self.k,), math.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return all that an exact resume needs."""
        return {
            "frame": self.frame,
            "slots": self.slots,
            "growth": self.growth.clone(),
            "alignment": self.alignment,
            "steps": self.steps,
            "since": self._since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore on the device of the parameters.

        Raises:
            ValueError: k or the number of parameters is another.
        """
        frame, growth = state["frame"], state["growth"]
        if growth.shape[1] != self.k or (frame is not None and frame.shape != (self.k, self.n)):
            raise ValueError(
                f"A saved state must have tangents of shape {(self.k, self.n)}. Got "
                f"{tuple(frame.shape) if frame is not None else (growth.shape[1], self.n)}; resume with the same k "
                "and the same parameters frozen."
            )
        like = {"device": self.params[0].device, "dtype": self.dtype}
        self.frame = None if frame is None else frame.to(**like, copy=True)
        self.slots = [s.to(**like, copy=True) for s in state["slots"]]
        self._history, self._windows = growth.double().cpu().clone(), len(growth)
        self.alignment, self.steps = state["alignment"], state["steps"]
        self._since = state.get("since", 0)


def _one_by_one(
    rule: UpdateRule, w: Tensor, g: Tensor, slots: Vector, t: Tensor, dw: Tensor, dg: Tensor, dslots: Vector
) -> tuple[Tensor, Vector]:
    """Apply a user's rule along each tangent."""
    found = [rule.tangent(w, g, slots, t, dw[i], dg[i], tuple(s[i] for s in dslots)) for i in range(len(dw))]
    return torch.stack([f[0] for f in found]), tuple(
        torch.stack(s) for s in zip(*(f[1] for f in found), strict=True)
    )
