"""Linearized output f(w₀) + J·Δ of a module: by forward mode, or by two reverse passes.

φ sees w₀ + Δ − stop(Δ), see :func:`carry`. Then the vector-Jacobian product of the output is that of J·Δ(φ), and no
derivative of a tangent is taken, which torch gets wrong through normalization layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lightning_nested.hypernetworks.layers.arithmetic import carry, make_dual, unpack_dual

Weights = Mapping[str, Tensor]


@contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Use kernels that have second and forward-mode derivatives."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


class ForwardModeError(RuntimeError):
    """An operation has no forward-mode derivative."""


@contextmanager
def forward_mode() -> Iterator[None]:
    """Compute with dual numbers inside, by kernels that know them.

    Raises:
        ForwardModeError: Torch reports an operation without forward-mode derivatives.
    """
    try:
        with forward_ad.dual_level(), differentiable_kernels():
            yield
    except RuntimeError as error:
        if "forward ad" in str(error).lower() or "forward mode" in str(error).lower():
            raise ForwardModeError(str(error)) from error
        raise


def dual_change(weight: Tensor, change: Tensor) -> Tensor:
    """Return the weight's value with ``change`` as its tangent, and with the derivatives of w₀ + Δ − stop(Δ)."""
    return make_dual(carry(weight.detach(), change), change.detach())


def add_own_tangents(outputs: Any) -> Any:
    """value + tangent of each dual number among the outputs."""
    return tree_map(_plus_tangent, outputs)


def _plus_tangent(output: Any) -> Any:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    value, tangent = unpack_dual(output)
    return value if tangent is None else value + tangent.detach()


def by_reverse_mode(run: Callable[[dict[str, Tensor]], Any], weights: Weights, changes: Weights) -> Any:
    """f(w₀) + J·Δ without forward mode: J·Δ is the derivative with respect to v of Jᵀv, applied to Δ.

    ``run`` is f, a function of weights by name; ``weights`` are w₀ and ``changes`` Δ.
    """
    leaves = {n: carry(w.detach(), changes[n]) for n, w in weights.items()}
    leaves = {n: w if w.requires_grad else w.requires_grad_() for n, w in leaves.items()}
    with differentiable_kernels():
        outputs, tree = tree_flatten(run(dict(leaves)))
        live = [i for i, y in enumerate(outputs) if isinstance(y, Tensor) and y.requires_grad]
        cotangents = [torch.zeros_like(outputs[i], requires_grad=True) for i in live]
        found, at = [outputs[i] for i in live], list(leaves.values())
        pulled = torch.autograd.grad(found, at, cotangents, create_graph=True, allow_unused=True)
        pairs = zip(pulled, (changes[n].detach() for n in leaves), strict=True)
        used = [(g, change) for g, change in pairs if g is not None and g.requires_grad]
        products, tangents = [g for g, _ in used], [c for _, c in used]
        moved = torch.autograd.grad(products, cotangents, tangents, retain_graph=True, allow_unused=True)
    for i, tangent in zip(live, moved, strict=True):
        if tangent is not None:
            outputs[i] = outputs[i] + tangent.detach()
    return tree_unflatten(outputs, tree)
