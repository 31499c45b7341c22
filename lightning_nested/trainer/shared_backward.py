"""A gradient that a callback has computed already, in place of the run's own backward pass."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
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
    """Spares a run its backward pass, where that changes no bit of it.

    A gradient with a graph and one without are made by the same operations, but for a few that PyTorch writes out
    when the result is to be differentiated again (SiLU, group norm). So they are compared: at the first, second,
    fourth, eighth, … use, and whenever the loss has other operations or reaches other parameters. The run keeps its
    own backward pass from the first difference on, and where that does more than fill ``.grad`` of these parameters:
    it moves buffers or random numbers (``torch.utils.checkpoint``), reaches other leaves, or is overridden.

    Gradients enter through the parameters' own accumulation, so that DDP averages them as always.

    Attributes:
        is_same: Whether the last comparison found the same bits; None before the first one.
    """

    def __init__(self) -> None:
        self.is_same: bool | None = None
        self._uses = 0
        self._compared: tuple[set[int], list[str]] | None = None  # the parameters and operations of that loss
        self._given: list[int] = []  # places of those with a gradient
        self._stand_ins = StandIns()

    def offer(self, module: LightningModule, loss: Tensor, params: Vector, gradient: Vector) -> None:
        """Replace the coming ``backward`` of the module by handing over ``gradient``, if that is the same.

        Args:
            module: Whose backward pass of ``loss`` comes next.
            loss: A scalar with its graph, which stays whole.
            params: Leaves.
            gradient: ∂loss/∂params, detached.
        """
        if (
            self.is_same is False or torch.is_anomaly_enabled()
        ):  # anomalies are looked for in the run's own pass
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
            if tensor is not loss or not given or kwargs.get("create_graph"):
                return LightningModule.backward(module, tensor, *args, **kwargs)
            torch.autograd.backward(leaves, list(given))
            given.clear()  # for one backward pass
            return None

        self._stand_ins.put(module, "backward", hand_over)

    def put_back(self) -> None:
        """The module's own method again."""
        self._stand_ins.put_back()

    def _compare(
        self, module: LightningModule, loss: Tensor, params: Sequence[Tensor], gradient: Vector
    ) -> None:
        """Whether a backward pass of the run's own would give these bits and touch nothing else."""
        numbers, others = torch.get_rng_state(), pickle.dumps((np.random.get_state(), random.getstate()))
        with untouched_buffers(module):
            buffers = list(module.buffers())
            versions = [b._version for b in buffers]
            plain = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            moved = [b._version for b in module.buffers()] != versions
        drawn = not torch.equal(numbers, torch.get_rng_state()) or others != pickle.dumps(
            (np.random.get_state(), random.getstate())
        )
        self._given = [i for i, g in enumerate(plain) if g is not None]
        self.is_same = (
            not moved
            and not drawn
            and all(
                p is None or (p.layout == torch.strided and torch.equal(p, g))
                for p, g in zip(plain, gradient, strict=True)
            )
        )
