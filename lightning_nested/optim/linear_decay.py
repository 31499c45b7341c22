"""A learning rate that is constant first and then falls on a line to zero."""

from __future__ import annotations

import torch
from torch.optim import Optimizer


class LinearDecay(torch.optim.lr_scheduler.LambdaLR):
    """lr(t) = lr · min(1, (stop − t)/(stop − start)), 0 from ``stop`` on.

    Args:
        optimizer: Whose rate it is.
        start: Step from which it falls.
        stop: Step at which it is 0.

    Raises:
        ValueError: Unless 0 <= start < stop.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> schedule = LinearDecay(optimizer, start=2, stop=4)
        >>> rates = []
        >>> for _ in range(5):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [1.0, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, optimizer: Optimizer, start: int, stop: int) -> None:
        if not 0 <= start < stop:
            raise ValueError(f"LinearDecay needs 0 <= start < stop. Got start={start}, stop={stop}.")
        super().__init__(optimizer, lambda step: max(0.0, min(1.0, (stop - step) / (stop - start))))
