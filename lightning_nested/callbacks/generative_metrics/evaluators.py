"""Feature extractors for scores of generators."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from lightning_nested.trainer.random_stream import RandomStream

Batches = Callable[[], Iterable[Any]]
"""Called for a fresh pass over batches ``(images, labels, …)``."""


class FeatureExtractor(nn.Module):
    """Network from images ``(N, C, H, W)`` in [−1, 1] to features ``(N, F)`` and class logits ``(N, K)`` or None.

    Attributes:
        num_features: F.
        fingerprint: Name of the function: equal fingerprints mean equal features.
        judges_classes: True if the logits are about the classes of the data set.
    """

    num_features: int
    fingerprint: str
    judges_classes: bool = False


@dataclass(frozen=True, kw_only=True)
class Evaluator(ABC):
    """Strategy that builds a feature extractor. ``name`` goes into the name of every score."""

    # True if a Fréchet distance in these features may be called FID.
    is_inception: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Return a short name for scores."""

    @abstractmethod
    def build(self, train: Batches, cache: Path) -> FeatureExtractor:
        """Build the extractor, on CPU, in evaluation mode.

        Args:
            train: The training data, for extractors that need training.
            cache: A folder for trained extractors.
        """


@dataclass(frozen=True, kw_only=True)
class InceptionEvaluator(Evaluator):
    """Evaluator with torch-fidelity's Inception v3 of the original FID: 2 048 features, scores named FID, KID, IS.

    Args:
        weights: File ``weights-inception-2015-12-05-6726825d.pth``; None: torch-fidelity's download.

    Raises:
        FileNotFoundError: If the file is missing, or nothing can be downloaded.
    """

    is_inception: ClassVar[bool] = True
    weights: str | None = None

    @property
    @override
    def name(self) -> str:
        return "inception"

    @override
    def build(self, train: Batches, cache: Path) -> FeatureExtractor:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        cure = (
            f"Download {URL_INCEPTION_V3} on a machine with network and name the file in "
            "InceptionEvaluator(weights=...), or use ClassifierEvaluator(), which needs no download and is not FID."
        )
        if self.weights is not None and not Path(self.weights).is_file():
            raise FileNotFoundError(
                f"InceptionEvaluator(weights=...) must be a file. Got {self.weights!r}. {cure}"
            )
        try:
            with redirect_stdout(StringIO()):
                network = FeatureExtractorInceptionV3(
                    "inception-v3-compat",
                    ["2048", "logits_unbiased"],
                    feature_extractor_weights_path=self.weights,
                )
        # URLError is an OSError.
        except OSError as error:
            raise FileNotFoundError(
                f"FID needs the weights of Inception v3. Got no network: {error}. {cure}"
            ) from error
        return _Inception(network)


@dataclass(frozen=True, kw_only=True)
class ModuleEvaluator(Evaluator):
    """Evaluator with any module from images in [−1, 1] to features ``(N, F)``, or to features and class logits.

    Args:
        module: The module; put into evaluation mode.
        label: Name of the scores.
        judges_classes: True if its logits are about the classes of the data.
    """

    module: nn.Module
    label: str
    judges_classes: bool = False

    @property
    @override
    def name(self) -> str:
        return self.label

    @override
    def build(self, train: Batches, cache: Path) -> FeatureExtractor:
        images = next(iter(train()))[0][:1]
        return _Wrapped(self.module.eval(), images, self.judges_classes)


@dataclass(frozen=True, kw_only=True)
class ClassifierEvaluator(Evaluator):
    """Evaluator with a small convolutional classifier trained on the training images; needs no download.

    Its Fréchet distance is *not* FID and is comparable only to distances of the same evaluator and data; scores
    are named ``frechet_distance``, not ``fid``. Its logits give the agreement of samples with their class.
    A trained classifier is kept in the cache, by the content of the data and these options.

    Args:
        epochs: Passes over the training data.
        width: Channels of the first convolution.
        num_features: F.
        batch_size: Of its training.
        seed: Of its weights and of the order of images.
    """

    epochs: int = 4
    width: int = 16
    num_features: int = 64
    batch_size: int = 100
    seed: int = 0

    @property
    @override
    def name(self) -> str:
        return "classifier"

    @override
    def build(self, train: Batches, cache: Path) -> FeatureExtractor:
        images, labels = gather_batches(train())
        content = content_hash(images, labels)
        key = hashlib.sha256(f"{self!r} {content}".encode()).hexdigest()[:16]
        with RandomStream(self.seed):
            network = SmallFeatureNetwork(
                images.shape[1], int(labels.max()) + 1, self.width, self.num_features
            )
            path = cache / f"classifier_{key}.pt"
            if path.is_file():
                network.load_state_dict(torch.load(path, weights_only=True))
            else:
                _train(network, images, labels, self.epochs, self.batch_size)
                cache.mkdir(parents=True, exist_ok=True)
                torch.save(network.state_dict(), path)
        network.fingerprint = f"classifier-{key}"
        return network.eval()


class SmallFeatureNetwork(FeatureExtractor):
    """Network of three 3×3 convolutions with batch norm and pooling, F rectified features, a linear classifier."""

    judges_classes = True

    def __init__(self, in_channels: int, num_classes: int, width: int, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        widths = (in_channels, width, 2 * width, 4 * width)
        blocks: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            conv = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
            blocks += [conv, nn.BatchNorm2d(fan_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(
            *blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * width, num_features), nn.ReLU()
        )
        self.head = nn.Linear(num_features, num_classes)

    @override
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return features, self.head(features)


class _Inception(FeatureExtractor):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.num_features = network.eval(), 2048
        self.fingerprint = "inception-" + _state_hash(network)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = to_bytes(images)
        features, logits = self.network(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels)
        return features, logits


class _Wrapped(FeatureExtractor):
    def __init__(self, module: nn.Module, images: Tensor, judges_classes: bool) -> None:
        super().__init__()
        self.module, self.judges_classes = module, judges_classes
        with torch.no_grad():
            features, logits = self(images)
        if features.ndim != 2:
            raise ValueError(
                f"ModuleEvaluator's module must return features (N, F). Got {tuple(features.shape)}; "
                "flatten or pool them."
            )
        if judges_classes and logits is None:
            raise ValueError(
                "judges_classes=True needs a module that returns (features, logits). Got features alone."
            )
        self.num_features = features.shape[1]
        self.fingerprint = f"{type(module).__name__}-{_state_hash(module)}"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.module(images)
        return (found, None) if isinstance(found, Tensor) else (found[0], found[1])


def to_bytes(images: Tensor) -> Tensor:
    """Convert [−1, 1] to 0 … 255, rounded.

    Example:
        >>> to_bytes(torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [0, 128, 255]
    """
    return torch.clamp((images + 1.0) * 127.5 + 0.5, 0, 255).to(torch.uint8)


def content_hash(images: Tensor, labels: Tensor) -> str:
    """Return a name for a set of labelled images that does not depend on their order.

    Example:
        >>> images, labels = torch.rand(3, 1, 2, 2), torch.arange(3)
        >>> content_hash(images, labels) == content_hash(images.flip(0), labels.flip(0))
        True
    """
    rows = zip(to_bytes(images).cpu().numpy(), labels.tolist(), strict=True)
    digests = sorted(
        hashlib.blake2b(row.tobytes() + bytes([y % 256]), digest_size=16).digest() for row, y in rows
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _state_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def gather_batches(batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Join the images and the labels of batches ``(images, labels, …)``."""
    images, labels = zip(*((batch[0], batch[1]) for batch in batches), strict=True)
    return torch.cat(images), torch.cat(labels)


def _train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch_size: int) -> None:
    """Train with Adam and a rate that falls to zero; 91 % on Fashion-MNIST after 4 epochs."""
    # Sorted, so that the result depends on the content alone, not on the loader's shuffling.
    order = torch.tensor(sorted(range(len(images)), key=lambda i: images[i].numpy().tobytes()))
    images, labels = images[order], labels[order]
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(steps, 2))
    with torch.enable_grad():
        network.train()
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(images)), batch_size):
                loss = functional.cross_entropy(network(images[rows])[1], labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
