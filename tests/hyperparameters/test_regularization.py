"""Dropout, drop-connect, label smoothing, augmentation, whole numbers and choices; and all as one vector."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.hypergradient import implicit_hypergradient
from lightning_nested.hyperparameters import (
    Brightness,
    Categorical,
    Contrast,
    Cutout,
    DropConnect,
    DropoutRates,
    ExampleWeights,
    Hyperparameter,
    HyperparameterVector,
    InputNoise,
    Integer,
    Interval,
    LabelSmoothing,
    Saturation,
    Scalar,
    WeightDecay,
)

DOUBLE = {"w": torch.zeros(1, dtype=torch.float64)}


def built(hyperparameter: Any) -> Any:
    hyperparameter.build(DOUBLE)
    return hyperparameter


def images(size: int = 6, channels: int = 3) -> Tensor:
    return torch.rand(size, channels, 8, 8, dtype=torch.float64)


# ---- augmentation

STRENGTHS: dict[str, Callable[[], Any]] = {
    "brightness": Brightness, "contrast": Contrast, "saturation": Saturation, "noise": InputNoise,
}  # fmt: skip


@pytest.mark.parametrize("name", STRENGTHS)
def test_strengths_have_the_derivative_of_their_formula(name: str) -> None:
    """The change is linear in s: the derivative is (x′ − x)/s, at the same random numbers."""
    augment = built(STRENGTHS[name]())
    x = images()
    new = augment(x)
    assert new.shape == x.shape
    direction = torch.randn_like(x)
    (found,) = torch.autograd.grad((new * direction).sum(), augment.tensors["value"])
    share = (
        float(augment.value().detach()) / augment.transform.upper
    )  # s = upper·σ(raw): ds/d raw = s (1 − share)
    assert float(found) == pytest.approx(
        float(((new - x) * direction).sum().detach()) * (1 - share), rel=1e-9
    )
    assert float((new - x).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", STRENGTHS)
def test_each_image_has_its_own_strength(name: str) -> None:
    augment = built(STRENGTHS[name]())
    vector = HyperparameterVector([augment])
    h = torch.tensor([[-30.0], [0.0], [-30.0], [2.0]], dtype=torch.float64)
    x = images(4)
    with vector.bound(h) as values:
        new = augment(x)
        assert values[augment.name].shape == (4,)
    changed = (new - x).abs().amax(dim=(1, 2, 3)) > 1e-6
    assert changed.tolist() == [False, True, False, True]
    assert augment.tensors["value"].dim() == 0  # its own again


def test_what_the_augmentations_keep() -> None:
    x = images()
    contrast, saturation, noise = built(Contrast(0.5)), built(Saturation(0.5)), built(InputNoise(0.3))
    torch.testing.assert_close(contrast(x).mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(saturation(x).mean(dim=1), x.mean(dim=1))
    many = torch.zeros(200, 1, 16, 16, dtype=torch.float64)
    assert float(noise(many).detach().std()) == pytest.approx(0.3, rel=0.02)  # 51 200 numbers: ± 0.3 %
    ratio = built(Brightness(0.5))(x).detach() / x
    assert bool(((ratio > 0.5) & (ratio < 1.5)).all())
    torch.testing.assert_close(ratio.amax(dim=(1, 2, 3)), ratio.amin(dim=(1, 2, 3)))


def test_cutout_cuts_squares_of_its_length() -> None:
    cutout = built(Cutout(length=3, holes=1, max_length=6, max_holes=3))
    assert {k: float(v) for k, v in cutout.values().items()} == {"length": 3.0, "holes": 1.0}
    x = torch.ones(500, 1, 9, 9)
    holes = (cutout(x) == 0).squeeze(1)
    sizes = holes.sum(dim=(1, 2))
    assert int(sizes.max()) == 9
    assert int(sizes.min()) == 4  # centred on a corner
    vector = HyperparameterVector([cutout])
    two = vector.at_values({"cutout/length": 2, "cutout/holes": 2})
    none = vector.at_values({"cutout/holes": 0})
    with vector.bound(torch.stack([two, none] * 250)):
        sizes = (cutout(x) == 0).sum(dim=(1, 2, 3))
    assert int(sizes[::2].max()) == 8
    assert int(sizes[1::2].max()) == 0


# ---- label smoothing


def test_label_smoothing_is_that_of_torch_and_differentiable() -> None:
    smoothing = built(LabelSmoothing(0.2))
    logits, labels = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 5
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(smoothing(logits, labels), expected)
    (found,) = torch.autograd.grad(smoothing(logits, labels), smoothing.tensors["value"])
    step = 1e-6

    def moved(by: float) -> Tensor:
        value = smoothing.transform.forward(smoothing.tensors["value"].detach() + by)
        return functional.cross_entropy(logits, labels, label_smoothing=float(value))

    assert float(found) == pytest.approx(float((moved(step) - moved(-step)) / (2 * step)), rel=1e-6)
    vector = HyperparameterVector([smoothing])
    h = torch.linspace(-2, 2, 7, dtype=torch.float64).unsqueeze(1)
    with vector.bound(h) as values:
        each = [
            functional.cross_entropy(logits[i : i + 1], labels[i : i + 1], label_smoothing=float(e))
            for i, e in enumerate(values["label_smoothing"])
        ]
        torch.testing.assert_close(smoothing(logits, labels), torch.stack(each).mean())


def test_label_smoothing_works_with_implicit_gradients() -> None:
    """The other engines: against central differences of the retrained optimum."""
    smoothing = built(LabelSmoothing(0.2))
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3
    x_val, y_val = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 3

    def inner(w: Tensor) -> Tensor:
        return smoothing(x @ w, y) + 0.05 * w.square().sum()

    def optimum() -> Tensor:
        w = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = inner(w)
            loss.backward()
            return loss

        optimizer.step(closure)
        smoothing.tensors["value"].grad = None
        return w

    raw, w = smoothing.tensors["value"], optimum()
    (found,) = implicit_hypergradient(inner(w), functional.cross_entropy(x_val @ w, y_val), (w,), (raw,))
    losses = []
    for by in (1e-4, -1e-4):
        raw.data.add_(by)
        losses.append(float(functional.cross_entropy(x_val @ optimum(), y_val).detach()))
        raw.data.sub_(by)
    assert float(found) == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)


# ---- dropout


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Dropout2d(0.2), nn.Flatten(), nn.Dropout(0.4), nn.Linear(144, 2)
    )


def test_installed_dropout_is_that_of_torch() -> None:
    net, rates = network().double(), DropoutRates()
    rates.install(net)
    rates.build(DOUBLE)
    torch.testing.assert_close(rates.values()["rates"], torch.tensor([0.2, 0.4], dtype=torch.float64))
    x = torch.ones(400, 4, 6, 6, dtype=torch.float64)
    channels = net[1](x)
    assert bool((channels.amax(dim=(2, 3)) == channels.amin(dim=(2, 3))).all())
    assert channels.unique().tolist() == pytest.approx([0.0, 1 / 0.8])
    units = net[3](x.flatten(1))
    assert float((units == 0).double().mean()) == pytest.approx(0.4, abs=0.01)  # 57 600 units: ± 0.002
    assert float(units.mean()) == pytest.approx(1.0, abs=0.02)
    net.eval()
    assert torch.equal(net[3](x), x)


def test_each_example_has_its_own_rate() -> None:
    net, rates = network().double(), DropoutRates(per="model", init=0.3)
    rates.install(net)
    rates.build(DOUBLE)
    vector = HyperparameterVector([rates])
    h = torch.tensor([[-30.0], [0.0]], dtype=torch.float64)
    with vector.bound(h):
        out = net[3](torch.ones(2, 5_000, dtype=torch.float64))
    dropped = (out == 0).double().mean(dim=1)
    assert float(dropped[0]) == 0.0
    assert float(dropped[1]) == pytest.approx(0.45, abs=0.03)  # half of upper=0.9; standard error 0.007


def test_relaxed_dropout_has_a_derivative_and_hard_dropout_none() -> None:
    x = torch.ones(3000, 4, dtype=torch.float64)
    hard = built(DropoutRates(init=0.3))
    assert not hard(x).requires_grad
    soft = built(DropoutRates(init=0.3, temperature=0.05))
    out = soft(x)
    assert float(out.detach().mean()) == pytest.approx(1.0, abs=0.03)
    assert float(((out > 0.05) & (out < 1.3)).double().mean()) < 0.2  # nearly a mask
    (found,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), soft.tensors["rates"])
    assert float(found.abs()) > 0


def test_rates_survive_copies_and_revert() -> None:
    net, rates = network(), DropoutRates()
    rates.install(net)
    rates.build({"w": torch.zeros(1)})
    rates.tensors["rates"].data.fill_(0.0)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    for layer in (twin[1], twin[3]):
        layer.revert()
    assert (type(twin[1]), type(twin[3])) == (nn.Dropout2d, nn.Dropout)
    assert (twin[1].p, twin[3].p) == pytest.approx((0.45, 0.45))
    assert twin[3](torch.ones(5)).shape == (5,)


def test_drop_connect_drops_matrices() -> None:
    drop = built(DropConnect(init=0.25, include=["*.weight"]))
    weights = {"a.weight": torch.ones(200, 50), "a.bias": torch.ones(200), "other": torch.ones(3, 3)}
    out = drop(weights)
    assert float((out["a.weight"] == 0).float().mean()) == pytest.approx(0.25, abs=0.02)  # ± 0.004
    assert float(out["a.weight"].max()) == pytest.approx(1 / 0.75)
    assert torch.equal(out["a.bias"], weights["a.bias"])
    assert torch.equal(out["other"], weights["other"])


# ---- numbers, choices


def test_whole_numbers_and_choices() -> None:
    count, kind = built(Integer("count", 1, 4, 2)), built(Categorical("kind", ["a", "b", "c"], init=1))
    assert float(count.value()) == 2.0
    assert kind.choice() == "b"
    vector = HyperparameterVector([count, kind])
    h = torch.tensor([[-30.0, 5.0, 0.0, 0.0], [30.0, 0.0, 0.0, 5.0]], dtype=torch.float64)
    with vector.bound(h) as values:
        assert values["count"].tolist() == [1.0, 4.0]
        assert values["kind"].tolist() == [0.0, 2.0]
        assert kind.choice() == ["a", "c"]
    for number in (1, 2, 3, 4):
        with vector.bound(
            vector.at_values({"count": number, "kind": number - 2 if number > 1 else 0})
        ) as values:
            assert float(values["count"]) == number
            assert kind.choice() == "abc"[max(0, number - 2)]


def test_the_vector_is_all_tensors_end_to_end() -> None:
    decay, scalar = WeightDecay(per="parameter", init=0.1), Scalar("factor", 2.0)
    tuned: list[Hyperparameter] = [decay, scalar]
    for hyperparameter in tuned:
        hyperparameter.build({"a": torch.zeros(2, 3), "b": torch.zeros(4)})
    vector = HyperparameterVector(tuned)
    assert len(vector) == 11
    flat = vector.flat()
    assert torch.equal(flat[:6].reshape(2, 3), decay.tensors["a"])
    flat.sum().backward()
    assert all(torch.equal(t.grad, torch.ones_like(t)) for t in vector.tensors)
    with vector.bound(flat.detach() + 1) as values:
        assert float(values["factor"]) == 3.0
        assert decay.penalty({"a": torch.ones(2, 3), "b": torch.ones(4)}).item() == pytest.approx(
            0.5 * 0.1 * 2.71828 * 10
        )
    assert decay.tensors["a"].is_leaf


def test_refusals() -> None:
    weights = ExampleWeights(4)
    weights.build({})
    for h, message in (
        (torch.zeros(2, 4), "Got example_weights, which act on the whole batch"),
        (torch.zeros(3), r"h must have shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message), HyperparameterVector([weights]).bound(h):
            pass
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: HyperparameterVector([Scalar("a", 1.0)]), "must be built"),
        (lambda: Scalar("a", 3.0, Interval(lower=0, upper=2)), r"inside \(0, 2\). Got 3"),
        (lambda: Scalar("a", float("nan")), "finite"),
        (lambda: Integer("a", 1, 3, 4), "lower ≤ init ≤ upper"),
        (lambda: Categorical("a", ["x"]), "at least 2"),
        (lambda: Brightness(init=1.5), r"inside \(0.0, 1.0\). Got 1.5"),
        (lambda: built(Saturation())(images(channels=1)), "Got one channel"),
        (lambda: built(Brightness())(torch.zeros(3, 8, 8)), r"needs images \(batch"),
        (lambda: Cutout(length=20), "length ≤ max_length"),
        (lambda: DropoutRates(per="unit"), "per must be"),  # type: ignore[arg-type]
        (lambda: DropoutRates(init=0.95), "0 < init < upper"),
        (lambda: DropoutRates(temperature=0.0), "temperature"),
        (lambda: DropoutRates().install(nn.Linear(2, 2)), "Got none in Linear"),
        (lambda: DropoutRates().install(nn.Sequential(nn.Dropout(0.0))), "give init="),
        (lambda: built(DropoutRates()), "install"),
        (
            lambda: HyperparameterVector([built(Categorical("k", ["a", "b"]))]).at_values({"k": 2}),
            "'k' must lie",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
