import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_nested.datamodules import DigitsDataModule


def ready(**options: object) -> DigitsDataModule:
    data = DigitsDataModule(**options)  # type: ignore[arg-type]
    data.setup()
    return data


def sorted_rows(images: Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, images.flatten(1).tolist()))


def test_the_splits_are_the_digits_each_once() -> None:
    data = ready()
    assert [len(data.train_labels), len(data.val_labels), len(data.test_labels)] == [700, 300, 797]
    assert data.train_images.shape[1:] == (1, 8, 8)
    assert data.train_images.dtype == torch.float32
    images = torch.cat([data.train_images, data.val_images, data.test_images])
    labels = torch.cat([data.train_labels, data.val_labels, data.test_labels])
    source = load_digits()
    assert sorted_rows(images) == sorted_rows(torch.from_numpy(source.images).float() / 16)
    assert torch.equal(labels.bincount(), torch.from_numpy(source.target).bincount())
    assert (images.min(), images.max()) == (0.0, 1.0)


def test_right_labels_belong_to_their_images() -> None:
    source = load_digits()
    label_of = {tuple(row): label for row, label in zip(source.data / 16, source.target, strict=True)}
    data = ready(wrong_label_fraction=0.4)
    for images, labels in [
        (data.train_images, data.train_labels_clean),
        (data.val_images, data.val_labels),
        (data.test_images, data.test_labels),
    ]:
        expected = [label_of[tuple(row)] for row in images.flatten(1).tolist()]
        assert labels.tolist() == expected


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.4, 280), (1.0, 700)])
def test_as_many_labels_are_wrong_as_asked(fraction: float, count: int) -> None:
    data = ready(wrong_label_fraction=fraction)
    assert int(data.wrong.sum()) == count
    assert torch.equal(data.wrong, data.train_labels != data.train_labels_clean)


def test_without_a_seed_of_its_own_the_split_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")  # what seed_everything(3) sets
    data, explicit = ready(seed=None, wrong_label_fraction=0.4), ready(seed=3, wrong_label_fraction=0.4)
    assert data.seed == 3
    assert torch.equal(data.train_images, explicit.train_images)
    assert torch.equal(data.train_labels, explicit.train_labels)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    with pytest.raises(ValueError, match="seed_everything"):
        ready(seed=None)


def test_the_split_depends_on_the_seed_alone() -> None:
    clean, noisy = ready(), ready(wrong_label_fraction=0.4, batch_size=7, with_index=True)
    assert torch.equal(clean.train_images, noisy.train_images)
    assert torch.equal(clean.test_labels, noisy.test_labels)
    assert torch.equal(noisy.train_labels, ready(wrong_label_fraction=0.4).train_labels)
    other = ready(wrong_label_fraction=0.4, seed=1)
    assert not torch.equal(noisy.train_images, other.train_images)


@pytest.mark.parametrize("clean", [False, True])
def test_batches_carry_the_index_of_each_image(clean: bool) -> None:
    data = ready(wrong_label_fraction=0.4, with_index=True, use_clean_labels=clean, batch_size=64)
    labels_given = data.train_labels_clean if clean else data.train_labels
    seen = []
    for images, labels, index in data.train_dataloader():
        assert torch.equal(images, data.train_images[index])
        assert torch.equal(labels, labels_given[index])
        seen.append(index)
    order = torch.cat(seen)
    assert sorted(order.tolist()) == list(range(700))
    assert order.tolist() != list(range(700))


def test_only_training_batches_have_an_index() -> None:
    data = ready(with_index=True)
    assert {len(batch) for batch in (*data.val_dataloader(), *data.test_dataloader())} == {2}
    assert len(next(iter(ready().train_dataloader()))) == 2


def test_validation_batches_have_their_own_size() -> None:
    data = ready(batch_size=50, val_batch_size=128)
    assert [len(labels) for _, labels in data.val_dataloader()] == [128, 128, 44]
    assert [len(labels) for _, labels in data.test_dataloader()][-1] == 797 - 6 * 128


def test_setup_for_another_stage_keeps_the_split() -> None:
    data = ready()
    images = data.train_images
    data.setup("test")
    assert data.train_images is images


def test_worker_processes_give_the_same_batches() -> None:
    alone, workers = ready(), ready(num_workers=1)
    for expected, batch in zip(alone.val_dataloader(), workers.val_dataloader(), strict=True):
        assert all(map(torch.equal, expected, batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 0}, "train_size must be at least 1. Got 0"),
        ({"wrong_label_fraction": 1.5}, r"in \[0, 1\]\. Got 1\.5"),
        ({"batch_size": 0}, "batch_size must be at least 1. Got 0"),
        ({"val_batch_size": 0}, "val_batch_size must be at least 1. Got 0"),
        ({"train_size": 1600}, r"at most the 1797 images of DigitsDataModule\. Got 1600 \+ 300"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(**options)
