"""Games with a constant Jacobian, whose spectrum is known: bilinear, and mixes of cooperation and conflict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_nested.arguments import at_least, checked, within
from lightning_nested.games.zoo.game import Game


@checked
class QuadraticGame(Game):
    """L₁ = ½xᵀAx + xᵀBy and L₂ = ½yᵀCy − xᵀBy: own curvature A and C is cooperative, the coupling B adversarial.

    The joint gradient is linear with the Jacobian [[A, B], [−Bᵀ, C]] and vanishes at 0. With all three diagonal, every
    coordinate is a game of its own with the eigenvalues (a+c)/2 ± √((a−c)²/4 − b²).

    Args:
        first: A, symmetric of shape (n, n), or its diagonal of shape (n,).
        coupling: B of shape (n, m), or its diagonal.
        second: C, symmetric of shape (m, m), or its diagonal.

    Raises:
        ValueError: Shapes that do not fit, or A or C not symmetric.

    Example:
        >>> game = QuadraticGame(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([0.5]))
        >>> game.eigenvalues().tolist()
        [(0.5+1j), (0.5-1j)]
    """

    def __init__(self, first: Tensor, coupling: Tensor, second: Tensor) -> None:
        self._diagonals = None
        if first.ndim == coupling.ndim == second.ndim == 1:
            self._diagonals = (first, coupling, second)
        self.first, self.coupling, self.second = (
            torch.diag(m) if m.ndim == 1 else m for m in (first, coupling, second)
        )
        n, m = self.sizes = tuple(self.coupling.shape)
        shapes = (tuple(self.first.shape), tuple(self.second.shape))
        if shapes != ((n, n), (m, m)):
            raise ValueError(
                f"With a coupling of shape {(n, m)} the curvatures must have shapes {(n, n)} and {(m, m)}. "
                f"Got {shapes[0]} and {shapes[1]}."
            )
        for name, matrix in (("first", self.first), ("second", self.second)):
            if not torch.allclose(matrix, matrix.mT):
                raise ValueError(
                    f"{name} must be symmetric. Got an asymmetry of {float((matrix - matrix.mT).abs().max()):g}; "
                    "give (A + Aᵀ)/2, which has the same quadratic form."
                )

    @classmethod
    def from_eigenvalues(cls, eigenvalues: Tensor | Sequence[complex]) -> QuadraticGame:
        """Make the game with one coordinate per player and eigenvalue a + ib: A = C = diag(a), B = diag(b).

        Its spectrum holds every eigenvalue that is given, and its conjugate.
        """
        values = torch.as_tensor(eigenvalues).to(torch.complex128).reshape(-1)
        return cls(values.real.clone(), values.imag.clone(), values.real.clone())

    @classmethod
    def mixture(
        cls, size: int, adversarial: float, generator: torch.Generator | None = None
    ) -> QuadraticGame:
        """Draw a random mix: A = C = (1−γ)a, B = γb per coordinate, a and b from U(0, 1), γ from U(0, ``adversarial``).

        0 is purely cooperative; 1 has parts from purely cooperative to purely adversarial.
        Lorraine, Acuna, Vicol & Duvenaud (2022), AISTATS, PMLR 151:7741-7765, after their section 4.2.

        Raises:
            ValueError: ``adversarial`` outside [0, 1] or ``size`` below 1.
        """
        within(0, 1, adversarial=adversarial)
        at_least(1, size=size)
        a, b, share = torch.rand(3, size, generator=generator, dtype=torch.float64)
        share = share * adversarial
        return cls((1 - share) * a, share * b, (1 - share) * a)

    def losses(self, players: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute ½xᵀAx + xᵀBy and ½yᵀCy − xᵀBy."""
        x, y = self._unpack(players)
        both = x @ self.coupling.to(x) @ y
        return 0.5 * x @ self.first.to(x) @ x + both, 0.5 * y @ self.second.to(y) @ y - both

    def jacobian(self) -> Tensor:
        """Return [[A, B], [−Bᵀ, C]], of shape (n+m, n+m)."""
        top = torch.cat([self.first, self.coupling], dim=1)
        return torch.cat([top, torch.cat([-self.coupling.mT, self.second], dim=1)])

    def eigenvalues(self) -> Tensor:
        """Return the Jacobian's eigenvalues, complex of shape (n+m,), in closed form for diagonal matrices."""
        if self._diagonals is None:
            values: Tensor = torch.linalg.eigvals(self.jacobian())
            return values
        a, b, c = self._diagonals
        root = torch.sqrt(((a - c) ** 2 / 4 - b**2).to(torch.promote_types(a.dtype, torch.complex64)))
        return torch.cat([(a + c) / 2 + root, (a + c) / 2 - root])


@checked
class Bilinear(QuadraticGame):
    """L₁ = xᵀMy = −L₂, purely adversarial: the eigenvalues of its Jacobian are ± i times the singular values of M.

    Gradient steps spiral outward, positive momentum too.

    Args:
        matrix: M of shape (n, m); a vector is one row; None: the game x·y.

    Example:
        >>> Bilinear(torch.diag(torch.tensor([2.0, 1.0]))).eigenvalues().imag.tolist()
        [2.0, 1.0, -2.0, -1.0]
    """

    def __init__(self, matrix: Tensor | None = None) -> None:
        if matrix is None:
            matrix = torch.ones(1, 1, dtype=torch.float64)
        elif matrix.ndim < 2:
            matrix = matrix.reshape(1, -1)
        n, m = matrix.shape
        super().__init__(matrix.new_zeros(n, n), matrix, matrix.new_zeros(m, m))

    def eigenvalues(self) -> Tensor:
        """Return ± i·σ(M) and zeros, complex of shape (n+m,)."""
        n, m = self.coupling.shape
        turning = 1j * torch.linalg.svdvals(self.coupling)
        return torch.cat([turning, -turning, turning.new_zeros(abs(n - m))])
