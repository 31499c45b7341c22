"""Learned training images: a network that is trained on them alone does well on real ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from lightning_nested.arguments import at_least, check, positive
from lightning_nested.modules.image_classifier import classification_network
from lightning_nested.trainer.lightning import built_by_command_line
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.restart import reinitialize

Weights = dict[str, Tensor]


class DistillationModule(LightningModule):
    """Learns a few images per class by which a network learns the real data: dataset distillation.

    Each training step trains the network by T steps of gradient descent on the learned images, from fresh weights,

        w_{t+1} = w_t − α ∇CE(f(images; w_t), labels),

    and differentiates the cross-entropy of a real batch at w_T through all of them, with respect to the images. The
    inner loop needs no batches, so T does not depend on the length of an epoch. With ``restart_every`` of k a training
    begins where the one before it ended, but at every k-th step from fresh weights; None: never, so that the images
    are what suits one network that they have trained for long, and a fresh one learns less by them.

    A step whose inner training diverges moves nothing.

    Validation and test train a fresh network by the images, and log the accuracy of that one as ``val_accuracy`` and
    ``test_accuracy`` (and the loss); with warm starts the network of the run is logged as ``val_warm_accuracy`` too.
    Batches are (images, labels, …). Wang, Zhu, Torralba & Efros (2018), arXiv 1811.10959; Lorraine, Vicol & Duvenaud
    (2020), AISTATS.

    Args:
        network: ``"mlp"``, ``"cnn"``, the name of a torchvision classification network, or any module.
        images_per_class: Learned images of each class.
        num_classes: Number of classes.
        input_shape: Channels, height and width of an image.
        network_options: Further arguments of a network given by name.
        unrolled_steps: T.
        inner_rate: α.
        learn_rate: Whether α is learned too. It goes to where training by it just holds, and runs end badly unless
            the outer rate falls.
        restart_every: Training steps from one fresh network to the next; None: never.
        optimizer: From the images, and log α if it is learned, to their optimizer.
        scheduler: From optimizer to learning-rate scheduler, stepped after each epoch.

    Attributes:
        images: Learned images (classes · images_per_class, channels, height, width).
        labels: Their labels.
    """

    labels: Tensor

    def __init__(
        self,
        network: str | nn.Module = "mlp",
        *,
        images_per_class: int = 1,
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (1, 8, 8),
        network_options: dict[str, Any] | None = None,
        unrolled_steps: int = 20,
        inner_rate: float = 0.5,
        learn_rate: bool = False,
        restart_every: int | None = 1,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=0.03),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check(DistillationModule.__init__, locals())
        super().__init__()
        at_least(1, images_per_class=images_per_class, num_classes=num_classes, unrolled_steps=unrolled_steps)
        at_least(1, restart_every=restart_every)
        positive(inner_rate=inner_rate)
        live = {"network": network, "optimizer": optimizer, "scheduler": scheduler}
        plain = built_by_command_line()
        self.save_hyperparameters(ignore=[n for n, value in live.items() if callable(value) and not plain])
        self.network = classification_network(network, num_classes, input_shape, network_options)
        # Trained inside, not by the Trainer's optimizer.
        self.network.requires_grad_(False)
        self.unrolled_steps, self.restart_every = unrolled_steps, restart_every
        self.register_buffer("labels", torch.arange(num_classes).repeat_interleave(images_per_class))
        self.images = nn.Parameter(0.5 + 0.1 * torch.randn(len(self.labels), *input_shape))
        self.log_rate = nn.Parameter(torch.tensor(float(inner_rate)).log(), requires_grad=learn_rate)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.fresh_seed: int | None = None  # of an evaluation's weights; None: by the training step
        self._fresh: Weights = {}  # of an evaluation
        self._end: Weights = {}  # of a training step

    @property
    def inner_rate(self) -> float:
        """The step size α of the inner training."""
        return float(self.log_rate.detach().exp())

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return logits of the network that the run has trained last, as it is saved."""
        logits: Tensor = self.network(images)
        return logits

    def fresh_weights(self, seed: int) -> Weights:
        """Return weights drawn by each layer's ``reset_parameters``."""
        weights = dict(self.network.named_parameters())
        reinitialize(self.network, {name: w.detach().clone() for name, w in weights.items()}, weights, seed)
        return {name: w.detach().clone() for name, w in weights.items()}

    def twin(self, seed: int) -> DistillationModule:
        """Return a copy, apart from any Trainer, whose validation and test draw their weights by this seed."""
        twin = copy.deepcopy(self)
        twin.fresh_seed = seed
        return twin

    def trained(
        self, weights: Mapping[str, Tensor], *, steps: int | None = None, graph: bool = False
    ) -> Weights:
        """Return weights after training on the learned images.

        Args:
            weights: Weights by name to begin from.
            steps: Steps; None: T.
            graph: Whether the result has a graph to the images and α.
        """
        rate = self.log_rate.exp()
        current = {name: w.detach().requires_grad_(True) for name, w in weights.items()}
        with torch.enable_grad():
            for _ in range(self.unrolled_steps if steps is None else steps):
                loss = self._cross_entropy(current, self.images, self.labels)
                found = torch.autograd.grad(loss, list(current.values()), create_graph=graph)
                moved = {n: w - rate * g for (n, w), g in zip(current.items(), found, strict=True)}
                current = moved if graph else {n: w.detach().requires_grad_(True) for n, w in moved.items()}
        return current

    @override
    def training_step(self, batch: Sequence[Tensor], batch_idx: int = 0) -> Tensor:
        step = self.trainer.global_step
        if self.restart_every is not None and step % self.restart_every == 0:
            # A stream of its own for each step: a resumed run draws the same weights.
            start = self.fresh_weights(int(1_000_003 * (step + 1)))
        else:
            start = dict(self.network.named_parameters())
        end = self.trained(start, graph=True)
        loss = self._cross_entropy(end, batch[0], batch[1])
        if not bool(loss.detach().isfinite()):
            # A rate at which the inner training diverges: nothing is learned from it, and the next step begins afresh.
            self._end = self.fresh_weights(int(1_000_003 * (step + 1)))
            return 0.0 * (self.images.sum() + self.log_rate)
        self._end = {name: w.detach() for name, w in end.items()}
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (step + 1) % every == 0:
            self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Not before the backward pass, whose graph holds the weights that the step began with.
        self._place(self._end)

    def _place(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(weights[name])

    @override
    def on_validation_epoch_start(self) -> None:
        self._train_fresh()

    @override
    def on_test_epoch_start(self) -> None:
        self._train_fresh()

    def _train_fresh(self) -> None:
        before = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        # The Trainer evaluates in inference mode.
        with torch.inference_mode(False), RandomStream(0, self.device):
            # Not a seed of a training step.
            # Not a seed of a training step.
            seed = self.trainer.global_step * 7_919 + 17 if self.fresh_seed is None else self.fresh_seed
            self._fresh = self.trained(self.fresh_weights(seed))
        self._place(before)

    @override
    def validation_step(self, batch: Sequence[Tensor], batch_idx: int = 0) -> Tensor:
        """Log loss and accuracy of a fresh network, and of the run's own if it is not fresh each time."""
        if self.restart_every != 1:
            own = dict(self.network.named_parameters())
            self._log("val_warm", own, batch)
        return self._log("val", self._fresh, batch)

    @override
    def test_step(self, batch: Sequence[Tensor], batch_idx: int = 0) -> Tensor:
        """Log loss and accuracy of a fresh network."""
        return self._log("test", self._fresh, batch)

    def _log(self, stage: str, weights: Mapping[str, Tensor], batch: Sequence[Tensor]) -> Tensor:
        logits = functional_call(self.network, dict(weights), (batch[0],))
        loss = nn.functional.cross_entropy(logits, batch[1])
        accuracy = (logits.argmax(-1) == batch[1]).float().mean()
        found = {f"{stage}_loss": loss.detach(), f"{stage}_accuracy": accuracy}
        self.log_dict(found, prog_bar=True, batch_size=len(batch[1]), sync_dist=True)
        return loss

    def _cross_entropy(self, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(self.network, dict(weights), (images,)), labels)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer([p for p in (self.images, self.log_rate) if p.requires_grad])
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])
