"""A small network from an example's loss, or from features of it, to its weight: Meta-Weight-Net."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lightning_nested.arguments import at_least, checked
from lightning_nested.hyperparameters.transforms import Unconstrained
from lightning_nested.hyperparameters.weights import BoundHyperparameter

_TENSORS = ("hidden.weight", "hidden.bias", "output.weight", "output.bias")
_NODES = 16  # of Gauss–Legendre quadrature: exact for polynomials of degree 31
_REFERENCE = "reference"  # in saved states
_LARGE = 10.0  # times the mean: weights hardly grow beyond


@checked
class WeightNetwork(BoundHyperparameter):
    """The weight of every training example by one small network, whatever their number; its weights are tuned.

    ``weight_network(losses)`` returns weighted losses of a batch, of their shape. Without ``features`` the weight
    v(L) is a function of the loss L itself, and what is returned is its integral

        Φ(L) = ∫₀ᴸ v(s) ds,  so that  ∇Φ(L) = v(L)·∇L:

    training steps are those of Meta-Weight-Net, whose v is detached, but of a loss that exists. A look ahead, the
    curvature, differences and unrolling all see the same function. With ``features`` of shape (batch, inputs) weighted
    losses are v(features)·L.

    With r = σ(c + aᵀ tanh(wL + b)/n) over its mean in a reference, the first batch after an outer step, v is
    r/(10 + r) over the mean of that: weights have the mean 1 there, so that they say which examples count and not how
    long a step is, and an example of a later batch has at most 11 times the weight of a reference of equal ones. At
    the start every weight is 1. The mean over the n hidden units keeps an outer step of a given rate as long for many
    units as for one.
    Shu, Xie, Yi, Zhao, Zhou, Xu & Meng (2019), NeurIPS, "Meta-Weight-Net: learning an explicit mapping for sample
    weighting".

    Args:
        hidden: Units of the hidden layer.
        inputs: Features of an example; 1 for its loss.
        seed: Seed of the initial hidden layer.
        name: Attribute of the module that it becomes, and key in logs.

    Example:
        >>> network = WeightNetwork()
        >>> network(torch.tensor([0.5, 2.0]))
        tensor([0.5000, 2.0000])
        >>> network.weights(torch.tensor([0.5, 2.0]))
        tensor([1., 1.])
    """

    usage = (
        "self.weight_network = None  # in __init__\n"
        "if self.weight_network is not None:  # in training_step, with per-example losses\n"
        "    losses = self.weight_network(losses)"
    )

    def __init__(
        self, hidden: int = 100, inputs: int = 1, seed: int = 0, name: str = "weight_network"
    ) -> None:
        super().__init__()
        at_least(1, hidden=hidden, inputs=inputs)
        at_least(0, seed=seed)
        self.hidden, self.inputs, self.seed, self.name = hidden, inputs, seed, name
        self.transform = Unconstrained()
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        self._quadrature = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
        self._reference: Tensor | None = None  # inputs (batch, inputs), constant between outer steps

    def _initial(self, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        return {
            "hidden.weight": normal(self.hidden, self.inputs) / math.sqrt(self.inputs),
            "hidden.bias": normal(self.hidden),
            # Zero: every example begins with the same weight.
            "output.weight": torch.zeros(self.hidden, dtype=dtype),
            "output.bias": torch.zeros((), dtype=dtype),
        }

    def reset(self) -> None:
        """Forget the network: the next :meth:`build` starts from the initial one."""
        super().reset()
        self._reference = None

    def project_(self) -> None:
        """Let the next batch decide what weights have the mean 1 on; called after each outer step."""
        self._reference = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return detached copies of the tensors, and of the inputs on which weights have the mean 1."""
        saved = {} if self._reference is None else {_REFERENCE: self._reference.cpu().clone()}
        return {**super().state_dict(), **saved}

    def load_state_dict(
        self,
        state: Mapping[str, Tensor],
        kind: Mapping[str, Any] | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> list[str]:
        """Restore in place; see :meth:`Hyperparameter.load_state_dict`."""
        own = {key: value for key, value in state.items() if key != _REFERENCE}
        converted = super().load_state_dict(own, kind, values)
        self._reference = state.get(_REFERENCE)
        return converted

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "tensors": super().state_dict()}

    def weights(self, inputs: Tensor) -> Tensor:
        """Return weights of examples by their losses (any shape), or by features (…, inputs) where there are several.

        With their graph to the network, and to ``inputs``.

        Raises:
            ValueError: The last size is not ``inputs``.
        """
        rows = inputs.unsqueeze(-1) if self.inputs == 1 else inputs
        if rows.shape[-1] != self.inputs:
            raise ValueError(
                f"features must have the shape (batch, {self.inputs}), one row per example. Got {tuple(rows.shape)}."
            )
        given = rows.detach() if self._reference is None else self._reference.to(rows.device)
        reference = given.reshape(-1, self.inputs)
        rise = self._rise(reference)
        level = rise.logsumexp(0) - math.log(len(rise)) + math.log(_LARGE)
        return torch.sigmoid(self._rise(rows) - level) / torch.sigmoid(rise - level).mean()

    def _rise(self, rows: Tensor) -> Tensor:
        """Return log σ(c + aᵀ tanh(wx + b)/n) of rows (…, inputs)."""
        w, b, a, c = (self.raw(key, rows.device) for key in _TENSORS)
        dtype = torch.promote_types(w.dtype, rows.dtype)
        units = functional.linear(rows.to(dtype), w.to(dtype), b.to(dtype)).tanh()
        return functional.logsigmoid(units @ a.to(dtype) / self.hidden + c)

    def __call__(self, losses: Tensor, features: Tensor | None = None) -> Tensor:
        """Return weighted losses, of the shape of ``losses``, at least float32.

        Args:
            losses: Losses of the examples, with their graph.
            features: What weights depend on in place of the losses, (batch, inputs), or (batch,) for one; detached.

        Raises:
            ValueError: There are no features where ``inputs`` is above 1, or they are of another shape.
        """
        if features is None and self.inputs != 1:
            raise ValueError(
                f"features must be given where inputs is above 1. Got none for inputs={self.inputs}."
            )
        inputs = (losses if features is None else features).detach()
        if self._reference is None:
            self._reference = inputs.reshape(-1, self.inputs).clone()
        if features is not None:
            return self.weights(inputs) * losses
        nodes, weights = (part.to(losses.device) for part in self._quadrature)
        exact = losses.to(torch.promote_types(losses.dtype, torch.float32)).unsqueeze(-1)
        values = self.weights(exact * nodes.to(exact.dtype))
        return (values * weights.to(values.dtype)).sum(-1) * losses
