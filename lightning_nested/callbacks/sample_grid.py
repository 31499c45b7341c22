"""Grids of samples of each class at the same z throughout a run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.callbacks.generative_metrics.callback import (
    ClassConditionalSampler,
    check_samples,
    require_sampler,
)
from lightning_nested.callbacks.generator_ema import GeneratorEMA
from lightning_nested.extras import require_package
from lightning_nested.files import replacing
from lightning_nested.linalg.saved import require_keys
from lightning_nested.trainer.isolation import without_trace
from lightning_nested.trainer.run_folder import keeps_files
from lightning_nested.trainer.use import OneFitCallback


@checked
class SampleGrid(OneFitCallback):
    """Grid with one row per class, each image from the same z at every time, for TensorBoard and as PNG files.

    Files are ``grids/<game updates>.png`` under ``default_root_dir``. If :class:`GeneratorEMA` is among the callbacks,
    its average makes the images.

    Args:
        every_n_updates: Steps of ``trainer.global_step`` (game updates in a ``GameModule``) between grids;
            there is one more at the end of training.
        per_class: Images in a row.
        batch_norm: ``"running"``, ``"batch"`` or ``"standing"`` statistics.
        seed: Seed of z.

    Raises:
        MisconfigurationException: If the module cannot make samples of a class.
    """

    def __init__(
        self,
        every_n_updates: int = 1000,
        *,
        per_class: int = 8,
        batch_norm: Literal["running", "batch", "standing"] = "running",
        seed: int = 0,
    ) -> None:
        at_least(1, every_n_updates=every_n_updates, per_class=per_class)
        at_least(0, seed=seed)
        self.every_n_updates, self.per_class = every_n_updates, per_class
        self.batch_norm, self.seed = batch_norm, seed
        self._last = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require_package("torchvision")
        require_sampler(self, pl_module)
        if stage == "fit" and self.use.changed:
            self._last = 0

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

        source = cast(ClassConditionalSampler, pl_module)
        labels = torch.arange(source.num_classes).repeat_interleave(self.per_class)
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        with ExitStack() as stack:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, GeneratorEMA) and not callback.stands_in:
                    stack.enter_context(callback.swapped(pl_module))
            stack.enter_context(without_trace(pl_module, trainer))
            images = source.sample_for_metrics(labels, batch_norm=self.batch_norm, generator=generator)
        images = check_samples(pl_module, images, len(labels))
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
            with replacing(Path(trainer.default_root_dir) / "grids" / f"{step:06d}.png") as file:
                save_image(grid, file, format="png")
        for logger in trainer.loggers:
            add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
            if add_image is not None:
                add_image("samples", grid, step)
