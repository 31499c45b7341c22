"""The problem that one_hypergradient.py times."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_nested.hyperparameters import WeightDecay

Hypergradient = tuple[Tensor, ...]


class Problem:
    """Inner and outer loss at a stationary point of the inner one.

    A decay of 0.5 makes the system positive definite and well conditioned, so that right answers can be
    told from wrong ones; times do not depend on it. A constant tilt −cᵀw in the inner loss makes the
    present weights stationary, so that unrolling and implicit differentiation have the same answer; it
    changes no second derivative, so only unrolling evaluates it.
    """

    def __init__(self, widths: Sequence[int], batch: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for fan_in, fan_out in pairwise(widths):
                layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        self.network = nn.Sequential(*layers[:-1]).to(dtype)
        self.inputs, self.outer_inputs = (
            (torch.rand(batch, widths[0], generator=generator) - 0.5).to(dtype) for _ in range(2)
        )
        self.labels, self.outer_labels = (
            torch.randint(0, widths[-1], (batch,), generator=generator) for _ in range(2)
        )
        self.named = dict(self.network.named_parameters())
        self.params: Hypergradient = tuple(self.named.values())
        self.weight_decay = WeightDecay(per="parameter", init=0.5, include=["*"])
        self.weight_decay.build(self.named)
        self.decays: Hypergradient = tuple(self.weight_decay.tensors.values())
        self.step_size = 0.5
        self._tilt = torch.autograd.grad(self.decayed_loss(), self.params)

    def functional(self, params: Hypergradient, inputs: Tensor) -> Tensor:
        """Logits of ``inputs`` at ``params``."""
        return torch.func.functional_call(self.network, dict(zip(self.named, params, strict=True)), (inputs,))

    def loss(self) -> Tensor:
        """Training cross-entropy."""
        return nn.functional.cross_entropy(self.network(self.inputs), self.labels)

    def outer_loss(self) -> Tensor:
        """Validation cross-entropy."""
        return nn.functional.cross_entropy(self.network(self.outer_inputs), self.outer_labels)

    @staticmethod
    def penalty(params: Hypergradient, decays: Hypergradient) -> Tensor:
        """½ Σ e^λ w²."""
        return torch.stack([0.5 * (d.exp() * p**2).sum() for d, p in zip(decays, params, strict=True)]).sum()

    def tilt(self, params: Hypergradient) -> Tensor:
        """cᵀw."""
        return torch.stack([(c * p).sum() for c, p in zip(self._tilt, params, strict=True)]).sum()

    def decayed_loss(self) -> Tensor:
        """The inner loss with the decay in its graph."""
        return self.loss() + self.penalty(self.params, self.decays)
