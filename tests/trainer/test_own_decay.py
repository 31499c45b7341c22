"""A decoupled optimizer's own decay gives way, and comes back as it was."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from lightning_nested.trainer.own_decay import OwnDecay


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


def decays(optimizer: Optimizer) -> list[float]:
    return [group["weight_decay"] for group in optimizer.param_groups]


def unfrozen() -> tuple[Optimizer, OwnDecay]:
    """Return an optimizer that a group was added to after its own decay gave way."""
    optimizer, own = AdamW([parameter()], weight_decay=0.1), OwnDecay()
    own.take(optimizer)
    optimizer.add_param_group({"params": [parameter()], "weight_decay": 0.2})
    own.take(optimizer)
    return optimizer, own


def test_a_group_that_is_added_keeps_the_decays_of_the_others() -> None:
    optimizer, own = unfrozen()
    assert decays(optimizer) == [0.0, 0.0]
    own.give_back()
    assert decays(optimizer) == [0.1, 0.2]


def test_a_checkpoint_has_the_decays_of_all_groups_and_restores_them() -> None:
    optimizer, own = unfrozen()
    checkpoint = {"optimizer_states": [optimizer.state_dict()]}
    own.give_back_saved(checkpoint)
    other, theirs = unfrozen()
    for group, decay in zip(checkpoint["optimizer_states"][0]["param_groups"], (0.1, 0.2), strict=True):
        assert group["weight_decay"] == decay
        group["weight_decay"] = 10 * decay
    other.load_state_dict(checkpoint["optimizer_states"][0])
    theirs.take(other)
    assert decays(other) == [0.0, 0.0]
    theirs.give_back()
    assert decays(other) == [1.0, 2.0]


def test_a_coupled_group_of_the_same_optimizer_does_not_make_a_decoupled_one_forget() -> None:
    groups = [
        {"params": [parameter()], "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"params": [parameter()], "weight_decay": 0.5},
    ]
    optimizer, own = Adam(groups), OwnDecay()
    for _ in range(2):
        own.take(optimizer)
        assert decays(optimizer) == [0.0, 0.5]
    own.give_back()
    assert decays(optimizer) == [0.1, 0.5]
