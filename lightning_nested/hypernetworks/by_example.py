"""One point of each example for any module: each example alone, with weights of its own, under ``torch.vmap``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_nested.hypernetworks.linearized import differentiable_kernels
from lightning_nested.hyperparameters.dropout import DropoutRates, TunedDropout

# calls the module with some of its weights replaced, on these positional and keyword arguments
Call = Callable[[Mapping[str, Tensor], tuple[Any, ...], dict[str, Any]], Any]


def by_example(
    module: nn.Module,
    call: Call,
    weights: Mapping[str, Tensor],
    tangents: Mapping[str, Tensor] | None,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    batch_dim: int,
) -> Any:
    """Call the module on each example alone, with the i-th of the weights (batch, *shape), and join the outputs.

    Forms all weights: ``batch`` sets of them at once. Every tensor among the arguments with as many entries in
    ``batch_dim`` as there are weights is taken for examples, any other for one that all share.

    Args:
        module: The module that ``call`` calls; only looked at.
        call: From weights by name and arguments to the output.
        weights: A set of weights for each example.
        tangents: Add the forward derivative along these to the output, as a number without graph; None: do not.
        arguments: Positional and keyword arguments.
        batch_dim: Dimension of the examples in arguments and outputs.

    Raises:
        ValueError: Examples influence each other (batch norm in train mode); no argument has as many examples, or one
            after the first may or may not; an output has no dimension of examples; or torch cannot run the module
            under ``vmap``.
    """
    _check_alone(module, batch_dim)
    batch = len(next(iter(weights.values())))
    leaves, tree = tree_flatten(arguments)
    places = [_is_examples(leaf, batch, batch_dim) for leaf in leaves]
    if not any(places):
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        raise ValueError(
            f"One h of each example needs an input with as many examples (dimension {batch_dim}) as h has rows, "
            f"{batch}. Got shapes {shapes}; give one h of shape (n,), or batch_dim= of best_response."
        )
    for leaf, place in list(zip(leaves, places, strict=True))[places.index(True) + 1 :]:
        if place and list(leaf.shape).count(batch) > 1:
            raise ValueError(
                f"It must be clear which arguments hold examples: those with {batch} entries in dimension {batch_dim}. "
                f"Got a further one of shape {tuple(leaf.shape)}, which may be a mask for all; give another number of "
                "examples, or one h of shape (n,) for the batch."
            )
    structure: list[Any] = []
    tuned = _rates_of_examples(module)

    def one(
        own: dict[str, Tensor], moving: dict[str, Tensor], examples: list[Tensor], rates: list[Tensor]
    ) -> list[Tensor]:
        with _at_rates(tuned, rates):
            return at_own_rates(own, moving, examples)

    def at_own_rates(
        own: dict[str, Tensor], moving: dict[str, Tensor], examples: list[Tensor]
    ) -> list[Tensor]:
        given = iter(examples)
        mine = [
            next(given).unsqueeze(batch_dim) if p else leaf for leaf, p in zip(leaves, places, strict=True)
        ]
        inputs, options = tree_unflatten(mine, tree)

        def output(substituted: dict[str, Tensor]) -> list[Tensor]:
            found, out_tree = tree_flatten(call(substituted, inputs, options))
            structure[:] = [out_tree]
            return [_alone(y, batch_dim) for y in found]

        if not moving:
            return output(own)
        values, derivatives = torch.func.jvp(output, (own,), (moving,))  # type: ignore[misc]  # two without has_aux
        return [
            y + d.detach() if y.is_floating_point() else y for y, d in zip(values, derivatives, strict=True)
        ]

    examples = [leaf.movedim(batch_dim, 0) for leaf, p in zip(leaves, places, strict=True) if p]
    with differentiable_kernels(), _without_fast_path():
        try:
            outputs = torch.vmap(one, randomness="different")(
                dict(weights), dict(tangents or {}), examples, [rates.raw("rates") for rates in tuned]
            )
        except RuntimeError as error:
            # NotImplementedError is one: an operation without a batching rule, or without forward mode
            if "vmap" not in str(error) and not isinstance(error, NotImplementedError):
                raise
            raise ValueError(
                "One h of each example needs layers that respond by themselves, or a module that runs under "
                f"torch.vmap. Got: {str(error).splitlines()[0]} Give one h of shape (n,) for the batch."
            ) from error
    return tree_unflatten([y.movedim(0, batch_dim) for y in outputs], structure[0])


def _check_alone(module: nn.Module, batch_dim: int) -> None:
    for name, layer in module.named_modules():
        first = getattr(layer, "batch_first", None)
        if first is not None and bool(first) != (batch_dim == 0):
            raise ValueError(
                f"batch_dim must be 0 with layers of batch_first=True, 1 with others. Got batch_dim={batch_dim} and "
                f"{type(layer).__name__} {name!r} with batch_first={first}; set batch_dim= of best_response."
            )
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise ValueError(
                "One h of each example needs examples that do not influence each other, where a parameter has no layer "
                f"of ours. Got {type(layer).__name__} {name!r} with statistics of the batch; call eval() on it, take "
                "group or layer norm, or give one h of shape (n,) for the batch."
            )


def _rates_of_examples(module: nn.Module) -> list[DropoutRates]:
    """Return the tuned rates that layers of ``module`` read, if there is one of each example."""
    found = {id(layer.rates): layer.rates for layer in module.modules() if isinstance(layer, TunedDropout)}
    return [rates for rates in found.values() if rates.raw("rates").dim() > 1]


@contextmanager
def _at_rates(tuned: Sequence[DropoutRates], rates: Sequence[Tensor]) -> Iterator[None]:
    """Let the layers of one example read its own rates."""
    before = [own.tensors for own in tuned]
    for own, tensor in zip(tuned, rates, strict=True):
        own.tensors = {"rates": tensor}
    try:
        yield
    finally:
        for own, tensors in zip(tuned, before, strict=True):
            own.tensors = tensors


def _is_examples(leaf: Any, batch: int, dim: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == batch


def _alone(output: Any, dim: int) -> Tensor:
    """Return the output of one example without its dimension of examples."""
    if not isinstance(output, Tensor) or output.dim() <= dim or output.shape[dim] != 1:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"One h of each example needs outputs with the examples in dimension {dim}. Got {got} of one example; give "
            "one h of shape (n,) for the batch."
        )
    return output.squeeze(dim)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Keep torch's transformer layers from a fused kernel that vmap does not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
