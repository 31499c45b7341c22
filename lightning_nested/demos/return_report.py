"""Report on the returns of a policy over its training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.demos.report import Report
from lightning_nested.figures.returns import return_figure
from lightning_nested.linalg.saved import require_keys
from lightning_nested.trainer.run_folder import run_folder, table


@checked
class ReturnReport(Report):
    """Report of an :class:`ActorCritic` at the end of ``fit``: a table, ``results.json`` and the figure ``<name>.png``.

    Args:
        name: Name of the figure's file.

    Attributes:
        results: Content of ``results.json``; empty before the end of ``fit``.
        history: ``(game_updates, mean_return)`` after each game update, from the end of the first episode on.

    Raises:
        MisconfigurationException: In ``setup``: a module without ``mean_return``.
    """

    def __init__(self, name: str = "returns") -> None:
        super().__init__(name)
        self.history: list[tuple[int, float]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.results, self._figure = {}, None
            if self.use.changed:
                self.history = []
        if stage == "fit" and not hasattr(pl_module, "mean_return"):
            raise MisconfigurationException(
                "ReturnReport needs a module that knows the returns of its episodes. "
                f"Got {type(pl_module).__name__}; use ActorCritic."
            )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        value, last = pl_module.mean_return(), self.history[-1][0] if self.history else 0
        if value is not None and pl_module.game_updates > last:
            self.history.append((pl_module.game_updates, value))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        folder = run_folder(trainer)
        # A run of a few steps may end before its first episode.
        if not trainer.is_global_zero or not self.history:
            return
        updates, value = self.history[-1]
        best = max(self.history, key=lambda entry: entry[1])
        self.results = {
            "game_updates": updates,
            "mean_return": value,
            "best_mean_return": best[1],
            "best_at": best[0],
            "history": self.history,
        }
        rows = [
            ("game updates", str(updates)),
            ("mean return of the last 100 episodes", f"{value:.1f}"),
            ("its best, and after how many updates", f"{best[1]:.1f} at {best[0]}"),
        ]
        self._write(trainer, folder, return_figure(self.history, self.name), updates, table(self.name, rows))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require_keys(state_dict, ("history",), "ReturnReport")
        self.history = list(state_dict["history"])
