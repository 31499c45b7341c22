"""Random streams apart from the global one."""

from __future__ import annotations

import random
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch

from lightning_nested.trainer.random_stream import RandomStream


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


@pytest.mark.parametrize("begun", [False, True])
def test_each_replay_draws_the_same_and_leaves_the_global_stream(begun: bool) -> None:
    """Also where it ends by an exception; a stream that is entered goes on."""
    stream = RandomStream(3)
    if begun:
        with stream:
            draw()
    outside = RandomStream.snapshot()
    seen = []
    for _ in range(2):
        with suppress(KeyError), stream.replay():
            seen.append(draw())
            raise KeyError
    after = draw()
    with outside.replay():
        assert draw() == after
    with stream:
        seen.append(draw())
    assert seen[0] == seen[1] == seen[2]
    with stream:
        assert draw() != seen[0]


def test_streams_apart_draw_what_they_draw_alone() -> None:
    """The global stream, in the middle of a pair of normal numbers, comes back once, after all of them."""

    def drawn(apart: bool) -> list[object]:
        np.random.seed(7)
        random.seed(7)
        torch.manual_seed(7)
        np.random.randn()
        first, second = RandomStream(3), RandomStream(4)
        found: list[object] = []
        with first.apart() if apart else nullcontext():
            for rounds in range(3):
                with first:
                    # The first round leaves NumPy as it was seeded, the last draws half a pair.
                    found.append([torch.rand(()).item(), rounds and np.random.randn()])
                with suppress(KeyError), second.replay():
                    with RandomStream(5):
                        found.append(draw())
                    found.append(draw())
                    raise KeyError
        return [*found, np.random.randn(), draw()]

    alone = drawn(False)
    assert drawn(True) == alone
    # NumPy's numbers of the first stream go on, though its first round drew none.
    normal = [found[1] for found in alone if isinstance(found, list)]
    assert normal == [0, *np.random.RandomState(3).randn(2)]
