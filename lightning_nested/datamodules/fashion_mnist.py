"""MNIST, and Fashion-MNIST in its format, read in place where Debian's package has put it."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_nested.arguments import checked
from lightning_nested.datamodules.downloaded import DownloadedDataModule
from lightning_nested.datamodules.in_memory import LabelledImages

_SIDE, _PADDED = 28, 32
_UNSIGNED_BYTE = 0x08  # idx type code; the only one the MNIST family uses


class IdxDataModule(DownloadedDataModule):
    """Images from four idx files, plain or gzipped, in the format of MNIST.

    Args:
        resolution: 28, or 32 for images with a black border of two pixels.
        options: Options of :class:`DownloadedDataModule` and :class:`InMemoryDataModule`.
    """

    title: str  # in messages
    system_folder: Path | None = None  # where a package of the system puts the files
    system_package = ""

    def __init__(
        self, *, train_size: int = 50_000, val_size: int = 10_000, resolution: int = _SIDE, **options: Any
    ) -> None:
        if resolution not in (_SIDE, _PADDED):
            raise ValueError(f"`resolution` must be {_SIDE} or {_PADDED}. Got {resolution}.")
        super().__init__(train_size=train_size, val_size=val_size, **options)
        self.pad_to = resolution if resolution != _SIDE else None

    @override
    def _folder(self) -> Path | None:
        downloaded = Path(self.root or "data") / self.dataset / "raw"
        named = [] if self.root is None else [Path(self.root), downloaded]
        system = [] if self.system_folder is None else [self.system_folder]
        for folder in (*named, *system, downloaded):
            if all(_find(folder, name) for split in ("train", "t10k") for name in _file_names(split)):
                return folder
        return None

    @override
    def _read(self, folder: Path) -> tuple[LabelledImages, LabelledImages]:
        return _read_split(folder, "train"), _read_split(folder, "t10k")

    @override
    def _not_found(self, reason: str) -> str:
        searched = f" or {self.system_folder}" if self.system_folder else ""
        install = (
            f"Install Debian's package `{self.system_package}`, or set" if self.system_package else "Set"
        )
        return (
            f"{self.title} needs its four idx files. Got none in root={self.root!r}{searched}, and {reason}. "
            f"{install} `root` to a folder with the files "
            "(train-images-idx3-ubyte, …, plain or .gz), or connect to the internet."
        )


@checked
class FashionMNISTDataModule(IdxDataModule):
    """Fashion-MNIST: 70 000 grey 28×28 images of clothes, shape ``(n, 1, 28, 28)``, pixels in [0, 1].

    The four idx files, plain or gzipped, are looked for in this order and read in place:

    1. ``root``, ``root/FashionMNIST/raw`` (torchvision's layout), if ``root`` is given;
    2. ``/usr/share/datasets/fashion-mnist``, where Debian's package ``dataset-fashion-mnist`` puts them;
    3. torchvision's download, into ``root`` or else ``data``.

    Training and validation images are a plain random split of the 60 000 training images under ``seed``; the
    10 000 test images are the source's. Xiao, Rasul & Vollgraf (2017), arXiv 1708.07747.

    Args:
        resolution: 28, or 32 for images with a black border of two pixels.
        options: Options of :class:`DownloadedDataModule` and :class:`InMemoryDataModule`.

    Raises:
        FileNotFoundError: The files are nowhere and cannot be downloaded.
        ValueError: A file is not an idx file of bytes, or ``resolution`` is neither.
    """

    dataset = "FashionMNIST"
    title = "Fashion-MNIST"
    system_folder: Path | None = Path("/usr/share/datasets/fashion-mnist")
    system_package = "dataset-fashion-mnist"

    def __init__(
        self, *, train_size: int = 50_000, val_size: int = 10_000, resolution: int = _SIDE, **options: Any
    ) -> None:
        super().__init__(train_size=train_size, val_size=val_size, resolution=resolution, **options)


@checked
class MNISTDataModule(IdxDataModule):
    """MNIST: 70 000 grey 28×28 images of handwritten digits, shape ``(n, 1, 28, 28)``, pixels in [0, 1].

    The four idx files, plain or gzipped, are read from ``root`` or ``root/MNIST/raw``, or downloaded there by
    torchvision. The split is that of :class:`FashionMNISTDataModule`. LeCun, Cortes & Burges (1998), "The MNIST
    database of handwritten digits".

    Args:
        resolution: 28, or 32 for images with a black border of two pixels.
        options: Options of :class:`DownloadedDataModule` and :class:`InMemoryDataModule`.

    Raises:
        FileNotFoundError: The files are nowhere and cannot be downloaded.
        ValueError: A file is not an idx file of bytes, or ``resolution`` is neither.
    """

    dataset = title = "MNIST"

    def __init__(
        self, *, train_size: int = 50_000, val_size: int = 10_000, resolution: int = _SIDE, **options: Any
    ) -> None:
        super().__init__(train_size=train_size, val_size=val_size, resolution=resolution, **options)


def read_idx(path: Path) -> Tensor:
    """Read the array of an idx file of unsigned bytes, gzipped or not.

    Layout: two zero bytes, a type code, the number of dimensions, each size as a big-endian 32-bit integer,
    then the data, last index fastest. See the MNIST page of LeCun, Cortes & Burges.

    Raises:
        ValueError: The file is not one, or is cut short.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} must be a whole gzip file. Got {error}. Fetch it again.") from error
    header = 4 + 4 * (data[3] if len(data) > 3 else 0)
    if data[:3] != bytes([0, 0, _UNSIGNED_BYTE]) or len(data) < header:
        raise ValueError(
            f"{path} must start with the header 00 00 08 … of an idx file. Got {data[:header].hex(' ')!r}. "
            "Fetch it again."
        )
    sizes = struct.unpack(f">{data[3]}I", data[4:header])
    if len(data) - header != math.prod(sizes):
        raise ValueError(
            f"{path} must hold {math.prod(sizes)} bytes of data. Got {len(data) - header}; fetch it."
        )
    numbers = torch.frombuffer(bytearray(data), dtype=torch.uint8)[header:]
    return numbers.reshape(sizes)


def _file_names(split: str) -> tuple[str, str]:
    return f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_split(folder: Path, split: str) -> LabelledImages:
    images, labels = (read_idx(path) for name in _file_names(split) if (path := _find(folder, name)))
    return LabelledImages(images.unsqueeze(1), labels)
