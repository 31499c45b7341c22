"""Graphs of losses: their operations, and errors where one of them cannot be differentiated twice."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import CellType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import CheckpointError


class DoubleBackwardError(RuntimeError):
    """An operation of the loss cannot be differentiated twice.

    Attributes:
        reason: What autograd said about it, in a line.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message.split(" Got: ")[-1]


OTHER_FORMS = (
    "attention with torch.nn.attention.sdpa_kernel(SDPBackend.MATH), RNNs with "
    "torch.backends.cudnn.flags(enabled=False), both around the whole of trainer.fit, because checkpointed layers run "
    "again outside of the training step; no torch.compile"
)
"""How operations are run in a form that can be differentiated twice, for messages."""

_MARKS = (
    "double backward",
    "Double backward",
    "is not implemented",
    "once_differentiable",
    "differentiate twice",
    "donated buffer",  # torch.compile; with those disabled it has no double backward either
)

_REENTRANT = "incompatible with .grad()"


@contextmanager
def explain_double_backward() -> Iterator[None]:
    """Turn autograd's errors about a missing second derivative into some that name the ways out."""
    try:
        yield
    except CheckpointError as error:
        raise DoubleBackwardError(
            "A checkpointed layer must do the same when it runs again for a derivative. Got: "
            f"{str(error).splitlines()[0]} A context that it depends on (sdpa_kernel, cudnn.flags, autocast) must be "
            "open around the whole of trainer.fit or inside the checkpointed function, not inside the training step; "
            "or use curvature=FiniteDifference().",
            str(error).splitlines()[0],
        ) from error
    except RuntimeError as error:
        text = str(error)
        if _REENTRANT in text:
            raise DoubleBackwardError(HIDDEN) from error
        if isinstance(error, DoubleBackwardError) or not any(mark in text for mark in _MARKS):
            raise
        raise DoubleBackwardError(
            "A Hessian product needs the gradient to be differentiable, and an operation of the loss is not. "
            f"Got: {text.splitlines()[0]} Either run that operation in a form with a second derivative "
            f"({OTHER_FORMS}), or use curvature=FiniteDifference(), which needs first derivatives only.",
            text.splitlines()[0],
        ) from error


def refuse_sparse(gradient: Sequence[Tensor | None]) -> None:
    """Raise if a gradient is a sparse tensor, which has no products with vectors of the parameters' shape."""
    for g in gradient:
        if g is not None and g.layout != torch.strided:
            raise ValueError(
                f"Gradients must be dense. Got one of shape {tuple(g.shape)} and layout {g.layout}; build the "
                "embedding with sparse=False."
            )


def graph_nodes(tensors: Iterable[Tensor | None]) -> Iterator[Node]:
    """Yield every operation in the graphs of ``tensors``, once."""
    stack = list(dict.fromkeys(a.grad_fn for a in tensors if a is not None and a.grad_fn is not None))
    seen: set[Node] = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def graph_leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the tensors whose gradients the graph of a loss accumulates."""
    leaves = (getattr(node, "variable", None) for node in graph_nodes([loss]))
    return (leaf for leaf in leaves if leaf is not None)


def graph_bytes(loss: Tensor, others: Iterable[Tensor] = ()) -> int | None:
    """Return the bytes that the graph of a loss keeps for derivatives, without those of ``others``, parameters say.

    What a checkpointed layer computes again counts nothing, and nothing is computed again here. Of a slice that is
    kept, its own entries count, not the tensor that it is of. Sparse tensors are left out. None: torch is too old to
    tell.

    >>> x = torch.ones(100, requires_grad=True)
    >>> graph_bytes(x.exp().sum(), [x])  # the values of exp, in float32
    400
    """
    if not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"):
        return None
    apart = {x.untyped_storage().data_ptr() for x in others if _has_memory(x)}
    whole: dict[int, int] = {}
    seen: dict[int, dict[tuple[int, int], int]] = {}  # bytes of the parts of each storage
    for node in graph_nodes([loss]):
        for x in filter(_has_memory, _saved_tensors(node)):
            storage, size = x.untyped_storage(), x.numel() * x.element_size()
            place = storage.data_ptr()
            if place not in apart:
                whole[place] = storage.nbytes()
                seen.setdefault(place, {})[x.data_ptr(), size] = size
    return sum(min(whole[place], sum(found.values())) for place, found in seen.items())


def _has_memory(x: Tensor) -> bool:
    """Return True for a dense tensor that exists: not one of a lazy layer that no batch has reached."""
    return x.layout == torch.strided and not is_lazy(x)


def _saved_tensors(node: Node) -> Iterator[Tensor]:
    """Yield what an operation keeps, as hooks have packed it, and the inputs of a checkpointed layer that it is in."""
    for name in dir(node):
        if not name.startswith("_raw_saved_"):
            continue
        found: Any = getattr(node, name)
        saved = list(found) if isinstance(found, (list, tuple)) else [found]
        for one in list(saved):
            # torch.utils.checkpoint keeps the inputs beside the graph.
            for cell in getattr(one.unpack_hook, "__closure__", None) or ():
                saved += getattr(_contents(cell), "saved_args", ())
        for one in saved:
            tensor = getattr(one, "data", None)
            if isinstance(tensor, Tensor):
                yield tensor


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def depends_on_others(loss: Tensor, params: Sequence[Tensor]) -> bool:
    """Return True if a leaf in the graph of a loss is not one of ``params``, as a hyperparameter is."""
    known = {id(p) for p in params}
    return any(id(leaf) not in known for leaf in graph_leaves(loss))


HIDDEN = (
    "A loss must show every layer in its graph. Got one with torch.utils.checkpoint(use_reentrant=True), behind which "
    "torch.autograd.grad sees no parameters: their gradients would be missing. Pass use_reentrant=False, or use "
    "curvature=FiniteDifference(), on one process."
)
"""Message about layers that only ``loss.backward()`` reaches."""


def hides_layers(loss: Tensor) -> bool:
    """Return True if reentrant checkpointing keeps layers of a loss out of its graph."""
    return any(node.name() == _REENTRANT_NODE for node in graph_nodes([loss]))


_REENTRANT_NODE = "CheckpointFunctionBackward"


def refuse_wrong_derivatives(tensors: Iterable[Tensor | None], *, once_differentiable: bool = True) -> None:
    """Raise if autograd would answer wrongly, and in silence, when a gradient is differentiated.

    Args:
        tensors: The loss and its gradient with a graph, or all that was computed from such a gradient.
        once_differentiable: Whether operations marked so are refused, which a derivative may never reach.

    Raises:
        RuntimeError: An operation is marked once_differentiable.
        DoubleBackwardError: Reentrant checkpointing hides layers; ``weight_norm`` of torch, whose second derivative
            takes the norms as constants.
    """
    for name in dict.fromkeys(node.name() for node in graph_nodes(tensors)):
        if once_differentiable and name.endswith("Error"):
            raise RuntimeError(
                "an operation marked once_differentiable: differentiate twice is not implemented."
            )
        if name == _REENTRANT_NODE:
            raise DoubleBackwardError(HIDDEN)
        if name.startswith("WeightNormInterfaceBackward"):
            raise DoubleBackwardError(
                "Every operation of the loss must have a right second derivative. Got weight_norm, whose fused form in "
                "torch takes the norms as constants there: products would be wrong. Use "
                "curvature=FiniteDifference(), or compute the weight yourself, by a parametrization that returns "
                "v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))."
            )


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Suspend hooks of ``Tensor.register_hook``, which are meant for the training's gradient.

    Autograd runs them on every gradient with respect to the tensor: on an outer gradient, and on products too.
    """
    hooked = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    for live, _ in hooked:
        live.clear()
    try:
        yield
    finally:
        for live, kept in hooked:
            live.update(kept)


def infinite_operations(loss: Tensor, params: Sequence[Tensor]) -> str:
    """Name the operations of a loss whose second derivative is not finite; empty if none is found.

    Anomaly detection names the operation of the gradient that fails, and remembers which operation of the loss made it.
    """
    if not loss.requires_grad:
        return ""
    gradient: Sequence[Tensor | None] = ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                gradient = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
                vjp(
                    gradient,
                    params,
                    [None if g is None else torch.ones_like(g) for g in gradient],
                    retain_graph=True,
                )
        except RuntimeError as error:
            found = re.search(r"Function '(\w+)' returned nan", str(error))
        else:
            return ""
    if found is None:
        return ""
    failing = [node for node in graph_nodes(gradient) if node.name() == found[1]]
    metadata: list[Any] = [node.metadata for node in failing]
    parents: list[Node | None] = [found.get("parent_") for found in metadata]
    names = [
        (node if parent is None else parent).name() for node, parent in zip(failing, parents, strict=True)
    ]
    return ", ".join(sorted({re.sub(r"Backward\d*$", "", name) for name in names or [found[1]]}))


def vjp(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    **options: bool,
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product by ``torch.autograd.grad`` that tolerates tensors off the graph.

    Outputs without a graph and None cotangents contribute nothing; an input that is not reached gives None.
    """
    pairs = [(y, c) for y, c in zip(outputs, cotangents, strict=True) if y is not None and y.requires_grad]
    pairs = [(y, c) for y, c in pairs if c is not None]
    if not pairs or not inputs:
        return (None,) * len(inputs)
    ys, cs = zip(*pairs, strict=True)
    return torch.autograd.grad(ys, inputs, cs, allow_unused=True, **options)


class Pushforward:
    """Jacobian-vector products J u = d(Jᵀv)ᵀu/dv: the vjp, linear in a dummy v, differentiated in v.

    Not ``torch.func.jvp``: a function's own ``torch.autograd.grad`` does not compose with it, and
    ``grad(jvp(f))`` is silently wrong through LayerNorm and BatchNorm in torch 2.14.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._dummies = tuple(torch.zeros_like(y, requires_grad=True) for y in outputs)
        self.pulled = vjp(outputs, inputs, self._dummies, create_graph=True)

    def __call__(self, tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """J u for each output, with u given for each input; None stands for zeros."""
        return list(vjp(self.pulled, self._dummies, tangents, retain_graph=True))
