"""Reuse of a gradient that a callback has already computed, in place of the run's own backward pass."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_nested.linalg.graph import graph_nodes
from lightning_nested.linalg.vectors import Vector
from lightning_nested.trainer.isolation import untouched_buffers
from lightning_nested.trainer.stand_ins import StandIns


class SharedBackward:
    """Saves a run its backward pass where that changes no bit of the training.

    A gradient with a graph and one without come from the same operations, except for a few that PyTorch decomposes
    when the result is to be differentiated again (SiLU, group norm). So the two are compared: at the first, second,
    fourth, eighth, … use, and whenever the loss has other operations or reaches other parameters. From the first
    difference on the run keeps its own backward pass. It also does where that pass does more than fill ``.grad`` of
    these parameters: if it changes buffers or random states (``torch.utils.checkpoint``), reaches other leaves, or is
    overridden. Gradients enter through the parameters' own accumulation, so that DDP averages them as usual.

    Attributes:
        is_same: True if the last comparison found the same bits; None before the first one.
    """

    def __init__(self) -> None:
        self.is_same: bool | None = None
        self._uses = 0
        self._compared: tuple[set[int], list[str]] | None = None  # the parameters and operations of that loss
        self._given: list[int] = []  # indices of parameters with a gradient
        self._stand_ins = StandIns()

    def offer(self, module: LightningModule, loss: Tensor, params: Vector, gradient: Vector) -> None:
        """Let the coming ``backward`` of the module hand over ``gradient``, if that changes no bit.

        ``loss`` is a scalar with its graph, which stays whole, and ``gradient`` its detached gradient at the leaves.
        """
        # Anomaly detection must see the run's own backward pass.
        if self.is_same is False or torch.is_anomaly_enabled():
            return
        if "backward" in vars(module) or type(module).backward is not LightningModule.backward:
            return
        nodes = list(graph_nodes([loss]))
        leaves_of = (getattr(node, "variable", None) for node in nodes)
        reached = {id(leaf) for leaf in leaves_of if leaf is not None}
        if reached - {id(p) for p in params} or any(p._backward_hooks for p in params):
            return
        now = reached, [node.name() for node in nodes]
        if now != self._compared or self._uses & (self._uses - 1) == 0:
            self._compare(module, loss, params, gradient)
            self._compared = now
            if not self.is_same:
                return
        self._uses += 1
        leaves = [params[i] for i in self._given]
        given = [gradient[i] for i in self._given]

        def hand_over(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
            self.put_back()
            if tensor is loss and not kwargs.get("create_graph"):
                torch.autograd.backward(leaves, given)
            else:
                LightningModule.backward(module, tensor, *args, **kwargs)

        self._stand_ins.put(module, "backward", hand_over)

    def put_back(self) -> None:
        """Restore the module's own ``backward``, for a pass that did not come."""
        self._stand_ins.put_back()

    def _compare(self, module: LightningModule, loss: Tensor, params: Vector, gradient: Vector) -> None:
        """Set ``is_same``: whether a backward pass of the run's own gives these bits and touches nothing else."""
        numbers = _random_states()
        with untouched_buffers(module):
            versions = [b._version for b in module.buffers()]
            plain = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            moved = [b._version for b in module.buffers()] != versions
        self._given = [i for i, g in enumerate(plain) if g is not None]
        pairs = zip(plain, gradient, strict=True)
        equal = all(p is None or (p.layout == torch.strided and torch.equal(p, g)) for p, g in pairs)
        self.is_same = equal and not moved and numbers == _random_states()


def _random_states() -> bytes:
    return pickle.dumps((torch.get_rng_state().numpy(), np.random.get_state(), random.getstate()))
