"""LightningModule that learns its network's best weights as a function of hyperparameters, and tunes through it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.hypernetworks.linearized import Weights
from lightning_nested.hypernetworks.loops import DeltaSTN, ResponseLoop
from lightning_nested.hypernetworks.response import Mode
from lightning_nested.hyperparameters import Hyperparameter, OuterStep
from lightning_nested.modules.hypernetwork.options import ResponseOptions
from lightning_nested.modules.hypernetwork.problem import ResponseLoss, ResponseProblem, two_optimizers
from lightning_nested.modules.hypernetwork.saved_scale import load_scale_state, scale_state
from lightning_nested.modules.hypernetwork.setup import (
    build_response,
    each_example_alone,
    epoch_schedulers,
    examples_in,
    refuse_settings,
    through_the_loss,
)
from lightning_nested.modules.hypernetwork.steps import ResponseSteps
from lightning_nested.trainer.attributes import bind_hyperparameters
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.outer_loop_owners import HasOuterLoop, state_of_outer_steps
from lightning_nested.trainer.requirements import require_hooks
from lightning_nested.trainer.use import OneFitModule, Use

_HOOKS = "setup, on_fit_start and on_train_start"


def default_weights_optimizer(parameters: Any) -> Optimizer:
    """SGD of rate 0.1 and momentum 0.9."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def default_response_optimizer(parameters: Any) -> Optimizer:
    """Adam of rate 1e-3."""
    return torch.optim.Adam(parameters, lr=1e-3)


def default_hyperparameter_optimizer(tensors: Any) -> Optimizer:
    """Adam of rate 0.01."""
    return torch.optim.Adam(tensors, lr=0.01)


@checked
class HypernetworkModule(HasOuterLoop, OneFitModule, LightningModule):
    """Train a network together with its response to hyperparameters, and tune them through it; to be extended.

        class Tuned(HypernetworkModule):
            def __init__(self, **kwargs):
                super().__init__(SmallCNN(), [WeightDecay(), Brightness(), LabelSmoothing()], **kwargs)

            def inner_loss(self, batch, values):              # a training batch, at values that are tried
                images, labels = batch
                return self.label_smoothing(self.network(self.brightness(images)), labels)

            def outer_loss(self, batch):                      # a validation batch
                return F.cross_entropy(self.network(batch[0]), batch[1])

    ``self.network(x)`` is the network at the hyperparameters that are being tried, and at the current ones λ̂
    everywhere else. The outer gradient is ∂L_V/∂w · ∂w_φ/∂λ: no derivative of the training loss with respect to λ
    is needed, so whole numbers, choices and random masks can be tuned. Weight decays are added to the inner loss,
    dropout and drop-connect rates reach the network by themselves.

    Optimization is manual; ``trainer.global_step`` counts training steps. Each step draws from its own random streams,
    so a resumed run is bit-identical to one that never stopped. In a data-parallel run each process tries other
    hyperparameters, and λ̂ stays equal. Overrides of ``setup``, ``on_fit_start``, ``on_train_start``,
    ``on_save_checkpoint`` and ``on_load_checkpoint`` call ``super()``'s. Lorraine & Duvenaud (2018), arXiv 1802.09419;
    further papers at the loops.

    Args:
        network: Any module, which :func:`best_response` converts; or a :class:`Response`, such as
            ``FactorisedResponse(module, n)``.
        hyperparameters: One or several to tune.
        loop: ``DeltaSTN()``, ``STN()``, ``Local()``, ``Simplified()`` or ``Global(response_steps=...)``.
        weights_optimizer: From w₀ to its optimizer.
        response_optimizer: From φ to its optimizer.
        outer_optimizer: From λ's unconstrained tensors to their optimizer.
        scale_optimizer: From the perturbation's unconstrained scales to their optimizer.
        weights_scheduler: Stepped after each epoch.
        response_scheduler: Stepped after each epoch.
        outer_scheduler: Stepped after each step of λ.
        options: Points per batch, refinement, monitor, clipping, logging.

    Attributes:
        network: The response; see :class:`Response`.
        inner_steps: Training steps made so far.

    Raises:
        ValueError: Arguments that contradict each other.
        MisconfigurationException: In ``fit``: settings the module cannot work with.
    """

    def __init__(
        self,
        network: nn.Module,
        hyperparameters: Hyperparameter | Sequence[Hyperparameter],
        *,
        loop: ResponseLoop = DeltaSTN(),  # noqa: B008 - frozen
        weights_optimizer: OptimizerCallable = default_weights_optimizer,
        response_optimizer: OptimizerCallable = default_response_optimizer,
        outer_optimizer: OptimizerCallable = default_hyperparameter_optimizer,
        scale_optimizer: OptimizerCallable = default_hyperparameter_optimizer,
        weights_scheduler: LRSchedulerCallable | None = None,
        response_scheduler: LRSchedulerCallable | None = None,
        outer_scheduler: LRSchedulerCallable | None = None,
        options: ResponseOptions = ResponseOptions(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        tuned = through_the_loss(hyperparameters)
        self.loop, self.options = loop, options
        self.outer = OuterStep(tuned, optimizer=outer_optimizer, scheduler=outer_scheduler)
        self.outer_loop = OuterLoop(
            "HypernetworkModule",
            self.outer,
            max_skipped=options.max_skipped,
            log_every_n_outer_steps=options.log_every_n_outer_steps,
        )
        self.network, self.vector = build_response(network, self.outer)
        self._make = (weights_optimizer, response_optimizer)
        self._make_schedulers = (weights_scheduler, response_scheduler)
        self.scale: Tensor | None = loop.perturbation.initial(self.vector.flat().detach())
        self._scale_optimizer: Optimizer | None = None
        if self.scale is not None:
            self.scale.requires_grad_()
            self._scale_optimizer = scale_optimizer([self.scale])
        self.per_example = each_example_alone(self.vector, self.network, options)
        self._steps: ResponseSteps | None = None
        self._use = Use()
        bind_hyperparameters(self, tuned)
        self._follow()

    # ---- what users write and read

    @abstractmethod
    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss of a batch: a scalar with its graph, without tuned weight decays.

        Args:
            batch: Batch of the training data.
            values: Tried values in natural units by ``name`` or ``name/key``; of shape (batch, …) where each
                example has its own.
        """
        raise NotImplementedError(f"{type(self).__name__} must define inner_loss(self, batch, values).")

    @abstractmethod
    def outer_loss(self, batch: Any) -> Tensor:
        """Return the validation loss of a batch: a scalar with its graph."""
        raise NotImplementedError(f"{type(self).__name__} must define outer_loss(self, batch).")

    def outer_dataloader(self) -> Any:
        """Return a loader of the outer batches; None: the validation data of ``fit``."""
        return None

    def num_examples(self, batch: Any) -> int:
        """Return the length of the batch's first tensor, in dimension ``batch_dim`` of the response."""
        return examples_in(batch, self.network.layers.batch_dim)

    @override
    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return the network's output at λ̂."""
        return self.network(*inputs, **options)

    def export(self, values: Mapping[str, Any] | None = None) -> nn.Module:  # type: ignore[override]
        """Return the plain network with the best-response weights: no hypernetwork left.

        The values themselves are written by :meth:`export_values`.

        Args:
            values: In natural units by ``name`` or ``name/key``; what is not named is at λ̂.

        Raises:
            ValueError: A value lies outside its interval, or a name is unknown.
        """
        h = self.vector.at_values(values or {})
        with self.vector.bound(h):
            return self.network.export(h)

    def scales(self) -> dict[str, Tensor]:
        """Standard deviations of the perturbation in unconstrained units, by hyperparameter; empty if not learned."""
        if self.scale is None:
            return {}
        tuned = self.vector.hyperparameters
        sizes = [sum(t.numel() for t in h.tensors.values()) for h in tuned]
        pieces = torch.split(functional.softplus(self.scale.detach()), sizes)
        return {h.name: piece for h, piece in zip(tuned, pieces, strict=True)}

    # ---- lifecycle

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizers of w₀ and φ; this module, not the Trainer, steps those of λ and the scales."""
        groups = (self.network.general_parameters(), self.network.response_parameters())
        optimizers = [make(list(g.values())) for make, g in zip(self._make, groups, strict=True)]
        return optimizers, epoch_schedulers(self._make_schedulers, optimizers)

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._use.begin(self, self.trainer, self)
            self._use.at_end(self.outer_loop.stop, self._free)
            refuse_settings(self.trainer)
            self.outer_loop.prepare(self.options)

    @override
    def on_fit_start(self) -> None:
        self._move()

    def _move(self) -> None:
        """Move what the Trainer does not know to the module's device, and the network to λ̂."""
        for tensor in (*self.vector.tensors, *([] if self.scale is None else [self.scale])):
            # the same leaves: their optimizers hold them
            tensor.data = tensor.data.to(self.device)
        for optimizer in (self.outer.optimizer, self._scale_optimizer):
            if optimizer is not None:
                # moves the optimizer's state to the device of the leaves
                optimizer.load_state_dict(optimizer.state_dict())
        self._follow()

    @override
    def on_train_start(self) -> None:
        self._move()  # a search for the batch size runs before on_fit_start
        weights_optimizer, response_optimizer = two_optimizers(self)
        problem = ResponseProblem(
            module=self,
            training_loss=self._loss(),
            inner_loss=lambda batch: self.training_loss(batch, self.vector.flat().detach()),
            outer_loss=self.outer_loss,
            num_examples=self.num_examples,
            optimizer=weights_optimizer,
            response_optimizer=response_optimizer,
            parameters={  # general names are the user's, and could be those of the response
                **{f"module.{name}": p for name, p in self.network.general_parameters().items()},
                **self.network.response_parameters(),
            },
            outer=self.outer,
            batches=self.outer_loop.start(self.trainer, self.outer_dataloader()),
            accumulate=1,
            clip=self.options.gradient_clip_val,
            clip_algorithm=self.options.gradient_clip_algorithm,
            loop=self.loop,
            options=self.options,
            scale=self.scale,
            per_example=self.per_example,
        )
        self._steps = ResponseSteps(problem)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        require_hooks(self._steps is not None, self, "HypernetworkModule", _HOOKS)
        steps = self._steps
        assert steps is not None
        trained = self.loop.trains(self.inner_steps)
        if trained:
            loss = steps.inner(batch, self.inner_steps)
            self.outer_loop.inner_steps += 1
        count = self.loop.outer_steps(self.inner_steps)
        for _ in range(count or self.outer_loop.is_last_chance(self.trainer)):
            self._outer_step(steps, batch)
        if not trained:
            loss = torch.tensor(self.last_report.outer_loss if self.last_report else math.nan)
        if self.trainer.is_last_batch:
            for config in self.trainer.lr_scheduler_configs:
                self.lr_scheduler_step(config.scheduler, None)
        return {"loss": loss}

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Log the outer loss at λ̂ as ``val_loss``; to be overridden."""
        loss = self.outer_loss(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=self.num_examples(batch))
        return loss

    @override
    def on_train_end(self) -> None:
        # Loops begin with steps of the response alone: a short run is no mistake.
        if self.outer_steps:
            self.outer_loop.conclude()

    def _free(self) -> None:
        self._steps = None

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hypernetwork"] = {
            **self.outer_loop.state_dict(),
            **scale_state(self.scale, self._scale_optimizer),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = state_of_outer_steps(checkpoint, "hypernetwork", "HypernetworkModule")
        if state is None:
            return
        # The response was trained as a function of unconstrained tensors, in this order: none may mean anything else.
        self.outer_loop.load_state_dict(state, keys=("scale", "scale_optimizer"), convert=False)
        load_scale_state(state, self.scale, self._scale_optimizer, self.loop)

    # ---- steps

    def training_loss(
        self, batch: Any, h: Tensor, mode: Mode = "response", weights: Weights | None = None
    ) -> Tensor:
        """Return the inner loss with its penalties at h, (n,) or (batch, n); see :meth:`Response.at`."""
        return self._loss()(batch, h, mode, weights=weights, repeated=mode == "linearized")

    def _loss(self) -> ResponseLoss:
        return ResponseLoss(self, self.inner_loss, self.network, self.vector, self.outer, self.inner_steps)

    def _outer_step(self, steps: ResponseSteps, batch: Any) -> None:
        try:
            report = steps.outer_gradients(batch, self.outer_steps, self.skipped_steps)
        except FloatingPointError as error:
            self.outer_loop.skip(error)
            return
        self.outer_loop.keep(report)
        self.outer_loop.step(self)
        if self._scale_optimizer is not None:
            self._scale_optimizer.step()
        self._follow()
        steps.log(batch, self.outer_steps, self.scales() if self.outer_loop.logs(self.outer_steps) else {})

    def _follow(self) -> None:
        """Move the network to λ̂, and its center too if the loop wants it there."""
        h = self.vector.flat().detach()
        if self.loop.centred and not torch.equal(h, self.network.center):
            if self.outer_steps == 0 and not bool(self.network.center.any()):
                self.network.center.copy_(h)  # the first center: w₀ is what the user gave
            else:
                self.network.recenter(h)
        self.network.bind(h)
