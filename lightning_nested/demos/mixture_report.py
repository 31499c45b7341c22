"""Report on a tuned mixture: the shares of its sources, or the weights of a loss's parts, over the training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.demos.report import Report
from lightning_nested.figures.mixture import mixture_figure
from lightning_nested.hyperparameters import GroupWeights, LossWeights
from lightning_nested.trainer.outer_loop_owners import HasOuterLoop
from lightning_nested.trainer.run_folder import run_folder, table


@checked
class MixtureReport(Report):
    """Report of a run that tunes :class:`GroupWeights` or :class:`LossWeights`: a table, ``results.json``, a figure.

    The figure shows the shares of the sources, or the weights of the parts of the loss, over the training.
    Files go to the folder of the run's logger (without one to ``default_root_dir``).

    Args:
        name: Name of the figure's file.
        monitor: Logged score on validation data that is drawn beside the shares.
        every_n_steps: Training steps from one recorded point to the next; None: ``log_every_n_steps``.

    Attributes:
        results: Content of ``results.json``; empty before the end of ``fit``.

    Raises:
        MisconfigurationException: In ``setup``: nothing in the Trainer tunes ``GroupWeights`` or ``LossWeights``.
    """

    def __init__(
        self, name: str = "mixture", monitor: str = "val_loss", every_n_steps: int | None = None
    ) -> None:
        at_least(1, every_n_steps=every_n_steps)
        super().__init__(name)
        self.monitor, self.every_n_steps = monitor, every_n_steps
        self._steps: list[int] = []
        self._shares: list[list[float]] = []
        self._scores: list[tuple[int, float]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        _tuned(trainer, pl_module)
        if self.use.changed:
            self._steps, self._shares, self._scores = [], [], []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        every: int = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self._record(trainer, pl_module)

    def _record(self, trainer: Trainer, module: LightningModule) -> None:
        weights = _tuned(trainer, module)
        if self._steps[-1:] != [trainer.global_step] and weights.built:
            self._steps.append(trainer.global_step)
            self._shares.append([float(share) for share in weights.values().values()])

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics
        if self.monitor in found and not trainer.sanity_checking:
            self._scores.append((trainer.global_step, float(found[self.monitor])))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        self._record(trainer, pl_module)
        tuned = _tuned(trainer, pl_module)
        names, weights = tuned.names, isinstance(tuned, LossWeights)
        shares = dict(zip(names, map(list, zip(*self._shares, strict=True)), strict=True))
        last = {name: values[-1] for name, values in shares.items()}
        self.results = {
            "steps": self._steps,
            "weights" if weights else "shares": shares,
            "final": last,
            self.monitor: self._scores,
        }
        ordered = sorted(last.items(), key=lambda pair: -pair[1])
        rows = [(name, f"{share:.4g}" if weights else f"{share:.3f}") for name, share in ordered]
        rows += [(self.monitor, f"{self._scores[-1][1]:.4g}")] if self._scores else []
        kind = "parts of the loss" if weights else "sources"
        title = f"{type(pl_module).__name__}: {len(names)} {kind}, {trainer.global_step} steps"
        figure = mixture_figure(self._steps, shares, self._scores, self.monitor, title, weights=weights)
        head = "weight of each part of the loss at the end" if weights else "share of each source at the end"
        self._write(trainer, folder, figure, trainer.global_step, table(head, rows))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self._steps), "shares": list(self._shares), "scores": list(self._scores)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = list(state_dict.get("steps", []))
        self._shares = [list(shares) for shares in state_dict.get("shares", [])]
        self._scores = [(int(step), float(score)) for step, score in state_dict.get("scores", [])]


def _tuned(trainer: Trainer, module: LightningModule) -> GroupWeights | LossWeights:
    """Return the weights that the module or a callback tunes."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for candidate in (module, *callbacks):
        if isinstance(candidate, HasOuterLoop):
            for hyperparameter in candidate.outer_loop.outer.hyperparameters:
                if isinstance(hyperparameter, GroupWeights | LossWeights):
                    return hyperparameter
    raise MisconfigurationException(
        "MixtureReport needs a run that tunes GroupWeights or LossWeights. Got "
        f"{type(module).__name__} without them; add HypergradientCallback(GroupWeights([...]))."
    )
