import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.datamodules import TensorBatches
from lightning_nested.datamodules.in_memory import with_wrong_labels


def test_batches_are_those_of_a_tensor_dataset() -> None:
    tensors = torch.rand(23, 2, 3), torch.arange(23)
    loaders = (
        DataLoader(TensorDataset(*tensors), batch_size=5, shuffle=True),
        TensorBatches(*tensors).loader(batch_size=5, shuffle=True),
    )
    epochs = []
    for loader in loaders:
        torch.manual_seed(1)
        epochs.append([tuple(batch) for batch in loader])
    for expected, batch in zip(*epochs, strict=True):
        assert all(map(torch.equal, expected, batch))


def test_a_batch_is_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = TensorBatches(torch.arange(10))
    monkeypatch.setattr(TensorBatches, "__getitem__", lambda *_: pytest.fail("read one by one"))
    assert [len(batch[0]) for batch in data.loader(batch_size=4)] == [4, 4, 2]


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"equal length .* Got lengths \[3, 2\]"):
        TensorBatches(torch.zeros(3), torch.zeros(2))


def test_wrong_labels_are_uniform_over_the_other_classes(generator: torch.Generator) -> None:
    labels = torch.arange(10).repeat(9_000)
    noisy = with_wrong_labels(labels, 1.0, 10, generator)
    counts = torch.zeros(10, 10).index_put_((labels, noisy), torch.ones(()), accumulate=True)
    assert torch.equal(counts.diagonal(), torch.zeros(10))
    others = counts[~torch.eye(10, dtype=torch.bool)]
    # χ² over 10 rows of 9 classes has 80 degrees of freedom: mean 80, deviation 12.6.
    assert ((others - 1_000) ** 2 / 1_000).sum() < 80 + 4 * 12.6


def test_the_wrong_ones_are_spread_over_the_set(generator: torch.Generator) -> None:
    labels = torch.zeros(10_000, dtype=torch.long)
    wrong = with_wrong_labels(labels, 0.3, 2, generator) != labels
    # 3 000 of 10 000 without replacement: the first half holds 1 500 ± 23.
    assert abs(int(wrong[:5_000].sum()) - 1_500) < 4 * 23
