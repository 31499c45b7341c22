"""LightningModules to train as they are or to extend."""

from lightning_nested.modules.image_classifier import ImageClassifier

__all__ = [
    "ImageClassifier",
]
