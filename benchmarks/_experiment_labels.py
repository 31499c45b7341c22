"""Wrong labels and a long tail of Fashion-MNIST at real size: weights by the validation loss, beside what people do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from _arms import Column, Experiment, Numbers, auroc
from _fits import plain_trainer
from _pays_tasks import cnn
from lightning.pytorch import Callback, seed_everything
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_nested import (
    ExampleWeights,
    FashionMNISTDataModule,
    HypergradientCallback,
    ImageClassifier,
    WeightNetwork,
)

BATCH = 128


class WeightedClasses(ImageClassifier):
    """A classifier whose weight network sees the label of an image in place of its loss."""

    @override
    def training_losses(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        images, labels, _ = batch
        losses = functional.cross_entropy(self(images), labels, reduction="none")
        if self.weight_network is not None:
            losses = self.weight_network(losses, functional.one_hot(labels, 10).to(losses.dtype))
        return {"cross_entropy": losses.mean()}


@dataclass
class Given:
    """Images of one seed, and the fits on them."""

    data: FashionMNISTDataModule
    seed: int
    steps: int

    def fit(
        self,
        *callbacks: Callback,
        labels: Tensor | None = None,
        rows: Tensor | None = None,
        share: float = 1.0,
        images: Tensor | None = None,
        kind: type[ImageClassifier] = ImageClassifier,
    ) -> tuple[ImageClassifier, float]:
        """Return a classifier that was trained for a share of the steps, and the CPU time of the fit.

        Args:
            *callbacks: Callbacks of the fit.
            labels: Labels in place of those that were given.
            rows: The images that it trains on; None: all.
            share: Of the steps.
            images: Images in place of the training images.
            kind: Class of the classifier.
        """
        x = self.data.train_images if images is None else images
        y = self.data.train_labels if labels is None else labels
        chosen = torch.arange(len(y)) if rows is None else rows
        seed_everything(self.seed, verbose=False)
        module = kind(cnn(), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3))
        data = TensorDataset(x[chosen], y[chosen], chosen)
        batches = DataLoader(data, min(BATCH, len(data)), shuffle=True, drop_last=True)
        val = DataLoader(TensorDataset(self.data.val_images, self.data.val_labels), 1000, shuffle=True)
        before = time.process_time()
        plain_trainer(max(1, round(share * self.steps)), callbacks).fit(module, batches, val)
        return module.eval(), time.process_time() - before

    @property
    def both(self) -> dict[str, Tensor]:
        """The training and the validation images with their labels, for :meth:`fit`."""
        return {
            "images": torch.cat([self.data.train_images, self.data.val_images]),
            "labels": torch.cat([self.data.train_labels, self.data.val_labels]),
        }

    @property
    def right(self) -> int:
        """How many labels are right."""
        return int((~self.data.wrong).sum())

    def numbers(self, module: ImageClassifier, seconds: float, scores: Tensor | None = None) -> Numbers:
        """Return the test accuracy, and how well low scores tell wrong labels."""
        found = {"seconds": seconds, **accuracies(module, self.data)}
        if scores is not None and bool(self.data.wrong.any()):
            found["auroc"] = auroc(scores, ~self.data.wrong)
        return found


@torch.no_grad()
def logits(module: ImageClassifier, images: Tensor) -> Tensor:
    """Return logits, in evaluation mode."""
    return torch.cat([module(part) for part in images.split(500)])


def losses(module: ImageClassifier, data: FashionMNISTDataModule) -> Tensor:
    """Return the loss of each training image with the label that it was given."""
    return functional.cross_entropy(logits(module, data.train_images), data.train_labels, reduction="none")


def accuracies(module: ImageClassifier, data: FashionMNISTDataModule) -> dict[str, float]:
    """Return the test accuracy, which is balanced as the test images are, and that of the three rarest classes."""
    hit = (logits(module, data.test_images).argmax(1) == data.test_labels).double()
    return {"accuracy": float(hit.mean()), "rare": float(hit[data.test_labels >= 7].mean())}


def prepare(train: int, **options: Any) -> Callable[[int, str], Given]:
    """Return the function that draws images, 1 000 more with right labels to validate, and 10 000 to test."""

    def given(seed: int, size: str) -> Given:
        smoke = size == "smoke"
        images, val = (400, 60) if smoke else (train, 1000)
        data = FashionMNISTDataModule(train_size=images, val_size=val, seed=seed, **options)
        data.setup()
        if smoke:
            data.test_images, data.test_labels = data.test_images[:100], data.test_labels[:100]
        return Given(data, seed, 4 if smoke else 20 * (len(data.train_labels) // BATCH))

    return given


def plain(given: Given) -> Numbers:
    """Train on the labels as they are."""
    return given.numbers(*given.fit())


def right_labels(given: Given) -> Numbers:
    """Train on the right labels of the same images, which nobody has."""
    return given.numbers(*given.fit(labels=given.data.train_labels_clean))


def right_ones(given: Given) -> Numbers:
    """Train on the images whose labels are right, for as many steps: the most that leaving images out can reach."""
    return given.numbers(*given.fit(rows=(~given.data.wrong).nonzero().flatten()))


def trusted(given: Given) -> Numbers:
    """Train on the validation images alone, for as many steps."""
    return given.numbers(*given.fit(images=given.data.val_images, labels=given.data.val_labels))


def on_both(given: Given) -> Numbers:
    """Train on the validation images too, for as many steps: the same data as where they tune."""
    return given.numbers(*given.fit(**given.both))


def example_weights(given: Given) -> Numbers:
    """Tune one weight for each image."""
    weights = ExampleWeights(len(given.data.wrong))
    module, seconds = given.fit(HypergradientCallback(weights))
    return given.numbers(module, seconds, weights.values()["weights"])


def weight_network(given: Given) -> Numbers:
    """Tune a network from the loss to the weight; the loss at the end ranks."""
    module, seconds = given.fit(HypergradientCallback(WeightNetwork()))
    return given.numbers(module, seconds, -losses(module, given.data))


def class_weights(given: Given) -> Numbers:
    """Tune a network from the class to the weight."""
    callback = HypergradientCallback(WeightNetwork(inputs=10))
    return given.numbers(*given.fit(callback, kind=WeightedClasses))


def small_losses(given: Given) -> Numbers:
    """Rank by the loss after a tenth of the steps, and train again on as many as are right, a number nobody has."""
    young, first = given.fit(share=0.1)
    found = losses(young, given.data)
    module, second = given.fit(rows=found.argsort()[: given.right])
    return given.numbers(module, first + second, -found)


def confident_learning(given: Given) -> Numbers:
    """Leave out what cleanlab finds, by three networks of a fifth of the steps, each on two thirds of the images."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    data, total = given.data, 0.0
    folds = torch.arange(len(data.train_labels)) % 3
    probabilities = torch.zeros(len(folds), 10)
    for fold in range(3):
        module, seconds = given.fit(rows=(folds != fold).nonzero().flatten(), share=0.2)
        out = folds == fold
        probabilities[out] = logits(module, data.train_images[out]).softmax(1)
        total += seconds
    found = data.train_labels.numpy(), probabilities.numpy()
    issues = torch.from_numpy(find_label_issues(*found, n_jobs=1))
    module, seconds = given.fit(rows=(~issues).nonzero().flatten())
    return given.numbers(module, total + seconds, torch.from_numpy(get_label_quality_scores(*found)))


def drawn_alike(labels: Tensor, count: int) -> Tensor:
    """Return rows of so many draws, by which each class comes as often as any other."""
    return torch.multinomial(1.0 / labels.bincount()[labels].double(), count, replacement=True)


def balanced(given: Given) -> Numbers:
    """Draw each class as often as any other: what people do about a long tail."""
    seed_everything(given.seed, verbose=False)
    return given.numbers(*given.fit(rows=drawn_alike(given.data.train_labels, BATCH * given.steps)))


def balanced_both(given: Given) -> Numbers:
    """Draw classes alike from the training and the validation images together."""
    seed_everything(given.seed, verbose=False)
    rows = drawn_alike(given.both["labels"], BATCH * given.steps)
    return given.numbers(*given.fit(**given.both, rows=rows))


ARMS = {
    "plain": plain,
    "right labels": right_labels,
    "the right ones alone": right_ones,
    "trusted images alone": trusted,
    "trained on both": on_both,
    "a weight for each image, one line": example_weights,
    "a network from loss to weight, one line": weight_network,
    "small-loss ranking": small_losses,
    "cleanlab": confident_learning,
}
if find_spec("cleanlab") is None:
    del ARMS["cleanlab"]
COLUMNS = {"accuracy": Column(title="test accuracy", percent=True), "auroc": Column(title="AUROC")}


def noisy(train: int, kind: str) -> Experiment:
    """Return the experiment of so many images, 40 % of their labels wrong."""
    return Experiment(
        question=f"Fashion-MNIST, {train} images, 40 % of the labels wrong ({kind}), 1 000 more whose labels are "
        f"right; a small CNN, batches of {BATCH}, 20 epochs of Adam; small-loss ranking is told how many are right",
        prepare=prepare(train, wrong_label_fraction=0.4, wrong_labels=kind),
        arms=ARMS,
        columns=COLUMNS,
    )


LABELS_SYMMETRIC, LABELS_PAIRWISE = noisy(10_000, "symmetric"), noisy(10_000, "pairwise")
LABELS_55000 = noisy(55_000, "symmetric")
LONG_TAIL = Experiment(
    question="Fashion-MNIST, the first class a hundred times as frequent as the last; 1 000 more images to validate, "
    f"all classes alike; a small CNN, batches of {BATCH}, 20 epochs of Adam",
    prepare=prepare(20_000, imbalance=100.0),
    arms={
        "plain": plain,
        "classes drawn alike": balanced,
        "classes drawn alike, validation images too": balanced_both,
        "validation images alone": trusted,
        "a network from loss to weight, one line": weight_network,
        "a network from class to weight, one line": class_weights,
    },
    columns={
        "accuracy": Column(title="balanced test accuracy", percent=True),
        "rare": Column(title="of the three rarest classes", percent=True),
    },
)
