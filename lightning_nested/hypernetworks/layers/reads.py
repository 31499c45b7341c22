"""Check that the layers of a converted module account for every use of their weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_nested.hypernetworks.layers.base import HyperLayer, OnePointError
from lightning_nested.linalg.graph import graph_nodes


def check_reads(module: nn.Module, visited: Counter[int], result: Any, linearized: bool) -> None:
    """Refuse layers that were not called, and weights read past their layer: the response would be missing there.

    ``visited`` counts the calls of each layer by its id; ``result`` is the module's output with its graph, in which
    linearized layers have read their weights detached.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, HyperLayer)}
    missed = [name for name, layer in layers.items() if id(layer) not in visited]
    if missed:
        raise OnePointError(
            "One h of each example needs every layer to be called. "
            f"Got {', '.join(missed[:4])} that are not: unused, or their weights are read from outside; give "
            "one h of shape (n,) for the batch."
        )
    if torch._C._are_functorch_transforms_active():
        return  # no graph to look at
    uses = _uses(result)
    expected: Counter[int] = Counter()
    names: dict[int, str] = {}
    for name, layer in layers.items():
        for attribute, parameter in layer.named_parameters(recurse=False):
            expected[id(parameter)] += 0 if linearized else visited[id(layer)]
            names[id(parameter)] = f"{name}.{attribute}".lstrip(".")
    for key, name in names.items():
        if uses[key] > expected[key]:
            raise OnePointError(
                "One h of each example needs weights that only their own layers read. "
                f"Got {name}, which is read elsewhere too; give one h of shape (n,) for the batch."
            )


def _uses(result: Any) -> Counter[int]:
    """Count the uses of each leaf in the graph of a result, by its id."""
    outputs = [y for y in tree_leaves(result) if isinstance(y, Tensor)]
    parents = (parent for node in graph_nodes(outputs) for parent, _ in node.next_functions)
    leaves = (getattr(parent, "variable", None) for parent in parents)
    return Counter(id(leaf) for leaf in leaves if leaf is not None)
