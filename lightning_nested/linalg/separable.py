"""Terms of a loss that act on every weight alone, such as decays: their Hessian is a diagonal, read off once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_nested.linalg.vectors import Vector

# With its number: a custom torch.autograd.Function may have such a name, and has none.
_POINTWISE = re.compile(
    r"(Add|Sub|Mul|Div|Neg|Pow|Exp|Log|Log1P|Sqrt|Rsqrt|Reciprocal|Abs|Sin|Cos|Tanh|TanhBackward|Sigmoid"
    r"|SigmoidBackward|Softplus|SoftplusBackward)Backward\d+"
)


@dataclass(frozen=True, eq=False)
class Separated:
    """A gradient in two parts."""

    # Terms whose derivative is not diagonal, and the parameter that each one belongs to.
    edges: Sequence[GradientEdge]
    owners: Sequence[int]
    diagonal: Sequence[Tensor | None]  # derivative of the other terms, one for each parameter

    def product(self, params: Vector, v: Vector) -> tuple[Tensor | None, ...]:
        """Return the product with the derivative of the terms that are not diagonal."""
        if not self.edges:
            return (None,) * len(params)
        vectors = [v[i] for i in self.owners]
        return torch.autograd.grad(self.edges, params, vectors, retain_graph=True, allow_unused=True)

    def add_diagonal_(self, out: Vector, v: Vector) -> Vector:
        """out ← out + D ∘ v in place; returns out."""
        for o, d, a in zip(out, self.diagonal, v, strict=True):
            if d is not None:
                o.addcmul_(d, a)
        return out


def separate(gradient: Vector, params: Vector) -> Separated | None:
    """Find the terms of a gradient with a graph that are functions of each weight alone.

    A term is one of the sums that autograd has made of a parameter's gradients. It acts on every weight alone if all
    operations between it and the parameter are pointwise and of the parameter's shape, and it leads to no other.

    Returns:
        None where there is no such term, a parameter is no leaf, or torch is too old to differentiate terms.
    """
    if not all(p.is_leaf for p in params):
        return None
    terms, search = list(map(_terms, gradient)), _Search(params)
    # Most losses have none, and their graphs are not searched.
    if not any(search.may_act_alone(edge.node, i) for i, found in enumerate(terms) for edge in found):
        return None
    edges: list[GradientEdge] = []
    owners: list[int] = []
    alone: list[tuple[int, GradientEdge]] = []
    for i, of_parameter in enumerate(terms):
        for edge in of_parameter:
            kind = search.acts_alone(edge.node, i)
            if kind:
                alone.append((i, edge))
            elif kind is False:
                edges.append(edge)
                owners.append(i)
    if not alone:
        return None
    # One number seen as many: nothing of the parameters' size is filled or read.
    ones = [params[i].new_ones(()).expand_as(params[i]) for i, _ in alone]
    try:
        found = torch.autograd.grad(
            [edge for _, edge in alone], params, ones, retain_graph=True, allow_unused=True
        )
    except (TypeError, AttributeError):  # torch before it took edges
        return None
    return Separated(edges, owners, found)


def _terms(gradient: Tensor) -> list[GradientEdge]:
    """Return the addends of a gradient; none if it is a constant."""
    found: list[GradientEdge] = []
    stack: list[tuple[Any, int]] = [(gradient.grad_fn, gradient.output_nr)]
    while stack:
        node, number = stack.pop()
        if node is None:
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        sums = node.name() == "AddBackward0" and node._saved_alpha == 1
        if sums and all(_shape(child) == tuple(gradient.shape) for child in children):
            stack += node.next_functions
        else:
            found.append(GradientEdge(node, number))
    return found


def _shape(node: Node) -> tuple[int, ...] | None:
    """Return the shape of what a node's operation returned; None where it is not one tensor."""
    metadata = node._input_metadata
    return tuple(metadata[0].shape) if len(metadata) == 1 else None


class _Search:
    """Walks a graph; what it has found of a node is kept."""

    def __init__(self, params: Vector) -> None:
        self._index = {id(p): i for i, p in enumerate(params)}
        self._shapes = [tuple(p.shape) for p in params]
        self._reaching: dict[Node, bool] = {}

    def may_act_alone(self, node: Node, owner: int) -> bool:
        """Return True if an operation is a parameter, or pointwise and of the shape of the parameter ``owner``."""
        if id(getattr(node, "variable", None)) in self._index:
            return True
        return _shape(node) == self._shapes[owner] and _POINTWISE.fullmatch(node.name()) is not None

    def acts_alone(self, node: Node, owner: int) -> bool | None:
        """Return whether a term acts on each weight of a parameter alone; None if it leads to no parameter."""
        if not self._reaches(node):
            return None
        stack, seen = [node], {node}
        while stack:
            node = stack.pop()
            if not self._reaches(node):
                continue
            leaf = self._index.get(id(getattr(node, "variable", None)))
            if leaf is not None:
                if leaf != owner:
                    return False
                continue
            if not self.may_act_alone(node, owner):
                return False
            following = {child for child, _ in node.next_functions if child is not None} - seen
            seen |= following
            stack += following
        return True

    def _reaches(self, node: Node) -> bool:
        """Return True if a parameter lies behind a node."""
        found = self._reaching.get(node)
        if found is not None:
            return found
        stack, seen = [node], {node}
        while stack:
            here = stack.pop()
            if self._reaching.get(here) or id(getattr(here, "variable", None)) in self._index:
                self._reaching[node] = True
                return True
            following = {child for child, _ in here.next_functions if child is not None} - seen
            seen |= {child for child in following if self._reaching.get(child) is not False}
            stack += following & seen
        # Nothing behind it reaches one either.
        self._reaching.update(dict.fromkeys(seen, False))
        return False
