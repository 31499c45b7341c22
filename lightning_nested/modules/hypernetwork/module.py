"""A LightningModule that learns how its network's best weights answer to hyperparameters, and tunes with it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from lightning_nested.hypernetworks.loops import DeltaSTN, ResponseLoop
from lightning_nested.hypernetworks.response import Mode, Weights
from lightning_nested.hyperparameters import (
    Hyperparameter,
    LearningRate,
    ModuleTensors,
    OuterStep,
)
from lightning_nested.modules.hypernetwork.monitor import two_optimizers
from lightning_nested.modules.hypernetwork.options import ResponseOptions
from lightning_nested.modules.hypernetwork.setup import (
    build_response,
    length_of_first_tensor,
    one_point_of_each_example,
)
from lightning_nested.modules.hypernetwork.steps import ResponseSteps, training_loss
from lightning_nested.trainer.attributes import bind_hyperparameters
from lightning_nested.trainer.inner_problem import InnerProblem
from lightning_nested.trainer.outer_loop import HasOuterLoop, OuterLoop
from lightning_nested.trainer.requirements import refuse_strategy


def default_weights_optimizer(parameters: Any) -> Optimizer:
    """SGD of rate 0.1 and momentum 0.9."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def default_response_optimizer(parameters: Any) -> Optimizer:
    """Adam of rate 1e-3."""
    return torch.optim.Adam(parameters, lr=1e-3)


def default_hyperparameter_optimizer(tensors: Any) -> Optimizer:
    """Adam of rate 0.01."""
    return torch.optim.Adam(tensors, lr=0.01)


class HypernetworkModule(HasOuterLoop, LightningModule):
    """Trains a network together with its response to hyperparameters, and moves them along it; to be extended.

        class Tuned(HypernetworkModule):
            def __init__(self, **kwargs):
                super().__init__(SmallCNN(), [WeightDecay(), Brightness(), LabelSmoothing()], **kwargs)

            def inner_loss(self, batch, values):              # a training batch, at values that are tried
                images, labels = batch
                return self.label_smoothing(self.network(self.brightness(images)), labels)

            def outer_loss(self, batch):                      # a validation batch
                return F.cross_entropy(self.network(batch[0]), batch[1])

    ``self.network(x)`` is the network at the hyperparameters that are being tried, and at the present ones λ̂
    everywhere else. The outer gradient is ∂L_V/∂w · ∂w_φ/∂λ: no derivative of the training loss with respect to λ
    is needed, so whole numbers, choices and random masks can be tuned. Weight decays are added to the inner loss,
    dropout and drop-connect rates reach the network by themselves.

    Optimization is manual; ``trainer.global_step`` counts training steps. Each step draws from random streams of its
    own, which makes a run resumed from an epoch's end go on as if it had not stopped, dropout included. In a
    data-parallel run each process tries other hyperparameters, and λ̂ stays equal. Subclasses that override
    ``setup``, ``on_fit_start``, ``on_train_start``, ``on_save_checkpoint`` or ``on_load_checkpoint`` call
    ``super()``'s. Lorraine & Duvenaud (2018), arXiv 1802.09419; further papers at the loops.

    Args:
        network: Any module, which :func:`best_response` converts; or a :class:`Response`, such as
            ``FactorisedResponse(module, n)``.
        hyperparameters: What is tuned.
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
        inner_steps: Made so far; with ``outer_steps`` and ``skipped_steps`` the module's own clock.

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
        tuned = [hyperparameters] if isinstance(hyperparameters, Hyperparameter) else list(hyperparameters)
        for h in tuned:
            if isinstance(h, LearningRate | ModuleTensors):
                raise ValueError(
                    "A hyperparameter of HypernetworkModule must act through the training loss or the weights' "
                    f"penalty. Got {h.name!r}, a {type(h).__name__}; tune it with NestedModule."
                )
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
        self.scale: Tensor | None = loop.distribution.initial(self.vector.flat().detach())
        self._scale_optimizer: Optimizer | None = None
        if self.scale is not None:
            self.scale.requires_grad_()
            self._scale_optimizer = scale_optimizer([self.scale])
        self.per_example = one_point_of_each_example(self.vector, self.network, options)
        self._steps: ResponseSteps | None = None
        bind_hyperparameters(self, tuned)
        self._follow()

    # ---- what users write and read

    @abstractmethod
    def inner_loss(self, batch: Any, values: Mapping[str, Tensor]) -> Tensor:
        """Training loss of a batch: a scalar with its graph, without tuned weight decays.

        Args:
            batch: Of the training data.
            values: What is tried, in natural units by ``name`` or ``name/key``; of shape (batch, …) where each
                example has its own.
        """
        raise NotImplementedError(f"{type(self).__name__} must define inner_loss(self, batch, values).")

    @abstractmethod
    def outer_loss(self, batch: Any) -> Tensor:
        """Validation loss of a batch: a scalar with its graph."""
        raise NotImplementedError(f"{type(self).__name__} must define outer_loss(self, batch).")

    def outer_dataloader(self) -> Any:
        """Loader of the outer batches; None: the validation data of ``fit``."""
        return None

    def num_examples(self, batch: Any) -> int:
        """Examples in a batch: the length of its first tensor, in dimension ``batch_dim`` of the response."""
        size = length_of_first_tensor(batch, self.network.layers.batch_dim)
        if size is not None:
            return size
        raise MisconfigurationException(
            f"num_examples(batch) must know the size of a batch. Got a {type(batch).__name__} without tensors; "
            "override it."
        )

    @override
    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The network's output at λ̂."""
        return self.network(*inputs, **options)

    def export(self, values: Mapping[str, Any] | None = None) -> nn.Module:
        """The plain network with the best-response weights at λ̂, or at other values: no hypernetwork left.

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
        sizes = [sum(t.numel() for t in h.tensors.values()) for h in self.vector.hyperparameters]
        pieces = torch.split(functional.softplus(self.scale.detach()), sizes)
        return {h.name: piece for h, piece in zip(self.vector.hyperparameters, pieces, strict=True)}

    # ---- lifecycle

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One of w₀ and one of φ; those of λ and the scales are no business of the Trainer."""
        groups = (self.network.general_parameters(), self.network.response_parameters())
        optimizers = [make(list(g.values())) for make, g in zip(self._make, groups, strict=True)]
        schedulers = []
        for make, optimizer in zip(self._make_schedulers, optimizers, strict=True):
            if make is not None:
                scheduler = make(optimizer)
                if isinstance(scheduler, ReduceLROnPlateau):
                    raise MisconfigurationException(
                        "Schedulers of HypernetworkModule are stepped by the epoch. Got ReduceLROnPlateau, which "
                        "needs a metric; use another, or step it in on_validation_epoch_end."
                    )
                schedulers.append(scheduler)
        return optimizers, schedulers

    @override
    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        refuse_strategy(self.trainer, "HypernetworkModule")
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"HypernetworkModule scales no losses. Got precision={self.trainer.precision}; use 'bf16-mixed'."
            )

    @override
    def on_fit_start(self) -> None:
        for tensor in (*self.vector.tensors, *([] if self.scale is None else [self.scale])):
            tensor.data = tensor.data.to(self.device)  # the same leaves: their optimizers hold them
        for optimizer in (self.outer.optimizer, self._scale_optimizer):
            if optimizer is not None:
                optimizer.load_state_dict(optimizer.state_dict())  # its state goes to where the leaves are
        self._follow()

    @override
    def on_train_start(self) -> None:
        problem = InnerProblem(
            module=self,
            inner_loss=lambda batch: self.training_loss(batch, self.vector.flat().detach()),
            outer_loss=self.outer_loss,
            optimizer=two_optimizers(self)[0],
            parameters={  # general names are the user's, and could be those of the response
                **{f"module.{name}": p for name, p in self.network.general_parameters().items()},
                **self.network.response_parameters(),
            },
            outer=self.outer,
            batches=self.outer_loop.start(self.trainer, self.outer_dataloader()),
            accumulate=1,
            clip=self.options.gradient_clip_val,
            clip_algorithm=self.options.gradient_clip_algorithm,
        )
        self._steps = ResponseSteps(self, problem)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        steps = self._steps
        if steps is None:
            raise MisconfigurationException(
                "HypernetworkModule must be started by its hooks. "
                f"Got a {type(self).__name__} that overrides setup, on_fit_start or on_train_start without super()'s."
            )
        trained = self.loop.trains(self.inner_steps)
        if trained:
            loss = steps.inner(batch)
        for _ in range(self.loop.outer_steps(self.inner_steps)):
            steps.outer(batch)
        if not trained:
            loss = torch.tensor(self.last_report.outer_loss if self.last_report else math.nan)
        if self.trainer.is_last_batch:
            for config in self.trainer.lr_scheduler_configs:
                self.lr_scheduler_step(config.scheduler, None)
        return {"loss": loss}

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logs the outer loss at λ̂ as ``val_loss``; to be overridden."""
        loss = self.outer_loss(batch)
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=self.num_examples(batch))
        return loss

    @override
    def teardown(self, stage: str) -> None:
        self.outer_loop.stop()
        self._steps = None

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hypernetwork"] = {
            **self.outer_loop.state_dict(),
            "scale": None if self.scale is None else self.scale.detach().cpu().clone(),
            "scale_optimizer": self._scale_optimizer.state_dict() if self._scale_optimizer else None,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("hypernetwork")
        if state is None:
            return
        self.outer_loop.load_state_dict(state)
        if (state["scale"] is None) != (self.scale is None):
            raise ValueError(
                "The checkpoint must be of a loop that learns the perturbation's scale exactly if this one does. "
                f"Got {self.loop}."
            )
        if self.scale is not None and self._scale_optimizer is not None:
            with torch.no_grad():
                self.scale.copy_(state["scale"])
            self._scale_optimizer.load_state_dict(state["scale_optimizer"])

    # ---- steps

    def training_loss(
        self, batch: Any, h: Tensor, mode: Mode = "response", weights: Weights | None = None
    ) -> Tensor:
        """The inner loss with its penalties at h, of shape (n,) or (batch, n); see :meth:`Response.at`."""
        return training_loss(self, batch, h, mode, weights, repeated=mode == "linearized")

    def _follow(self) -> None:
        """The network stands at λ̂; a centred one is centred there."""
        h = self.vector.flat().detach()
        if self.loop.centred and not torch.equal(h, self.network.center):
            if self.outer_steps == 0 and not bool(self.network.center.any()):
                self.network.center.copy_(h)  # the first center: w₀ is what the user gave
            else:
                self.network.recenter(h)
        self.network.bind(h)
