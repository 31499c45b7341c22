import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.datamodules import DigitsDataModule, TensorBatches
from lightning_nested.datamodules.in_memory import long_tail, with_wrong_labels


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


def test_pairwise_wrong_labels_are_the_next_class() -> None:
    data = DigitsDataModule(wrong_label_fraction=0.4, wrong_labels="pairwise")
    data.setup()
    assert int(data.wrong.sum()) == 280
    shift = (data.train_labels - data.train_labels_clean) % 10
    assert torch.equal(shift, data.wrong.long())


@pytest.mark.parametrize("imbalance", [1.5, 20.0])
def test_a_long_tail_has_the_imbalance_asked_for_and_balanced_tests(imbalance: float) -> None:
    data = DigitsDataModule(imbalance=imbalance, with_index=True, wrong_label_fraction=0.1)
    plain = DigitsDataModule()
    data.setup()
    plain.setup()
    counts = data.train_labels_clean.bincount(minlength=10)
    # Half a row of rounding at either end.
    assert float(counts[0]) / imbalance == pytest.approx(float(counts[9]), abs=0.5 + 0.5 / imbalance)
    assert bool((counts.diff() <= 0).all())
    assert torch.equal(data.val_images, plain.val_images)
    assert torch.equal(data.test_labels, plain.test_labels)
    assert int(data.wrong.sum()) == round(0.1 * len(data.train_labels))
    index = torch.cat([batch[2] for batch in data.train_dataloader()])
    assert index.sort().values.tolist() == list(range(len(data.train_labels)))


def test_a_long_tail_keeps_one_of_each_class_that_is_there() -> None:
    kept = long_tail(torch.tensor([0, 0, 0, 0, 2, 1, 2]), 1000.0, 3)
    assert kept.tolist() == [0, 1, 2, 3, 4, 5]
