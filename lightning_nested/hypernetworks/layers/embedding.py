"""Embedding whose weights respond to hyperparameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.arguments import at_least, checked
from lightning_nested.hypernetworks.layers.arithmetic import linearly_moved, moved
from lightning_nested.hypernetworks.layers.base import HyperLayer, check_examples, placement


@checked
class HyperEmbedding(HyperLayer, nn.Embedding):
    """Row of token t: e₀ₜ + (vₜ·h) e₁ₜ.

    ``2·num·dim + num·n`` parameters. The rows are those of a tied output layer, so that a shared weight has one
    response.

    Args:
        num_embeddings: Number of tokens.
        embedding_dim: Width of a row.
        num_hyperparameters: n.
        **options: The other arguments of ``nn.Embedding``.
    """

    plain = nn.Embedding

    def __init__(
        self, num_embeddings: int, embedding_dim: int, num_hyperparameters: int, **options: Any
    ) -> None:
        at_least(1, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        at_least(1, num_hyperparameters=num_hyperparameters)
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **options)
        self.respond(num_hyperparameters)

    def _per_example(self, x: Tensor, delta: Tensor, linearized: bool) -> Tensor:
        dim = self._batch_dim
        check_examples(x, delta, dim, type(self).__name__, least=1)
        base = functional.embedding(x, self.weight.detach() if linearized else self.weight, self.padding_idx)
        response = self.response_of("weight")
        if response is None:
            return base
        rows = functional.embedding(x, response.scale, self.padding_idx)
        points = placement(x.dim() + 1, dim, -1)(delta.to(rows.dtype))
        coefficient = (rows * points).sum(-1, keepdim=True)
        direction = functional.embedding(x, response.direction, self.padding_idx)
        if linearized:
            return linearly_moved(base, None, coefficient, direction, None)
        return moved(base, coefficient, direction)
