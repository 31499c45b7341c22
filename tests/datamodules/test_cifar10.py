import pickle
from pathlib import Path

import pytest
import torch

from lightning_nested.datamodules import CIFAR10DataModule
from tests.datamodules.cifar10_files import write_cifar10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_cifar10(tmp_path, 10)
    return tmp_path


def test_reads_the_format_and_scales(folder: Path) -> None:
    data = CIFAR10DataModule(root=str(folder), train_size=50, batch_size=8)
    data.prepare_data()
    data.setup()
    assert data.train_images.shape == (50, 3, 32, 32)
    assert data.test_images.shape == (10, 3, 32, 32)
    raw = pickle.loads((folder / "cifar-10-batches-py" / "test_batch").read_bytes())
    # Red plane first, rows within it: pixel (0, 1) of the green plane is byte 1024 + 1.
    expected = raw[b"data"][3, 1024 + 1] / 255 * 2 - 1
    assert data.test_images[3, 1, 0, 1].item() == pytest.approx(expected, abs=1e-6)
    assert data.test_labels.tolist() == raw[b"labels"]
    # Without validation images of its own, validation runs on the test images.
    assert torch.equal(data.val_images, data.test_images)
    images, labels = next(iter(data.train_dataloader()))
    assert images.min() >= -1
    assert images.dtype == torch.float32
    assert labels.dtype == torch.long
    inner = CIFAR10DataModule(root=str(folder / "cifar-10-batches-py"), train_size=30, val_size=20)
    inner.setup()
    assert len(inner.val_labels) == 20


def test_a_missing_folder_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    data = CIFAR10DataModule(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"data_batch_1 … data_batch_5.*no route.*Unpack cifar-10"):
        data.prepare_data()
    with pytest.raises(FileNotFoundError, match="prepare_data"):
        data.setup()


@pytest.mark.parametrize("damage", [b"", b"junk", pickle.dumps({b"labels": []}), pickle.dumps(print)])
def test_a_damaged_file_is_named(folder: Path, damage: bytes) -> None:
    path = folder / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"data_batch_3 must be a pickled batch.*Unpack the archive again"):
        CIFAR10DataModule(root=str(folder), train_size=50).setup()
