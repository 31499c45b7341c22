"""Batch normalization whose gain and bias depend on a condition, and standing statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_nested.arguments import at_least, checked
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
        """Map ``(N,)`` indices or ``(N, num_classes)`` weights to ``(N, embedding_dim)``."""
        if labels.is_floating_point():
            return labels.to(self.weight.dtype) @ self.weight
        return super().forward(labels)


@checked
class ConditionalBatchNorm2d(nn.Module):
    """Conditional batch norm h = (1 + gain(y)) ⊙ (x − μ)/√(σ² + ε) + bias(y), per example and channel.

    The normalization is a ``BatchNorm2d(affine=False)``, so that ``SyncBatchNorm.convert_sync_batchnorm`` (the
    Trainer's ``sync_batchnorm=True``) finds and converts it. De Vries et al. (2017), arXiv 1707.00683.

    Args:
        num_features: Channels C.
        gain: Module from a condition ``(N, …)`` to ``(N, C)``.
        bias: Module from a condition ``(N, …)`` to ``(N, C)``.
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
        """Map ``(N, C, H, W)`` and the condition to ``(N, C, H, W)``."""
        gain, bias = 1.0 + self.gain(condition), self.bias(condition)
        return torch.addcmul(bias[:, :, None, None], self.norm(x), gain[:, :, None, None])


def batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return every batch normalization inside that keeps running statistics."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    ]


@contextmanager
def restored_modes(module: nn.Module) -> Iterator[None]:
    """Restore the train or evaluation mode of every submodule on exit."""
    with ExitStack() as stack:
        for layer in module.modules():
            stack.callback(setattr, layer, "training", layer.training)
        yield


@checked
@torch.no_grad()
def standing_statistics(module: nn.Module, forward: Callable[[], object], *, num_batches: int) -> None:
    """Replace running statistics by the plain mean over ``num_batches`` calls of ``forward``.

    Running averages trail the weights that made them; standing statistics belong to the current weights.
    Brock, Donahue & Simonyan (2019), ICLR, arXiv 1809.11096, section 4.1.

    Args:
        module: Network whose batch normalizations get new statistics; its modes are restored.
        forward: One forward of the module with fresh inputs of the size that statistics should be taken over.
        num_batches: Calls of ``forward``; 16 are enough.

    Example:
        >>> norm = nn.BatchNorm2d(1)
        >>> batches = iter([torch.full((2, 1, 2, 2), 1.0), torch.full((2, 1, 2, 2), 4.0)])
        >>> standing_statistics(norm, lambda: norm(next(batches)), num_batches=2)
        >>> norm.running_mean
        tensor([2.5000])
    """
    at_least(1, num_batches=num_batches)
    with restored_modes(module), frozen_power_iteration(module), ExitStack() as momenta:
        for norm in batch_norms(module):
            momenta.callback(setattr, norm, "momentum", norm.momentum)
            norm.reset_running_stats()
            norm.momentum = None  # torch's name for the cumulative mean
        module.train()
        for _ in range(num_batches):
            forward()
