"""FID, KID, Inception Score, precision and recall of a generator, each logged with its settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.callbacks.generative_metrics.evaluators import (
    Evaluator,
    FeatureExtractor,
    InceptionEvaluator,
    lent,
)
from lightning_nested.callbacks.generative_metrics.images import only_images
from lightning_nested.callbacks.generative_metrics.real_batches import (
    Split,
    has_split,
    real_batches,
    require_split,
)
from lightning_nested.callbacks.generative_metrics.real_statistics import (
    RealStatistics,
    extract,
    real_statistics,
)
from lightning_nested.callbacks.generative_metrics.samplers import (
    Sampler,
    check_samples,
    has_classes,
    labels_for,
    require_sampler,
    sampling_settings,
)
from lightning_nested.callbacks.generative_metrics.scores import (
    BatchNormMode,
    Score,
    ScoreOptions,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from lightning_nested.callbacks.generator_ema import averaged_generators
from lightning_nested.extras import require_package
from lightning_nested.files import append_line
from lightning_nested.linalg.saved import require_keys
from lightning_nested.trainer.isolation import without_trace
from lightning_nested.trainer.lightning import has_loader
from lightning_nested.trainer.random_stream import RandomStream
from lightning_nested.trainer.run_folder import keeps_files
from lightning_nested.trainer.use import OneFitCallback, Use

# Generated images in memory, 1 GB: all 50 000 of 32 px, 1 365 of 256 px.
_NUMBERS_AT_ONCE = 2**28


@checked
class GenerativeMetrics(OneFitCallback):
    """Scores of a generator's samples in validation and test; from the command line by ``validate``.

    For every :class:`GANModule`, with classes or without, and data of any shape that the evaluator takes. Real data
    comes from the datamodule, or from the loader that the Trainer was given for ``split``. Where ``fit`` has neither a
    datamodule nor a validation loader, samples are scored once, at its end.

    Computed by torchmetrics (FID, KID, IS) and torch-fidelity (precision, recall) from features that are
    extracted once. With Inception the scores are called ``fid``, ``kid``, ``inception_score``; with any other
    evaluator ``frechet_distance``, ``kernel_distance``, ``classifier_score``: they are not FID. ``agreement``
    is the share of samples that the evaluator's classifier gives their class.

    Every score is logged as ``<score>/<evaluator>/<split>/<samples>/<batch norm>``, and appended with these settings,
    those of the module's ``sampling`` (``truncation``, ``guidance``, …; not in the name) and its ``game_updates`` to
    ``scores.jsonl`` under ``default_root_dir``. Published scores of one and the same checkpoint differ by 40 % between
    evaluators, reference splits and batch-norm modes.

    If :class:`GeneratorEMA` is among the callbacks, its average is scored. All processes make samples. Statistics
    of the real images are kept on disk by the content of the images.

    Heusel et al. (2017), NeurIPS (FID); Bińkowski et al. (2018), ICLR (KID); Salimans et al. (2016), NeurIPS (IS);
    Kynkäänniemi et al. (2019), NeurIPS (precision and recall).

    Args:
        evaluator: ``InceptionEvaluator()``, ``ClassifierEvaluator()``, ``ModuleEvaluator(...)``, or, for points and
            tables, ``ValuesEvaluator()``.
        num_samples: Generated images, equally many of each class.
        split: Real images to compare with.
        batch_norm: Modes of the generator's batch norm; each is scored.
        scores: Scores to compute.
        options: Details of the scores.
        every_n_validations: Validations within ``fit`` from one scoring to the next.
        cache: Folder for real statistics and trained classifiers; None: ``default_root_dir/metrics_cache``.
        seed: Seed of the samples.

    Raises:
        MisconfigurationException: If there are fewer samples than features, no data of the split, or the module cannot
            make samples.
    """

    def __init__(
        self,
        evaluator: Evaluator = InceptionEvaluator(),  # noqa: B008 - frozen
        *,
        num_samples: int = 50_000,
        split: Split = "train",
        batch_norm: Sequence[BatchNormMode] = ("running",),
        scores: Sequence[Score] = ("frechet", "kernel", "inception_score", "precision_recall"),
        options: ScoreOptions = ScoreOptions(),  # noqa: B008 - frozen
        every_n_validations: int = 1,
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        at_least(2, num_samples=num_samples)
        at_least(1, every_n_validations=every_n_validations)
        at_least(0, seed=seed)
        for name, given in (("scores", scores), ("batch_norm", batch_norm)):
            if not given:
                raise ValueError(f"{name} must have at least one entry. Got {given}.")
        self.evaluator, self.num_samples, self.split = evaluator, num_samples, split
        self.batch_norm, self.scores, self.options = tuple(batch_norm), tuple(scores), options
        self.every_n_validations, self.cache, self.seed = every_n_validations, cache, seed
        self.last: dict[str, float] = {}
        self._extractor: FeatureExtractor | None = None
        self._real: RealStatistics | None = None
        # Fingerprint of the extractor that _real was computed with.
        self._real_of = ""
        self._scoring = Use()  # also by validate and test
        self._validations = 0
        self._numbers_per_image = 1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            return
        if stage == "fit" and self.use.changed:
            self._validations, self.last = 0, {}
        # Now, because the first scores come after hours.
        if self.evaluator.is_inception or "precision_recall" in self.scores:
            require_package("torch_fidelity")
        require_sampler(self, pl_module)
        require_split(trainer, self.split)
        if self.scores == ("agreement",) and not has_classes(pl_module):
            raise MisconfigurationException(
                "scores=('agreement',) needs a module whose samples have classes. Got an unconditional "
                f"{type(pl_module).__name__}; take other scores."
            )
        self._scoring.begin(self, trainer, pl_module)
        if "datamodule" in self._scoring.changed:
            self._extractor = self._real = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._scoring.end(trainer)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        # Not trainer.training, which is False in a validation within fit too.
        alone = trainer.state.fn != TrainerFn.FITTING
        if alone or self._validations % self.every_n_validations == 0:
            self._score(trainer, pl_module)

    @property
    @override
    def state_key(self) -> str:
        where = {"evaluator": self.evaluator.name, "split": self.split, "num_samples": self.num_samples}
        return self._generate_state_key(**where, batch_norm=self.batch_norm, scores=self.scores)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        require_keys(state_dict, ("validations",), "GenerativeMetrics")
        self._validations = state_dict["validations"]

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._score(trainer, pl_module)

    # Stand-alone validation runs in inference mode, whose tensors could not train a classifier.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _score(self, trainer: Trainer, pl_module: LightningModule) -> None:
        extractor = self._prepared_extractor(trainer, pl_module)
        with lent(extractor, pl_module.device), averaged_generators(trainer, pl_module):
            real = self._prepared_real(trainer, pl_module, extractor)
            self._score_with(extractor, real, trainer, pl_module)

    def _score_with(
        self, extractor: FeatureExtractor, real: RealStatistics, trainer: Trainer, pl_module: LightningModule
    ) -> None:
        generator_of = cast(Sampler, pl_module)
        labels = labels_for(pl_module, self.num_samples)
        mine = labels[trainer.global_rank :: trainer.world_size]
        self.last = {}
        for mode in self.batch_norm:
            rng = torch.Generator(pl_module.device).manual_seed(self.seed * 1_000_003 + trainer.global_rank)
            sample = partial(generator_of.sample_for_metrics, batch_norm=mode, generator=rng)
            parts = torch.split(mine, max(1, _NUMBERS_AT_ONCE // self._numbers_per_image))
            images = (check_samples(pl_module, sample(part), len(part)) for part in parts)
            with without_trace(pl_module, trainer):
                features, logits = extract(trainer, extractor, images)
            found: dict[str, float] = {}
            if trainer.is_global_zero:
                asked = labels if extractor.judges_classes and has_classes(pl_module) else None
                with RandomStream(self.seed):
                    found = self._scores(real, features, logits, asked, pl_module.device)
            self._report(trainer, pl_module, mode, trainer.strategy.broadcast(found))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Without validation data there is no other time for scores.
        if getattr(trainer, "datamodule", None) is None and not has_loader(trainer, "val"):
            self._score(trainer, pl_module)

    def _cache(self, trainer: Trainer) -> Path:
        return Path(self.cache) if self.cache else Path(trainer.default_root_dir) / "metrics_cache"

    def _prepared_extractor(self, trainer: Trainer, pl_module: LightningModule) -> FeatureExtractor:
        if self._extractor is None:
            split = "train" if has_split(trainer, "train") else self.split
            train = real_batches(trainer, pl_module, split, self.seed)
            # Process 0 trains and downloads, the others read.
            for rank in range(trainer.world_size):
                if rank == trainer.global_rank and (rank == 0 or self._extractor is None):
                    self._extractor = self.evaluator.build(train, self._cache(trainer))
                if rank == 0:
                    trainer.strategy.barrier()
            assert self._extractor is not None
            self._check_count("num_samples", self.num_samples, self._extractor)
        return self._extractor

    def _prepared_real(
        self, trainer: Trainer, pl_module: LightningModule, extractor: FeatureExtractor
    ) -> RealStatistics:
        extractor.refresh()
        if self._real is None or self._real_of != extractor.fingerprint:
            # Features that move with training are of no use to a later run.
            cache = self._cache(trainer) if self._real is None else None
            if cache is None:
                rank_zero_warn(
                    f"Features of {self.evaluator.name!r} should be the same at all scorings. Got weights that have "
                    "changed since the last: scores before and after do not compare. Give "
                    "ModuleEvaluator(module=copy.deepcopy(...)) to compare them."
                )
            images = list(real_batches(trainer, pl_module, self.split, self.seed)())
            self._numbers_per_image = max((only_images(b)[0].numel() for b in images), default=1)
            self._real = real_statistics(
                trainer, extractor, images, num_features_kept=self.num_samples, cache=cache
            )
            self._real_of = extractor.fingerprint
            self._check_count(f"the real images of split={self.split!r}", self._real.count, extractor)
            if extractor.judges_classes:
                self._test_evaluator(trainer, pl_module, extractor, cache)
        return self._real

    def _check_count(self, what: str, count: int, extractor: FeatureExtractor) -> None:
        if "frechet" in self.scores and count <= extractor.num_features:
            raise MisconfigurationException(
                f"A Fréchet distance needs more images than features. Got {count} ({what}) with the "
                f"{extractor.num_features} features of {self.evaluator.name!r}: the covariance would be singular. "
                "Raise num_samples (50000 is usual), or leave 'frechet' out of scores."
            )
        if "precision_recall" in self.scores and count <= self.options.neighborhood:
            raise MisconfigurationException(
                f"Precision and recall look at the {self.options.neighborhood} nearest of more images. Got {count} "
                f"({what}). Raise num_samples, lower ScoreOptions(neighborhood=...), or leave them out of scores."
            )

    def _test_evaluator(
        self, trainer: Trainer, pl_module: LightningModule, extractor: FeatureExtractor, cache: Path | None
    ) -> None:
        held_out: list[Split] = [split for split in ("test", "val") if has_split(trainer, split)]
        if not held_out:
            rank_zero_warn(
                "A classifier that judges samples should be tested on images that it was not trained on. Got no test "
                "or validation loader: nothing says how far agreement can be trusted."
            )
            return
        images = real_batches(trainer, pl_module, held_out[0], self.seed)()
        test = real_statistics(trainer, extractor, images, num_features_kept=1, cache=cache)
        self.evaluator_accuracy = test.accuracy
        rank_zero_info(
            f"{self.evaluator.name} labels {test.accuracy:.1%} of {test.count} real {held_out[0]} images right."
        )
        if test.accuracy < 0.9:
            rank_zero_warn(
                f"The classifier labels only {test.accuracy:.1%} of real test images right: agreement says little. "
                "Train it longer: ClassifierEvaluator(epochs=...)."
            )

    def _scores(
        self,
        real: RealStatistics,
        features: Tensor,
        logits: Tensor | None,
        labels: Tensor | None,
        device: torch.device,
    ) -> dict[str, float]:
        inception = self.evaluator.is_inception
        found: dict[str, float] = {}
        if "frechet" in self.scores:
            found["fid" if inception else "frechet_distance"] = frechet_distance(real, features)
        if "kernel" in self.scores:
            distance = kernel_distance(real.features, features, self.options)
            found["kid" if inception else "kernel_distance"] = distance
        if "inception_score" in self.scores and logits is not None:
            name = "inception_score" if inception else "classifier_score"
            found[name] = inception_score(logits, self.options)
        if "precision_recall" in self.scores:
            # On the device, because all pairs of samples are most of the work while the other processes wait.
            found |= precision_recall(real.features.to(device), features.to(device), self.options)
        if "agreement" in self.scores and labels is not None and logits is not None:
            right = (logits.argmax(dim=1) == labels).float()
            found["agreement"] = float(right.mean())
            for k in range(int(labels.max()) + 1):
                found[f"agreement_class_{k}"] = float(right[labels == k].mean())
        return found

    def _report(
        self, trainer: Trainer, pl_module: LightningModule, mode: str, found: dict[str, float]
    ) -> None:
        where = f"{self.evaluator.name}/{self.split}/{self.num_samples}/{mode}"
        named = {f"{score}/{where}": value for score, value in found.items()}
        self.last |= named
        if trainer.training:
            # The end of training, where a module may not log.
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})
            for logger in trainer.loggers:
                logger.log_metrics(named, step=trainer.global_step)
        else:
            pl_module.log_dict(named, on_step=False, on_epoch=True, rank_zero_only=False)
        if trainer.is_global_zero and keeps_files(trainer):
            record = {
                "evaluator": self.evaluator.name,
                "fingerprint": self._extractor.fingerprint if self._extractor else None,
                "split": self.split,
                "real_images": self._real.count if self._real else 0,
                "samples": self.num_samples,
                "batch_norm": mode,
                **sampling_settings(pl_module),
                "game_updates": int(getattr(pl_module, "game_updates", trainer.global_step)),
                "evaluator_accuracy": getattr(self, "evaluator_accuracy", None),
                "scores": found,
            }
            append_line(Path(trainer.default_root_dir) / "scores.jsonl", json.dumps(record))
