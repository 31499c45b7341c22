"""CIFAR-10 in the format of its authors, which is torchvision's."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_nested.datamodules.in_memory import InMemoryDataModule, LabelledImages

_FOLDER = "cifar-10-batches-py"
_TRAIN = tuple(f"data_batch_{k}" for k in range(1, 6))
_TEST = "test_batch"
_PIXELS = 3 * 32 * 32


class CIFAR10DataModule(InMemoryDataModule):
    """CIFAR-10: 60 000 colour 32×32 images of ten classes, shape ``(n, 3, 32, 32)``.

    The six files of ``cifar-10-batches-py`` are read from ``root``, from ``root/cifar-10-batches-py``, or
    downloaded there by torchvision. Training and validation images are a plain random split of the 50 000
    training images; with ``val_size=0``, the default, all of them are trained on and the validation loader
    gives the test images, since a generator's scores need no held-out images but the Trainer's validation
    needs a loader. Krizhevsky (2009), "Learning multiple layers of features from tiny images".

    Args:
        root: Folder with the files, or to download to; None: ``data``.
        symmetric: Pixels in [−1, 1], as generators with tanh make them, instead of [0, 1].
        drop_last: Leave out a short last training batch.

    The other options are those of :class:`InMemoryDataModule`.

    Raises:
        FileNotFoundError: If the files are nowhere and cannot be downloaded.
        ValueError: If a file is not a batch of CIFAR-10.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        train_size: int = 50_000,
        val_size: int = 0,
        wrong_label_fraction: float = 0.0,
        use_clean_labels: bool = False,
        with_index: bool = False,
        batch_size: int = 50,
        val_batch_size: int | None = None,
        seed: int | None = 0,
        num_workers: int = 0,
        symmetric: bool = True,
        drop_last: bool = False,
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
        self.root = root
        self.symmetric, self.drop_last = symmetric, drop_last

    @override
    def prepare_data(self) -> None:
        if self._folder() is not None:
            return
        from torchvision.datasets import CIFAR10

        try:
            CIFAR10(self.root or "data", download=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: torchvision's, for a damaged file
            raise FileNotFoundError(self._not_found(f"the download failed: {error}")) from error

    @override
    def load(self) -> tuple[LabelledImages, LabelledImages | None]:
        folder = self._folder()
        if folder is None:
            raise FileNotFoundError(self._not_found("`prepare_data` was not called before `setup`"))
        parts = [read_batch(folder / name) for name in _TRAIN]
        train = LabelledImages(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
        return train, read_batch(folder / _TEST)

    @override
    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.val_size == 0:
            self.val_images, self.val_labels = self.test_images, self.test_labels

    def _folder(self) -> Path | None:
        root = Path(self.root or "data")
        for folder in (root, root / _FOLDER):
            if all((folder / name).is_file() for name in (*_TRAIN, _TEST)):
                return folder
        return None

    def _not_found(self, reason: str) -> str:
        return (
            f"CIFAR-10 needs the files {_TRAIN[0]} … {_TRAIN[-1]} and {_TEST}. "
            f"Got none in root={self.root or 'data'!r} or its folder {_FOLDER}, and {reason}. "
            "Unpack cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html into `root`, or connect "
            "to the internet."
        )


class _Unpickler(pickle.Unpickler):
    """Builds arrays and plain data only: a pickle could otherwise run anything."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {"_reconstruct", "ndarray", "dtype", "scalar", "encode", "_frombuffer"}
        if name in allowed and module.partition(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_batch(path: Path) -> LabelledImages:
    """One file of CIFAR-10: a pickled dictionary of ``data``, ``(n, 3072)`` bytes, and ``labels``.

    Raises:
        ValueError: If the file is something else.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        data, labels = content[b"data"], content[b"labels"]
        images: Tensor = torch.from_numpy(np.ascontiguousarray(data, dtype=np.uint8))
        return LabelledImages(images.reshape(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.long))
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} must be a pickled batch of CIFAR-10 with `data` of {_PIXELS} bytes an image and `labels`. "
            f"Got {type(error).__name__}: {error}. Unpack the archive again."
        ) from error
