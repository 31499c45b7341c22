"""Tune hyperparameters by their validation gradient while an unmodified LightningModule trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.callbacks.hypergradient.checks import check_settings, warn_of_own_decay
from lightning_nested.callbacks.hypergradient.inner_parameters import named_parameters
from lightning_nested.callbacks.hypergradient.outer_step import (
    backward_or_differences,
    before_backward,
    give_back_saved,
    prepare_step,
    try_outer_step,
)
from lightning_nested.hypergradient import Curvature, EvaluationPoint, InverseSolver
from lightning_nested.hyperparameters import Hyperparameter, OuterStep
from lightning_nested.hyperparameters.module_tensors import as_hyperparameters
from lightning_nested.hyperparameters.outer_optimizer import default_outer_optimizer
from lightning_nested.hyperparameters.shared_adam import refuse_shrink
from lightning_nested.trainer.attributes import attach_hyperparameters, replace_placeholders, take_out
from lightning_nested.trainer.inner_graph import InnerGraph
from lightning_nested.trainer.inner_problem import modules_outer_loss
from lightning_nested.trainer.lightning import accumulates
from lightning_nested.trainer.option_tuner import OptionTuner
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.outer_loop_owners import OfLoop, OuterLoopCallback
from lightning_nested.trainer.outer_memory import tell_plan
from lightning_nested.trainer.outer_plan import OuterPlan, needs_graph
from lightning_nested.trainer.shards import curvature_of_run
from lightning_nested.trainer.stand_ins import StandIns


class _Planned(OfLoop):
    """Option that is planned anew for each run, unless it was given or set."""

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance.plan, self._name, value)
        super().__set__(instance, value)


@checked
class HypergradientCallback(OuterLoopCallback):
    """Tunes hyperparameters inside one ``fit``, by the gradient of the validation loss through the training.

    At the steps chosen by :meth:`should_update` the callback takes the training loss with its graph, as the Trainer
    hands it to ``on_before_backward``, and a batch of the validation data; finds
    dL_V/dλ = −(∂L_V/∂w) H⁻¹ ∂²L_T/∂w∂λ there, and after the optimizer's step moves λ along it. ``training_step``
    is called again, without side effects, only by the look ahead, by the check of the first outer step and for
    ``train_batches``. Weight decays are added to the gradients in closed form before they are clipped. In a
    data-parallel run every product is averaged, so that the hypergradient is that of the global batch.
    Lorraine, Vicol & Duvenaud (2020), AISTATS, PMLR 108:1540-1552.

    The outer loss is the module's ``outer_loss(batch)`` if it has one, else what ``validation_step`` returns, in
    evaluation mode. Its evaluation leaves the run as it was: logs, random numbers, and all that can be reached from the
    module, such as buffers, metrics, frozen networks, lists, arrays and objects of your own. The validation loader is
    requested a second time, so a random split belongs into ``setup``, not ``val_dataloader``.

    Accumulated batches keep their graphs only for second derivatives. Decoupled decays (AdamW) are no curvature.

    Args:
        hyperparameters: :class:`Hyperparameter` objects, or dotted names of tensors or submodules of the module,
            which are then taken out of the inner optimizer.
        optimizer: Function from the list of unconstrained tensors to a torch optimizer; default Adam with a rate that
            ends at zero with the run.
        scheduler: Function from that optimizer to a scheduler, stepped once an outer step.
        solver: Solver that finds H⁻¹v; default ``KroneckerFactored()`` with ``LookAhead()``, else ``Neumann()``.
        curvature: Approximation of H: ``Hessian()`` (None), ``GaussNewton(outputs="name of the submodule that returns
            the logits")``, ``FiniteDifference()`` (evaluates ``training_step`` again, without side effects).
        at: Where the outer loss is differentiated: ``LookAhead()`` (None), or ``Current()`` for the current weights.
            For ``ExampleWeights`` or ``GroupWeights`` alone: ``Current()`` and ``KroneckerFactored(relative=0.3)``.
        overhead: Share of the training's gradients that outer steps may cost, if ``every_n_steps`` is not given.
        every_n_steps: Inner optimizer steps per outer step; default by ``overhead`` and the length of the run.
        warmup_steps: Inner steps before the first outer step; default a tenth of the run, 70 % for a rate alone.
        restart_every: Re-initialise weights and inner optimizer state after this many outer steps; None: never.
        outer_dataloader: Loader, or function that returns one, in place of the validation data of ``fit``.
        train_batches: Training batches on which each outer step finds ∂²L_T/∂w∂λ, as the difference of ∂L_T/∂λ at two
            weights near the current ones; 0: on the current batch alone, by differentiating twice. Default: 0, but
            with ``ExampleWeights`` as many as ``overhead`` allows, unless the solver forms products.
        log_every_n_outer_steps: Log diagnostics and values at every n-th outer step; 0: never.
        max_skipped: Successive outer steps that may fail (non-finite values, no positive curvature) before the run
            ends with ``FloatingPointError``; failed steps are skipped, counted and logged.
        self_check: Check products at the first outer step (one gradient more, at most four); warn of what is wrong.

    Raises:
        MisconfigurationException: In ``setup`` or at the start of ``fit``: manual optimization, a strategy that
            shards parameters (but ``ModelParallelStrategy``), no validation data, no outer loss, unknown names.
        ValueError: An argument is out of range.
    """

    every_n_steps, warmup_steps = _Planned(), _Planned()
    restart_every, log_every_n_outer_steps, max_skipped = OfLoop(), OfLoop(), OfLoop()

    def __init__(
        self,
        hyperparameters: Hyperparameter | str | Sequence[Hyperparameter | str],
        *,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        solver: InverseSolver | None = None,
        curvature: Curvature | None = None,
        at: EvaluationPoint | None = None,
        overhead: float = 0.3,
        every_n_steps: int | None = None,
        warmup_steps: int | None = None,
        restart_every: int | None = None,
        outer_dataloader: Any = None,
        train_batches: int | None = None,
        log_every_n_outer_steps: int = 10,
        max_skipped: int = 10,
        self_check: bool = True,
    ) -> None:
        self.outer = OuterStep(
            as_hyperparameters(hyperparameters),
            optimizer=optimizer if optimizer is not None else default_outer_optimizer,
            scheduler=scheduler,
            solver=solver,
        )
        if optimizer is not None or scheduler is not None:
            refuse_shrink(self.outer.decays)
        self.plan = OuterPlan(
            self.outer,
            point=at,
            solver=solver,
            overhead=overhead,
            every_n_steps=every_n_steps,
            warmup_steps=warmup_steps,
            default_optimizer=optimizer is None and scheduler is None,
        )
        self.outer_loop = OuterLoop(
            "HypergradientCallback",
            self.outer,
            every_n_steps=1 if every_n_steps is None else every_n_steps,
            warmup_steps=0 if warmup_steps is None else warmup_steps,
            restart_every=restart_every,
            max_skipped=max_skipped,
            log_every_n_outer_steps=log_every_n_outer_steps,
            self_check=self_check,
            train_batches=train_batches,
        )
        self.curvature, self.outer_dataloader = curvature, outer_dataloader
        self._options = OptionTuner(self.outer)
        self._saved: Mapping[str, Any] | None = None  # checkpoint state waiting for on_fit_start
        self._graph: InnerGraph | None = None  # from on_fit_start on
        self._attempted = False  # whether this step's hypergradient was tried
        self._placeholders = StandIns()  # attributes of the module, during a fit
        self._methods = StandIns()  # methods of the module, during a batch

    # ---- what users override

    def should_update(self, trainer: Trainer, step: int) -> bool:
        """Return True if there is an outer step at inner step ``step``, counted from 0; the same on all processes."""
        return self.outer_loop.is_due(step)

    def outer_loss(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor:
        """Return the outer loss of a batch, a scalar with its graph."""
        batches = self.outer_loop.batches
        return modules_outer_loss(trainer, pl_module, batch, 0 if batches is None else batches.index)

    # ---- lifecycle

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(hyperparameters=[h.name for h in self.outer.hyperparameters])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        check_settings(trainer, pl_module, HypergradientCallback)
        self.use.at_end(self.outer_loop.stop, self._let_go)
        # A second fit of the same module continues with the current values.
        if self.use.changed & {"module", "datamodule"}:
            self.outer_loop.reset()
            self.plan.reset()
        self.outer_loop.prepare()
        # A search for the learning rate or batch size may run before on_fit_start.
        replace_placeholders(pl_module, self.outer.hyperparameters, self._placeholders, complete=False)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        # The module is complete only now, after its own setup() and configure_model().
        replace_placeholders(pl_module, self.outer.hyperparameters, self._placeholders)
        attach_hyperparameters(pl_module, self.outer.hyperparameters, self.use)
        take_out(optimizer, self.outer)
        self.outer_loop.start(trainer, self.outer_dataloader)
        self._options.begin(trainer, pl_module, self.use)
        self.plan.schedule(trainer, self.outer_loop)
        curvature = curvature_of_run(trainer, self.plan, self.outer_loop, self.curvature)
        self._graph = InnerGraph.of_training(trainer, pl_module, curvature)
        self._collect(trainer, pl_module, wait=self._saved is None)
        if self.outer.decays:
            warn_of_own_decay(optimizer)
        self.outer_loop.remember_initial(self.outer_loop.parameters)
        if self._saved is not None:
            self._restore(self._saved)
        tell_plan("HypergradientCallback", trainer, self.plan, self.outer_loop.parameters, curvature)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear_window()
        self._saved = None
        # The optimizer's state has been restored since.
        self.plan.take_decays()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The Trainer itself begins with zero gradients here.
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._clear_window()
            if not self.outer_loop.is_built_for(trainer.optimizers[0]):
                self._collect(trainer, pl_module, wait=True)
            self.plan.foresee(partial(self.should_update, trainer), self.inner_steps)
            self._options.watch(trainer, partial(self.should_update, trainer), self.inner_steps)
        self.plan.pause(False, batch)
        # Repeats cost a snapshot of the random state: only where an outer step is foreseen.
        check, inner = self.outer_loop.check, self._inner
        wanted = inner.repeats or check.is_due or self.plan.looks_ahead
        foreseen = wanted and self._is_due(trainer)
        again = foreseen and (self.plan.looks_ahead or check.is_due) and check.may_repeat(pl_module)
        if again or (inner.observes and (foreseen or not inner.repeats)):
            self._inner.observe_step(trainer, self._methods, batch, batch_idx, again=again)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        outer_loss = partial(self.outer_loss, trainer, pl_module)
        if not self.outer_loop.parameters:  # lazy ones, which the first forward has made
            self._collect(trainer, pl_module)
        before_backward(trainer, self.plan, self._inner, loss)
        self._options.observe(trainer, pl_module, loss, self.plan)
        # LBFGS calls the closure many times: its first evaluation is at the point where the step begins.
        if self._attempted or not self._is_due(trainer):
            self.outer_loop.probe(trainer, pl_module, outer_loss)
            return
        self._inner.add(loss)
        if accumulates(trainer):
            if needs_graph(self.plan, self._inner.curvature_in_use):
                keep = partial(backward_or_differences, pl_module, self._inner, self.outer_loop.check)
                self._methods.put(pl_module, "backward", partial(keep, pl_module.backward))
            return
        self._attempted = True
        try_outer_step(pl_module, self.outer_loop, self.plan, self._inner, outer_loss, self._options)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._methods.put_back()
        self.plan.pause(True)
        self.outer.clear_gradients()
        if self.outer_loop.check.is_due and self._attempted and trainer.world_size == 1:
            self.outer_loop.check.hidden(self._inner.losses, self.outer_loop.parameters)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.outer_loop.conclude()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        prepare_step(trainer, optimizer, self.plan, self.outer_loop.parameters, self._options)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if accumulates(trainer):
            return
        self.outer_loop.inner_steps += 1
        self.plan.fit_decays(self.outer_loop.parameters, self.inner_steps)
        if self.outer.pending and self.outer_loop.step(pl_module):
            self._options.clear()
        self._clear_window()

    @override
    def state_dict(self) -> dict[str, Any]:
        # Saved before fit began.
        if not self.outer_loop.parameters:
            return dict(self._saved or {})
        own = {"initial": self.outer_loop.initial, "plan": self.plan.state_dict()}
        return {**self.outer_loop.state_dict(), **own, **self._options.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._saved = state_dict
        # Some strategies restore after on_fit_start.
        if self.outer_loop.parameters:
            self._restore(state_dict)

    def _restore(self, state: Mapping[str, Any]) -> None:
        # The decays' bounds come first: values are read with them.
        if "plan" in state:
            self.plan.load_state_dict(state["plan"])
        self.outer_loop.load_state_dict(state)
        self.plan.continue_schedule(self.outer_loop)
        self._options.load_state_dict(state)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        give_back_saved(checkpoint, self.plan, self._options)

    # ---- inside a step

    @property
    def _inner(self) -> InnerGraph:
        assert self._graph is not None
        return self._graph

    def _is_due(self, trainer: Trainer) -> bool:
        return self.should_update(trainer, self.inner_steps) or self.outer_loop.is_last_chance(trainer)

    def _collect(self, trainer: Trainer, module: LightningModule, *, wait: bool = False) -> None:
        """Name the parameters of the inner optimizer, and build the hyperparameters for them."""
        parameters = named_parameters(trainer, module, self.outer_loop, wait=wait)
        if parameters:
            self.outer_loop.build(parameters, trainer.strategy.root_device)
            self.plan.attach(module, parameters, trainer.optimizers[0])

    def _clear_window(self) -> None:
        """Leave nothing of an earlier window of accumulated batches, wherever it was broken off."""
        if self._graph is not None:
            self._graph.clear()
        self._attempted = False
        self.outer.discard()
        self._methods.put_back()

    def _let_go(self) -> None:
        """Leave the module as it was before ``fit``."""
        self._clear_window()
        self._placeholders.put_back()
        if self._graph is not None:
            self._graph.close()
        self.plan.stop()
        self._saved = None
