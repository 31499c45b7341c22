"""Tune hyperparameters by their validation gradient while an unmodified LightningModule trains."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_nested.hypergradient import Curvature, FiniteDifference, GaussNewton, InverseSolver, Neumann
from lightning_nested.hyperparameters import (
    BoundHyperparameter,
    Hyperparameter,
    ModuleTensors,
    OuterReport,
    OuterStep,
)
from lightning_nested.hyperparameters.module_tensors import as_hyperparameters
from lightning_nested.hyperparameters.outer_step import default_outer_optimizer
from lightning_nested.optim.step_dynamics import coupled_decay, trainable
from lightning_nested.trainer.isolation import untouched_buffers, without_trace
from lightning_nested.trainer.lightning import accumulates, reduction, step_loss
from lightning_nested.trainer.outer_batches import OuterBatches
from lightning_nested.trainer.outer_loop import log_outer_step, reinitialize
from lightning_nested.trainer.outer_loss import evaluate_outer
from lightning_nested.trainer.random_stream import RandomStream, base_seed
from lightning_nested.trainer.requirements import named_outputs, refuse_strategy
from lightning_nested.trainer.stand_ins import StandIns


class HypergradientCallback(Callback):
    """Tunes hyperparameters inside one ``fit``, by the gradient of the validation loss through the training.

    At the steps chosen by :meth:`should_update` the callback takes the training loss with its graph, as the Trainer
    hands it to ``on_before_backward``, and a batch of the validation data; finds
    dL_V/dλ = −(∂L_V/∂w) H⁻¹ ∂²L_T/∂w∂λ there, and after the optimizer's step moves λ along it. There is no second
    forward of the training loss and no second call of ``training_step``. Weight decays are added to the gradients
    in closed form before they are clipped. In a data-parallel run every product is averaged, so that the
    hypergradient is that of the global batch. Lorraine, Vicol & Duvenaud (2020), AISTATS, PMLR 108:1540-1552.

    The outer loss is the module's ``outer_loss(batch)`` if it has one, else what ``validation_step`` returns, in
    evaluation mode. Buffers, metrics, plain attributes, logs and random numbers of the run are untouched by it. The
    validation loader is asked for a second time, so a random split belongs into ``setup``, not ``val_dataloader``.

    Under ``accumulate_grad_batches`` the graphs of all batches of an outer step are kept until its last batch.
    A decoupled decay of the inner optimizer (AdamW) is not part of the curvature; a coupled one (SGD) is.

    Args:
        hyperparameters: What is tuned: :class:`Hyperparameter` objects, or dotted names of tensors or submodules of
            the module, which are then taken out of the inner optimizer.
        optimizer: From the list of unconstrained tensors to a torch optimizer; default Adam of rate 0.05.
        scheduler: From that optimizer to a scheduler, stepped once an outer step.
        solver: How H⁻¹v is found.
        curvature: What stands for H: ``Hessian()`` (None), ``GaussNewton(outputs="name of the submodule that returns
            the logits")``, ``FiniteDifference()`` (evaluates ``training_step`` again, without trace).
        every_n_steps: Inner optimizer steps per outer step.
        warmup_steps: Inner steps before the first outer step.
        restart_every: Re-initialise weights and inner optimizer state after this many outer steps; None: never.
        outer_dataloader: A loader, or a function that returns one, in place of the validation data of ``fit``.
        log_every_n_outer_steps: Log diagnostics and values at every n-th outer step; 0: never.
        max_skipped: Successive outer steps that may fail (non-finite values, no positive curvature) before the run
            ends with ``FloatingPointError``; failed steps are skipped, counted and logged.

    Raises:
        MisconfigurationException: In ``setup`` or at the start of ``fit``: manual optimization, a strategy that
            shards parameters, no validation data, no outer loss, unknown names.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        hyperparameters: Hyperparameter | str | Sequence[Hyperparameter | str],
        *,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = default_outer_optimizer,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        solver: InverseSolver | None = None,
        curvature: Curvature | None = None,
        every_n_steps: int = 1,
        warmup_steps: int = 0,
        restart_every: int | None = None,
        outer_dataloader: Any = None,
        log_every_n_outer_steps: int = 10,
        max_skipped: int = 10,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("warmup_steps", warmup_steps, 0),
            ("restart_every", restart_every, 1),
            ("log_every_n_outer_steps", log_every_n_outer_steps, 0),
            ("max_skipped", max_skipped, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}. Got {value}.")
        self.outer = OuterStep(
            as_hyperparameters(hyperparameters),
            optimizer=optimizer,
            scheduler=scheduler,
            solver=solver if solver is not None else Neumann(),
        )
        self.curvature = curvature
        self.every_n_steps, self.warmup_steps, self.restart_every = every_n_steps, warmup_steps, restart_every
        self.outer_dataloader = outer_dataloader
        self.log_every_n_outer_steps, self.max_skipped = log_every_n_outer_steps, max_skipped
        self.inner_steps = self.outer_steps = self.skipped_steps = 0
        self.last_report: OuterReport | None = None
        self._skipped_in_a_row = 0
        self._saved: Mapping[str, Any] | None = (
            None  # a checkpoint's state that came before there was where to put it
        )
        self._batches: OuterBatches | None = None
        self._position: dict[str, int] = {}  # of the outer batches, once they are gone
        self._parameters: dict[str, nn.Parameter] = {}
        self._module: LightningModule | None = None
        self._initial: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []  # of the window of accumulated batches
        self._evaluations: list[Callable[[], Tensor]] = []  # the same, to be run again by FiniteDifference
        self._again: Callable[[], Tensor] | None = None  # the present batch's
        self._outputs: list[Tensor] = []  # of the submodule that GaussNewton names
        self._attempted = False  # an outer step in this window, whether or not it could be made
        self._handle: RemovableHandle | None = None
        self._bound = StandIns()  # hyperparameters, for attributes of the module, during a fit
        self._methods = StandIns()  # of the module, during a batch

    # ---- what users read and override

    def values(self) -> dict[str, Tensor]:
        """Tuned values in natural units, by ``name`` or ``name/key``; available from the start of ``fit``.

        A strategy that forks or spawns processes trains a copy of the callback: there, read them in a hook, or from
        a checkpoint.
        """
        return self.outer.values()

    def should_update(self, trainer: Trainer, step: int) -> bool:
        """Whether there is an outer step at inner step ``step``, counted from 0; must agree on all processes."""
        return step >= self.warmup_steps and (step - self.warmup_steps) % self.every_n_steps == 0

    def outer_loss(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor:
        """The outer loss of a batch, a scalar with its graph."""
        own = getattr(pl_module, "outer_loss", None)
        loss = own(batch) if callable(own) else step_loss(trainer, pl_module, "validation_step", batch, 0)
        if not isinstance(loss, Tensor):
            raise MisconfigurationException(
                f"The outer loss must be a tensor. Got {type(loss).__name__} from {type(pl_module).__name__}; "
                f"return the loss from validation_step, or add:\n{_OUTER_LOSS}"
            )
        if loss.numel() != 1:
            raise MisconfigurationException(
                f"The outer loss of {type(pl_module).__name__} must be a scalar. Got shape {tuple(loss.shape)}; "
                "return its mean."
            )
        if not loss.requires_grad:
            raise MisconfigurationException(
                f"The outer loss of {type(pl_module).__name__} must depend on its parameters. Got a tensor without "
                "graph: remove torch.no_grad() and .detach() from its computation, or define outer_loss(self, batch)."
            )
        return loss

    # ---- lifecycle

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(hyperparameters=[h.name for h in self.outer.hyperparameters])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"HypergradientCallback works with automatic optimization. Got {name} with "
                "automatic_optimization=False; extend lightning_nested.modules.NestedModule for a loop of your own."
            )
        refuse_strategy(trainer, "HypergradientCallback", static_graph=False)
        others = [c for c in trainer.callbacks if isinstance(c, HypergradientCallback) and c is not self]  # type: ignore[attr-defined]
        if others:
            raise MisconfigurationException(
                "One HypergradientCallback tunes all hyperparameters: another's decays would be missing from its "
                f"curvature. Got {1 + len(others)}; give one of them the list."
            )
        if isinstance(self.curvature, GaussNewton) and trainer.accumulate_grad_batches > 1:
            raise MisconfigurationException(
                "GaussNewton(outputs=...) sees one batch. Got "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}; use Hessian(), or set it to 1."
            )
        if not callable(getattr(pl_module, "outer_loss", None)) and not is_overridden(
            "validation_step", pl_module
        ):
            raise MisconfigurationException(
                f"HypergradientCallback needs an outer loss. Got {name} without outer_loss and validation_step; "
                f"add:\n{_OUTER_LOSS}"
            )
        if trainer.accumulate_grad_batches > 1:
            self._check_backward(pl_module)
        for hyperparameter in self.outer.hyperparameters:
            if isinstance(hyperparameter, BoundHyperparameter):
                self._bind(hyperparameter, pl_module)
        if isinstance(self.curvature, GaussNewton):
            self._handle = named_outputs(pl_module, self.curvature).register_forward_hook(self._keep_outputs)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        if self._module is not pl_module:  # a second fit of the same module goes on with the values it has
            if self._module is not None:
                self.outer.reset()
            self._module, self._parameters = pl_module, {}
            self.inner_steps = self.outer_steps = self.skipped_steps = self._skipped_in_a_row = 0
        for hyperparameter in self.outer.hyperparameters:
            if isinstance(hyperparameter, ModuleTensors):
                hyperparameter.attach(pl_module)
        self._take_out(optimizer)
        self._collect(optimizer, pl_module, trainer.strategy.root_device)
        self._warn_two_decays(optimizer)
        if self.restart_every is not None:
            self._initial = {n: p.detach().clone() for n, p in self._parameters.items()}
        if self._saved is not None:
            self._restore(self._saved)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clear_window()
        self._batches = OuterBatches(trainer, self.outer_dataloader, seed=base_seed(trainer))
        if self._saved is not None:
            if self._saved["batches"]:
                self._batches.load_state_dict(self._saved["batches"])
            self._saved = None

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (
            batch_idx % trainer.accumulate_grad_batches == 0
        ):  # where the Trainer itself begins with zero gradients
            self._clear_window()
            if not self._same_parameters(trainer.optimizers[0]):  # frozen or unfrozen meanwhile
                self._collect(trainer.optimizers[0], pl_module, trainer.strategy.root_device)
        if isinstance(self.curvature, FiniteDifference) and self.should_update(trainer, self.inner_steps):
            self._note_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # LBFGS calls the closure many times: its first evaluation is at the point where the step begins.
        if self._attempted or not self.should_update(trainer, self.inner_steps):
            return
        self._losses.append(loss)
        if self._again is not None:
            self._evaluations.append(self._again)
        if accumulates(trainer):
            # The graph is needed once more at the window's last batch.
            self._methods.put(pl_module, "backward", partial(pl_module.backward, retain_graph=True))
            return
        self._attempted = True
        with untouched_buffers(pl_module):  # torch.utils.checkpoint runs the forward again in every product
            self._outer_step(trainer, pl_module)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._methods.put_back()
        self.outer.clear_gradients()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # A fused optimizer takes the scale of fp16 off itself, after this.
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        for decay in self.outer.decays:
            decay.add_gradient_(self._parameters, _loss_scale(trainer) if fused else 1.0)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if accumulates(trainer):
            return
        self.inner_steps += 1
        pending = self.outer.pending
        self.outer.apply()
        self._clear_window()
        if pending:
            self.outer_steps += 1
            self._log(trainer, pl_module)
            if self.restart_every is not None and self.outer_steps % self.restart_every == 0:
                self._restart(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._clear_window()
        self._bound.put_back()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._bound.put_back()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._batches is not None:
            self._position = self._batches.state_dict()
            self._batches = None  # lets worker processes end

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._parameters:  # saved before fit began
            return dict(self._saved) if self._saved is not None else {}
        return {
            "outer": self.outer.state_dict(),
            "batches": self._outer_position(),
            "inner_steps": self.inner_steps,
            "outer_steps": self.outer_steps,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "initial": self._initial,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._saved = state_dict
        if self._parameters:  # the strategy restores after on_fit_start
            self._restore(state_dict)

    # ---- the outer step

    def _outer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._batches is not None
        reduce = reduction(trainer)
        outer_loss = evaluate_outer(
            trainer,
            pl_module,
            self._batches,
            lambda batch: self.outer_loss(trainer, pl_module, batch),
            (*self._parameters.values(), *self.outer.in_graph_tensors),
            scale=_loss_scale(trainer),
        )
        log = self._logs_at(self.outer_steps + 1)
        try:
            self.last_report = self.outer.compute(
                self._inner_loss(),
                outer_loss,
                self._parameters,
                curvature=self._resolved_curvature(trainer),
                reduce=reduce,
                fixed_decay=coupled_decay(trainer.optimizers[0]),
                inner_scale=_loss_scale(trainer),
                compare_identity=log,
            )
            self._skipped_in_a_row = 0
        except FloatingPointError as error:
            self._skip(error)

    def _inner_loss(self) -> Tensor | Callable[[], Tensor]:
        """What the optimizer is about to step on: the sum over the window, as the Trainer scaled it."""
        if isinstance(self.curvature, FiniteDifference):
            evaluations = list(self._evaluations)
            return lambda: torch.stack([evaluate() for evaluate in evaluations]).sum()
        return self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).sum()

    def _note_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Have the random numbers noted when ``training_step`` begins: after every hook that may draw some."""
        step, device = module.training_step, trainer.strategy.root_device

        def noted(*args: Any, **kwargs: Any) -> Any:
            start = RandomStream.snapshot(device)
            self._again = partial(self._evaluate_again, trainer, module, batch, batch_idx, start)
            self._methods.put_back()
            return step(*args, **kwargs)

        self._methods.put(module, "training_step", functools.wraps(step)(noted))

    def _evaluate_again(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, start: RandomStream
    ) -> Tensor:
        """The training loss of a batch once more, with the masks of its first evaluation and without trace."""
        with start.replay(), without_trace(pl_module, trainer), trainer.precision_plugin.train_step_context():
            loss = step_loss(trainer, pl_module, "training_step", batch, batch_idx)
        assert isinstance(loss, Tensor)
        return loss * (_loss_scale(trainer) / trainer.accumulate_grad_batches)

    def _resolved_curvature(self, trainer: Trainer) -> Curvature | None:
        curvature = self.curvature
        if not isinstance(curvature, GaussNewton):
            return curvature
        if len(self._outputs) != 1 or len(self._losses) != 1:
            raise MisconfigurationException(
                f"GaussNewton(outputs={curvature.outputs!r}) must name a submodule that training_step calls once and "
                f"that returns one tensor, in one batch a step. Got {len(self._outputs)} outputs in "
                f"{len(self._losses)} batch(es); use Hessian()."
            )
        return GaussNewton(outputs=self._outputs[0])

    def _keep_outputs(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training and isinstance(output, Tensor) and output.requires_grad:
            self._outputs.append(output)

    def _skip(self, error: FloatingPointError) -> None:
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self.max_skipped:
            raise FloatingPointError(
                f"More than max_skipped={self.max_skipped} successive outer steps failed. Got at last: {error}"
            ) from error
        if self._skipped_in_a_row == 1:
            rank_zero_warn(
                f"HypergradientCallback skipped the outer step at inner step {self.inner_steps}: {error}"
            )

    def _restart(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """New initial weights, the same on every process, and an inner optimizer without memory."""
        assert self._batches is not None
        seed = self._batches.seed + 104_729 * self.outer_steps
        reinitialize(pl_module, self._initial, self._parameters, seed)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

    # ---- logging, state

    def _logs_at(self, outer_step: int) -> bool:
        return self.log_every_n_outer_steps > 0 and (outer_step - 1) % self.log_every_n_outer_steps == 0

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._logs_at(self.outer_steps) or self.last_report is None:
            return
        log_outer_step(pl_module, self.last_report, self.values(), self.skipped_steps)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.outer.load_state_dict(state["outer"], self._parameters)
        self.inner_steps, self.outer_steps = state["inner_steps"], state["outer_steps"]
        self.skipped_steps, self._skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        if self._batches is not None and state["batches"]:
            self._batches.load_state_dict(state["batches"])
        for name, value in state["initial"].items():
            self._initial[name] = value.to(self._parameters[name].device)

    def _outer_position(self) -> dict[str, int]:
        """Of the outer batches; empty before there were any."""
        if self._batches is not None:
            return self._batches.state_dict()
        return self._saved["batches"] if self._saved is not None else self._position

    # ---- the window of accumulated batches

    def _clear_window(self) -> None:
        """Nothing is left of an earlier window, wherever it was broken off."""
        self._losses, self._evaluations, self._outputs = [], [], []
        self._again, self._attempted = None, False
        self.outer.discard()
        self._methods.put_back()

    # ---- the module

    def _bind(self, hyperparameter: BoundHyperparameter, module: LightningModule) -> None:
        """Let the module's training loss read the hyperparameter, until ``fit`` ends."""
        name = hyperparameter.name
        if not hasattr(module, name):
            raise MisconfigurationException(
                f"{type(hyperparameter).__name__} is read by the training loss through the attribute {name!r}. "
                f"Got {type(module).__name__} without it; add:\n{hyperparameter.usage}"
            )
        if getattr(module, name) not in (None, hyperparameter):
            raise MisconfigurationException(
                f"{type(hyperparameter).__name__} stands in for the attribute {name!r}, which must be None. "
                f"Got a {type(getattr(module, name)).__name__} in {type(module).__name__}; set another name=."
            )
        self._bound.put(module, name, hyperparameter)

    def _check_backward(self, module: LightningModule) -> None:
        parameters = inspect.signature(module.backward).parameters
        if "retain_graph" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return
        raise MisconfigurationException(
            "With accumulate_grad_batches the graphs are needed again at the window's last batch. Got "
            f"{type(module).__name__}.backward{inspect.signature(module.backward)}, which cannot keep one; give it "
            "**kwargs and pass them to loss.backward."
        )

    # ---- the inner optimizer

    def _same_parameters(self, optimizer: Optimizer) -> bool:
        held = trainable(optimizer)
        return len(held) == len(self._parameters) and all(map(operator.is_, held, self._parameters.values()))

    def _collect(self, optimizer: Optimizer, module: LightningModule, device: torch.device) -> None:
        """The inner parameters by name, and hyperparameters of their sizes; values that were there stay."""
        names = {id(p): n for n, p in module.named_parameters()}
        held = trainable(optimizer)
        if not held:
            raise MisconfigurationException(
                "The inner optimizer must hold at least one parameter that is not a hyperparameter. Got none."
            )
        parameters = {names.get(id(p), f"parameter{i}"): p for i, p in enumerate(held)}
        added = {n: p for n, p in parameters.items() if n not in self._parameters}
        if self._parameters and len(parameters) != len(self._parameters):
            rank_zero_info(
                f"HypergradientCallback: the inner optimizer moves {len(parameters)} tensors from now on, "
                f"{len(self._parameters)} before."
            )
        if self.restart_every is not None:
            self._initial.update({n: p.detach().clone() for n, p in added.items()})
        self._parameters = parameters
        self.outer.build(parameters, device)

    def _take_out(self, optimizer: Optimizer) -> None:
        """Remove hyperparameters that are the module's own tensors from the inner optimizer."""
        hyper = {
            id(t)
            for h in self.outer.hyperparameters
            if isinstance(h, ModuleTensors)
            for t in h.tensors.values()
        }
        removed = 0
        for group in optimizer.param_groups:
            kept = [p for p in group["params"] if id(p) not in hyper]
            removed += len(group["params"]) - len(kept)
            group["params"] = kept
        for tensor in [t for t in optimizer.state if id(t) in hyper]:
            del optimizer.state[tensor]
        if removed:
            names = [h.name for h in self.outer.hyperparameters if isinstance(h, ModuleTensors)]
            rank_zero_info(
                f"HypergradientCallback tunes {', '.join(names)} by the outer loss and took {removed} tensor(s) out of "
                "the inner optimizer."
            )

    def _warn_two_decays(self, optimizer: Optimizer) -> None:
        if any(group.get("weight_decay", 0) for group in optimizer.param_groups) and self.outer.decays:
            rank_zero_warn(
                "The inner optimizer has a weight_decay of its own beside the tuned one. Got "
                f"{type(optimizer).__name__} with {[g.get('weight_decay') for g in optimizer.param_groups]}; set it "
                "to 0, so that the tuned decay is the whole decay."
            )


_OUTER_LOSS = "def outer_loss(self, batch):\n    x, y = batch\n    return F.cross_entropy(self(x), y)"


def _loss_scale(trainer: Trainer) -> float:
    """Factor on the loss that ``on_before_backward`` receives in fp16."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
