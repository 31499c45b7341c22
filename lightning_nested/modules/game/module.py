"""A LightningModule for games: several players, each with its own loss and optimizer."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_nested.arguments import check
from lightning_nested.linalg.saved import require_keys
from lightning_nested.modules.game.checks import check_factories, check_monitors, check_players
from lightning_nested.modules.game.log_losses import log_losses
from lightning_nested.modules.game.loop import GameLoop, Update, check_steps, schedule
from lightning_nested.modules.game.players import (
    Player,
    build_optimizers,
    check_gradient_counts,
    check_restored,
    match_players,
)
from lightning_nested.modules.game.round import Round
from lightning_nested.modules.game.steps import PlayerSteps
from lightning_nested.trainer.checkpoint_advice import WithoutCheckpointAdvice
from lightning_nested.trainer.lightning import built_by_command_line, log_by_game_updates, reduction
from lightning_nested.trainer.random_stream import random_states, restore_random_state, seed_processes_apart
from lightning_nested.trainer.requirements import refuse_loss_scaling, refuse_strategy, require_hooks
from lightning_nested.trainer.schedulers import step_plateau_schedulers, step_schedulers
from lightning_nested.trainer.use import OneFitModule, Use

_STATE = ("game_updates", "gradient_evaluations", "position", "epoch_open", "sums", "random")
_HOOKS = "setup, on_fit_start, on_train_start, on_save_checkpoint and on_load_checkpoint"


class GameModule(OneFitModule, LightningModule):
    """Players with a loss each: w_i ← w_i − α_i ∂L_i(w_1, …, w_n)/∂w_i, together or in turns; to be extended.

    A subclass names the players and writes their losses:

        class GAN(GameModule):
            def __init__(self, generator, discriminator, **kwargs):
                super().__init__(**kwargs)
                self.generator, self.discriminator = generator, discriminator

            def players(self):                                     # in the order in which they step
                return {"discriminator": self.discriminator, "generator": self.generator}

            def player_loss(self, name, batch):                    # a scalar with its graph
                fake = self.generator(torch.randn(len(batch), 64, device=self.device))
                if name == "generator":
                    return -self.discriminator(fake).mean()
                real, fake = self.discriminator(batch), self.discriminator(fake.detach())
                return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

        GAN(G(), D(), optimizer=lambda params: ComplexAdam(params, lr=2e-4), steps_per_player={"discriminator": 4})

    **Updates.** ``"alternating"``: the players step in turns, each against the others' new parameters, each as
    often as ``steps_per_player`` says; every step takes a fresh batch of the Trainer, so one game update of 4
    discriminator steps and a generator step takes 5 batches (``GameLoop(reuse_batch=True)``: 4).
    ``"simultaneous"``: all gradients are taken at the same point, from the same batch; then all step.
    An optimizer with ``num_gradients == 2`` (``Extragradient``) gets its second gradient at the extrapolated
    point, from the same batch and random numbers; buffers (batch norm, spectral norm) and torchmetrics move once.

    **The clock.** ``game_updates`` counts complete rounds, and so does ``trainer.global_step``: in
    ``Trainer(max_steps=n)``, ``ModelCheckpoint(every_n_train_steps=n)``, its file name's ``{step}`` and
    ``EMAWeightAveraging`` a step is a game update. Losses reach loggers every ``log_every_n_steps`` game updates as
    ``<player>_loss``, and can be monitored at every one. All that is logged has game updates as the x axis:
    ``self.log`` in training and validation, and callbacks such as ``LearningRateMonitor``.

    **Freezing.** Callbacks such as ``BaseFinetuning`` may freeze and unfreeze parameters in training; open gradient
    sums are then cleared. Players may share frozen parts.

    **Processes.** Works under plain ``ddp``: each player's gradient comes from ``torch.autograd.grad`` and is
    averaged in one flat message; DDP's hooks do not fire. Each process draws random numbers of its own.

    **Resuming.** A checkpoint holds the position in the round, open gradient sums and every process's random
    state: a resumed run goes on as if it had not stopped, at an epoch's end, and inside an epoch too where the
    dataloader can resume. A subclass that overrides one of ``setup``, ``on_fit_start``, ``on_train_start``,
    ``on_save_checkpoint``, ``on_load_checkpoint`` calls ``super()``'s in it.

    Args:
        optimizer: From parameters to an optimizer, for every player.
        optimizers: From parameters to an optimizer, by player; wins over ``optimizer``. Without both, override
            ``configure_optimizers`` to return one optimizer for each player, in any order.
        scheduler: From an optimizer to a scheduler, for every player, stepped after each game update
            (``ReduceLROnPlateau``: after each epoch).
        schedulers: From an optimizer to a scheduler, by player; wins over ``scheduler``.
        update: ``"alternating"`` or ``"simultaneous"``.
        steps_per_player: Steps of a player in one alternating update, where not 1.
        loop: Accumulation, clipping, batches.

    Attributes:
        game_updates: Complete rounds so far; saved in checkpoints.
        gradient_evaluations: Gradients of one player so far; compare methods by it.
        player_batches: Batches that each player's steps have taken so far; saved in checkpoints.
        step_cache: Tensors that a subclass shares between the losses of one batch, for example fakes; emptied
            before every batch.
        batch_players: Names of the players that step on the current batch, in order.
        joint_graph: True where a loss is asked for with its graph to *every* player, as for the game's Jacobian:
            then ``player_loss`` must not detach what other players made. In training detaching saves time.

    Raises:
        ValueError: Arguments that contradict each other.
        MisconfigurationException: In ``fit``: players share trained parameters, lack an optimizer or have no part in
            their loss; a strategy shards parameters; fp16 loss scaling.
        FloatingPointError: A loss or gradient is not finite. No player has stepped on it.
    """

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable | None = None,
        optimizers: dict[str, OptimizerCallable] | None = None,
        scheduler: LRSchedulerCallable | None = None,
        schedulers: dict[str, LRSchedulerCallable | None] | None = None,
        update: Update = "alternating",
        steps_per_player: dict[str, int] | None = None,
        loop: GameLoop = GameLoop(),  # noqa: B008 - frozen
    ) -> None:
        # First: these errors say how to write the function.
        check_factories("optimizer", optimizer, optimizers)
        check_factories("scheduler", scheduler, schedulers)
        check(GameModule.__init__, locals())
        super().__init__()
        if built_by_command_line():  # saves the configuration, all plain data, in place of the values
            self.save_hyperparameters()
        self.automatic_optimization = False
        check_steps(update, steps_per_player or {}, loop.consensus)
        self.update, self.steps_per_player, self.loop = update, dict(steps_per_player or {}), loop
        self.game_updates = self.gradient_evaluations = 0
        self.player_batches: Counter[str] = Counter()
        self.step_cache: dict[str, Any] = {}
        self.batch_players: tuple[str, ...] = ()
        self.joint_graph = False
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self._make_optimizers, self._make_schedulers = dict(optimizers or {}), dict(schedulers or {})
        self._round = Round()
        self._started = False  # True once on_train_start has run in this fit
        self._epoch_open = False  # True where a checkpoint would be from the middle of an epoch
        self._steps = PlayerSteps()
        self._players: dict[str, Player] = {}
        self._saved: Mapping[str, Any] | None = None  # checkpoint state waiting for on_train_start
        self._use = Use()

    # ---- to be overridden or read; then the lifecycle

    @abstractmethod
    def players(self) -> dict[str, nn.Module]:
        """Return the players' modules by name, in the order in which they step."""
        raise NotImplementedError(f"{type(self).__name__} must define players(self).")

    @abstractmethod
    def player_loss(self, name: str, batch: Any) -> Tensor:
        """Compute the loss that a player minimises: a scalar with its graph."""
        raise NotImplementedError(f"{type(self).__name__} must define player_loss(self, name, batch).")

    def player_losses(self, names: Sequence[str], batch: Any) -> dict[str, Tensor]:
        """Compute the losses of players that step together; override it to share work between them."""
        return {name: self.player_loss(name, batch) for name in names}

    @property
    def running_players(self) -> dict[str, Player]:
        """Players with their optimizers and trained parameters; empty before ``fit``."""
        return dict(self._players)

    @contextmanager
    def joint_evaluation(self, players: Sequence[str]) -> Iterator[None]:
        """Let losses keep their graphs to every player inside, and share nothing with training."""
        kept = self.step_cache, self.batch_players, self.joint_graph
        self.step_cache, self.batch_players, self.joint_graph = {}, tuple(players), True
        try:
            yield
        finally:
            self.step_cache, self.batch_players, self.joint_graph = kept

    def on_consensus(self) -> None:
        """Run before the losses of a step with ``GameLoop(consensus=...)``, whose forwards are of one function."""

    def game_metrics(self) -> dict[str, Any]:
        """Return further values to log with the losses, every ``log_every_n_steps`` game updates."""
        return {}

    def on_player_step(self, name: str) -> None:
        """Run after each step of a player."""

    def on_game_update(self) -> None:
        """Run after each complete round, when ``game_updates`` has counted it."""

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make one optimizer for each player, and its scheduler."""
        return build_optimizers(  # type: ignore[return-value]
            check_players(type(self).__name__, self.players()),
            self._make_optimizers,
            self._make_optimizer,
            self._make_schedulers,
            self._make_scheduler,
        )

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Silence advice that is wrong here: a game resumes after a complete update."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        silent = any(isinstance(callback, WithoutCheckpointAdvice) for callback in callbacks)
        return [] if silent else [WithoutCheckpointAdvice()]

    def has_open_update(self) -> bool:
        """Return True between the first batch of a game update and its last player's step."""
        return self._round.position > 0 or self._steps.sums.count > 0

    @override
    def setup(self, stage: str) -> None:
        log_by_game_updates(self.trainer)
        if stage != "fit":
            return
        self._use.begin(self, self.trainer, self)
        self._use.at_end(self.step_cache.clear)  # after an exception it holds graphs
        self._started = False
        # What an earlier validate(ckpt_path=...) or load_from_checkpoint read: fit restores after setup.
        self._saved = None
        refuse_strategy(self.trainer, "GameModule")
        why = ": one scale for players of different size would hide which of them overflows"
        refuse_loss_scaling(self.trainer, "GameModule", why)

    @override
    def on_fit_start(self) -> None:
        _check_hooks(self, True)
        names = list(check_players(type(self).__name__, self.players()))
        self._round.slots = schedule(
            names, self.update, self.steps_per_player, reuse_batch=self.loop.reuse_batch
        )
        self._match_players()
        check_gradient_counts(self._round.slots, self._players, self.loop.accumulate_grad_batches)
        check_monitors(config.scheduler for config in self.trainer.lr_scheduler_configs)

        if self._saved is not None:
            require_keys(self._saved, _STATE, "GameModule")
            # Here: a finished run that does not start again has its clock too, and callbacks read it at their start.
            self.game_updates = self._saved["game_updates"]
            self.gradient_evaluations = self._saved["gradient_evaluations"]
            self.player_batches = Counter(self._saved.get("player_batches", {}))
            # Before the first pass over the loader begins, which draws from the global stream.
            restore_random_state(self._saved["random"], self.global_rank)

    @override
    def on_train_start(self) -> None:
        if self._use.searched:
            GameModule.on_fit_start(self)
        saved, self._saved = self._saved, None
        self._started = True
        if saved is None:
            # A Trainer that fits again goes on.
            if self.trainer.fit_loop.epoch_loop.batch_progress.total.ready == 0:
                self.game_updates = self.gradient_evaluations = self._round.position = 0
                self.player_batches.clear()
                self._steps = PlayerSteps()
            # With the latents of process 0 in every process, the batch would only seem larger.
            seed_processes_apart(self.trainer)
            return
        check_restored(self._players.values(), saved.get("optimizers", {}))
        self._epoch_open = saved["epoch_open"]
        self._steps.sums.load_state_dict(saved["sums"], self.device)
        if not self._round.resume(saved):
            self._steps.sums.clear()
        if self._epoch_open:
            restore_random_state(saved["random"], self.global_rank)
        else:
            _begin_next_epoch(self.trainer)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        _check_hooks(self, bool(self._players) and self._started)
        if not all(player.is_current for player in self._players.values()):
            self._match_players()
            self._steps.sums.clear()  # gradients of other parameters
        last = bool(self.trainer.is_last_batch)
        self._epoch_open = not last
        self._play(batch, full=last or self._steps.sums.count + 1 >= self.loop.accumulate_grad_batches)
        while last and _ends_dev_run(self):
            self._play(batch, full=True)
        if last:
            step_schedulers(self, "epoch", self.current_epoch + 1)
        return dict(self._steps.losses)

    def _play(self, batch: Any, *, full: bool) -> None:
        """Let the players of the next slot see a batch, and step if it is their last one."""
        slot, ends = self._round.slot, full and self._round.is_last
        self.batch_players = tuple(name for names in slot for name in names)
        for k, names in enumerate(slot):
            players = [self._players[name] for name in names]
            self._steps.play(self, players, batch, full=full, last=ends and k + 1 == len(slot))
        self.step_cache.clear()
        if full:
            self._round.advance()
        if ends:
            self.game_updates += 1
            self.on_game_update()
            log_losses(self, self._steps.losses)
            step_schedulers(self, "step", self.game_updates)

    @override
    def on_train_epoch_end(self) -> None:
        step_plateau_schedulers(self)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._saved is not None:
            checkpoint["game"] = dict(self._saved)
        elif self._players:
            players = [self._players[name] for name in self._round.slot[0]]
            checkpoint["game"] = {
                "game_updates": self.game_updates,
                "gradient_evaluations": self.gradient_evaluations,
                "player_batches": dict(self.player_batches),
                **self._round.state_dict(),
                "epoch_open": self._epoch_open,
                "sums": self._steps.sums.state_dict(players, reduction(self.trainer)),
                "random": random_states(self.trainer),
                "optimizers": {name: player.kind for name, player in self._players.items()},
            }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._saved = checkpoint.get("game")
        if self._saved is not None:  # a stand-alone validation logs at this number of updates
            self.game_updates = self._saved["game_updates"]

    def _match_players(self) -> None:
        """Match the players with the optimizers and the parameters that are not frozen now."""
        found = self.optimizers()
        names = {id(p): name for name, p in self.named_parameters()}
        self._players = match_players(
            self.players(), found if isinstance(found, list) else [found], names, self.loop
        )


def _check_hooks(module: GameModule, ran: bool) -> None:
    """Refuse to go on where ``setup`` has not run, or another hook that must have."""
    require_hooks(ran and module._use.is_open, module, "GameModule", _HOOKS)


def _ends_dev_run(module: GameModule) -> bool:
    """Return True if a ``fast_dev_run``, which tries every player, still lacks a game update."""
    return bool(module.trainer.fast_dev_run) and module.game_updates == 0  # type: ignore[attr-defined]


def _begin_next_epoch(trainer: Trainer) -> None:
    """Close a finished epoch: with ``max_steps`` Lightning resumes it as open, and spends a batch on closing it."""
    fit_loop: Any = trainer.fit_loop
    epochs, batches = fit_loop.epoch_progress, fit_loop.epoch_loop.batch_progress.current
    if trainer.max_steps != -1 and 0 < batches.ready == batches.completed:
        if epochs.current.completed < epochs.current.processed:
            epochs.increment_completed()
        fit_loop.reset_restart_stage()
        fit_loop.epoch_loop.restarting = False
