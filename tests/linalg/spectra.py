"""Orders of eigenvalues, and the distance between two sets of them."""

from torch import Tensor

from lightning_nested.linalg.eigenvalues import Which

WHICH: tuple[Which, ...] = ("largest_magnitude", "largest_imaginary", "smallest_real")
KEYS = {
    "largest_magnitude": lambda z: -abs(z),
    "largest_imaginary": lambda z: -abs(z.imag),
    "smallest_real": lambda z: z.real,
}


def closest(found: Tensor, truth: list[complex]) -> float:
    return max(min(abs(z - t) for t in truth) for z in found.tolist())
