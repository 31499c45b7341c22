"""Report on what a run has tuned: a table, a figure, numbers."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.demos.report import Report
from lightning_nested.figures.tuning import tuning_figure
from lightning_nested.trainer.outer_loop import OuterLoop
from lightning_nested.trainer.outer_loop_owners import HasOuterLoop
from lightning_nested.trainer.run_folder import run_folder


@checked
class TuningReport(Report):
    """Report of a run that tunes hyperparameters: a table, ``results.json`` and the figure ``<name>.png``.

    The run may be of a :class:`HypernetworkModule`, a :class:`NestedModule`, or of any module under a
    :class:`HypergradientCallback`. Files go to the folder of the run's logger (without one to ``default_root_dir``).

    Args:
        name: Name of the figure's file.

    Attributes:
        results: Content of ``results.json``; empty before the end of ``fit``.

    Raises:
        MisconfigurationException: In ``setup``: nothing in the Trainer tunes hyperparameters.
    """

    def __init__(self, name: str = "tuning") -> None:
        super().__init__(name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _owner(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        owner = _owner(trainer, pl_module)
        loop = owner.outer_loop
        # A fit without an outer step has tuned nothing, and was warned of.
        if not trainer.is_global_zero or not loop.outer_steps:
            return
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.results = {
            "inner_steps": loop.inner_steps,
            "outer_steps": loop.outer_steps,
            "skipped_outer_steps": loop.skipped_steps,
            "start": {name: found[0] for name, found in loop.outer.first.items()},
            "end": {name: found[0] for name, found in loop.spreads().items()},
            # Of a decay for each weight the spread is enough.
            "values": {label: v.tolist() for label, v in owner.values().items() if v.numel() <= 1000},
            "outer_loss": loop.trend_lines(),
            "metrics": {key: value for key, value in metrics.items() if math.isfinite(value)},
        }
        title = f"{type(pl_module).__name__}: {loop.outer_steps} outer steps"
        figure = tuning_figure(loop.trace, loop.outer_steps, loop.spreads(), loop.outer.first, title)
        text = _table(loop, self.results)
        self._write(trainer, folder, figure, trainer.global_step, text)


def _owner(trainer: Trainer, module: LightningModule) -> HasOuterLoop:
    """Return what runs the outer loop, the module or the first callback that does."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for candidate in (module, *callbacks):
        if isinstance(candidate, HasOuterLoop):
            return candidate
    raise MisconfigurationException(
        "TuningReport needs a run that tunes hyperparameters. Got "
        f"{type(module).__name__} without a callback that does; add HypergradientCallback(...), or train a "
        "HypernetworkModule or NestedModule."
    )


def _table(loop: OuterLoop, results: dict[str, Any]) -> str:
    now = loop.spreads()
    width = max(len("hyperparameter"), *map(len, now)) + 2
    titles = "".join(f"{title:>11}" for title in ("values", "start", "end", "smallest", "largest"))
    lines = [f"\n{'hyperparameter':<{width}}{titles}", "-" * (width + len(titles))]
    for name, (mean, low, high, count) in now.items():
        numbers = (loop.outer.first.get(name, [math.nan])[0], mean, low, high)
        lines.append(f"{name:<{width}}{count:>11}" + "".join(f"{number:>11.4g}" for number in numbers))
    lines.append("-" * (width + len(titles)))
    lines += results["outer_loss"]
    measured = ", ".join(f"{key} {results['metrics'][key]:.4g}" for key in _shown(results["metrics"]))
    lines.append(f"{results['outer_steps']} outer steps" + (f"; {measured}" if measured else ""))
    return "\n".join(lines)


def _shown(metrics: dict[str, float]) -> list[str]:
    """Return the validation's own metrics, which have no group before a slash."""
    return [key for key in metrics if "/" not in key and key.startswith(("val", "test"))]
