"""Features of the real images, computed once for each set of images and extractor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_nested.callbacks.generative_metrics.cache import read_cache, write_cache
from lightning_nested.callbacks.generative_metrics.evaluators import FeatureExtractor
from lightning_nested.callbacks.generative_metrics.images import (
    content_hash,
    gather_batches,
    gather_images,
    raw_bytes,
)

# Images per forward of the extractor.
_BATCH_SIZE = 250
# Images whose features tell one extractor from another.
_PROBES = 64


@dataclass(frozen=True, kw_only=True)
class RealStatistics:
    """Statistics of the real images, for scores.

    Args:
        count: Number of images n.
        total: Σ f, ``(F,)``, float64.
        products: Σ f fᵀ, ``(F, F)``, float64.
        features: ``(m, F)``, features of m of the images, spread over the set.
        accuracy: Share of images that the extractor's classifier labels right; NaN without one.
    """

    count: int
    total: Tensor
    products: Tensor
    features: Tensor
    accuracy: float


def real_statistics(
    trainer: Trainer,
    extractor: FeatureExtractor,
    batches: Iterable[Any],
    *,
    num_features_kept: int,
    cache: Path | None,
) -> RealStatistics:
    """Return the statistics of real images, from the cache if it has them.

    The key is the content of the images in any order, with labels where the extractor judges them, the extractor's
    fingerprint, and its features of some of the images. Processes share the work; process 0 reads and writes the file.
    """
    judges = extractor.judges_classes
    images, labels = gather_batches(batches) if judges else (gather_images(batches), None)
    # Sorted by a hash of each image: which images are kept depends on the content, not on the order.
    keys = [hashlib.blake2b(raw_bytes(image), digest_size=8).digest() for image in images]
    order = torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))
    path, kept = None, None
    if trainer.is_global_zero and cache is not None:
        probe = _digest(extractor, images[order[:_PROBES]].to(trainer.strategy.root_device))
        name = f"{content_hash(images, labels)} {extractor.fingerprint} {probe} {num_features_kept}"
        path = cache / f"real_{hashlib.sha256(name.encode()).hexdigest()[:16]}.pt"
        kept = read_cache(path, partial(_checked, count=len(images), num_features=extractor.num_features))
    kept = trainer.strategy.broadcast(kept)
    if kept is not None:
        return kept
    mine = order[trainer.global_rank :: trainer.world_size]
    features, logits = extract(trainer, extractor, [images[mine]])
    accuracy = float("nan")
    if labels is not None and logits is not None:
        accuracy = float((logits.argmax(dim=1) == labels[order]).float().mean())
    wide = features.double()
    found: dict[str, Any] = {
        "count": len(features),
        "total": wide.sum(dim=0),
        "products": wide.T @ wide,
        "features": features[:num_features_kept].clone(),
        "accuracy": accuracy,
    }
    if path is not None:
        write_cache(path, found)
    return RealStatistics(**found)


@torch.no_grad()
def _digest(extractor: FeatureExtractor, images: Tensor) -> str:
    """Return a name for the extractor's answers to these images."""
    answers = [answer for answer in extractor(images) if answer is not None]
    shapes = [(answer.dtype, tuple(answer.shape)) for answer in answers]
    return hashlib.sha256(repr(shapes).encode() + b"".join(map(raw_bytes, answers))).hexdigest()


def _checked(found: dict[str, Any], *, count: int, num_features: int) -> RealStatistics:
    """Return what a file holds, if it is of so many images and features."""
    statistics = RealStatistics(**found)
    shapes = [tuple(t.shape) for t in (statistics.total, statistics.products, statistics.features[0])]
    if statistics.count != count or shapes != [(num_features,), (num_features,) * 2, (num_features,)]:
        raise ValueError(f"sums of {statistics.count} images with shapes {shapes}.")
    return statistics


@torch.no_grad()
def extract(
    trainer: Trainer, extractor: FeatureExtractor, images: Iterable[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Return features and logits of the images of all processes, float32 on the CPU.

    Args:
        trainer: Trainer whose processes share the work.
        extractor: Extractor, on the device of this process.
        images: Parts of the share ``x[rank::world_size]`` of this process; results are in the order of x.
    """
    features, logits = [], []
    for part in (part for chunk in images for part in torch.split(chunk, _BATCH_SIZE)):
        f, y = extractor(part.to(trainer.strategy.root_device))
        features.append(f.float().cpu())
        if y is not None:
            logits.append(y.float().cpu())
    shares = [(torch.cat(features), torch.cat(logits) if logits else None)] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(shares, shares[0])
    of_all = [y for _, y in shares if y is not None]
    return interleave([f for f, _ in shares]), interleave(of_all) if of_all else None


def interleave(parts: list[Tensor]) -> Tensor:
    """Invert ``x[rank::world_size]``.

    Example:
        >>> x = torch.arange(5)
        >>> interleave([x[0::2], x[1::2]])
        tensor([0, 1, 2, 3, 4])
    """
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole
