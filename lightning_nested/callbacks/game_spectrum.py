"""Callback that measures the spectrum of a running game, and adapts its momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.figures.game_spectrum import spectrum_figure
from lightning_nested.games.adaptation import adapt_momenta
from lightning_nested.games.joint_step import ADAPT_LIMIT
from lightning_nested.games.measured_spectrum import MeasuredSpectrum, measure_spectrum
from lightning_nested.linalg.eigenvalues import DENSE_LIMIT, SpectrumError, Which
from lightning_nested.linalg.saved import require_keys
from lightning_nested.optim.step_dynamics import step_dynamics
from lightning_nested.trainer.fixed_batches import FixedBatches
from lightning_nested.trainer.joint_losses import (
    RunningGame,
    RunningPlayer,
    is_game,
    joint_losses,
    warn_if_detached,
)
from lightning_nested.trainer.lightning import reduction
from lightning_nested.trainer.run_folder import draws_figures
from lightning_nested.trainer.use import OneFitCallback

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checked
class GameSpectrumCallback(OneFitCallback):
    """Measures the leading eigenvalues of a running :class:`GameModule`, and adapts its momentum on request.

    With J the Jacobian of the joint gradient (∂L_i/∂w_i)_i and D the diagonal that each optimizer puts before
    it (its learning rate, for Adam times 1/(√v̂+ε)), the eigenvalues are those of DJ: what one step multiplies.
    So the learning rate of the predictions is 1, and a spectrum of plain gradient steps is α times that of J.
    Real positive eigenvalues are cooperation, imaginary parts conflict, negative real parts repel. The loss of a
    player that ascends (``maximize=True``) counts with a minus sign; v̂ is held still, weight decay is left out.

    All products see one batch, the first of the run, and the same random numbers, without side effects: without
    ``adapt`` training is the same to the last bit. In a data-parallel run the spectrum is that of the global batch, and
    the same on every process. A fit of another module, datamodule or Trainer is another run.

    Logs ``spectrum/…`` against game updates: ``max_modulus``, ``max_real``, ``min_real``, ``max_imaginary``,
    ``adversarial`` (share of eigenvalues with |Im| > |Re|), ``own/<player>``, ``momentum/<player>``,
    ``phase/<player>`` and ``predicted_rate``; and to TensorBoard the log-polar figure with the rate's contours. In
    games of up to 200 numbers the rate is that of the players' joint step itself (``rate_is_exact`` is 1), whatever
    their order, numbers of steps, curvatures and momenta. In larger ones it is the worst over the eigenvalues measured;
    it needs one momentum for all players and one step each per update, and assumes equal curvatures where they
    alternate, see :func:`convergence_rate`.

    ``adapt=True`` sets |β| and arg β of the players whose optimizer is a :class:`ComplexSGD` or a :class:`ComplexAdam`
    without ``debias``, never further from the current ones than ``max_change``; the others keep theirs. In games of up
    to 60 numbers each player gets its own, by the rate of the joint step (``adapts_each_player`` is 1); in larger ones
    all get the same, by the rate over the eigenvalues measured. Directions that no momentum contracts are left out.
    Where nothing better is found, nothing is changed, nor where no rate can be predicted: a warning says why.

    Args:
        every_n_updates: Game updates between measurements; the first is after the first update.
        k: Eigenvalues to find by products; None: all, with the players' shares, from the dense matrix.
        which: Eigenvalues that lead, see :func:`game_spectrum`.
        per_player: Also measure every player's own block.
        adapt: Set momentum and phase.
        max_momentum: Bound of |β| in ``adapt``.
        max_change: Bounds of one change of |β| and of arg β.
        max_products: Products at which a measurement gives up.

    Attributes:
        history: A :class:`MeasuredSpectrum` of each measurement, in order; its ``game_updates`` counts those of its
            run.

    Raises:
        ValueError: An argument out of range.
        MisconfigurationException: The module is no GameModule; ``adapt`` finds no optimizer with complex momentum;
            ``k=None`` in a game of more than 4 096 numbers.
    """

    def __init__(
        self,
        every_n_updates: int = 500,
        k: int | None = 20,
        *,
        which: Which = "largest_magnitude",
        per_player: bool = True,
        adapt: bool = False,
        max_momentum: float = 0.95,
        max_change: tuple[float, float] = (0.1, math.pi / 8),
        max_products: int = 2000,
    ) -> None:
        at_least(1, every_n_updates=every_n_updates, k=k, max_products=max_products)
        if not 0.0 <= max_momentum < 1.0:
            raise ValueError(f"max_momentum must lie in [0, 1): |β| ≥ 1 never converges. Got {max_momentum}.")
        at_least(0, max_change=max_change)
        self.every_n_updates, self.k, self.which, self.per_player = every_n_updates, k, which, per_player
        self.adapt, self.max_momentum, self.max_change = adapt, max_momentum, max_change
        self.max_products = max_products
        self.history: list[MeasuredSpectrum] = []
        self._fixed: FixedBatches | None = None  # the first batch of the run, and its random numbers
        self._measured = 0  # game updates at the last measurement
        self._told: set[str] = set()  # messages that appear once a run
        self._saved: Mapping[str, Any] | None = None  # checkpoint state waiting for on_train_start

    def should_measure(self, game_updates: int) -> bool:
        """Return True to measure after this update; to be overridden."""
        return game_updates == 1 or game_updates % self.every_n_updates == 0

    def plot(self, last: int = 3) -> Figure:
        """Draw the last measured spectra side by side, in the log-polar figure that TensorBoard gets.

        Args:
            last: How many of ``history``.

        Raises:
            ValueError: Nothing was measured yet, or ``last`` is below 1.
            MissingExtraError: matplotlib is not installed.
        """
        at_least(1, last=last)
        if not self.history:
            raise ValueError(
                "Spectra are drawn once they have been measured. Got an empty history; call plot after trainer.fit."
            )
        shown = self.history[-last:]
        return spectrum_figure(shown, list(shown[-1].momenta))

    # ---- lifecycle

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.use.changed:
            self._fixed, self._measured, self._told = None, 0, set()
        self.use.at_end(self._drop_saved)
        if not is_game(pl_module):
            raise MisconfigurationException(
                "GameSpectrumCallback measures the game of a GameModule. "
                f"Got {type(pl_module).__name__}; extend lightning_nested.modules.GameModule."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._fixed is None:
            self._fixed = FixedBatches(trainer)
        saved, self._saved = self._saved, None
        if saved is not None:
            require_keys(saved, ("seed", "measured", "batches"), "GameSpectrumCallback")
            self._measured = saved["measured"]
            batches = [[] if batch is None else [batch] for batch in saved["batches"]]
            self._fixed.load_state_dict({"seed": saved["seed"], "batches": batches})
        if self.k is None:
            _check_dense(pl_module)
        if self.adapt:
            others = _without_complex_momentum(_optimizers(pl_module))
            if others:
                self._tell(
                    f"adapt=True sets momentum and phase of ComplexSGD and ComplexAdam. Others keep theirs: {others}."
                )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self._fixed is not None
        self._fixed.get(0, batch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        updates: int = pl_module.game_updates
        if updates == self._measured or not self.should_measure(updates):
            return
        self._measured = updates
        try:
            measured = self.measure(trainer, pl_module)
        except (SpectrumError, FloatingPointError) as error:
            rank_zero_warn(f"GameSpectrumCallback measured nothing after {updates} game updates: {error}")
            return
        self.history.append(measured)
        self._log(trainer, pl_module, measured)
        if self.adapt:
            self._adapt(pl_module, measured)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(k=self.k, which=self.which, every_n_updates=self.every_n_updates)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._fixed is None:
            return dict(self._saved or {})
        state = self._fixed.state_dict()
        batches = [held[0] if held else None for held in state["batches"]]
        return {"seed": state["seed"], "measured": self._measured, "batches": batches}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None

    def _drop_saved(self) -> None:
        self._saved = None

    def measure(self, trainer: Trainer, pl_module: Any) -> MeasuredSpectrum:
        """Measure the spectrum at the current weights, without side effects.

        Raises:
            SpectrumError: The eigenvalues did not converge.
            FloatingPointError: A loss or a product is not finite.
            ValueError: Parameters of one player ascend and others descend.
        """
        assert self._fixed is not None
        if self.k is None:
            _check_dense(pl_module)
        players: Mapping[str, RunningPlayer] = pl_module.running_players
        dynamics = {
            name: step_dynamics(each.optimizer.optimizer, each.parameters) for name, each in players.items()
        }
        names, tensors = list(players), [each.parameters for each in players.values()]
        losses = joint_losses(pl_module, names, *self._fixed.get(0, None))
        if "detached" not in self._told:
            self._told.add("detached")
            warn_if_detached(names, losses, tensors)
        steps = tuple(pl_module.steps_per_player.get(name, 1) for name in names)
        measured = measure_spectrum(
            losses,
            tensors,
            dynamics,
            k=self.k,
            which=self.which,
            steps=steps if pl_module.update == "alternating" else None,
            per_player=self.per_player,
            max_products=self.max_products,
            reduce=reduction(trainer),
        )
        return replace(measured, game_updates=pl_module.game_updates)

    def _log(self, trainer: Trainer, module: Any, measured: MeasuredSpectrum) -> None:
        values = measured.eigenvalues
        metrics = {
            "max_modulus": float(values.abs().max()),
            "max_real": float(values.real.max()),
            "min_real": float(values.real.min()),
            "max_imaginary": float(values.imag.max()),
            "adversarial": float((values.imag.abs() > values.real.abs()).double().mean()),
        }
        if measured.rate is not None:
            metrics |= {"predicted_rate": measured.rate, "rate_is_exact": float(measured.exact)}
        if measured.momentum is not None:
            metrics |= {"momentum": measured.momentum.momentum, "phase": measured.momentum.phase}
        for name, momentum in measured.momenta.items():
            if momentum is not None and momentum.kind == "momentum":
                metrics |= {f"momentum/{name}": momentum.momentum, f"phase/{name}": momentum.phase}
        if self.adapt:
            metrics["adapts_each_player"] = float(measured.adapts_each_player)
        metrics |= {f"own/{name}": float(own.max()) for name, own in measured.own.items()}
        named = {f"spectrum/{name}": value for name, value in metrics.items()}
        module.log_dict(named, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(named, step=measured.game_updates)
            add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
            if add_figure is not None and trainer.is_global_zero and draws_figures():
                figure = spectrum_figure([measured], list(module.running_players))
                add_figure("spectrum", figure, measured.game_updates)

    def _adapt(self, module: RunningGame, measured: MeasuredSpectrum) -> None:
        optimizers = _optimizers(module)
        try:
            adapt_momenta(measured, optimizers, max_momentum=self.max_momentum, max_change=self.max_change)
        except ValueError as error:
            self._tell(
                "adapt=True needs a predicted rate, and momenta that it can set. Momentum and phase stay as they are: "
                f"{error}."
            )
            return
        if not measured.adapts_each_player:
            self._tell(
                "GameSpectrumCallback adapts one momentum for all players: this game has more than "
                f"{ADAPT_LIMIT} numbers, too many to give each player its own by the rate of their joint step.",
                rank_zero_info,
            )

    def _tell(self, text: str, how: Callable[[str], object] = rank_zero_warn) -> None:
        if text not in self._told:
            self._told.add(text)
            how(text)


def _optimizers(module: RunningGame) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizer of each player."""
    return {name: player.optimizer.optimizer for name, player in module.running_players.items()}


def _check_dense(module: RunningGame) -> None:
    """Refuse the dense Jacobian of a large game before it is computed."""
    size = sum(p.numel() for player in module.running_players.values() for p in player.parameters)
    if size > DENSE_LIMIT:
        raise MisconfigurationException(
            f"GameSpectrumCallback(k=None) needs the dense Jacobian, of at most {DENSE_LIMIT} numbers. Got players of "
            f"{size}; use k=20 for the leading eigenvalues by products."
        )


def _without_complex_momentum(optimizers: Mapping[str, torch.optim.Optimizer]) -> str:
    """Name the players that cannot be adapted, for a warning; refuse a game without any that can."""
    without = [
        f"{type(optimizer).__name__} for {name!r}"
        for name, optimizer in optimizers.items()
        if "phase" not in optimizer.param_groups[0]
    ]
    if len(without) == len(optimizers):
        raise MisconfigurationException(
            "adapt=True sets momentum and phase of ComplexSGD and ComplexAdam. "
            f"Got {', '.join(without)}; use one of them, or adapt=False."
        )
    return ", ".join(without)
