"""Real handwritten digits that come with scikit-learn: no download."""

from __future__ import annotations

import torch
from typing_extensions import override

from lightning_nested.datamodules.in_memory import InMemoryDataModule, LabelledImages


class DigitsDataModule(InMemoryDataModule):
    """The 1 797 handwritten 8×8 digits of scikit-learn, shape ``(n, 1, 8, 8)``, pixels in [0, 1].

    The images are the test part of the UCI set "Optical Recognition of Handwritten Digits" (Alpaydin &
    Kaynak, 1998). The split is plain random under ``seed``; what is in neither the training nor the
    validation images is the test set (797 images at the defaults).

    All options are those of :class:`InMemoryDataModule`; only the defaults of the sizes differ.

    Example:
        >>> data = DigitsDataModule(wrong_label_fraction=0.4)
        >>> data.setup()
        >>> tuple(data.train_images.shape), int(data.wrong.sum()), len(data.test_labels)
        ((700, 1, 8, 8), 280, 797)
    """

    max_pixel = 16.0  # counts of set pixels in 4×4 blocks of a bitmap

    def __init__(
        self,
        *,
        train_size: int = 700,
        val_size: int = 300,
        wrong_label_fraction: float = 0.0,
        use_clean_labels: bool = False,
        with_index: bool = False,
        batch_size: int = 100,
        val_batch_size: int | None = None,
        seed: int | None = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            train_size=train_size,
            val_size=val_size,
            wrong_label_fraction=wrong_label_fraction,
            use_clean_labels=use_clean_labels,
            with_index=with_index,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            seed=seed,
            num_workers=num_workers,
        )

    @override
    def load(self) -> tuple[LabelledImages, LabelledImages | None]:
        from sklearn.datasets import load_digits  # here, because it costs most of a second

        digits = load_digits()
        images = torch.from_numpy(digits.images).unsqueeze(1)
        return LabelledImages(images, torch.from_numpy(digits.target)), None
