"""The effect of each training example on the validation loss, to first order: influence functions.

Koh & Liang (2017), ICML, PMLR 70:1885-1894. With Kronecker factors: Grosse et al. (2023), arXiv 2308.03296.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import IterableDataset, SequentialSampler

from lightning_nested.arguments import at_least, checked, shown
from lightning_nested.linalg.curvature import GaussNewtonOperator
from lightning_nested.linalg.differences import difference_length, moved
from lightning_nested.linalg.kronecker import KroneckerFisher
from lightning_nested.linalg.operators import DiagonalOperator, LinearOperator
from lightning_nested.linalg.solvers.base import InverseSolver
from lightning_nested.linalg.solvers.from_run import KroneckerFactored
from lightning_nested.linalg.vectors import Vector, add_, norm, zeros_like, zeros_where_none
from lightning_nested.networks.evaluation_mode import evaluation_mode

ExampleLoss = Callable[[Tensor, Tensor], Tensor]
_RELATIVE = 0.1  # damping of KroneckerFactored() in units of the mean curvature


@checked
def influence(
    module: nn.Module,
    training_data: Iterable[Any],
    validation_data: Iterable[Any],
    *,
    loss: ExampleLoss | None = None,
    solver: InverseSolver | None = None,
    weight_decay: float = 0.0,
) -> Tensor:
    """Return for each training example by how much the validation loss would rise if it were left out.

    To first order around the trained weights w of L_T = (1/n) Σ_i L_i + (d/2)·‖w‖²,

        s_i = (1/n) ∇L_Vᵀ H⁻¹ ∇L_i,   H the Gauss-Newton matrix of L_T:

    positive for an example that helps, negative for one that hurts, such as one with a wrong label. It is the
    derivative that :class:`ExampleWeights` descends, of all examples at once, after the training. The module is
    evaluated in evaluation mode, and is as before afterwards. Derivatives of L_i are central differences, two
    evaluations for all.

    Args:
        module: Trained network, whose call takes inputs to outputs.
        training_data: Batches ``(inputs, targets, …)`` in a fixed order, which is that of the result: a loader without
            ``shuffle`` or a sampler that draws, or a list. Read several times.
        validation_data: Batches of the same form.
        loss: Function from outputs and targets to the loss of each example, (batch,) or (batch, …), of which the mean
            is taken; convex in the outputs. None: cross-entropy for whole targets, half the squared error for others.
        solver: Solver of H x = ∇L_V. None: ``KroneckerFactored(relative=0.1)``, with factors of one pass over the
            training data. ``ConjugateGradient(damping=...)`` is more exact: a pass for each iteration.
        weight_decay: Decay d that the module was trained with.

    Returns:
        s of shape (n,), on the CPU.

    Raises:
        ValueError: The training data are not in order, or can be read only once; no examples; a loss without an entry
            for each example.
        TypeError: Batches that do not begin with two tensors; a module without a forward.

    Example:
        The third of three numbers, whose mean is fitted, is far off.

        >>> from lightning_nested.hypergradient import ConjugateGradient
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> layer.weight.data.fill_(2.0)
        tensor([[2.]])
        >>> train = [(torch.ones(3, 1), torch.tensor([[1.0], [1.0], [4.0]]))]
        >>> influence(layer, train, [(torch.ones(1, 1), torch.ones(1, 1))], solver=ConjugateGradient())
        tensor([ 0.3333,  0.3333, -0.6667])
    """
    at_least(0, weight_decay=weight_decay)
    _check_order(training_data)
    # LightningModule cannot be imported here; its own forward, and nn.Module's, only raise.
    if getattr(module.forward, "__qualname__", "") in ("LightningModule.forward", "_forward_unimplemented"):
        raise TypeError(
            "module must return outputs when it is called with inputs. Got "
            f"{type(module).__name__} without a forward; give its network, such as module.network, or add a forward."
        )
    params = tuple(p for p in module.parameters() if p.requires_grad)
    problem = _Problem(module, params, loss if loss is not None else example_loss)
    with evaluation_mode(module):
        outer, _ = problem.gradient(validation_data)
        chosen = solver if solver is not None else KroneckerFactored(relative=_RELATIVE)
        operator: LinearOperator = _DataCurvature(problem, training_data)
        if weight_decay:
            operator = operator + DiagonalOperator(weight_decay)
        if chosen.needs_statistics:
            chosen = chosen.bind(_Factors(problem, training_data, weight_decay))
        x = chosen.solve(operator, outer).x
        return problem.slopes(training_data, x)


def _check_order(data: Iterable[Any]) -> None:
    """Refuse training data whose examples would come in another order, or not at all, when they are read again."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"training_data is read several times. Got {type(data).__name__}, which can be read only once; give a "
            "list of its batches."
        )
    batches = getattr(data, "batch_sampler", None)
    sampler = getattr(data, "sampler", None) if batches is None else getattr(batches, "sampler", batches)
    # An iterable that is no loader has none, and that of a loader over an IterableDataset says nothing.
    unknown = sampler is None or isinstance(getattr(data, "dataset", None), IterableDataset)
    if not unknown and not isinstance(sampler, SequentialSampler | list | tuple | range):
        raise ValueError(
            "training_data must come in the order of its data set, which is the result's. Got a loader with "
            f"{type(sampler).__name__}; give one with shuffle=False and without a sampler."
        )
    if next(iter(data), None) is None:
        raise ValueError("training_data must hold examples. Got none.")


def example_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each example for whole targets, half the squared error for others."""
    if targets.is_floating_point():
        return 0.5 * (outputs - targets) ** 2
    return functional.cross_entropy(outputs, targets, reduction="none")


class _Problem:
    """Losses of a module's examples, their gradients and curvature."""

    def __init__(self, module: nn.Module, params: Vector, loss: ExampleLoss) -> None:
        self.module, self.params, self.loss = module, params, loss
        self.device = params[0].device

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the losses (batch,) and the outputs."""
        if (
            not isinstance(batch, Sequence)
            or not all(isinstance(part, Tensor) for part in batch[:2])
            or len(batch) < 2
        ):
            got = f"a dict of {list(batch)}" if isinstance(batch, Mapping) else shown(batch)
            raise TypeError(
                f"A batch must be (inputs, targets, …), with two tensors first. Got {got}; give tuples."
            )
        inputs, targets = (part.to(self.device) for part in batch[:2])
        outputs: Tensor = self.module(inputs)
        losses = self.loss(outputs, targets)
        if losses.dim() == 0 or len(losses) != len(targets):
            raise ValueError(
                f"loss must return an entry for each of {len(targets)} examples. Got shape {tuple(losses.shape)}; "
                'torch\'s losses take reduction="none".'
            )
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses, outputs

    def gradient(self, data: Iterable[Any]) -> tuple[Vector, int]:
        """Return the gradient of the mean loss, and the number of examples."""
        total, count = zeros_like(self.params), 0
        for batch in data:
            losses, _ = self.losses(batch)
            found = torch.autograd.grad(losses.sum(), self.params, allow_unused=True)
            add_(total, zeros_where_none(found, self.params))
            count += len(losses)
        if not count:
            raise ValueError(
                "validation_data must hold examples. Got none; a generator can be read only once."
            )
        return tuple(a / count for a in total), count

    @torch.no_grad()
    def slopes(self, data: Iterable[Any], x: Vector) -> Tensor:
        """Return (1/n) xᵀ∇L_i of every example."""
        size = float(norm(x))
        if size == 0.0:
            return torch.cat([torch.zeros(len(batch[1])) for batch in data])
        step = difference_length(self.params) / size

        def all_losses() -> Vector:
            return (torch.cat([self.losses(batch)[0] for batch in data]).cpu(),)

        (ahead,), (behind,) = (moved(all_losses, self.params, x, sign * step) for sign in (1.0, -1.0))
        return (ahead - behind) / (2 * step * len(ahead))


class _DataCurvature(LinearOperator):
    """Gauss-Newton matrix of the mean loss over all batches; each product evaluates them again."""

    def __init__(self, problem: _Problem, data: Iterable[Any]) -> None:
        self._problem, self._data, self.like = problem, data, problem.params

    def matvec(self, v: Vector) -> Vector:
        """Σ_batches G v / n."""
        total, count = zeros_like(v), 0
        for batch in self._data:
            losses, outputs = self._problem.losses(batch)
            operator = GaussNewtonOperator(losses.sum(), outputs, self._problem.params)
            add_(total, operator.matvec(v))
            count += len(losses)
        return tuple(a / max(1, count) for a in total)


class _Factors:
    """Statistics of one pass over the data in place of those of a running training."""

    def __init__(self, problem: _Problem, data: Iterable[Any], weight_decay: float) -> None:
        self._problem, self._data, self._decay = problem, data, weight_decay

    def kronecker_inverse(
        self, damping: float | None = None, relative: float | None = None
    ) -> LinearOperator:
        """Return the inverse of the Kronecker-factored Fisher information."""
        module, params = self._problem.module, self._problem.params
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # A plain mean over the batches.
        fisher = KroneckerFisher(module, named, memory=1 - 1e-9)
        grads = [p.grad for p in params]
        try:
            for batch in self._data:
                for p in params:
                    p.grad = None
                with fisher.observing():
                    self._problem.losses(batch)[0].mean().backward()  # type: ignore[no-untyped-call]
                fisher.update()
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
        if damping is None:
            damping = (relative or _RELATIVE) * fisher.mean_diagonal()
        return fisher.inverse([damping + self._decay] * len(params))

    def diagonal_inverse(self, damping: float | None) -> LinearOperator:
        """Refuse: there is no optimizer.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "influence needs a solver of the curvature. Got AdamDiagonal, which is an optimizer's; take "
            "KroneckerFactored() or ConjugateGradient(damping=...)."
        )
