"""Module whose weights are a function of hyperparameters, w(h) = w₀ + Δ(h − center)."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_nested.arguments import at_least
from lightning_nested.hypernetworks.by_example import by_example
from lightning_nested.hypernetworks.layers.base import Point, check_hyperparameters
from lightning_nested.hypernetworks.layers.reads import check_reads
from lightning_nested.hypernetworks.linearized import (
    ForwardModeError,
    Weights,
    add_own_tangents,
    by_reverse_mode,
    dual_change,
    forward_mode,
)

Mode = Literal["response", "general", "linearized"]
# calls the module with some of its weights replaced
Run = Callable[[Weights], Any]

_CHECKPOINT = (
    "A network with substituted weights must keep what its backward pass needs. Got torch.utils.checkpoint, or another "
    "use of saved-tensor hooks: its second forward would find other weights. Leave it out of the network."
)


@dataclass(frozen=True, eq=False)
class Place:
    """Hyperparameters at which the module is evaluated, and how; see :meth:`Response.at`."""

    h: Tensor
    mode: Mode = "response"
    weights: Weights | None = None
    change: Callable[[dict[str, Tensor]], Weights] | None = None


class Response(nn.Module):
    """Base class of all learned best responses.

    ``response(x, h)`` is the module's output with the weights w(h). h holds n unconstrained numbers: (n,) for one
    point, or (batch, n) for one of each example. Inside ``with response.at(h):``
    and after ``response.bind(h)`` the call is the module's own, ``response(x)``.

    The weights w₀ keep their names; Δ(0) = 0, so that the network at ``center`` is the plain one with w₀.

    Args:
        module: Any module that has a parameter to train.
        num_hyperparameters: n.
        batch_dim: Dimension of the examples in the inputs of linear layers and embeddings.

    Attributes:
        module: Copy of the given module.
        center: Subtracted from h, (n,); zero unless moved by :meth:`recenter`.
    """

    center: Tensor
    point: Tensor

    def __init__(self, module: nn.Module, num_hyperparameters: int, batch_dim: int = 0) -> None:
        super().__init__()
        at_least(1, num_hyperparameters=num_hyperparameters)
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
        self.num_hyperparameters = num_hyperparameters
        some = next(iter(named.values()))
        dtype = torch.promote_types(some.dtype, torch.float32)
        for name in ("center", "point"):
            self.register_buffer(name, torch.zeros(num_hyperparameters, dtype=dtype, device=some.device))
        self.layers = Point(batch_dim)
        self._place: Place | None = None
        self._bound = False
        self._double_vjp = False  # once forward mode has met an operation it does not know
        self._aliases: dict[str, list[str]] = {name: [] for name in named}
        first = {id(p): name for name, p in named.items()}
        for path, owner in self.module.named_modules():  # each once, under its first name
            for attribute, p in owner.named_parameters(recurse=False):
                if id(p) in first:
                    self._aliases[first[id(p)]].append(f"{path}.{attribute}".lstrip("."))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Hyperparameters stay in full precision: half precision would round their small steps away.
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
        given = [(changes[name], g) for name, g in gradients.items() if g is not None]
        terms = [torch.dot(change.flatten(), g.flatten().to(change)) for change, g in given]
        return torch.stack(terms).sum() if terms else delta.new_zeros(())

    def one_point_only(self) -> tuple[str, ...]:
        """Name the parameters without a layer that responds by itself.

        With one h of each example, weights are then formed for each, and each example is evaluated alone.
        """
        return tuple(self._aliases)

    # ---- parameters

    def general_parameters(self) -> dict[str, nn.Parameter]:
        """w₀ by name, as in the module that was given."""
        return {name: self.module.get_parameter(name) for name in self._aliases}

    def response_parameters(self) -> dict[str, nn.Parameter]:
        """φ by name: the parameters of Δ that require gradients."""
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
        """Move the center to h and w₀ to w(h), so that w(·) stays the same function.

        Exact for responses that are linear in h; others keep their value at h.
        """
        for name, value in self.weights(h).items():
            self.module.get_parameter(name).copy_(value)
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
        """Evaluate at h inside, where the response is called like the plain module.

        Args:
            h: (n,), or (batch, n).
            mode: ``"response"``: with w(h). ``"general"``: with w₀. ``"linearized"``: the value is
                f(w₀) + J·Δ(h), with first derivatives with respect to φ alone; the function that Delta-STN trains.
            weights: In place of w(h), by name.
            change: From the weights by name to those used, such as a mask; needs one h.
        """
        check_hyperparameters(h, self.num_hyperparameters)
        if h.dim() == 2 and mode != "general" and (weights is not None or change is not None):
            raise ValueError("weights= and change= need one h. Got one of each example.")
        before, self._place = self._place, Place(h, mode, weights, change)
        try:
            yield
        finally:
            self._place = before

    def bind(self, h: Tensor) -> None:
        """Evaluate ``response(x)`` at h (n,) from now on, outside :meth:`at`."""
        check_hyperparameters(h, self.num_hyperparameters)
        self.point.copy_(h.detach())
        self._bound = True

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return the module's output. The last argument is h unless ``at`` or ``bind`` gives it."""
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

        def run(weights: Weights) -> Any:
            return self._call_with(weights, inputs, options)

        if place.mode == "general":
            return run({} if place.change is None else place.change(dict(self.general_parameters())))
        if place.h.dim() == 2:
            return self._each(place, run, (inputs, options))
        if place.mode == "linearized":
            return self._linearized(place, run)
        weights = dict(place.weights) if place.weights is not None else self.weights(place.h)
        return run(weights if place.change is None else place.change(weights))

    def _call_with(self, weights: Weights, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not weights:
            return self.module(*inputs, **options)
        with torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINT):
            # By all its names, each module once: torch's own tying leaves a module of two names without parameters.
            tied = {alias: w for name, w in weights.items() for alias in self._aliases.get(name, [name])}
            return torch.func.functional_call(self.module, tied, inputs, options, tie_weights=False)

    def _alone(self, place: Place, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """Evaluate each example with weights of its own, where a layer has no rule."""
        changes = torch.vmap(self.changes)(place.h - self.center)
        general, tangents = self.general_parameters(), None
        if place.mode == "linearized":
            tangents = {name: change.detach() for name, change in changes.items()}
            # w₀ + Δ − stop(Δ): the value at w₀, with derivatives for φ alone
            weights = {n: p.detach() + (changes[n] - tangents[n]) for n, p in general.items()}
        else:
            weights = {n: p + changes[n] for n, p in general.items()}
        return by_example(
            self.module, self._call_with, weights, tangents, arguments, batch_dim=self.layers.batch_dim
        )

    def _each(self, place: Place, run: Run, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        if self.one_point_only():
            return self._alone(place, arguments)
        try:
            return self._by_layers(place.h - self.center, place.mode == "linearized", dict, run)
        except ForwardModeError as error:
            raise RuntimeError(
                "The linearized output for one h of each example needs operations with forward-mode derivatives. "
                f"Got: {error} Give one h of shape (n,), or DeltaSTN(linearized=False)."
            ) from error

    def _by_layers(self, delta: Tensor, linearized: bool, rest: Callable[[], Weights], run: Run) -> Any:
        """Evaluate the layers by their own rule at ``delta``, (batch, n) or (n,); ``rest`` gives other weights."""
        with self.layers.at(delta, linearized), torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINT):
            if linearized:
                with forward_mode():
                    result = add_own_tangents(run(rest()))
            else:
                result = run({})
        check_reads(self.module, self.layers.visited, result, linearized)
        return result

    def _linearized(self, place: Place, run: Run) -> Any:
        """f(w₀) + J·Δ for one h, by forward mode where the operations have it."""
        changes, general = self.changes(place.h - self.center), self.general_parameters()
        change = place.change if place.change is not None else dict
        if not self._double_vjp:
            try:
                with forward_mode():
                    duals = {n: dual_change(p, changes[n]) for n, p in general.items()}
                    return add_own_tangents(run(change(duals)))
            except ForwardModeError:
                self._double_vjp = True
        return by_reverse_mode(lambda weights: run(change(weights)), general, changes)

    # ---- the plain network

    def export(self, h: Tensor) -> nn.Module:
        """Return a copy of the plain module with the weights w(h), h (n,): no hypernetwork left.

        >>> from lightning_nested.hypernetworks import best_response
        >>> response = best_response(nn.Linear(3, 2), num_hyperparameters=4)
        >>> type(response.export(torch.zeros(4))).__name__
        'Linear'
        """
        with torch.no_grad():
            weights = self.weights(h)
            plain = copy.deepcopy(self.module)
            for layer in list(plain.modules()):
                revert = getattr(layer, "revert", None)  # tuned dropout layers have one too
                if callable(revert):
                    revert()
            for name, parameter in plain.named_parameters():
                if name in weights:
                    parameter.copy_(weights[name])
        return plain

    def num_parameters(self) -> dict[str, int]:
        """Count the numbers in ``"general"`` (w₀) and ``"response"`` (φ) parameters."""
        groups = {"general": self.general_parameters(), "response": self.response_parameters()}
        return {kind: sum(p.numel() for p in group.values()) for kind, group in groups.items()}
