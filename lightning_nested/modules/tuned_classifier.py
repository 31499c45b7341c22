"""An image classifier whose decay, dropout, augmentation and label smoothing tune themselves by a hypernetwork."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.hyperparameters import Cutout, Hyperparameter, LabelSmoothing
from lightning_nested.hyperparameters.augmentation import Strength
from lightning_nested.modules.hypernetwork.module import HypernetworkModule
from lightning_nested.networks import build_network


class TunedImageClassifier(HypernetworkModule):
    """Cross-entropy classification in :class:`HypernetworkModule`, for batches (images, labels, …).

    Augmentations among the hyperparameters act on training images in the order they are given, ``LabelSmoothing`` on
    the training loss; decay, dropout and drop-connect reach the network by themselves. Others are read by a subclass.

    Args:
        network: ``"mlp"``, ``"cnn"``, the name of a torchvision classification network, or any module.
        hyperparameters: What is tuned.
        num_classes: Number of classes.
        input_shape: Channels, height and width; a network given as a module ignores it.
        network_options: Further arguments of a network given by name.
        **options: Of :class:`HypernetworkModule`.
    """

    def __init__(
        self,
        network: str | nn.Module = "mlp",
        hyperparameters: Hyperparameter | Sequence[Hyperparameter] = (),
        *,
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (1, 8, 8),
        network_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(network, str):
            network = build_network(
                network, num_classes=num_classes, input_shape=input_shape, options=network_options
            )
        elif network_options:
            raise ValueError(
                "`network_options` must be empty when `network` is a module. "
                f"Got {network_options} with a {type(network).__name__}. Set them on the network itself."
            )
        super().__init__(network, hyperparameters, **options)

    @override
    def inner_loss(self, batch: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Cross-entropy of augmented images, with smoothed labels if they are tuned."""
        images, labels = batch[0], batch[1]
        for hyperparameter in self.outer.hyperparameters:
            if isinstance(hyperparameter, Strength | Cutout):
                images = hyperparameter(images)
        logits = self.network(images)
        for hyperparameter in self.outer.hyperparameters:
            if isinstance(hyperparameter, LabelSmoothing):
                return hyperparameter(logits, labels)
        return nn.functional.cross_entropy(logits, labels)

    @override
    def outer_loss(self, batch: Sequence[Tensor]) -> Tensor:
        """Plain cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    @override
    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Logs ``val_loss`` and ``val_accuracy``."""
        return self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Logs ``test_loss`` and ``test_accuracy``."""
        return self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Class probabilities; a batch may be bare images."""
        probabilities: Tensor = self(batch if isinstance(batch, Tensor) else batch[0]).softmax(dim=-1)
        return probabilities

    def _evaluate(self, batch: Sequence[Tensor], stage: str) -> Tensor:
        logits, labels = self.network(batch[0]), batch[1]
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=-1) == labels).float().mean()
        self.log_dict(
            {f"{stage}_loss": loss, f"{stage}_accuracy": accuracy},
            prog_bar=True,
            batch_size=len(labels),
            sync_dist=True,
        )
        return loss
