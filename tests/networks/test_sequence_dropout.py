"""Dropout of units in whole sequences, and of words."""

import pytest
import torch

from lightning_nested.networks import SequenceDropout, WordDropout

WORDS = torch.tensor([[0, 1, 2, 1], [2, 3, 0, 0]])


def test_a_unit_is_dropped_at_each_step_of_its_example() -> None:
    x = torch.ones(500, 4, 40, dtype=torch.float64)
    out = SequenceDropout(0.3)(x)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float((out == 0).double().mean()) == pytest.approx(0.3, abs=0.015)  # 20 000 masks: ± 0.003
    assert not torch.equal(out[0], out[1])


def test_a_word_is_dropped_wherever_a_batch_has_it() -> None:
    x, dropped = torch.ones(2, 4, 3, dtype=torch.float64), 0.0
    for _ in range(300):
        out = WordDropout(0.4)(x, WORDS)
        by_word = {int(w): out[w == WORDS] for w in WORDS.unique()}
        assert all(len(vectors.unique()) == 1 for vectors in by_word.values())
        dropped += float(sum(vectors[0, 0] == 0 for vectors in by_word.values())) / 4
    assert float(out.max()) in (0.0, pytest.approx(1 / 0.6))
    assert dropped / 300 == pytest.approx(0.4, abs=0.06)  # 1 200 masks: ± 0.014


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_nothing_is_dropped_in_evaluation_or_at_rate_zero(rate: float) -> None:
    x = torch.rand(2, 4, 3)
    units, words = (layer.train(rate == 0) for layer in (SequenceDropout(rate), WordDropout(rate)))
    assert units(x) is x
    assert words(x, WORDS) is x
