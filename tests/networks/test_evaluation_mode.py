"""Evaluation mode for a while: each part's own mode afterwards."""

from __future__ import annotations

from contextlib import suppress

from torch import nn

from lightning_nested.networks.evaluation_mode import evaluation_mode


def test_each_part_is_back_in_its_own_mode_also_after_an_error() -> None:
    frozen = nn.Dropout().eval()
    network = nn.Sequential(nn.Linear(1, 1), frozen)
    with suppress(KeyError), evaluation_mode(network):
        assert not any(part.training for part in network.modules())
        raise KeyError
    assert [part.training for part in (network, *network)] == [True, True, False]
