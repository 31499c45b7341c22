"""Top Lyapunov exponents of a training run while it runs: tangents beside the optimizer, products by the kept graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics.frames import orthonormalize
from lightning_nested.dynamics.tangents import Clip, Tangents
from lightning_nested.linalg.curvature import HessianOperator
from lightning_nested.linalg.vectors import Vector, flatten, unflatten
from lightning_nested.optim.update_rules import UpdateRule


class TrainingTracker(Tangents):
    """Pushes k tangents of parameters and optimizer state through the steps of a run that somebody else makes.

    At each step: :meth:`observe` with every loss of the step (its graph is kept, the caller still calls ``backward``),
    then :meth:`advance` just before ``optimizer.step()``, with the gradients in ``.grad``. A tangent costs one backward
    pass through the gradient's graph; nothing of the run is changed.

    The first frame is aligned: random directions of a large model are nearly all flat, and would read the
    logarithm of 1 − αλ, the decay, for as long as a run lasts. Lanczos iterations on the first Hessian give the k
    directions that its step stretches most; ``alignment`` says how well they are resolved.

    Attributes:
        growth: (T, k), the logarithmic growth in each window.
        gradient: Of the last observed loss, one tensor per parameter: a loop of one's own may use it in place of a
            backward pass, which makes the first exponent about 0.6 steps cheaper.
        alignment: min over the frame of |qᵀHq|/‖Hq‖, 1 for eigenvectors; NaN before the first step or without Lanczos.
    """

    gradient: Vector = ()

    def follow(self, params: Sequence[Tensor]) -> None:
        """Follow these parameters from now on, with new tangents; the growth so far is kept."""
        super().follow(params)
        self._products: Tensor | None = None
        self._spare: Tensor | None = None

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

    @property
    def has_observed(self) -> bool:
        """Whether there is a loss to advance by."""
        return self._products is not None

    def advance(
        self, optimizer: Optimizer, rule: UpdateRule | None = None, *, clip: Clip | None = None
    ) -> bool:
        """Push the tangents through the optimizer's coming step; True if a window ended, with its growth recorded.

        Args:
            optimizer: Before its step: gradients in ``.grad``, options and buffers as the step will use them. Of
                :class:`Extragradient` call it twice, before ``extrapolate()`` and before ``step()``.
            rule: A re-statement of an optimizer that is not known.
            clip: How the gradients, which are not clipped yet, will be before the step.

        Raises:
            FloatingPointError: A tangent is not finite.
        """
        if self.frame is None or self._products is None:
            raise RuntimeError(
                "advance() needs the losses of this step. Got none; call observe(loss) before."
            )
        dg = self._products if self.reduce is None else self.reduce(self._products)
        self._products = None
        gradient = None
        if clip is not None:
            gradient = flatten(torch.zeros_like(p) if p.grad is None else p.grad for p in self.params)
        whole = self.push(optimizer, dg, gradient=gradient, rule=rule, clip=clip)
        self._spare = dg
        return whole and self.end_step()

    # ---- the first frame

    def _first_frame(self, operator: HessianOperator, lr: float) -> Tensor:
        """Ritz vectors of the Hessian for which |1 − αθ| is largest; random directions fill up."""
        generator = torch.Generator().manual_seed(self.seed)
        first = self.params[0]
        random = torch.randn(self.k, self.n, generator=generator, dtype=torch.float32)
        random = random.to(dtype=self.dtype, device=first.device)
        m = min(max(self.align, self.k), self.n) if self.align else 0
        if m == 0:
            return orthonormalize(random)[0]

        def product(v: Tensor) -> Tensor:
            out = (operator @ v).to(v.dtype)
            return out if self.reduce is None else self.reduce(out)

        basis = torch.zeros(m, self.n, dtype=self.dtype, device=first.device)
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
        if not math.isfinite(float(images.sum())):
            raise FloatingPointError(
                "The first products must be finite. Got a number that is not: the run diverges."
            )
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
