"""Image classifier whose decay, dropout, augmentation and label smoothing tune themselves by a hypernetwork."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.arguments import check
from lightning_nested.hyperparameters import Cutout, Hyperparameter, LabelSmoothing
from lightning_nested.hyperparameters.augmentation import Strength
from lightning_nested.modules.hypernetwork.module import HypernetworkModule
from lightning_nested.modules.image_classifier import ClassificationSteps, classification_network


class TunedImageClassifier(ClassificationSteps, HypernetworkModule):
    """Cross-entropy classification in :class:`HypernetworkModule`, for batches (images, labels, …).

    Augmentations among the hyperparameters act on training images in the order they are given, ``LabelSmoothing`` on
    the training loss; decay, dropout and drop-connect reach the network by themselves. Others are read by a subclass.

    Args:
        network: ``"mlp"``, ``"cnn"``, the name of a torchvision classification network, or any module.
        hyperparameters: One or several to tune.
        num_classes: Number of classes.
        input_shape: Channels, height and width; a network given as a module ignores it.
        network_options: Further arguments of a network given by name.
        **options: Arguments of :class:`HypernetworkModule`.
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
        check(TunedImageClassifier.__init__, locals())
        network = classification_network(network, num_classes, input_shape, network_options)
        super().__init__(network, hyperparameters, **options)

    @override
    def inner_loss(self, batch: Sequence[Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy of augmented images, with smoothed labels if they are tuned."""
        images, labels = batch[0], batch[1]
        for hyperparameter in self.outer.hyperparameters:
            if isinstance(hyperparameter, Strength | Cutout):
                images = hyperparameter(images)
        logits = self.network(images)
        for hyperparameter in self.outer.hyperparameters:
            if isinstance(hyperparameter, LabelSmoothing):
                return hyperparameter(logits, labels)
        return nn.functional.cross_entropy(logits, labels)
