"""The spectrum of a running game: what its players do to each other, and which momentum suits it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from typing_extensions import override

from lightning_nested.callbacks.fitting import reduction
from lightning_nested.callbacks.game_momentum import (
    EXACT_LIMIT,
    alternating_rate,
    better_momentum,
    predicted_rate,
)
from lightning_nested.callbacks.game_spectrum_figure import spectrum_figure
from lightning_nested.callbacks.isolation import RandomStream, without_trace
from lightning_nested.callbacks.outer_batches import base_seed
from lightning_nested.callbacks.step_dynamics import (
    Momentum,
    OwnStepJacobian,
    StepJacobian,
    set_momentum,
    step_dynamics,
)
from lightning_nested.games import JacobianOperator, leading_eigenvalues
from lightning_nested.games.spectrum import SpectrumError, Which
from lightning_nested.hypergradient.curvature import LinearOperator
from lightning_nested.hypergradient.vectors import Vector


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredSpectrum:
    """The spectrum of a game at one moment of its training.

    Attributes:
        game_updates: When.
        eigenvalues: Of DJ, complex128 of shape (k,), the largest first.
        shares: How much of each eigenvector of √D J √D, which is similar, belongs to each player, shape
            (k, players), rows of sum 1; None where eigenvectors were not computed.
        own: Real eigenvalues of each player's own block D_i ∂²L_i/∂w_i², by player.
        momentum: Common to all players; None where they differ.
        alternating: Whether the players step one after the other.
        rate: Worst predicted rate over the eigenvalues; None where it cannot be predicted.
        num_products: Products with Jacobians it took.
        equal_curvatures: Whether the rate assumes that coupled coordinates have the same own curvature, as
            :func:`lightning_nested.games.convergence_rate` does for alternating players.
    """

    game_updates: int
    eigenvalues: Tensor
    shares: Tensor | None
    own: dict[str, Tensor]
    momentum: Momentum | None
    alternating: bool
    rate: float | None
    num_products: int
    equal_curvatures: bool = False


class GameSpectrumCallback(Callback):
    """Measures the leading eigenvalues of a running :class:`GameModule`, and adapts its momentum on request.

    With J the Jacobian of the joint gradient (∂L_i/∂w_i)_i and D the diagonal that each optimizer puts before
    it (its learning rate, for Adam times 1/(√v̂+ε)), the eigenvalues are those of DJ: what one step multiplies.
    So the learning rate of the predictions is 1, and a spectrum of plain gradient steps is α times that of J.
    The loss of a player that ascends (``maximize=True``) counts with a minus sign.
    Real positive eigenvalues are cooperation, imaginary parts conflict, negative real parts repel. The second
    moments v̂ are held still, weight decay is left out.

    All products see one batch, the first of the run, and the same random numbers; batch norm, spectral norm,
    metrics, logs and the global random stream are as before afterwards: without ``adapt`` training is the same
    to the last bit. In a data-parallel run every product is averaged, so the spectrum is that of the global
    batch, and the same on every process.

    Logs ``spectrum/…`` against game updates: ``max_modulus``, ``max_real``, ``min_real``, ``max_imaginary``,
    ``adversarial`` (share of eigenvalues with |Im| > |Re|), ``predicted_rate`` (worst of the eigenvalues measured;
    needs one momentum for all players and one step each per update; for alternating players exact with ``k=None``
    in games of up to 200 numbers, elsewhere assuming equal curvatures, see :func:`convergence_rate`),
    ``own/<player>``; and to TensorBoard the log-polar figure with the rate's contours.

    ``adapt=True`` sets |β| and arg β of :class:`ComplexSGD` and :class:`ComplexAdam`, one value for all players,
    to the values whose worst predicted rate is smallest at the present learning rates, never further from the present
    ones than ``max_change``. Eigenvalues that no momentum contracts are left out. If nothing better is found,
    or no rate can be predicted (several steps per update, momenta that differ, ``debias=True`` with a phase: a warning
    says so), nothing is changed.

    Args:
        every_n_updates: Game updates between measurements; the first is after the first update.
        k: Eigenvalues to find by products; None: all, with the players' shares, from the dense matrix.
        which: Which ones lead, see :func:`game_spectrum`.
        per_player: Also measure every player's own block.
        adapt: Set momentum and phase.
        max_momentum: Bound of |β| in ``adapt``.
        max_change: Bounds of one change of |β| and of arg β.
        max_products: Where a measurement gives up.

    Attributes:
        history: What was measured.

    Raises:
        ValueError: An argument out of range.
        MisconfigurationException: In ``setup``: the module is no GameModule; ``adapt`` finds an optimizer without
            complex momentum.
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
        if every_n_updates < 1 or (k is not None and k < 1) or max_products < 1:
            raise ValueError(
                "every_n_updates, k and max_products must be at least 1 (k: or None). "
                f"Got {every_n_updates}, {k} and {max_products}."
            )
        if which not in get_args(Which):
            raise ValueError(f"which must be one of {get_args(Which)}. Got {which!r}.")
        if not 0.0 <= max_momentum < 1.0:
            raise ValueError(f"max_momentum must lie in [0, 1): |β| ≥ 1 never converges. Got {max_momentum}.")
        if not min(max_change) >= 0:
            raise ValueError(f"max_change must not be negative. Got {max_change}.")
        self.every_n_updates, self.k, self.which, self.per_player = every_n_updates, k, which, per_player
        self.adapt, self.max_momentum, self.max_change = adapt, max_momentum, max_change
        self.max_products = max_products
        self.history: list[MeasuredSpectrum] = []
        self._batch: Any = None
        self._seed: int | None = None
        self._measured = 0  # game updates at the last measurement
        self._told = False  # that it cannot adapt
        self._saved: Mapping[str, Any] | None = None

    def should_measure(self, game_updates: int) -> bool:
        """Whether to measure after this update; to be overridden."""
        return game_updates == 1 or game_updates % self.every_n_updates == 0

    # ---- lifecycle

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not all(hasattr(pl_module, name) for name in ("player_losses", "game_updates")):
            raise MisconfigurationException(
                "GameSpectrumCallback measures the game of a GameModule. "
                f"Got {type(pl_module).__name__}; extend lightning_nested.modules.GameModule."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed = base_seed(trainer)  # on every process
        saved, self._saved = self._saved, None
        if saved is not None:
            self._seed, self._measured = saved["seed"], saved["measured"]
            batches = saved["batches"]
            if trainer.global_rank < len(batches):
                self._batch = trainer.strategy.batch_to_device(batches[trainer.global_rank])
        if self._seed is None:
            self._seed = seed
        for name, optimizer in _optimizers(pl_module).items() if self.adapt else ():
            group = optimizer.param_groups[0]
            if "phase" not in group:
                raise MisconfigurationException(
                    "adapt=True sets momentum and phase of ComplexSGD and ComplexAdam. Got "
                    f"{type(optimizer).__name__} for {name!r}; use one of them, or adapt=False."
                )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._batch is None:
            self._batch = apply_to_collection(batch, Tensor, lambda t: t.detach().clone())

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
            self._adapt(trainer, pl_module, measured)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(k=self.k, which=self.which, every_n_updates=self.every_n_updates)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._seed is None:
            return dict(self._saved or {})
        batch = apply_to_collection(self._batch, Tensor, lambda t: t.cpu())
        batches = [batch]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            batches = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(batches, batch)
        return {"seed": self._seed, "measured": self._measured, "batches": batches}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None

    # ---- the measurement

    def measure(self, trainer: Trainer, pl_module: Any) -> MeasuredSpectrum:
        """The spectrum at the present weights; leaves no trace.

        Raises:
            SpectrumError: The eigenvalues did not converge.
            FloatingPointError: A loss or a product is not finite.
            ValueError: Parameters of one player ascend and others descend.
        """
        players = pl_module.running_players
        tensors = tuple(player.parameters for player in players.values())
        dynamics = {
            name: step_dynamics(player.optimizer.optimizer, player.parameters)
            for name, player in players.items()
        }
        losses = self._losses(trainer, pl_module, list(players))
        if not self.history:
            _warn_if_detached(list(players), losses, tensors)
        descended = [loss * each.sign for loss, each in zip(losses, dynamics.values(), strict=True)]
        jacobian = JacobianOperator(descended, tensors, reduce=reduction(trainer))
        operator = StepJacobian(jacobian, tuple(d for each in dynamics.values() for d in each.scale))
        eigenvalues, shares, products = self._eigenvalues(operator)
        own = {}
        for index, (name, each) in enumerate(dynamics.items() if self.per_player else ()):
            found, _, used = self._eigenvalues(OwnStepJacobian(jacobian.block(index), each.scale))
            own[name], products = found.real, products + used
        common = {each.momentum for each in dynamics.values()}
        momentum = common.pop() if len(common) == 1 else None
        rate, assumed = self._rate(pl_module, operator, eigenvalues, momentum)
        return MeasuredSpectrum(
            game_updates=pl_module.game_updates,
            eigenvalues=eigenvalues,
            shares=shares,
            own=own,
            momentum=momentum,
            alternating=pl_module.update == "alternating",
            rate=rate,
            num_products=products,
            equal_curvatures=assumed,
        )

    def _rate(
        self, module: Any, operator: StepJacobian, eigenvalues: Tensor, momentum: Momentum | None
    ) -> tuple[float | None, bool]:
        """The predicted rate, and whether it assumes equal curvatures."""
        if max(module.steps_per_player.values(), default=1) > 1:
            return None, False
        alternating: bool = module.update == "alternating"
        if alternating and momentum is not None and momentum.kind == "momentum":
            if self.k is None and sum(operator.sizes) <= EXACT_LIMIT:
                return alternating_rate(operator.dense(), operator.sizes, momentum), False
            return predicted_rate(eigenvalues, momentum, True), True
        return predicted_rate(eigenvalues, momentum, alternating), False

    def _losses(self, trainer: Trainer, module: Any, names: list[str]) -> list[Tensor]:
        """All players' losses at one point, on the fixed batch, with the same random numbers every time."""
        assert self._seed is not None
        stream = RandomStream(self._seed + 7_368_787 * trainer.global_rank, module.device)
        with stream, without_trace(module, trainer), module.joint_evaluation(names), torch.enable_grad():
            losses = module.player_losses(names, self._batch)
        return [losses[name] for name in names]

    def _eigenvalues(self, operator: LinearOperator) -> tuple[Tensor, Tensor | None, int]:
        """The leading ones, the players' shares of them, and the number of products."""
        assert operator.like is not None
        size = sum(p.numel() for p in operator.like)
        if self.k is not None or not isinstance(operator, StepJacobian):
            k = None if self.k is None else min(self.k, size)
            which = "largest_magnitude" if operator.symmetric else self.which
            found = leading_eigenvalues(operator, k, which, max_products=self.max_products)
            return found.eigenvalues, None, found.num_products
        values, vectors = np.linalg.eig(operator.dense().detach().cpu().double().numpy())
        mass = np.abs(vectors) ** 2
        owner = np.repeat(operator.jacobian.owners, [p.numel() for p in operator.like])
        shares = [mass[owner == player].sum(axis=0) for player in range(operator.jacobian.num_players)]
        order = np.argsort(-np.abs(values), kind="stable")
        total = np.stack(shares, axis=1)[order]
        return (
            torch.from_numpy(values.astype(np.complex128)[order]),
            torch.from_numpy(total / total.sum(axis=1, keepdims=True)),
            size,
        )

    # ---- what follows from it

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
            metrics["predicted_rate"] = measured.rate
        if measured.momentum is not None:
            metrics |= {"momentum": measured.momentum.momentum, "phase": measured.momentum.phase}
        metrics |= {f"own/{name}": float(own.max()) for name, own in measured.own.items()}
        named = {f"spectrum/{name}": value for name, value in metrics.items()}
        module.log_dict(named, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(named, step=measured.game_updates)
            add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
            if add_figure is not None and trainer.is_global_zero:
                figure = spectrum_figure([measured], list(module.running_players))
                add_figure("spectrum", figure, measured.game_updates)

    def _adapt(self, trainer: Trainer, module: Any, measured: MeasuredSpectrum) -> None:
        now = measured.momentum
        if now is None or now.kind != "momentum" or measured.rate is None:
            if not self._told:
                self._told = True
                rank_zero_warn(
                    "adapt=True needs a predicted rate. Got none, so momentum and phase stay as they are: "
                    f"{_why_no_rate(module, now)}."
                )
            return
        better = better_momentum(
            measured.eigenvalues,
            now,
            alternating=measured.alternating,
            max_momentum=self.max_momentum,
            max_change=self.max_change,
        )
        for optimizer in _optimizers(module).values():
            set_momentum(optimizer, better.momentum, better.phase)


def _optimizers(module: Any) -> dict[str, torch.optim.Optimizer]:
    return {name: player.optimizer.optimizer for name, player in module.running_players.items()}


def _why_no_rate(module: Any, momentum: Momentum | None) -> str:
    if momentum is None:
        return (
            "the players, or groups of one, differ in momentum, phase or kind of optimizer; give all the same"
        )
    if momentum.kind != "momentum":
        return "the optimizers' update is another one, as that of ComplexAdam with debias=True and a phase is"
    return f"players take several steps in an update (steps_per_player={dict(module.steps_per_player)})"


def _warn_if_detached(names: list[str], losses: list[Tensor], tensors: Sequence[Vector]) -> None:
    """A spectrum without the coupling of the players looks harmless, and is wrong."""
    for name, loss in zip(names, losses, strict=True):
        for other, held in zip(names, tensors, strict=True):
            if all(g is None for g in torch.autograd.grad(loss, held, retain_graph=True, allow_unused=True)):
                rank_zero_warn(
                    f"The loss of {name!r} has no graph to the parameters of {other!r}. If it depends on them, the "
                    "spectrum lacks that coupling: in player_loss, do not detach and do not use torch.no_grad() "
                    "where self.joint_graph is True."
                )
