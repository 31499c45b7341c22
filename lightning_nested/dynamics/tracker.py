"""Top Lyapunov exponents of a training run, from Hessian products with the graph of its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nested.dynamics.frames import symmetric_ritz
from lightning_nested.dynamics.tangents import Clip, Tangents
from lightning_nested.linalg.curvature import HessianOperator
from lightning_nested.linalg.vectors import Vector, flatten, unflatten, zeros_where_none
from lightning_nested.optim.update_rules import UpdateRule


class TrainingTracker(Tangents):
    """Pushes k tangents of parameters and optimizer state through the steps of a training loop.

    At each step, call :meth:`observe` with every loss of the step (its graph is kept, the loop still calls
    ``backward``), then :meth:`advance` just before ``optimizer.step()``, with the gradients in ``.grad``. A tangent
    costs one backward pass through the gradient's graph; the run is not changed.

    The first frame is aligned, because nearly all random directions of a large model are flat: they would show the
    logarithm of 1 − αλ, the decay, for as long as a run lasts. Lanczos iterations on the first Hessian give the k
    directions that its step stretches most; ``alignment`` says how well they are resolved.

    Attributes:
        growth: (T, k), the logarithmic growth in each window.
        gradient: Gradient of the last observed loss, one tensor per parameter. Used in place of a backward pass it
            makes the first exponent about 0.6 steps cheaper.
        alignment: min over the frame of |qᵀHq|/‖Hq‖, 1 for eigenvectors; NaN before the first step, without Lanczos, or
            where every product is zero.
    """

    gradient: Vector = ()

    def follow(self, params: Sequence[Tensor]) -> None:
        """Follow these parameters from now on, with new tangents; the growth so far is kept."""
        super().follow(params)
        self._products: Tensor | None = None
        self._spare: Tensor | None = None  # memory of the last step's products

    def observe(self, loss: Tensor, *, lr: float = 0.0) -> None:
        """Add the products of this loss's Hessian with every tangent; several losses of one step add up.

        ``loss`` is a scalar with its graph, a term of what the optimizer steps on. ``lr`` is the learning rate, by
        which alignment ranks directions; it is only read at the first step.
        """
        operator = HessianOperator(loss, self.params)
        frame = self._align(operator, lr) if self.frame is None else self.frame
        self.gradient = tuple(g.detach() for g in operator.gradient)
        products = self._spare if self._spare is not None else torch.empty_like(frame)
        self._spare = None
        for i in range(self.k):
            product = operator.matvec(unflatten(frame[i], self.params))
            torch.cat([p.reshape(-1) for p in product], out=products[i])
        self._products = products if self._products is None else self._products.add_(products)

    @property
    def has_observed(self) -> bool:
        """True if there is a loss to advance by."""
        return self._products is not None

    def advance(
        self, optimizer: Optimizer, rule: UpdateRule | None = None, *, clip: Clip | None = None
    ) -> bool:
        """Push the tangents through the optimizer's coming step; return True if that ended a window.

        Call it before the optimizer's step, with gradients in ``.grad`` that are not clipped yet; for
        :class:`Extragradient` twice, before ``extrapolate()`` and before ``step()``.

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
            gradient = flatten(zeros_where_none([p.grad for p in self.params], self.params))
        whole = self.push(optimizer, dg, gradient=gradient, rule=rule, clip=clip)
        self._spare = dg
        return whole and self.end_step()

    def _align(self, operator: HessianOperator, lr: float) -> Tensor:
        """Begin with the Ritz vectors of the Hessian for which |1 − αθ| is largest."""

        def product(v: Tensor) -> Tensor:
            out = (operator @ v).to(v.dtype)
            return out if self.reduce is None else self.reduce(out)

        def choose(basis: Tensor, images: Tensor) -> Tensor:
            values, rows = symmetric_ritz(basis, images)
            order = (1 - lr * values).abs().argsort(descending=True) if lr else values.argsort()
            return rows[order[: self.k]]

        return self.begin(product, choose)
