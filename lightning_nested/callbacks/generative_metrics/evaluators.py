"""Feature extractors for scores of generators."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from lightning_nested.arguments import at_least, checked
from lightning_nested.callbacks.generative_metrics.cache import read_cache, write_cache
from lightning_nested.callbacks.generative_metrics.images import (
    content_hash,
    described,
    gather_batches,
    gather_images,
    raw_bytes,
    to_bytes,
)
from lightning_nested.extras import require_package
from lightning_nested.networks.conditional_batch_norm import restored_modes
from lightning_nested.trainer.isolation import untouched_buffers
from lightning_nested.trainer.random_stream import RandomStream

Batches = Callable[[], Iterable[Any]]
"""Called for a fresh pass over batches ``(images, labels, …)``."""


class FeatureExtractor(nn.Module):
    """Network from images ``(N, C, H, W)`` in [−1, 1] to features ``(N, F)`` and class logits ``(N, K)`` or None.

    Attributes:
        num_features: F.
        fingerprint: Name of the function. Statistics of real images are kept by it, and by the features of some of
            the images.
        judges_classes: True if the logits are about the classes of the data set.
    """

    num_features: int
    fingerprint: str
    judges_classes: bool = False

    def refresh(self) -> None:
        """Bring ``fingerprint`` up to date, where the function can change; called before each scoring."""


@contextmanager
def lent(module: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Put a module into evaluation mode, on a device or where it is; restore modes, device and buffers on exit."""
    # On some devices a moved parameter is another object; on the others its data moves.
    homes = [
        (m._parameters, key, p, p.data)
        for m in module.modules()
        for key, p in m._parameters.items()
        if p is not None
    ]
    try:
        with restored_modes(module), untouched_buffers(module):
            module.eval()
            if device is not None:
                module.to(device)
            yield
    finally:
        for parameters, key, parameter, value in homes:
            parameters[key] = parameter
            if parameter.device != value.device:
                parameter.data = value


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
        """Build the extractor. It is used inside :func:`lent`, which sets its mode and device.

        Args:
            train: The training data, for extractors that need training.
            cache: A folder for trained extractors.
        """


@checked
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
        require_package("torch_fidelity")
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


@checked
@dataclass(frozen=True, kw_only=True)
class ModuleEvaluator(Evaluator):
    """Evaluator with any module from images in [−1, 1] to features ``(N, F)``, or to features and class logits.

    The module may be trained meanwhile: its modes, device and gradients are its own outside of a scoring. Each
    scoring then computes the statistics of the real images again, by the weights of that time.

    Args:
        module: The module; evaluated without gradients, in evaluation mode.
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
        return _Wrapped(self.module, one_example(train), self.judges_classes)


def one_example(train: Batches) -> Tensor:
    """Return one example, ``(1, …)``."""
    return gather_images(batch for batch, _ in zip(train(), range(1), strict=False))[:1]


@checked
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

    def __post_init__(self) -> None:
        at_least(
            1,
            epochs=self.epochs,
            width=self.width,
            num_features=self.num_features,
            batch_size=self.batch_size,
        )
        at_least(0, seed=self.seed)

    @property
    @override
    def name(self) -> str:
        return "classifier"

    @override
    def build(self, train: Batches, cache: Path) -> FeatureExtractor:
        images, labels = gather_batches(train())
        if images.ndim != 4:
            raise ValueError(
                f"ClassifierEvaluator looks at images (N, C, H, W). Got {tuple(images.shape)}; use ValuesEvaluator() "
                "or ModuleEvaluator(...)."
            )
        content = content_hash(images, labels)
        key = hashlib.sha256(f"{self!r} {content}".encode()).hexdigest()[:16]
        with RandomStream(self.seed):
            network = SmallFeatureNetwork(
                images.shape[1],
                int(labels.max()) + 1,
                self.width,
                self.num_features,
                tiny=min(images.shape[2:]) < 8,
            )
            path = cache / f"classifier_{key}.pt"
            kept = read_cache(path, partial(_with_state, network))
            if kept is None:
                _train(network, images, labels, self.epochs, self.batch_size)
                write_cache(path, network.state_dict())
            else:
                network = kept
        network.fingerprint = f"classifier-{key}"
        return network.eval()


class SmallFeatureNetwork(FeatureExtractor):
    """Network of three 3×3 convolutions with batch norm and pooling, F rectified features, a linear classifier."""

    judges_classes = True

    def __init__(
        self, in_channels: int, num_classes: int, width: int, num_features: int, *, tiny: bool = False
    ) -> None:
        super().__init__()
        self.num_features = num_features
        # Rounding up, an image of fewer than 8 pixels a side is not pooled to nothing.
        widths = (in_channels, width, 2 * width, 4 * width)
        blocks: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            conv = nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False)
            blocks += [conv, nn.BatchNorm2d(fan_out), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=tiny)]
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
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"Inception takes images (N, C, H, W) of 1 or 3 channels. Got {tuple(images.shape)}; use "
                "ClassifierEvaluator() or ModuleEvaluator(...)."
            )
        pixels = to_bytes(images)
        features, logits = self.network(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels)
        return features, logits


class _Wrapped(FeatureExtractor):
    def __init__(self, module: nn.Module, images: Tensor, judges_classes: bool) -> None:
        super().__init__()
        self.module, self.judges_classes = module, judges_classes
        like = next(iter([*module.parameters(), *module.buffers()]), images)
        with torch.no_grad(), lent(module):
            features, logits = self(images.to(like.device))
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
        self._code = _code_hash(module)
        self.refresh()

    @override
    def refresh(self) -> None:
        self.fingerprint = f"{type(self.module).__name__}-{self._code}-{_state_hash(self.module)}"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.module(images)
        pair = (found, None) if isinstance(found, Tensor) else found
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], Tensor):
            raise ValueError(
                "ModuleEvaluator's module must return features (N, F), or (features, logits). "
                f"Got {described(found)}."
            )
        if pair[0].shape[:1] != images.shape[:1]:
            raise ValueError(
                "ModuleEvaluator's module must return a row of features for each image. "
                f"Got {tuple(pair[0].shape)} for {len(images)} images; pool over pixels, not over the batch."
            )
        return pair[0], pair[1]


def _state_hash(module: nn.Module) -> str:
    """Return a name for a module's numbers, also for buffers that are not persistent."""
    digest = hashlib.sha256()
    for name, value in {**module.state_dict(), **dict(module.named_buffers())}.items():
        # The extra state of a module can be anything.
        content = raw_bytes(value) if isinstance(value, Tensor) else repr(value).encode()
        kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else "extra"
        digest.update(f"{name} {kind} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def _code_hash(module: nn.Module) -> str:
    """Return a name for what a module computes with its numbers: structure, source text and plain attributes.

    It cannot see everything, such as a function that a forward calls; features of real images are compared too.
    """
    lines = [repr(module)]
    for part in module.modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str)}
        lines.append(f"{type(part).__module__}.{type(part).__qualname__} {plain | {'training': None}}")
        try:
            lines.append(inspect.getsource(type(part)))
        # Classes of a console have no source.
        except (OSError, TypeError):
            lines.append(repr(getattr(getattr(type(part).forward, "__code__", None), "co_code", None)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _with_state(network: SmallFeatureNetwork, state: dict[str, Any]) -> SmallFeatureNetwork:
    """Return a copy with these weights: where they do not fit, the network is still as it was drawn."""
    copy = deepcopy(network)
    copy.load_state_dict(state)
    return copy


def _train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch_size: int) -> None:
    """Train with Adam and a rate that falls to zero; 91 % on Fashion-MNIST after 4 epochs."""
    # Sorted, so that the result depends on the content alone, not on the loader's shuffling.
    order = torch.tensor(sorted(range(len(images)), key=lambda i: (raw_bytes(images[i]), int(labels[i]))))
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
