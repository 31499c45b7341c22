"""Random streams apart from the global one."""

from __future__ import annotations

import random
from contextlib import suppress

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
