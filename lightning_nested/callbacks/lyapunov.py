"""Callback that measures the top Lyapunov exponents of a training run without changing it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.dynamics.lyapunov import kaplan_yorke_dimension
from lightning_nested.dynamics.tangents import Tangents
from lightning_nested.files import replace_figure
from lightning_nested.linalg.saved import require_keys
from lightning_nested.optim.update_rules import UpdateRule
from lightning_nested.trainer.follower import Follower
from lightning_nested.trainer.game_follower import GameFollower
from lightning_nested.trainer.joint_losses import is_game, refuse_other_modules
from lightning_nested.trainer.requirements import refuse_strategy
from lightning_nested.trainer.run_folder import draws_figures, keeps_files
from lightning_nested.trainer.training_follower import TrainingFollower
from lightning_nested.trainer.use import OneFitCallback

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@checked
class LyapunovCallback(OneFitCallback):
    """Measures how fast small differences of the weights grow during training.

    ``on_before_backward`` hands over the training loss with its graph: k products with its Hessian push k tangents of
    parameters and optimizer buffers through every step, exactly as the optimizer moves the weights, clipping
    included. There is no second forward pass, and the run uses the gradient behind the products too where that changes
    no bit (see :class:`SharedBackward`). BatchNorm, dropout and random numbers are those of the run, which is bit for
    bit the same as without this callback. Data-parallel runs average the products, so that exponents are those of the
    global batch.

    All players of a :class:`GameModule` are followed together, whether they step at once or in turns. Their losses are
    evaluated once more before each step, with their graph to every player and without side effects. A step is then a
    round, a game update.

    Exponents are in nats per optimizer step. If the first is positive, nearby runs separate (chaos); negative ones
    mean that they merge. Logged are ``lyapunov/local_i`` (last window), ``lyapunov/running_i`` (mean so far),
    ``lyapunov/kaplan_yorke`` (dimension, at most k), ``lyapunov/alignment`` and ``lyapunov/edge_of_chaos`` (1 while the
    smoothed first local exponent is positive; ``crossings`` lists the steps at which that changed). Loggers get the
    last window before each of the Trainer's ``log_every_n_steps``, monitors the last one of an epoch;
    ``local_exponents`` has all.

    Freezing or unfreezing parameters changes the space: new tangents begin there. Hooks of
    ``Module.register_full_backward_hook`` run in products as well, so one that counts its calls counts those.

    Args:
        k: Number of exponents. Each costs about one backward pass a step.
        every_n_steps: Follow every n-th step only, an estimate from a sample of steps; tangents wait in between.
        warmup_steps: Steps before the first that is followed.
        orthonormalize_every: Followed steps between orthonormalisations.
        align: Lanczos iterations (for a game: Arnoldi) at the first step, so that the frame begins with the directions
            that a step stretches most; 0: random.
        fixed_batch: Follow the loss of the first batch instead of the batches of the run, with the same dropout masks
            every time: one more forward pass a step.
        window: Weights of windows in the average: ``"uniform"``, or ``"bump"``, which gives little weight to the
            beginning and end of the run and resolves rotating directions, see :func:`lyapunov_exponents`.
        rule: Update rule of an optimizer that :func:`update_map` does not know.
        smoothing: Windows over which the first local exponent is averaged before its sign is read.
        figure: Draw ``lyapunov.png`` into the log folder when ``fit`` ends.

    Raises:
        MisconfigurationException: In ``setup``: manual optimization that is no game, an overridden
            ``configure_gradient_clipping``, sharding strategies, fp16. When ``fit`` starts: parameters with
            gradient hooks; a hook that comes later ends the measurement with a warning.
        ValueError: An argument is out of range; when ``fit`` starts, an optimizer is not known.

    Benettin, Galgani, Giorgilli & Strelcyn (1980), Meccanica 15:9-30.
    """

    def __init__(
        self,
        k: int = 1,
        *,
        every_n_steps: int = 1,
        warmup_steps: int = 0,
        orthonormalize_every: int = 1,
        align: int = 20,
        fixed_batch: bool = False,
        window: Literal["uniform", "bump"] = "uniform",
        rule: UpdateRule | None = None,
        smoothing: int = 20,
        figure: bool = False,
    ) -> None:
        at_least(1, k=k, every_n_steps=every_n_steps, orthonormalize_every=orthonormalize_every)
        at_least(1, smoothing=smoothing)
        at_least(0, warmup_steps=warmup_steps, align=align)
        self.k, self.every_n_steps, self.warmup_steps = k, every_n_steps, warmup_steps
        self.orthonormalize_every, self.align, self.fixed_batch = orthonormalize_every, align, fixed_batch
        self.window: Literal["uniform", "bump"] = window
        self.rule, self.smoothing, self.figure_wanted = rule, smoothing, figure
        self.windows: list[int] = []  # the step at which each window ended
        self.crossings: list[int] = []
        self._follower: Follower | None = None  # set while fit runs, and kept for reading after it
        self._chaotic: bool | None = None
        self._saved: dict[str, Any] | None = None  # checkpoint state waiting for the follower

    # ---- results

    @property
    def follower(self) -> Follower:
        """The follower of the run, which holds the tangents."""
        if self._follower is None:
            raise RuntimeError(
                "Exponents are only available after training has started. Got an unused callback; call trainer.fit."
            )
        return self._follower

    @property
    def tracker(self) -> Tangents | None:
        """The tangents and their growth; None before training has started."""
        return None if self._follower is None else self._follower.tracker

    @property
    def steps(self) -> int:
        """The number of steps before the current one."""
        return 0 if self._follower is None else self._follower.steps

    @property
    def exponents(self) -> Tensor:
        """(k,), the running exponents, largest first, nats per optimizer step."""
        return self.follower.tracker.running()

    @property
    def local_exponents(self) -> Tensor:
        """(windows, k), the exponents of each window alone."""
        if self._follower is None:
            return torch.empty(0, self.k)
        return self._follower.tracker.growth / self.orthonormalize_every

    def should_follow(self, trainer: Trainer, step: int) -> bool:
        """Return True if ``step``, counted from 0, is to be followed; must agree on all processes."""
        return step >= self.warmup_steps and (step - self.warmup_steps) % self.every_n_steps == 0

    def draw(self) -> Figure:
        """Draw local and running exponents against the step, with the crossings of zero."""
        from lightning_nested.figures.lyapunov import lyapunov_figure

        unit = self.follower.unit
        return lyapunov_figure(self.windows, self.local_exponents, self.crossings, self.smoothing, unit=unit)

    def plot(self) -> Figure:
        """Return the figure of :meth:`draw`, under the name that it has in other callbacks."""
        return self.draw()

    # ---- lifecycle

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._follower = None  # of an earlier fit
        self.use.at_end(self._let_go)
        refuse_other_modules(pl_module)
        refuse_strategy(trainer, "LyapunovCallback", static_graph=False)
        if is_overridden("configure_gradient_clipping", pl_module):
            raise MisconfigurationException(
                "LyapunovCallback differentiates the Trainer's own clipping. Got "
                f"{type(pl_module).__name__} that overrides configure_gradient_clipping; use "
                "Trainer(gradient_clip_val=..., gradient_clip_algorithm=...) instead."
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "LyapunovCallback needs gradients that are not scaled. Got precision='16-mixed'; use 'bf16-mixed' or "
                "'32-true'."
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.windows, self.crossings, self._chaotic = [], [], None
        if not is_game(pl_module):
            self._follow(TrainingFollower, trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: players of a game get their optimizers in on_fit_start of the module.
        if is_game(pl_module):
            self._follow(GameFollower, trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        follower = self.follower
        follower.begin_batch(batch)
        follower.is_open = not follower.stopped and self.should_follow(trainer, follower.steps)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        # Nobody follows yet where validation computes gradients before training.
        if self._follower is not None:
            with self._follower.stopping():
                self._follower.observe(loss)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        if self._follower is not None:
            with self._follower.stopping():
                if self._follower.advance(optimizer):
                    self._end_window(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with self.follower.stopping():
            if self.follower.end_batch():
                self._end_window(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.windows:
            pl_module.log_dict(self._metrics(), logger=False, sync_dist=trainer.world_size > 1)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.figure_wanted and self.windows and keeps_files(trainer) and draws_figures():
            self._save_figure(Path(trainer.log_dir or trainer.default_root_dir))

    @property
    @override
    def state_key(self) -> str:
        names = "k fixed_batch every_n_steps warmup_steps orthonormalize_every align window"
        return self._generate_state_key(**{name: getattr(self, name) for name in names.split()})

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._follower is None:
            return dict(self._saved) if self._saved is not None else {}
        own = {"windows": self.windows, "crossings": self.crossings, "chaotic": self._chaotic}
        return {**self._follower.state_dict(), **own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._saved = state_dict
        if self._follower is not None:
            self._restore(state_dict)

    def _follow(
        self, kind: type[TrainingFollower | GameFollower], trainer: Trainer, pl_module: LightningModule
    ) -> None:
        self._follower = kind(
            trainer,
            pl_module,
            fixed=self.fixed_batch,
            rule=self.rule,
            k=self.k,
            align=self.align,
            orthonormalize_every=self.orthonormalize_every,
            window=self.window,
        )
        if self._saved is not None:
            self._restore(self._saved)

    def _restore(self, state: Mapping[str, Any]) -> None:
        require_keys(state, ("windows", "crossings", "chaotic"), "LyapunovCallback")
        self.follower.load_state_dict(state)
        self.windows, self.crossings = list(state["windows"]), list(state["crossings"])
        self._chaotic, self._saved = state["chaotic"], None

    # ---- windows

    def _let_go(self) -> None:
        if self._follower is not None:
            self._follower.put_back()
        self._saved = None

    def _end_window(self, trainer: Trainer) -> None:
        """Read the sign of the smoothed exponent, and log."""
        self.windows.append(self.steps)
        recent = self.follower.tracker.growth[-self.smoothing :, 0]
        chaotic = bool(recent.mean() > 0)
        if self._chaotic is not None and chaotic != self._chaotic and len(recent) == self.smoothing:
            self.crossings.append(self.steps)
        if len(recent) == self.smoothing or self._chaotic is None:
            self._chaotic = chaotic
        if self._logs_now(trainer):
            self.follower.log(self._metrics())

    def _metrics(self) -> dict[str, float]:
        tracker = self.follower.tracker
        running = tracker.running()
        return {
            **{f"lyapunov/local_{i}": v for i, v in enumerate(tracker.local().tolist())},
            **{f"lyapunov/running_{i}": v for i, v in enumerate(running.tolist())},
            "lyapunov/kaplan_yorke": float(kaplan_yorke_dimension(running)),
            "lyapunov/edge_of_chaos": float(tracker.growth[-self.smoothing :, 0].mean() > 0),
            "lyapunov/alignment": tracker.alignment,
        }

    def _logs_now(self, trainer: Trainer) -> bool:
        """Return True at the last window before a log step of the Trainer: logging costs more than a small step."""
        done = self.follower.logged_steps()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        following = done + self.orthonormalize_every * self.every_n_steps
        return every > 0 and ((done + 1) % every == 0 or (done + 1) // every != following // every)

    @rank_zero_only
    def _save_figure(self, folder: Path) -> None:
        replace_figure(folder / "lyapunov.png", self.draw(), dpi=110)
