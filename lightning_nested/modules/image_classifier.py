"""Image classifier with hyperparameters in its training loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.arguments import check
from lightning_nested.modules.optimizers import with_scheduler
from lightning_nested.networks import build_network
from lightning_nested.trainer.lightning import built_by_command_line


def classification_network(
    network: str | nn.Module,
    num_classes: int,
    input_shape: tuple[int, int, int],
    network_options: dict[str, Any] | None,
) -> nn.Module:
    """Build a network from its name; return one that is a module as it is.

    Raises:
        ValueError: There are options for a module, or the name or the options are unknown.
    """
    if isinstance(network, str):
        return build_network(
            network, num_classes=num_classes, input_shape=input_shape, options=network_options
        )
    if network_options:
        raise ValueError(
            "`network_options` must be empty when `network` is a module. "
            f"Got {network_options} with a {type(network).__name__}. Set them on the network itself."
        )
    return network


class ClassificationSteps(LightningModule):
    """Evaluation of an image classifier, whose ``forward`` returns logits, on batches (images, labels, …)."""

    def outer_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Return the loss that hyperparameters descend: the unweighted mean cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    @override
    def validation_step(self, batch: Sequence[Tensor], batch_idx: int = 0) -> Tensor:
        """Log ``val_loss`` and ``val_accuracy``."""
        return self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Sequence[Tensor], batch_idx: int = 0) -> Tensor:
        """Log ``test_loss`` and ``test_accuracy``."""
        return self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Return class probabilities ``(batch, num_classes)``; a batch may be bare images."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return nn.functional.softmax(self(images), dim=-1)

    def _evaluate(self, batch: Sequence[Tensor], stage: str) -> Tensor:
        images, labels = batch[0], batch[1]
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        # With the batch sizes, Lightning's synchronised mean is a sum over examples divided by their number,
        # over all processes: exact for unequal batches too.
        self.log_dict(
            {f"{stage}_loss": loss, f"{stage}_accuracy": accuracy},
            prog_bar=True,
            batch_size=len(labels),
            sync_dist=True,
        )
        return loss


class ImageClassifier(ClassificationSteps):
    """Cross-entropy classification of images, in automatic optimization, to be used or extended.

    The training loss is ``(1/B) Σ_b w_{i(b)} · CE(f(x_b), y_b)`` if ``example_weights`` is set, weighted by
    the loss itself if ``weight_network`` is, else the plain mean. It is a mean over the batch, not divided by
    ``Σ w``: small weights mean small steps. Validation, test and outer loss are never weighted.

    A batch is ``(images, labels)`` or ``(images, labels, index)``; only ``example_weights`` needs the index.

    To extend it, override ``training_losses`` (return further terms by name) or ``outer_loss``.

    Args:
        network: ``"mlp"``, ``"cnn"``, the name of a torchvision classification network, or any module from
            ``(batch, *input_shape)`` to logits ``(batch, num_classes)``.
        num_classes: Number of classes.
        input_shape: Channels, height and width of an image; a network given as a module ignores it.
        network_options: Further arguments of a network given by name, such as ``{"hidden": [300, 100]}``.
        augmentation: Module from training images to those that the network sees in training, such as
            :class:`AugmentationNetwork`, tuned as ``"augmentation"``; None: the images themselves.
        optimizer: From parameters to optimizer.
        scheduler: From optimizer to learning-rate scheduler, stepped after each epoch.

    Attributes:
        example_weights: Callable from indices ``(batch,)`` to weights ``(batch,)``, or ``None``. A
            hypergradient callback binds its ``ExampleWeights`` here.
        weight_network: Callable from losses ``(batch,)`` to weighted losses ``(batch,)``, or ``None``. A
            hypergradient callback binds its ``WeightNetwork`` here.
        loss_weights: Callable from the named losses to one loss, or ``None`` for their sum. A hypergradient
            callback binds its ``LossWeights`` here.

    Raises:
        ValueError: For an unknown network (with close matches) or options that do not fit it; in training, if
            ``example_weights`` is set and batches have no index.

    Example:
        >>> module = ImageClassifier("mlp", network_options={"hidden": [32]})
        >>> module.example_weights = lambda index: torch.zeros(len(index))
        >>> batch = torch.rand(4, 1, 8, 8), torch.arange(4), torch.arange(4)
        >>> module.training_loss(batch).item()
        0.0
    """

    # Plain attributes, not submodules: what is bound here belongs to the callback, which tunes and saves it.
    example_weights: Callable[[Tensor], Tensor] | None = None
    weight_network: Callable[[Tensor], Tensor] | None = None
    loss_weights: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    def __init__(
        self,
        network: str | nn.Module = "mlp",
        *,
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (1, 8, 8),
        network_options: dict[str, Any] | None = None,
        augmentation: nn.Module | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check(ImageClassifier.__init__, locals())
        super().__init__()
        live = {
            "network": network,
            "augmentation": augmentation,
            "optimizer": optimizer,
            "scheduler": scheduler,
        }
        # LightningCLI saves the configuration instead of the values: all plain data.
        plain = built_by_command_line()
        self.save_hyperparameters(ignore=[n for n, value in live.items() if callable(value) and not plain])
        self.network = classification_network(network, num_classes, input_shape, network_options)
        self.augmentation = augmentation
        self.optimizer = optimizer
        self.scheduler = scheduler

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(batch, num_classes)``."""
        logits: Tensor = self.network(images)
        return logits

    def training_losses(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the terms of the training loss by name, each a scalar with its graph."""
        images, labels, *index = batch
        logits = self(images if self.augmentation is None else self.augmentation(images))
        if self.example_weights is None and self.weight_network is None:
            return {"cross_entropy": nn.functional.cross_entropy(logits, labels)}
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        if self.weight_network is not None:
            losses = self.weight_network(losses)
        if self.example_weights is not None:
            if not index:
                raise ValueError(
                    "`example_weights` needs training batches (images, labels, index). "
                    f"Got {len(batch)} tensors. Build the datamodule with `with_index=True`."
                )
            losses = self.example_weights(index[0]) * losses
        return {"cross_entropy": losses.mean()}

    def training_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Return the inner loss of a batch: a scalar with its graph."""
        losses = self.training_losses(batch)
        if self.loss_weights is not None:
            return self.loss_weights(losses)
        return torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))

    @override
    def training_step(self, batch: Sequence[Tensor], batch_idx: int = 0) -> Tensor:
        loss = self.training_loss(batch)
        # One `self.log` costs as much as a step of a small network: log only what reaches the logger.
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every > 0 and (self.trainer.global_step + 1) % every == 0:
            self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        return with_scheduler(self, self.optimizer, self.scheduler)
