"""A module whose weights are a function of hyperparameters, w(h) = w₀ + Δ(h − center)."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_nested.hypernetworks.layers.arithmetic import carry, make_dual, unpack_dual
from lightning_nested.hypernetworks.layers.base import HyperLayer, OnePointError, Point, check_hyperparameters
from lightning_nested.linalg.graph import graph_nodes

Weights = Mapping[str, Tensor]
Mode = Literal["response", "general", "linearized"]


_CHECKPOINT = (
    "A network with substituted weights must keep what its backward pass needs. Got torch.utils.checkpoint, or another "
    "use of saved-tensor hooks: its second forward would find other weights. Leave it out of the network."
)


@dataclass(frozen=True, eq=False)
class Place:
    """Where the module is evaluated."""

    h: Tensor
    mode: Mode = "response"
    weights: Weights | None = None
    change: Callable[[dict[str, Tensor]], Weights] | None = None


class Response(nn.Module):
    """The base of all learned best responses.

    ``response(x, h)`` is the module's output with the weights w(h). h holds n unconstrained numbers: (n,) for one
    point, or (batch, n) for one of each example where the module's layers allow it. Inside ``with response.at(h):``
    and after ``response.bind(h)`` the call is the module's own, ``response(x)``.

    The weights w₀ keep their names; Δ(0) = 0, so that the network at ``center`` is the plain one with w₀.

    Args:
        module: Any module; a copy is kept.
        num_hyperparameters: n.
        batch_dim: Dimension of the examples in the inputs of linear layers and embeddings.

    Attributes:
        module: The copy.
        center: Subtracted from h, (n,); zero unless moved by :meth:`recenter`.

    Raises:
        ValueError: n is below 1, or there is no parameter that could respond.
    """

    center: Tensor
    point: Tensor

    def __init__(self, module: nn.Module, num_hyperparameters: int, batch_dim: int = 0) -> None:
        super().__init__()
        if num_hyperparameters < 1:
            raise ValueError(f"num_hyperparameters must be at least 1. Got {num_hyperparameters}.")
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters()):
            raise ValueError(
                f"The parameters must be initialised. Got lazy ones in {type(module).__name__}; call it once."
            )
        self.module = copy.deepcopy(module)
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not any(p.is_floating_point() for p in named.values()):
            raise ValueError(
                "The module must have a parameter that requires gradients. "
                f"Got {type(module).__name__} with none; there is nothing that could respond."
            )
        self._names = tuple(named)
        self.num_hyperparameters = num_hyperparameters
        some = next(iter(named.values()))
        dtype = torch.promote_types(some.dtype, torch.float32)
        for name in ("center", "point"):
            self.register_buffer(name, torch.zeros(num_hyperparameters, dtype=dtype, device=some.device))
        self.layers = Point(batch_dim)
        self._place: Place | None = None
        self._bound = False
        self._double_vjp = False  # once forward mode has met an operation it does not know
        self._aliases: dict[str, list[str]] = {name: [] for name in self._names}
        first = {id(p): name for name, p in named.items()}
        for path, owner in self.module.named_modules():  # each once, under its first name
            for attribute, p in owner.named_parameters(recurse=False):
                if id(p) in first:
                    self._aliases[first[id(p)]].append(f"{path}.{attribute}".lstrip("."))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # In half precision hyperparameters would stand still: their steps are too small for it.
        kept = {name: getattr(self, name) for name in ("center", "point")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, full in kept.items():
            moved: Tensor = getattr(self, name)
            if torch.finfo(moved.dtype).bits < 32:
                setattr(self, name, full.to(moved.device, torch.float32))
        return self

    # ---- what kinds of responses define

    @abstractmethod
    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """Δ of each parameter for h − center = ``delta`` (n,)."""

    def moved(self, delta: Tensor) -> dict[str, Tensor]:
        """w₀ + Δ of each parameter."""
        changes = self.changes(delta)
        return {name: p + changes[name] for name, p in self.general_parameters().items()}

    def first_order(self, delta: Tensor, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """⟨Δ(delta), gradients⟩ over all parameters, scalar; None counts as zero."""
        changes = self.changes(delta)
        terms = [
            torch.dot(changes[name].flatten(), g.flatten().to(changes[name]))
            for name, g in gradients.items()
            if g is not None
        ]
        return torch.stack(terms).sum() if terms else delta.new_zeros(())

    def one_point_only(self) -> tuple[str, ...]:
        """Parameters for which each example cannot have an h of its own."""
        return self._names

    # ---- parameters

    def general_parameters(self) -> dict[str, nn.Parameter]:
        """w₀ by name, as in the module that was given."""
        return {name: self._parameter(name) for name in self._names}

    def response_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters φ of Δ by name, those that require gradients."""
        general = {id(p) for p in self.general_parameters().values()}
        return {n: p for n, p in self.named_parameters() if p.requires_grad and id(p) not in general}

    def weights(self, h: Tensor) -> dict[str, Tensor]:
        """w(h) by name, with its graph; h (n,)."""
        check_hyperparameters(h, self.num_hyperparameters)
        if h.dim() == 2:
            raise ValueError(f"weights(h) needs one point. Got {tuple(h.shape)}; give h of shape (n,).")
        return self.moved(h - self.center)

    @torch.no_grad()
    def recenter(self, h: Tensor) -> None:
        """Make h the center. The general weights become w(h), so that w(·) stays the same function.

        Exact for responses that are linear in h; for others the value at h is kept.
        """
        for name, value in self.weights(h).items():
            self._parameter(name).copy_(value)
        self.center.copy_(h)

    # ---- evaluation

    @contextmanager
    def at(
        self,
        h: Tensor,
        mode: Mode = "response",
        *,
        weights: Weights | None = None,
        change: Callable[[dict[str, Tensor]], Weights] | None = None,
    ) -> Iterator[None]:
        """Inside, the response is called like the plain module.

        Args:
            h: (n,), or (batch, n).
            mode: ``"response"``: with w(h). ``"general"``: with w₀. ``"linearized"``: the value is
                f(w₀) + J·Δ(h), with first derivatives with respect to φ alone; the function that Delta-STN trains.
            weights: In place of w(h), by name.
            change: From the weights by name to those used, such as a mask; needs one h.
        """
        check_hyperparameters(h, self.num_hyperparameters)
        if h.dim() == 2 and mode != "general":
            if self.one_point_only():
                some = ", ".join(self.one_point_only()[:4])
                raise ValueError(
                    "One h of each example needs layers that respond by themselves: linear, convolution 1d and 2d, "
                    f"embedding, LSTM, batch, group and layer norm. Got others that hold {some}; give one h of "
                    "shape (n,) for the batch."
                )
            if weights is not None or change is not None:
                raise ValueError("weights= and change= need one h. Got one of each example.")
        before, self._place = self._place, Place(h, mode, weights, change)
        try:
            yield
        finally:
            self._place = before

    def bind(self, h: Tensor) -> None:
        """From now on ``response(x)`` is evaluated at h (n,), outside :meth:`at`."""
        check_hyperparameters(h, self.num_hyperparameters)
        self.point.copy_(h.detach())
        self._bound = True

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The module's output. The last positional argument is h unless h is given by ``at`` or ``bind``."""
        place = self._place
        if place is None and self._bound:
            place = Place(self.point)
        if place is None:
            if len(inputs) < 2 or not isinstance(inputs[-1], Tensor):
                raise ValueError(
                    "response(x, h) needs h as its last argument. "
                    f"Got {len(inputs)} argument(s); give h, or call inside `with response.at(h):`."
                )
            with self.at(inputs[-1]):
                return self.forward(*inputs[:-1], **options)
        if place.mode == "general":
            weights = place.change(dict(self.general_parameters())) if place.change is not None else {}
            return self._run(weights, inputs, options)
        if place.h.dim() == 2:
            return self._each(place, inputs, options)
        if place.mode == "linearized":
            return self._linearized(place, inputs, options)
        weights = dict(place.weights) if place.weights is not None else self.weights(place.h)
        return self._run(place.change(weights) if place.change is not None else weights, inputs, options)

    def _run(self, weights: Weights, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not weights:
            return self.module(*inputs, **options)
        with torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINT):
            # Under all its names, each module once: torch's own tying leaves a module of two names without parameters.
            tied = {alias: w for name, w in weights.items() for alias in self._aliases.get(name, [name])}
            return torch.func.functional_call(self.module, tied, inputs, options, tie_weights=False)

    def _each(self, place: Place, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """One h of each example, by the layers themselves."""
        linearized = place.mode == "linearized"
        try:
            return self._by_layers(place.h - self.center, linearized, dict, inputs, options)
        except (NotImplementedError, RuntimeError) as error:
            if not (linearized and lacks_forward_mode(error)):
                raise
            raise RuntimeError(
                "The linearised output for one h of each example needs operations with forward-mode derivatives. "
                f"Got: {error} Give one h of shape (n,), or DeltaSTN(linearized=False)."
            ) from error

    def _by_layers(
        self,
        delta: Tensor,
        linearized: bool,
        rest: Callable[[], Weights],
        inputs: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Any:
        """The layers by their own rule at ``delta``, (batch, n) or (n,); other parameters replaced by ``rest``."""
        layers = self.layers
        layers.delta, layers.linearized = delta, linearized
        layers.visited.clear()
        layers.read.clear()
        try:
            with torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINT):
                if not linearized:
                    result = self.module(*inputs, **options)
                else:
                    with _forward_mode():
                        result = self._run(rest(), inputs, options)
                        result = tree_map(_plus_tangent, result)
        finally:
            layers.delta, layers.linearized = None, False
        self._check_reads(result, linearized)
        return result

    def _check_reads(self, result: Any, linearized: bool) -> None:
        """Each layer must have been called, and no weight read past it: there the response would be missing."""
        layers = {name: layer for name, layer in self.module.named_modules() if isinstance(layer, HyperLayer)}
        visited = self.layers.visited
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

    def _linearized(self, place: Place, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """f(w₀) + J·Δ: the tangent by forward mode, φ's derivatives by an ordinary backward pass of f.

        φ sees w₀ + Δ − stop(Δ), see :func:`carry`. Then the vector-Jacobian product of the output is that of J·Δ(φ),
        and no derivative of a tangent is taken, which torch gets wrong through normalisation layers.
        """
        changes = self.changes(place.h - self.center)
        change = place.change if place.change is not None else dict
        if not self._double_vjp:
            try:
                with _forward_mode():
                    duals = {n: dual_change(p, changes[n]) for n, p in self.general_parameters().items()}
                    return tree_map(_plus_tangent, self._run(change(duals), inputs, options))
            except (NotImplementedError, RuntimeError) as error:
                if not lacks_forward_mode(error):
                    raise
                self._double_vjp = True
        values = {n: carry(p.detach(), changes[n]) for n, p in self.general_parameters().items()}
        tangents = {n: changes[n].detach() for n in values}
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            names = list(values)
            leaves = {n: v if v.requires_grad else v.requires_grad_() for n, v in values.items()}
            outputs, tree = tree_flatten(self._run(change(dict(leaves)), inputs, options))
            return tree_unflatten(_add_tangents(outputs, leaves, tangents, names), tree)

    # ---- the plain network

    def export(self, h: Tensor) -> nn.Module:
        """The plain module with the weights w(h): a copy, no hypernetwork left.

        Args:
            h: (n,).

        >>> from lightning_nested.hypernetworks import best_response
        >>> response = best_response(nn.Linear(3, 2), num_hyperparameters=4)
        >>> type(response.export(torch.zeros(4))).__name__
        'Linear'
        """
        with torch.no_grad():
            weights = self.weights(h)
            plain = copy.deepcopy(self.module)
            for layer in list(plain.modules()):
                revert = getattr(layer, "revert", None)
                if callable(revert):
                    revert()
            for name, parameter in plain.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        return plain

    def num_parameters(self) -> dict[str, int]:
        """How many are ``"general"`` (w₀) and ``"response"`` (φ)."""
        return {
            "general": sum(p.numel() for p in self.general_parameters().values()),
            "response": sum(p.numel() for p in self.response_parameters().values()),
        }

    def _parameter(self, name: str) -> nn.Parameter:
        return self.module.get_parameter(name)


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Dual numbers, by kernels that know them."""
    with (
        forward_ad.dual_level(),
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.cudnn.flags(enabled=False),
    ):
        yield


def dual_change(weight: Tensor, change: Tensor) -> Tensor:
    """The weight's value with ``change`` as its tangent, and with the derivatives of w₀ + Δ − stop(Δ)."""
    return make_dual(carry(weight.detach(), change), change.detach())


def lacks_forward_mode(error: Exception) -> bool:
    """Whether this is torch's error about an operation without forward-mode derivatives."""
    text = str(error).lower()
    return "forward ad" in text or "forward mode" in text


def _uses(result: Any) -> Counter[int]:
    """How often each leaf is used in the graph of a result, by its id."""
    outputs = [y for y in tree_flatten(result)[0] if isinstance(y, Tensor)]
    parents = (parent for node in graph_nodes(outputs) for parent, _ in node.next_functions)
    leaves = (getattr(parent, "variable", None) for parent in parents)
    return Counter(id(leaf) for leaf in leaves if leaf is not None)


def _plus_tangent(output: Any) -> Any:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    value, tangent = unpack_dual(output)
    return value if tangent is None else value + tangent.detach()


def _add_tangents(outputs: list[Any], weights: Weights, tangents: Weights, names: list[str]) -> list[Any]:
    """J·Δ by two reverse passes: the derivative with respect to v of Jᵀv, applied to Δ."""
    live = [i for i, y in enumerate(outputs) if isinstance(y, Tensor) and y.requires_grad]
    cotangents = [torch.zeros_like(outputs[i], requires_grad=True) for i in live]
    inputs = [weights[n] for n in names]
    pulled = torch.autograd.grad(
        [outputs[i] for i in live], inputs, cotangents, create_graph=True, allow_unused=True
    )
    used = [(g, tangents[n]) for g, n in zip(pulled, names, strict=True) if g is not None and g.requires_grad]
    moved = torch.autograd.grad(
        [g for g, _ in used], cotangents, [t for _, t in used], retain_graph=True, allow_unused=True
    )
    result = list(outputs)
    for i, tangent in zip(live, moved, strict=True):
        result[i] = outputs[i] if tangent is None else outputs[i] + tangent.detach()
    return result
