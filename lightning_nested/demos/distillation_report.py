"""Report on learned images: a figure of them, and how well fresh networks learn by them."""

from __future__ import annotations

import statistics
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.demos.report import Report
from lightning_nested.figures.distillation import distillation_figure
from lightning_nested.modules.distillation import DistillationModule
from lightning_nested.trainer.reference_runs import test_like
from lightning_nested.trainer.run_folder import run_folder, table

_ACCURACY, _WARM = "val_accuracy", "val_warm_accuracy"


@checked
class DistillationReport(Report):
    """Test fresh networks that are trained on the learned images alone, at the end of ``fit``; draw the images.

    Prints a table; writes ``results.json`` and the figure ``<name>.png`` into the folder of the run's logger (without a
    logger into ``default_root_dir``). The test set is used here only.

    Args:
        name: Name of the figure's file.
        networks: Fresh networks that are tested, each from other weights.

    Attributes:
        results: Content of ``results.json``; empty before the end of ``fit``.

    Raises:
        MisconfigurationException: In ``setup``: no :class:`DistillationModule`, or no datamodule.
    """

    def __init__(self, name: str = "distillation", networks: int = 5) -> None:
        at_least(1, networks=networks)
        super().__init__(name)
        self.networks = networks
        self._history: list[tuple[int, float, float | None]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not isinstance(pl_module, DistillationModule) or trainer.datamodule is None:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "DistillationReport needs a DistillationModule and a datamodule. "
                f"Got {type(pl_module).__name__}, and {'a' if trainer.datamodule else 'no'} datamodule."  # type: ignore[attr-defined]
            )
        if self.use.changed:
            self._history = []

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics
        if _ACCURACY in found and not trainer.sanity_checking:
            warm = float(found[_WARM]) if _WARM in found else None
            self._history.append((trainer.global_step, float(found[_ACCURACY]), warm))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, DistillationModule)
        tests = [tested(trainer, pl_module, seed) for seed in range(self.networks)]
        images = pl_module.images.detach().cpu()
        self.results = {
            "images": len(images),
            "steps": trainer.global_step,
            "inner_rate": pl_module.inner_rate,
            "test_accuracy": tests,
            "test_accuracy_median": statistics.median(tests),
            "validation": self._history,
        }
        median, spread = (
            f"{100 * self.results['test_accuracy_median']:.1f} %",
            f"{100 * min(tests):.1f} to {100 * max(tests):.1f} %",
        )
        figure = distillation_figure(
            images,
            pl_module.labels.cpu(),
            self._history,
            f"{len(images)} learned images; test accuracy of {self.networks} fresh networks {median} ({spread})",
        )
        text = table(
            "fresh networks, trained on the learned images alone",
            [("images", str(len(images))), ("test accuracy, median", median), ("range", spread)],
        )
        self._write(trainer, folder, figure, trainer.global_step, text)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self._history)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._history = [tuple(entry) for entry in state_dict.get("history", [])]


def tested(trainer: Trainer, module: DistillationModule, seed: int) -> float:
    """Return the test accuracy of a network of these fresh weights."""
    return float(test_like(trainer, module.twin(seed))["test_accuracy"])
