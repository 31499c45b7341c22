"""Top Lyapunov exponents of a training run while it runs: tangents beside the optimizer, products by the kept graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics.frames import orthonormalize
from lightning_nested.dynamics.update_map import known_rule
from lightning_nested.dynamics.update_rules import Descent, SGDRule, UpdateRule
from lightning_nested.hypergradient.curvature import HessianOperator
from lightning_nested.hypergradient.vectors import Reduce, Vector, unflatten


class TrainingTracker:
    """Pushes k tangents of parameters and optimizer state through the steps of a run that somebody else makes.

    At each step: :meth:`observe` with every loss of the step (its graph is kept, the caller still calls ``backward``),
    then :meth:`advance` just before ``optimizer.step()``, with the gradients in ``.grad``. A tangent costs one backward
    pass through the gradient's graph; nothing of the run is changed.

    The first frame is aligned: random directions of a large model are nearly all flat, and would read the
    logarithm of 1 − αλ, the decay, for as long as a run lasts. Lanczos iterations on the first Hessian give the k
    directions that its step stretches most; ``alignment`` says how well they are resolved.

    Args:
        params: The optimizer's parameters that require gradients, in its order.
        k: Number of exponents.
        align: Lanczos iterations, each one product; 0: random directions.
        orthonormalize_every: Steps between orthonormalisations.
        seed: Of the first direction.
        reduce: Averages a tensor over processes.

    Attributes:
        growth: For every window (k,), the logarithmic growth.
        gradient: Of the last observed loss, one tensor per parameter: a loop of one's own may use it in place of a
            backward pass.
        alignment: min over the frame of |qᵀHq|/‖Hq‖, 1 for eigenvectors; NaN before the first step or without Lanczos.

    Raises:
        ValueError: k is not in 1..n.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        k: int = 1,
        align: int = 20,
        orthonormalize_every: int = 1,
        seed: int = 0,
        reduce: Reduce | None = None,
    ) -> None:
        self.params: Vector = tuple(params)
        self.n = sum(p.numel() for p in self.params)
        if not 1 <= k <= self.n:
            raise ValueError(f"k must be in 1..n, the number of parameters. Got k={k} and n={self.n}.")
        for name, value, least in (("align", align, 0), ("orthonormalize_every", orthonormalize_every, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}. Got {value}.")
        self.k, self.align, self.every, self.seed, self.reduce = k, align, orthonormalize_every, seed, reduce
        self.frame: Tensor | None = None  # (k, n), tangents of the parameters
        self.slots: list[Tensor] = []  # (k, n) each, tangents of the optimizer's buffers
        self.growth: list[Tensor] = []
        self.alignment = math.nan
        self.steps = 0
        self.gradient: Vector = ()
        self._products: Tensor | None = None
        self._spare: Tensor | None = None

    # ---- a step

    def observe(self, loss: Tensor, *, lr: float = 0.0) -> None:
        """Add the products of this loss's Hessian with every tangent; several losses of one step add up.

        Args:
            loss: A scalar with its graph, a term of what the optimizer steps on.
            lr: The learning rate, by which alignment ranks directions; only read at the first step.
        """
        operator = HessianOperator(loss, self.params)
        if self.frame is None:
            self.frame = self._first_frame(operator, lr)
        self.gradient = tuple(g.detach() for g in operator.gradient)
        products = self._spare if self._spare is not None else torch.empty_like(self.frame)
        self._spare = None
        for i in range(self.k):
            product = operator.matvec(unflatten(self.frame[i], self.params))
            torch.cat([p.reshape(-1) for p in product], out=products[i])
        self._products = products if self._products is None else self._products.add_(products)

    @torch.no_grad()
    def advance(self, optimizer: Optimizer, rule: UpdateRule | None = None) -> bool:
        """Push the tangents through the optimizer's coming step; True if a window ended, with its growth recorded.

        Args:
            optimizer: Before its step: gradients in ``.grad``, options and buffers as the step will use them.
            rule: A re-statement of an optimizer that is not known.

        Raises:
            FloatingPointError: A tangent is not finite.
        """
        if self.frame is None or self._products is None:
            raise RuntimeError(
                "advance() needs the losses of this step. Got none; call observe(loss) before."
            )
        dg = self._products if self.reduce is None else self.reduce(self._products)
        self._products = None
        rules = [
            rule if rule is not None else known_rule(optimizer, group)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        only = rules[0]
        if isinstance(only, SGDRule) and not only.momentum and all(r == only for r in rules):
            # Plain SGD on all parameters at once: v ← (1 − αλ)v − αHv, one pass over the frame.
            self.frame.mul_(1 - only.lr * only.weight_decay) if only.weight_decay else None
            self.frame.add_(dg, alpha=only.lr if only.maximize else -only.lr)
        else:
            self._general(optimizer, rules, dg)
        self._spare = dg
        self.steps += 1
        if self.steps % self.every:
            return False
        self._orthonormalize()
        return True

    def _general(self, optimizer: Optimizer, rules: Sequence[UpdateRule], dg: Tensor) -> None:
        assert self.frame is not None
        width = max(len(r.slots) for r in rules)
        while len(self.slots) < width:
            self.slots.append(torch.zeros_like(self.frame))
        at = 0
        for p, r in zip(self.params, rules, strict=True):
            state = optimizer.state.get(p, {})
            fresh = r.start(p)
            slots = tuple(
                state[n] if state.get(n) is not None else f for n, f in zip(r.slots, fresh, strict=False)
            )
            done = float(state.get("step", 1.0 if any(state.get(n) is not None for n in r.slots) else 0.0))
            t = torch.tensor(done + 1, dtype=p.dtype, device=p.device)
            g = p.grad if p.grad is not None else torch.zeros_like(p)
            part = slice(at, at + p.numel())
            at += p.numel()

            def rows(matrix: Tensor, part: slice = part, p: Tensor = p) -> Tensor:
                return matrix[:, part].reshape(self.k, *p.shape)

            dw, dslots = rows(self.frame), tuple(rows(s) for s in self.slots[: len(slots)])
            if isinstance(r, Descent):  # closed forms broadcast over the frame
                after, buffers = r.tangent(p.detach(), g, slots, t, dw, rows(dg), dslots)
            else:
                after, buffers = _one_by_one(r, p.detach(), g, slots, t, dw, rows(dg), dslots)
            self.frame[:, part] = after.reshape(self.k, -1)
            for target, new in zip(self.slots, buffers, strict=False):
                target[:, part] = new.reshape(self.k, -1)

    def _orthonormalize(self) -> None:
        assert self.frame is not None
        whole = torch.cat([self.frame, *self.slots], dim=1) if self.slots else self.frame
        if not math.isfinite(float(whole.sum())):
            raise FloatingPointError(
                f"Tangents must stay finite. Got a number that is not after {self.steps} steps: the run diverges, or "
                "they need orthonormalize_every to be smaller."
            )
        rows, lower = orthonormalize(whole)
        self.growth.append(lower.diagonal().log().cpu())
        pieces = torch.split(rows, self.n, dim=1)
        self.frame.copy_(pieces[0])
        for slot, piece in zip(self.slots, pieces[1:], strict=True):
            slot.copy_(piece)

    # ---- the first frame

    def _first_frame(self, operator: HessianOperator, lr: float) -> Tensor:
        """Ritz vectors of the Hessian for which |1 − αθ| is largest; random directions fill up."""
        generator = torch.Generator().manual_seed(self.seed)
        first = self.params[0]
        random = torch.randn(self.k, self.n, generator=generator, dtype=torch.float32).to(first)
        m = min(max(self.align, self.k), self.n) if self.align else 0
        if m == 0:
            return orthonormalize(random)[0]

        def product(v: Tensor) -> Tensor:
            out = operator @ v
            return out if self.reduce is None else self.reduce(out)

        basis = torch.zeros(m, self.n, dtype=first.dtype, device=first.device)
        images = torch.zeros_like(basis)
        v = random[0] / random[0].norm()
        count = 0
        for i in range(m):
            basis[i] = v
            images[i] = product(v)
            count = i + 1
            w = images[i].clone()
            for _ in range(2):  # full orthogonalisation, twice: Lanczos loses it otherwise
                w -= basis[:count].mT @ (basis[:count] @ w)
            size = w.norm()
            if float(size) <= 1e-6 * float(images[i].norm()) + torch.finfo(w.dtype).tiny:
                break  # an invariant subspace
            v = w / size
        basis, images = basis[:count], images[:count]
        small = basis @ images.mT
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        order = (
            (1 - lr * values).abs().argsort(descending=True)[: self.k] if lr else values.argsort()[: self.k]
        )
        chosen = vectors[:, order].mT
        frame, pushed = chosen @ basis, chosen @ images
        cosines = (frame * pushed).sum(1).abs() / pushed.norm(dim=1).clamp_min(torch.finfo(frame.dtype).tiny)
        self.alignment = float(cosines.min())
        if len(frame) < self.k:
            frame = torch.cat([frame, random[len(frame) :]])
        return orthonormalize(frame)[0].contiguous()

    # ---- results, state

    def running(self) -> Tensor:
        """(k,), the mean exponents per step so far, largest first; NaN before the first window."""
        if not self.growth:
            return torch.full((self.k,), math.nan)
        return (torch.stack(self.growth).mean(0) / self.every).sort(descending=True).values

    def local(self) -> Tensor:
        """(k,), the exponents per step of the last window, in the frame's order."""
        return self.growth[-1] / self.every if self.growth else torch.full((self.k,), math.nan)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, for an exact resume."""
        return {
            "frame": self.frame,
            "slots": self.slots,
            "growth": torch.stack(self.growth) if self.growth else torch.empty(0, self.k),
            "alignment": self.alignment,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore on the devices of the parameters."""
        like = self.params[0]
        self.frame = None if state["frame"] is None else state["frame"].to(like).clone()
        self.slots = [s.to(like).clone() for s in state["slots"]]
        self.growth = list(state["growth"])
        self.alignment, self.steps = state["alignment"], state["steps"]


def _one_by_one(
    rule: UpdateRule, w: Tensor, g: Tensor, slots: Vector, t: Tensor, dw: Tensor, dg: Tensor, dslots: Vector
) -> tuple[Tensor, Vector]:
    """A user's rule along each tangent."""
    found = [rule.tangent(w, g, slots, t, dw[i], dg[i], tuple(s[i] for s in dslots)) for i in range(len(dw))]
    return torch.stack([f[0] for f in found]), tuple(
        torch.stack(s) for s in zip(*(f[1] for f in found), strict=True)
    )
