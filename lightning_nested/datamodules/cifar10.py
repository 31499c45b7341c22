"""CIFAR-10 in the format of its authors, which is torchvision's."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.datamodules.downloaded import DownloadedDataModule
from lightning_nested.datamodules.in_memory import LabelledImages

_FOLDER = "cifar-10-batches-py"
_TRAIN = tuple(f"data_batch_{k}" for k in range(1, 6))
_TEST = "test_batch"


@checked
class CIFAR10DataModule(DownloadedDataModule):
    """CIFAR-10: 60 000 colour 32×32 images of ten classes, shape ``(n, 3, 32, 32)``.

    The six files of ``cifar-10-batches-py`` are read from ``root``, from ``root/cifar-10-batches-py``, or
    downloaded there by torchvision. Training and validation images are a plain random split of the 50 000
    training images; with ``val_size=0``, the default, all of them are trained on and the validation loader
    gives the test images, since a generator's scores need no held-out images but the Trainer's validation
    needs a loader. Krizhevsky (2009), "Learning multiple layers of features from tiny images".

    Args:
        options: Options of :class:`DownloadedDataModule` and :class:`InMemoryDataModule`.

    Raises:
        FileNotFoundError: The files are nowhere and cannot be downloaded.
        ValueError: A file is not a batch of CIFAR-10.
    """

    dataset = "CIFAR10"

    def __init__(
        self,
        *,
        train_size: int = 50_000,
        val_size: int = 0,
        batch_size: int = 50,
        symmetric: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            train_size=train_size, val_size=val_size, batch_size=batch_size, symmetric=symmetric, **options
        )

    @override
    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.val_size == 0:
            self.val_images, self.val_labels = self.test_images, self.test_labels

    @override
    def _folder(self) -> Path | None:
        root = Path(self.root or "data")
        for folder in (root, root / _FOLDER):
            if all((folder / name).is_file() for name in (*_TRAIN, _TEST)):
                return folder
        return None

    @override
    def _read(self, folder: Path) -> tuple[LabelledImages, LabelledImages]:
        parts = [read_batch(folder / name) for name in _TRAIN]
        train = LabelledImages(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
        return train, read_batch(folder / _TEST)

    @override
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
    """Read one file of CIFAR-10: a pickled dictionary of ``data``, ``(n, 3072)`` bytes, and ``labels``.

    Raises:
        ValueError: The file is something else.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        data, labels = content[b"data"], content[b"labels"]
        images: Tensor = torch.from_numpy(np.ascontiguousarray(data, dtype=np.uint8))
        return LabelledImages(images.reshape(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.long))
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} must be a pickled batch of CIFAR-10 with `data` of 3072 bytes an image and `labels`. "
            f"Got {type(error).__name__}: {error}. Unpack the archive again."
        ) from error
