"""Dropout for sequences: of the same units at each step, and of whole words."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SequenceDropout(nn.Dropout):
    """Drops the same units at each step of a sequence: variational dropout.

    Gal & Ghahramani (2016), "A theoretically grounded application of dropout in recurrent neural networks", NeurIPS.

    Shape:
        Input and output ``(batch, length, width)``; a mask is drawn for each example.

    Example:
        >>> x = SequenceDropout(0.5)(torch.ones(1, 3, 8))
        >>> bool((x == x[:, :1]).all())
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x with units dropped in training, x itself in evaluation."""
        if not self.training or self.p == 0:
            return x
        mask = torch.rand(x.shape[0], 1, x.shape[2], device=x.device) < 1 - self.p
        return x * mask / (1 - self.p)


class WordDropout(nn.Dropout):
    """Drops words: all places where a batch has the word have a vector of zeros. Also known as embedding dropout.

    Gal & Ghahramani (2016), as above; Merity, Keskar & Socher (2018), "Regularizing and optimizing LSTM language
    models", ICLR.

    Shape:
        Vectors ``(batch, length, width)`` and numbers ``(batch, length)`` of the words; output as the vectors.

    Example:
        >>> words = torch.tensor([[3, 5, 3]])
        >>> x = WordDropout(0.5)(torch.ones(1, 3, 2), words)
        >>> bool((x[0, 0] == x[0, 2]).all())
        True
    """

    def forward(self, x: Tensor, words: Tensor) -> Tensor:  # type: ignore[override]
        """Return x with words dropped in training, x itself in evaluation."""
        if not self.training or self.p == 0:
            return x
        return x * (word_noise(words) < 1 - self.p) / (1 - self.p)


def word_noise(words: Tensor) -> Tensor:
    """Return a uniform number in [0, 1) for each word of a batch, of shape (batch, length, 1)."""
    distinct, where = torch.unique(words, return_inverse=True)
    return torch.rand(len(distinct), device=words.device)[where].unsqueeze(-1)
