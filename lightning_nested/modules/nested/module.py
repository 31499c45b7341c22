"""A LightningModule with a nested loop: inner steps on training data, outer steps on validation data."""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.hyperparameters import (
    Hyperparameter,
    LearningRate,
    ModuleTensors,
    OuterReport,
    OuterStep,
)
from lightning_nested.hyperparameters.module_tensors import as_hyperparameters
from lightning_nested.hyperparameters.outer_optimizer import default_outer_optimizer
from lightning_nested.modules.nested.cycles import Cycle
from lightning_nested.modules.nested.strategies import GradientStrategy, Implicit, LoopOptions
from lightning_nested.optim.step_dynamics import trainable
from lightning_nested.trainer.attributes import bind_hyperparameters
from lightning_nested.trainer.inner_problem import InnerProblem
from lightning_nested.trainer.outer_batches import OuterBatches
from lightning_nested.trainer.outer_loop import log_outer_step, reinitialize
from lightning_nested.trainer.random_stream import base_seed
from lightning_nested.trainer.requirements import refuse_strategy
from lightning_nested.trainer.schedulers import step_plateau_schedulers, step_schedulers

_HOOKS = "setup, on_fit_start, on_train_start, on_train_epoch_end, on_save_checkpoint and on_load_checkpoint"


class NestedModule(LightningModule):
    """Alternates inner steps on the training data with outer steps on the validation data; to be extended.

    A subclass writes the two losses; hyperparameters are read where they belong:

        class Cleaner(NestedModule):
            def __init__(self, **kwargs):
                super().__init__([ExampleWeights(700), WeightDecay()], **kwargs)
                self.network = nn.Linear(64, 10)

            def inner_loss(self, batch):                              # a training batch
                x, y, index = batch
                losses = F.cross_entropy(self.network(x), y, reduction="none")
                return (losses * self.example_weights(index)).mean()

            def outer_loss(self, batch):                              # a validation batch
                return F.cross_entropy(self.network(batch[0]), batch[1])

    Weight decays are added to the gradient in closed form. Tensors and submodules given by name are trained
    by the outer optimizer, all other parameters by the inner one. The outer loss is evaluated in evaluation
    mode; its batches come in an endless stream from the validation loader, or from :meth:`outer_dataloader`;
    what it logs is dropped. In a data-parallel run gradients, products and hypergradients are averaged, so
    that a step is that of the global batch. Lorraine, Vicol & Duvenaud (2020), AISTATS, PMLR 108:1540-1552;
    Shaban, Cheng, Hatch & Boots (2019), AISTATS, PMLR 89:1723-1732.

    Optimization is manual, so clipping and accumulation are options here. ``trainer.global_step`` counts
    inner steps. A run resumed from a checkpoint of an epoch's end goes on as if it had not stopped. A
    subclass that overrides one of ``setup``, ``on_fit_start``, ``on_train_start``, ``on_train_epoch_end``,
    ``on_save_checkpoint``, ``on_load_checkpoint`` calls ``super()``'s in it.

    Args:
        hyperparameters: What is tuned: :class:`Hyperparameter` objects, or dotted names of tensors or
            submodules.
        gradient: ``Implicit(...)`` or ``Unrolled(...)``.
        inner_optimizer: From parameters to the optimizer of the inner steps; None: ``configure_optimizers``
            is overridden, and returns one optimizer of :meth:`inner_parameters`.
        outer_optimizer: From the list of unconstrained tensors to an optimizer; default Adam of rate 0.05.
        inner_scheduler: From the inner optimizer to a scheduler, stepped after each epoch.
        outer_scheduler: From the outer optimizer to a scheduler, stepped after each outer step.
        inner_steps_per_outer: k; None: 1, or the ``num_steps`` of ``Unrolled``.
        loop: Accumulation, clipping, warm-up, restarts, logging.

    Attributes:
        inner_steps: Made so far; with ``outer_steps`` and ``skipped_steps`` the module's own clock.
        outer_steps: Made so far.
        skipped_steps: Outer steps left out because a value was not finite.
        last_report: What the last outer step found.

    Raises:
        ValueError: Arguments that contradict each other.
        MisconfigurationException: In ``fit``: a weight is both hyperparameter and inner parameter, a strategy
            shards parameters, there is no validation data.
    """

    def __init__(
        self,
        hyperparameters: Hyperparameter | str | Sequence[Hyperparameter | str],
        *,
        gradient: GradientStrategy = Implicit(),  # noqa: B008 - frozen
        inner_optimizer: OptimizerCallable | None = None,
        outer_optimizer: OptimizerCallable = default_outer_optimizer,
        inner_scheduler: LRSchedulerCallable | None = None,
        outer_scheduler: LRSchedulerCallable | None = None,
        inner_steps_per_outer: int | None = None,
        loop: LoopOptions = LoopOptions(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        tuned = as_hyperparameters(hyperparameters)
        rates = [h.name for h in tuned if isinstance(h, LearningRate)]
        if rates and isinstance(gradient, Implicit):
            raise ValueError(
                f"A learning rate needs gradient=Unrolled(num_steps=...). Got {rates[0]!r} with {gradient}: "
                "the inner loss does not depend on it, so implicit differentiation cannot see it."
            )
        if len(rates) > 1:
            raise ValueError(f"There must be at most one LearningRate. Got {rates}.")
        k = inner_steps_per_outer
        if k is not None and (k < 1 or (gradient.length is not None and k != gradient.length)):
            raise ValueError(
                "inner_steps_per_outer must be at least 1, and the num_steps of Unrolled if given with it. "
                f"Got {k} with {gradient}; leave it out."
            )
        self.gradient, self.loop = gradient, loop
        self.inner_steps_per_outer = (
            k if k is not None else gradient.length if gradient.length is not None else 1
        )
        self.outer = OuterStep(
            tuned,
            optimizer=outer_optimizer,
            scheduler=outer_scheduler,
            solver=gradient.solver if isinstance(gradient, Implicit) else None,
        )
        self.inner_steps = self.outer_steps = self.skipped_steps = 0
        self.last_report: OuterReport | None = None
        self._make_inner, self._make_inner_scheduler = inner_optimizer, inner_scheduler
        self._skipped_in_a_row = 0
        self._outer_position: dict[str, int] = {}  # of the outer batches, once they are gone
        self._position = 0  # inner steps of the present cycle so far
        self._inner: dict[str, nn.Parameter] = {}
        self._initial: dict[str, Tensor] = {}
        self._saved: Mapping[str, Any] | None = None  # a checkpoint's, until there is where to put it
        self._problem: InnerProblem | None = None
        self._cycle: Cycle | None = None
        bind_hyperparameters(self, self.outer.hyperparameters)

    # ---- what users write, override and read

    @abstractmethod
    def inner_loss(self, batch: Any) -> Tensor:
        """Training loss of a batch: a scalar with its graph, without tuned weight decays."""
        raise NotImplementedError(f"{type(self).__name__} must define inner_loss(self, batch).")

    @abstractmethod
    def outer_loss(self, batch: Any) -> Tensor:
        """Validation loss of a batch: a scalar with its graph."""
        raise NotImplementedError(f"{type(self).__name__} must define outer_loss(self, batch).")

    def outer_dataloader(self) -> Any:
        """Loader of the outer batches; None: the validation data of ``fit``."""
        return None

    def inner_parameters(self) -> list[nn.Parameter]:
        """The parameters that are no hyperparameters, for the inner optimizer."""
        claimed = {id(t) for t in self._attached()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in claimed]

    def values(self) -> dict[str, Tensor]:
        """Tuned values in natural units, by ``name`` or ``name/key``; available from the start of ``fit``."""
        return self.outer.values()

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The inner optimizer; the outer one is no business of the Trainer."""
        if self._make_inner is None:
            raise MisconfigurationException(
                "NestedModule needs inner_optimizer=<from parameters to optimizer>, or a subclass's "
                "configure_optimizers that returns one of self.inner_parameters(). "
                f"Got neither from {type(self).__name__}."
            )
        optimizer = self._make_inner(self.inner_parameters())
        if self._make_inner_scheduler is None:
            return optimizer
        # Plateau schedulers too: Lightning drops a "monitor" key in manual optimization, with a warning.
        return [optimizer], [self._make_inner_scheduler(optimizer)]

    # ---- lifecycle

    @override
    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        refuse_strategy(self.trainer, "NestedModule")
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"NestedModule scales no losses. Got precision={self.trainer.precision}; use 'bf16-mixed'."
            )
        bind_hyperparameters(self, self.outer.hyperparameters)

    @override
    def on_fit_start(self) -> None:
        self._collect()
        if self.loop.restart_every is not None:
            self._initial = {name: p.detach().clone() for name, p in self._inner.items()}

    def _collect(self) -> None:
        """The parameters that the inner optimizer moves, by name, and hyperparameters of their sizes."""
        optimizer = self._optimizer()
        tuned = {
            id(t): h.name
            for h in self.outer.hyperparameters
            if isinstance(h, ModuleTensors)
            for t in self._of(h)
        }
        names = {id(p): name for name, p in self.named_parameters()}
        held = trainable(optimizer.optimizer)
        twice = [f"{names.get(id(p))} ({tuned[id(p)]!r})" for p in held if id(p) in tuned]
        unknown = [tuple(p.shape) for p in held if id(p) not in names]
        if twice:
            raise MisconfigurationException(
                "A weight must be either a hyperparameter or an inner parameter. "
                f"Got both for {', '.join(twice)}; give the inner optimizer self.inner_parameters()."
            )
        if unknown or not held:
            raise MisconfigurationException(
                "The inner optimizer must hold parameters of the module, at least one. "
                f"Got {f'others of shapes {unknown}' if unknown else 'none'}; "
                "give it self.inner_parameters()."
            )
        if not self._inner:
            for hyperparameter in self.outer.hyperparameters:
                if isinstance(hyperparameter, LearningRate):
                    hyperparameter.attach([float(group["lr"]) for group in optimizer.param_groups])
        self._inner = {names[id(p)]: p for p in held}
        self.outer.build(self._inner, self.device)

    @override
    def on_train_start(self) -> None:
        batches = OuterBatches(self.trainer, self.outer_dataloader(), seed=base_seed(self.trainer))
        if self._saved is not None:
            self._restore(self._saved, batches)
            self._saved = None
        self._set_rates()
        self._begin(batches)

    def _begin(self, batches: OuterBatches) -> None:
        """A runner for the present parameters."""
        self._problem = InnerProblem(
            module=self,
            inner_loss=self.inner_loss,
            outer_loss=self.outer_loss,
            optimizer=self._optimizer(),
            parameters=self._inner,
            outer=self.outer,
            batches=batches,
            accumulate=self.loop.accumulate_grad_batches,
            clip=self.loop.gradient_clip_val,
            clip_algorithm=self.loop.gradient_clip_algorithm,
        )
        self._cycle = self.gradient.begin(self._problem)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        if self._cycle is None or self._problem is None:
            raise MisconfigurationException(
                "NestedModule must be started by its hooks. "
                f"Got a {type(self).__name__} that overrides one of {_HOOKS} without calling super()'s."
            )
        if batch_idx % self.loop.accumulate_grad_batches == 0:
            self._follow_frozen(self._problem)
        remaining = self._remaining(batch_idx)
        loss = self._cycle.add(batch, remaining=remaining)
        last = self.trainer.is_last_batch
        if last or (batch_idx + 1) % self.loop.accumulate_grad_batches == 0:
            outcome = self._cycle.step(closes=remaining == 1)
            self.inner_steps += 1
            self._position = (
                0 if remaining == 1 else self._position + (self.inner_steps > self.loop.warmup_steps)
            )
            if isinstance(outcome, OuterReport):
                self._outer_step(outcome, self._problem)
            elif outcome is not None:
                self._skip(outcome)
            step_schedulers(self, "step", self.inner_steps)
        if last:
            step_schedulers(self, "epoch", self.current_epoch + 1)
        return {"loss": loss}

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logs the outer loss of the validation data as ``val_loss``; to be overridden."""
        loss = self.outer_loss(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        return loss

    @override
    def on_train_epoch_end(self) -> None:
        if self._cycle is not None and self.gradient.ends_with_epoch and self._position > 0:
            self._cycle.drop()
            self._position = 0
        step_plateau_schedulers(self)

    @override
    def teardown(self, stage: str) -> None:
        if self._problem is not None:
            self._outer_position = self._problem.batches.state_dict()
        self._cycle = self._problem = None  # with graphs, and workers of the outer loader

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if not self._inner:  # saved before fit began
            if self._saved is not None:
                checkpoint["nested"] = dict(self._saved)
            return
        checkpoint["nested"] = {
            "outer": self.outer.state_dict(),
            "batches": self._problem.batches.state_dict() if self._problem else self._outer_position,
            "inner_steps": self.inner_steps,
            "outer_steps": self.outer_steps,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "position": self._position,
            "initial": self._initial,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("nested")

    def _follow_frozen(self, problem: InnerProblem) -> None:
        """Begin anew with other parameters where a finetuning callback froze or unfroze some."""
        held = trainable(self._optimizer().optimizer)
        if len(held) == len(self._inner) and all(map(operator.is_, held, self._inner.values())):
            return
        if self._cycle is not None:
            self._cycle.drop()
        before = set(self._inner)
        self._collect()
        if self.loop.restart_every is not None:
            new = {name: p.detach().clone() for name, p in self._inner.items() if name not in before}
            self._initial.update(new)
        if self.gradient.ends_with_epoch:
            self._position = 0
        self._begin(problem.batches)

    # ---- the outer step

    def _remaining(self, batch_idx: int) -> int:
        """Inner steps up to and including the next outer step."""
        warmup = max(0, self.loop.warmup_steps - self.inner_steps)
        remaining = warmup + self.inner_steps_per_outer - self._position
        if not self.gradient.ends_with_epoch:
            return remaining
        left: float = math.inf
        batches = self.trainer.num_training_batches
        if not math.isinf(batches):
            size = self.loop.accumulate_grad_batches
            left = math.ceil(batches / size) - batch_idx // size
        if self.trainer.is_last_batch:
            left = 1
        if self.trainer.max_steps > 0:
            left = min(left, self.trainer.max_steps - self.trainer.global_step)
        return remaining if left <= warmup else int(min(remaining, left))

    def _outer_step(self, report: OuterReport, problem: InnerProblem) -> None:
        self.last_report = report
        self._skipped_in_a_row = 0
        self.outer.apply()
        self.outer_steps += 1
        self._set_rates()
        every, restart_every = self.loop.log_every_n_outer_steps, self.loop.restart_every
        if every > 0 and (self.outer_steps - 1) % every == 0:
            log_outer_step(self, report, self.values(), self.skipped_steps)
        if restart_every is not None and self.outer_steps % restart_every == 0:
            seed = problem.batches.seed + 104_729 * self.outer_steps
            reinitialize(self, self._initial, self._inner, seed)
            self._optimizer().state.clear()

    def _skip(self, error: FloatingPointError) -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self.loop.max_skipped:
            raise FloatingPointError(
                f"More than max_skipped={self.loop.max_skipped} successive outer steps failed. "
                f"Got at last: {error}"
            ) from error
        if self._skipped_in_a_row == 1:
            rank_zero_warn(f"NestedModule skipped the outer step at inner step {self.inner_steps}: {error}")

    def _restore(self, state: Mapping[str, Any], batches: OuterBatches) -> None:
        self.outer.load_state_dict(state["outer"], self._inner)
        if state["batches"]:  # none were drawn before training began
            batches.load_state_dict(state["batches"])
        self.inner_steps, self.outer_steps = state["inner_steps"], state["outer_steps"]
        self.skipped_steps, self._skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        # Half a cycle's graph is not in a checkpoint: an unrolled one begins anew.
        self._position = 0 if self.gradient.ends_with_epoch else state["position"]
        for name, value in state["initial"].items():
            self._initial[name] = value.to(self.device)

    # ---- optimizers and names

    def _optimizer(self) -> LightningOptimizer:
        optimizers = self.optimizers()
        if not isinstance(optimizers, LightningOptimizer):
            raise MisconfigurationException(
                "configure_optimizers must return the inner optimizer alone. Got "
                f"{len(optimizers)}; the outer one is made by outer_optimizer=."
            )
        return optimizers

    def _set_rates(self) -> None:
        for hyperparameter in self.outer.hyperparameters:
            if isinstance(hyperparameter, LearningRate):
                if self.trainer.lr_scheduler_configs:
                    raise MisconfigurationException(
                        "Either LearningRate or a scheduler sets the inner optimizer's rate. Got both "
                        f"{hyperparameter.name!r} and an inner scheduler; leave one out."
                    )
                for group, rate in zip(self._optimizer().param_groups, hyperparameter.rates(), strict=True):
                    group["lr"] = float(rate.detach())

    def _of(self, hyperparameter: ModuleTensors) -> Iterator[Tensor]:
        if not hyperparameter.built:
            hyperparameter.attach(self)
        yield from hyperparameter.tensors.values()

    def _attached(self) -> Iterator[Tensor]:
        for hyperparameter in self.outer.hyperparameters:
            if isinstance(hyperparameter, ModuleTensors):
                yield from self._of(hyperparameter)
