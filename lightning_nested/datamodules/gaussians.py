"""Points from a mixture of Gaussians in the plane, new ones in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import at_least, checked, positive
from lightning_nested.games import ring


@checked
class MixtureOfGaussiansDataModule(LightningDataModule):
    """A ring or a grid of Gaussians with equal weights: the usual test of whether a GAN finds every mode.

    Batches are ``(points, mode)`` of shapes ``(batch_size, 2)`` and ``(batch_size,)``. Every batch is new; batch t of
    process r depends on ``seed``, t and r alone, so a run that is interrupted anywhere continues with the batches it
    would have seen.
    Metz, Poole, Pfau & Sohl-Dickstein (2017), ICLR, "Unrolled Generative Adversarial Networks".

    Args:
        num_modes: Number of Gaussians; for a grid a square number.
        radius: Radius of the ring; half the side of the grid.
        std: Standard deviation of each Gaussian.
        layout: ``"ring"`` or ``"grid"``.
        batch_size: Points per batch and process.
        num_batches: Batches per epoch.
        seed: Seed of the points.

    Attributes:
        centres: ``(num_modes, 2)``.

    Raises:
        ValueError: A number below 1, a std that is not positive, or a grid that is not square.

    Example:
        >>> data = MixtureOfGaussiansDataModule(batch_size=4)
        >>> points, mode = next(iter(data.train_dataloader()))
        >>> tuple(points.shape), bool((points - data.centres[mode]).norm(dim=1).max() < 0.2)
        ((4, 2), True)
    """

    def __init__(
        self,
        *,
        num_modes: int = 8,
        radius: float = 2.0,
        std: float = 0.02,
        layout: Literal["ring", "grid"] = "ring",
        batch_size: int = 128,
        num_batches: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, num_batches=num_batches)
        at_least(0, seed=seed)
        positive(std=std)
        if layout == "ring":
            self.centres = ring(num_modes, radius, dtype=torch.float32)
        else:
            self.centres = _grid(num_modes, radius)
        self.std, self.batch_size, self.num_batches, self.seed = std, batch_size, num_batches, seed

    @override
    def train_dataloader(self) -> GaussianBatches:
        rank = self.trainer.global_rank if self.trainer is not None else 0
        sizes = {"batch_size": self.batch_size, "num_batches": self.num_batches}
        return GaussianBatches(self.centres, self.std, **sizes, seed=self.seed, rank=rank)


class GaussianBatches:
    """Loader of a sized pass over endless points, resumable at every batch; each ``rank`` has points of its own."""

    def __init__(
        self, centres: Tensor, std: float, *, batch_size: int, num_batches: int, seed: int, rank: int = 0
    ) -> None:
        self.centres, self.std, self.batch_size, self.num_batches = centres, std, batch_size, num_batches
        self._seed, self._rank = seed, rank
        self._drawn = 0  # batches so far, over all passes
        self._position = 0  # in the current pass
        self._resumes = False

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # The state is read and loaded before the first batch is asked for, so it is used up here, not later.
        self._position = self._position % self.num_batches if self._resumes else 0
        self._resumes = False
        return self._batches()

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return batch number ``index`` of the run."""
        # Large odd factors keep (seed, index, rank) apart without hashing.
        seed = (self._seed + 1_000_003 * index + 7_368_787 * self._rank) % 2**63
        generator = torch.Generator().manual_seed(seed)
        mode = torch.randint(len(self.centres), (self.batch_size,), generator=generator)
        noise = torch.randn(self.batch_size, self.centres.shape[1], generator=generator)
        return self.centres[mode] + self.std * noise, mode

    def state_dict(self) -> dict[str, int]:
        """Return the position of the run."""
        return {"drawn": self._drawn, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position."""
        self._drawn, self._position, self._resumes = state["drawn"], state["position"], True

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self._position < self.num_batches:
            index = self._drawn
            # Counted before it is handed out: a checkpoint made after its step must not repeat it.
            self._drawn, self._position = self._drawn + 1, self._position + 1
            yield self.batch(index)


def _grid(num_modes: int, radius: float) -> Tensor:
    side = round(num_modes**0.5)
    if side < 1 or side * side != num_modes:
        raise ValueError(f"num_modes of a grid must be a square number. Got {num_modes}.")
    line = torch.linspace(-radius, radius, side) if side > 1 else torch.zeros(1)
    return torch.cartesian_prod(line, line)
