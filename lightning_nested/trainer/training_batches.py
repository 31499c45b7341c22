"""The mixed derivative of the training loss over many training batches, by differences: no second derivative is taken.

vᵀ ∂²L_T/∂w∂λ is the derivative of ∂L_T/∂λ along v, so ∂L_T/∂λ at w + εv and at w − εv gives it for every example of
a batch at once. Weights need no gradient for that: each evaluation costs a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_nested.arguments import at_least
from lightning_nested.hypergradient.evaluation_point import placed_at
from lightning_nested.hypergradient.inner_curvature import Mixed
from lightning_nested.hyperparameters import Hyperparameter
from lightning_nested.linalg.differences import difference_length
from lightning_nested.linalg.first_derivatives import first_derivative
from lightning_nested.linalg.vectors import Vector, norm
from lightning_nested.trainer.isolation import evaluation_mode, without_trace
from lightning_nested.trainer.lightning import loss_scale, step_loss, training_loader, transfer
from lightning_nested.trainer.outer_batches import OuterBatches, end_workers
from lightning_nested.trainer.random_stream import base_seed


class TrainingBatches:
    """A second stream of training batches, in an order of its own, and products with the mixed derivative on them.

    Args:
        wanted: Batches of a product, as the user gave them; None: to be planned.

    Attributes:
        count: Batches of a product; 0: products come from the graph of the training step.

    Raises:
        ValueError: ``wanted`` is negative.
    """

    def __init__(self, wanted: int | None = 0) -> None:
        at_least(0, train_batches=wanted)
        self.wanted, self.count = wanted, 0
        self._stream: OuterBatches | None = None
        self._position: Mapping[str, int] = {}  # while there is no stream

    def start(self, trainer: Trainer, count: int) -> None:
        """Begin the stream; a checkpoint's position is restored afterwards, by :meth:`load_state_dict`.

        Args:
            trainer: Trainer of the run, whose loaders are set up.
            count: Batches of a product.

        Raises:
            MisconfigurationException: The training data can be iterated over only once, and the user wants batches.
        """
        self.stop()
        self.count = 0
        if not count:
            return
        try:
            # Not the order of the validation batches, whose stream has the same seed.
            self._stream = OuterBatches(
                trainer, training_loader(trainer), seed=base_seed(trainer) + 49_979_687
            )
        except MisconfigurationException as error:
            if self.wanted is None:
                return
            raise MisconfigurationException(
                f"train_batches={self.wanted} needs training data that can be read a second time. Got a one-pass "
                "iterator, or none at all; give fit a DataLoader, or set train_batches=0, which takes the mixed "
                "derivative on the batch of the training step."
            ) from error
        self.count = count

    def stop(self) -> None:
        """End the stream and its worker processes."""
        if self._stream is not None:
            self._position = self._stream.state_dict()
            end_workers(self._stream)
            self._stream = None

    def reset(self) -> None:
        """Forget the position, for another module."""
        self._position = {}

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream."""
        return dict(self._position if self._stream is None else self._stream.state_dict())

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the position."""
        self._position = dict(state)
        if self._stream is not None and state:
            self._stream.load_state_dict(state)

    def mixed(
        self,
        module: LightningModule,
        parameters: Mapping[str, nn.Parameter],
        loss: Tensor,
        hyperparameters: Sequence[Hyperparameter],
    ) -> Mixed | None:
        """Return the function (v, λ) → vᵀ ∂²L_T/∂w∂λ over the next batches; None where the count is zero.

        Args:
            module: Module whose ``training_step`` is evaluated, without side effects.
            parameters: Inner parameters by name.
            loss: A training loss with its graph: its precision decides the length of the differences.
            hyperparameters: Those in the loss. Weights of examples alone are evaluated in evaluation mode, without the
                noise of dropout and of batch statistics; others in training mode: rates of dropout act only there.
        """
        if self._stream is None:
            return None
        evaluation = all(h.moves_one_batch for h in hyperparameters)
        length = difference_length(tuple(parameters.values()), loss)
        return partial(self._product, module, tuple(parameters.values()), length, evaluation)

    def _product(
        self,
        module: LightningModule,
        parameters: Sequence[nn.Parameter],
        length: float,
        evaluation: bool,
        v: Vector,
        hparams: Vector,
    ) -> tuple[Tensor | None, ...]:
        trainer, stream, size = module.trainer, self._stream, float(norm(v))
        assert stream is not None
        epsilon = length / size if size > 0 else 0.0
        points = [
            (
                sign,
                tuple(
                    p.detach().add(a.to(p.dtype), alpha=sign * epsilon)
                    for p, a in zip(parameters, v, strict=True)
                ),
            )
            for sign in (1.0, -1.0)
        ]
        evaluate = partial(_slopes, trainer, module, parameters, hparams)
        caller = f"Called for the outer step at training step {trainer.global_step}, on training batches of its own."
        totals: list[Tensor | None] = [None] * len(hparams)
        mode = evaluation_mode(module) if evaluation else nullcontext()
        with mode, without_trace(module, trainer, evaluate, caller=caller):
            for _ in range(self.count):
                batch, noise = stream.next(), stream.loss_stream()
                for sign, values in points:
                    # The same noise at both points.
                    with placed_at(parameters, values), noise.replay():
                        found = evaluate(batch, stream.index)
                    for i, g in enumerate(found):
                        if g is not None:
                            totals[i] = g * sign if totals[i] is None else totals[i].add_(g, alpha=sign)  # type: ignore[union-attr]
        factor = 1.0 / (2 * epsilon * self.count) if epsilon else 0.0
        return tuple(None if total is None else total.mul_(factor) for total in totals)


def _slopes(
    trainer: Trainer,
    module: LightningModule,
    parameters: Sequence[nn.Parameter],
    hparams: Vector,
    batch: Any,
    index: int,
) -> tuple[Tensor | None, ...]:
    """Return ∂L_T/∂λ of a batch, with the factor of the loss; None where the loss does not depend on λ."""

    def loss() -> Tensor | None:
        moved = transfer(trainer, module, batch)
        with trainer.precision_plugin.train_step_context():
            value: Tensor | None = step_loss(trainer, module, "training_step", moved, index)
        return value

    try:
        with _without_gradients(parameters):
            value = loss()
    except RuntimeError as error:
        # The training step itself differentiates, as a gradient penalty does.
        if "does not require grad" not in str(error):
            raise
        value = loss()
    if value is None or not value.requires_grad:
        return (None,) * len(hparams)
    return first_derivative(value * loss_scale(trainer), hparams, parameters)


@contextmanager
def _without_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep the weights out of graphs that are built inside."""
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
