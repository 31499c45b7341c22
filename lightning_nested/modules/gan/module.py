"""Generative adversarial network: a game of a discriminator and a generator."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_nested.anneal import annealed
from lightning_nested.arguments import at_least, check
from lightning_nested.modules.game.module import GameModule
from lightning_nested.modules.gan.biggan_options import BatchNormMode
from lightning_nested.modules.gan.checks import check_batch, check_fakes, check_logits
from lightning_nested.modules.gan.evaluation import draw, held_out, labels_of
from lightning_nested.modules.gan.sampling import seeded
from lightning_nested.networks import frozen_power_iteration
from lightning_nested.networks.adversarial import (
    AdversarialLoss,
    DiffAugment,
    GANLoss,
    GradientRegularizer,
    adversarial_loss,
    widened,
)
from lightning_nested.networks.biggan.tables import check_labels
from lightning_nested.networks.spectral_norm import iterate_spectral_norms
from lightning_nested.trainer.isolation import evaluation_mode


class GANModule(GameModule):
    """Game of a generator G and a discriminator D that tells its samples G(z), z ~ N(0, 1), from the data x.

    A batch is the real data, or a sequence of data and class numbers, of which the latter are used if
    ``num_classes`` is given: then the networks are called as ``generator(z, y)`` and ``discriminator(x, y)``.
    Real and generated data go through the discriminator in one forward. As in every :class:`GameModule` each
    step has its own batch and latents, and the discriminator steps first.
    ``validate`` and ``test`` log both losses on held-out data, ``predict`` returns samples.
    To extend it, override ``real_data``, ``fakes``, ``generate``, ``discriminate`` or one of the losses.
    Goodfellow et al. (2014), NeurIPS 27.

    Args:
        generator: From latents ``(n, latent_dim)`` to data.
        discriminator: From data to one logit per example, ``(n,)`` or ``(n, 1)``, or to one for each patch,
            ``(n, 1, …)``: losses are then means over patches (Isola et al. 2017, CVPR, arXiv 1611.07004).
        latent_dim: Width of z.
        loss: ``"non_saturating"``, ``"hinge"``, ``"wasserstein"``, ``"relativistic"``, or an
            :class:`~lightning_nested.networks.adversarial.AdversarialLoss`; their classes have the formulas.
        num_classes: Classes of a conditional model; None: unconditional.
        reuse_fakes: Where the generator steps on the same batch as the discriminator (simultaneous updates, or
            ``GameLoop(reuse_batch=True)``), it steps on the same fakes, which saves its forward.
        regularizers: Penalties on the discriminator's gradient, added to its loss.
        augment: Random changes of all images that the discriminator sees, or None. Its fields and those of the loss and
            the regularizers may be an :class:`Anneal` over ``game_updates``.
        **game: Arguments of :class:`GameModule`.

    Attributes:
        scores: Means of D's logits on real and generated data in its last batch, on the device.

    Raises:
        ValueError: In ``fit``: batches, labels, fakes or logits of other kinds or shapes. Class numbers on a GPU are
            looked at in the first round only, because every look waits.

    Shape:
        ``forward(n)`` or ``sample(n)``: n generated examples.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        latent_dim: int,
        loss: GANLoss | AdversarialLoss = "non_saturating",
        num_classes: int | None = None,
        reuse_fakes: bool = False,
        regularizers: tuple[GradientRegularizer, ...] = (),
        augment: DiffAugment | None = None,
        **game: Any,
    ) -> None:
        check(GANModule.__init__, locals())
        super().__init__(**game)
        at_least(1, latent_dim=latent_dim, num_classes=num_classes)
        self.generator, self.discriminator = generator, discriminator
        self.latent_dim, self.loss, self.num_classes = latent_dim, adversarial_loss(loss), num_classes
        self.reuse_fakes, self.regularizers, self.augment = reuse_fakes, tuple(regularizers), augment
        self.scores: dict[str, Tensor] = {}
        self._advice = ExitStack()

    @override
    def configure_callbacks(self) -> list[Callback]:
        # Validation is optional here. Lightning looks for its data after this hook and before setup, and would give
        # advice to every run without.
        self._advice.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
        return super().configure_callbacks()

    @override
    def setup(self, stage: str) -> None:
        self._advice.close()
        super().setup(stage)

    @override
    def players(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator, "generator": self.generator}

    @override
    def player_loss(self, name: str, batch: Any) -> Tensor:
        loss = self.discriminator_loss if name == "discriminator" else self.generator_loss
        with self.one_function() if self.joint_graph else nullcontext():
            return loss(batch)

    @property
    def is_conditional(self) -> bool:
        """Return True if samples are of a class that can be asked for."""
        return self.num_classes is not None

    def discriminator_loss(self, batch: Any) -> Tensor:
        """Return L_D of a batch, penalties included."""
        real, labels = self.real_data(batch)
        shared = self.reuse_fakes and "generator" in self.batch_players
        with torch.set_grad_enabled(shared or self.joint_graph):
            fake, fake_labels = self._fakes_beside(real, labels)
        if shared:
            self.step_cache["fakes"] = fake, fake_labels
        # A spectrum needs the discriminator's dependence on the generator.
        if not self.joint_graph:
            fake = fake.detach()
        of_real, of_fake = self._scores_of(real, fake, labels, fake_labels)
        self.scores.update(real_score=of_real.detach().mean(), fake_score=of_fake.detach().mean())
        loss = annealed(self.loss, self.game_updates).discriminator(of_real, of_fake)
        for regularizer in self.regularizers:
            # A lazy penalty comes every `every`-th batch and is that many times as large. A spectrum is of the average
            # game, which has it at its plain size in each batch.
            every = 1 if self.joint_graph else regularizer.every
            if self.player_batches["discriminator"] % every == 0:
                regularizer = annealed(regularizer, self.game_updates)
                seen = fake_labels if regularizer.at_fakes else labels
                score = partial(self._penalized_score, labels=seen)
                loss = loss + every * regularizer.penalty(score, real, fake)
        return loss

    def generator_loss(self, batch: Any) -> Tensor:
        """Return L_G on as many fakes as the batch has examples."""
        real, labels = self.real_data(batch)
        fakes = self.step_cache.pop("fakes", None)
        fake, fake_labels = self._fakes_beside(real, labels) if fakes is None else fakes
        # Back to the precision of the data, as in the discriminator's step: autocast halved it.
        fake = fake.to(real.dtype)
        loss = annealed(self.loss, self.game_updates)
        if loss.paired:
            return loss.generator_beside(*self._scores_of(real, fake, labels, fake_labels))
        return loss.generator(widened(self.discriminate(self._augmented(fake), fake_labels)))

    def _fakes_beside(self, real: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Generate as many fakes as there are real examples; of their classes, where the loss compares the two."""
        if self.loss.paired and labels is not None:
            return self.fakes(len(real), labels)
        return self.fakes(len(real))

    def _scores_of(
        self, real: Tensor, fake: Tensor, labels: Tensor | None, fake_labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return logits of real and generated data from one forward, at least float32."""
        check_fakes(real, fake, labels, fake_labels)
        both = torch.cat((real, fake.to(real.dtype)))
        both_labels = None if labels is None or fake_labels is None else torch.cat((labels, fake_labels))
        logits = widened(self.discriminate(self._augmented(both), both_labels))
        of_real, of_fake = torch.split(logits, [len(real), len(fake)])
        return of_real, of_fake

    def real_data(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return data and, in a conditional model, labels of a batch."""
        batch = check_batch(batch)
        data: Tensor = batch[0]
        if self.num_classes is None:
            return data, None
        if len(batch) < 2 or not isinstance(batch[1], Tensor):
            got = f"{len(batch)} tensor" if len(batch) < 2 else f"labels of type {type(batch[1]).__name__}"
            raise ValueError(
                f"num_classes={self.num_classes} needs batches (data, labels). Got {got}; use "
                "num_classes=None, or a datamodule with labels."
            )
        labels: Tensor = batch[1]
        if not labels.is_floating_point():
            labels = labels.long()
        if labels.ndim == 1 and not labels.is_floating_point():
            # On a GPU every look waits, and without one a wrong class ends in an assertion of a kernel.
            check_labels(labels.cpu() if self.game_updates == 0 else labels, self.num_classes)
        return data, labels

    def fakes(self, count: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Generate data, and labels in a conditional model; paired losses give the ``labels`` to take."""
        latents = self.sample_latents(count)
        if labels is None:
            labels = self.sample_labels(count)
        return self.generate(latents, labels), labels

    def generate(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the generator's output."""
        data: Tensor = self.generator(latents) if labels is None else self.generator(latents, labels)
        return data

    def discriminate(self, data: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits ``(n,)``, or ``(n, p)`` of p patches, positive for data taken for real."""
        logits = self.discriminator(data) if labels is None else self.discriminator(data, labels)
        return check_logits(logits, len(data))

    def sample_latents(self, count: int) -> Tensor:
        """Draw z ~ N(0, 1), ``(count, latent_dim)``, in the generator's precision and on its device."""
        like = next(self.generator.parameters())
        return torch.randn(count, self.latent_dim, dtype=like.dtype, device=like.device)

    def sample_labels(self, count: int) -> Tensor | None:
        """Draw uniform class numbers; None in an unconditional model."""
        if self.num_classes is None:
            return None
        return torch.randint(self.num_classes, (count,), device=next(self.generator.parameters()).device)

    def one_function(self) -> AbstractContextManager[None]:
        """Keep spectral vectors fixed, so that several forwards are of one function that differentiates twice."""
        return frozen_power_iteration(self.generator, self.discriminator)

    @override
    def on_consensus(self) -> None:
        # one_function keeps spectral vectors fixed in these steps, so they move here.
        for network in (self.generator, self.discriminator):
            iterate_spectral_norms(network, of_training_only=True)

    def _augmented(self, data: Tensor) -> Tensor:
        return data if self.augment is None else annealed(self.augment, self.game_updates)(data)

    def _penalized_score(self, data: Tensor, labels: Tensor | None) -> Tensor:
        """D of augmented data without another power iteration: the function a penalty differentiates."""
        with self.one_function():
            logits = self.discriminate(self._augmented(data), labels)
        return logits if logits.ndim == 1 else logits.mean(dim=1)

    @override
    def forward(self, count: int) -> Tensor:
        return self.fakes(count)[0]

    def sample(self, count: int) -> Tensor:
        """Generate data in evaluation mode, without a graph; restore each part's own mode."""
        with evaluation_mode(self.generator), torch.no_grad():
            return self.fakes(count)[0]

    def sample_for_metrics(self, labels: Tensor, *, batch_norm: str, generator: torch.Generator) -> Tensor:
        """Return a sample for each label, for :class:`GenerativeMetrics` and :class:`SampleGrid`.

        Args:
            labels: ``(N,)`` class numbers; in an unconditional model only their number counts.
            batch_norm: Statistics of the generator: ``"running"`` averages, those of each ``"batch"`` of 100, or
                ``"standing"`` ones.
            generator: Random numbers; the global streams stay as they are.
        """
        return draw(self, labels, batch_norm=cast(BatchNormMode, batch_norm), generator=generator)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log both losses on held-out data as ``val_…``; an overfitted discriminator has a lower one in training."""
        self._evaluate(batch, batch_idx, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        data, labels = self.real_data(batch)
        fakes = self._held_out_fakes(data, labels, stage, self.global_rank, batch_idx).to(data.dtype)
        real, fake = (widened(self.discriminate(x, labels)) for x in (data, fakes))
        metrics = held_out(self.loss, real, fake, stage, self.game_updates)
        self.log_dict(metrics, batch_size=len(data), sync_dist=True)

    def _held_out_fakes(self, data: Tensor, labels: Tensor | None, *place: int | str) -> Tensor:
        """Return as many fakes as there are data, of the same classes; the same in every run."""
        wanted = torch.zeros(len(data)) if labels is None else labels
        return draw(self, wanted, generator=seeded(self.device, 0, *place))

    @override
    def predict_dataloader(self) -> DataLoader[Tensor]:
        """Return 10 labels of each class, or 100 samples without classes, for runs without data."""
        labels = torch.arange(self.num_classes or 10).repeat_interleave(10)
        return DataLoader(cast(Any, labels), batch_size=100)

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return a sample for each example of a batch, of its class in a conditional model.

        A batch is labels, or ``(data, labels, …)``; without classes it is anything with a length, as of
        ``DataLoader(range(1000), batch_size=100)``. The samples are the same in every run.
        """
        generator = seeded(self.device, 0, "predict", self.global_rank, batch_idx, dataloader_idx)
        return draw(self, labels_of(self, batch), generator=generator)
