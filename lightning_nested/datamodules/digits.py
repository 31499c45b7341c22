"""Real handwritten digits that come with scikit-learn: no download."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.datamodules.in_memory import InMemoryDataModule, LabelledImages
from lightning_nested.extras import require_package


@checked
class DigitsDataModule(InMemoryDataModule):
    """The 1 797 handwritten 8×8 digits of scikit-learn, shape ``(n, 1, 8, 8)``, pixels in [0, 1].

    The images are the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin &
    Kaynak, 1998). The split is plain random under ``seed``; what is in neither the training nor the
    validation images is the test set (797 images at the defaults).

    Example:
        >>> data = DigitsDataModule(wrong_label_fraction=0.4)
        >>> data.setup()
        >>> tuple(data.train_images.shape), int(data.wrong.sum()), len(data.test_labels)
        ((700, 1, 8, 8), 280, 797)
    """

    max_pixel = 16.0  # counts of set pixels in 4×4 blocks of a bitmap

    def __init__(
        self, *, train_size: int = 700, val_size: int = 300, batch_size: int = 100, **options: Any
    ) -> None:
        super().__init__(train_size=train_size, val_size=val_size, batch_size=batch_size, **options)

    @override
    def load(self) -> tuple[LabelledImages, LabelledImages | None]:
        require_package("sklearn")
        from sklearn.datasets import load_digits  # here, because it costs most of a second

        digits = load_digits()
        images = torch.from_numpy(digits.images).unsqueeze(1)
        return LabelledImages(images, torch.from_numpy(digits.target)), None
