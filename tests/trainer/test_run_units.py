"""The unit of decay that a run gives: from the rates its schedule will reach, for optimizers whose step is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_nested.callbacks import HypergradientCallback
from lightning_nested.hyperparameters import WeightDecay
from lightning_nested.linalg.kronecker import KroneckerFisher
from lightning_nested.trainer.run_units import measured_units, peak_rates
from tests.trainers import trainer

TOTAL = 100


def parameters() -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.ones(3, 2)), "v": nn.Parameter(torch.ones(2, 2))}


def stepped(optimizer: torch.optim.Optimizer, owned: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    for p in owned.values():
        p.grad = torch.full_like(p, 0.5)
    for _ in range(10):
        optimizer.step()
    return optimizer


def test_a_decoupled_unit_is_one_over_rate_and_steps() -> None:
    owned = parameters()
    optimizer = stepped(torch.optim.AdamW(owned.values(), lr=0.01), owned)
    assert measured_units(optimizer, owned, TOTAL, [0.01]) == pytest.approx(dict.fromkeys(owned, 1.0))


def test_a_coupled_unit_is_that_of_the_long_run_step() -> None:
    owned = parameters()
    optimizer = stepped(torch.optim.SGD(owned.values(), lr=0.1, momentum=0.9), owned)
    # R = 0.1 / (1 - 0.9)
    assert measured_units(optimizer, owned, TOTAL, [0.1]) == pytest.approx(dict.fromkeys(owned, 0.01))


@pytest.mark.parametrize("kind", [torch.optim.Adadelta, torch.optim.Rprop, torch.optim.ASGD])
def test_an_optimizer_whose_long_run_step_is_not_known_gives_no_unit(kind: Any) -> None:
    owned = parameters()
    optimizer = stepped(kind(owned.values(), lr=0.01), owned)
    assert measured_units(optimizer, owned, TOTAL, [0.01]) == {}


@pytest.mark.parametrize("kind", [torch.optim.RAdam, torch.optim.RMSprop, torch.optim.NAdam])
def test_adaptive_optimizers_have_adams_unit(kind: Any) -> None:
    """R = 0.01/0.5 for a gradient that is always 0.5; from ten steps on, as from a thousand."""
    owned = parameters()
    optimizer = stepped(kind(owned.values(), lr=0.01), owned)
    assert measured_units(optimizer, owned, TOTAL, [0.01]) == pytest.approx(dict.fromkeys(owned, 0.5))


def test_adagrads_unit_counts_its_steps_to_come() -> None:
    """A weight of decay λ = unit alone, with the same gradients to come, shrinks by e, to first order in each step."""
    owned = parameters()
    optimizer = stepped(torch.optim.Adagrad(owned.values(), lr=0.01), owned)
    unit = measured_units(optimizer, owned, TOTAL, [0.01])["w"]
    # The sum of squares is 0.25 s at step s.
    exponent = sum(unit * 0.01 / (0.5 * s**0.5) for s in range(11, 11 + TOTAL))
    # A sum of 100 terms beside its integral.
    assert exponent == pytest.approx(1.0, rel=0.02)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")
def test_a_decoupled_unit_needs_no_long_run_step() -> None:
    owned = parameters()
    optimizer = stepped(torch.optim.Muon(owned.values(), lr=0.01), owned)
    assert measured_units(optimizer, owned, TOTAL, [0.01]) == pytest.approx(dict.fromkeys(owned, 1.0))


def test_a_parameter_without_a_gradient_so_far_gives_none() -> None:
    owned = parameters()
    optimizer = torch.optim.Adam(owned.values(), lr=0.01)
    stepped(optimizer, {"w": owned["w"]})
    assert list(measured_units(optimizer, owned, TOTAL, [0.01])) == ["w"]


def test_the_peak_is_what_the_schedule_will_reach() -> None:
    owned = parameters()

    def peak(make: Any, lr: float = 0.1) -> float:
        optimizer = torch.optim.SGD(owned.values(), lr=lr, momentum=0.9)
        (found,) = peak_rates(optimizer, [make(optimizer)], [optimizer.param_groups[0]["lr"]], TOTAL)
        return found

    assert peak(lambda o: OneCycleLR(o, max_lr=0.7, total_steps=TOTAL)) == 0.7
    assert peak(lambda o: CyclicLR(o, base_lr=0.001, max_lr=0.3)) == 0.3
    # Noam: the base rate is nominal
    noam = lambda t: min((t + 1) ** -0.5, (t + 1) * 20**-1.5)  # noqa: E731
    assert peak(lambda o: LambdaLR(o, noam), lr=1.0) == pytest.approx(max(map(noam, range(TOTAL))))


def test_a_warm_up_in_optimizer_step_is_seen_at_the_start() -> None:
    owned = parameters()
    optimizer = torch.optim.AdamW(owned.values(), lr=0.01)
    optimizer.param_groups[0]["lr"] = 1e-4
    assert peak_rates(optimizer, [], [0.01], TOTAL) == [0.01]


class Net(LightningModule):
    """A classifier whose learning rate starts at zero on request."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.late = nn.Linear(4, 2), late

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if not self.late:
            return optimizer
        return [optimizer], [LambdaLR(optimizer, lambda epoch: min(1.0, epoch / 2))]


def loader() -> DataLoader[Any]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


def test_a_rate_that_begins_at_zero_is_waited_for() -> None:
    callback = HypergradientCallback(WeightDecay(), warmup_steps=2, every_n_steps=4)
    trainer(callback, max_epochs=4).fit(Net(late=True), loader(), loader())
    assert callback.plan.units["net.weight"] == pytest.approx(1 / (0.1 * 16))


def test_units_follow_the_length_of_a_second_fit() -> None:
    callback, module = HypergradientCallback(WeightDecay(), warmup_steps=2, every_n_steps=4), Net()
    trainer(callback, max_epochs=4).fit(module, loader(), loader())
    before = callback.plan.units["net.weight"]
    trainer(callback, max_epochs=8).fit(module, loader(), loader())
    assert callback.plan.units["net.weight"] == pytest.approx(before / 2)


def test_layers_that_no_hook_sees_have_a_diagonal() -> None:
    layer = nn.Linear(3, 2)
    fisher = KroneckerFisher(layer, dict(layer.named_parameters()))
    with fisher.observing():
        nn.functional.linear(torch.randn(5, 3), layer.weight, layer.bias).square().mean().backward()
    fisher.update()
    assert fisher.factors == [None]
    assert [s is not None and bool(s.any()) for s in fisher.squares] == [True, True]


def test_sparse_gradients_are_refused_by_name() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    decay = WeightDecay()
    decay.build({"weight": embedding.weight})
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"dense gradients.*'weight'.*exclude=\['weight'\]"):
        decay.add_gradient_({"weight": embedding.weight})


def test_groups_may_be_coupled_and_decoupled() -> None:
    owned = parameters()
    optimizer = torch.optim.Adam(
        [{"params": [owned["w"]], "decoupled_weight_decay": True}, {"params": [owned["v"]]}], lr=0.1
    )
    decay = WeightDecay(init=0.5)
    decay.build(owned)
    for p in owned.values():
        p.grad = torch.zeros_like(p)
    rates = {id(owned["w"]): 0.1}
    decay.shrink_(owned, rates)
    decay.add_gradient_(owned, decoupled=rates)
    assert torch.allclose(owned["w"].detach(), torch.full((3, 2), 0.95))
    assert not owned["w"].grad.any()
    assert torch.allclose(owned["v"].grad, torch.full((2, 2), 0.5))  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["decoupled_weight_decay"]
