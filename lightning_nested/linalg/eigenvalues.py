"""Eigenvalues of a linear operator: all of a small one, the leading ones of a large one by products alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from scipy.sparse import linalg as sparse
from torch import Tensor

from lightning_nested.arguments import at_least, checked, within
from lightning_nested.linalg.finite import check_matrix
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.vectors import flatten, unflatten

Which: TypeAlias = Literal["largest_magnitude", "largest_imaginary", "smallest_real"]

# ARPACK's names for general and for symmetric operators.
_ARPACK: dict[str, tuple[str, str | None]] = {
    "largest_magnitude": ("LM", "LM"),
    "largest_imaginary": ("LI", None),
    "smallest_real": ("SR", "SA"),
}
# The ARPACK of SciPy 1.11 to 1.13 left out wanted eigenvalues where the subspace was small; that of 1.15 does not.
_MISSES = tuple(int(number) for number in scipy.__version__.split(".")[:2]) < (1, 15)
DENSE_LIMIT = 4096  # n: the dense matrix takes n² numbers and its eigenvalues n³ time


class SpectrumError(RuntimeError):
    """The eigenvalues asked for did not converge; ``eigenvalues`` (complex128) holds those that did."""

    def __init__(self, message: str, eigenvalues: Tensor, num_products: int) -> None:
        super().__init__(message)
        self.eigenvalues, self.num_products = eigenvalues, num_products


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """Eigenvalues, and how well they are known."""

    eigenvalues: Tensor  # complex128 on CPU, shape (k,); first the one that was asked for most, +i before −i
    residuals: Tensor  # ‖Ax − λx‖/(‖x‖ max|λ|) of each, from products of their own; float64 of shape (k,)
    num_products: int  # products with the operator, including those for the residuals
    size: int  # N, of the space


@checked
def leading_eigenvalues(
    operator: LinearOperator,
    k: int | None = None,
    which: Which = "largest_magnitude",
    *,
    tolerance: float | None = None,
    max_products: int = 2000,
) -> Spectrum:
    """Find the k leading eigenvalues of any operator by ARPACK, with residuals and the number of products.

    A small operator (n below about 2k+1 or 20, or ``k=None``) costs n products: it is made dense, and solved by LAPACK.
    The start vector is fixed, so that a call repeats itself, on every process alike.
    Lehoucq, Sorensen & Yang (1998), ARPACK Users' Guide, SIAM.

    Args:
        operator: Operator on tuples of real tensors, with ``like`` set.
        k: Number of eigenvalues; None: all.
        which: Property of the wanted eigenvalues; ``"largest_imaginary"`` needs an operator that is not symmetric.
        tolerance: Relative accuracy at which ARPACK stops; None: ε^(2/3) of the operator's dtype.
        max_products: Number of products at which ARPACK gives up.

    Raises:
        SpectrumError: No convergence; it holds the eigenvalues that did.
        FloatingPointError: A product is not finite.
        ValueError: An argument out of range.

    Example:
        >>> from lightning_nested.linalg.operators import DiagonalOperator
        >>> values = 0.5 ** torch.arange(100, dtype=torch.float64)
        >>> operator = DiagonalOperator([values])
        >>> operator.like = (values,)
        >>> found = leading_eigenvalues(operator, 2)
        >>> found.eigenvalues.real.round(decimals=9).tolist(), found.num_products < found.size
        ([1.0, 0.5], True)
    """
    counted = _Counted(operator)
    _check_arguments(counted, k, which, tolerance, max_products)
    ncv = _subspace(counted.size, k)
    if k is None or ncv >= counted.size:
        values, vectors = _dense(counted)
    else:
        values, vectors = _agreed(counted, k, which, ncv, tolerance, max_products)
    order = _order(values, which)
    chosen = order if k is None else _whole_pairs(values[order], order, k)
    values, vectors = values[chosen], vectors[:, chosen]
    return Spectrum(
        eigenvalues=torch.from_numpy(values.astype(np.complex128)),
        residuals=torch.from_numpy(_residuals(counted, values, vectors)),
        num_products=counted.count,
        size=counted.size,
    )


def _subspace(size: int, k: int | None) -> int:
    """Return the number of vectors that Arnoldi's method keeps for k eigenvalues."""
    return size if k is None else max(2 * k + 1, 20)


class _Counted:
    """Products of an operator with NumPy vectors, counted; the dense matrix if there is one."""

    def __init__(self, operator: LinearOperator) -> None:
        if operator.like is None:
            raise ValueError(
                "operator.like must be set. Got None; set it to a tuple of tensors of its space."
            )
        self.operator, self.like, self.count = operator, operator.like, 0
        self.size = sum(p.numel() for p in self.like)
        self.matrix: NDArray[np.float64] | None = None

    def __call__(self, v: NDArray[Any]) -> NDArray[np.float64]:
        self.count += 1
        flat = torch.from_numpy(np.array(v, dtype=np.float64).reshape(-1)).to(self.like[0])
        product = flatten(self.operator.matvec(unflatten(flat, self.like))).detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(product).all()):
            raise FloatingPointError(
                "Products with the Jacobian must be finite. Got one that is not: the losses or their second "
                "derivatives overflowed."
            )
        return product.numpy()


def _dense(product: _Counted) -> tuple[NDArray[Any], NDArray[Any]]:
    product.matrix = np.stack([product(e) for e in np.eye(product.size)], axis=1)
    solve: Callable[..., Any] = np.linalg.eigh if product.operator.symmetric else np.linalg.eig
    values, vectors = solve(check_matrix(product.matrix, "The dense matrix of the operator"))
    return values, vectors


def _agreed(
    product: _Counted, k: int, which: Which, ncv: int, tolerance: float | None, max_products: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return what Arnoldi's method finds; with an ARPACK that can miss one, what it finds in two subspaces alike."""
    found = _arnoldi(product, k, which, ncv, tolerance, max_products)
    while _MISSES and not product.operator.symmetric:
        ncv *= 2
        if ncv >= product.size:
            return _dense(product) if product.size <= DENSE_LIMIT else found
        again = _arnoldi(product, k, which, ncv, tolerance, max_products)
        # Half of a pair may be cut off in either.
        first, second = (values[_order(values, which)][:k] for values, _ in (found, again))
        if len(first) == len(second) and np.allclose(first, second, rtol=0.0, atol=1e3 * _tolerance(second)):
            return again
        found = again
    return found


def _arnoldi(
    product: _Counted, k: int, which: Which, ncv: int, tolerance: float | None, max_products: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    general, symmetric = _ARPACK[which]
    size, eps = product.size, torch.finfo(product.like[0].dtype).eps
    start = np.random.default_rng(0).standard_normal(size)
    if not product(start).any():  # ARPACK would not start on the zero operator
        return np.zeros(k), np.eye(size, k)
    solve: Callable[..., Any] = sparse.eigsh if product.operator.symmetric else sparse.eigs
    try:
        values, vectors = solve(
            sparse.LinearOperator((size, size), matvec=product, dtype=np.float64),
            k=k,
            which=symmetric if product.operator.symmetric else general,
            v0=start,
            ncv=ncv,
            tol=tolerance if tolerance is not None else eps ** (2 / 3),
            # Every restart spends about ncv − k products.
            maxiter=max(1, math.ceil((max_products - ncv) / (ncv - k))),
        )
    except sparse.ArpackError as error:
        found = getattr(error, "eigenvalues", np.zeros(0))
        raise SpectrumError(
            f"The {k} eigenvalues of {which.replace('_', ' ')} must converge within max_products={max_products}. "
            f"Got {len(found)} of them after {product.count} products ({error}). Ask for fewer or for other ones, "
            "raise max_products, or loosen tolerance.",
            torch.from_numpy(np.asarray(found, dtype=np.complex128)),
            product.count,
        ) from error
    return (values, vectors) if product.operator.symmetric else _with_conjugates(values, vectors)


def _with_conjugates(values: NDArray[Any], vectors: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Complete pairs: SciPy may cut the list between the two of one, and the operator is real, so both are known."""
    near = _tolerance(values)
    alone = [i for i, z in enumerate(values) if z.imag and not (np.abs(values - z.conj()) <= near).any()]
    return np.append(values, values[alone].conj()), np.append(vectors, vectors[:, alone].conj(), axis=1)


def _order(values: NDArray[Any], which: Which) -> NDArray[np.intp]:
    """Return indices of the values, the most wanted first; of a conjugate pair the one with +i first."""
    key = {
        "largest_magnitude": -np.abs(values),
        "largest_imaginary": -np.abs(values.imag),
        "smallest_real": values.real,
    }[which]
    scale = max(float(np.abs(values).max()), np.finfo(float).tiny)
    # Rounded, so that the two of a pair stand side by side; np.lexsort sorts by its last key first.
    return np.lexsort((-values.imag, np.abs(values.imag), np.round(key / scale, 10)))


def _whole_pairs(values: NDArray[Any], order: NDArray[np.intp], k: int) -> NDArray[np.intp]:
    """Return the first k, and one more where its conjugate would be cut off."""
    if k == len(values) or not values[k - 1].imag > 0:
        return order[:k]
    return order[: k + 1 if abs(values[k] - values[k - 1].conj()) <= _tolerance(values) else k]


def _tolerance(values: NDArray[Any]) -> float:
    """Return the distance below which two eigenvalues are the same, at every scale of the operator."""
    return 1e-9 * float(np.abs(values).max(initial=0.0))


def _residuals(product: _Counted, values: NDArray[Any], vectors: NDArray[Any]) -> NDArray[np.float64]:
    if product.matrix is not None:
        images = product.matrix @ vectors
    else:
        columns: list[NDArray[Any]] = []
        near = 1e-3 * _tolerance(values)
        for i, value in enumerate(values):
            if i and value.imag and abs(value - values[i - 1].conj()) <= near:
                columns.append(columns[-1].conj())
                vectors[:, i] = vectors[:, i - 1].conj()
                continue
            image = product(vectors[:, i].real)
            columns.append(image + 1j * product(vectors[:, i].imag) if value.imag else image)
        images = np.stack(columns, axis=1)
    size = np.linalg.norm(vectors, axis=0) * max(float(np.abs(values).max()), np.finfo(float).tiny)
    return np.asarray(np.linalg.norm(images - vectors * values, axis=0) / size, dtype=np.float64)


def _check_arguments(
    product: _Counted, k: int | None, which: Which, tolerance: float | None, max_products: int
) -> None:
    size = product.size
    if which == "largest_imaginary" and product.operator.symmetric:
        raise ValueError(
            "which='largest_imaginary' needs an operator that is not symmetric, whose eigenvalues are not all real. "
            "Got a symmetric one, as a player's own block is."
        )
    if k is None and size > DENSE_LIMIT:
        raise ValueError(f"All eigenvalues need n <= {DENSE_LIMIT}. Got n={size}; give k.")
    within(1, size, k=k)
    if k is not None and size > DENSE_LIMIT and _subspace(size, k) >= size:
        raise ValueError(
            f"k must be at most (n - 2)/2 = {(size - 2) // 2} where n={size} > {DENSE_LIMIT}, "
            f"for more need the dense matrix. Got {k}."
        )
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be non-negative. Got {tolerance}.")
    at_least(1, max_products=max_products)
