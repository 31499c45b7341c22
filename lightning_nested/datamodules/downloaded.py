"""Images read from files that the user has, or that torchvision downloads on first use."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from typing_extensions import override

from lightning_nested.datamodules.in_memory import InMemoryDataModule, LabelledImages
from lightning_nested.extras import require_package


class DownloadedDataModule(InMemoryDataModule):
    """Images from a folder of files, which are downloaded into ``root`` where no folder has them.

    Args:
        root: Folder with the files, or to download to; None: ``data``.
        options: Options of :class:`InMemoryDataModule`.
    """

    dataset: str  # class of torchvision.datasets that downloads the files

    def __init__(self, *, root: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = root

    @abstractmethod
    def _folder(self) -> Path | None:
        """Return the first folder that holds every file, or None."""

    @abstractmethod
    def _read(self, folder: Path) -> tuple[LabelledImages, LabelledImages]:
        """Return the training and the test images."""

    @abstractmethod
    def _not_found(self, reason: str) -> str:
        """Return the message of an error: which files are needed, where they were looked for, the cures."""

    @override
    def prepare_data(self) -> None:
        if self._folder() is None:
            require_package("torchvision")
            from torchvision import datasets  # here, because it costs a second

            try:
                getattr(datasets, self.dataset)(self.root or "data", download=True)
            except (OSError, RuntimeError) as error:  # RuntimeError: torchvision's, when every mirror failed
                raise FileNotFoundError(self._not_found(f"the download failed: {error}")) from error

    @override
    def load(self) -> tuple[LabelledImages, LabelledImages | None]:
        folder = self._folder()
        if folder is None:
            raise FileNotFoundError(self._not_found("`prepare_data` was not called before `setup`"))
        return self._read(folder)
