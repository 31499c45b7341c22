"""Training losses of one optimizer step with their graphs, as implicit differentiation needs them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_nested.hypergradient import Curvature, DoubleBackwardError, FiniteDifference, GaussNewton
from lightning_nested.linalg.graph import hides_layers
from lightning_nested.trainer.isolation import without_trace
from lightning_nested.trainer.lightning import loss_scale, step_loss
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.stand_ins import StandIns


class InnerGraph:
    """Losses of the accumulated batches of a step, and what their curvature needs beside them.

    ``FiniteDifference`` repeats each evaluation without side effects and with the same random numbers;
    ``GaussNewton(outputs="name")`` needs the outputs of that submodule, which a forward hook keeps.

    Args:
        module: Module whose ``method`` evaluates the training loss.
        curvature: Approximation of the Hessian; None: the Hessian.
        accumulate: Batches per step.
        method: See ``module``; for messages.

    Raises:
        MisconfigurationException: ``GaussNewton`` names no submodule, or has several batches.
    """

    def __init__(
        self, module: LightningModule, curvature: Curvature | None, *, accumulate: int, method: str
    ) -> None:
        self._module, self._curvature, self._method = module, curvature, method
        self.losses: list[Tensor] = []
        self.measured = False  # whether the memory of a graph was looked at
        self._repeats: list[Callable[[], Tensor]] = []
        self._outputs: list[Tensor] = []
        # Repeats the evaluation that is being observed.
        self._repeat: Callable[[], Tensor] | None = None
        self._observing = False
        self._handle: RemovableHandle | None = None
        if isinstance(curvature, GaussNewton):
            if accumulate > 1:
                raise MisconfigurationException(
                    "GaussNewton(outputs=...) sees one batch. "
                    f"Got accumulate_grad_batches={accumulate}; use Hessian(), or set it to 1."
                )
            self._hook(curvature)

    @classmethod
    def of_training(
        cls, trainer: Trainer, module: LightningModule, curvature: Curvature | None
    ) -> InnerGraph:
        """Return one for the ``training_step`` of a module in automatic optimization."""
        return cls(module, curvature, accumulate=trainer.accumulate_grad_batches, method="training_step")

    @property
    def observes(self) -> bool:
        """True if :meth:`observe` must be called before each evaluation."""
        return isinstance(self._curvature, FiniteDifference | GaussNewton)

    @property
    def curvature_in_use(self) -> Curvature | None:
        """The curvature of the coming outer steps: differences, since :meth:`take_differences`."""
        return self._curvature

    def take_differences(self, error: DoubleBackwardError) -> tuple[Curvature, Callable[[], Tensor]]:
        """Replace the Hessian that nobody chose by differences of gradients, from now on.

        Args:
            error: About the missing second derivative.

        Raises:
            DoubleBackwardError: ``error`` itself, where a curvature was chosen, the losses were not observed to be
                repeated, or layers are hidden from the gradients of several processes.
        """
        hidden = self._module.trainer.world_size > 1 and any(map(hides_layers, self.losses))
        if self._curvature is not None or hidden or (self.losses and self.again() is None):
            raise error
        self._curvature = FiniteDifference()
        repeated = self.again()
        return self._curvature, repeated if repeated is not None else lambda: torch.stack(self.losses).sum()

    @property
    def repeats(self) -> bool:
        """True if the curvature evaluates the loss again."""
        return isinstance(self._curvature, FiniteDifference)

    def observe(self, evaluate: Callable[[], Tensor], *, again: bool = False) -> None:
        """Observe the coming evaluation of a loss, up to :meth:`add`.

        Args:
            evaluate: Repeats it.
            again: Whether :meth:`again` is to repeat it, if the curvature does not.
        """
        self._observing, self._outputs = True, []
        if self._handle is None and isinstance(self._curvature, GaussNewton):
            self._hook(self._curvature)
        if self.repeats or again:
            self._repeat = partial(self._evaluate_again, evaluate, RandomStream.snapshot(self._module.device))

    def observe_step(
        self, trainer: Trainer, methods: StandIns, batch: Any, batch_idx: int, *, again: bool = False
    ) -> None:
        """Observe the coming ``training_step``, from its beginning: hooks before it may draw random numbers.

        Args:
            trainer: Trainer of the run.
            methods: Holds the method that replaces ``training_step``, until it is called.
            batch: The batch of the step.
            batch_idx: Its index.
            again: See :meth:`observe`.
        """
        module = self._module
        step = module.training_step

        def evaluate() -> Tensor:
            loss = step_loss(trainer, module, "training_step", batch, batch_idx)
            assert isinstance(loss, Tensor)
            return loss * (loss_scale(trainer) / trainer.accumulate_grad_batches)

        @functools.wraps(step)
        def observed(*args: Any, **kwargs: Any) -> Any:
            self.observe(evaluate, again=again)
            methods.put_back()
            return step(*args, **kwargs)

        methods.put(module, "training_step", observed)

    def add(self, loss: Tensor) -> None:
        """Keep a loss with its graph."""
        self._observing = False
        self.losses.append(loss)
        if self._repeat is not None:
            self._repeats.append(self._repeat)
            self._repeat = None

    def clear(self) -> None:
        """Free all graphs."""
        self.losses, self._repeats, self._outputs = [], [], []
        self._repeat, self._observing = None, False

    def close(self) -> None:
        """Free all graphs and remove the forward hook."""
        self.clear()
        self.unhook()

    def unhook(self) -> None:
        """Remove the forward hook until the next :meth:`observe`: TorchScript would compile it."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def loss(self) -> Tensor | Callable[[], Tensor]:
        """Return the sum of the losses, or with ``FiniteDifference`` a function that evaluates it again."""
        repeated = self.again() if self.repeats else None
        if repeated is not None:
            return repeated
        return self.losses[0] if len(self.losses) == 1 else torch.stack(self.losses).sum()

    def again(self) -> Callable[[], Tensor] | None:
        """Return a function that evaluates the sum of the losses again; None if they were not observed for that."""
        repeats = list(self._repeats)
        if not repeats or len(repeats) != len(self.losses):
            return None
        return lambda: torch.stack([repeat() for repeat in repeats]).sum()

    def curvature(self) -> Curvature | None:
        """Return the curvature, with the outputs that it names.

        Raises:
            MisconfigurationException: The submodule was not called once, or does not return one tensor.
        """
        curvature = self._curvature
        if not isinstance(curvature, GaussNewton):
            return curvature
        if len(self._outputs) != 1 or len(self.losses) != 1:
            raise MisconfigurationException(
                f"GaussNewton(outputs={curvature.outputs!r}) must name a submodule that {self._method} calls once and "
                f"that returns one tensor, in one batch a step. Got {len(self._outputs)} outputs in "
                f"{len(self.losses)} batch(es); use Hessian()."
            )
        return GaussNewton(outputs=self._outputs[0])

    def _hook(self, curvature: GaussNewton) -> None:
        self._handle = _named_outputs(self._module, curvature).register_forward_hook(self._keep_output)

    def _keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._observing and isinstance(output, Tensor) and output.requires_grad:
            self._outputs.append(output)

    def _evaluate_again(self, evaluate: Callable[[], Tensor], start: RandomStream) -> Tensor:
        trainer = self._module.trainer
        what = type(self._curvature).__name__ if self.repeats else "the outer step"
        caller = (
            f"Called again for {what} at training step {trainer.global_step}, on a batch "
            f"that {self._method} has seen."
        )
        with (
            start.replay(),
            without_trace(self._module, trainer, evaluate, caller=caller),
            trainer.precision_plugin.train_step_context(),
        ):
            return evaluate()


def _named_outputs(module: nn.Module, curvature: GaussNewton) -> nn.Module:
    modules = dict(module.named_modules())
    if not isinstance(curvature.outputs, str) or curvature.outputs not in modules:
        raise MisconfigurationException(
            "GaussNewton(outputs=...) must be the dotted name of the submodule that returns the logits. "
            f"Got {curvature.outputs!r}; {type(module).__name__} has {', '.join(filter(None, modules))}."
        )
    found: nn.Module = modules[curvature.outputs]
    return found
