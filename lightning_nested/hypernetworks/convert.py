"""Convert any module into one whose weights respond to hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_nested.arguments import at_least, checked
from lightning_nested.hypernetworks import layers
from lightning_nested.hypernetworks.layers.base import HyperLayer, OnePointError, RowResponse
from lightning_nested.hypernetworks.linearized import ForwardModeError, Weights, dual_change
from lightning_nested.hypernetworks.response import Place, Response, Run

_LAYERS: dict[type[nn.Module], type[HyperLayer]] = {
    layer.plain: layer
    for layer in (
        layers.HyperLinear, layers.HyperConv1d, layers.HyperConv2d, layers.HyperEmbedding, layers.HyperLSTM,
        layers.HyperLayerNorm, layers.HyperGroupNorm, layers.HyperBatchNorm1d, layers.HyperBatchNorm2d,
    )
}  # fmt: skip


class LowRankResponse(nn.Module):
    """Δ(h) = Σ_k (vₖ·h) qₖ for a parameter of any shape: ``rank · (numel + n)`` parameters.

    Args:
        like: Parameter that responds.
        num_hyperparameters: n.
        rank: Number of terms; n suffices for every linear response.
    """

    def __init__(self, like: Tensor, num_hyperparameters: int, rank: int) -> None:
        super().__init__()
        like = like.detach()
        size = float(like.square().mean().sqrt()) or 1.0
        self.scale = nn.Parameter(like.new_zeros(rank, num_hyperparameters))  # v
        like = like.expand(rank, *like.shape).contiguous()
        self.directions = nn.Parameter(size * torch.randn_like(like))  # q

    def forward(self, delta: Tensor) -> Tensor:
        """Δ(h) of the parameter's shape, for h (n,)."""
        change: Tensor = torch.tensordot(self._coefficients(delta), self.directions, dims=1)
        return change

    def added_to(self, weight: Tensor, delta: Tensor) -> Tensor:
        """weight + Δ(h)."""
        return weight + self.forward(delta)

    def inner(self, delta: Tensor, gradient: Tensor) -> Tensor:
        """⟨Δ(h), gradient⟩, scalar."""
        rows = self.directions.reshape(len(self.directions), -1)  # of a scalar too
        along: Tensor = rows @ gradient.to(self.directions).flatten()
        return torch.dot(self._coefficients(delta), along)

    def _coefficients(self, delta: Tensor) -> Tensor:
        # Under autocast a product is in half precision, and tensordot takes equal dtypes only.
        return (self.scale @ delta.to(self.scale.dtype)).to(self.directions.dtype)


@checked
class BestResponse(Response):
    """Response of any module, layer by layer; see :func:`best_response` for the arguments."""

    def __init__(
        self, module: nn.Module, num_hyperparameters: int, *, rank: int | None = None, batch_dim: int = 0
    ) -> None:
        super().__init__(module, num_hyperparameters, batch_dim)
        rank = min(2, num_hyperparameters) if rank is None else rank
        at_least(1, rank=rank)
        general = self.general_parameters()
        by_layers: dict[int, RowResponse] = {}
        elsewhere: set[int] = set()  # parameters that another kind of module reads too
        for layer in list(self.module.modules()):
            kind = _kind(layer)
            if kind is None:
                elsewhere |= {id(p) for p in layer.parameters(recurse=False)}
                continue
            # The class changes under the layer: its names, hooks and whoever else holds it stay as they are.
            layer.__class__ = kind
            assert isinstance(layer, HyperLayer)
            layer.respond(num_hyperparameters, self.layers, by_layers)
        self._layers_suffice = True  # until one of them cannot
        others = {n: p for n, p in general.items() if id(p) not in by_layers}
        rest = {n: LowRankResponse(p, num_hyperparameters, rank) for n, p in others.items()}
        self.rest = nn.ModuleList(rest.values())
        # a plain dict: the modules have their keys in the checkpoint already
        self._responses: dict[str, RowResponse | LowRankResponse] = {
            n: rest[n] if n in rest else by_layers[id(p)] for n, p in general.items()
        }
        self._one_point = tuple(n for n, p in general.items() if n in rest or id(p) in elsewhere)

    def changes(self, delta: Tensor) -> dict[str, Tensor]:
        """Δ of each parameter."""
        return {name: response(delta) for name, response in self._responses.items()}

    def moved(self, delta: Tensor) -> dict[str, Tensor]:
        """w₀ + Δ of each parameter, in one pass where there is a layer."""
        general = self.general_parameters()
        return {name: response.added_to(general[name], delta) for name, response in self._responses.items()}

    def first_order(self, delta: Tensor, gradients: Mapping[str, Tensor | None]) -> Tensor:
        """⟨Δ(delta), gradients⟩; where there is a layer, Δ is not formed."""
        with torch.autocast(delta.device.type, enabled=False):
            pairs = [(response, gradients.get(name)) for name, response in self._responses.items()]
            terms = [response.inner(delta, g) for response, g in pairs if g is not None]
        return torch.stack(terms).sum() if terms else delta.new_zeros(())

    def one_point_only(self) -> tuple[str, ...]:
        """Name the parameters without a layer of ours."""
        return self._one_point

    def _linearized(self, place: Place, run: Run) -> Any:
        """Linearize by the layers, which need no second set of weights; by weights at h where a layer cannot.

        In that case the output is computed again, from the same random numbers and buffers.
        """
        without = {n: r for n, r in self._responses.items() if not isinstance(r, RowResponse)}
        suffice = self._layers_suffice and not self._double_vjp and self._one_point == tuple(without)
        if not suffice or place.change is not None:
            return super()._linearized(place, run)
        delta, general = place.h - self.center, self.general_parameters()
        buffers = [b.clone() for b in self.module.buffers()]

        def rest() -> Weights:
            return {n: dual_change(general[n], r(delta)) for n, r in without.items()}

        devices = {p.device for p in general.values() if p.is_cuda}
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
        try:
            result = self._by_layers(delta, True, rest, run)
            if not self.layers.read:
                return result
        except (OnePointError, ForwardModeError):
            pass
        self._layers_suffice = False
        with torch.no_grad():
            for buffer, before in zip(self.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
        torch.set_rng_state(states[0])
        for device, state in zip(devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        return super()._linearized(place, run)


def _kind(layer: nn.Module) -> type[HyperLayer] | None:
    """Return our class for a layer; None for subclasses, whose forward may read the weights in any way."""
    if isinstance(layer, nn.Embedding) and (
        layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse
    ):
        return None
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
        return None
    if not any(p.requires_grad for p in layer.parameters(recurse=False)):
        return None
    names = {name for name, _ in layer.named_parameters(recurse=False)}
    own = set(layer._flat_weights_names) if isinstance(layer, nn.LSTM) else {"weight", "bias"}
    if not names <= own:  # pruned, or of hooks: the weight is made of others
        return None
    return _LAYERS.get(type(layer))


@checked
def best_response(
    module: nn.Module, num_hyperparameters: int, *, rank: int | None = None, batch_dim: int = 0
) -> BestResponse:
    """Convert any module: ``response(x, h)`` is its output with weights that respond to h.

    Linear layers, convolutions (1d, 2d), embeddings, LSTMs and normalization layers get W(h) = W₀ + diag(V h) W₁;
    each other parameter a low-rank response. At first the response is zero. Shared weights are converted once and stay
    shared. One h of each example costs two operations where every parameter has such a layer; else each example runs
    alone under ``torch.vmap``, with all its weights formed, and must not influence others (batch norm in train mode).

    A parameter of r rows and m entries gets ``m + r·n`` more, one without a layer ``rank · (m + n)``.

    Args:
        module: Any module; a copy is converted.
        num_hyperparameters: n.
        rank: Rank of the low-rank responses; default ``min(2, n)``.
        batch_dim: Dimension of the examples in the inputs of linear layers and embeddings: 1 for networks over
            (time, batch, …).

    >>> response = best_response(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), 5)
    >>> response.num_parameters()  # 5 rows of 5 numbers each beside a second set of weights
    {'general': 23, 'response': 73}
    >>> x, h = torch.randn(7, 4), torch.randn(7, 5)
    >>> tuple(response(x, h).shape), tuple(response(x, h[0]).shape)
    ((7, 2), (7, 2))
    """
    return BestResponse(module, num_hyperparameters, rank=rank, batch_dim=batch_dim)
