import gzip
from pathlib import Path

import pytest
import torch
import torchvision
from jsonargparse import ArgumentParser

from lightning_nested.datamodules import FashionMNISTDataModule, MNISTDataModule
from lightning_nested.datamodules.fashion_mnist import read_idx


def write_idx(path: Path, array: torch.Tensor) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    data = header + bytes(array.flatten().tolist())
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_dataset(folder: Path, suffix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", 20), ("t10k", 8)):
        write_idx(
            folder / f"{split}-images-idx3-ubyte{suffix}", torch.arange(size * 784).view(size, 28, 28) % 256
        )
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", torch.arange(size) % 10)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, on a machine without Debian's package."""
    monkeypatch.setattr(FashionMNISTDataModule, "system_folder", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_debian_package_is_read_in_place(fashion_mnist: Path) -> None:
    data = FashionMNISTDataModule(train_size=1_000, val_size=500, wrong_label_fraction=0.2, with_index=True)
    data.prepare_data()
    data.setup()
    assert data.train_images.shape == (1_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert data.test_labels.bincount().tolist() == [1_000] * 10
    assert data.test_labels[:5].tolist() == [9, 2, 1, 1, 6]  # as published
    assert int(data.wrong.sum()) == 200
    # Mean of the published training pixels is 0.2860; 1 000 images of deviation about 0.15 leave ± 0.005.
    assert float(data.train_images.mean()) == pytest.approx(0.2860, abs=0.02)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])
def test_a_folder_of_the_user_is_read(elsewhere: Path, suffix: str, inner: str) -> None:
    write_dataset(elsewhere / "mine" / inner, suffix)
    data = FashionMNISTDataModule(root=str(elsewhere / "mine"), train_size=15, val_size=5)
    data.prepare_data()
    data.setup()
    assert len(data.test_labels) == 8
    pixels = data.test_images[0].flatten() * 255
    torch.testing.assert_close(pixels, (torch.arange(784) % 256).float())


def test_a_named_folder_comes_before_the_system(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(elsewhere / "mine")
    write_dataset(elsewhere / "system")
    monkeypatch.setattr(FashionMNISTDataModule, "system_folder", elsewhere / "system")
    assert FashionMNISTDataModule(root="mine")._folder() == Path("mine")
    assert FashionMNISTDataModule()._folder() == elsewhere / "system"


def test_what_is_nowhere_is_downloaded_into_root(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(root: str, download: bool) -> None:
        assert download
        write_dataset(Path(root) / "FashionMNIST" / "raw")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)
    data = FashionMNISTDataModule(train_size=15, val_size=5)
    data.prepare_data()
    data.setup()
    assert (elsewhere / "data").is_dir()
    monkeypatch.setattr(
        torchvision.datasets, "FashionMNIST", lambda *_, **__: pytest.fail("downloaded twice")
    )
    FashionMNISTDataModule().prepare_data()


@pytest.mark.parametrize("error", [RuntimeError("no mirror"), OSError("no route")])
def test_a_failed_download_names_the_cures(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    with pytest.raises(FileNotFoundError, match=f"{error}.*dataset-fashion-mnist.*root.*internet"):
        FashionMNISTDataModule().prepare_data()


def test_setup_without_the_files_says_so(elsewhere: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`prepare_data` was not called"):
        FashionMNISTDataModule(root="empty").setup()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"<html>", "must start with the header 00 00 08"),
        ("a", b"", "must start with"),
        ("a", bytes([0, 0, 8, 1, 0, 0, 0, 3, 1, 2]), r"must hold 3 bytes of data\. Got 2"),
        ("a", bytes([0, 0, 8, 2, 0, 0]), "must start with"),
        ("a.gz", gzip.compress(b"x" * 99, mtime=0)[:20], "whole gzip file"),
        ("a.gz", b"plain", "whole gzip file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / name)


def test_the_command_line_shows_inherited_options_with_their_text() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(FashionMNISTDataModule, "data")
    text = " ".join(parser.format_help().split())
    assert "--data.resolution RESOLUTION 28, or 32 for images" in text
    assert "--data.train_size TRAIN_SIZE Number of training images. (type: int, default: 50000)" in text
    assert "--data.root ROOT Folder with the files" in text
    assert "--data.drop_last {true,false} Leave out a short last training batch." in text


def test_the_variant_for_generators(fashion_mnist: Path) -> None:
    plain = FashionMNISTDataModule(train_size=64, val_size=10)
    padded = FashionMNISTDataModule(
        train_size=64, val_size=10, resolution=32, symmetric=True, drop_last=True, batch_size=30
    )
    for data in (plain, padded):
        data.setup()
    assert padded.train_images.shape == (64, 1, 32, 32)
    torch.testing.assert_close(padded.train_images[:, :, 2:-2, 2:-2], plain.train_images * 2 - 1)
    border = padded.train_images.clone()
    border[:, :, 2:-2, 2:-2] = -1
    assert (border == -1).all()
    assert torch.equal(padded.train_labels, plain.train_labels)
    assert [len(batch[1]) for batch in padded.train_dataloader()] == [30, 30]
    with pytest.raises(ValueError, match=r"`resolution` must be 28 or 32. Got 64"):
        FashionMNISTDataModule(resolution=64)


def test_mnist_has_the_same_format_and_a_folder_of_its_own(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda *_, **__: pytest.fail("downloaded"))
    write_dataset(elsewhere / "data" / "MNIST" / "raw")
    data = MNISTDataModule(train_size=15, val_size=5)
    data.prepare_data()
    data.setup()
    assert data.test_images.shape == (8, 1, 28, 28)
    (elsewhere / "data").rename(elsewhere / "gone")
    with pytest.raises(
        FileNotFoundError, match=r"^MNIST needs its four idx files. Got none in root=None, and .*Set `root`"
    ):
        MNISTDataModule().load()
