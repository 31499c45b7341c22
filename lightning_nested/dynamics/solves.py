"""Linear solves and determinants with derivatives of every order, by forward mode too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override


class DifferentiableSolves(TorchFunctionMode):
    """Replace, inside the context, the solves and determinants of torch whose forward derivative derives wrongly.

    Forward mode takes the LU factors of ``torch.linalg.solve``, ``det`` and ``slogdet`` as constants: the value along
    a tangent is right, and a derivative of it silently misses their dependence on the matrix (torch 2.5 to 2.14).
    ``inv`` and ``lu_factor_ex`` have all their derivatives, and take their place. A determinant of a singular
    matrix then has no derivative: it comes out as NaN or infinite.
    """

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        # A result written into a tensor of the caller's has no derivative.
        replacement = None if "out" in options else _REPLACED.get(func)
        if replacement is None:
            return func(*args, **options)
        # torch.det and its kind name the matrix "input".
        return replacement(*args, **{"A" if name == "input" else name: a for name, a in options.items()})


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1])
    right = B.unsqueeze(-1) if vector else B
    inverse = torch.linalg.inv(A)
    x: Tensor = inverse @ right if left else right @ inverse
    return x.squeeze(-1) if vector else x


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    found = torch.linalg.solve_ex(A.detach(), B.detach(), left=left, check_errors=check_errors)
    return type(found)((_solve(A, B, left=left), found.info))


def _tensorsolve(A: Tensor, B: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    if dims is not None:
        moved = [d % A.ndim for d in dims]
        A = A.movedim(moved, list(range(A.ndim - len(moved), A.ndim)))
    shape = A.shape[B.ndim :]
    return _solve(A.reshape(math.prod(A.shape[: B.ndim]), -1), B.flatten()).reshape(shape)


def _factors(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the diagonal of U, and the sign of the permutation."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(A)
    unmoved = torch.arange(1, A.shape[-1] + 1, dtype=pivots.dtype, device=pivots.device)
    swaps = (pivots != unmoved).sum(-1)
    return lu.diagonal(dim1=-2, dim2=-1), (1 - 2 * (swaps % 2)).to(A.dtype)


def _det(A: Tensor) -> Tensor:
    diagonal, sign = _factors(A)
    return sign * diagonal.prod(-1)


def _slogdet(A: Tensor) -> Any:
    diagonal, sign = _factors(A)
    plain = torch.linalg.slogdet(A.detach())
    return type(plain)((sign * diagonal.sgn().prod(-1), diagonal.abs().log().sum(-1)))


def _logdet(A: Tensor) -> Tensor:
    diagonal, sign = _factors(A)
    return diagonal.abs().log().sum(-1) + (sign * diagonal.sgn().prod(-1)).log()


_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.linalg.solve: _solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.tensorsolve: _tensorsolve,
    torch.linalg.det: _det,
    torch.det: _det,
    Tensor.det: _det,
    torch.linalg.slogdet: _slogdet,
    torch.slogdet: _slogdet,
    Tensor.slogdet: _slogdet,
    torch.logdet: _logdet,
    Tensor.logdet: _logdet,
}
