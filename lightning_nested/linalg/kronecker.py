"""Kronecker-factored curvature of a network's layers, from the backward passes that a training makes anyway.

The Fisher information of a layer with inputs a and gradients g of its outputs is E[g gᵀ] ⊗ E[a aᵀ], if the two are
independent; where weights are shared over positions (a convolution's pixels, a sequence's tokens) each position
counts as an example ("expand"). Martens & Grosse (2015), ICML, PMLR 37:2408-2417; Grosse & Martens (2016), ICML, PMLR
48:573-582; Eschenhagen et al. (2023), NeurIPS 36.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_nested.arguments import at_least, checked, fraction
from lightning_nested.linalg.finite import check_finite
from lightning_nested.linalg.kronecker_layers import Factors, Layer, Moment, find_layers, stored_bytes
from lightning_nested.linalg.loss_terms import batch_size, loss_terms
from lightning_nested.linalg.operators import LinearOperator
from lightning_nested.linalg.processes import Reduce, average
from lightning_nested.linalg.solvers.base import factorizable_dtype
from lightning_nested.linalg.vectors import Vector

_Call = tuple[Moment, Moment]


@checked
class KroneckerFisher:
    """Running mean of the Kronecker-factored empirical Fisher information of a module.

    Linear and (ungrouped) two-dimensional convolution layers have factors. All other parameters (norms, embeddings,
    recurrent layers, weights that several layers share, layers of more than ``max_size`` inputs or outputs) have a
    diagonal: the square of the batch's mean gradient times the terms of the loss, averaged over observations. So have
    layers that no forward pass was seen of (``torch.compile``: no hook may get into its graph). The loss is taken for a
    mean over examples, unless :meth:`expect` finds that it is one over tokens or pixels.

    Args:
        module: Its layers are observed.
        parameters: Parameters by their names in the module; they form the vector.
        memory: Weight of the old mean in an update; the first 1/(1 − memory) updates form a plain mean.
        max_size: Largest side of a factor.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> fisher = KroneckerFisher(layer, dict(layer.named_parameters()))
        >>> with fisher.observing():
        ...     layer(torch.eye(2)).square().mean().backward()
        >>> fisher.update(1.0)
        >>> inverse = fisher.inverse([0.1])
        >>> (inverse @ (torch.ones(1, 2),))[0].shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        *,
        memory: float = 0.9,
        max_size: int = 2048,
    ) -> None:
        fraction(memory=memory)
        at_least(1, max_size=max_size)
        self.memory = memory
        self._parameters = tuple(parameters.values())
        self._layers = find_layers(module, self._parameters, max_size)
        self.factors: list[Factors | None] = [None] * len(self._layers)
        covered = {i for layer in self._layers for i in layer.positions}
        self._others = [i for i in range(len(self._parameters)) if i not in covered]
        self.squares: list[Tensor | None] = [None] * len(self._parameters)
        self.observations = 0
        # By layer and call: moments of the inputs and of the outputs' gradients.
        self._seen: list[list[_Call | None]] = [[] for _ in self._layers]
        self._batch = 0
        # Terms of the losses of the backward passes, where they are known; examples of the batch.
        self._terms: list[float | None] = []
        self._examples: int | None = None
        self._handles: list[RemovableHandle] = []
        self._on = self._observes = False

    def sizes(self) -> tuple[int, int]:
        """Return the bytes of all factors, and of the diagonal of what has none, once they were observed."""
        return stored_bytes(self._layers, self._parameters)

    # ---- observing a training step

    def start(self) -> None:
        """Observe the coming forward and backward passes, until :meth:`stop`."""
        self.stop()
        self._on = self._observes = True
        self._handles = [
            layer.module.register_forward_hook(partial(self._forward, i), with_kwargs=True)
            for i, layer in enumerate(self._layers)
        ]

    def pause(self, paused: bool, batch: Any = None) -> None:
        """Ignore forward and backward passes if ``paused``; else record them again.

        Args:
            paused: Whether to ignore them.
            batch: Batch of the coming step; its first dimension counts where no loss and no layer says more.
        """
        self._on = not paused
        self._examples = self._examples if batch is None else batch_size(batch)

    def expect(self, loss: Tensor, divided: float = 1.0) -> None:
        """Take from its graph what the loss of the coming backward pass is a mean over; see :func:`loss_terms`."""
        if self._on and self._observes:
            self._terms.append(loss_terms(loss, divided))

    def stop(self) -> None:
        """Remove all hooks, and forget what was seen since the last :meth:`update`."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._batch, self._terms = [], 0, []
        self._on = self._observes = False
        self._seen = [[] for _ in self._layers]

    def observing(self) -> _Observing:
        """Return a context in which one training step is observed; end it by :meth:`update`."""
        return _Observing(self)

    def _forward(self, i: int, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if not self._on or not isinstance(output, Tensor) or not output.requires_grad:
            return
        a: Tensor = args[0] if args else kwargs["input"]
        calls = self._seen[i]
        calls.append(None)
        hook = partial(self._backward, self._layers[i], calls, len(calls) - 1, a.detach())
        output.register_hook(hook)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _backward(self, layer: Layer, calls: list[_Call | None], call: int, a: Tensor, g: Tensor) -> None:
        if not self._on:
            return
        if a.dim() == layer.unbatched:
            a, g = a[None], g[None]
        self._batch = max(self._batch, 1, g.shape[0])
        known = self._terms[-1] if self._terms else None
        terms = max(1, g.shape[0]) if known is None else known
        rows, gradients = (x.to(factorizable_dtype(x.dtype)) for x in (layer.inputs(a), layer.gradients(g)))
        # The training's own backward pass comes after others through the same graph (a gradient penalty's).
        calls[call] = Moment.of(rows), Moment.of(gradients * math.sqrt(terms))

    @torch.no_grad()
    def update(
        self,
        scale: float = 1.0,
        *,
        hook_scale: float | None = None,
        reduce: Reduce | None = None,
        batches: int = 1,
        processes: int = 1,
    ) -> None:
        """Add what was seen, with the gradients that lie in ``.grad``, to the running means, if it is finite.

        Args:
            scale: Factor that ``.grad`` carries.
            hook_scale: Factor that the loss carried in the backward passes; None: the same.
            reduce: Averages a tensor over processes.
            batches: Backward passes that were added up in ``.grad``.
            processes: Processes over which ``.grad`` is the mean.
        """
        hook_scale = scale if hook_scale is None else hook_scale
        seen = [[call for call in calls if call is not None] for calls in self._seen]
        known = [terms for terms in self._terms if terms is not None]
        terms = sum(known) / len(known) if known else float(self._batch or self._examples or 1)
        # Those of the whole step.
        terms *= batches * processes
        self.stop()
        weight = max(1 - self.memory, 1 / (self.observations + 1))
        squares = [self._square(i, terms, scale) for i in self._others]
        # The loss of each of several accumulated batches is divided by their number.
        share = batches / hook_scale**2
        if reduce is not None:
            seen, squares, share = *self._average(seen, squares, share, reduce), 1.0
        numbers = [moment.trace() for calls in seen for call in calls for moment in call]
        numbers += [square.sum() for square in squares]
        if numbers and not bool(torch.stack([x.double() for x in numbers]).isfinite().all()):
            return
        for i, calls in enumerate(seen):
            if calls:
                self._keep_factors(i, calls, weight, share)
            elif self.factors[i] is None:
                # Never seen: a compiled module runs no hooks, and a function may take the weight by itself.
                for j in self._layers[i].positions:
                    self._keep_square(j, self._square(j, terms, scale), weight)
        for i, square in zip(self._others, squares, strict=True):
            self._keep_square(i, square, weight)
        self.observations += 1

    def _average(
        self, seen: Sequence[Sequence[_Call]], squares: Sequence[Tensor], share: float, reduce: Reduce
    ) -> tuple[list[list[_Call]], list[Tensor]]:
        """Return the means over processes, with the gradients' moments times ``share``."""
        own: list[Tensor] = []
        for layer, calls in zip(self._layers, seen, strict=True):
            a, g = layer.zeros()
            _add(calls, (a, g), 0.0, 1.0, share)
            # Processes may call different layers.
            own += [a, g, a.new_tensor(float(bool(calls)))]
        mean = average((*own, *squares), reduce)
        found: list[list[_Call]] = []
        for i in range(0, len(own), 3):
            a, g, seen_by = mean[i], mean[i + 1], float(mean[i + 2])
            found.append([(Moment(a / seen_by, True, 1), Moment(g, True, 1))] if seen_by else [])
        return found, list(mean[len(own) :])

    def _keep_factors(self, i: int, calls: Sequence[_Call], weight: float, share: float) -> None:
        """Add what was seen of a layer to its means; in place, for new matrices of that size take long to allocate."""
        pair = self.factors[i]
        if pair is None:
            pair, weight = self._layers[i].zeros(), 1.0
            self.factors[i] = pair
        _add(calls, pair, 1 - weight, weight, share)

    def _keep_square(self, i: int, square: Tensor, weight: float) -> None:
        before = self.squares[i]
        self.squares[i] = square if before is None else before.lerp(square, weight)

    def _square(self, i: int, terms: float, scale: float) -> Tensor:
        parameter = self._parameters[i]
        dtype = factorizable_dtype(parameter.dtype)
        if parameter.grad is None:
            return torch.zeros_like(parameter, dtype=dtype)
        gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        return gradient.to(dtype).div(scale).square().mul_(terms)

    # ---- the inverse

    def mean_diagonal(self) -> float:
        """Return the mean of F's diagonal over the parameters that were observed; 0 before."""
        found = [
            (f[0].diagonal().double().sum() * f[1].diagonal().double().sum(), f) for f in self.factors if f
        ]
        sums = [(float(trace), len(f[0]) * len(f[1])) for trace, f in found]
        sums += [(float(s.double().sum()), s.numel()) for s in self.squares if s is not None]
        return sum(trace for trace, _ in sums) / max(1, sum(count for _, count in sums))

    @torch.no_grad()
    def inverse(self, damping: Sequence[Tensor | float]) -> KroneckerInverse:
        """Return (F + diag(damping))⁻¹; a layer with factors takes the mean of its weight's damping.

        The damping is split over the two factors by their mean eigenvalues (Martens & Grosse 2015, section 6.3).

        Raises:
            FloatingPointError: A factor is not finite.
        """
        solves: list[_Solve] = []
        for layer, pair in zip(self._layers, self.factors, strict=True):
            if pair is not None:
                given = damping[layer.weight]
                amount = float(given.mean()) if isinstance(given, Tensor) else given
                solves.append(_Solve(layer, *_inverses(pair, amount)))
        covered = {i for solve in solves for i in solve.layer.positions}
        diagonal = {
            i: (0.0 if (s := self.squares[i]) is None else s) + damping[i]
            for i in range(len(self._parameters))
            if i not in covered
        }
        return KroneckerInverse(solves, diagonal, self._parameters, self._layers)

    def restored_inverse(self, state: Mapping[str, Any]) -> KroneckerInverse | None:
        """Return the inverse whose :meth:`KroneckerInverse.state_dict` is given; None if the layers are others."""
        factors, diagonal = state["factors"], state["diagonal"]
        covered = {j for i in factors if i < len(self._layers) for j in self._layers[i].positions}
        if {*covered, *diagonal} != set(range(len(self._parameters))) or not all(
            i < len(self._layers) and self._layers[i].fits(pair) for i, pair in factors.items()
        ):
            return None
        like = self._parameters
        solves = [
            _Solve(self._layers[i], *(f.to(like[0].device) for f in pair)) for i, pair in factors.items()
        ]
        diagonal = {i: d.to(like[i].device) if isinstance(d, Tensor) else d for i, d in diagonal.items()}
        return KroneckerInverse(solves, diagonal, like, self._layers)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the running means."""
        return {
            # Copies: the means are updated in place.
            "factors": [None if f is None else (f[0].clone(), f[1].clone()) for f in self.factors],
            "squares": list(self.squares),
            "observations": self.observations,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore, if the layers are the same; otherwise begin again."""
        pairs, squares = state["factors"], state["squares"]
        if len(pairs) != len(self.factors) or len(squares) != len(self.squares):
            return
        if not all(f is None or layer.fits(f) for layer, f in zip(self._layers, pairs, strict=True)):
            return
        if any(s is not None and s.shape != self._parameters[i].shape for i, s in enumerate(squares)):
            return
        device = self._parameters[0].device
        self.factors = [None if f is None else _copies(f, device) for f in pairs]
        self.squares = [None if s is None else s.to(device) for s in state["squares"]]
        self.observations = state["observations"]


def _copies(pair: Factors, device: torch.device) -> Factors:
    return pair[0].to(device, copy=True), pair[1].to(device, copy=True)


def _add(calls: Sequence[_Call], pair: Factors, beta: float, alpha: float, share: float) -> None:
    """pair ← beta · pair + alpha · (mean of the inputs' moments, share · sum of the gradients')."""
    positions = max(1, sum(a.count for a, _ in calls))
    for a, g in calls:
        a.add_to(pair[0], beta=beta, alpha=alpha / positions)
        g.add_to(pair[1], beta=beta, alpha=alpha * share)
        beta = 1.0


class _Observing:
    def __init__(self, fisher: KroneckerFisher) -> None:
        self._fisher = fisher

    def __enter__(self) -> None:
        self._fisher.start()

    def __exit__(self, *_: object) -> None:
        self._fisher.pause(True)


@dataclass(frozen=True, eq=False)
class _Solve:
    layer: Layer
    inputs: Tensor  # inverse of the damped factor of the inputs
    outputs: Tensor  # and of the outputs' gradients

    def apply(self, v: Sequence[Tensor], out: list[Tensor]) -> None:
        weight, bias = v[self.layer.weight], self.layer.bias
        matrix = (
            weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), v[bias][:, None]], dim=1)
        )
        solved = (self.outputs @ matrix.to(self.outputs.dtype) @ self.inputs).to(weight.dtype)
        if bias is None:
            out[self.layer.weight] = solved.view_as(weight)
        else:
            out[self.layer.weight] = solved[:, :-1].reshape(weight.shape)
            out[bias] = solved[:, -1].clone()


class KroneckerInverse(LinearOperator):
    """(F + damping)⁻¹ by inverses of the factors; see :class:`KroneckerFisher`."""

    def __init__(
        self,
        solves: Sequence[_Solve],
        diagonal: Mapping[int, Tensor | float],
        like: Vector,
        layers: Sequence[Layer],
    ) -> None:
        self._solves, self._diagonal, self.like, self._layers = solves, diagonal, like, layers

    def matvec(self, v: Vector) -> Vector:
        """Return G⁻¹ V A⁻¹ for each layer, and the quotient by the diagonal elsewhere."""
        out = list(v)
        for i, d in self._diagonal.items():
            out[i] = (v[i] / d).to(v[i].dtype)
        for solve in self._solves:
            solve.apply(v, out)
        return tuple(out)

    def state_dict(self) -> dict[str, Any]:
        """Return the inverse factors and the diagonal; see :meth:`KroneckerFisher.restored_inverse`."""
        at = {id(layer): i for i, layer in enumerate(self._layers)}
        factors = {at[id(solve.layer)]: (solve.inputs, solve.outputs) for solve in self._solves}
        return {"factors": factors, "diagonal": dict(self._diagonal)}


def _inverses(pair: Factors, damping: float) -> Factors:
    a, g = (f.to(factorizable_dtype(f.dtype)) for f in pair)
    sizes = [check_finite(float(f.diagonal().double().mean()), "A Kronecker factor") for f in (a, g)]
    ratio = math.sqrt(max(sizes[0], 1e-30) / max(sizes[1], 1e-30))
    return _damped_inverse(a, math.sqrt(damping) * ratio), _damped_inverse(g, math.sqrt(damping) / ratio)


def _damped_inverse(factor: Tensor, damping: float) -> Tensor:
    shifted = factor.clone()
    # Rounding of a sum of squares is of the size of eps times its largest entry.
    floor = 10 * torch.finfo(factor.dtype).eps * float(factor.diagonal().max().clamp_min(0.0))
    shifted.diagonal().add_(max(damping, floor, torch.finfo(factor.dtype).tiny * 1e4))
    root, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        raise FloatingPointError(
            "A Kronecker factor must be positive definite. Got one that is not; raise damping."
        )
    return torch.cholesky_inverse(root)
