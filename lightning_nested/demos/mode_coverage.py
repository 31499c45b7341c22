"""Report on the modes of a mixture of Gaussians that a generator covers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import at_least as require_at_least, checked
from lightning_nested.demos.report import Report
from lightning_nested.figures.mode_coverage import mode_figure
from lightning_nested.games import high_quality, modes_covered
from lightning_nested.linalg.saved import require_keys
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.run_folder import run_folder, table


@checked
class ModeCoverage(Report):
    """Count the covered modes and good samples of a :class:`GANModule` while it trains.

    A sample is of high quality if it lies within three standard deviations of a centre; a mode is covered if
    at least ``at_least`` such samples are nearest to it. Samples are drawn in evaluation mode with random
    numbers of their own, without side effects on training. Logs ``modes_covered`` and ``high_quality`` against
    game updates; at the end prints a line and writes ``results.json`` and the figure ``<name>.png``. With several
    in one Trainer each logs ``<name>/modes_covered`` and ``<name>/high_quality``, and writes ``<name>.json``.
    Metz et al. (2017), ICLR; Srivastava et al. (2017), NeurIPS 30.

    Args:
        every_n_updates: Game updates between counts.
        num_samples: Samples drawn for a count.
        at_least: Samples that make a mode covered.
        seed: Seed of the samples' latents.
        name: Name of the figure's file; several in one Trainer must differ in it.

    Attributes:
        results: Content of ``results.json``; empty before the end of ``fit``.
        history: ``(game_updates, modes, share of high quality)`` of each count.

    Raises:
        MisconfigurationException: In ``setup``: no ``sample`` in the module, or no ``centres`` and ``std`` in the
            datamodule; two with one name.
    """

    def __init__(
        self,
        every_n_updates: int = 500,
        *,
        num_samples: int = 2500,
        at_least: int = 20,
        seed: int = 0,
        name: str = "modes",
    ) -> None:
        super().__init__(name)
        require_at_least(1, every_n_updates=every_n_updates, num_samples=num_samples, at_least=at_least)
        require_at_least(0, seed=seed)
        self.every_n_updates, self.num_samples, self.at_least = every_n_updates, num_samples, at_least
        self.seed = seed
        self.history: list[tuple[int, int, float]] = []
        # Samples at each count, on CPU.
        self._pictures: list[tuple[int, Tensor]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.use.changed:
            self.history, self._pictures = [], []
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and not (
            hasattr(pl_module, "sample") and hasattr(data, "centres") and hasattr(data, "std")
        ):
            raise MisconfigurationException(
                "ModeCoverage needs a module that can sample and data whose modes are known. Got "
                f"{type(pl_module).__name__} on {type(data).__name__}; use GANModule on "
                "MixtureOfGaussiansDataModule."
            )
        names = [callback.name for callback in _of(trainer)]
        if len(set(names)) < len(names):
            raise MisconfigurationException(
                "Several ModeCoverage in one Trainer must have names of their own, which name their files. "
                f"Got {names}; give name=..."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if not self.history:
            self._count(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        updates = pl_module.game_updates
        if updates % self.every_n_updates == 0 and updates != self.history[-1][0]:
            self._count(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        folder = run_folder(trainer)
        # A fit without a step has no history.
        if not trainer.is_global_zero or not self.history:
            return
        if self.history[-1][0] != pl_module.game_updates:
            self._measure(trainer, pl_module)
        updates, modes, quality = self.history[-1]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.results = {
            "game_updates": updates,
            "modes": len(data.centres),
            "modes_covered": modes,
            "high_quality": quality,
            "samples": self.num_samples,
            "at_least": self.at_least,
        }
        figure = mode_figure(self.history, self._pictures, data.centres, data.std)
        file = "results.json" if len(_of(trainer)) == 1 else f"{self.name}.json"
        text = (
            f"\n{modes} of {len(data.centres)} modes covered (by at least {self.at_least} of {self.num_samples} "
            f"samples), {100 * quality:.1f} % of the samples within 3σ of a mode, after {updates} game updates"
        )
        rows = [(f"{n} game updates", f"{m:>3} modes {100 * q:>6.1f} % good") for n, m, q in self._shown()]
        text += table("on the way", rows)
        self._write(trainer, folder, figure, updates, text, file=file)

    def _shown(self) -> list[tuple[int, int, float]]:
        """Return up to eight counts, the first and the last among them."""
        last = len(self.history) - 1
        return [self.history[i] for i in sorted({round(last * part / 7) for part in range(8)})]

    @property
    @override
    def state_key(self) -> str:
        options = ("every_n_updates", "num_samples", "at_least", "seed", "name")
        return self._generate_state_key(**{name: getattr(self, name) for name in options})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "pictures": self._pictures}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require_keys(state_dict, ("history", "pictures"), "ModeCoverage")
        self.history, self._pictures = list(state_dict["history"]), list(state_dict["pictures"])

    def _count(self, trainer: Trainer, module: Any) -> None:
        _, modes, quality = self._measure(trainer, module)
        where = "" if len(_of(trainer)) == 1 else f"{self.name}/"
        metrics = {f"{where}modes_covered": float(modes), f"{where}high_quality": quality}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=module.game_updates)

    def _measure(self, trainer: Trainer, module: Any) -> tuple[int, int, float]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with RandomStream(self.seed, module.device):
            samples = module.sample(self.num_samples).float().cpu()
        modes = modes_covered(samples, data.centres, data.std, at_least=self.at_least)
        quality = float(high_quality(samples, data.centres, data.std))
        self.history.append((module.game_updates, modes, quality))
        self._pictures.append((module.game_updates, samples[:1000].clone()))
        return self.history[-1]


def _of(trainer: Trainer) -> list[ModeCoverage]:
    """Return every ModeCoverage of the Trainer."""
    return [c for c in trainer.callbacks if isinstance(c, ModeCoverage)]  # type: ignore[attr-defined]
