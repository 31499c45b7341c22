"""Layers with a weight divided by an estimate of its largest singular value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import ParametrizationList

# The function of this name hides the module in torch.nn.utils.
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook

from lightning_nested.arguments import checked


class SpectralNormLayer(nn.Module):
    """Weight W̄ = W / σ with σ = uᵀ W v, where u and v are constants and W, ``(out, …)``, is seen as a matrix.

    A forward in train mode first improves the two vectors by one power iteration on the current weight,
    v ← Wᵀu / ‖Wᵀu‖, u ← Wv / ‖Wv‖. In evaluation mode, and inside :func:`frozen_power_iteration`, they stay:
    W̄ is then one fixed function of W, so derivatives taken over several forwards belong to one function.

    Miyato, Kataoka, Koyama & Yoshida (2018), ICLR, arXiv 1802.05957. The same function as
    ``torch.nn.utils.parametrizations.spectral_norm``, which improves u before v, with a ``state_dict`` of plain
    names (``weight``, ``u``, ``v``) and the freezing.
    """

    weight: Tensor
    u: Tensor
    v: Tensor

    def __init__(self, *args: Any, eps: float = 1e-8, **options: Any) -> None:
        super().__init__(*args, **options)
        self.eps, self.frozen = eps, False
        rows, columns = self.weight.flatten(1).shape
        self.register_buffer("u", functional.normalize(torch.randn(rows), dim=0, eps=eps))
        self.register_buffer("v", torch.empty(columns))
        self.match_vectors()

    @torch.no_grad()
    def match_vectors(self) -> Tensor:
        """Set v for the current u and weight, and return it; call this after weights were initialized again."""
        v = functional.normalize(torch.mv(self.weight.flatten(1).T, self.u), dim=0, eps=self.eps)
        self.v.copy_(v)
        return v

    @torch.no_grad()
    def iterate(self) -> tuple[Tensor, Tensor]:
        """Do one power iteration on the current weight, in any mode; return the new u and v."""
        v = self.match_vectors()
        u = functional.normalize(torch.mv(self.weight.flatten(1), v), dim=0, eps=self.eps)
        self.u.copy_(u)
        return u, v

    def normalized_weight(self) -> Tensor:
        """Return W̄ in the weight's shape, differentiable in the weight; update u and v in train mode."""
        # In half precision the iteration would stall and σ be off by a per cent.
        with torch.autocast(self.weight.device.type, enabled=False):
            if self.training and not self.frozen:
                u, v = self.iterate()
            else:
                # Copies: a later iteration must not change what this graph holds.
                u, v = self.u.clone(), self.v.clone()
            return torch.div(self.weight, torch.dot(u, torch.mv(self.weight.flatten(1), v)))

    @torch.no_grad()
    def singular_value(self) -> Tensor:
        """Return the current estimate σ = uᵀ W v, a scalar, without side effects."""
        return torch.dot(self.u, torch.mv(self.weight.flatten(1), self.v))


class SpectralNormConv2d(SpectralNormLayer, nn.Conv2d):
    """``nn.Conv2d`` with a spectrally normalized weight.

    Example:
        >>> layer = SpectralNormConv2d(3, 8, 3, padding=1)
        >>> for _ in range(60):
        ...     _ = layer(torch.zeros(1, 3, 4, 4))
        >>> matrix = layer.normalized_weight().flatten(1)
        >>> round(torch.linalg.matrix_norm(matrix, ord=2).item(), 3)
        1.0
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in, H, W)`` to ``(N, out, H', W')``."""
        y: Tensor = self._conv_forward(x, self.normalized_weight(), self.bias)
        return y


class SpectralNormLinear(SpectralNormLayer, nn.Linear):
    """``nn.Linear`` with a spectrally normalized weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in)`` to ``(N, out)``."""
        return functional.linear(x, self.normalized_weight(), self.bias)


class SpectralNormEmbedding(SpectralNormLayer, nn.Embedding):
    """``nn.Embedding`` with a spectrally normalized table."""

    def forward(self, index: Tensor) -> Tensor:
        """Map ``(N,)`` indices to ``(N, embedding_dim)``."""
        return functional.embedding(index, self.normalized_weight())


@contextmanager
def frozen_power_iteration(*modules: nn.Module) -> Iterator[None]:
    """Make every spectrally normalized layer a function of its parameters alone, in train mode too.

    Use it around Jacobian and Hessian products that take more than one forward. It holds layers of this package,
    ``torch.nn.utils.spectral_norm``, and every parametrization with buffers, such as
    ``torch.nn.utils.parametrizations.spectral_norm``.

    Example:
        >>> layer = SpectralNormLinear(3, 2)
        >>> with frozen_power_iteration(layer):
        ...     bool((layer.normalized_weight() == layer.normalized_weight()).all())
        True
    """
    with ExitStack() as stack:
        for layer in (layer for module in modules for layer in module.modules()):
            if isinstance(layer, SpectralNormLayer):
                _set_until_exit(stack, layer, frozen=True)
            for part in _stateful_parts(layer):
                _set_until_exit(stack, part, training=False)
            for hook in _hooks(layer):
                # Copies: a later iteration must not change what a graph from inside holds.
                vectors = {
                    f"{hook.name}_{which}": getattr(layer, f"{hook.name}_{which}").clone() for which in "uv"
                }
                _set_until_exit(stack, layer, **vectors)
                _set_until_exit(stack, hook, n_power_iterations=0)
        yield


@torch.no_grad()
def iterate_spectral_norms(module: nn.Module, *, times: int = 1, of_training_only: bool = False) -> None:
    """Do power iterations on the current weights for all that :func:`frozen_power_iteration` holds.

    Use it after weights were changed other than by training. A parametrization with buffers is evaluated in train
    mode, in which torch's improves its vectors.

    Args:
        module: Module whose layers are updated, in any mode.
        times: Iterations.
        of_training_only: Leave out layers in evaluation mode, whose forward would not iterate.

    Example:
        >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)).eval()
        >>> with torch.no_grad():
        ...     _ = layer.parametrizations.weight.original.copy_(2 * torch.eye(2, 3))
        >>> iterate_spectral_norms(layer, times=40)
        >>> round(torch.linalg.matrix_norm(layer.weight, ord=2).item(), 3)
        1.0
    """
    for layer in module.modules():
        if isinstance(layer, SpectralNormLayer) and (layer.training or not of_training_only):
            for _ in range(times):
                layer.iterate()
        parts = [part for part in _stateful_parts(layer) if part.training or not of_training_only]
        with ExitStack() as stack:
            for part in parts:
                _set_until_exit(stack, part, training=True)
            for _ in range(times if parts else 0):
                layer()
        for hook in _hooks(layer) if layer.training or not of_training_only else []:
            for _ in range(times):
                setattr(layer, hook.name, hook.compute_weight(layer, do_power_iteration=True))


def _stateful_parts(layer: nn.Module) -> list[nn.Module]:
    """Return the modules inside a list of parametrizations of one tensor, if they have buffers."""
    if not isinstance(layer, ParametrizationList) or not any(True for _ in layer.buffers()):
        return []
    return [part for part in layer.modules() if part is not layer]


def _hooks(layer: nn.Module) -> list[SpectralNormHook]:
    return [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, SpectralNormHook)]


def _set_until_exit(stack: ExitStack, of: object, **values: object) -> None:
    for name, value in values.items():
        stack.callback(setattr, of, name, getattr(of, name))
        setattr(of, name, value)


def spectral_norm_layers(module: nn.Module) -> dict[str, SpectralNormLayer]:
    """Return this package's spectrally normalized layers inside, by dotted name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, SpectralNormLayer)}


@checked
def singular_values(module: nn.Module) -> dict[str, Tensor]:
    """Return σ of every spectrally normalized layer by dotted name, a scalar each; a jump is a sign of collapse.

    Example:
        >>> list(singular_values(nn.Sequential(SpectralNormLinear(3, 2))))
        ['0']
    """
    return {name: layer.singular_value() for name, layer in spectral_norm_layers(module).items()}
