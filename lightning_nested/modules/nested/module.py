"""A LightningModule with a nested loop: inner steps on training data, outer steps on validation data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.hyperparameters import Hyperparameter, OuterReport, OuterStep
from lightning_nested.hyperparameters.module_tensors import as_hyperparameters
from lightning_nested.hyperparameters.outer_optimizer import default_outer_optimizer
from lightning_nested.hyperparameters.shared_adam import refuse_shrink
from lightning_nested.modules.nested.cycles import Cycle
from lightning_nested.modules.nested.inner_optimizer import named_parameters, set_rates
from lightning_nested.modules.nested.problem import NestedProblem
from lightning_nested.modules.nested.short_cycles import warn_of_short_cycles
from lightning_nested.modules.nested.strategies import GradientStrategy, Implicit, LoopOptions
from lightning_nested.trainer.attributes import attach_hyperparameters, bind_hyperparameters, load_bound
from lightning_nested.trainer.inner_problem import check_loss
from lightning_nested.trainer.outer_batches import OuterBatches
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.outer_loop_owners import HasOuterLoop, state_of_outer_steps
from lightning_nested.trainer.outer_plan import OuterPlan
from lightning_nested.trainer.pace import steps_left
from lightning_nested.trainer.requirements import refuse_loss_scaling, refuse_strategy, require_hooks
from lightning_nested.trainer.schedulers import step_plateau_schedulers, step_schedulers
from lightning_nested.trainer.use import OneFitModule, Use

_HOOKS = "setup, on_fit_start, on_train_start, on_train_epoch_end, on_save_checkpoint and on_load_checkpoint"


@checked
class NestedModule(HasOuterLoop, OneFitModule, LightningModule):
    """Alternates inner steps on the training data with outer steps on the validation data; to be extended.

    A subclass defines the two losses; hyperparameters are attributes of the module, by their names:

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

    Weight decays are added to the gradient in closed form; under AdamW they take the place of its own, decoupled, until
    the fit ends. With ``Implicit(at=LookAhead())``, or a solver that reads the run, ``WeightDecay(init=None)`` starts
    from the length of the run. Tensors and submodules given by name are trained
    by the outer optimizer, all other parameters by the inner one. The outer loss is evaluated in evaluation
    mode, without logging; its batches come in an endless stream from the validation loader, or from
    :meth:`outer_dataloader`. In a data-parallel run gradients, products and hypergradients are averaged, so
    that a step is that of the global batch. Lorraine, Vicol & Duvenaud (2020), AISTATS, PMLR 108:1540-1552;
    Shaban, Cheng, Hatch & Boots (2019), AISTATS, PMLR 89:1723-1732.

    Optimization is manual, so clipping and accumulation are options here. ``trainer.global_step`` counts
    inner steps. A run resumed from a checkpoint of an epoch's end continues as if it had not stopped. A
    subclass that overrides a hook of the class calls ``super()``'s in it.

    Args:
        hyperparameters: :class:`Hyperparameter` objects, or dotted names of tensors or submodules.
        gradient: ``Implicit(...)`` or ``Unrolled(...)``.
        inner_optimizer: Function from parameters to the optimizer of the inner steps; None: a subclass
            overrides ``configure_optimizers``, which returns one optimizer of :meth:`inner_parameters`.
        outer_optimizer: Function from the list of unconstrained tensors to an optimizer; default Adam of rate 0.05.
        inner_scheduler: Function from the inner optimizer to a scheduler, stepped after each epoch.
        outer_scheduler: Function from the outer optimizer to a scheduler, stepped after each outer step.
        inner_steps_per_outer: Inner steps per outer step; None: 1, or the ``num_steps`` of ``Unrolled``.
        loop: Accumulation, clipping, warm-up, restarts, logging.

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
        self.gradient, self.loop = gradient, loop
        self.outer = OuterStep(
            as_hyperparameters(hyperparameters),
            optimizer=outer_optimizer,
            scheduler=outer_scheduler,
            solver=gradient.solver,
        )
        _check_arguments(self.outer, gradient, inner_steps_per_outer)
        self.inner_steps_per_outer = inner_steps_per_outer or gradient.length or 1
        self.outer_loop = OuterLoop(
            "NestedModule",
            self.outer,
            warmup_steps=loop.warmup_steps,
            restart_every=loop.restart_every,
            max_skipped=loop.max_skipped,
            log_every_n_outer_steps=loop.log_every_n_outer_steps,
            self_check=loop.self_check,
        )
        self._plan = OuterPlan(self.outer, point=gradient.at, solver=gradient.solver)
        self._make_inner, self._make_inner_scheduler = inner_optimizer, inner_scheduler
        self._position = 0  # inner steps of the current cycle so far
        self._saved: Mapping[str, Any] | None = None  # checkpoint state waiting for on_train_start
        self._cycle: Cycle | None = None
        self._use = Use()
        bind_hyperparameters(self, self.outer.hyperparameters)

    # ---- what users write, override and read

    @abstractmethod
    def inner_loss(self, batch: Any) -> Tensor:
        """Return the training loss of a batch: a scalar with its graph, without tuned weight decays."""
        raise NotImplementedError(f"{type(self).__name__} must define inner_loss(self, batch).")

    @abstractmethod
    def outer_loss(self, batch: Any) -> Tensor:
        """Return the validation loss of a batch: a scalar with its graph."""
        raise NotImplementedError(f"{type(self).__name__} must define outer_loss(self, batch).")

    def outer_dataloader(self) -> Any:
        """Return the loader of the outer batches; None: the validation data of ``fit``."""
        return None

    def inner_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are no hyperparameters, for the inner optimizer."""
        tuned = self._tuned()
        return [p for p in self.parameters() if p.requires_grad and id(p) not in tuned]

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the inner optimizer; the outer one is stepped by this module, not by the Trainer."""
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
        self._use.begin(self, self.trainer, self)
        self._use.at_end(self.outer_loop.stop, self._close_cycle, self._plan.stop)
        refuse_strategy(self.trainer, "NestedModule")
        refuse_loss_scaling(self.trainer, "NestedModule")
        self.outer_loop.prepare(self.loop)
        bind_hyperparameters(self, self.outer.hyperparameters)

    @override
    def on_fit_start(self) -> None:
        self._collect()
        self.outer_loop.remember_initial(self.outer_loop.parameters)

    def _collect(self) -> None:
        """Name the parameters of the inner optimizer, and build the hyperparameters for them."""
        optimizer = self._optimizer().optimizer
        parameters = named_parameters(self, optimizer, self._tuned())
        if not self.outer_loop.parameters:
            for hyperparameter in self.outer.hyperparameters:
                hyperparameter.attach_optimizer(optimizer)
        self.outer_loop.build(parameters, self.device)

    @override
    def on_train_start(self) -> None:
        if not self.outer_loop.is_built_for(self._optimizer().optimizer):  # in a search for the learning rate
            self._collect()
        _schedule(self, self._plan)
        self._plan.attach(self, self.outer_loop.parameters, self._optimizer().optimizer)
        if self._saved is not None:
            # The decays' bounds come first: values are read with them.
            if "plan" in self._saved:
                self._plan.load_state_dict(self._saved["plan"])
            self.outer_loop.load_state_dict(self._saved, keys=("position",))
            # A checkpoint holds no graph of half a cycle: an unrolled one begins again.
            self._position = 0 if self.gradient.ends_with_epoch else self._saved["position"]
            self._saved = None
        batches = self.outer_loop.start(self.trainer, self.outer_dataloader())
        warn_of_short_cycles(self.trainer, self.gradient, self.loop.accumulate_grad_batches)
        set_rates(self, self.outer.hyperparameters, self._optimizer())
        self._cycle = self._begin(batches)

    def _begin(self, batches: OuterBatches) -> Cycle:
        """Return a cycle with the current parameters."""
        problem = NestedProblem(
            module=self,
            inner_loss=self.inner_loss,
            outer_loss=self.outer_loss,
            optimizer=self._optimizer(),
            parameters=self.outer_loop.parameters,
            outer=self.outer,
            plan=self._plan,
            batches=batches,
            accumulate=self.loop.accumulate_grad_batches,
            clip=self.loop.gradient_clip_val,
            clip_algorithm=self.loop.gradient_clip_algorithm,
            check=self.outer_loop.check,
        )
        return self.gradient.begin(problem)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        require_hooks(self._cycle is not None, self, "NestedModule", _HOOKS)
        assert self._cycle is not None
        if batch_idx % self.loop.accumulate_grad_batches == 0:
            self._cycle = self._follow_frozen(self._cycle)
        remaining = self._remaining(batch_idx)
        if batch_idx % self.loop.accumulate_grad_batches == 0:
            self._plan.watch(remaining - 1 or self.inner_steps_per_outer)
        if remaining > 1:
            self.outer_loop.probe(
                self.trainer, self, lambda b: check_loss("outer_loss", self, self.outer_loss(b))
            )
        loss = self._cycle.add(batch, remaining=remaining)
        last = self.trainer.is_last_batch
        if last or (batch_idx + 1) % self.loop.accumulate_grad_batches == 0:
            outcome = self._cycle.step(closes=remaining == 1)
            self.outer_loop.inner_steps += 1
            self._plan.fit_decays(self.outer_loop.parameters, self.inner_steps)
            counted = self.inner_steps > self.loop.warmup_steps
            self._position = 0 if remaining == 1 else self._position + counted
            if isinstance(outcome, OuterReport):
                self.outer_loop.keep(outcome)
                self.outer_loop.step(self)
                set_rates(self, self.outer.hyperparameters, self._optimizer())
            elif outcome is not None:
                self.outer_loop.skip(outcome)
            step_schedulers(self, "step", self.inner_steps)
        if last:
            step_schedulers(self, "epoch", self.current_epoch + 1)
        return {"loss": loss}

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log the outer loss of the validation data as ``val_loss``; may be overridden."""
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
    def on_train_end(self) -> None:
        self.outer_loop.conclude("inner_steps_per_outer", self.inner_steps_per_outer)

    def _close_cycle(self) -> None:
        if self._cycle is not None:
            self._cycle.close()
        self._cycle = None

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._use.is_open and not self.outer_loop.parameters:  # saved by a search for the learning rate
            self._collect()
        if self._saved is not None:  # saved before training began
            checkpoint["nested"] = dict(self._saved)
        elif self.outer_loop.parameters:
            own = {"position": self._position, "initial": self.outer_loop.initial}
            checkpoint["nested"] = {**self.outer_loop.state_dict(), **own, "plan": self._plan.state_dict()}
        self._plan.own_decay.give_back_saved(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = state_of_outer_steps(checkpoint, "nested", "NestedModule")
        load_bound(self.outer.hyperparameters, self._saved)

    def _follow_frozen(self, cycle: Cycle) -> Cycle:
        """Return the cycle, or a new one if a finetuning callback froze or unfroze parameters."""
        if self.outer_loop.is_built_for(self._optimizer().optimizer):
            return cycle
        cycle.close()
        self._collect()
        self._plan.attach(self, self.outer_loop.parameters, self._optimizer().optimizer)
        if self.gradient.ends_with_epoch:
            self._position = 0
        return self._begin(cycle.problem.batches)

    # ---- the outer step

    def _remaining(self, batch_idx: int) -> int:
        """Return the number of inner steps up to and including the next outer step."""
        warmup = max(0, self.loop.warmup_steps - self.inner_steps)
        # At least 1: the cycle of a checkpoint may be longer.
        remaining = warmup + max(1, self.inner_steps_per_outer - self._position)
        forced = self.outer_loop.needs_step(self.trainer)
        if not (self.gradient.ends_with_epoch or forced):
            return remaining
        left = steps_left(self.trainer, batch_idx, self.loop.accumulate_grad_batches)
        return remaining if left <= warmup and not forced else int(min(remaining, left))

    # ---- optimizers and names

    def _optimizer(self) -> LightningOptimizer:
        optimizers = self.optimizers()
        if not isinstance(optimizers, LightningOptimizer):
            raise MisconfigurationException(
                "configure_optimizers must return the inner optimizer alone. Got "
                f"{len(optimizers)}; the outer one is made by outer_optimizer=."
            )
        return optimizers

    def _tuned(self) -> dict[int, str]:
        """Return the name of the hyperparameter of each tuned tensor, by its ``id``."""
        attach_hyperparameters(self, self.outer.hyperparameters, self._use)
        return {id(t): h.name for h in self.outer.hyperparameters for t in h.tensors.values()}


def _schedule(module: NestedModule, plan: OuterPlan) -> None:
    """Plan the run, if outer steps read it, with the options that the module has now."""
    if plan.reads_run:
        plan.every_n_steps, plan.warmup_steps = module.inner_steps_per_outer, module.loop.warmup_steps
        plan.schedule(module.trainer, module.outer_loop, accumulate=module.loop.accumulate_grad_batches)


def _check_arguments(outer: OuterStep, gradient: GradientStrategy, inner_steps_per_outer: int | None) -> None:
    refuse_shrink(outer.decays)
    rates = [h.name for h in outer.hyperparameters if h.sets_rate]
    if rates and isinstance(gradient, Implicit):
        raise ValueError(
            f"A learning rate needs gradient=Unrolled(num_steps=...). Got {rates[0]!r} with {gradient}: "
            "the inner loss does not depend on it, so implicit differentiation cannot see it."
        )
    others = [h.name for h in outer.options if not h.sets_rate]
    if others:
        raise ValueError(
            "The optimizer's momentum and betas are tuned by HypergradientCallback. Got "
            f"{', '.join(others)}; a NestedModule tunes a LearningRate, through gradient=Unrolled(num_steps=...)."
        )
    if len(rates) > 1:
        raise ValueError(f"There must be at most one LearningRate. Got {rates}.")
    k = inner_steps_per_outer
    if k is not None and (k < 1 or gradient.length not in (None, k)):
        raise ValueError(
            "inner_steps_per_outer must be at least 1, and the num_steps of Unrolled if given with it. "
            f"Got {k} with {gradient}; leave it out."
        )
