"""Report on a learned augmentation: images beside what it makes of them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.demos.report import Report
from lightning_nested.figures.augmentation import augmentation_figure
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.run_folder import run_folder, table

_VERSIONS = 5


@checked
class AugmentationReport(Report):
    """Report of a run whose module has an ``augmentation``: a table, ``results.json``, a figure of augmented images.

    ``change`` is the mean distance of a pixel from the image's own; ``spread`` is its standard deviation over random
    draws, without which the augmentation always changes an image in the same way. Both are over the images of the last
    training batch: its first tensor of shape (n, channels, height, width), in a list or a dict. Files go to the folder
    of the run's logger (without one to ``default_root_dir``).

    Args:
        name: Name of the figure's file.
        images: Images that are drawn.

    Attributes:
        results: Content of ``results.json``; empty before the end of ``fit``.

    Raises:
        MisconfigurationException: In ``setup``: the module has no ``augmentation``. At a batch: it holds no images.
    """

    def __init__(self, name: str = "augmentation", images: int = 5) -> None:
        at_least(1, images=images)
        super().__init__(name)
        self.images = images
        self._batch: Tensor | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not isinstance(getattr(pl_module, "augmentation", None), nn.Module):
            raise MisconfigurationException(
                "AugmentationReport needs a module whose attribute `augmentation` is an nn.Module. Got "
                f"{type(pl_module).__name__} without one; give ImageClassifier augmentation=AugmentationNetwork()."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = _images(batch)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder, images, self._batch = run_folder(trainer), self._batch, None
        if not trainer.is_global_zero or images is None:
            return
        augmentation: Any = pl_module.augmentation
        with torch.no_grad(), RandomStream(0, pl_module.device):
            images = images.to(pl_module.device)
            versions = torch.stack([augmentation(images) for _ in range(_VERSIONS)]).float()
        # A mean in half precision has three digits, and NumPy has no bfloat16.
        images = images.float()
        change, spread = float((versions - images).abs().mean()), float(versions.std(0).mean())
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.results = {"change": change, "spread": spread, "steps": trainer.global_step, **metrics}
        title = f"Learned augmentation after {trainer.global_step} steps"
        shown = images[: self.images].cpu(), versions[:, : self.images].cpu()
        rows = [("change of a pixel", f"{change:.4f}"), ("spread over random draws", f"{spread:.4f}")]
        rows += [(key, f"{metrics[key]:.4g}") for key in ("val_loss", "val_accuracy") if key in metrics]
        text = table("learned augmentation", rows)
        self._write(trainer, folder, augmentation_figure(*shown, title), trainer.global_step, text)


def _images(batch: Any) -> Tensor:
    """Return the first tensor of four dimensions in a batch."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    for tensor in found:
        if tensor.ndim == 4:
            return tensor
    raise MisconfigurationException(
        "AugmentationReport needs batches that hold images of shape (n, channels, height, width). Got "
        f"{type(batch).__name__} with tensors of shapes {[tuple(t.shape) for t in found]}; leave the report out."
    )
