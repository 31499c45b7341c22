"""Grids of samples at the same z throughout a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.callbacks.generative_metrics.samplers import (
    Sampler,
    check_samples,
    has_classes,
    labels_for,
    require_sampler,
)
from lightning_nested.callbacks.generator_ema import averaged_generators
from lightning_nested.extras import require_package
from lightning_nested.files import replacing
from lightning_nested.linalg.saved import require_keys
from lightning_nested.trainer.isolation import without_trace
from lightning_nested.trainer.run_folder import keeps_files
from lightning_nested.trainer.use import OneFitCallback


@checked
class SampleGrid(OneFitCallback):
    """Grid with one row per class, each image from the same z at every time, for TensorBoard and as PNG files.

    For every :class:`GANModule` of images ``(C, H, W)`` in [−1, 1]. Without classes the grid is a square. Images of
    neither 1 nor 3 channels have them side by side in grey. Files are ``grids/<game updates>.png`` under
    ``default_root_dir``. If :class:`GeneratorEMA` is among the callbacks, its average makes the images.

    Args:
        every_n_updates: Steps of ``trainer.global_step`` (game updates in a ``GameModule``) between grids;
            there is one more at the end of training.
        per_class: Images in a row; without classes also the number of rows.
        batch_norm: ``"running"``, ``"batch"`` or ``"standing"`` statistics.
        seed: Seed of z.
        gif: Also write the grids of this run as ``grids/samples.gif`` at the end of training, three a second.

    Raises:
        MisconfigurationException: If the module cannot make samples, or they are no images.
    """

    def __init__(
        self,
        every_n_updates: int = 1000,
        *,
        per_class: int = 8,
        batch_norm: Literal["running", "batch", "standing"] = "running",
        seed: int = 0,
        gif: bool = False,
    ) -> None:
        at_least(1, every_n_updates=every_n_updates, per_class=per_class)
        at_least(0, seed=seed)
        self.every_n_updates, self.per_class = every_n_updates, per_class
        self.batch_norm, self.seed = batch_norm, seed
        self.gif = gif
        self._last = 0
        # Pictures of this fit, in order.
        self._written: list[Path] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require_package("torchvision", *(("PIL",) if self.gif else ()))
        require_sampler(self, pl_module)
        if stage == "fit":
            self._written = []
            self._last = 0 if self.use.changed else self._last

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step != self._last and step % self.every_n_updates == 0:
            self._show(trainer, pl_module, step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._last:
            self._show(trainer, pl_module, trainer.global_step)
        if self.gif and self._written:
            _write_gif(self._written)

    @property
    @override
    def state_key(self) -> str:
        options = ("every_n_updates", "per_class", "batch_norm", "seed")
        return self._generate_state_key(**{name: getattr(self, name) for name in options})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require_keys(state_dict, ("last",), "SampleGrid")
        self._last = state_dict["last"]

    def grid(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        """Return the grid, ``(C, H, W)`` in [0, 1]."""
        from torchvision.utils import make_grid  # here, because it costs a second

        source = cast(Sampler, pl_module)
        rows = source.num_classes or 1 if has_classes(pl_module) else self.per_class
        labels = labels_for(pl_module, rows * self.per_class).sort().values
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        with averaged_generators(trainer, pl_module), without_trace(pl_module, trainer):
            images = source.sample_for_metrics(labels, batch_norm=self.batch_norm, generator=generator)
        images = _drawable(check_samples(pl_module, images, len(labels)))
        grid: Tensor = make_grid(
            images.cpu(), nrow=self.per_class, normalize=True, value_range=(-1, 1), padding=1
        )
        return grid

    def _show(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._last = step
        if not trainer.is_global_zero:
            return
        from torchvision.utils import save_image

        grid = self.grid(trainer, pl_module)
        if keeps_files(trainer):
            path = Path(trainer.default_root_dir) / "grids" / f"{step:06d}.png"
            with replacing(path) as file:
                save_image(grid, file, format="png")
            self._written.append(path)
        for logger in trainer.loggers:
            add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
            if add_image is not None:
                add_image("samples", grid, step)


def _drawable(images: Tensor) -> Tensor:
    """Return images of 1 or 3 channels; further ones are put side by side."""
    if images.ndim != 4:
        raise MisconfigurationException(
            f"SampleGrid draws images (N, C, H, W). Got samples of shape {tuple(images.shape)}; leave it out, and use "
            "GenerativeMetrics(ValuesEvaluator()) to follow points."
        )
    return images if images.shape[1] in (1, 3) else torch.cat(images.unbind(dim=1), dim=-1).unsqueeze(1)


def _write_gif(paths: list[Path]) -> None:
    """Write the pictures as one that moves, beside the first."""
    from PIL import Image

    frames = []
    for path in paths:
        with Image.open(path) as image:
            frames.append(image.convert("RGB"))
    with replacing(paths[0].with_name("samples.gif")) as file:
        frames[0].save(file, format="gif", save_all=True, append_images=frames[1:], duration=333, loop=0)
