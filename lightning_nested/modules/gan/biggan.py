"""BigGAN: class-conditional image generation as a game of two players."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_nested.arguments import at_least, check
from lightning_nested.modules.game.loop import GameLoop
from lightning_nested.modules.gan.biggan_options import (
    BatchNormMode,
    BigGANNetworks,
    BigGANObjective,
    Execution,
    Sampling,
)
from lightning_nested.modules.gan.module import GANModule
from lightning_nested.modules.gan.sampling import interpolate, sample_images, save_images, seeded
from lightning_nested.networks import Discriminator, Generator, singular_values
from lightning_nested.networks.conditional_batch_norm import batch_norms
from lightning_nested.trainer.lightning import synchronizes_batch_norm


def float_betas(make: OptimizerCallable) -> OptimizerCallable:
    """Return the optimizer with float ``betas``: YAML's ``[0, 0.999]`` has an int, which Adam refuses."""
    betas = getattr(make, "keywords", {}).get("betas")
    if betas is None:
        return make
    return partial(cast(Any, make), betas=tuple(float(beta) for beta in betas))


_ADAM = cast(OptimizerCallable, partial(torch.optim.Adam, lr=2e-4, betas=(0.0, 0.999), eps=1e-8))


def build_networks(sizes: BigGANNetworks) -> tuple[Generator, Discriminator]:
    """Return a generator and a discriminator, drawn from the global random stream in this order."""
    options: dict[str, Any] = dict(vars(sizes))
    group = options.pop("minibatch_group")
    generator = Generator(**options)
    for own in ("latent_dim", "shared_dim", "hierarchical"):
        del options[own]
    return generator, Discriminator(**options, minibatch_group=group)


@torch.no_grad()
def average_running_statistics(network: nn.Module, strategy: Strategy) -> None:
    """Replace running statistics by their mean over processes, in one message."""
    statistics = [
        cast(Tensor, t) for norm in batch_norms(network) for t in (norm.running_mean, norm.running_var)
    ]
    flat = strategy.reduce(torch.cat([t.flatten() for t in statistics]), reduce_op="mean")
    for tensor, mean in zip(statistics, flat.split([t.numel() for t in statistics]), strict=True):
        tensor.copy_(mean.view_as(tensor))


class BigGAN(GANModule):
    """Class-conditional GAN for images, by default in the usual configuration for CIFAR-10.

    A round is 4 discriminator steps, each with fresh real images, z and labels and one forward for real and
    generated images together, and then a generator step: four batches of the Trainer. Hinge loss, Adam with
    rate 2e-4 and betas (0, 0.999) for both. Brock, Donahue & Simonyan (2019), ICLR, arXiv 1809.11096.
    ``ComplexAdam`` for the discriminator is the setting of Lorraine et al. (2022), AISTATS, PMLR 151:7742-7765.

    A batch is ``(images, labels, …)`` with images ``(N, C, side, side)`` in [−1, 1]. Add the callbacks
    ``GeneratorEMA`` for an average of the generator, ``SampleGrid`` for grids and ``GenerativeMetrics`` for
    scores. In data-parallel runs each process takes batch statistics of its own; running statistics are
    averaged before each generator step, so that all processes hold the same numbers.

    Args:
        networks: Sizes of both networks.
        objective: Loss, penalties, augmentation.
        generator_optimizer: From parameters to optimizer; default Adam(2e-4, betas=(0, 0.999)).
        discriminator_optimizer: From parameters to optimizer; the same default.
        generator_scheduler: From optimizer to scheduler, stepped once per round.
        discriminator_scheduler: From optimizer to scheduler, stepped once per round.
        discriminator_steps: Discriminator steps per round.
        loop: Accumulation and clipping of :class:`GameModule`; None: ``GameLoop(reuse_batch=True)``, because the
            generator's step needs no real images of its own.
        sampling: Sampling options of validation, test and predict.
        execution: Memory format, compilation, logging of details.

    Raises:
        MisconfigurationException: In ``fit``: ``sync_batchnorm`` on CPU, or images that do not fit.

    Example:
        >>> module = BigGAN(BigGANNetworks(width=2, latent_dim=8))
        >>> images = module.sample(torch.tensor([0, 9]))
        >>> tuple(images.shape), bool(images.abs().max() <= 1)
        ((2, 3, 32, 32), True)
    """

    generator: Generator
    discriminator: Discriminator

    def __init__(
        self,
        networks: BigGANNetworks = BigGANNetworks(),  # noqa: B008 - frozen
        *,
        objective: BigGANObjective = BigGANObjective(),  # noqa: B008 - frozen
        generator_optimizer: OptimizerCallable = _ADAM,
        discriminator_optimizer: OptimizerCallable = _ADAM,
        generator_scheduler: LRSchedulerCallable | None = None,
        discriminator_scheduler: LRSchedulerCallable | None = None,
        discriminator_steps: int = 4,
        loop: GameLoop | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        execution: Execution = Execution(),  # noqa: B008 - frozen
    ) -> None:
        check(BigGAN.__init__, locals())
        at_least(1, discriminator_steps=discriminator_steps)
        schedulers = {"generator": generator_scheduler, "discriminator": discriminator_scheduler}
        loop = GameLoop(reuse_batch=True) if loop is None else loop
        if objective.reuse_fakes and not loop.reuse_batch:
            raise ValueError(
                "reuse_fakes=True needs a generator step on the batch of the discriminator's last. "
                f"Got {loop}; set reuse_batch=True in it, or reuse_fakes=False."
            )
        generator, discriminator = build_networks(networks)
        super().__init__(
            generator,
            discriminator,
            latent_dim=networks.latent_dim,
            num_classes=networks.num_classes,
            loss=objective.loss,
            reuse_fakes=objective.reuse_fakes,
            regularizers=objective.regularizers,
            augment=objective.augment,
            optimizers={
                "generator": float_betas(generator_optimizer),
                "discriminator": float_betas(discriminator_optimizer),
            },
            schedulers={name: make for name, make in schedulers.items() if make is not None},
            steps_per_player={"discriminator": discriminator_steps},
            loop=loop,
        )
        self.networks, self.objective = networks, objective
        self.sampling, self.execution = sampling, execution
        if execution.channels_last:
            for network in (self.generator, self.discriminator):
                network.to(memory_format=torch.channels_last)
        self._compiled: dict[str, Callable[..., Tensor]] = {}
        self._gradient_norms: dict[str, Tensor] = {}
        # Real images since the last log, and when that was.
        self._shown, self._since = 0, 0.0

    @property
    @override
    def is_conditional(self) -> bool:
        return True

    @override
    def generate(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._network("generator")(latents, labels)

    @override
    def discriminate(self, data: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._network("discriminator")(data, labels)

    def _network(self, name: str) -> Callable[..., Tensor]:
        """Return the network, compiled if asked for where first derivatives are enough."""
        network: Generator | Discriminator = getattr(self, name)
        # one_function freezes the spectral vectors where second derivatives follow, which compiled networks lack.
        if not self.execution.compile or network.linear.frozen:
            return network
        if name not in self._compiled:
            self._compiled[name] = torch.compile(network)
        return self._compiled[name]

    @override
    def real_data(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        images, labels = super().real_data(batch)
        shape = (self.networks.image_channels, self.networks.resolution, self.networks.resolution)
        if images.shape[1:] != shape:
            raise MisconfigurationException(
                f"BigGAN's images must have shape (N, {', '.join(map(str, shape))}). Got {tuple(images.shape)}; "
                "set image_channels and resolution of BigGANNetworks, or pad the data "
                "(FashionMNISTDataModule(resolution=32, symmetric=True))."
            )
        if self.execution.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        # The Trainer converts later, and DDP's own error then says neither which option nor what to do.
        if synchronizes_batch_norm(self.trainer) and self.trainer.strategy.root_device.type == "cpu":
            raise MisconfigurationException(
                "sync_batchnorm needs GPUs: torch's SyncBatchNorm has no CPU implementation. "
                "Got Trainer(sync_batchnorm=True) on CPU; leave it out."
            )

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self.execution.flush_denormal and self.device.type == "cpu":
            torch.set_flush_denormal(True)
            self._use.at_end(partial(torch.set_flush_denormal, False))
        self._shown, self._since = 0, time.perf_counter()

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        player = next(n for n, p in self.running_players.items() if p.optimizer.optimizer is optimizer)
        if player == "generator" and self.trainer.world_size > 1:
            # Not sooner: a graph still holds them.
            average_running_statistics(self.generator, self.trainer.strategy)
        if self._logs_at(self.game_updates + 1):
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            # torch.nn.utils.get_total_norm came with torch 2.6.
            norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
            self._gradient_norms[f"{player}_gradient_norm"] = norm

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._shown += len(batch[0]) * self.trainer.world_size

    @override
    def on_game_update(self) -> None:
        if not self._logs_at(self.game_updates):
            return
        metrics = {name: float(value) for name, value in (self.scores | self._gradient_norms).items()}
        metrics["images_per_second"] = self._shown / (time.perf_counter() - self._since)
        for player, network in self.players().items():
            for layer, value in singular_values(network).items():
                metrics[f"singular_value/{player}.{layer}"] = float(value)
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.game_updates)
        self._shown, self._since = 0, time.perf_counter()

    def _logs_at(self, update: int) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.execution.log_details and every > 0 and update % every == 0

    @override
    def sample(
        self,
        labels: Tensor | int,
        *,
        z: Tensor | None = None,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return images of the given classes, ``(N, C, side, side)`` in [−1, 1].

        Args:
            labels: ``(N,)`` classes, ``(N, num_classes)`` mixtures, or N: classes are then drawn.
            z: ``(N, latent_dim)``; None: drawn.
            sampling: Options in place of the module's own.
            generator: Random numbers for z, on the module's device; None: a stream from ``sampling.seed``.
        """
        sampling = sampling or self.sampling
        generator = generator or seeded(self.device, sampling.seed, "sample")
        if isinstance(labels, int):
            classes = self.networks.num_classes
            labels = torch.randint(classes, (labels,), generator=generator, device=self.device)
        return sample_images(self.generator, labels, sampling, generator=generator, z=z)

    @override
    def sample_for_metrics(self, labels: Tensor, *, batch_norm: str, generator: torch.Generator) -> Tensor:
        """Return images for :class:`GenerativeMetrics` and :class:`SampleGrid`."""
        sampling = replace(self.sampling, batch_norm=cast(BatchNormMode, batch_norm))
        return self.sample(labels, sampling=sampling, generator=generator)

    def interpolate(self, start: int, end: int, steps: int = 8, *, seed: int | None = None) -> Tensor:
        """Return images on a line in z and class from one image to another, ``(steps, C, side, side)``."""
        generator = seeded(self.device, self.sampling.seed if seed is None else seed, "interpolate")
        z = torch.randn(2, self.networks.latent_dim, generator=generator, device=self.device)
        ends = (z[0], start), (z[1], end)
        return interpolate(self.generator, *ends, steps, self.sampling, generator=generator)

    @override
    def _held_out_fakes(self, data: Tensor, labels: Tensor | None, *place: int | str) -> Tensor:
        assert labels is not None
        generator = seeded(self.device, self.sampling.seed, *place)
        return self.sample(labels, sampling=Sampling(batch_size=len(data)), generator=generator)

    @override
    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return 10 labels of each class, for runs without a datamodule."""
        labels = torch.arange(self.networks.num_classes).repeat_interleave(10)
        return DataLoader(cast(Any, labels), batch_size=self.sampling.batch_size)

    @override
    def predict_step(
        self, batch: Tensor | Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        """Return images of the classes of the batch, and write them as PNG files.

        A batch is labels, or ``(images, labels, …)`` of a datamodule; mixtures ``(N, num_classes)`` go to the
        folder ``mixtures``. Files go to
        ``<default_root_dir>/samples/class_<label>/<process>_<batch>_<position>.png``, of a second and further
        dataloaders to ``…/<dataloader>_<process>_<batch>_<position>.png``.
        """
        labels = batch if isinstance(batch, Tensor) else batch[1]
        loader = [dataloader_idx] if dataloader_idx else []
        generator = seeded(self.device, self.sampling.seed, "predict", self.global_rank, batch_idx, *loader)
        images = self.sample(labels, generator=generator)
        process = "_".join(map(str, [*loader, self.global_rank]))
        folder = Path(self.trainer.default_root_dir) / "samples"
        save_images(images, labels, folder, f"{process}_{batch_idx:05d}")
        return images
