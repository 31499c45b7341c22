"""Batch normalisation whose gain and bias depend on a condition, and its statistics of many batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_nested.networks.spectral_norm import frozen_power_iteration


class ClassEmbedding(nn.Embedding):
    """``nn.Embedding`` that also takes mixtures of classes: float weights ``(N, num_classes)``.

    Example:
        >>> embed = ClassEmbedding(3, 2)
        >>> mixture = torch.tensor([[0.0, 1.0, 0.0]])
        >>> bool(torch.equal(embed(mixture), embed(torch.tensor([1]))))
        True
    """

    def forward(self, labels: Tensor) -> Tensor:
        """``(N,)`` indices or ``(N, num_classes)`` weights to ``(N, embedding_dim)``."""
        if labels.is_floating_point():
            return labels.to(self.weight.dtype) @ self.weight
        return super().forward(labels)


class ConditionalBatchNorm2d(nn.Module):
    """h = (1 + gain(y)) ⊙ (x − μ)/√(σ² + ε) + bias(y), one gain and bias per example and channel.

    The normalisation is a ``BatchNorm2d(affine=False)``, so that ``SyncBatchNorm.convert_sync_batchnorm`` (the
    Trainer's ``sync_batchnorm=True``) finds and converts it. De Vries et al. (2017), arXiv 1707.00683.

    Args:
        num_features: Channels C.
        gain: Module from a condition ``(N, …)`` to ``(N, C)``.
        bias: The same for the bias.
        eps: ε.

    Example:
        >>> norm = ConditionalBatchNorm2d(3, nn.Embedding(10, 3), nn.Embedding(10, 3))
        >>> tuple(norm(torch.zeros(2, 3, 4, 4), torch.tensor([0, 9])).shape)
        (2, 3, 4, 4)
    """

    def __init__(self, num_features: int, gain: nn.Module, bias: nn.Module, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, eps=eps, affine=False)
        self.gain, self.bias = gain, bias

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``(N, C, H, W)`` and the condition to ``(N, C, H, W)``."""
        gain = 1.0 + self.gain(condition)
        bias = self.bias(condition)
        return torch.addcmul(bias[:, :, None, None], self.norm(x), gain[:, :, None, None])


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Every batch normalisation inside that keeps running statistics."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    ]


@torch.no_grad()
def standing_statistics(module: nn.Module, forward: Callable[[], object], *, num_batches: int) -> None:
    """Replace running statistics by the plain mean over ``num_batches`` calls of ``forward``.

    Running averages trail the weights that made them; standing statistics belong to the present weights.
    Brock, Donahue & Simonyan (2019), ICLR, arXiv 1809.11096, section 4.1.

    Args:
        module: Its batch normalisations get new statistics; its mode comes back.
        forward: One forward of the module with fresh inputs of the size that statistics should be taken over.
        num_batches: How many; 16 are enough.

    Raises:
        ValueError: If ``num_batches`` is below 1.

    Example:
        >>> norm = nn.BatchNorm2d(1)
        >>> batches = iter([torch.full((2, 1, 2, 2), 1.0), torch.full((2, 1, 2, 2), 4.0)])
        >>> standing_statistics(norm, lambda: norm(next(batches)), num_batches=2)
        >>> norm.running_mean
        tensor([2.5000])
    """
    if num_batches < 1:
        raise ValueError(f"num_batches must be at least 1. Got {num_batches}.")
    norms = batch_norms(module)
    momenta = [norm.momentum for norm in norms]
    modes = {layer: layer.training for layer in module.modules()}
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's name for the cumulative mean
        module.train()
        with frozen_power_iteration(module):
            for _ in range(num_batches):
                forward()
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for layer, mode in modes.items():
            layer.training = mode
